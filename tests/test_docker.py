"""The Docker backend: how it reads mounts, without a daemon; and, marked slow, real containers of podman's service."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends import docker
from jobs import Job
from tests import layout, support
from tests.podman import Podman, why_not
from transport import Refusal


def job(**settings: Any) -> Job:
    image = settings.get("container_image", "plain")
    return Job("t23456", "fam/train", "docker", settings.get("nodes", 1), settings.get("gpus_per_node", 0), 1, image,
               settings, support.job(), {})


def test_mounts_fill_in_the_home_variables_and_relative_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    monkeypatch.setattr(docker, "FOLDER", tmp_path / "airlift/profiles")
    mounts = ["~/airlift:/workspace", "$DATA:/data:ro", "${DATA}/x:/x", "./here:/here", "a/b:/b", "models:/models",
              "/usr:/usr:ro"]
    assert docker.volumes({"mounts": mounts}) == [
        "%s/home/airlift:/workspace" % tmp_path, "%s/data:/data:ro" % tmp_path, "%s/data/x:/x" % tmp_path,
        "%s/airlift/here:/here" % tmp_path, "%s/airlift/a/b:/b" % tmp_path, "models:/models", "/usr:/usr:ro"]
    assert (tmp_path / "home/airlift").is_dir()


@pytest.mark.parametrize("mount, said", [("$NOT_SET/x:/x", "NOT_SET, which is not set"), ("${NOT_SET}:/x", "NOT_SET"),
                                         ("/x", "cannot be parsed"), ("/x:y", "cannot be parsed")])
def test_a_mount_that_cannot_be_filled_in_is_refused(monkeypatch: pytest.MonkeyPatch, mount: str, said: str) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(Refusal, match=said):
        docker.volumes({"mounts": [mount]})


@pytest.mark.parametrize("gpus, asked", [(0, None), (2, 2), ("gpu", -1)])
def test_gpus_and_their_runtime_only_when_asked_for(gpus: Any, asked: Any) -> None:
    executor = docker.docker_executor(job(gpus_per_node=gpus, runtime="nvidia"), [])
    assert (executor.num_gpus, executor.runtime) == (asked, "nvidia" if asked else None)


def test_gpus_reach_the_daemon() -> None:
    from backends.common import nemo

    sent: dict[str, Any] = {}

    class Containers:
        def run(self, image: str, command: list[str], **options: Any) -> None:
            sent.update(options, image=image, command=command)

    class Client:
        containers = Containers()

    executor = docker.docker_executor(job(gpus_per_node=2, runtime="nvidia", shm_size="1g"), ["/a:/b"])
    executor.experiment_id = "x"
    nemo.HANDED["t23456"] = nemo.Handed(environment={"A": "b"})
    nemo.CarriedContainer(name="x", command=["true"], executor=executor, extra_env={}).run(Client(), "t23456")
    assert sent["device_requests"][0]["Count"] == 2 and sent["runtime"] == "nvidia" and sent["shm_size"] == "1g"
    assert (sent["command"], sent["environment"], sent["volumes"]) == (["true"], {"A": "b"}, ["/a:/b"])


@pytest.mark.parametrize("settings, said", [({"nodes": 2}, "2 nodes"), ({"container_image": ""}, "no image"),
                                            ({"mounts": ["/x"]}, "cannot be parsed")])
def test_what_cannot_work_is_refused_before_the_daemon_is_asked(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        docker.check(job(**settings), support.plan(executor="docker"))


# ---------------------------------------------------------------- real containers

slow = pytest.mark.slow
SECRET = "s3cret-77aa"


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    support.need(not why_not(), why_not() or "")
    with Podman() as made:
        yield made


class Person:
    """Somebody with a folder of Airlift's scripts and a profile for the daemon."""

    def __init__(self, podman: Podman, folder: Path) -> None:
        self.podman, self.home, self.recipes = podman, folder, folder / "src"
        self.folder = layout.flat_folder(folder / "airlift")
        layout.write(self.folder / "profiles/here.toml", """\
            executor = "docker"
            container_image = "plain"
            gpus_per_node = 0
            nodes = 1
            workspace = "/workspace"
            mounts = %s
            [env_vars]
            PATH = "%s/bin:/usr/bin:/bin"
            """ % (json.dumps(["$WORK:/workspace", *podman.mounts()]), sys.prefix))

    def recipe(self, name: str, body: str) -> None:
        layout.recipe(self.recipes, "fam/" + name, body, launch="python")

    def run(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        whole = {"PATH": os.environ["PATH"], "HOME": str(self.home), "WORK": str(self.home / "work")}
        return layout.launcher(self.folder, *words, timeout=240, env=whole | self.podman.environment() | env)

    def launch(self, stage: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("--repo-root", str(self.recipes), "fam", stage, "here", *words, **env)

    def containers(self) -> list[str]:
        return [container.name for container in self.podman.client().containers.list(all=True)]


@pytest.fixture
def person(podman: Podman, tmp_path: Path) -> Person:
    return Person(podman, tmp_path)


@slow
def test_the_exit_code_is_the_recipes_and_nothing_is_left(person: Person) -> None:
    person.recipe("end", 'import os, sys; print("token", len(os.environ["HF_TOKEN"])); sys.exit(7)')
    done = person.launch("end", "run.env.secrets.HF_TOKEN=env", HF_TOKEN=SECRET)
    assert done.returncode == 1 and "exit code 7" in done.stderr, done.stdout + done.stderr
    assert "token %d" % len(SECRET) in done.stdout
    run = re.search(r", run (\w+)\n", done.stdout).group(1)
    assert json.loads(person.run("status", run, "--json").stdout)[0]["job_exit_code"] == 7
    assert "token %d" % len(SECRET) in person.run("logs", run).stdout
    held = subprocess.run(["grep", "-rlF", SECRET, str(person.home)], capture_output=True, text=True).stdout
    assert held == "" and person.containers() == []


@slow
def test_a_container_is_adopted_by_another_home(person: Person) -> None:
    for number in range(int(os.environ.get("AIRLIFT_MANY", "1"))):  # 200 by hand
        person.recipe("nap", "import time\nprint('up', %d, flush=True)\ntime.sleep(60)\n" % number)
        adopted(person, re.search(r"logs -f (\w+)", person.launch("nap", "--detach").stdout).group(1))


def adopted(person: Person, run: str) -> None:
    name, other = "airlift-fam-nap-" + run, {"AIRLIFT_HOME": str(person.home / ("other-" + run))}
    assert name in person.run("adopt", "here", **other).stdout
    done = person.run("adopt", "here", name, **other)
    digest = re.search("sha256 ([0-9a-f]{64})", done.stdout)
    assert done.returncode == 0 and digest, done.stderr
    assert " running " in person.run("status", run, **other).stdout
    fetched = person.run("fetch", run, str(person.home / ("there-" + run)), **other)
    assert digest.group(1) in fetched.stdout and (person.home / ("there-%s/tree/src" % run)).is_dir()
    assert digest.group(1) in person.run("status", run).stdout
    assert "was stopped and removed" in person.run("cancel", run, **other).stdout
    assert person.run("adopt", "here", name, AIRLIFT_HOME=str(person.home / ("third-" + run))).returncode == 4


@slow
def test_a_progress_bar_becomes_lines(person: Person) -> None:
    person.recipe("bar", "import sys, time\nfor i in range(100): sys.stderr.write('\\rstep %d of 100' % i); sys.stderr.flush(); "
                  "time.sleep(0.01)\n")
    bars = [line for line in person.launch("bar").stdout.splitlines() if "of 100" in line]
    assert re.fullmatch("step [0-9] of 100", bars[0]) and bars[-1] == "step 99 of 100" and len(bars) < 4


@slow
def test_check_asks_the_daemon(person: Person) -> None:
    done = person.run("check", "here", "--json")
    found = {one["what"]: one["state"] for one in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout + done.stderr
    assert [found[what] for what in ("daemon", "image", "image here", "mounts", "workspace")] == ["ok"] * 5
    assert not (person.home / "work").exists()  # nothing was made
    profile = person.folder / "profiles/here.toml"
    text = profile.read_text()
    profile.write_text(text.replace('"plain"', '"gone:1"').replace("$WORK", "$NOT_SET"))
    done = person.run("check", "here", "--json")
    found = {one["what"]: one["state"] for one in json.loads(done.stdout)}
    assert (done.returncode, found["image here"], found["mounts"]) == (2, "warning", "failure")
    assert person.run("check", "here", DOCKER_HOST="unix:///nowhere/socket").returncode == 5


@slow
def test_another_shell_sees_and_cancels_a_container(person: Person) -> None:
    person.recipe("nap", """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
        print("napping", flush=True)
        time.sleep(600)
        """)
    started = person.launch("nap", "--detach")
    assert started.returncode == 0, started.stderr
    run = re.search(r"logs -f (\w+)", started.stdout).group(1)
    assert json.loads(person.run("status", run, "--json").stdout)[0]["state"] == "running"
    assert person.containers() == ["airlift-fam-nap-" + run]
    assert person.run("cancel", run).stdout .endswith(": container airlift-fam-nap-%s was stopped and removed; its log is kept\n" % run)
    ended = json.loads(person.run("status", run, "--json").stdout)[0]
    assert ended["state"] == "cancelled"
    assert "already ended" in person.run("cancel", run).stdout and person.containers() == []


@slow
@pytest.mark.parametrize("words, env, code, said", [
    (["run.env.container_image=127.0.0.1:1/gone:1"], {}, 4, "Docker refuses"),
    ([], {"DOCKER_HOST": "unix:///nowhere/socket"}, 5, "cannot be reached"),
])
def test_what_docker_refuses_is_two_lines(person: Person, words: list[str], env: dict[str, str], code: int,
                                          said: str) -> None:
    person.recipe("nap", "pass")
    done = person.launch("nap", *words, **env)
    assert done.returncode == code and said in done.stderr, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 2 and person.containers() == []


@slow
def test_a_logging_driver_that_cannot_be_read_is_no_obstacle(tmp_path: Path) -> None:
    """It ends with its code, the others are shown as before, and the container goes."""
    support.need(not why_not(), why_not() or "")
    with Podman(log_driver="none") as podman:
        person = Person(podman, tmp_path)
        person.recipe("end", "import sys, time; time.sleep(3); sys.exit(7)")
        done = person.launch("end")
        assert done.returncode == 1 and "exit code 7" in done.stderr, done.stdout + done.stderr
        assert "there is no log of this container" in done.stdout and person.containers() == []
        run = person.launch("end", "--detach").stdout
        run = re.search(r", run (\w+)\n", run).group(1)
        assert "running" in person.run("status").stdout
        deadline = time.monotonic() + 60
        while person.containers() and time.monotonic() < deadline:
            assert person.run("status").returncode == 0
        assert "exit code 7" in person.run("status", run).stdout
