"""The half that runs in the pod: chunks -> verified tree -> recipe. Standard library only, Python 3.8 and later.

It arrives as chunks of the environment (transport.py tells the protocol) and is started by `python3 -c`. In order: find
the rank; join and check the chunks; unpack; write the config; take its own variables out of the environment; then run
setup and recipe in one bash, and stay above it as a small init that forwards TERM and INT, reaps, passes the output
through and returns the recipe's exit code.

Places. The code root, <scratch>/airlift-<run>/code, holds the tree; the run root holds what the recipe writes. In the
config `/nemo_run/code` stands for the first and any other `/nemo_run/...` for the second, by whole path components. So
it is in the environment, unless the run root itself lies below /nemo_run: there a profile's paths are the real ones.

The tree is compared with its digest, unpacked into a private folder and renamed into place, so that its name is absent
or complete. A tree that is already there (the container was restarted) is compared with what came; anything
else under that name is refused and left as it is.

A Ray recipe on several nodes: the pods form the cluster themselves (see Ray below), and the recipe runs on rank 0 as
the cluster's driver.

Each failure of its own has an exit code in FAILURES and one plain sentence. Everything else is the recipe's code.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from typing import IO, Any, Iterator

POD, PAYLOAD, RANK, PLACE, WAIT, PYTHON, SETUP, TOOL, CLONE, INTERNAL, RAY, LOST = range(80, 92)

FAILURES = {
    POD: ("the program that unpacks did not arrive whole", "the platform dropped or changed a part of the environment"),
    PAYLOAD: ("the payload did not arrive whole", "the platform dropped or changed a part of it"),
    RANK: ("the pod's rank is not certain", "set NODE_RANK in every pod, or remove what contradicts it"),
    PLACE: ("the pod could not put the files in place", "give the pod disk space, or a writable TMPDIR and workspace"),
    WAIT: ("rank 0 did not put the shared tree in place", "see rank 0's log, and whether all pods see the workspace"),
    PYTHON: ("the pod's python3 cannot unpack the payload", 'use an image with Python 3.8, or compression = "gz"'),
    SETUP: ("a startup command failed", "mend startup_commands in the profile; its output is above"),
    TOOL: ("the image lacks what the recipe is started with", "use an image that has it, or set run_command"),
    CLONE: ("a repository that the recipe mounts could not be cloned",
            'name a mirror that pods reach in [git_mirrors], or use the image\'s copy with auto_mount = "image"'),
    INTERNAL: ("pod.py itself failed", "please report it with the lines above"),
    RAY: ("the Ray cluster did not come up", "see the lines above, and whether all pods run and reach each other"),
    LOST: ("the Ray cluster lost a node", "see why that pod ended, then launch again: a recipe resumes"),
}


class Failure(Exception):
    """A failure of ours: its exit code and what was seen."""

    def __init__(self, code: int, seen: str) -> None:
        super().__init__(seen)
        self.code, self.seen = code, seen


def say(text: str, to: int = 1) -> None:
    """One line on standard output (or error, `to` 2), past Python's buffers and locale; where nobody reads, nothing."""
    try:
        os.write(to, ("airlift: " + text + "\n").encode("utf-8", "backslashreplace"))
    except OSError:
        pass


# ---------------------------------------------------------------- rank


def find_rank(env: dict[str, str], hostname: str, nodes: int) -> int:
    """This pod's rank, 0 to nodes-1, counted over all replica types.

    NODE_RANK, LEPTON_JOB_WORKER_INDEX, PET_NODE_RANK, RANK and SLURM_NODEID must agree where they are set. With several
    nodes the hostname's suffix must agree too, unless NODE_RANK or Slurm speaks: machines can be named gpu-worker-3.
    Raises Failure(RANK) where two disagree, or none speaks with several nodes.
    """
    names = ("NODE_RANK", "LEPTON_JOB_WORKER_INDEX", "PET_NODE_RANK", "RANK", "SLURM_NODEID")
    found = {name: env[name].strip() for name in names if env.get(name, "").strip()}
    if nodes > 1 and "NODE_RANK" not in found and "SLURM_NODEID" not in found:
        suffix = _host_rank(hostname, env)
        if suffix is not None:
            found["hostname " + hostname] = suffix
    if not found:
        if nodes == 1:
            return 0
        raise Failure(RANK, "no variable of this platform and no hostname tells which of %d pods this is" % nodes)
    for name, value in found.items():
        if not re.fullmatch(r"[0-9]{1,9}", value):
            raise Failure(RANK, "%s is %r, not a number" % (name, value))
    if len({int(value) for value in found.values()}) > 1:
        raise Failure(RANK, "sources disagree: " + ", ".join("%s says %s" % pair for pair in sorted(found.items())))
    rank = int(next(iter(found.values())))
    if rank >= nodes:
        raise Failure(RANK, "%s says rank %d, but the job has %d" % (next(iter(found)), rank, nodes))
    return rank


def _host_rank(hostname: str, env: dict[str, str]) -> str | None:
    """Kubeflow's hostnames: <job>-master-0 is rank 0, and <job>-worker-N is N, or N+1 where there is a master."""
    match = re.search(r"-(master|worker)-([0-9]+)$", hostname.split(".")[0])
    if not match:
        return None
    master = "-master-0" in env.get("MASTER_ADDR", "") + env.get("PET_MASTER_ADDR", "")
    return str(int(match.group(2)) + (1 if master and match.group(1) == "worker" else 0))


def find_master(env: dict[str, str], nodes: int) -> tuple[str, str]:
    """(address, port) where rank 0 listens. Raises Failure(RANK) if there are several nodes and nothing tells it."""
    port = env.get("MASTER_PORT") or env.get("PET_MASTER_PORT")
    if nodes == 1:
        return env.get("MASTER_ADDR") or "127.0.0.1", port or str(_free_port())
    port = port or "29400"
    for name in ("MASTER_ADDR", "PET_MASTER_ADDR"):
        if env.get(name):
            return env[name], port
    if env.get("LEPTON_JOB_WORKER_PREFIX") and env.get("LEPTON_SUBDOMAIN"):
        return "%s-0.%s" % (env["LEPTON_JOB_WORKER_PREFIX"], env["LEPTON_SUBDOMAIN"]), port
    if env.get("SLURM_JOB_NODELIST"):
        # Two jobs may share a node, so the port comes from the job's id.
        job = env.get("SLURM_JOB_ID", "")
        job_port = str(20000 + int(job) % 10000) if re.fullmatch(r"[0-9]{1,18}", job) else port
        return first_host(env["SLURM_JOB_NODELIST"]), env.get("MASTER_PORT") or job_port
    raise Failure(RANK, "nothing tells where rank 0 is: set MASTER_ADDR")


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: "dgx[007-009,012],login" -> "dgx007", "r[1-2]n[3,5]" -> "r1n3"."""
    first = re.sub(r"\[([0-9]+)[-,0-9]*\]", r"\1", nodelist).split(",")[0].strip()
    if not re.fullmatch(r"[\w.-]+", first):
        raise Failure(RANK, "SLURM_JOB_NODELIST is %r" % nodelist)
    return first


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- payload


def join(env: dict[str, str], stream: str) -> bytes:
    """The bytes of one stream. Raises Failure(PAYLOAD), for pod.py's own POD, unless exactly the chunks that were sent
    are there."""
    lost = POD if stream == "POD" else PAYLOAD
    prefix = "AIRLIFT_" + stream + "_"
    count = env.get(prefix + "CHUNKS", "")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", count):
        raise Failure(lost, "%sCHUNKS is %r" % (prefix, count[:40]))
    expected = {"%s%04d" % (prefix, i) for i in range(int(count))}
    present = {name for name in env if re.match(re.escape(prefix) + "[0-9]+$", name)}
    if present != expected:
        odd = sorted(present ^ expected)
        raise Failure(lost, "of %s chunks of %s, %s is %s"
                      % (count, stream, odd[0], "missing" if odd[0] in expected else "one too many"))
    text = "".join(env[name] for name in sorted(expected))
    if hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest() != env.get(prefix + "SHA256"):
        raise Failure(lost, "the chunks of %s do not have the digest that was sent" % stream)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Failure(lost, "the chunks of %s are not base64: %s" % (stream, error)) from None


def read_job(env: dict[str, str]) -> dict:
    try:
        return checked(json.loads(zlib.decompress(join(env, "JOB"))))
    except (ValueError, RecursionError, zlib.error) as error:
        raise Failure(PAYLOAD, "the job's description cannot be read: %s" % error) from None


def checked(job: dict, members: bool = False) -> dict:
    """The description, if it has the shape that launch.py gives it (on Slurm with `members`). Raises Failure(PAYLOAD)
    that names the field: what sends and what reads may be of two versions."""
    job = job if isinstance(job, dict) else {}
    tree: dict = job["tree"] if isinstance(job.get("tree"), dict) else {}
    shared = job.get("unpack") == "shared"
    right = {
        "run": _texts([job.get("run")]) and re.fullmatch(r"[\w-]{1,64}", job["run"]),
        "nodes": _whole(job.get("nodes")),
        "tree": _texts([tree.get("sha256"), tree.get("compression")]) and _whole(tree.get("files"), 0),
        "env": _table(job.get("env")) and all(name and "=" not in name for name in job["env"]),
        "setup": _list(job.get("setup")), "folders": _list(job.get("folders", [])),
        "clones": isinstance(job.get("clones", []), list) and all(
            _table(clone) and sorted(clone) == ["ref", "target", "url"] for clone in job.get("clones", [])),
        "members": not members or _table(job.get("members")),
        "shared": not shared or _texts([job.get("shared")]), "keep": not shared or _whole(job.get("keep")),
        "patience": not (shared or forms_cluster(job)) or _whole(job.get("patience")),
    }
    right.update({name: _texts([job.get(name)]) for name in ("launch", "config", "command")})
    right.update({name: _texts([job.get(name) or ""]) for name in ("run_root", "workdir", "tool")})
    odd = [name for name, value in right.items() if not value]
    if odd:
        raise Failure(PAYLOAD, "the job's description lacks a usable %s" % ", ".join(odd))
    return job


def forms_cluster(job: dict) -> bool:
    """Whether the job's pods form a Ray cluster."""
    return job.get("launch") == "ray" and _whole(job.get("nodes"), 2)


def _texts(values: list) -> bool:
    """Strings that a path, an environment and a file can hold."""
    return all(isinstance(text, str) and "\0" not in text and text == text.encode("utf-8", "ignore").decode()
               for text in values)


def _list(value: object) -> bool:
    return isinstance(value, list) and _texts(value)


def _table(value: object) -> bool:
    return isinstance(value, dict) and _texts([*value, *value.values()])


def _whole(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def decompress(data: bytes, method: str) -> bytes:
    """The tar of a tree. Raises Failure(PYTHON) if this Python was built without the method."""
    try:
        if method == "xz":
            import lzma

            return lzma.decompress(data)
        import gzip

        return gzip.decompress(data)
    except ImportError as error:
        raise Failure(PYTHON, "this Python has no %s: %s" % (method, error)) from None
    except Exception as error:  # what came is what was sent; lzma, gzip and zlib have errors of their own
        raise Failure(PYTHON, "this Python cannot unpack %s: %s" % (method, error)) from None


def unpack(tar: bytes, target: str) -> None:
    """Put the tar's tree at `target`, whole or not at all. Raises Failure(PLACE); a foreign `target` is left alone."""
    if os.path.lexists(target):
        if not holds(target, tar):
            raise Failure(PLACE, "%s is there already and does not hold this payload" % target)
        return
    private = tempfile.mkdtemp(prefix="code.", dir=os.path.dirname(target))
    try:
        extract(tar, private)
        os.chmod(private, 0o755)
        try:
            os.rename(private, target)
        except OSError:
            if not holds(target, tar):  # another pod with the same scratch space was faster
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)


def members(tar: bytes) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """(TarInfo, bytes) of each file and link. Raises Failure(PAYLOAD) for all else, and for a path that comes twice
    or leads out, also by way of a link."""
    links: dict[str, bool] = {}  # path -> whether it is a link
    try:
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            for info in archive:
                parts = info.name.split("/")
                kept = _texts([info.name, info.linkname]) and info.type in (tarfile.REGTYPE, tarfile.SYMTYPE)
                leads = os.path.normpath(os.path.join(os.path.dirname(info.name), info.linkname))
                out = info.issym() and leads.split("/")[0] in ("", "..")
                through = any(links.get("/".join(parts[:end])) for end in range(1, len(parts)))
                if not kept or set(parts) & {"", ".", ".."} or info.name in links or out or through:
                    raise Failure(PAYLOAD, "the tar holds %r, which does not belong there" % info.name[:200])
                links[info.name] = info.issym()
                file = archive.extractfile(info) if info.isfile() else None
                yield info, file.read() if file else info.linkname.encode()
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise Failure(PAYLOAD, "the tar cannot be read: %s" % error) from None


def extract(tar: bytes, folder: str) -> None:
    for info, data in members(tar):
        path = os.path.join(folder, os.fsdecode(info.name.encode()))  # UTF-8, whatever the image's locale
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        if info.issym():
            os.symlink(os.fsdecode(data), path)
            continue
        with open(path, "wb") as file:
            file.write(data)
        os.chmod(path, info.mode & 0o777)


def holds(folder: str, tar: bytes) -> bool:
    """Whether every file and link of the tar stands in the folder, byte for byte."""
    for info, data in members(tar):
        path = os.path.join(folder, os.fsdecode(info.name.encode()))
        try:
            if info.issym():
                same = os.fsencode(os.readlink(path)) == data
            else:
                with open(path, "rb", opener=_at_once) as file:
                    same = stat.S_ISREG(os.fstat(file.fileno()).st_mode) and file.read(len(data) + 1) == data
        except OSError:
            return False
        if not same:
            return False
    return True


def _at_once(path: str, flags: int) -> int:
    """A FIFO would hold us for ever, and what lies in a shared folder may become one between a look and its opening."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def strays(folder: str, tar: bytes) -> list[str]:
    """Files and links in the folder that are not of the tar."""
    sent = {os.path.join(folder, os.fsdecode(info.name.encode())) for info, _ in members(tar)}
    found = []
    for place, folders, files in os.walk(folder):
        paths = [os.path.join(place, name) for name in files + folders]
        found += [path for path in paths if path not in sent and (os.path.islink(path) or not os.path.isdir(path))]
    return found


# ---------------------------------------------------------------- shared unpack


class Shared:
    """One tree on shared storage for all pods of an attempt (unpack = "shared").

    Under one folder that all pods see:

        trees/000007-<digest>.../  a published tree: absent or complete; its name is never used again
            code/                  what was sent; never changed
            uses/                  a file of each pod that uses it, from before it looks at the tree until it ends
            told/                  rank 0's word to the others, <attempt>.ready-<n>; n is the number of chunks
        failed/000007-<attempt>    rank 0's word that it cannot, and why
        private/000008-...         not yet published
        swept/...                  no longer

    An attempt is one start of all pods: the run's id and the platform's count of restarts. Rank 0 alone decides which
    tree it is: one with the right digest that is there and verifies, else a new one, unpacked into a private folder,
    verified, and renamed with rank 0's use and word already in it. The others look for its word, with a deadline, and
    verify the tree before they use it.

      - No lock, and no clock is compared. Any pod may be killed and started again at any point; two may be alive at
        once that think they are the same rank, so each process has a use of its own.
      - Readers and sweepers meet in uses/, and the file system decides: a sweeper first removes that folder, which
        works only while nobody is in it; from then on nobody can enter it, and whoever comes by can finish the sweep.
      - Nothing is deleted under the name it had. It is renamed to swept/ first, so that of a pod that would publish a
        folder and one that would remove it, one is told that it came too late. Rank 0 then begins anew.
      - Rank 0 reuses only a tree with nothing else in it: a module that another job left there would be imported. The
        others do not mind what their own siblings leave in it meanwhile.
      - What stays: a pod that was killed leaves its use behind, and with it the tree; remove the whole folder while
        no job runs, if that is too much. A tree keeps a word for each attempt it served. Of private folders and
        failures the newest LEFT stay. A full disk makes all go that is not in use.
      - NFS: a rename that was carried out may be answered ENOENT, so what counts is what is there afterwards. A name
        that was looked up too early stays absent in a cache for a while, so names are read from listings, and a
        folder is touched before it is listed, which makes the client ask the server.
    """

    FOLDERS = ("trees", "failed", "private", "swept")
    LEFT = 32
    GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
    FULL = (errno.ENOSPC, errno.EDQUOT)

    def __init__(self, job: dict, env: dict[str, str], rank: int, tar: bytes) -> None:
        restarts = env.get("LEPTON_JOB_FAILURE_COUNT") or env.get("SLURM_RESTART_COUNT") or "0"
        self.top, self.rank, self.tar = job["shared"], rank, tar
        self.attempt = "%s-%s" % (job["run"], re.sub(r"[^0-9]", "_", restarts))
        self.digest = job["tree"]["sha256"]
        self.ready = "%s.ready-%s" % (self.attempt, env["AIRLIFT_TREE_CHUNKS"])
        self.use = "%s.%d.%s" % (self.attempt, rank, os.urandom(8).hex())
        self.keep, self.patience = job["keep"], job["patience"]
        self.used: str | None = None
        for folder in self.FOLDERS:
            os.makedirs(self.path(folder), exist_ok=True)

    def path(self, *parts: str) -> str:
        return os.path.join(self.top, *parts)

    def find(self) -> str:
        """The tree's path, in place and verified. Raises Failure(WAIT or PLACE), OSError."""
        name = self.provide() if self.rank == 0 else self.wait()
        return self.path("trees", name, "code")

    def leave(self, error: BaseException | None = None) -> None:
        """Give up the use. An error of rank 0 is told to the others; a signal is not, for rank 0 may come back."""
        self.release()
        if self.rank == 0 and isinstance(error, Exception):
            try:
                path = self.path("failed", "%06d-%s" % (self.next_number(), self.attempt))
                with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(getattr(error, "seen", str(error)))
            except OSError:
                pass  # then the others wait for their deadline

    # rank 0

    def provide(self) -> str:
        for name in self.failures():
            self.remove("failed", name)
        known = sorted(self.ours(), key=self.told, reverse=True)  # first what the others may have been told already
        name = next(filter(self.offer, known), None) or self.publish()
        self.sweep(self.keep, self.LEFT)
        return name

    def offer(self, name: str) -> bool:
        """Take a tree that is there and tell the others. What cannot be taken (another user's, say) is passed over."""
        try:
            alone = self.take(name) and not strays(self.path("trees", name, "code"), self.tar)
            if alone and self.mark(self.path("trees", name, "told", self.ready)):
                return True
        except OSError:
            pass
        self.release()
        return False

    def publish(self) -> str:
        """A new tree. Begun anew when our folder was swept as if left behind, and once when the disk was full."""
        deadline, was_full = time.monotonic() + self.patience, False
        while True:
            name, begun = "%06d-%s.%s" % (self.next_number(), self.digest, os.urandom(4).hex()), False
            try:
                os.makedirs(self.path("private", name), exist_ok=True)
                begun = True
                for folder in ("uses", "told", "code"):
                    os.makedirs(self.path("private", name, folder), exist_ok=True)
                self.fill(self.path("private", name))
                self.rename(name)
                return name
            except (Failure, OSError) as error:
                full = getattr(error, "errno", None) in self.FULL
                swept = begun and "uses" not in self.listed("private", name)
                if full and not was_full:
                    was_full = True
                    self.sweep(keep=0, left=0)
                elif full or not swept or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            finally:
                self.discard("private", name, ours=True)

    def fill(self, private: str) -> None:
        code = os.path.join(private, "code")
        extract(self.tar, code)
        marked = [self.mark(os.path.join(private, *mark)) for mark in (("uses", self.use), ("told", self.ready))]
        if not all(marked) or not holds(code, self.tar):
            raise Failure(PLACE, "%s does not hold what was written to it" % private)

    def rename(self, name: str) -> None:
        self.used = name
        try:
            os.rename(self.path("private", name), self.path("trees", name))
        except OSError:
            if not self.offer(name):  # it may have been carried out after all
                raise

    # the others

    def wait(self) -> str:
        deadline, pause, seen = time.monotonic() + self.patience, 0.05, "rank 0 has said nothing"
        while True:
            for name in filter(self.told, self.ours()):
                if self.take(name):
                    return name
                seen = "rank 0 names %s, which is not what was sent," % self.path("trees", name)
            for name in self.failures():
                raise Failure(WAIT, "rank 0 says: " + self.reason(name))
            left = deadline - time.monotonic()
            if left <= 0:
                raise Failure(WAIT, "%s after %d s in %s" % (seen, self.patience, self.top))
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, 1.0)

    def reason(self, name: str) -> str:
        try:
            with open(self.path("failed", name), encoding="utf-8", errors="replace") as file:
                return file.read(1000) or "it failed"
        except OSError:
            return "it failed"

    # use and sweep

    def take(self, name: str) -> bool:
        """Use a tree, if it is there and holds what was sent."""
        if self.used != name:
            self.release()
        self.used = name
        if self.mark(self.path("trees", name, "uses", self.use)) and holds(self.path("trees", name, "code"), self.tar):
            return True
        self.release()
        return False

    def release(self) -> None:
        if self.used:
            try:
                os.unlink(self.path("trees", self.used, "uses", self.use))
            except OSError:
                pass  # there is none; or it is as if this pod had been killed, and the tree stays
            self.used = None

    def sweep(self, keep: int, left: int) -> None:
        """Remove all but the newest, and no tree in use. What goes wrong here concerns nobody but the disk."""
        try:
            for name in older(self.trees(), keep):
                self.retire(name)
            for name in older(self.listed("private"), left):
                self.discard("private", name)
            for name in older(self.listed("failed"), self.LEFT):
                self.remove("failed", name)
            for name in self.listed("swept"):
                shutil.rmtree(self.path("swept", name), ignore_errors=True)
        except OSError as error:
            say("old trees stay: %s: %s" % (error.filename, error.strerror))

    def retire(self, name: str) -> None:
        try:
            os.rmdir(self.path("trees", name, "uses"))
        except FileNotFoundError:
            pass  # a sweeper that was killed went as far, if what is left is what it would have left
        except OSError:
            return  # in use, or nothing of ours
        if set() < set(self.listed("trees", name)) <= {"code", "told"}:
            self.discard("trees", name)

    def discard(self, folder: str, name: str, ours: bool = False) -> None:
        """Delete, by rename first. Where not even that has room, our own private folder is deleted where it is."""
        gone = self.path("swept", "%s.%s" % (name, os.urandom(4).hex()))
        try:
            os.rename(self.path(folder, name), gone)
        except OSError as error:
            if not ours or error.errno not in self.FULL:
                return
            gone = self.path(folder, name)
        shutil.rmtree(gone, ignore_errors=True)

    # what is there

    def trees(self) -> list[str]:
        """Oldest first."""
        names = [name for name in self.listed("trees") if re.fullmatch(r"[0-9]{6,18}-[0-9a-f]{64}\.[0-9a-f]{8}", name)]
        return sorted(names, key=lambda name: int(name.partition("-")[0]))

    def next_number(self) -> int:
        return 1 + max([int(name.partition("-")[0]) for name in self.trees()] + [0])

    def ours(self) -> list[str]:
        """Trees with our digest, newest first."""
        return [name for name in reversed(self.trees()) if self.digest in name]

    def told(self, name: str) -> bool:
        try:
            return self.ready in self.listed("trees", name, "told")
        except OSError:  # another user's, say
            return False

    def failures(self) -> list[str]:
        return [name for name in self.listed("failed") if name.partition("-")[2] == self.attempt]

    def listed(self, *parts: str) -> list[str]:
        folder = self.path(*parts)
        try:
            try:
                os.utime(folder)
            except PermissionError:
                pass
            return sorted(os.listdir(folder))
        except OSError as error:
            if error.errno in self.GONE:
                return []
            raise

    def mark(self, path: str) -> bool:
        """An empty file; False if its folder is gone."""
        try:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
            return True
        except OSError as error:
            if error.errno in self.GONE:
                return False
            raise

    def remove(self, folder: str, name: str) -> None:
        try:
            os.unlink(self.path(folder, name))
        except FileNotFoundError:
            pass


def older(names: list[str], keep: int) -> list[str]:
    """All but the last `keep`."""
    return names[:max(0, len(names) - keep)]


# ---------------------------------------------------------------- places


class Places:
    """Where things are in this pod. All are absolute paths."""

    def __init__(self, job: dict, env: dict[str, str], base: str = "", code: str = "") -> None:
        self.base = base or os.path.join(os.path.abspath(env.get("TMPDIR") or "/tmp"), "airlift-" + job["run"])
        self.code = code or os.path.join(self.base, "code")
        self.config = os.path.join(self.base, "config.yaml")
        self.run_root = job.get("run_root") or os.path.join(self.base, "output")
        self.keeps = bool(job.get("run_root"))
        self.logs = os.path.join(self.run_root, "runs", job["run"])

    def make(self, folders: list[str]) -> None:
        """Make the folders; `base` only for this user, since the config lies in it."""
        os.makedirs(self.base, mode=0o700, exist_ok=True)
        for folder in [self.run_root] + ([self.logs] if self.keeps else []) + [self.fill(folder) for folder in folders]:
            os.makedirs(folder, exist_ok=True)

    def fill(self, text: str, config: bool = False) -> str:
        """`text` with /nemo_run/code and /nemo_run replaced, by whole path components; in a config within "..."."""

        def place(match: re.Match) -> str:
            if not (config or match.group(1)) and self.run_root.startswith("/nemo_run/"):
                return match.group(0)  # storage is mounted there
            path = self.code if match.group(1) else self.run_root
            return quoted(path) if config else path

        return re.sub(r"(?<![\w./})\]~-])/nemo_run(/code)?(?![\w.-])", place, text)

    def write_config(self, text: str) -> None:
        descriptor, private = tempfile.mkstemp(dir=self.base)  # 0600
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self.fill(text, config=True))
        os.rename(private, self.config)


def quoted(text: str) -> str:
    """`text` as it stands between the double quotes of YAML: as in JSON, but YAML reads no surrogate pairs, and wants
    some more characters in escapes."""
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda match: "\\u%04x" % ord(match.group()),
                  json.dumps(text, ensure_ascii=False)[1:-1])


# ---------------------------------------------------------------- a tree that has come by itself


def read_manifest(path: str) -> dict:
    """The job's description, with what each path of the tree must be ("members")."""
    try:
        with open(path, encoding="utf-8") as file:
            return checked(json.load(file), members=True)
    except (OSError, ValueError, RecursionError) as error:
        raise Failure(PAYLOAD, "the manifest %s cannot be read: %s" % (path, error)) from None


def check_tree(folder: str, members: dict[str, str]) -> None:
    """Raises Failure(PAYLOAD) unless every file has its digest, and every link ("-> target") its target."""
    for name, wanted in sorted(members.items()):
        path = os.path.join(folder, os.fsdecode(name.encode()))
        try:
            if wanted.startswith("-> "):
                found = "-> " + os.fsencode(os.readlink(path)).decode("utf-8", "replace")
            else:
                with open(path, "rb") as file:
                    found = hashlib.sha256(file.read()).hexdigest()
        except OSError as error:
            raise Failure(PAYLOAD, "%s: %s" % (path, error.strerror)) from None
        if found != wanted:
            raise Failure(PAYLOAD, "%s is not what was sent" % path)


def settle(manifest: str, job: dict, env: dict[str, str]) -> Places:
    """The tree lies beside the manifest: check it, take the secrets that lie above it into `env`, and write the config
    into a folder of this pod's own. Raises Failure."""
    code = os.path.dirname(os.path.abspath(manifest))
    check_tree(code, job["members"])
    try:
        if job.get("secrets"):
            with open(os.path.join(os.path.dirname(code), "secrets.json"), encoding="utf-8") as file:
                env.update(json.load(file))
        places = Places(job, env, tempfile.mkdtemp(prefix="airlift-%s-" % job["run"], dir=env.get("TMPDIR")), code)
        places.make(job.get("folders", []))
        places.write_config(job["config"])
        return places
    except OSError as error:
        raise Failure(PLACE, "%s: %s" % (error.filename, error.strerror)) from None


# ---------------------------------------------------------------- run


def recipe_env(env: dict[str, str], job: dict, places: Places, rank: int) -> dict[str, str]:
    """The recipe's environment: the pod's without what is ours, then the user's, then rank and places."""
    result = {name: value for name, value in env.items() if not name.startswith("AIRLIFT_")}
    if job["launch"] == "torchrun":  # a platform's PET_RDZV_BACKEND would overrule torchrun's arguments
        result = {name: value for name, value in result.items() if not name.startswith("PET_")}
    result.setdefault("PYTHONUNBUFFERED", "1")
    if job.get("unpack") == "shared":
        result.setdefault("PYTHONPYCACHEPREFIX", os.path.join(places.base, "pycache"))  # a published tree never changes
    result.update({name: places.fill(value) for name, value in job["env"].items()})
    address, port = find_master(dict(env, **result), job["nodes"])
    paths = [os.path.join(places.code, "src")] + [p for p in result.get("PYTHONPATH", "").split(":") if p]
    result.update({
        "PYTHONPATH": ":".join(paths), "NODE_RANK": str(rank), "NNODES": str(job["nodes"]),
        "MASTER_ADDR": address, "MASTER_PORT": port, "NEMO_RUN_DIR": places.run_root,
        "AIRLIFT_RUN": job["run"], "AIRLIFT_CODE": places.code, "AIRLIFT_CONFIG": places.config,
    })
    return driver_env(env, result, places.code) if job.get("on_cluster") else result


# A server may refuse a commit that is no tip of a branch; then all branches are fetched.
CLONE_SCRIPT = """\
(rm -rf {target}.new && git init -q {target}.new && cd {target}.new && {{
   git fetch -q --depth 1 {url} {ref} && git checkout -q FETCH_HEAD || {{
     git fetch -q --tags {url} '+refs/heads/*:refs/remotes/origin/*' && git checkout -q {ref}; }}; }} &&
 cd / && rm -rf {target} && mv {target}.new {target} &&
 echo airlift: {target} is $(git -C {target} rev-parse HEAD)
) || {{ echo 'airlift: no clone of '{shown}' at '{ref} >&2; exit {code}; }}"""


def script_for(job: dict, workdir: str, ready: int) -> str:
    """The one bash script: startup commands, then the recipe. Between them a byte goes to the descriptor `ready`, which
    tells whose exit code it is.

    With a trap bash waits for the command that runs, when TERM arrives, and goes on from there: to its end, with the
    recipe's own code, if that was the last one; else it exits, or a TERM between two commands would be lost.
    """
    lines = ["trap 'exit 143' TERM; trap 'exit 130' INT", "cd -- %s || exit %d" % (shlex.quote(workdir), TOOL)]
    for clone in job.get("clones", []):
        words = dict(clone, shown=re.sub(r"(https?://)[^/@]+@", r"\1***@", clone["url"]))
        lines.append(CLONE_SCRIPT.format(code=CLONE, **{name: shlex.quote(value) for name, value in words.items()}))
    for number, command in enumerate(job["setup"], 1):
        lines.append("eval %s || { echo 'airlift: startup command %d failed with exit code '$? >&2; exit %d; }"
                     % (shlex.quote(command), number, SETUP))
    if job.get("tool"):
        tool = shlex.quote(job["tool"])
        lines.append("command -v %s >/dev/null || { echo 'airlift: there is no '%s' in this image' >&2; exit %d; }"
                     % (tool, tool, TOOL))
    lines += ["trap AIRLIFT_TERM=143 TERM; trap AIRLIFT_TERM=130 INT",
              "trap '[ -z \"${AIRLIFT_TERM:-}\" ] || exit $AIRLIFT_TERM' DEBUG",
              "echo >&%d; exec %d>&-" % (ready, ready), job["command"]]
    return "\n".join(lines) + "\n"


class Child:
    """The bash that runs the recipe, in a process group of its own, and the signals for it."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.signal = 0  # the last one that came
        for number in self.SIGNALS:
            signal.signal(number, self.forward)
        signal.signal(signal.SIGALRM, self.remind)

    def forward(self, number: int, _frame: object) -> None:
        """Give a signal to bash and all it runs. If it runs nothing right now, it may be about to: see remind."""
        self.signal = number
        if self.process is None:
            raise SystemExit(128 + number)
        if not _children(self.process.pid):
            signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
        try:
            os.killpg(self.process.pid, number)
        except OSError:  # it has ended, or now belongs to another user
            pass

    def remind(self, _number: int, _frame: object) -> None:
        """Give the signal to what bash started just as it came: bash waits for that first, and would heed it later."""
        children = _children(self.process.pid) if self.process else []
        for pid in children:
            try:
                os.kill(pid, self.signal)
            except OSError:
                pass
        if children:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def run(self, script: str, env: dict[str, str], log: str | None, ready: int) -> int:
        """Run bash to its end; its output also goes to the file `log`. Returns its code, 128+N if signal N ended it."""
        become_subreaper()
        # A signal that came while bash is being started would find nobody to go to: it waits until there is.
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        try:
            self.process = subprocess.Popen(
                ["bash", "-c", script], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if log else None,
                stderr=subprocess.STDOUT if log else None, start_new_session=True, pass_fds=(ready,),
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS))
        except FileNotFoundError:
            raise Failure(TOOL, "there is no bash in this image") from None
        except OSError as error:
            raise Failure(TOOL, "bash cannot be started: %s" % error.strerror) from None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
            os.close(ready)
        pump = None
        try:
            if log and self.process.stdout:
                pump = threading.Thread(target=copy_output, args=(self.process.stdout, log), daemon=True)
                pump.start()
            return reap(self.process.pid)
        finally:
            end_the_rest()
            if pump:
                pump.join(5)  # a daemon that escaped may hold the pipe open for ever


def copy_output(pipe: IO[bytes], log: str | None) -> None:
    """Pass bytes on as they come. A log that cannot be written (full disk) is said once, and the recipe goes on; so it
    does when nobody reads our output any more: the pipe must be emptied, or the recipe would stand still."""
    try:
        file = open(log, "ab", buffering=0) if log else None
    except OSError as error:
        say("the log %s cannot be kept: %s" % (log, error.strerror))
        file = None
    while True:
        data = os.read(pipe.fileno(), 65536)
        if not data:
            return
        try:
            if file:
                file.write(data)
        except OSError as error:
            say("the log %s ends here: %s" % (log, error.strerror))
            file = None
        try:
            while data:
                data = data[os.write(1, data):]
        except OSError:
            pass


def become_subreaper() -> None:
    """Have orphans handed to us, as to process 1. Only Linux can, and only with ctypes; without it they go to init."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    except (ImportError, OSError, AttributeError):
        pass


def reap(pid: int) -> int:
    """Wait for `pid`, and meanwhile for every orphan, as process 1 must."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def end_the_rest(grace: float = 5.0) -> None:
    """End what the recipe left running: TERM, then KILL after `grace` seconds, until no child is left. What even KILL
    does not end (a file system that hangs) is left after twice the time."""
    deadline = time.monotonic() + grace
    told: set[int] = set()
    while time.monotonic() < deadline + grace:
        late = time.monotonic() > deadline
        for pid in _children(os.getpid()):
            if late or pid not in told:
                told.add(pid)
                try:
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
                except OSError:  # it has ended, or belongs to another user
                    pass
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.02)
        except ChildProcessError:
            return


def _children(parent: int) -> list[int]:
    """The children of a process, by each process's own word: not every kernel has /proc/<pid>/task/<pid>/children."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        try:
            with open("/proc/%d/stat" % int(name), "rb") as file:
                if int(file.read().rpartition(b")")[2].split()[1]) == parent:
                    found.append(int(name))
        except (ValueError, OSError):  # not a process, or no longer
            continue
    return found


# ---------------------------------------------------------------- Ray


class RayNode:
    """One pod's part of a Ray cluster that the pods form themselves, in a process of its own, started by the recipe's
    bash once the tree is in place and the startup commands have run.

    Rank 0 listens on MASTER_PORT, and every other pod keeps a connection to it, with one JSON object a line:

        {"run", "rank", "at"}                  a worker's first word; "at" is rank 0's address as the worker sees it
        {"join", "env"}                        rank 0's Ray address, once all pods have come and its head runs
        {"up": true}                           `ray start` has registered the worker's node
        {"lost": why}                          a worker's Ray has ended
        {"end": code}                          the driver's exit code, with which every pod ends

    When all nodes are up, rank 0 runs the recipe with RAY_ADDRESS. Until then everything waits `patience` seconds at
    most. A connection that ends without a word is a pod that is gone; keepalive tells of a machine that is. What Ray
    leaves running ends with pod.py, which ends all its orphans; `ray stop` would end those of other jobs, too.
    """

    def __init__(self, told: dict) -> None:
        self.run, self.rank, self.nodes, self.patience = told["run"], told["rank"], told["nodes"], told["patience"]
        self.command = told["command"]
        self.deadline = time.monotonic() + self.patience
        self.env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.address, self.port = self.env["MASTER_ADDR"], int(self.env["MASTER_PORT"])
        self.daemons: dict[int, str] = {}  # pid -> name
        become_subreaper()

    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def own_address(self, seen: str) -> str:
        """This node's address for Ray. On one machine each rank has one of its own, for 127.0.0.1 is not one to Ray."""
        return "127.77.%d.%d" % (self.rank // 250, 1 + self.rank % 250) if seen.startswith("127.") else seen

    def start(self, *words: str) -> None:
        """`ray start`, which returns when the node is registered. Raises Failure(TOOL or RAY)."""
        # Worker ports from the kernel: Ray's own range is the same for every node, and two may be on one machine.
        argv = ["ray", "start", *words, "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"]
        with tempfile.TemporaryFile() as output:
            try:
                done = subprocess.run(argv, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                      timeout=self.left(), start_new_session=True)
                said = "" if done.returncode == 0 else "`ray start` ended with exit code %d" % done.returncode
            except OSError as error:
                raise Failure(TOOL, "ray cannot be started: %s" % error.strerror) from None
            except subprocess.TimeoutExpired:
                said = "`ray start` took more than the %d s there were" % self.patience
            if said:
                output.seek(0)
                for line in output.read().decode("utf-8", "replace").splitlines()[-20:]:
                    say("ray start: " + line)
                raise Failure(RAY, said)
        self.daemons = {pid: name for pid, name in ((pid, _name(pid)) for pid in _children(os.getpid()))
                        if name in ("raylet", "gcs_server")}

    def ended_daemon(self) -> str:
        """The name of a part of Ray without which this node is none, once it has ended; else ""."""
        for pid, name in self.daemons.items():
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    return name
            except ChildProcessError:
                return name
        return ""


class RayWorker(RayNode):
    def main(self) -> int:
        """Join, and stay until the driver has ended. The driver's code. Raises Failure."""
        for number in Child.SIGNALS:
            signal.signal(number, self.heed)
        line = self.connect()
        self.deadline = time.monotonic() + self.patience + 10  # from here on rank 0 counts, and says when it gives up
        line.send({"run": self.run, "rank": self.rank, "at": line.socket.getpeername()[0]})
        while True:
            ended = self.ended_daemon()
            if ended:
                line.send({"lost": "its %s has ended" % ended})
                raise Failure(LOST, "the %s of this pod has ended" % ended)
            for message in line.read(0.2):
                if "end" in message:
                    return int(message["end"])
                if "join" in message:
                    self.join(line, message)
            if line.closed:
                raise Failure(LOST if self.daemons else RAY, "rank 0 is gone")
            if not self.daemons and not self.left():
                raise Failure(RAY, "rank 0 had no cluster to join within %d s" % self.patience)

    def heed(self, number: int, _frame: object) -> None:
        """As a node of the cluster, stay until the driver, which got the same signal, has saved what it wants to."""
        if not self.daemons:
            raise SystemExit(128 + number)

    def join(self, line: Line, message: dict) -> None:
        self.env.update(message["env"])
        try:
            self.start("--address", message["join"], "--node-ip-address",
                       self.own_address(line.socket.getsockname()[0]))
        except Failure as failure:
            line.send({"lost": failure.seen})
            raise
        line.send({"up": True})

    def connect(self) -> Line:
        said = "nothing was tried"
        while self.left():
            try:
                return Line(socket.create_connection((self.address, self.port), timeout=min(10.0, self.left())))
            except OSError as error:  # its pod does not run yet, or its name is not known yet
                said = error.strerror or str(error)
            time.sleep(min(0.5, self.left()))
        raise Failure(RAY, "rank 0 did not answer at %s:%d within %d s: %s"
                      % (self.address, self.port, self.patience, said))


class RayHead(RayNode):
    def main(self) -> int:
        """The whole cluster, from its pods to the driver's exit code. Raises Failure."""
        self.lines: dict[int, Line] = {}  # rank -> its connection
        self.driver: subprocess.Popen | None = None
        self.signalled = False
        for number in Child.SIGNALS:
            signal.signal(number, self.forward)
        code = 128 + signal.SIGTERM
        try:
            self.gather()
            address = self.head()
            self.await_nodes()
            say("rank 0: a Ray cluster of %d nodes is up at %s" % (self.nodes, address))
            code = self.drive()
        except Failure as failure:
            code = failure.code
            raise
        except SystemExit as early:
            code = int(early.args[0])
            raise
        finally:
            for line in self.lines.values():
                line.send({"end": code})
        return code

    def forward(self, number: int, _frame: object) -> None:
        """A signal for all of us goes to the driver; before there is one, this is the end."""
        if self.driver is None:
            raise SystemExit(128 + number)
        self.signalled = True
        self.end_driver(number)

    def gather(self) -> None:
        """Wait until every pod has come."""
        host = self.address if re.fullmatch(r"[0-9.]+", self.address) else ""  # a name may lead elsewhere from here
        try:
            server = socket.create_server((host, self.port))
        except OSError as error:
            raise Failure(RAY, "rank 0 cannot listen at %s:%d: %s" % (host, self.port, error.strerror)) from None
        new: list[Line] = []
        with server:
            while len(self.lines) < self.nodes - 1:
                if not self.left():
                    missing = [str(rank) for rank in range(1, self.nodes) if rank not in self.lines]
                    raise Failure(RAY, "of %d pods, rank %s did not come within %d s"
                                  % (self.nodes, ", ".join(missing), self.patience))
                if select.select([server], [], [], 0.1)[0]:
                    new.append(Line(server.accept()[0]))
                new = [line for line in new if not self.greeted(line)]
                self.lines = {rank: line for rank, line in self.lines.items() if not (line.read(0) or line.closed)}

    def greeted(self, line: Line) -> bool:
        """Whether this connection needs no more looking at: it is one of ours now, or was none."""
        for message in line.read(0):
            rank = message.get("rank")
            if message.get("run") == self.run and isinstance(rank, int) and 0 < rank < self.nodes:
                line.at = str(message.get("at"))
                self.lines[rank] = line
                return True
            line.close()
        return line.closed

    def head(self) -> str:
        """Start Ray's head and tell the others. Its address."""
        if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(self.env):
            self.env.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex()})  # nobody else may join
        self.env["MASTER_PORT"] = str(_free_port())  # the one we had is ours
        at = self.own_address(next(iter(self.lines.values())).at)
        address = "%s:%d" % (at, _free_port())
        self.start("--head", "--node-ip-address", at, "--port", address.rpartition(":")[2],
                   "--temp-dir", ray_folder(self.env, self.run), "--include-dashboard=false",
                   "--ray-client-server-port", str(_free_port()))
        shared = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "MASTER_PORT")
        for line in self.lines.values():
            line.send({"join": address, "env": {name: self.env[name] for name in shared if name in self.env}})
        self.env["RAY_ADDRESS"] = address
        return address

    def await_nodes(self) -> None:
        up: set[int] = set()
        while len(up) < self.nodes - 1:
            if not self.left():
                missing = [str(rank) for rank in sorted(set(self.lines) - up)]
                raise Failure(RAY, "rank %s did not join within %d s" % (", ".join(missing), self.patience))
            for rank, line in self.lines.items():
                for message in line.read(0.05):
                    if "lost" in message:
                        raise Failure(RAY, "rank %d could not join: %s" % (rank, message["lost"]))
                    up.add(rank)
                if line.closed:
                    raise Failure(RAY, "rank %d is gone" % rank)
            self.check_own()

    def drive(self) -> int:
        """Run the recipe as the cluster's driver, and watch the others meanwhile."""
        self.driver = subprocess.Popen(["bash", "-c", self.command], env=self.env, stdin=subprocess.DEVNULL,
                                       start_new_session=True)
        while self.driver.poll() is None:
            try:
                self.check_nodes()
            except Failure:
                self.end_driver(signal.SIGTERM)
                try:
                    self.driver.wait(5)
                except subprocess.TimeoutExpired:
                    self.end_driver(signal.SIGKILL)
                raise
            time.sleep(0.1)
        if self.signalled:  # perhaps just because a node is lost: platforms end the other pods then
            self.check_nodes()
        return self.driver.returncode if self.driver.returncode >= 0 else 128 - self.driver.returncode

    def check_nodes(self) -> None:
        """Raises Failure(LOST) if there is a node less."""
        self.check_own()
        for rank, line in self.lines.items():
            for message in line.read(0):
                raise Failure(LOST, "rank %d: %s" % (rank, message.get("lost")))
            if line.closed:
                raise Failure(LOST, "rank %d is gone" % rank)

    def end_driver(self, number: int) -> None:
        try:
            if self.driver:
                os.killpg(self.driver.pid, number)
        except OSError:  # it has ended
            pass

    def check_own(self) -> None:
        ended = self.ended_daemon()
        if ended:
            raise Failure(LOST, "the %s of rank 0 has ended" % ended)


class Line:
    """A connection that carries one JSON object a line."""

    MOST = 65536  # bytes of a line

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.rest, self.closed, self.at = connection, b"", False, ""
        connection.settimeout(5)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict) -> None:
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:  # read() tells
            pass

    def read(self, wait: float) -> list[dict]:
        """The messages that have come, after at most `wait` seconds; `closed` says that no more will."""
        found: list[dict] = []
        while not self.closed and select.select([self.socket], [], [], 0 if found else wait)[0]:
            try:
                data = self.socket.recv(self.MOST)
            except OSError:
                data = b""
            *whole, self.rest = (self.rest + data).split(b"\n")
            try:
                found += [message for message in map(json.loads, whole) if isinstance(message, dict)]
            except (ValueError, RecursionError):
                data = b""
            if not data or len(self.rest) > self.MOST:
                self.close()
        return found

    def close(self) -> None:
        self.closed = True
        self.socket.close()


def _name(pid: int) -> str:
    try:
        with open("/proc/%d/comm" % pid) as file:
            return file.read().strip()
    except OSError:
        return ""


def ray_folder(env: dict[str, str], run: str) -> str:
    """Where Ray keeps sockets and logs on every node; short, for a socket's path has 107 characters at most."""
    return os.path.join(env.get("RAY_TMPDIR") or "/tmp", "airlift-%s-ray" % run)


def leave_program(places: Places, program: bytes) -> str:
    """This program as a file in the pod's own folder; its path. It may be that very file already."""
    path = os.path.join(places.base, "pod.py")
    with open(path, "wb") as file:
        file.write(program)
    return path


def ray_command(job: dict, places: Places, rank: int, program: bytes) -> str:
    """What bash runs in place of the recipe: this program again, as RayHead or RayWorker."""
    path = leave_program(places, program)
    told = {name: job[name] for name in ("run", "nodes", "command", "patience")}
    words = [sys.executable or "python3", "-I", "-S", path, "ray", json.dumps(dict(told, rank=rank))]
    return " ".join(map(shlex.quote, words))


def ray_main(told: dict) -> int:
    try:
        return (RayWorker if told["rank"] else RayHead)(told).main()
    except Failure as failure:
        return complain(str(told["rank"]), failure)
    except SystemExit as early:
        return int(early.args[0])


# ---------------------------------------------------------------- a Ray cluster of the platform's

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's own: what a driver's ray.init begins with


def cluster_base(run: str) -> str:
    """The same on every node: workers look for the source where the driver has it."""
    return "/tmp/airlift-" + run


class Spread:
    """Puts the source on every node of a Ray cluster that was there before the recipe's driver: at once on those that
    live, later on each that joins.

    A process of its own beside the driver, for it needs the image's Ray. On each node a task that is pinned to it runs
    this program as `place`, at the same path everywhere, with the chunks in its environment; what it answers must be
    the digest that was sent. Workers find the source by Ray's own job configuration, not by a runtime_env. On a node
    that joins later a task of the recipe can come a moment before the source does, and then cannot import it: Ray has
    nothing to hold it back with but a runtime_env.
    """

    def __init__(self, told: dict) -> None:
        self.told: dict = told
        self.served: set[str] = set()
        self.ended = False
        with open(told["program"], "rb") as file:
            self.program = file.read()
        self.chunks = {name: value for name, value in os.environ.items() if name.startswith("AIRLIFT_")}

    def main(self) -> int:
        import ray

        ray.init(log_to_driver=False, logging_level=logging.ERROR, namespace="airlift-" + self.told["run"])
        signal.signal(signal.SIGTERM, self.end)  # Ray's own handler writes a page about it
        self.ray, self.sent = ray, ray.put(self.chunks)
        deadline = time.monotonic() + self.told["patience"]
        while len(self.living()) < self.told["nodes"]:
            if time.monotonic() > deadline:
                raise Failure(RAY, "%d of %d nodes are there after %d s"
                              % (len(self.living()), self.told["nodes"], self.told["patience"]))
            time.sleep(0.5)
        self.serve()
        say("all nodes have the source")
        while not self.ended:
            time.sleep(0.2)
            try:
                self.serve()
            except Failure as failure:
                complain("0", failure)
        if self.told["stays"]:
            self.clean()
        return 0

    def end(self, _number: int, _frame: object) -> None:
        self.ended = True

    def clean(self) -> None:
        """A cluster that goes on keeps nothing of this run."""
        def remove(base: str) -> None:
            import shutil

            shutil.rmtree(base, ignore_errors=True)

        tasks = [self.pinned(remove, node).remote(self.told["base"]) for node in self.living()]
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
                words = ["place", self.told["base"]] + ([] if node == here else ["setup"])
                task = self.pinned(place, node).remote(self.program, self.sent, self.told["run"], words)
                new.append((address, task))
        for address, answer in new:
            try:
                code, said = self.ray.get(answer, timeout=self.told["patience"])
            except Exception as error:  # Ray's own: the node is gone, say
                raise Failure(RAY, "node %s: %s" % (address, str(error).splitlines()[0])) from None
            if code or "airlift: sha256 %s in " % self.told["sha256"] not in said:
                for line in said.splitlines():
                    say("node %s: %s" % (address, line))
                raise Failure(code if code in FAILURES else PLACE, "node %s ended with exit code %d" % (address, code))
            say("node %s has sha256 %s in %s" % (address, self.told["sha256"], self.told["base"]))


def place_main(base: str, setup: bool) -> int:
    """Put the source on this node, and run the startup commands here too."""
    env = dict(os.environ)
    try:
        job, tar = read_payload(env)
        places = Places(job, env, base)
        put(tar, job, places, env, 0)
        say("sha256 %s in %s" % (hashlib.sha256(tar).hexdigest(), base))
        if setup and (job["setup"] or job.get("clones")):
            _, ready = os.pipe()
            script = script_for(dict(job, command="true", tool=""), places.code, ready)
            return Child().run(script, recipe_env(env, dict(job, nodes=1), places, 0), None, ready)
        return 0
    except Failure as failure:
        return complain("?", failure)


def spread(env: dict[str, str], job: dict, places: Places) -> None:
    """Start Spread and wait for all nodes to have the source; it goes on. Raises Failure with its code."""
    path = leave_program(places, own_source(env))
    told = {"run": job["run"], "sha256": job["tree"]["sha256"], "nodes": job["on_cluster"], "patience": job["patience"],
            "base": places.base, "program": path, "stays": job["stays"]}
    process = subprocess.Popen([sys.executable or "python3", path, "spread", json.dumps(told)], env=env,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout
    for line in iter(process.stdout.readline, b""):
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
        if line == b"airlift: all nodes have the source\n":
            threading.Thread(target=copy_output, args=(process.stdout, None), daemon=True).start()
            return
    code = process.wait()
    raise Failure(code if code in FAILURES else RAY, "see the lines above")


def spread_main(told: dict) -> int:
    try:
        return Spread(told).main()
    except Failure as failure:
        what = FAILURES[failure.code][0]
        say("%s: %s" % (what, failure.seen))
        return failure.code


def driver_env(env: dict[str, str], result: dict[str, str], code: str) -> dict[str, str]:
    """The environment of a driver on a cluster whose raylets have our chunks: empty values in their place, so that a
    driver that hands its whole environment to ray.init masks them; the source on the workers' sys.path."""
    try:
        config = json.loads(env.get(RAY_JOB) or "{}")
    except ValueError:
        config = {}
    config["py_driver_sys_path"] = [*(config.get("py_driver_sys_path") or []), os.path.join(code, "src")]
    masks = {name: "" for name in env if name.startswith("AIRLIFT_")}
    return dict(masks, **dict(result, **{RAY_JOB: json.dumps(config)}))


# ---------------------------------------------------------------- main


def complain(rank: str, failure: Failure) -> int:
    what, fix = FAILURES[failure.code]
    say("rank %s: %s: %s" % (rank, what, failure.seen))
    say("what to do: " + fix)
    return failure.code


def main() -> int:
    if sys.argv[1:2] == ["ray"]:
        return ray_main(json.loads(sys.argv[2]))
    if sys.argv[1:2] == ["spread"]:
        return spread_main(json.loads(sys.argv[2]))
    if sys.argv[1:2] == ["place"]:
        return place_main(sys.argv[2], "setup" in sys.argv[3:])
    child = Child()
    env = dict(os.environ)
    rank_text, shared, own = "?", None, ""
    try:
        if sys.version_info < (3, 8):
            raise Failure(PYTHON, "python3 is %d.%d; 3.8 is the oldest that works" % sys.version_info[:2])
        driver = sys.argv[1:2] == ["driver"]  # of a Ray cluster that the platform has made
        manifest = "" if driver else "".join(sys.argv[1:2])  # on Slurm: the tree has come by itself, and lies beside it
        if sys.argv[2:]:
            env.update(read_chunks(sys.argv[2]))
        job: dict = read_manifest(manifest) if manifest else {"nodes": nodes_sent(env)}
        rank = 0 if driver else find_rank(env, socket.gethostname(), job["nodes"])
        rank_text = str(rank)
        if manifest:
            places = settle(manifest, job, env)
            own = places.base
        else:
            job, tar = read_payload(env)
            if driver:
                job = dict(job, nodes=1, on_cluster=job["nodes"], stays=bool(sys.argv[2:]))
            places = Places(job, env, cluster_base(job["run"]) if driver else "")
            shared = put(tar, job, places, env, rank)
        said = rank, job["nodes"], job["tree"]["sha256"], job["tree"]["files"], places.code
        # The launcher tells one start from the next by this.
        begun = ", begun %s.%03d" % (time.strftime("%H:%M:%S"), time.time() % 1 * 1000) if job.get("retries") else ""
        say("rank %d of %d, sha256 %s, %d files in %s" % said + begun)
        code = start(child, env, job, places, rank)
    except Failure as failure:
        code = complain(rank_text, failure)
    except SystemExit as early:
        say("rank %s: ended by a signal before the recipe was started" % rank_text)
        code = int(early.args[0])
    except Exception:
        import traceback

        say(traceback.format_exc(), 2)
        say("rank %s: %s" % (rank_text, FAILURES[INTERNAL][0]))
        code = INTERNAL
    finally:
        if shared:
            shared.release()
        if own:
            shutil.rmtree(own, ignore_errors=True)
    say("rank %s ended with exit code %d" % (rank_text, code))  # the launcher looks for this line in the logs
    return code


def own_source(env: dict[str, str]) -> bytes:
    """This program's text: a file on Slurm, else a stream."""
    if "__file__" in globals():
        with open(__file__, "rb") as file:
            return file.read()
    return zlib.decompress(join(env, "POD"))


def read_payload(env: dict[str, str]) -> tuple[dict, bytes]:
    """The job's description and the tar, both whole. Raises Failure."""
    job = read_job(env)
    tar = decompress(join(env, "TREE"), job["tree"]["compression"])
    digest = hashlib.sha256(tar).hexdigest()
    if digest != job["tree"]["sha256"]:
        raise Failure(PAYLOAD, "the tree's digest is %s, not %s" % (digest, job["tree"]["sha256"]))
    return job, tar


def read_chunks(path: str) -> dict[str, str]:
    """The chunks from a file, where no environment carries them."""
    try:
        with open(path, encoding="utf-8") as file:
            return {name: value for name, value in json.load(file).items() if name.startswith("AIRLIFT_")}
    except (OSError, ValueError, AttributeError) as error:
        raise Failure(PAYLOAD, "%s cannot be read: %s" % (path, error)) from None


def nodes_sent(env: dict[str, str]) -> int:
    """The number of pods. Raises Failure where pod.py itself (what runs here is whole, but its chunks' names and number
    are to be right as well) or that number did not arrive."""
    join(env, "POD")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", env.get("AIRLIFT_NODES", "")):
        raise Failure(PAYLOAD, "AIRLIFT_NODES is %r" % env.get("AIRLIFT_NODES", "")[:40])
    return int(env["AIRLIFT_NODES"])


def _place(tar: bytes, job: dict, places: Places, env: dict[str, str], rank: int) -> Shared | None:
    """Tree and config in place; the use of a shared tree is to be released at the end. Raises Failure, OSError."""
    shared = Shared(job, env, rank, tar) if job.get("unpack") == "shared" else None
    try:
        places.make(job.get("folders", []))
        if shared:
            places.code = shared.find()
        else:
            unpack(tar, places.code)
        places.write_config(job["config"])
        return shared
    except BaseException as error:
        if shared:
            shared.leave(error)
        raise


def put(tar: bytes, job: dict, places: Places, env: dict[str, str], rank: int) -> Shared | None:
    """As _place, with the system's errors in our words. Raises Failure(PLACE or WAIT)."""
    try:
        return _place(tar, job, places, env, rank)
    except OSError as error:
        full = " (the disk is full)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        place = error.filename or (job["shared"] if job.get("unpack") == "shared" else places.base)
        raise Failure(PLACE, "%s: %s%s" % (place, error.strerror, full)) from None
    except UnicodeEncodeError:
        raise Failure(PLACE, "%s is not UTF-8, so no config can name it" % places.base) from None


def start(child: Child, env: dict[str, str], job: dict, places: Places, rank: int) -> int:
    """Run the recipe to its end and return its code; with a workspace, keep log and code under the run's folder."""
    workdir = os.path.join(places.code, places.fill(job["workdir"])) if job.get("workdir") else places.code
    if not os.path.isdir(workdir):
        raise Failure(TOOL, "there is no folder %s, where the recipe is to be started" % workdir)
    for name in [name for name in os.environ if name.startswith("AIRLIFT_")]:
        del os.environ[name]
    log = os.path.join(places.logs, "rank-%d.log" % rank) if places.keeps else None
    keep_code(log, None)
    if forms_cluster(job):
        job = dict(job, command=ray_command(job, places, rank, own_source(env)))
    begun, low = os.pipe()
    ready = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 100)  # startup commands may use the low numbers for their own
    os.close(low)
    if job.get("on_cluster"):
        spread(env, job, places)
    code = child.run(script_for(job, workdir, ready), recipe_env(env, job, places, rank), log, ready)
    if forms_cluster(job):
        shutil.rmtree(ray_folder(dict(env, **job["env"]), job["run"]), ignore_errors=True)
    os.set_blocking(begun, False)
    try:
        ran = bool(os.read(begun, 1))
    except BlockingIOError:
        ran = False
    os.close(begun)
    if not ran:
        code = 128 + child.signal if child.signal else code if code in (TOOL, CLONE) else SETUP
    keep_code(log, code)
    if not ran and not child.signal:
        raise Failure(code, "see the lines above")
    return code


def keep_code(log: str | None, code: int | None) -> None:
    """Write the exit code beside the log, if there is one; None: remove that of an earlier start of this pod."""
    if not log:
        return
    path = log[:-len("log")] + "exit"
    try:
        if code is not None:
            with open(path, "w") as file:
                file.write("%d\n" % code)
        elif os.path.exists(path):
            os.unlink(path)
    except OSError as error:
        say("the exit code cannot be kept in %s: %s" % (path, error.strerror))


if __name__ == "__main__":
    os._exit(main())  # not sys.exit: a thread that still waits for output must not hold the pod
