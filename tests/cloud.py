"""What the tests of the two clouds share: an emulated platform, a checkout of tiny recipes, profiles, and launches.

Importing this gives nemo-run and leptonai homes of the tests' own, which both read once, at import.
"""

import atexit
import base64
import json
import os
import random
import re
import shutil
import tempfile
import threading
import time
import tomllib
import zlib
from dataclasses import dataclass
from pathlib import Path

STATE = Path(tempfile.mkdtemp(prefix="airlift-tests-"))
atexit.register(shutil.rmtree, STATE, ignore_errors=True)
os.environ["NEMORUN_HOME"], os.environ["LEPTON_CACHE_DIR"] = str(STATE / "nemo"), str(STATE / "lepton-cache")

import layout  # noqa: E402
import pytest  # noqa: E402
from forked import Forked  # noqa: E402

import jobs  # noqa: E402
import launch  # noqa: E402
import profiles  # noqa: E402
from backends.common import follow  # noqa: E402
from tests.emulators import LeptonEmulator, RunaiEmulator, no_pods_because  # noqa: E402

EMULATED = pytest.mark.skipif(no_pods_because() is not None, reason=str(no_pods_because()))
PLATFORMS = ("lepton", "dgxcloud")
SLOW = pytest.mark.slow
# What starts launchers of their own, at 3 s each: on the other platform with the slow tests.
ON_BOTH_IN_TIME = pytest.mark.parametrize("here", ["lepton", pytest.param("dgxcloud", marks=SLOW)], indirect=True)
HELLO = "import os\nprint('hello from', os.environ['NODE_RANK'], flush=True)\n"
KEEPS_ON = "import time\nprint('up', flush=True)\ntime.sleep(120)\n"

PROFILES = {
    "lepton": """
executor = "lepton"
node_group = "default-group"
resource_shape = "gpu.8xh100-80gb"
container_image = "registry.test/nemo:1"
gpus_per_node = 1
nemo_run_dir = "/shared/airlift"
mounts = [{ path = "/", mount_path = "/shared", from = "node-nfs:shared" }]
""",
    "dgxcloud": """
executor = "dgxcloud"
base_url = "${env:RUNAI_BASE_URL}"
kube_apiserver_url = "${env:RUNAI_KUBE_APISERVER_URL}"
client_id = "${env:RUNAI_CLIENT_ID}"
client_secret = "${env:RUNAI_CLIENT_SECRET}"
project_name = "team-a"
container_image = "registry.test/nemo:1"
gpus_per_node = 1
pvc_nemo_run_dir = "/shared/airlift"
pvcs = [{ claimName = "workspace", path = "/shared", existingPvc = true }]
""",
}


@dataclass
class Result:
    """What a launch.py command said; `run` is the id of the run that it started."""

    code: int
    out: str
    err: str

    @property
    def run(self):
        return re.search(r", run ([a-z0-9]{6})\n", self.out).group(1)


class Cloud:
    """One emulated platform, and a launcher's world: homes, profiles, a checkout with the recipe nano3/sft."""

    def __init__(self, kind, place, monkeypatch, capsys, server):
        self.kind, self.place, self.monkeypatch, self.capsys, self.server = kind, place, monkeypatch, capsys, server
        self.root, self.folder = place / "checkout", place / "profiles"
        self.folder.mkdir()
        self.profile()
        self.recipe(HELLO)
        monkeypatch.setattr(profiles, "FOLDER", self.folder)
        monkeypatch.setattr(follow, "POLL_S", 0.05)
        for name in [name for name in os.environ if name.startswith(("LEPTON_WORK", "RUNAI_"))] + list(jobs.TOKENS):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"HOME": place / "home", "AIRLIFT_HOME": place / "airlift", **server.env()}.items():
            monkeypatch.setenv(name, str(value))

    def profile(self, text="", name=None, **replaced):
        """Write a profile: the platform's, with top-level keys replaced, and `text` at its end."""
        keys = tomllib.loads(PROFILES[self.kind])
        keys = {key: value for key, value in (keys | replaced).items() if value is not None}
        head = "".join("%s = %s\n" % (key, toml(value)) for key, value in keys.items())
        (self.folder / ((name or self.kind) + ".toml")).write_text(head + text)

    def recipe(self, body, name="nano3/sft", launch="direct", **fields):
        """A recipe whose script is `body`."""
        return layout.recipe(self.root, name, body, launch=launch, **({"nodes": 1, "gpus": 1} | fields))

    def pad(self, size, seed=b"pad"):
        """A file of random bytes in the checkout: it does not compress."""
        path = self.root / "src/nemotron/recipes/nano3/sft/pad.dat"
        path.write_bytes(noise(size, seed))

    def launch(self, *words, stage="sft", profile=None):
        """Launch in this process."""
        return self.main("nano3", stage, profile or self.kind, "--repo-root", self.root, *words)

    def main(self, *words):
        self.capsys.readouterr()
        code = launch.main([str(word) for word in words])
        said = self.capsys.readouterr()
        assert "Traceback" not in said.out + said.err, said.err
        return Result(code, said.out, said.err)

    def process(self, *words):
        """launch.py as a process of its own, with our profiles."""
        return Forked([str(word) for word in words], self.folder, self.place)

    # -- the platform's side

    @property
    def jobs(self):
        return list(self.server.jobs.values())

    @property
    def job(self):
        return self.jobs[-1]

    @property
    def volume(self):
        """What the pods see as /shared."""
        return self.server.volumes["node-nfs:shared"] if self.kind == "lepton" else self.server.claims["workspace"]

    @property
    def posts(self):
        """The requests that created something."""
        where = r"/jobs" if self.kind == "lepton" else r"/workloads/(trainings|distributed|workspaces)"
        return [asked for asked in self.server.requests if asked.method == "POST" and re.fullmatch(where, asked.path)]

    @property
    def records(self):
        """The names of the jobs that nemo-run has in its list."""
        from nemo_run.config import get_nemorun_home

        file = Path(get_nemorun_home(), ".lepton_jobs.json" if self.kind == "lepton" else ".dgx_jobs.json")
        return [app.split("___")[1] for app in json.loads(file.read_text())]

    def env(self, job=None):
        """The variables that the platform was given, and the references, by name."""
        spec = (job or self.job).spec
        entries = spec["envs"] if self.kind == "lepton" else spec["environmentVariables"]
        return {entry["name"]: entry.get("value") or entry for entry in entries}

    def up(self, *words, body=KEEPS_ON, **options):
        """A detached job that keeps on, all of whose pods have said so."""
        self.recipe(body)
        result = self.launch("--detach", *words, **options)
        assert result.code == 0, result.err
        wait_for(lambda: self.job.pods and all("up\n" in pod.output for pod in self.job.pods), self.job)
        return result.run


def cloud(kind, tmp_path, monkeypatch, capsys, **options):
    """A started emulator with a launcher's world around it; a context manager's two halves as a generator."""
    made = (LeptonEmulator if kind == "lepton" else RunaiEmulator)(root=tmp_path / "platform", grace=1.0, **options)
    with made as server:
        yield Cloud(kind, tmp_path, monkeypatch, capsys, server)


class Begun:
    """A launch in a thread, so that the test can meanwhile do harm."""

    def __init__(self, here, *words):
        self.result, self.thread = None, threading.Thread(target=self.run, args=(here, words))
        self.thread.start()

    def run(self, here, words):
        self.result = here.launch(*words)

    def end(self, seconds):
        begin = time.monotonic()
        self.thread.join(seconds)
        assert self.result, "the launcher still runs after %d s" % seconds
        return self.result, time.monotonic() - begin


def secret_of(here):
    """What no one may see."""
    return here.server.token if here.kind == "lepton" else here.server.client_secret


def wait_for(condition, what="", seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within %d s: %s" % (seconds, getattr(what, "state", what))
        time.sleep(0.01)


def noise(size, seed=b"noise"):
    return random.Random(seed).randbytes(size)


def toml(value):
    if isinstance(value, dict):
        return "{ %s }" % ", ".join("%s = %s" % (json.dumps(key), toml(item)) for key, item in value.items())
    if isinstance(value, list):
        return "[%s]" % ", ".join(map(toml, value))
    return json.dumps(value)


# ---------------------------------------------------------------- looking for what must not be anywhere


def seen_in(folders, texts):
    """The files below the folders in which one of the texts stands: plain, or inside nemo-run's base64 of zlib."""
    found = []
    for path in [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]:
        data = path.read_bytes()
        whole = data + b"".join(unwrapped(data))
        found += ["%s: %s" % (path, text[:40]) for text in texts if text.encode() in whole]
    return found


def unwrapped(data):
    for token in re.findall(rb"[A-Za-z0-9+/_-]{40,}={0,2}", data):
        for decode in (base64.b64decode, base64.urlsafe_b64decode):
            try:
                yield zlib.decompress(decode(token))
            except (ValueError, zlib.error):
                continue
