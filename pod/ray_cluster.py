"""A Ray cluster that the platform makes or has (Lepton's). The recipe runs on its head, as its driver."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from pod.failures import FAILURES, PLACE, RAY, Failure, complain, say
from pod.payload import read_payload
from pod.places import Places
from pod.process import Child, copy_output, recipe_env, script_for

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's own: what a driver's ray.init begins with


class Spread:
    """Puts the source on every node: before the recipe begins on those that live, later on each that joins.

    A process of its own beside the driver, for it needs the image's Ray. On each node a task that is pinned to it runs
    this program as `place`, at the same path everywhere, with the chunks in its environment; what it answers must be
    the digest that was sent. Workers find the source by Ray's own job configuration, not by a runtime_env. On a node
    that joins later a task of the recipe can come a moment before the source does, and then cannot import it: Ray has
    nothing to hold it back with but a runtime_env.
    """

    def __init__(self, settings: dict) -> None:
        self.settings: dict = settings
        self.served: set[str] = set()
        self.ended = False
        with open(settings["program"], "rb") as file:
            self.program = file.read()
        self.chunks = {name: value for name, value in os.environ.items() if name.startswith("AIRLIFT_")}

    def main(self) -> int:
        import ray
        ray.init(log_to_driver=False, logging_level=logging.ERROR, namespace="airlift-" + self.settings["run"])
        signal.signal(signal.SIGTERM, self.end)  # Ray's own handler writes a page about it
        self.ray, self.sent = ray, ray.put(self.chunks)
        deadline = time.monotonic() + self.settings["patience"]
        while len(self.living()) < self.settings["nodes"]:
            if time.monotonic() > deadline:
                raise Failure(RAY, "%d of %d nodes are there after %d s"
                              % (len(self.living()), self.settings["nodes"], self.settings["patience"]))
            time.sleep(0.5)
        self.serve()
        say("all nodes have the source")
        while not self.ended:
            time.sleep(0.2)
            try:
                self.serve()
            except Failure as failure:
                complain("0", failure)
        if self.settings["stays"]:
            self.clean()
        return 0

    def end(self, _number: int, _frame: object) -> None:
        self.ended = True

    def clean(self) -> None:
        """A cluster that goes on keeps nothing of this run."""
        def remove(base: str) -> None:
            import shutil  # where this runs, nothing of ours is imported
            shutil.rmtree(base, ignore_errors=True)

        tasks = [self.pinned(remove, node).remote(self.settings["base"]) for node in self.living()]
        self.ray.wait(tasks, num_returns=len(tasks), timeout=4)

    def living(self) -> dict[str, str]:
        """Node id -> address."""
        return {node["NodeID"]: node["NodeManagerAddress"] for node in self.ray.nodes() if node["Alive"]}

    def pinned(self, function: Any, node: str) -> Any:
        """A task of Ray's that runs on that node and takes none of its CPUs."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        return self.ray.remote(function).options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))

    def serve(self) -> None:
        """The source to every living node that lacks it. Raises Failure."""
        def place(program: bytes, chunks: dict, run: str, words: list) -> tuple:
            import os
            import subprocess
            import sys
            import tempfile
            with tempfile.NamedTemporaryFile(prefix="airlift-" + run + "-", suffix=".py") as file:
                file.write(program)
                file.flush()
                done = subprocess.run([sys.executable, "-I", "-S", file.name, *words], stdin=subprocess.DEVNULL,
                                      env=dict(os.environ, **chunks), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            return done.returncode, done.stdout.decode("utf-8", "replace")

        here, new = self.ray.get_runtime_context().get_node_id(), []
        for node, address in self.living().items():
            if node not in self.served:
                self.served.add(node)
                words = ["place", self.settings["base"]] + ([] if node == here else ["setup"])
                task = self.pinned(place, node).remote(self.program, self.sent, self.settings["run"], words)
                new.append((address, task))
        for address, answer in new:
            try:
                code, said = self.ray.get(answer, timeout=self.settings["patience"])
            except Exception as error:  # Ray's own: the node is gone, say
                raise Failure(RAY, "node %s: %s" % (address, str(error).splitlines()[0])) from None
            if code or "airlift: sha256 %s in " % self.settings["sha256"] not in said:
                for line in said.splitlines():
                    say("node %s: %s" % (address, line))
                raise Failure(code if code in FAILURES else PLACE, "node %s ended with exit code %d" % (address, code))
            say("node %s has sha256 %s in %s" % (address, self.settings["sha256"], self.settings["base"]))


def place(base: str, setup: bool) -> int:
    """Put the source on this node, and run the startup commands here too. Raises Failure."""
    env = dict(os.environ)
    job, tar = read_payload(env)
    places = Places(job, env, base)
    places.put(tar, job)
    say("sha256 %s in %s" % (hashlib.sha256(tar).hexdigest(), base))
    if not setup or not (job["setup"] or job.get("pip") or job.get("install") or job.get("clones")):
        return 0
    _, ready = os.pipe()
    script = script_for(dict(job, command="true", tool=""), places.work, ready).encode("utf-8", "surrogateescape")
    try:
        return Child().run(places.keep("start.sh", script), recipe_env(env, dict(job, nodes=1), places, 0), None, ready)
    finally:
        shutil.rmtree(places.own, ignore_errors=True)


def spread(env: dict[str, str], job: dict, places: Places) -> None:
    """Start Spread and wait for all nodes to have the source; it goes on. Raises Failure with its code."""
    settings = {"run": job["run"], "sha256": job["tree"]["sha256"], "nodes": job["on_cluster"], "base": places.base,
                "patience": job["patience"], "program": places.program(env), "stays": job["stays"]}
    process = subprocess.Popen([sys.executable or "python3", settings["program"], "spread", json.dumps(settings)],
                               env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout
    for line in iter(process.stdout.readline, b""):
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
        if line == b"airlift: all nodes have the source\n":
            threading.Thread(target=copy_output, args=(process.stdout, None), daemon=True).start()
            return
    code = process.wait()
    raise Failure(code if code in FAILURES else RAY, "see the lines above")


def main(word: str, what: str, *more: str) -> int:
    """Be Spread, with its settings; or `place`, with its folder and perhaps `setup`. The exit code."""
    try:
        return Spread(json.loads(what)).main() if word == "spread" else place(what, bool(more))
    except Failure as failure:
        if word == "place":
            return complain("?", failure)
        say("%s: %s" % (FAILURES[failure.code][0], failure.seen))
        return failure.code


ONE_NODES = ("NODE_RANK", "NNODES", "MASTER_ADDR", "MASTER_PORT", RAY_JOB)  # what is true of the driver alone


def driver_env(env: dict[str, str], result: dict[str, str], code: str) -> dict[str, str]:
    """The environment of a driver on a cluster whose raylets have our chunks: empty values in their place, so that a
    driver that hands its whole environment to ray.init masks them. Workers get the source on their sys.path, and what
    this pod's own environment, which is theirs, lacks of the recipe's; a ray.init with a runtime_env adds to that."""
    try:
        config = json.loads(env.get(RAY_JOB) or "{}")
    except ValueError:
        config = {}
    config["py_driver_sys_path"] = [*(config.get("py_driver_sys_path") or []), os.path.join(code, "src")]
    lacking = {name: value for name, value in result.items() if env.get(name) != value and name not in ONE_NODES}
    given = config.get("runtime_env") or {}
    config["runtime_env"] = dict(given, env_vars=dict(lacking, **(given.get("env_vars") or {})))
    masks = {name: "" for name in env if name.startswith("AIRLIFT_")}
    return dict(masks, **dict(result, **{RAY_JOB: json.dumps(config), "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1"}))
