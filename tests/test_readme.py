"""The README tells the truth: its commands run, its tables are those of the code."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import launch
import pod
import profiles
import transport

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MADE_UP = ("k3f9qa", "~/Nemotron")  # words that stand for the reader's own


def blocks(language: str) -> list[str]:
    """The lines of all code blocks of one language, without comments."""
    found = re.findall("^```%s\n(.*?)^```" % language, README, re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s+#.*", "", line) for block in found for line in block.splitlines() if line.strip()]


def run(command: str, home: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    env = os.environ | {"PATH": path, "HOME": str(home), "AIRLIFT_HOME": str(home / "airlift")} | more
    return subprocess.run(command, shell=True, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("command", blocks("sh"))
def test_a_command_that_needs_nothing_runs_as_it_stands(command: str, tmp_path: Path) -> None:
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


COMMANDS = [line[2:] for line in blocks("console") if line.startswith("$ python launch.py")]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_needs_a_platform_is_understood(command: str, tmp_path: Path) -> None:
    """Launches as a dry run; for the others the command line itself is what can be checked without a platform."""
    words = shlex.split(command)[2:]
    name, _ = launch.parse(words)
    if name == "launch" and not any(word in command for word in MADE_UP):
        done = run(command.replace(" --detach", "") + " --dry-run", tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", re.findall(r"^    make (\w+)", README, re.MULTILINE))
def test_make_knows_the_targets(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_exit_codes_are_those_of_the_pod() -> None:
    table = dict(re.findall(r"^\| ([89]\d) \| (.+?) \|$", README, re.MULTILINE))
    assert table == {str(code): what for code, (what, _) in pod.FAILURES.items()}


@pytest.mark.parametrize("figure", [
    transport.MAX_STRING, transport.MAX_EXEC, transport.EXEC_RESERVE, transport.LIMITS["lepton"].object,
    transport.LIMITS["dgxcloud"].value, transport.LIMITS["dgxcloud"].args])
def test_the_limits_are_those_of_the_code(figure: int) -> None:
    assert f"{figure:,}" in README


def test_every_file_of_the_layout_is_there() -> None:
    for name in re.findall(r"^\| `([\w./]+)` \|", README, re.MULTILINE):
        if "/" in name or name.endswith(".py"):
            assert (ROOT / name).exists(), name


def test_every_profile_of_the_folder_is_a_template_that_can_be_tried(tmp_path: Path) -> None:
    for name in sorted(path.stem for path in profiles.FOLDER.glob("*.toml")):
        done = run("python launch.py nano3 sft %s --dry-run" % name, tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_one_command_sets_up_and_runs_the_main_job_in_a_clean_clone(tmp_path: Path) -> None:
    clone, home = tmp_path / "clone", tmp_path / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "AIRLIFT"))}
    done = subprocess.run(["make", "run"], cwd=clone, env=env | {"HOME": str(home)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    digests = re.findall(r"^\[(\d)\] airlift: rank \d of 2, sha256 ([0-9a-f]{64})", done.stdout, re.MULTILINE)
    assert sorted(rank for rank, _ in digests) == ["0", "1"]
    assert len({digest for _, digest in digests}) == 1
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)  [\d,]+ tokens", done.stdout)]
    assert losses and losses[-1] < losses[0] / 2


def test_the_table_of_keys_is_made_from_the_code() -> None:
    assert README.split("<!-- keys -->\n")[1].split("<!-- /keys -->")[0] == profiles.table()
    for key in profiles.REFUSED:
        assert "`%s`" % key in README
