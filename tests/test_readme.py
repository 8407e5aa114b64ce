"""The README tells the truth: its commands run, its tables are those of the code."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import launch
import profiles
import transport
from pod.failures import FAILURES
from tests import podman, slurm, support
from tests.emulators import LeptonEmulator, RunaiEmulator, no_pods_because

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MADE_UP = ("k3f9qa", "~/Nemotron", "my-image")  # words that stand for the reader's own


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


def test_the_blend_is_one_that_data_prep_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "src"))
    from starter import shards

    support.plant(tmp_path, {"chat/a.jsonl": b"{}", "chat/b.jsonl": b"{}", "held-out.jsonl": b"{}"})
    (tmp_path / "my.json").write_text("\n".join(blocks("json")))
    found = shards.read_blend(tmp_path / "my.json")
    assert {name: len(files) for name, files in found.items()} == {"train": 2, "validation": 1}


# ---------------------------------------------------------------- from nothing to a running job


def steps(title: str, more: str, **env: str) -> str:
    """The commands of a platform's section as a script: its exports stand for the reader's own, which `env` holds;
    launches, and checks of a recipe, get the words `more`."""
    section = README.split("### %s\n" % title)[1].split("\n##")[0]
    lines = [line[2:] for line in re.findall("```console\n(.*?)```", section, re.DOTALL)[0].splitlines()]
    exports = [word.split("=")[0] for line in lines if line.startswith("export") for word in line.split()[1:]]
    assert set(exports) <= set(env), "every variable that the section names is given"
    lines = [line for line in lines if not line.startswith("export")]
    assert [line.split()[2] for line in lines] == ["check", "nano3"], "a check, then a launch"
    lines = [re.sub("^python launch.py", "%s %s/launch.py" % (sys.executable, ROOT), line).replace("my-image", "plain")
             + (" " + more if "nano3" in line else "") for line in lines]
    return "set -e\n" + "\n".join(lines)


def done_by(result: "subprocess.CompletedProcess[str]") -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "step 3/3" in result.stdout and re.search("^done in", result.stdout, re.MULTILINE), result.stdout


def our_python(file: Path, name: str, template: str) -> str:
    """An env.toml with the template's section, whose pods find the Python that runs the tests."""
    file.write_text("[%s]\n%s\n[%s.env_vars]\nPATH = '%s/bin:/usr/bin:/bin'\n" % (name, template, name, sys.prefix))
    return str(file)


WORDS = "run.env.gpus_per_node=0 train.steps=3"


@pytest.mark.slow
def test_this_machine(tmp_path: Path) -> None:
    done_by(run(steps("This machine", "train.steps=3 run.env.workspace=" + str(tmp_path / "out")), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("title", ["DGX Cloud Lepton", "DGX Cloud run:AI"])
def test_the_clouds(title: str, tmp_path: Path) -> None:
    support.need(not no_pods_because(), str(no_pods_because()))
    made = LeptonEmulator(root=tmp_path) if "Lepton" in title else RunaiEmulator(
        root=tmp_path, claims=("shared-storage",), cluster_logs=True)
    with made as server:
        env = server.env() | {"LEPTON_NODE_GROUP": "default-group", "LEPTON_STORAGE": "node-nfs:shared"}
        done_by(run(steps(title, WORDS, **env), tmp_path, **env))


@pytest.mark.slow
def test_docker(tmp_path: Path) -> None:
    support.need(not podman.why_not(), podman.why_not() or "")
    with podman.Podman() as service:
        mounts = json.dumps(["~/airlift:/workspace", *service.mounts()])
        text = (ROOT / "profiles/docker.toml").read_text().replace('["~/airlift:/workspace"]', mounts)
        env = service.environment() | {"NEMOTRON_ENV_FILE": our_python(tmp_path / "env.toml", "docker", text)}
        done_by(run(steps("Docker", WORDS), tmp_path, **env))
    assert (tmp_path / "airlift/nano3").is_dir()


@pytest.mark.slow
def test_slurm(tmp_path: Path) -> None:
    support.need(not slurm.why_not(), slurm.why_not() or "")
    with slurm.Cluster() as cluster:
        env = {"SLURM_HOST": cluster.host, "SLURM_USER": cluster.user, "SLURM_ACCOUNT": cluster.account,
               "SLURM_JOB_DIR": "%s/jobs" % cluster.shared}
        text = (ROOT / "profiles/slurm.toml").read_text().replace("# port = 22", "port = %d" % cluster.port)
        env["NEMOTRON_ENV_FILE"] = our_python(cluster.laptop / "env.toml", "slurm", text)
        more = WORDS + " 'run.env.container_image=\"\"'"
        done_by(cluster.on_laptop(["bash", "-c", steps("Slurm", more, **env)], env=env))


# ---------------------------------------------------------------- tables and figures


@pytest.mark.parametrize("target", re.findall(r"^    make (\w+)", README, re.MULTILINE))
def test_make_knows_the_targets(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_exit_codes_are_those_of_the_pod() -> None:
    table = dict(re.findall(r"^\| ([89]\d) \| (.+?) \|$", README, re.MULTILINE))
    assert table == {str(code): what for code, (what, _) in FAILURES.items()}


@pytest.mark.parametrize("figure", [
    transport.MAX_STRING, transport.MAX_EXEC, transport.EXEC_RESERVE, transport.LIMITS["lepton"].object,
    transport.LIMITS["dgxcloud"].value, transport.LIMITS["dgxcloud"].args])
def test_the_limits_are_those_of_the_code(figure: int) -> None:
    assert f"{figure:,}" in README


def test_every_file_of_the_layout_is_there() -> None:
    layout = README.split("| file | what it is |")[1].split("\n\n")[0]
    names = re.findall(r"^\| `([\w./]+)` \|", layout, re.MULTILINE)
    assert names and all((ROOT / name).exists() for name in names), names


def test_every_profile_of_the_folder_is_a_template_that_can_be_tried(tmp_path: Path) -> None:
    for name in sorted(path.stem for path in profiles.FOLDER.glob("*.toml")):
        done = run("python launch.py nano3 sft %s --dry-run" % name, tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_one_command_runs_the_main_job_in_a_clean_clone(tmp_path: Path) -> None:
    """That it sets up everything as well, .ci/run shows: it begins with this command, before there is anything, and
    leaves what it said in a file."""
    said = os.environ.get("MAIN_JOB_SAID")
    text = Path(said).read_text() if said else in_a_clean_clone(tmp_path / "clone", tmp_path / "home")
    digests = re.findall(r"^\[(\d)\] airlift: rank \d of 2, sha256 ([0-9a-f]{64})", text, re.MULTILINE)
    assert sorted(rank for rank, _ in digests) == ["0", "1"]
    assert len({digest for _, digest in digests}) == 1
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)  [\d,]+ tokens", text)]
    assert losses and losses[-1] < losses[0] / 2


def in_a_clean_clone(clone: Path, home: Path) -> str:
    home.mkdir()
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    (clone / ".venv").symlink_to(ROOT / ".venv")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "AIRLIFT"))}
    done = subprocess.run(["make", "run"], cwd=clone, env=env | {"HOME": str(home)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_table_of_keys_is_made_from_the_code() -> None:
    assert README.split("<!-- keys -->\n")[1].split("<!-- /keys -->")[0] == profiles.table()
    for key in profiles.REFUSED:
        assert "`%s`" % key in README
