"""The order of the steps, from the pod's start to the recipe's end.

A word tells what else it is to be: a manifest, with its digest, beside which the tree lies (Slurm); `driver`, perhaps
with a file of chunks (on a Ray cluster of the platform's); `ray`, `spread` or `place` (this program again, as a part
of one).
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import socket
import sys
import time
from typing import Any

from pod.failures import CLONE, FAILURES, INTERNAL, PYTHON, SETUP, TOOL, Failure, complain, say
from pod.payload import content, nodes_sent, read_file, read_manifest, read_payload, read_tree
from pod.places import Places, own_place, take_secrets
from pod.process import Child, recipe_env, script_for
from pod.rank import find_rank


def main() -> int:
    """All of it; the exit code. Every failure is said, and the last line says the code."""
    word = "".join(sys.argv[1:2])
    if word == "ray":
        from pod import ray_nodes
        return ray_nodes.main(sys.argv[2])
    if word in ("spread", "place"):
        from pod import ray_cluster
        return ray_cluster.main(*sys.argv[1:])
    child, pod = Child(), Pod()
    try:
        code = pod.run(child, "" if word == "driver" else word, word == "driver", sys.argv[2:])
    except Failure as failure:
        code = complain(pod.rank, failure)
    except SystemExit as early:
        say("rank %s: ended by a signal before the recipe was started" % pod.rank)
        code = int(early.args[0])
    except Exception:
        import traceback
        say(traceback.format_exc(), 2)
        say("rank %s: %s" % (pod.rank, FAILURES[INTERNAL][0]))
        code = INTERNAL
    finally:
        if pod.shared:
            pod.shared.release()
        for folder in pod.places.ending() if pod.places else []:
            shutil.rmtree(folder, ignore_errors=True)
    say("rank %s ended with exit code %d" % (pod.rank, code))  # the launcher looks for this line in the logs
    return code


class Pod:
    """One start of this pod, and what must be known at its end."""

    rank = "?"
    shared: Any = None  # the SharedTree that it uses
    places: Places | None = None

    def run(self, child: Child, manifest: str, driver: bool, more: list[str]) -> int:
        """Everything up to the recipe's end; its code. Raises Failure."""
        if sys.version_info < (3, 8):
            raise Failure(PYTHON, "python3 is %d.%d; 3.8 is the oldest that works" % sys.version_info[:2])
        env = dict(os.environ)
        if more and not manifest:
            env.update(item for item in read_file(more[0]).items() if item[0].startswith("AIRLIFT_"))
        job: dict = read_manifest(manifest, *more) if manifest else {"nodes": nodes_sent(env)}
        rank = 0 if driver else find_rank(env, socket.gethostname(), job["nodes"])
        self.rank = str(rank)
        tar: bytes
        if manifest:
            tar = beside(manifest, job, env)
        else:
            job, tar = read_payload(env)
        if driver:
            job = dict(job, nodes=1, on_cluster=job["nodes"], stays=bool(more))
        # On a cluster of the platform's the same on every node: workers look for the source where the driver has it.
        places = self.places = Places(job, {} if driver else env, goes=bool(manifest))
        places.staged = os.path.dirname(more[0]) if driver and more else ""
        if job.get("unpack") == "shared":
            from pod.shared import SharedTree
            self.shared = SharedTree(job, env, rank, tar)
        places.put(tar, job, self.shared)
        said = rank, job["nodes"], job["tree"]["sha256"], job["tree"]["files"], places.code
        # The launcher tells one start from the next by this.
        begun = ", begun %s.%03d" % (time.strftime("%H:%M:%S"), time.time() % 1 * 1000) if job.get("retries") else ""
        say("rank %d of %d, sha256 %s, %d files in %s" % said + begun)
        return start(child, env, job, places, rank)


def beside(manifest: str, job: dict, env: dict[str, str]) -> bytes:
    """The tar beside the manifest; takes the secrets beside it into `env`."""
    folder = os.path.dirname(os.path.abspath(manifest))
    tar = read_tree(folder, job["tree"])
    take_secrets(folder, job.get("secrets", []), env)
    for name in ("MASTER_ADDR", "PET_MASTER_ADDR"):  # a shell's: Slurm's list of nodes tells where rank 0 is
        env.pop(name, None)
    return tar


def start(child: Child, env: dict[str, str], job: dict, places: Places, rank: int) -> int:
    """Run the recipe to its end and return its code; with a workspace, keep log and code under the run's folder."""
    workdir = os.path.join(places.code, places.fill(job["workdir"])) if job.get("workdir") else places.work
    if not os.path.isdir(workdir):
        raise Failure(TOOL, "there is no folder %s, where the recipe is to be started" % workdir)
    for name in [name for name in os.environ if name.startswith("AIRLIFT_")]:
        del os.environ[name]
    log = os.path.join(places.logs, "rank-%d.log" % rank) if places.logs else None
    keep_code(log, None)
    if places.logs and not rank:
        leave_record(places, job)
    if job.get("cluster") == "pods":
        from pod import ray_nodes
        job = dict(job, command=ray_nodes.command_for(job, places, rank, env))
    given = recipe_env(env, job, places, rank)
    told = {"RAY_TMPDIR", "RAY_ADDRESS"} & set(given)  # who joins a cluster finds its sockets by its own folder
    rays = os.path.join(given.get("TMPDIR") or "/tmp", "ray")  # Ray adds 72 bytes, and a socket's path has 107
    unfit = len(rays) > 34 or (os.path.exists(rays) and not os.access(rays, os.W_OK))  # or it is another user's
    if unfit and not told and not job.get("cluster"):
        given["RAY_TMPDIR"] = places.short = own_place("ray", {})
    kept = sorted(name for name in job.get("defaults", {}) if name in env and name not in job["env"])
    if kept and not rank:
        say("left as this pod has them: " + ", ".join(kept))
    if job.get("on_cluster"):
        from pod import ray_cluster
        ray_cluster.spread(env, job, places)
        given = ray_cluster.driver_env(env, given, places.code)
    begun, low = os.pipe()
    ready = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 100)  # startup commands may use the low numbers for their own
    os.close(low)
    script = places.keep("start.sh", script_for(job, workdir, ready).encode("utf-8", "surrogateescape"))
    code = child.run(script, given, log, ready)
    if job.get("cluster") == "pods":
        shutil.rmtree(ray_nodes.folder(dict(env, **job["env"]), job["run"]), ignore_errors=True)
    ran = bool(select.select([begun], [], [], 0)[0] and os.read(begun, 1))
    os.close(begun)
    if not ran:
        code = 128 + child.signal if child.signal else code if code in (TOOL, CLONE) else SETUP
    keep_code(log, code)
    if not ran and not child.signal:
        raise Failure(code, "see the lines above")
    return code


def leave_record(places: Places, job: dict) -> None:
    """Leave beside rank 0's log how the run came about, and its config if that has no secret."""
    made = job.get("made") or {}
    record = {"run": job["run"], "recipe": job.get("recipe"), "nodes": job.get("nodes"), "tree": job["tree"],
              "setup": job.get("setup"), "command": job["command"], "made": made}
    files = [("run.json", json.dumps(record, indent=1).encode())]
    if made.get("plain"):
        files.append(("config.yaml", content(places.config)))
    flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW
    try:
        for name, data in files:
            path = os.path.join(places.logs, name)
            with open(path, "wb", opener=lambda name, _: os.open(name, flags, 0o600)) as file:
                file.write(data)
    except OSError as error:
        say("the record of the run cannot be kept in %s: %s" % (places.logs, error.strerror))


def keep_code(log: str | None, code: int | None) -> None:
    """Write the exit code beside the log, if there is one; None: remove that of an earlier start of this pod."""
    path = log and log[:-len("log")] + "exit"
    try:
        if path and code is not None:
            with open(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as file:
                file.write("%d\n" % code)
        elif path and os.path.exists(path):
            os.unlink(path)
    except OSError as error:
        say("the exit code cannot be kept in %s: %s" % (path, error.strerror))
