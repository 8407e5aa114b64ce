"""What of the launcher's shell reaches a pod: every cell of the README's table, by pods of each executor."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import layout, podman, support
from tests.cloud import EMULATED, PLATFORMS, Cloud, cloud
from tests.slurm import SYSTEM_PATH, Cluster, why_not
from tests.slurm.person import Person
from tests.test_docker import Person as DockerPerson

README = (layout.REPO / "README.md").read_text(encoding="utf-8")
TABLE = README.split("### What of your shell reaches a pod")[1].split("\n### ")[0]
HEAD, _, *ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines() if line[:1] == "|"]
NAMES = {name: dict(zip(HEAD, row, strict=True)) for row in ROWS for name in re.findall(r"`(\w*[A-Za-z])`", row[0])}
SHOW = "import json, os\nprint('ALL', json.dumps(dict(os.environ)))\n"


def exported(mark: str, **real: str) -> dict[str, str]:
    """The variables of the table, each with a value that is told again by the mark; `real` ones must work."""
    return {name: mark + "-" + name for name in NAMES} | real


def hold(column: str, said: str, shell: dict[str, str], login: dict[str, str] | None = None) -> None:
    """The table's column is what a pod, which said all of its environment, has of the shell's and the login's."""
    env = json.loads(re.search("ALL (.*)", said).group(1))
    found = {}
    for name, cells in NAMES.items():
        value = env.get(name, "")
        of = [word for word, source in (("yes", shell), ("login", login or {}))
              if source.get(name) and source[name] in (value, *(value.split(":") if name == "PATH" else []))]
        found[name] = of[0] if of else cells[column] if cells[column] in ("no", "new") else "no"
    assert found == {name: cells[column] for name, cells in NAMES.items()}
    assert {name for name, value in env.items() if value.startswith("shell-")} <= {
        name for name, cells in NAMES.items() if cells[column] == "yes"}
    assert env["MASTER_ADDR"] and env["NODE_RANK"] == "0"


def test_the_table_has_every_executor_and_what_was_asked_for() -> None:
    assert [column.split()[0] for column in HEAD[1:]] == ["local", "docker", "slurm", "slurm", "lepton", "dgxcloud"]
    assert {cell for cells in NAMES.values() for cell in list(cells.values())[1:]} == {"yes", "no", "login", "new"}
    assert {"http_proxy", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "HF_TOKEN", "RANK", "LANG"} <= set(NAMES)


def test_this_machine(tmp_path: Path) -> None:
    layout.recipe(tmp_path, "fam/show", SHOW, launch="python", nodes=1, gpus=0)
    shell = exported("shell", PATH=support.PATH + ":/of/the/shell", HOME=str(tmp_path))
    done = layout.launcher(layout.REPO, "fam", "show", "local", "--repo-root", tmp_path, env=shell)
    assert done.returncode == 0, done.stdout + done.stderr
    hold("local", done.stdout, shell | {"PATH": "/of/the/shell"})


@pytest.fixture(params=PLATFORMS)
def here(request: pytest.FixtureRequest, tmp_path: Any, monkeypatch: Any, capsys: Any) -> Iterator[Cloud]:
    yield from cloud(request.param, tmp_path, monkeypatch, capsys)


@EMULATED
def test_the_clouds(here: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    here.recipe(SHOW)
    shell = exported("shell", PATH=os.environ["PATH"] + ":/of/the/shell", HOME=os.environ["HOME"],
                     NO_PROXY="127.0.0.1,localhost,shell")  # or the launcher itself would be led astray
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    done = here.launch()
    assert done.code == 0, done.err
    assert set(here.env()) - {"HF_HOME"} == {name for name in here.env() if name.startswith("AIRLIFT_")}
    hold(here.kind, done.out, shell | {"PATH": "/of/the/shell"})


@pytest.mark.slow
def test_docker(tmp_path: Path) -> None:
    support.need(not podman.why_not(), podman.why_not() or "")
    with podman.Podman() as service:
        person = DockerPerson(service, tmp_path)
        person.recipe("show", SHOW)
        profile = person.folder / "profiles/here.toml"
        profile.write_text(re.sub("(?m)^PATH = .*$", "", profile.read_text()))
        shell = exported("shell", PATH=os.environ["PATH"] + ":/of/the/shell", HOME=str(tmp_path))
        python = "%s/bin/python {script}" % sys.prefix
        done = person.launch("show", "run.env.run_command=" + python, **shell)
    assert done.returncode == 0, done.stdout + done.stderr
    hold("docker", done.stdout, shell | {"PATH": "/of/the/shell"})
    assert '"HF_HOME": "/image/hf"' in done.stdout and "left as this pod has them: HF_HOME" in done.stdout


@pytest.mark.slow
def test_slurm() -> None:
    support.need(not why_not(), why_not() or "")
    with Cluster() as cluster:
        login = exported("login", PATH="/of/the/login", HOME=str(cluster.home))
        exports = login | {"PATH": "%s/bin:$PATH:/of/the/login" % sys.prefix, "HF_HOME": "/login/hf", "WANDB_NAME": "ours"}
        layout.write(cluster.home / ".profile", "".join('export %s="%s"\n' % pair for pair in exports.items()))
        for tunnel, column in (("ssh", "slurm by ssh"), ("local", "slurm on the login node")):
            person = Person(cluster, tunnel)
            person.recipe("show", SHOW, "run: {wandb: {project: p}}\n")
            profile = person.folder / "profiles/here.toml"
            profile.write_text(re.sub("(?m)^PATH = .*$", "WANDB_NAME = 'mine'", profile.read_text()))
            shell = exported("shell", PATH="%s/bin:%s:/of/the/shell" % (sys.prefix, SYSTEM_PATH), HOME=str(person.home))
            done = person.launch("show", env=shell)
            assert done.returncode == 0, done.stdout + done.stderr
            hold(column, done.stdout, shell | {"PATH": "/of/the/shell"}, login)
            for said in ('"HF_HOME": "/login/hf"', '"WANDB_NAME": "mine"', '"WANDB_ENABLED": "true"', '"SLURM_JOB_ID"',
                         "airlift: left as this pod has them: HF_HOME\n"):
                assert said in done.stdout, said
            more = person.launch("show", "run.env.setup_lines='export HF_HOME=/lines/hf'")
            assert '"HF_HOME": "/lines/hf"' in more.stdout, more.stdout + more.stderr
