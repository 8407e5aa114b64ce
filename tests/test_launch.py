"""launch.py: words, refusals as text, dry runs, JSON, the other commands, and where and under what it runs."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout import FLAT, REPO, flat_folder, header, launcher, nemotron, recipe, write
from support import python

import commands
import jobs
import launch
import prepare
import profiles
import recipes
import runs
import transport

FAMILY = ["nano3", "sft"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A checkout whose folder the launcher takes for its own, with the shipped profiles and an empty HOME."""
    root = nemotron(tmp_path / "checkout")
    shutil.copytree(REPO / "profiles", root / "profiles", ignore=shutil.ignore_patterns("__pycache__"))
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(prepare, "HERE", root)
    monkeypatch.setattr(profiles, "FOLDER", root / "profiles")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("AIRLIFT_HOME", str(home / "airlift"))
    for name in list(os.environ):
        if name.startswith(("LEPTON_", "RUNAI_", "SLURM_")) or name in jobs.TOKENS:
            monkeypatch.delenv(name)
    return root


@pytest.fixture
def say(here, capsys):
    """Runs launch.main in this process: (exit code, stdout, stderr)."""

    def run(*words):
        code = launch.main([str(word) for word in words])
        out = capsys.readouterr()
        assert "Traceback" not in out.out + out.err
        return code, out.out, out.err

    return run


def plan_of(say, *words):
    code, out, err = say(*words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


# ---------------------------------------------------------------- refusals: exit code and two lines

CONFIGS = "src/nemotron/recipes/nano3/stage1_sft/config"
REFUSALS = [
    # (words, what, fix)
    ("", "no recipe was named", "python launch.py list shows them; --help shows all commands"),
    ("--json", "no recipe was named", "python launch.py list shows them; --help shows all commands"),
    ("nano3", "a launch needs FAMILY and STAGE", "like: python launch.py nano3 sft local"),
    ("nano3 a=1", "a launch needs FAMILY and STAGE", "like: python launch.py nano3 sft local"),
    ("nano3 sft local more", "unexpected word 'more'",
     "overrides are KEY=VALUE; arguments for the script follow --"),
    ("nano3 sft --nodes 0", "--nodes is 0", "it must be a whole number, 1 or more"),
    ("nano3 sft --nodes -3", "--nodes is -3", "it must be a whole number, 1 or more"),
    ("nano3 sft --nodes two", "--nodes is 'two'", "it must be a whole number, 1 or more"),
    ("nano3 sft --nodes", "--nodes needs a value", "write it after the option, like: --nodes 2, -c default"),
    ("nano3 sft -c", "--config needs a value", "write it after the option, like: --nodes 2, -c default"),
    ("nano3 sft -c -- x", "--config needs a value", "write it after the option, like: --nodes 2, -c default"),
    ("nano3 sft --dry", "there is no option --dry", "did you mean --dry-run?"),
    ("nano3 sft --repo .", "there is no option --repo", "did you mean --repo-root?"),
    ("nano3 sft --lr=1", "there is no option --lr",
     "overrides are KEY=VALUE without dashes; --help shows the options"),
    ("nano3 sft -x", "there is no option -x",
     "overrides are KEY=VALUE without dashes; --help shows the options"),
    ("nano3 sft lokal", "profile 'lokal' does not exist", "did you mean local?"),
    ("nano3 sft lokal --dry-run", "profile 'lokal' does not exist", "did you mean local?"),
    ("nano sft", "there is no family 'nano'", "did you mean nano3?"),
    ("nano3 stf", "nano3 has no stage 'stf'", "did you mean sft?"),
    ("nano3 data/prep/lr", "nano3 has no stage 'data/prep/lr'", "did you mean data/prep/rl?"),
    ("nano3 /", "nano3 has no stage ''", "did you mean data/prep/rl or rl or sft?"),
    ("nano3 sft -c defualt", "nano3/sft has no config 'defualt' in ROOT/" + CONFIGS, "did you mean default?"),
    ("nano3 sft -c ./x.yaml", "there is no config file ./x.yaml", "give the path of a file, or the name of a config in ROOT/" + CONFIGS),
    ("nano3 sft =1", "the override '=1' names no setting", "overrides are KEY=VALUE with dots between names"),
    ("nano3 sft a=[", "the override 'a=[' cannot be parsed: ...", "its value is read as YAML; put a text in quotes, ..."),
    ("nano3 sft run=1", "ROOT/" + CONFIGS + "/default.yaml: run is 1, not a table", "fix the config's run section"),
    ("nano3 sft run.env.nodes=two", "nodes is 'two'", "it must be a whole number, 1 or more"),
    ("nano3 sft run.env.startup_commands=ls", "run.env.startup_commands is 'ls'", "it must be a list of strings"),
    ("nano3 sft run.env.run_command={x}", "run.env.run_command is ***", "it must be a string"),
    ("nano3 sft run.env.run_command=go-{x}", "the command 'go-{x}' cannot be filled in: it names {x}",
     "only {script} and {config} are filled in; double other braces"),
    ("nano3 sft run.env.compression=zip", "run.env.compression is 'zip'", "it must be xz or gz"),
    ("nano3 sft run.env.unpack=shred", "run.env.unpack is 'shred'", "it must be local or shared"),
    ("nano3 sft run.env.nodez=2", "there is no key run.env.nodez", "did you mean nodes or node_group?"),
    ("nano3 sft x+=[5]", "the override 'x+=[5]' names no setting", "overrides are KEY=VALUE with dots between names"),
    ("nano3 sft run.env.secrets.T=vault:x", "secrets.T is not a reference that local supports", 'write "env"'),
    ("nano3 sft run.env.secrets.UNSET_HERE=env", "secret UNSET_HERE is not set here",
     "export it, or remove it from [secrets]"),
    ("nano3 sft --repo-root /nonexistent", "there is no recipe under /nonexistent/src/*/recipes or steps",
     "name the source tree with --repo-root"),
    ("nano3 sft --repo-root", "--repo-root needs a value",
     "write it after the option, like: --nodes 2, -c default"),
    ("list nan", "ROOT has no recipe of family nan", "did you mean nano3?"),
    ("list a b", "unexpected word 'b'", "list takes only a family"),
    ("list --repo-root /nonexistent", "/nonexistent has no recipe", "name the source tree with --repo-root"),
    ("list --nodes 2", "list does not take --nodes", "leave it out"),
    ("list -- x", "list does not take --", "leave it out"),
    ("profiles local", "unexpected word 'local'", "profiles takes no words"),
    ("profiles -c x", "profiles does not take --config", "leave it out"),
    ("files nano3", "a launch needs FAMILY and STAGE", "like: python launch.py nano3 sft local"),
    ("files nano3 sft --detach", "files does not take --detach", "leave it out"),
    ("logs", "name one run", "python launch.py status lists them"),
    ("logs a b", "name one run", "python launch.py status lists them"),
    ("logs zzzzzz", "there is no run 'zzzzzz'", "python launch.py status lists them"),
    ("logs ../x", "there is no run '../x'", "python launch.py status lists them"),
    ("cancel", "name one run", "python launch.py status lists them"),
    ("cancel zzzzzz", "there is no run 'zzzzzz'", "python launch.py status lists them"),
    ("cancel zzzzzz --json", "cancel does not take --json", "leave it out"),
    ("diff", "name one run", "python launch.py status lists them"),
    ("diff zzzzzz", "there is no run 'zzzzzz'", "python launch.py status lists them"),
    ("logs zzzzzz --rank x", "--rank is 'x'", "it must be a whole number, 0 or more"),
    ("logs zzzzzz --rank 0 --all-ranks", "--rank and --all-ranks cannot be combined", "leave one out"),
    ("nano3 sft --nodes 2 --rank 2", "there is no rank 2", "the job has ranks 0 to 1"),
    ("nano3 sft --nodes 1 --rank 1", "there is no rank 1", "the job has only rank 0"),
    ("nano3 sft -f", "launch does not take --follow", "leave it out"),
    ("status zzzzzz", "there is no run 'zzzzzz'", "python launch.py status lists them"),
    ("status a b", "name one run", "python launch.py status lists them"),
    ("status --dry-run", "status does not take --dry-run", "leave it out"),
]


@pytest.mark.parametrize(("words", "what", "fix"), REFUSALS, ids=[case[0] for case in REFUSALS])
def test_a_refusal_is_two_lines_and_exit_code_2(say, here, words, what, fix):
    code, out, err = say(*words.split())
    lines = err.splitlines()
    assert code == 2 and out == "" and len(lines) == 2
    for line, want in zip(lines, ("airlift: " + what, fix), strict=True):
        want = want.replace("ROOT", str(here))
        assert line == want or (want.endswith("...") and line.startswith(want[:-3]))
    assert not (here.parent / "home/airlift").exists()  # nothing was started


POOL = st.sampled_from([
    "nano3", "sft", "data/prep/rl", "rl", "local", "lepton", "dgxcloud", "nope", "list", "profiles", "files", "status",
    "logs", "cancel", "launch", "-c", "default", "--config", "--nodes", "2", "0", "--repo-root", ".", "--json",
    "--detach", "--all-ranks", "--", "--debugging", "a=1", "run.env.nodes=3", "run.env=x", "run.env.env_vars={A: 1}",
    "a=${", "=", "", "-", "-1", "a.b"])


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.lists(POOL | st.text(max_size=5).filter(lambda word: "\0" not in word), max_size=7))
def test_any_words_end_in_two_lines_at_most(say, monkeypatch, words):
    monkeypatch.setattr(transport, "compress", lambda data, method: b"x")
    code, _, err = say("--dry-run", *words)
    assert code in (0, 2) and len(err.splitlines()) == (2 if code else 0)
    assert "a bug" not in err


def test_debug_shows_where_a_refusal_comes_from(here, capsys):
    for words in ("nano3 sft lokal --debug", "--debug nano3", "nano3 sft --nodes x --debug"):
        assert launch.main(words.split()) == 2
        err = capsys.readouterr().err
        assert err.startswith("Traceback") and err.splitlines()[-2].startswith("airlift: ")


def test_debug_after_the_dashes_is_the_scripts(say):
    assert say("nano3", "sft", "lokal", "--", "--debug")[0] == 2


@pytest.mark.parametrize(("error", "code", "first"), [
    (KeyboardInterrupt(), 130, "interrupted"), (ZeroDivisionError("x"), 2, "a bug: ZeroDivisionError('x')"),
    (PermissionError(13, "Permission denied", "/root/x"), 2, "/root/x: Permission denied"),
    (transport.Refusal("several\nlines", "to\n do", 5), 5, "several lines")])
def test_no_error_ends_in_a_traceback(say, monkeypatch, capsys, error, code, first):
    def fail(options):
        raise error

    monkeypatch.setitem(launch.COMMANDS, "list", launch.COMMANDS["list"]._replace(function=fail))
    found, out, err = say("list")
    assert (found, out) == (code, "") and len(err.splitlines()) == 2
    assert err.splitlines()[0] == "airlift: " + first
    assert launch.main(["list", "--debug"]) == code and "Traceback" in capsys.readouterr().err


def test_help(here, capsys):
    """The overview fits a screen; of each command everything is told, and nothing of another."""
    assert launch.main(["--help"]) == launch.main(["-h"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 2 * 24 and max(map(len, shown.splitlines())) <= 120
    for name, command in launch.COMMANDS.items():
        assert command.about in shown and (name == "launch" or "  %s" % name in shown)
    for code in "012345":
        assert re.search(r"\b%s [a-z]" % code, shown)
    for name, command in launch.COMMANDS.items():
        assert launch.main([name, "--help"]) == 0
        told = capsys.readouterr().out
        for option, known in launch.OPTIONS.items():
            assert (known.about in told) == (option in command.options + launch.ALWAYS), (name, option)
    assert launch.main(["nano3", "sft", "--help"]) == 0
    assert capsys.readouterr().out == launch.detail("launch")


def test_broken_files_are_named_with_their_line(say, here):
    write(here / "src/nemotron/recipes/nano3/stage1_sft/train.py", header(launch="mpi"))
    mend = "src/nemotron/recipes/nano3/stage1_sft/train.py:9: launch mode 'mpi' is not known"
    assert say(*FAMILY, "--dry-run") == (
        2, "", "airlift: nano3 has no stage 'sft'\ndid you mean data/prep/rl or rl?; or fix %s\n" % mend)
    code, out, err = say("list")
    assert code == 2 and "data/prep/rl" in out
    assert err == "airlift: %s\nuse one of torchrun, ray, direct, python\n" % mend


# ---------------------------------------------------------------- dry runs


def test_a_dry_run_shows_what_would_happen(say, here):
    code, out, err = say(*FAMILY, "lepton", "lr=1", "--nodes", "2", "--dry-run", "--", "--flag", "two words")
    assert (code, err) == (0, "")
    assert out.startswith("nano3/sft on lepton (lepton): 2 nodes x 8 GPUs, torchrun\n")
    assert out.endswith("nothing was submitted\n")
    rows = {}
    for line in out.splitlines()[1:-1]:
        rows.setdefault(line[2:11].strip(), []).append(line[11:])
    assert rows["script"] == ["src/nemotron/recipes/nano3/stage1_sft/train.py"]
    assert rows["config"] == [str(here / CONFIGS / "default.yaml")]
    assert rows["image"] == ["nvcr.io/nemo:26.02"]  # the YAML's, not the header's
    assert rows["command"][0].startswith("torchrun --nnodes 2 --node-rank \"$NODE_RANK\" --nproc-per-node 8 ")
    assert rows["command"][0].endswith(" --config \"$AIRLIFT_CONFIG\" --flag 'two words'")
    assert rows["outputs"] == ["/shared/airlift/nano3"]
    assert " files, " in rows["ships"][0] and " as xz, 1 chunk, sha256 " in rows["ships"][0]
    budgets = "\n".join(rows["budgets"] + rows[""])
    for name in ("one string", "environment", "API object"):
        assert name in budgets
    assert "% of 1.5 MiB" in budgets and "|#" in budgets
    assert "WANDB_PROJECT=nano3" in rows["env"]


@pytest.mark.parametrize("profile", ["local", "docker", "slurm", "lepton", "lepton_gcp", "dgxcloud"])
def test_every_profile_plans_a_nemotron_layout(say, profile):
    for family, stage in [("nano3", "sft"), ("nano3", "data/prep/rl"), ("super3", "rl/stage1_rlvr"), ("steps", "eval")]:
        assert plan_of(say, family, stage, profile, "--nodes", "1")["payload"]["fits"]


KEYS = {
    "recipe": {"name", "script", "launch", "nodes", "gpus_per_node", "nproc_per_node", "image"},
    "profile": {"name", "executor", "files"}, "config": {"path", "sha256", "bytes", "text"},
    "payload": {"files", "tar_bytes", "encoded_chars", "sha256", "compression", "chunks", "chunk_limit", "env_bytes",
                "env_limit", "object_bytes", "object_limit", "fits"},
}


def check_shape(plan):
    assert set(plan) == {*KEYS, "env", "argv", "command", "notes"}
    for name, keys in KEYS.items():
        assert set(plan[name]) == keys
    assert all(isinstance(value, str) for value in plan["env"].values())


def test_json_has_exactly_the_keys_of_the_design(say, here):
    plan = plan_of(say, *FAMILY, "dgxcloud")
    check_shape(plan)
    assert plan["recipe"] == {
        "name": "nano3/sft", "script": "src/nemotron/recipes/nano3/stage1_sft/train.py", "launch": "torchrun",
        "nodes": 1,
        "gpus_per_node": 8, "nproc_per_node": 8, "image": "nvcr.io/nemo:26.02"}
    assert plan["profile"] == {"name": "dgxcloud", "executor": "dgxcloud",
                               "files": [str(here / "profiles/dgxcloud.toml")]}
    payload = plan["payload"]
    assert payload["fits"] is True and payload["chunk_limit"] == 9216 and payload["object_limit"] == 1_572_864
    assert payload["tar_bytes"] < payload["encoded_chars"] <= payload["chunks"] * 9216
    assert 0 < payload["env_bytes"] < payload["env_limit"]
    assert plan["config"]["bytes"] == len(plan["config"]["text"].encode())
    assert "save: \"/nemo_run/nano3-sft-model\"" in plan["config"]["text"]
    assert "output_dir: \"/nemo_run/output/sft\"" in plan["config"]["text"]
    assert plan["argv"][:2] == ["python3", "-c"]
    assert plan["command"].startswith("torchrun ")


def test_the_same_tree_has_the_same_digest_from_anywhere(say, here, tmp_path):
    first = plan_of(say, *FAMILY, "lepton")["payload"]["sha256"]
    assert plan_of(say, *FAMILY, "dgxcloud")["payload"]["sha256"] == first
    shutil.copytree(here, tmp_path / "copy")
    assert plan_of(say, *FAMILY, "--repo-root", tmp_path / "copy")["payload"]["sha256"] == first
    with open(here / "src/nemotron/kit/io.py", "a") as file:
        file.write("# uncommitted\n")
    assert plan_of(say, *FAMILY, "lepton")["payload"]["sha256"] != first


def test_chunks_are_shown_by_their_length_only(say):
    env = plan_of(say, *FAMILY, "dgxcloud")["env"]
    chunks = {name: value for name, value in env.items() if name.startswith("AIRLIFT_") and name[-1].isdigit()
              and not name.endswith("SHA256")}
    assert len(chunks) >= 3
    assert all(value.startswith("<") and value.endswith(" characters>") for value in chunks.values())
    assert env["AIRLIFT_TREE_CHUNKS"] == "1"
    assert max(map(len, env.values())) < 100


def test_what_does_not_fit_is_told_in_full_and_exits_3(say, here):
    (here / "src/nemotron/kit/noise.txt").write_bytes(os.urandom(1_200_000))
    code, out, err = say(*FAMILY, "lepton", "--json")
    plan = json.loads(out)
    check_shape(plan)
    assert (code, err, plan["payload"]["fits"]) == (3, "", False)
    assert plan["payload"]["object_bytes"] > plan["payload"]["object_limit"]
    code, out, err = say(*FAMILY, "lepton", "--dry-run")
    assert code == 3 and len(err.splitlines()) == 2 and "nothing was submitted" in err.splitlines()[0]
    assert err.startswith("airlift: the payload does not fit: API object needs ")
    assert "the biggest are src/nemotron/kit/noise.txt (1.1 MiB), " in err
    assert "100 %" not in out and "nothing was submitted" in out


def test_one_file_that_is_too_large_is_in_the_json_too(say, here):
    with open(here / "src/nemotron/kit/huge.txt", "wb") as file:
        file.truncate(1 << 30)
    code, out, err = say(*FAMILY, "lepton", "--json")
    assert (code, err, json.loads(out)["payload"]["fits"]) == (3, "", False)
    assert "1073741824  src/nemotron/kit/huge.txt" in say("files", *FAMILY, "lepton")[1]


def test_secrets_and_what_looks_like_one_show_as_stars(say, here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    monkeypatch.setenv("PLAIN", "visible")
    write(here / "profiles/mine.toml", """\
        extends = "lepton"
        [secrets]
        HF_TOKEN = "env"
        NGC_API_KEY = "env"
        WANDB_API_KEY = "lepton:wandb"
        [env_vars]
        MY_API_KEY = "in-the-profile"
        OTHER_TOKEN = "${env:GONE}"
        PLAIN = "${env:PLAIN}"
        """)
    plan = plan_of(say, *FAMILY, "mine")
    assert {name: plan["env"].get(name) for name in (
        "HF_TOKEN", "NGC_API_KEY", "WANDB_API_KEY", "MY_API_KEY", "OTHER_TOKEN", "PLAIN")} == {
        "HF_TOKEN": "***", "NGC_API_KEY": "<unset NGC_API_KEY>", "WANDB_API_KEY": "***", "MY_API_KEY": "***",
        "OTHER_TOKEN": "<unset GONE>", "PLAIN": "visible"}
    assert "HF_TOKEN is sent by value, in the job's environment" in plan["notes"]
    text = json.dumps(plan) + say(*FAMILY, "mine", "--dry-run")[1]
    assert "hf_secret_value" not in text and "in-the-profile" not in text


def test_no_secret_shows_in_a_note_an_error_or_a_config(say, here, monkeypatch):
    secret, token = "swordfish-%d" % os.getpid(), "hf_" + "a1" * 17
    monkeypatch.setenv("DEPLOY_TOKEN", secret)
    monkeypatch.setenv("WKEY", secret[::-1])
    write(here / "profiles/mine.toml", """\
        extends = "lepton"
        mounts = ["${auto_mount:git+https://host/x@main,/x}"]
        run_command = "login ${env:WKEY} && python {script}"
        container_image = "registry/${env:DEPLOY_TOKEN}"
        [git_mirrors]
        "https://host/" = "https://me:${env:DEPLOY_TOKEN}@mirror/"
        [secrets]
        WKEY = "env"
        """)
    write(here / "env.toml", "[wandb]\napi_key = 'in-the-section'\nproject = 'p'")
    monkeypatch.chdir(here)
    recipe(here, path="src/nemotron/recipes/nano3/stage1_sft/train.py",
           yaml="key: ${run.wandb.api_key}\ntoken: %s\n" % token)
    plan = plan_of(say, *FAMILY, "mine")
    assert "each pod clones https://***@mirror/x at main to /x" in plan["notes"]
    assert "the config contains what looks like a credential, and is sent as it is" in plan["notes"]
    write(here / "profiles/bad.toml", 'extends = "mine"\nstartup_commands = "login ${env:DEPLOY_TOKEN}"')
    write(here / "profiles/worse.toml", 'extends = "mine"\nrun_command = "login ${env:DEPLOY_TOKEN} {x}"')
    said = json.dumps(plan) + repr([say(*FAMILY, name, "--dry-run") for name in ("mine", "bad", "worse")])
    for hidden in (secret, secret[::-1], token, "in-the-section"):
        assert hidden not in said, said


def test_a_dry_run_says_what_a_launch_would_be_refused_for(say, here):
    write(here / "profiles/mine.toml", """\
        executor = "dgxcloud"
        base_url = "http://h/api/v1"
        client_id = "i"
        client_secret = "s"
        project_name = "p"
        container_image = "i"
        gpus_per_node = 1
        """)
    assert not [note for note in plan_of(say, *FAMILY, "mine")["notes"] if "refused" in note]
    notes = plan_of(say, *FAMILY, "mine", "--nodes", "2", "run.env.retries=1")["notes"]
    assert ("a launch would be refused: retries is 1, and the job has 2 nodes; run:AI restarts one pod without the "
            "others; remove retries, and launch again to resume") in notes
    notes = plan_of(say, *FAMILY, "mine", "run.env.custom_spec.args=x")["notes"]
    assert [note for note in notes if note.startswith("a launch would be refused: custom_spec")], notes
    assert say(*FAMILY, "mine", "run.env.custom_spec.args=x")[0] == 2


def test_a_later_stage_that_is_refused_says_how_to_go_on(say, here, monkeypatch):
    recipe(here, "nano3/prep", nodes=1)
    started = []

    def submit(plan, options):
        if started:
            raise transport.Refusal("the platform could not be reached", "look at the network", 5)
        started.append(plan.recipe.name)
        return runs.Run("t23456", plan.recipe.name, "local", "local", 1, "0", ended=["done", ""]), 0.0

    monkeypatch.setattr(launch, "submit", submit)
    monkeypatch.setattr(commands, "follow", lambda run, took: 0)
    code, out, err = say("nano3", "prep,sft", "run.env.nodes=1")
    assert (code, started, len(err.splitlines())) == (5, ["nano3/prep"], 2)
    assert out == "to continue from here: python launch.py nano3 sft run.env.nodes=1\n"


def test_ctrl_c_in_a_pipeline_says_how_to_go_on_behind_the_job_that_goes_on(say, here, monkeypatch):
    recipe(here, "nano3/prep", nodes=1)
    run = runs.Run("t23456", "nano3/prep", "slurm", "slurm", 1, "0")
    monkeypatch.setattr(launch, "submit", lambda one, options: (run, 0.0))
    monkeypatch.setattr(commands, "follow", lambda run, took: 0)  # as it answers Ctrl-C: the job has not ended
    assert say("nano3", "prep,sft") == (0, "to continue from here: python launch.py nano3 sft\n", "")


def test_notes_are_said(say, here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "x")
    write(here / "src/nemotron/kit/.env", "A=1\n")
    write(here / "src/nemotron/kit/model.safetensors", "x")
    write(here / "src/nemotron/kit/big.bin", "x")
    recipe(here, path="src/nemotron/recipes/nano3/stage1_sft/train.py",
           yaml="run: {env: {sandbox: 1, node_group: x}}\na: ${run.wandb.project}\n")
    notes = plan_of(say, *FAMILY, "docker", "run.env.mounts=[]")["notes"]
    assert "run.env has sandbox, which Airlift does not use" in notes
    assert "HF_TOKEN is set here but not sent; add it to [secrets] to send it" in notes
    assert "the config refers to ${run.wandb.project}, which is not set anywhere" in notes
    assert "left out, as they look like credentials: src/nemotron/kit/.env" in notes
    assert "left out, data or model file: 2, like src/nemotron/kit/big.bin" in notes
    write(here / "profiles/bare.toml", 'executor = "docker"')
    stays = "no workspace is set: what the job writes stays in the pod and is lost with it"
    assert stays in plan_of(say, *FAMILY, "bare")["notes"]
    assert "note     " + stays in say(*FAMILY, "bare", "--dry-run")[1]


def test_a_stage_of_the_profile_counts(say):
    plan = plan_of(say, "nano3", "data/prep/rl", "lepton")
    assert plan["recipe"]["gpus_per_node"] == 0 and plan["recipe"]["nproc_per_node"] == 1
    assert plan["command"].startswith("python ") and "needs a project and the network" in "\n".join(plan["notes"])
    assert plan_of(say, "nano3", "data/prep/rl", "slurm")["command"].startswith("uv run --extra xenna python ")


def test_repo_root_of_the_command_line_of_the_profile_and_of_the_launcher(say, here, tmp_path):
    for name in ("one", "two"):
        recipe(tmp_path / name, "fam/" + name, path="src/p/recipes/fam/x.py")
    write(here / "profiles/mine.toml", 'executor = "local"\nrepo_root = "../one"\n')
    assert plan_of(say, "fam", "one", "mine")["recipe"]["name"] == "fam/one"
    assert plan_of(say, "fam", "two", "mine", "--repo-root", tmp_path / "two")["recipe"]["name"] == "fam/two"
    assert plan_of(say, "nano3", "sft")["recipe"]["name"] == "nano3/sft"


def test_words_may_stand_in_any_order(say):
    want = plan_of(say, "nano3", "sft", "docker", "a=1", "--nodes", "3")
    got = plan_of(say, "--nodes", "3", "nano3", "a=1", "sft", "-c", "default", "docker")
    assert (got["recipe"], got["config"], got["profile"]) == (want["recipe"], want["config"], want["profile"])
    assert "a: 1" in got["config"]["text"] and got["recipe"]["nodes"] == 3
    assert plan_of(say, "nano3", "/data/prep/rl/")["recipe"]["name"] == "nano3/data/prep/rl"


# ---------------------------------------------------------------- list, profiles, files


def test_list(say, here):
    code, out, err = say("list")
    assert (code, err) == (0, "")
    assert [line for line in out.splitlines() if not line.startswith(" ")] == ["nano3", "steps", "super3"]
    assert ("  sft                          torchrun     1 x 8    src/nemotron/recipes/nano3/stage1_sft/train.py"
            "  [nvcr.io/nemo:25.11]") in out
    assert "super3" not in say("list", "nano3")[1]
    rows = json.loads(say("list", "super3", "--json")[1])
    assert rows == [{"name": "super3/rl/stage1_rlvr", "launch": "ray", "nodes": 109, "gpus_per_node": 8, "image": None,
                     "script": "src/nemotron/recipes/super3/stage2_rl/stage1_rlvr/train.py"}]
    assert json.loads(say("list", "--json", "--repo-root", here)[1])[0]["name"] == "nano3/data/prep/rl"


def test_profiles(say):
    code, out, _ = say("profiles")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == sorted(
        path.stem for path in (REPO / "profiles").glob("*.toml"))
    rows = json.loads(say("profiles", "--json")[1])
    assert {row["name"]: row["executor"] for row in rows}["lepton_gcp"] == "lepton"
    assert set(rows[0]) == {"name", "executor", "about"}


def test_files(say, here):
    write(here / "src/nemotron/kit/key.pem", "x")
    write(here / "src/nemotron/kit/run.sh", "echo\n")
    code, out, _ = say("files", *FAMILY, "lepton")
    assert code == 0
    rows = dict(reversed(line.split(None, 1)) for line in out.splitlines())
    for path in ("src/nemotron/kit/io.py", "src/nemo_runspec/__init__.py", CONFIGS + "/default.yaml",
                 "src/nemotron/recipes/_shared/util.py", "src/nemotron/recipes/nano3/stage2_rl/train.py"):
        assert int(rows[path]) == (here / path).stat().st_size
    assert not any("super3" in path for path, size in rows.items() if size != "-"), "another family stays here"
    assert rows["src/nemotron/kit/key.pem (credential)"] == "-"
    assert rows["src/nemotron/recipes/nano3/README.md (documentation)"] == "-"
    told = json.loads(say("files", *FAMILY, "--json")[1])
    assert {"path": "src/nemotron/kit/run.sh", "bytes": 5} in told["files"]
    assert {"path": "src/nemotron/kit/key.pem", "reason": "credential"} in told["left_out"]
    assert not any(path.startswith("src/nemotron/steps/env") for path in rows)  # another family
    assert "src/nemotron/steps/eval/step.py" in say("files", "steps", "eval")[1]


def test_status_of_nothing(say, here):
    assert say("status") == (0, "there are no runs yet\n", "")
    assert say("status", "--json") == (0, "[]\n", "")


def test_a_broken_run_file_is_named(say, here):
    for number, text in enumerate(["", "[]", "{}", '{"run": 1}', "\xff"]):
        write(here.parent / ("home/airlift/runs/abcde%d.json" % number), text)
        code, _, err = say("status", "abcde%d" % number)
        assert code == 2 and err.startswith("airlift: the file of run abcde%d cannot be read: " % number)
    assert say("status")[0] == 2


# ---------------------------------------------------------------- as a process


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """The flat scripts copied next to a checkout, as a person does it: no virtual environment, no git."""
    return flat_folder(nemotron(tmp_path_factory.mktemp("flat")))


@pytest.fixture
def bare(tmp_path):
    """An environment with hardly anything in it."""
    (tmp_path / "home").mkdir()
    return {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home")}


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts)


def test_a_copied_folder_works_from_any_directory(flat, bare, tmp_path):
    done = launcher(flat, *FAMILY, "lepton", "--dry-run", env=bare, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("nothing was submitted\n")
    link = tmp_path / "link"
    link.symlink_to(flat)
    there = launcher(link, *FAMILY, "lepton", "--json", env=bare, cwd=tmp_path)
    assert there.returncode == 0 and json.loads(there.stdout)["recipe"]["name"] == "nano3/sft"
    assert set(FLAT) < set(os.listdir(flat))


def test_a_dry_run_needs_no_network_and_writes_nothing(flat, bare):
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("needs unshare -rn")
    before = files_below(flat)
    words = [sys.executable, str(flat / "launch.py"), *FAMILY, "--dry-run"]
    for profile in ("local", "docker", "slurm", "lepton", "dgxcloud"):
        done = subprocess.run(["unshare", "-rn", *words, profile], env=bare, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(bare["HOME"]) == []
    assert files_below(flat) == before


OLD = [(2, 7), (3, 6), (3, 7), (3, 8), (3, 9), (3, 10)]


@pytest.mark.parametrize("version", OLD, ids=["%d.%d" % version for version in OLD])
def test_an_old_python_is_told_plainly(flat, bare, version):
    for words in ([], FAMILY, ["--help"], ["nano3", "sft", "--debug"]):
        done = launcher(flat, *words, python=python(*version), env=bare)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines() == [
            "airlift: needs Python 3.11 or later, and this is %d.%d" % version,
            "start it with a newer one, like: python3.11 launch.py ..., or run `make setup`"]


def test_an_old_python_hands_over_to_the_virtual_environment(tmp_path, bare):
    folder = flat_folder(nemotron(tmp_path / "flat"))
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(REPO / ".venv/bin/python")
    if not (REPO / ".venv/bin/python").exists():
        pytest.skip("there is no .venv in this checkout")
    (folder / ".venv/pyvenv.cfg").write_text((REPO / ".venv/pyvenv.cfg").read_text())
    (folder / ".venv/lib").symlink_to(REPO / ".venv/lib")
    done = launcher(folder, *FAMILY, "lepton", "--json", python=python(3, 8), env=bare)
    assert done.returncode == 0 and json.loads(done.stdout)["payload"]["fits"]


def test_without_omegaconf_two_plain_lines(flat, bare):
    newer = python(3, 12)
    assert subprocess.run([newer, "-c", "import omegaconf"], capture_output=True).returncode, "this one has omegaconf"
    done = launcher(flat, *FAMILY, "--dry-run", python=newer, env=bare)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["airlift: omegaconf, which reads the configs, is not installed for this Python",
                                        "run `make setup`, or pip install -r requirements.txt"]
    for words in (["list"], ["profiles"], ["status"]):
        assert launcher(flat, *words, python=newer, env=bare).returncode == 0


def test_a_reader_that_goes_away_is_no_error(flat, bare, tmp_path):
    root = tmp_path / "big"
    for number in range(200):
        recipe(root, "f/s%d" % number, path="src/p/recipes/f/s%d.py" % number, image="x" * 2000)
    for words in (["list", "--repo-root", root], ["list", "--json", "--repo-root", root],
                  ["files", "f", "s1", "--repo-root", root], ["profiles"], ["f", "s1", "--json", "--repo-root", root]):
        process = subprocess.Popen([sys.executable, str(flat / "launch.py"), *map(str, words)], env=bare,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        assert (process.stderr.read(), process.wait(30)) == (b"", 0)
        process.stderr.close()


def test_output_that_cannot_be_written_is_an_error(flat, bare):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(flat / "launch.py"), "list"], env=bare, stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "airlift: No space left on device\ncheck that it exists, its permissions, and the space on disk\n"


def test_any_locale_and_odd_words(flat, bare):
    for locale in ({"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        words = [sys.executable, str(flat / "launch.py"), *FAMILY, "local", "a=é", "--", "ü"]
        done = subprocess.run([*words[:4], "--json", *words[4:]], env=bare | locale, capture_output=True, timeout=60)
        plan = json.loads(done.stdout)
        assert "a: é\n" in plan["config"]["text"] and plan["command"].endswith(" 'ü'")
        done = subprocess.run([*words[:4], "--dry-run", *words[4:]], env=bare | locale, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
        done = subprocess.run([*words[:5], b"a=\xff"], env=bare | locale, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (2, b"airlift: the word 'a=\\udcff' is not UTF-8\nwrite it in UTF-8\n")


def test_ctrl_c_while_it_packs(flat, bare, tmp_path):
    root = nemotron(tmp_path / "slow")
    os.mkfifo(root / CONFIGS / "wait.yaml")  # reading it blocks
    process = subprocess.Popen([sys.executable, str(flat / "launch.py"), *FAMILY, "-c",
                                str(root / CONFIGS / "wait.yaml"), "--repo-root", str(root), "--dry-run"],
                               env=bare, stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=20)[1]
    assert "Traceback" not in out and len(out.splitlines()) == 2
    assert process.returncode in (2, 130)


# ---------------------------------------------------------------- a real checkout


@pytest.mark.skipif("NEMOTRON_ROOT" not in os.environ, reason="needs a Nemotron checkout in NEMOTRON_ROOT")
def test_every_recipe_of_a_real_checkout_plans_on_every_executor(say, monkeypatch):
    monkeypatch.setattr(transport, "compress", functools.lru_cache(None)(transport.compress))  # one tree, many plans
    root = os.environ["NEMOTRON_ROOT"]
    rows = json.loads(say("list", "--json", "--repo-root", root)[1])
    found, _ = recipes.scan(Path(root))
    assert len(rows) == len(found) >= 84
    failed = {}
    for row in rows:
        family, stage = row["name"].split("/", 1)
        for profile in ("local", "docker", "slurm", "lepton", "dgxcloud"):
            code, out, err = say(family, stage, profile, "--json", "--repo-root", root)
            if code:
                failed[row["name"], profile] = err
                continue
            plan = json.loads(out)
            check_shape(plan)
            assert plan["recipe"]["name"] == row["name"]
            if plan["recipe"]["launch"] == "torchrun" and not found[row["name"]].cmd:
                assert plan["command"].startswith("torchrun ")
    assert failed == {}
