"""A person who launches on the cluster."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests import layout

from . import Cluster


class Person:
    """A person with a folder of Airlift's scripts, on the cluster's login node or at a laptop elsewhere."""

    def __init__(self, cluster: Cluster, tunnel: str) -> None:
        self.cluster, self.tunnel = cluster, tunnel
        self.folder = layout.flat_folder(cluster.root / ("scripts-" + tunnel))
        self.home = cluster.laptop if tunnel == "ssh" else cluster.home
        self.base = cluster.shared / ("jobs-" + tunnel)
        layout.write(self.folder / "profiles/here.toml", """\
            executor = "slurm"
            tunnel = "%s"
            host = "%s"
            user = "%s"
            port = %d
            identity = "%s"
            account = "team"
            partition = "batch"
            remote_job_dir = "%s"
            container_image = ""
            gpus_per_node = 0
            nodes = 1
            [env_vars]
            PATH = "%s/bin:/usr/bin:/bin"
            OMP_NUM_THREADS = "1"
            """ % (tunnel, cluster.host, cluster.user, cluster.port, self.home / ".ssh/id_ed25519", self.base,
                   sys.prefix))
        self.recipes = cluster.root / ("recipes-" + tunnel)

    def recipe(self, name: str, body: str, yaml: str = "{}\n") -> None:
        layout.recipe(self.recipes, "fam/" + name, body, launch="python", yaml=yaml)

    def words(self, *words: str) -> list[str]:
        return [sys.executable, str(self.folder / "launch.py"), *words]

    def launch(self, stage: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run("--repo-root", str(self.recipes), "fam", stage, "here", *words, **options)

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        on = self.cluster.on_laptop if self.tunnel == "ssh" else self.cluster.on_login
        return on(self.words(*words), **options)

    def start(self, stage: str, *words: str, **env: str) -> "subprocess.Popen[str]":
        """Launch, attached, and go on meanwhile."""
        command = self.words("fam", stage, "here", "--repo-root", str(self.recipes), *words)
        enter = self.cluster.laptop_command if self.tunnel == "ssh" else self.cluster.login_command
        return subprocess.Popen(enter(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                stdin=subprocess.DEVNULL, env=self.cluster.environment(str(self.home), **env))

    def started(self, *words: str, **options: Any) -> str:
        """Launch detached; gives the run."""
        done = self.launch(words[0], "--detach", *words[1:], **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return re.search(r"python launch.py logs -f (\w+)", done.stdout).group(1)

    def status(self, run: str) -> dict[str, Any]:
        done = self.run("status", run, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)[0]

    def until(self, run: str, *states: str, seconds: float = 60) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while (found := self.status(run))["state"] not in states:
            assert time.monotonic() < deadline, json.dumps(found)
        return found

    def folder_of(self, run: str) -> Path:
        return next(self.base.glob("experiments/*-%s/*/*-%s" % (run, run)))

    def log_of(self, run: str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder_of(run).glob("log-*")))
