"""prepare.py: from the words of a launch to profile, recipe, config, job, tree and plan; and the notes on the way."""

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
from inside import FAMILY, check_shape, plan_of
from layout import recipe, write

import recipes
import transport


@pytest.mark.parametrize("profile", ["local", "docker", "slurm", "lepton", "lepton_gcp", "dgxcloud"])
def test_every_profile_plans_a_nemotron_layout(say, profile):
    for family, stage in [("nano3", "sft"), ("nano3", "data/prep/rl"), ("super3", "rl/stage1_rlvr"), ("steps", "eval")]:
        assert plan_of(say, family, stage, profile, "--nodes", "1")["payload"]["fits"]


def test_the_same_tree_has_the_same_digest_from_anywhere(say, here, tmp_path):
    first = plan_of(say, *FAMILY, "lepton")["payload"]["sha256"]
    assert plan_of(say, *FAMILY, "dgxcloud")["payload"]["sha256"] == first
    shutil.copytree(here, tmp_path / "copy")
    assert plan_of(say, *FAMILY, "--repo-root", tmp_path / "copy")["payload"]["sha256"] == first
    with open(here / "src/nemotron/kit/io.py", "a") as file:
        file.write("# uncommitted\n")
    assert plan_of(say, *FAMILY, "lepton")["payload"]["sha256"] != first


def test_notes_are_said(say, here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "x")
    write(here / "src/nemotron/kit/.env", "A=1\n")
    write(here / "src/nemotron/kit/model.safetensors", "x")
    write(here / "src/nemotron/kit/big.bin", "x")
    recipe(here, path="src/nemotron/recipes/nano3/stage1_sft/train.py",
           yaml="run: {env: {mystery: 1, node_group: x}}\na: ${run.wandb.project}\n")
    notes = plan_of(say, *FAMILY, "docker", "run.env.mounts=[]")["notes"]
    assert "run.env has mystery, which Airlift does not use" in notes
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


# ---------------------------------------------------------------- whose tree it is, and the words of a launch


def test_the_tree_that_a_person_stands_in_comes_before_the_launchers_own(say, here, tmp_path, monkeypatch):
    theirs = tmp_path / "work/Nemotron"
    recipe(theirs, "nano3/sft", "print('theirs')\n", path="src/nemotron/recipes/nano3/sft/train.py")
    recipe(tmp_path / "work/named", "nano3/sft", path="src/p/steps/s.py")
    below = theirs / "docs/deep"
    below.mkdir(parents=True)
    for folder, tree in [(here, here), (theirs, theirs), (below, theirs), (theirs / "src", theirs), (tmp_path, here)]:
        monkeypatch.chdir(folder)
        assert "script   %s/src/" % tree in say("nano3", "sft", "--dry-run", "run.env.mounts=[]")[1]
        assert ("docs" in str(folder)) <= ("nano3" in say("list")[1])
    write(here / "profiles/mine.toml", 'executor = "local"\nrepo_root = "%s"\n' % here)
    monkeypatch.chdir(theirs)
    assert "script   %s/src/" % here in say("nano3", "sft", "mine", "--dry-run")[1], "the profile's word"
    said = say("nano3", "sft", "mine", "--repo-root", tmp_path / "work/named", "--dry-run")[1]
    assert "script   %s/src/p/steps/s.py" % (tmp_path / "work/named") in said, "the command line's"


@pytest.mark.parametrize("place", ["beside", "above"])
def test_the_starter_is_not_taken_silently_where_another_tree_is_near(say, here, tmp_path, monkeypatch, place):
    toy = tmp_path / "work/Nemotron/airlift" if place == "above" else tmp_path / "work/airlift"
    recipe(toy, "nano3/sft", path="src/starter/recipes/nano3/sft/train.py")
    recipe(tmp_path / "work/Nemotron", "nano3/sft", path="src/nemotron/recipes/nano3/sft/train.py")
    monkeypatch.chdir(toy)
    note = "this is the starter's nano3/sft, and %s has one of its family, too" % (tmp_path / "work/Nemotron")
    assert note in str(plan_of(say, "nano3", "sft")["notes"])
    monkeypatch.chdir(tmp_path / "work/Nemotron")
    assert note not in str(plan_of(say, "nano3", "sft")["notes"])


@pytest.mark.parametrize(("words", "name", "profile"), [
    ("nano3 data prep rl", "nano3/data/prep/rl", "local"), ("nano3 data prep rl docker", "nano3/data/prep/rl", "docker"),
    ("nano3 data/prep rl", "nano3/data/prep/rl", "local"), ("super3 rl stage1_rlvr", "super3/rl/stage1_rlvr", "local"),
    ("super3 rl stage1_rlvr lepton a=1", "super3/rl/stage1_rlvr", "lepton"), ("nano3 sft slurm", "nano3/sft", "slurm")])
def test_a_stage_may_be_written_with_blanks(say, words, name, profile):
    plan = plan_of(say, *words.split(), "run.env.mounts=[]")
    assert (plan["recipe"]["name"], plan["profile"]["name"]) == (name, profile)


@pytest.mark.parametrize(("words", "what"), [
    ("nano3 sft lepto", "profile 'lepto' does not exist"), ("nano3 data prep xx local", "nano3 has no stage 'data/prep/xx'"),
    ("nano3 data prep xx", "unexpected word 'xx'"), ("nano3 data prep", "profile 'prep' does not exist")])
def test_other_words_are_told(say, words, what):
    code, _, err = say(*words.split())
    assert code == 2 and what in err


def test_an_artifact_is_for_the_stages_that_have_it(say, here):
    """run.data and the like are as much a stage's own as its other keys; run.env is for all."""
    recipe(here, "nano3/one", path="src/p/recipes/one/train.py", yaml="a: 1\n")
    recipe(here, "nano3/two", path="src/p/recipes/two/train.py", yaml="run: {data: 'x:latest'}\na: ${run.data}\n")
    code, out, err = say("nano3", "one,two", "local", "run.data=/mine", "run.env.env_vars.A=1", "run.new=2", "--json")
    assert (code, err) == (0, "")
    texts = [stage["config"]["text"] for stage in json.loads(out)["stages"]]
    assert "/mine" not in texts[0] and "a: /mine" in texts[1]
    assert all(stage["env"]["A"] == "1" for stage in json.loads(out)["stages"])


def test_a_stage_that_has_only_configs_is_told_which_recipe_takes_them(say, here):
    """As Nemotron's `nano3 eval`, which NVIDIA's launcher gives to another program."""
    recipe(here, "steps/judge/model", path="src/p/steps/judge/model/step.py")
    config = write(here / "src/p/recipes/nano3/stage3_judge/config/default.yaml", "{}\n")
    assert say("nano3", "judge", "local") == (2, "", (
        "airlift: nano3/judge has configs, and no recipe of its own\nlaunch: steps judge/model -c %s\n" % config))
    assert plan_of(say, "steps", "judge/model", "local", "-c", config)


@pytest.mark.parametrize(("option", "more"), [("--run", ""), ("--batch", " --detach")])
def test_the_words_of_nvidias_users_are_answered_with_ours(say, option, more):
    assert say("nano3", "sft", option, "lepton") == (2, "", (
        "airlift: there is no option %s: the profile is the word behind the stage\n"
        "write: python launch.py FAMILY STAGE PROFILE%s\n" % (option, more)))


def test_a_config_for_one_stage_and_one_for_those_that_have_it(say, here):
    one = str(here) + "/src/nemotron/recipes/nano3/%s/config/%s.yaml"
    recipe(here, "nano3/prep", yaml="a: 0\n")
    recipe(here, "nano3/train", yaml="b: 0\n")
    write(Path(one % ("prep", "tiny")), "a: 1\n")
    write(Path(one % ("train", "big")), "b: 2\n")

    def texts(*words):
        return [stage["config"]["text"] for stage in json.loads(say("nano3", "prep,train", "--json", *words)[1])["stages"]]

    assert texts() == ["a: 0\n", "b: 0\n"] and texts("-c", "tiny") == ["a: 1\n", "b: 0\n"]
    assert texts("-c", "train=big") == ["a: 0\n", "b: 2\n"]
    assert texts("-c", "tiny", "-c", "train=big") == ["a: 1\n", "b: 2\n"]
    assert texts("-c", "default", "-c", "prep=tiny") == ["a: 1\n", "b: 0\n"]
    assert texts("a=5", "run.env.mounts=[]") == ["a: 5\n", "b: 0\n"]
    assert "no stage has the config huge" in say("nano3", "prep,train", "-c", "huge", "--dry-run")[2]
    assert "nano3/train has no config 'tiny'" in say("nano3", "prep,train", "-c", "train=tiny", "--dry-run")[2]
    assert plan_of(say, "nano3", "train", "-c", "train=big")["config"]["text"] == "b: 2\n"


# ---------------------------------------------------------------- files that are named, and what is taken back in

YAML = "src/nemotron/recipes/nano3/stage1_sft/config/default.yaml"


def files_of(say, *words):
    """(path -> bytes of what ships, path -> why it is left out), as `files` says it."""
    told = json.loads(say("files", *FAMILY, *words, "--json")[1])
    return ({item["path"]: item["bytes"] for item in told["files"]},
            {item["path"]: item["reason"] for item in told["left_out"]})


@pytest.mark.parametrize("text", [
    "blend: data/b.json", "blend: ./data/b.json", "blend: ${oc.env:PWD}/data/b.json", "blend: ROOT/data/b.json",
    "blend: [x, /nemo_run/code/data/b.json]", "args: --blend=data/b.json --x", "a: {b: {c: 'data/b.json,other'}}",
    "run: {env: {startup_commands: ['cat data/b.json >x']}}", "run: {env: {env_vars: {BLEND: data/b.json}}}",
    "run: {env: {run_command: 'python {script} data/b.json'}}", "blend: data/../data/b.json"])
@pytest.mark.parametrize("scope", ["family", "imports"])
def test_a_file_outside_of_src_ships_where_it_is_named(say, here, text, scope):
    write(here / "data/b.json", "{}\n")
    write(here / "data/c.json", "{}\n")
    write(here / YAML, text.replace("ROOT", str(here)) + "\n")
    found, left = files_of(say, "run.env.scope=" + scope)
    assert [path for path in found if not path.startswith("src/")] == ["data/b.json"] and found["data/b.json"] == 3
    assert not [path for path in left if not path.startswith("src/")]
    notes = plan_of(say, *FAMILY, "run.env.scope=" + scope)["notes"]
    assert "also sent, as config or command name them: data/b.json" in notes


def test_a_named_file_with_a_blank_in_its_name_and_one_of_the_scripts_arguments(say, here):
    write(here / "data/my blend.json", "{}\n")
    write(here / "x.json", "{}\n")
    write(here / YAML, "a: data/my blend.json\nb: [data/my blend.json]\n")
    told = json.loads(say("files", *FAMILY, "--json", "--", "--file", "x.json")[1])
    assert {"data/my blend.json", "x.json"} < {item["path"] for item in told["files"]}


@pytest.mark.parametrize("path, reason", [
    ("data/b.parquet", "data or model file"), (".env", "credential"), (".git/config", "version control"), ("data", "outside of src"),
    ("data/away.json", "outside of src")])
def test_a_named_file_that_does_not_ship_is_said(say, here, path, reason):
    write(here / "data/b.parquet", "x")
    write(here / ".env", "x")
    write(here / ".git/config", "x")
    (here / "data/away.json").symlink_to("/etc/passwd")
    write(here / YAML, "a: ./%s\n" % path)
    found, left = files_of(say)
    assert path not in found and left[path].startswith(reason)
    notes = "\n".join(plan_of(say, *FAMILY)["notes"])
    assert path in notes or reason == "version control"


def test_words_that_lead_nowhere_name_nothing(say, here):
    write(here / YAML, "a: 1.0\nb: ../x\nc: /etc/passwd\nd: src\ne: .\nf: README\ng: no/such.json\nh: output\ni: ./\n")
    write(here / "README", "x")
    write(here.parent / "x", "x")
    (here / "output").mkdir()
    found, left = files_of(say)
    assert not [path for path in [*found, *left] if not path.startswith("src/")]


@pytest.mark.parametrize("scope", ["family", "imports"])
def test_include_takes_back_in(say, here, scope):
    write(here / "src/nemotron/kit/vocab.txt.gz", "x")
    write(here / "src/nemotron/kit/.env", "x")
    assert files_of(say)[1]["src/nemotron/kit/vocab.txt.gz"] == "data or model file"
    write(here / ".airliftignore", "!vocab.*\n!.env\n")
    found, left = files_of(say, "run.env.scope=" + scope)
    assert "src/nemotron/kit/vocab.txt.gz" in found and left["src/nemotron/kit/.env"] == "credential"
    (here / ".airliftignore").unlink()
    write(here / "profiles/mine.toml", 'extends = "local"\nscope = "%s"\ninclude = ["*.gz", ".env"]\n' % scope)
    found, left = files_of(say, "mine")
    assert {"src/nemotron/kit/vocab.txt.gz", "src/nemotron/kit/.env"} < set(found)
    assert "src/nemotron/kit/vocab.txt.gz" in files_of(say, "run.env.scope=" + scope, "run.env.include=['*.gz']")[0]


def test_a_checkout_takes_no_credential_in(say, here):
    """Neither by its .airliftignore nor by its YAML."""
    write(here / "src/nemotron/kit/.env", "x")
    write(here / ".airliftignore", "!*\n")
    write(here / YAML, "run: {env: {exclude: ['!.env', '!*', '!src/nemotron/kit/*']}}\n")
    assert files_of(say)[1]["src/nemotron/kit/.env"] == "credential"
    write(here / YAML, "run: {env: {include: ['.env']}}\n")
    assert "run.env of the config sets include, which only a profile" in say(*FAMILY, "--dry-run")[2]


def test_nothing_that_is_left_out_is_missing_from_files(say, here):
    """Whatever lies below src is in one of the two lists, itself or by a folder above it."""
    for place in ("__pycache__/a.pyc", "venv/pyvenv.cfg", "venv2/__init__.py", "x.gz", ".git/x", "README.md", ".#a", "a.py~", "id_rsa"):
        write(here / "src/nemotron/kit" / place, "x")
    os.mkfifo(here / "src/nemotron/kit/pipe")
    found, left = files_of(say)
    for path in (here / "src").rglob("*"):
        name = path.relative_to(here).as_posix()
        above = [name, *map(str, Path(name).parents)]
        assert (path.is_dir() and not path.is_symlink()) or name in found or any(folder in left for folder in above), name
