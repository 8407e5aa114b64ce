"""Storms on the pod's shared unpack: pods as real processes that are killed, starved, lied to and started again.

    python -m tests.chaos --kills 5000 --pods 32 --seed 7

A pod here is a fork that calls Places.put with a SharedTree, reads its tree for a while as a recipe would, and gives it up. Faults stand
between it and the file system: SIGKILL before, after or in the middle of the k-th call, a quota that fails a
rename, a rename that is carried out and answered ENOENT, a listing that is out of date. Others kill from outside, at
any time. Meanwhile an observer reads whatever is published and never stops.

What must hold at every moment is in `Storm.check` and `looked`; a breach is a line of text in `violations`.
"""

import argparse
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transport
from pod import failures, payload, places, shared
from pod.shared import SharedTree
from transport import Entry, Tree

NAME = re.compile(r"[0-9]{6,18}-([0-9a-f]{64})\.[0-9a-f]{8}")
PROGRESS = 5_000  # kills between two lines of progress
REAL_OPEN, REAL_RENAME, REAL_LISTDIR = open, os.rename, os.listdir


# ---------------------------------------------------------------- launches


@dataclass(frozen=True)
class Source:
    """A small tree: its tar, its digest, and what its files hold."""

    tar: bytes
    digest: str
    files: dict[str, bytes]


def source(number: int) -> Source:
    files = {"src/pkg/train.py": b"number = %d\n" % number * 40, "src/pkg/__init__.py": b"",
             "src/pkg/recipes/a.yaml": b"a: %d\n" % number, "src/deep/er/still/x.bin": bytes(range(256)) * 8}
    tar = transport.pack(Tree(tuple(Entry(path, data) for path, data in sorted(files.items()))))
    return Source(tar, hashlib.sha256(tar).hexdigest(), files)


@dataclass
class Pod:
    """What one process is to do. `plan` is the faults it meets."""

    run: str
    source: Source
    attempt: int = 0
    rank: int = 0
    keep: int = 1
    patience: float = 20.0
    hold: float = 0.05
    uid: int = 0
    top: str = ""  # the shared folder as this pod sees it, where that is not the ground's own
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "%s-%d" % (self.run, self.attempt)


# ---------------------------------------------------------------- faults


class Faults:
    """Stands between pod/ and the file system, in a process of its own.

    kill: (k, "before" | "after" | "half") of the k-th call. quota: renames into trees/ (`where`: or another folder)
    fail with EDQUOT and these words. lost: so many renames are carried out and answered ENOENT. stale: so many
    listings of each folder are answered as the first was. full: from the k-th call on, nothing can be made or
    written. slow: seconds before each call.
    """

    CALLS = ("mkdir", "rename", "unlink", "rmdir", "listdir", "open", "utime", "chmod", "symlink", "scandir", "lstat")

    def __init__(self, top: str, plan: dict[str, Any]) -> None:
        self.top, self.plan, self.calls, self.armed = top, dict(plan), 0, True
        self.kill = tuple(plan.get("kill", (0, "")))
        self.lists: dict[str, tuple[int, list[str]]] = {}
        for call in self.CALLS:
            setattr(os, call, self.wrapped(call, getattr(os, call)))
        for module in (payload, places, shared):
            module.open = self.opened  # type: ignore[attr-defined]

    def wrapped(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **options: Any) -> Any:
            if not self.armed:
                return real(*args, **options)
            self.point("before")
            if call in ("mkdir", "symlink") or (call == "open" and args[1] & os.O_CREAT):
                self.space(args[0])
            answer = getattr(self, call, real)(*args, **options)
            self.point("after")
            return answer

        return instead

    def point(self, when: str) -> None:
        self.calls += when == "before"
        if when == "before" and self.plan.get("slow"):
            time.sleep(self.plan["slow"])
        if self.kill == (self.calls, when):
            os.kill(os.getpid(), signal.SIGKILL)

    def space(self, path: Any) -> None:
        if 0 < self.plan.get("full", 0) <= self.calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def rename(self, old: Any, new: Any, **options: Any) -> None:
        if "quota" in self.plan and str(new).startswith(os.path.join(self.top, self.plan.get("where", "trees"))):
            raise OSError(errno.EDQUOT, self.plan["quota"], new)
        REAL_RENAME(old, new, **options)
        if self.plan.get("lost", 0) > 0 and str(new).startswith(self.top):
            self.plan["lost"] -= 1
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), old)

    def listdir(self, path: Any) -> list[str]:
        answer = REAL_LISTDIR(path)
        count, old = self.lists.setdefault(str(path), (0, answer))
        self.lists[str(path)] = count + 1, old
        return old if count < self.plan.get("stale", 0) else answer

    def opened(self, *args: Any, **options: Any) -> Any:
        if not self.armed:
            return REAL_OPEN(*args, **options)
        self.point("before")
        file = Slow(REAL_OPEN(*args, **options), self)
        self.point("after")
        return file


class Slow:
    """A file whose writes are two writes, with a place to be killed between them."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self.file, self.faults = file, faults

    def __enter__(self) -> "Slow":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> None:
        self.faults.point("before")
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.faults.space(self.file.name)
        self.faults.point("half")
        self.file.write(data[len(data) // 2 :])
        self.file.flush()
        self.faults.point("after")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


# ---------------------------------------------------------------- one process


class Ground:
    """The folder of a test: `top` is the shared one, the rest is the tests' own memory."""

    def __init__(self, place: str | Path, sources: list[Source], top: str | Path | None = None) -> None:
        self.place = str(place)
        self.top = str(top or os.path.join(self.place, "shared"))
        self.sources = {source.digest: source for source in sources}
        for folder in ("spoiled", "spoilt", "strayed", "planted", "scratch"):
            os.makedirs(os.path.join(self.place, folder), exist_ok=True)
        self.book = os.path.join(self.place, "book")
        self.ended: dict[int, dict[str, Any]] = {}  # what each wrote at its end, by process id
        self.read = self.started = 0

    def path(self, *parts: str) -> str:
        return os.path.join(self.top, *parts)

    def note(self, folder: str, name: str) -> None:
        with REAL_OPEN(os.path.join(self.place, folder, name), "w") as file:
            file.write(repr(time.monotonic()))

    def noted(self, folder: str, name: str, before: float = float("inf")) -> bool:
        try:
            with REAL_OPEN(os.path.join(self.place, folder, name)) as file:
                return float(file.read() or "inf") <= before
        except FileNotFoundError:
            return False

    def write(self, entry: dict[str, Any]) -> None:
        descriptor = os.open(self.book, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.write(descriptor, (json.dumps(entry) + "\n").encode())
        os.close(descriptor)

    def entries(self) -> list[dict[str, Any]]:
        """What has been written since it was last asked."""
        with contextlib.suppress(FileNotFoundError), REAL_OPEN(self.book, "rb") as file:
            file.seek(self.read)
            lines, end, _ = file.read().rpartition(b"\n")  # the last one may be half there
            self.read += len(lines + end)
            return [json.loads(line) for line in lines.splitlines()]
        return []

    def published(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(name for name in REAL_LISTDIR(self.path("trees")) if NAME.fullmatch(name))
        return []

    def start(self, wanted: Pod) -> int:
        """The pod's process id."""
        self.started += 1
        scratch = os.path.join(self.place, "scratch", str(self.started))
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(self.live(wanted, scratch))
            except BaseException as error:
                self.write({"violations": ["%r of %s rank %d" % (error, wanted.name, wanted.rank)]})
                os._exit(99)
        return pid

    def finish(self, pid: int) -> int:
        """Wait for its end; the exit code as a shell gives it."""
        status = os.waitpid(pid, 0)[1]
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)

    def run(self, wanted: Pod) -> int:
        return self.finish(self.start(wanted))

    def live(self, wanted: Pod, scratch: str) -> int:
        top = wanted.top or self.top
        job = {"run": wanted.run, "shared": top, "keep": wanted.keep, "patience": wanted.patience, "config": "",
               "unpack": "shared", "tree": {"sha256": wanted.source.digest}}
        env = {"AIRLIFT_TREE_CHUNKS": "3", "LEPTON_JOB_FAILURE_COUNT": str(wanted.attempt), "TMPDIR": scratch}
        signal.signal(signal.SIGUSR1, lambda number, frame: setattr(wanted, "hold", 0))  # come to an end
        if wanted.uid:
            os.makedirs(scratch)
            os.chown(scratch, wanted.uid, wanted.uid)
            os.setgid(wanted.uid)
            os.setuid(wanted.uid)
        entry: dict[str, Any] = {"name": wanted.name, "rank": wanted.rank, "pid": os.getpid(), "code": 0, "seen": "",
                                 "patience": wanted.patience, "faulty": bool({"quota", "full"} & set(wanted.plan))}
        faults = Faults(top, wanted.plan)
        at, tree = places.Places(job, env), SharedTree(job, env, wanted.rank, wanted.source.tar)
        begin = time.monotonic()
        try:
            at.put(wanted.source.tar, job, tree)
        except failures.Failure as failure:
            entry |= {"code": failure.code, "seen": failure.seen}
        faults.armed = False
        entry |= {"begin": begin, "waited": time.monotonic() - begin, "calls": faults.calls}
        if entry["code"] == 0:
            entry |= {"path": at.code} | self.use(wanted, at.code, begin)
            tree.release()
        self.write(entry)
        return int(entry["code"])

    def use(self, wanted: Pod, code: str, begin: float) -> dict[str, Any]:
        """Read the tree as long as the pod is to live: it must be whole and stay as it is."""
        name = os.path.basename(os.path.dirname(code))
        found, looks, start = [], 0, time.monotonic()
        if self.noted("spoilt", name, begin):
            found.append("rank %d of %s uses %s, which was spoilt before" % (wanted.rank, wanted.name, name))
        if wanted.rank == 0 and self.noted("strayed", name, begin):
            found.append("rank 0 of %s uses %s, which holds more than was sent" % (wanted.name, name))
        while not found:
            wrong = whole(code, wanted.source)
            if wrong and not self.noted("spoiled", name):
                found.append("rank %d of %s holds %s, but %s" % (wanted.rank, wanted.name, name, wrong))
            looks += 1
            if time.monotonic() > start + wanted.hold:
                break
            time.sleep(0.01)
        return {"looks": looks, "violations": found}


def whole(code: str, wanted: Source) -> str:
    """What is wrong with a tree, read without the help of pod/."""
    for path, data in wanted.files.items():
        try:
            descriptor = os.open(os.path.join(code, path), os.O_RDONLY | os.O_NONBLOCK)  # it may be a FIFO by now
            try:
                with os.fdopen(descriptor, "rb", closefd=False) as file:  # or a folder, which this refuses
                    if file.read() != data:
                        return path + " differs"
            finally:
                os.close(descriptor)
        except OSError as error:
            return "%s: %s" % (path, error.strerror)
    return ""


def looked(ground: Ground) -> list[str]:
    """What is wrong with what is published: a name is absent, or its tree is complete."""
    found = []
    for name in ground.published():
        wanted = ground.sources.get(name.partition("-")[2].partition(".")[0])
        if wanted is None or ground.noted("planted", name):
            continue
        wrong = whole(ground.path("trees", name, "code"), wanted)
        if wrong and os.path.lexists(ground.path("trees", name)) and not ground.noted("spoiled", name):
            found.append("%s is published, but %s" % (name, wrong))
    return found


# ---------------------------------------------------------------- misfortune


WAYS = ("flip", "miss", "cut", "folder", "fifo")


def spoil(ground: Ground, dice: random.Random, name: str, how: str = "") -> None:
    """Damage a published tree."""
    ground.note("spoiled", name)
    file = Path(ground.path("trees", name, "code", dice.choice(sorted(next(iter(ground.sources.values())).files))))
    how = how or dice.choice(WAYS)
    try:
        data = bytearray(file.read_bytes() if file.is_file() else b"")  # it may be a FIFO by now
        if how == "flip" and data:
            data[dice.randrange(len(data))] ^= 1
            file.write_bytes(bytes(data))
        elif how == "cut" and data:
            file.write_bytes(bytes(data[:-1]))
        else:
            file.unlink()
            if how == "folder":
                file.mkdir()
            elif how == "fifo":
                os.mkfifo(file)
        ground.note("spoilt", name)
    except OSError:  # it has just been swept
        pass


def stray(ground: Ground, name: str) -> None:
    """Put something into a published tree that was not sent."""
    with contextlib.suppress(OSError):
        Path(ground.path("trees", name, "code/src/json.py")).write_text("raise SystemExit('not the real one')\n")
        ground.note("strayed", name)


def plant(ground: Ground, dice: random.Random, digest: str, number: int) -> None:
    """Put something foreign where a tree could be."""
    name = "%06d-%s.%08x" % (number, digest, dice.getrandbits(32))
    ground.note("planted", name)
    path = Path(ground.path("trees", name))
    with contextlib.suppress(OSError):
        how = dice.choice(["file", "empty", "folder", "like", "link"])
        if how == "file":
            path.write_text("mine")
        elif how == "link":
            path.symlink_to("/nowhere")
        else:
            path.mkdir(parents=True)
            if how == "folder":
                (path / "mine").write_text("mine")
            if how == "like":  # as if published, and swept by half
                (path / "code").mkdir()


# ---------------------------------------------------------------- storm


@dataclass
class Storm:
    """Many pods of several launches and attempts on one folder, until so many have been killed."""

    ground: Ground
    kills: int
    pods: int
    seed: int
    patience: float = 1.0
    slack: float = 5.0  # seconds a waiter may take beyond its deadline on a machine with far more pods than cores
    tops: list[str] = field(default_factory=list)
    calls: int = 130  # file-system calls among which a killed pod dies; a pod makes some 60, more when it sweeps

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.alive: dict[int, tuple[Pod, float]] = {}  # pid -> what it is, when it must be gone at the latest
        self.doom: dict[int, float] = {}  # pid -> when it is killed from outside
        self.launches: list[Pod] = []
        self.may_fail: set[str] = set()  # attempts of which a rank 0 had a reason to fail
        self.figures: Counter[str] = Counter()
        self.violations: list[str] = []
        self.longest = -self.patience
        self.sources = list(self.ground.sources.values())
        self.number = 0

    def launch(self) -> Pod:
        self.number += 1
        return Pod("r%05d" % self.number, self.dice.choice(self.sources), keep=self.dice.choice([0, 1, 1, 2]),
                   patience=self.patience)

    def rage(self) -> None:
        """Until so many have been killed; then all that still live come to their end."""
        observer = self.observe()
        self.launches = [self.launch() for _ in range(6)]
        began, told = (look := time.monotonic()), 0
        try:
            while self.figures["kills"] < self.kills:
                while len(self.alive) < self.pods:
                    self.spawn()
                    if self.dice.random() < 0.15:
                        self.misfortune()
                self.step()
                if time.monotonic() > look:
                    look = time.monotonic() + 0.5
                    self.check()
                    if self.figures["kills"] // PROGRESS > told:
                        told = self.figures["kills"] // PROGRESS
                        print("%d of %d kills after %d s" % (self.figures["kills"], self.kills, look - began),
                              file=sys.stderr, flush=True)
                    if self.violations:
                        break
            while self.alive:
                self.step()
        finally:
            for pid in [*self.alive, observer]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self.check()
        self.figures["seconds"] = int(time.monotonic() - began)

    def observe(self) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                looks = 0
                while True:
                    found = looked(self.ground)
                    looks += 1
                    if found or looks % 50 == 0:
                        self.ground.write({"observed": 0 if looks % 50 else 50, "violations": found})
                    time.sleep(0.002)
            finally:
                os._exit(99)
        return pid

    def spawn(self) -> None:
        dice = self.dice
        at = dice.randrange(len(self.launches))
        if dice.random() < 0.04:
            self.launches[at] = self.launch()
        elif dice.random() < 0.05:
            self.launches[at].attempt += 1
        launch = self.launches[at]
        attempt = max(0, launch.attempt - (dice.random() < 0.1))  # sometimes one that was cut off, and lives on
        rank = 0 if dice.random() < 0.45 else dice.randrange(1, 8)
        plan: dict[str, Any] = {}
        chance = dice.random()
        if chance < 0.5:
            plan["kill"] = dice.randrange(1, self.calls), dice.choice(["before", "after", "half"])
        chance = dice.random()
        if chance < 0.06:
            plan["quota"] = "no quota for " + launch.name
        elif chance < 0.16:
            plan["lost"] = dice.choice([1, 2, 99])
        elif chance < 0.26:
            plan["stale"] = dice.choice([1, 3, 9])
        elif chance < 0.30:
            plan["full"] = dice.randrange(1, self.calls)
        elif chance < 0.40:
            plan["slow"] = dice.choice([0.001, 0.01])
        wanted = Pod(launch.run, launch.source, attempt, rank, launch.keep, self.patience,
                     dice.choice([0, 0.02, 0.1, 0.5]), 0, dice.choice(self.tops or [""]), plan)
        if rank == 0 and ("quota" in plan or "full" in plan):
            self.may_fail.add(wanted.name)
        now = time.monotonic()
        pid = self.ground.start(wanted)
        self.figures["runs"] += 1
        # the last of a slow pod's calls may come after its deadline
        self.alive[pid] = wanted, now + self.patience + wanted.hold + self.slack + plan.get("slow", 0) * 3000
        if dice.random() < 0.35:
            self.doom[pid] = now + dice.choice([0.005, 0.02, 0.1, 0.5, 1]) * dice.random()

    def misfortune(self) -> None:
        there = self.ground.published()
        chance = self.dice.random()
        if chance < 0.5 and there:
            spoil(self.ground, self.dice, self.dice.choice(there))
            self.figures["spoilt"] += 1
        elif chance < 0.75 and there:
            stray(self.ground, self.dice.choice(there))
            self.figures["strays"] += 1
        elif chance < 0.9:
            newest = int(there[-1][:6]) if there else 0
            plant(self.ground, self.dice, self.dice.choice(self.sources).digest,
                  max(1, newest + self.dice.randrange(-2, 3)))
            self.figures["planted"] += 1

    def step(self) -> None:
        now = time.monotonic()
        for pid in [pid for pid, moment in self.doom.items() if moment < now]:
            del self.doom[pid]
            os.kill(pid, signal.SIGKILL)  # ours, and not yet waited for
        ended = [(pid, status) for pid, status in (os.waitpid(pid, os.WNOHANG) for pid in list(self.alive)) if pid]
        for pid, status in ended:
            self.alive.pop(pid)
            self.doom.pop(pid, None)
            code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
            self.figures["kills" if code == 137 else "code %d" % code] += 1
        for pid, (wanted, latest) in list(self.alive.items()):
            if now > latest:
                self.violations.append("rank %d of %s outlives its deadline" % (wanted.rank, wanted.name))
                os.kill(pid, signal.SIGKILL)
                self.alive[pid] = wanted, float("inf")
        if not ended:
            time.sleep(0.002)

    def check(self) -> None:
        """What each pod wrote into the book, against what it may have met."""
        for entry in self.ground.entries():
            self.violations += entry.get("violations", [])
            self.figures["looks of the observer"] += entry.get("observed", 0)
            self.figures["looks of readers"] += entry.get("looks", 0)
            if "code" not in entry:
                continue
            who = "rank %(rank)d of %(name)s ends with %(code)d after %(waited).2f s: %(seen)s" % entry
            over = entry["waited"] - entry["patience"]
            if entry["rank"]:
                self.longest = max(self.longest, over)
            if entry["rank"] and over > self.slack:
                self.violations.append("too late: " + who)
            if entry["code"] not in (0, failures.PLACE, failures.WAIT) or (entry["code"] and not entry["seen"]):
                self.violations.append("no failure of ours: " + who)
            if entry["code"] == failures.PLACE and not entry["faulty"]:
                self.violations.append("no reason to fail: " + who)
            if entry["code"] == failures.WAIT and (entry["rank"] == 0 or (
                    entry["name"] not in self.may_fail if entry["seen"].startswith("rank 0 says") else over < 0)):
                self.violations.append("no reason to stop: " + who)
            if entry["seen"].startswith("rank 0 says"):
                self.figures["stopped at once"] += 1
        self.violations += looked(self.ground)


def aftermath(ground: Ground, clean: Pod, tops: list[str] | None = None) -> list[str]:
    """After a storm: a clean start succeeds, and what is left is what the docstring of pod/shared.py admits."""
    found = []
    pids = [ground.start(Pod(clean.run, clean.source, rank=rank, keep=1, hold=0.02,
                             top=tops[rank % len(tops)] if tops else "")) for rank in range(4)]
    codes = [ground.finish(pid) for pid in pids]
    entries = [entry for entry in ground.entries() if entry.get("name") == clean.name]
    if codes != [0] * 4 or len({entry["path"].split("/")[-2] for entry in entries}) != 1:
        found.append("a clean start fails: %s %s" % (codes, entries))
    ground.run(Pod(clean.run + "x", source(99), keep=1, hold=0))  # its sweep finds what the first one has left
    for entry in entries + ground.entries():
        found += entry.get("violations", [])
    for folder, limit in (("private", SharedTree.LEFT), ("failed", SharedTree.LEFT), ("swept", 0)):
        left = REAL_LISTDIR(ground.path(folder))
        if len(left) > limit:
            found.append("%d things stay in %s: %s" % (len(left), folder, left[:3]))
    for name in ground.published()[:-1]:
        uses = ground.path("trees", name, "uses")
        if not ground.noted("planted", name) and not (os.path.isdir(uses) and REAL_LISTDIR(uses)):
            found.append("%s stays, and nobody uses it" % name)
    return found + looked(ground)


def storm(place: str | Path, options: argparse.Namespace, top: str = "", tops: list[str] | None = None
          ) -> tuple[dict[str, Any], list[str]]:
    """(figures, violations). `tops` are ways to see the folder `top`, one of which each pod uses."""
    ground = Ground(place, [source(number) for number in range(8)], top)
    raging = Storm(ground, options.kills, options.pods, options.seed, options.patience, options.slack, tops or [])
    raging.rage()
    found = raging.violations + aftermath(ground, Pod("clean", source(0)), tops)
    return dict(sorted(raging.figures.items())) | {"longest wait beyond the deadline": round(raging.longest, 2)}, found


# ---------------------------------------------------------------- flaws that a storm must find


def _published_at_once(self: SharedTree) -> str:
    self.used = "%06d-%s.%s" % (self.next_number(), self.digest, os.urandom(4).hex())
    for folder in ("uses", "told", "code"):
        os.makedirs(self.path("trees", self.used, folder))
    self.write(self.path("trees", self.used))
    return self.used


def _taken_unseen(self: SharedTree, name: str) -> bool:
    self.release()
    self.used = name
    return self.mark(self.path("trees", name, "uses", self.use))


def _taken_without_use(self: SharedTree, name: str) -> bool:
    return payload.holds(self.path("trees", name, "code"), self.tar)


def _waited_for_ever(self: SharedTree) -> str:
    while True:
        for name in filter(self.told, self.ours()):
            if self.take(name):
                return name
        time.sleep(0.05)


FLAWS: dict[str, dict[str, Any]] = {
    "sweeps what is in use": {"retire": lambda self, name: self.discard("trees", name)},
    "publishes before it is whole": {"publish": _published_at_once},
    "does not verify": {"take": _taken_unseen},
    "does not note its use": {"take": _taken_without_use},
    "lets two that are the same rank share a use": {
        "use": property(lambda self: "%s.%d" % (self.attempt, self.rank), lambda self, name: None)},
    "deletes in place": {"discard": lambda self, folder, name, ours=False: shutil.rmtree(
        self.path(folder, name), ignore_errors=True)},
    "waits for ever": {"wait": _waited_for_ever},
    "stops for another attempt's failure": {
        "failures": lambda self: [name for name in self.listed("failed") if self.rank or self.attempt in name]},
    "minds no strays": {"offer": lambda self, name: self.take(name) and self.mark(
        self.path("trees", name, "told", self.ready))},
    "gives up when a rename is answered late": {"offer": lambda self, name: False},
}


# ---------------------------------------------------------------- every call


SCENES = ("publish", "restart", "reuse", "respoilt", "sweep", "wait")


def scene(ground: Ground, name: str) -> Pod:
    """Set the stage for a pod that will be killed; returns the pod."""
    first, second, third = list(ground.sources.values())[:3]
    victim = Pod("b" if name in ("publish", "reuse", "sweep") else "a", first, rank=int(name == "wait"))
    if name != "publish":
        assert ground.run(Pod("a", first, hold=0)) == 0
    if name == "respoilt":
        spoil(ground, random.Random(1), ground.published()[0])
    if name == "sweep":
        for run, tree in (("c", second), ("d", third)):
            assert ground.run(Pod(run, tree, keep=9, hold=0)) == 0
        spoil(ground, random.Random(1), ground.published()[0])
        assert ground.run(Pod("e", second, plan={"kill": (40, "after")})) in (0, 137)  # leaves a use, or a folder
        os.rmdir(ground.path("trees", ground.published()[-1], "uses"))  # a sweeper was killed here
        os.makedirs(ground.path("swept", "old", "code"), exist_ok=True)
    return victim


def die_everywhere(place: str | Path, name: str, every: int = 1, offset: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Kill the scene's pod at each of its calls, in each of three ways; yields (where, violations) of each kill.

    After each kill: what is published is complete; the same attempt starts again and succeeds, with a waiter; another
    launch sweeps; and nothing of the dead pod stays but what is admitted.
    """
    sources = [source(number) for number in range(3)]
    point = offset
    while True:
        at, when = 1 + point // 3, ("before", "half", "after")[point % 3]
        point += every
        room = os.path.join(place, "%s-%d-%s" % (name, at, when))
        ground = Ground(room, sources)
        victim = scene(ground, name)
        victim.plan = {"kill": (at, when)}
        code = ground.run(victim)
        entries = ground.entries()
        if code == 137:
            found = looked(ground)
            again = [ground.start(Pod("a" if victim.run == "a" else "b", sources[0], rank=rank, hold=0))
                     for rank in (1, 0)]
            codes = [ground.finish(pid) for pid in again]
            codes.append(ground.run(Pod("z", sources[1], hold=0)))
            found += ["after %s, starts end with %s" % ((at, when), codes)] if any(codes) else []
            found += aftermath(ground, Pod("clean", sources[2]))
            yield "%s: %s call %d" % (name, when, at), found
        shutil.rmtree(room)
        if code != 137 and entries and entries[-1].get("calls", 0) < at:
            return


def everywhere(place: str | Path, every: int, offset: int) -> tuple[dict[str, Any], list[str]]:
    """die_everywhere for all scenes, each in a process of its own: (figures, violations)."""
    began, read, write = time.monotonic(), *os.pipe()
    for name in SCENES:
        if os.fork() == 0:
            os.close(read)
            try:
                with os.fdopen(write, "w", buffering=1) as out:
                    for where, found in die_everywhere(place, name, every, offset):
                        out.write(json.dumps([where, found]) + "\n")
            finally:
                os._exit(0)
    os.close(write)
    kills: Counter[str] = Counter()
    wrong = []
    with os.fdopen(read) as lines:
        for where, found in map(json.loads, lines):
            kills[where.partition(":")[0]] += 1
            wrong += ["%s: %s" % (where, line) for line in found]
    for _ in SCENES:
        os.wait()
    missing = ["%s: no kill" % name for name in SCENES if every == 1 and not kills[name]]
    seconds = int(time.monotonic() - began)
    return {"kills": sum(kills.values()), "in each scene": dict(kills), "seconds": seconds}, wrong + missing


# ---------------------------------------------------------------- two mounts of one NFS export

# A Linux in user mode has the NFS client and server that the machine's own kernel may lack. Its root is the machine's,
# this file is its first process, and with that process it ends.
UML = ["linux.uml", "rootfstype=hostfs", "rootflags=/", "ro", "mem=1G", "con=null", "con0=null,fd:1", "quiet"]


def boot(place: str | Path, words: list[str], seconds: float) -> str:
    """Run this program with `words` and --guest in a Linux in user mode; its output. Nothing of it is left behind."""
    first = Path(place, "init")
    command = shlex.join([sys.executable, "-B", str(Path(__file__).resolve()), "--guest", *words])
    first.write_text("#!/bin/sh\nexec %s\n" % command)
    first.chmod(0o755)
    machine = subprocess.Popen([*UML, "init=%s" % first, "uml_dir=%s" % place], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               env={"HOME": str(place), "TMPDIR": "/dev/shm", "PATH": os.environ["PATH"]})
    try:
        return machine.communicate(timeout=seconds)[0].decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        os.killpg(machine.pid, signal.SIGKILL)
        return machine.communicate()[0].decode("utf-8", "replace") + "\nit did not end within %d s" % seconds
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(machine.pid, signal.SIGKILL)


def guest(options: argparse.Namespace) -> None:
    """The first process of a Linux in user mode: serve a folder by NFS, mount it twice, rage there, switch off."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        os.environ.update(PATH="/usr/sbin:/usr/bin:/sbin:/bin", TMPDIR="/tmp")
        for kind, where in (("proc", "/proc"), ("tmpfs", "/tmp"), ("tmpfs", "/tmp/export"), ("nfsd", "/proc/fs/nfsd")):
            if kind == "nfsd":
                for module in ("nfsv4", "nfsd"):
                    load(libc, module)
            mount(libc, kind, where, kind)
        serve("/tmp/export")
        tops = []
        for number in (1, 2):  # nosharecache: as on two machines, neither sees what the other has cached
            mount(libc, "127.0.0.1:/", "/tmp/mount%d" % number, "nfs4",
                  "vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1,nosharecache")
            tops.append("/tmp/mount%d/shared" % number)
            Path("/tmp/mount%d/first" % number).touch()  # a server that has just started makes one wait
        tell(*storm("/tmp/ground", options, "/tmp/export/shared", tops))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os.sync()
        libc.syscall(169, 0xFEE1DEAD, 672274793, 0x4321FEDC, 0)  # reboot: power off


def mount(libc: ctypes.CDLL, what: str, where: str, kind: str, options: str = "") -> None:
    os.makedirs(where, exist_ok=True)
    if libc.mount(what.encode(), where.encode(), kind.encode(), 0, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), where)


def load(libc: ctypes.CDLL, module: str) -> None:
    """Load a kernel module and those it needs."""
    folder = Path("/usr/lib/uml/modules", os.uname().release)
    needs = {Path(name).stem: [*reversed(rest.split()), name] for name, _, rest in
             (line.partition(":") for line in (folder / "modules.dep").read_text().splitlines())}
    for name in needs[module]:
        with open(folder / name, "rb") as file:
            if libc.syscall(313, file.fileno(), b"", 0) and ctypes.get_errno() != errno.EEXIST:  # finit_module
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)


def serve(folder: str) -> None:
    """Start the kernel's NFS server, version 4 only, with what mountd would tell it."""
    loopback = struct.pack("16sh14x", b"lo", 0x49)  # up, running, loopback
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, loopback)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 2049))
    listener.listen(64)
    forever = 2147483647
    for place, text in (
            ("fs/nfsd/versions", "-3 +4 +4.1 +4.2"), ("fs/nfsd/nfsv4leasetime", "10"), ("fs/nfsd/nfsv4gracetime", "10"),
            ("fs/nfsd/portlist", str(listener.detach())),
            ("net/rpc/auth.unix.ip/channel", "nfsd 127.0.0.1 %d all" % forever),
            ("net/rpc/nfsd.export/channel", "all %s %d %d 65534 65534 0" % (folder, forever, 0x2402)),
            ("net/rpc/nfsd.fh/channel", "all 1 \\x00000000 %d %s" % (forever, folder)), ("fs/nfsd/threads", "8")):
        Path("/proc", place).write_text(text + "\n")


# ---------------------------------------------------------------- by hand


def tell(figures: dict[str, Any], found: list[str]) -> None:
    print("figures: " + json.dumps(figures | {"violations": len(found)}))
    print("".join("violation: %s\n" % line for line in found[:50]), end="", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--pods", type=int, default=32, help="alive at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=float, default=1.0, help="how long a pod waits for rank 0, in seconds")
    parser.add_argument("--slack", type=float, default=5.0, help="and how late its end may be")
    parser.add_argument("--every", type=int, help="no storm: a kill at every Nth place of each scene instead")
    parser.add_argument("--nfs", type=float, metavar="SECONDS", help="the storm over two mounts of one NFS export")
    parser.add_argument("--flaw", choices=FLAWS, help="put this flaw into pod/shared.py first, to see that the storm finds it")
    parser.add_argument("--guest", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.guest:
        guest(options)
    for method, flawed in FLAWS.get(options.flaw, {}).items():
        setattr(SharedTree, method, flawed)
    with tempfile.TemporaryDirectory(prefix="airlift-chaos-") as place:
        if options.nfs:
            words = ["--%s=%s" % (name, getattr(options, name)) for name in ("kills", "pods", "seed", "patience", "slack")]
            output = boot(place, words, options.nfs)
            print(output)
            return 1 if "violation:" in output or "figures:" not in output else 0
        figures, found = (everywhere(place, options.every, options.seed % options.every) if options.every else
                          storm(place, options))
    tell(figures, found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
