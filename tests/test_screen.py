"""screen.py: times, tables, budgets, colour only where it belongs, a dry run in words and as JSON, and no secret."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import layout
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inside import CONFIGS, FAMILY, check_shape, plan_of, shown
from layout import nemotron, recipe, write

import screen
from backends import Status
from runs import Run


@pytest.mark.parametrize("seconds, said", [
    (-1, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (7500, "2 h 5 min"),
    (86400 * 3 + 3600 * 4 + 61, "3 d 4 h")])
def test_times(seconds: float, said: str) -> None:
    assert screen.span(seconds) == said


def test_where_the_time_went() -> None:
    run = Run("t23456", "a/b", "p", "local", 1, "0" * 64, 100.0)
    assert screen.times(run, 0.25, 2.0, 161.0) == "packing 0.2 s, submitting 2.0 s, waiting and running 59 s"
    run.running_since = 110.5
    assert screen.times(run, 0.25, 2.0, 161.0) == "packing 0.2 s, submitting 2.0 s, waiting 8.5 s, running 51 s"


def test_a_state_is_told_with_its_time_only_while_it_is_news() -> None:
    run = Run("t23456", "a/b", "p", "local", 1, "0" * 64)
    assert re.fullmatch(r"-- done \(Completed\) after \d s", screen.status_line(Status("done", "Completed"), run))
    run.ended = ["done", "Completed"]
    assert screen.status_line(Status("done", "Completed"), run) == "-- done (Completed)"


@given(st.lists(st.lists(st.text("ab c", max_size=9), min_size=3, max_size=3), min_size=1, max_size=6))
def test_columns_are_aligned(rows: list[list[str]]) -> None:
    rows = [["x" + cell for cell in row] for row in rows]  # no cell is empty
    lines = screen.table(rows).split("\n")
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row, line in zip(rows, lines, strict=True):
        at = 0
        for cell, width in zip(row, widths, strict=True):
            assert line[at:at + len(cell)].rstrip() == cell.rstrip()
            at += width + 2


@pytest.mark.parametrize("used, bar, figures", [
    (0, "." * 20, "0 % of 1.5 MiB (0 B)"), (1, "#" + "." * 19, "1 % of 1.5 MiB (1 B)"),
    (1572864, "#" * 20, "100 % of 1.5 MiB (1.5 MiB)"), (1572865, "#" * 20, "101 % of 1.5 MiB (1.5 MiB)")])
def test_a_budget_is_drawn_and_never_looks_emptier_than_it_is(used: int, bar: str, figures: str) -> None:
    assert re.fullmatch(r"API object  \|%s\| +%s" % (re.escape(bar), re.escape(figures)),
                        screen.budget("API object", used, 1572864))


def on_a_terminal(home: Path, **env: str) -> str:
    """What a dry run prints on a terminal of its own."""
    words = [sys.executable, str(layout.REPO / "launch.py"), "nano3", "sft", "lepton", "--dry-run"]
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    ours, theirs = pty.openpty()
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=home,
                          env=clean | {"TERM": "xterm", "AIRLIFT_HOME": str(home)} | env) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other end was closed
                break
            said += data
            if not data:
                break
    os.close(ours)
    assert process.returncode == 0
    return said.decode().replace("\r\n", "\n")


def test_colour_only_on_a_terminal_and_never_with_no_color(tmp_path: Path) -> None:
    coloured = on_a_terminal(tmp_path)
    plain = on_a_terminal(tmp_path, NO_COLOR="1")
    assert "\033[32m#" in coloured and "\033[1mnano3/sft on lepton" in coloured
    assert "\033" not in plain + on_a_terminal(tmp_path, TERM="dumb")
    assert re.sub(r"\033\[\d*m", "", coloured) == plain


# ---------------------------------------------------------------- --verbose


@pytest.fixture
def verbose() -> Iterator[None]:
    screen.VERBOSE = True
    yield
    screen.VERBOSE = False


STEP = r"\d\d:\d\d:\d\d %s\n"


def test_a_step_is_told_before_and_after_with_its_time(verbose: None, capsys: pytest.CaptureFixture[str]) -> None:
    with screen.step("GET https://host/a\n  b"):
        said = capsys.readouterr()  # a hang shows where
        assert re.fullmatch(STEP % "GET https://host/a b", said.err) and said.out == ""
    said = capsys.readouterr()
    assert re.fullmatch(STEP % r"GET https://host/a b: \d\.\d\d s", said.err) and said.out == ""


def test_a_step_that_fails_is_told_with_its_time_too(verbose: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), screen.step("import x"):
        raise ZeroDivisionError
    assert re.fullmatch(STEP % "import x" + STEP % r"import x: \d\.\d\d s", capsys.readouterr().err)


def test_no_step_shows_a_secret(verbose: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "CONCEALED", set())
    monkeypatch.setenv("MY_TOKEN", "of-the-environment")
    screen.conceal("of-the-profile", None, "<unset X>")
    with screen.step("GET https://me:word@host/?a=of-the-environment&b=of-the-profile hf_%s <unset X>" % ("a1" * 17)):
        pass
    said = capsys.readouterr().err
    assert said.count("GET https://***@host/?a=***&b=*** *** <unset X>") == 2


def test_without_the_option_a_step_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with screen.step("GET https://host/"):
        pass
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- the dry run


def test_a_dry_run_shows_what_would_happen(say, here):
    code, out, err = say(*FAMILY, "lepton", "lr=1", "--nodes", "2", "--dry-run", "--", "--flag", "two words")
    assert (code, err) == (0, "")
    assert out.startswith("nano3/sft on lepton (lepton): 2 nodes x 8 GPUs, torchrun\n")
    assert out.endswith("nothing was submitted\n")
    rows = {}
    for line in out.splitlines()[1:-1]:
        rows.setdefault(line[2:11].strip(), []).append(line[11:])
    assert rows["script"] == [str(here) + "/src/nemotron/recipes/nano3/stage1_sft/train.py"]
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


def test_chunks_are_shown_by_their_length_only(say):
    env = plan_of(say, *FAMILY, "dgxcloud")["env"]
    chunks = {name: value for name, value in env.items() if name.startswith("AIRLIFT_") and name[-1].isdigit()
              and not name.endswith("SHA256")}
    assert len(chunks) >= 3
    assert all(value.startswith("<") and value.endswith(" characters>") for value in chunks.values())
    assert env["AIRLIFT_TREE_CHUNKS"] == "1"
    assert max(map(len, env.values())) < 100


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


def test_a_secret_under_a_harmless_name_is_not_shown(tmp_path):
    root, secret = nemotron(tmp_path), "s3cret-" + "x" * 20
    text = 'run_command = "login ${env:MY_TOKEN} && python {script}"\n' \
        '[mine.env_vars]\nPLAIN = "${env:MY_TOKEN}"\nURL = "//u:${env:MY_TOKEN}@h"\n'
    found = shown(root, "nano3", "sft", "mine", profile=text,
                  env={"MY_TOKEN": secret, "TOKENIZERS_PARALLELISM": "false"})
    assert secret not in json.dumps(found)
    assert (found["env"]["PLAIN"], found["env"]["URL"]) == ("***", "//u:***@h") and "login ***" in found["command"]
