"""One tree on shared storage for all pods of an attempt (unpack = "shared").

Under one folder that all pods see:

    trees/000007-<digest>.../  a published tree: absent or complete; its name is never used again
        code/                  what was sent; never changed
        uses/                  a file of each pod that uses it, from before it looks at the tree until it ends
        told/                  rank 0's word to the others, <attempt>.ready-<n>; n is the number of chunks
    failed/000007-<attempt>    rank 0's word that it cannot, and why
    private/000008-...         not yet published
    swept/...                  no longer

All of it is this user's alone, mode 0700, and stands where nobody else can put another folder in its place: only then
is it believed.

An attempt is one start of all pods: the run's id and the platform's count of restarts. Rank 0 alone decides which tree
it is: one with the right digest that is there and verifies, else a new one, unpacked into a private folder, verified,
and renamed with rank 0's use and word already in it. The others look for its word, with a deadline, and verify the tree
before they use it.

  - No lock, and no clock is compared. Any pod may be killed and started again at any point; two may be alive at once
    that think they are the same rank, so each process has a use of its own.
  - Readers and sweepers meet in uses/, and the file system decides: a sweeper first removes that folder, which works
    only while nobody is in it; from then on nobody can enter it, and whoever comes by can finish the sweep.
  - Nothing is deleted under the name it had. It is renamed to swept/ first, so that of a pod that would publish a
    folder and one that would remove it, one is told that it came too late. Rank 0 then begins anew.
  - Rank 0 reuses only a tree with nothing else in it: a module that another job left there would be imported. The
    others do not mind what their own siblings leave in it meanwhile.
  - What stays: a pod that was killed leaves its use behind, and with it the tree; remove the whole folder while no job
    runs, if that is too much. A tree keeps a word for each attempt it served. Of private folders and failures the
    newest LEFT stay. A full disk makes all go that is not in use.
  - NFS: a rename that was carried out may be answered ENOENT, so what counts is what is there afterwards. A name that
    was looked up too early stays absent in a cache for a while, so names are read from listings, and a folder is
    touched before it is listed, which makes the client ask the server.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import time

from pod.failures import PLACE, WAIT, Failure, say
from pod.payload import extract, holds, make_folders, strays
from pod.places import private


class SharedTree:
    """One pod's part in it."""

    FOLDERS = ("trees", "failed", "private", "swept")
    LEFT = 32
    GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
    FULL = (errno.ENOSPC, errno.EDQUOT)

    def __init__(self, job: dict, env: dict[str, str], rank: int, tar: bytes) -> None:
        restarts = env.get("LEPTON_JOB_FAILURE_COUNT") or env.get("SLURM_RESTART_COUNT") or "0"
        self.top, self.rank, self.tar = job["shared"], rank, tar
        self.attempt = "%s-%s" % (job["run"], re.sub(r"[^0-9]", "_", restarts))
        self.digest = job["tree"]["sha256"]
        self.ready = "%s.ready-%s" % (self.attempt, env.get("AIRLIFT_TREE_CHUNKS", "1"))  # as a file, it is one
        self.use = "%s.%d.%s" % (self.attempt, rank, os.urandom(8).hex())
        self.keep, self.patience = job["keep"], job["patience"]
        self.pause = max(1.0, job.get("nodes", 1) / 1000)  # seconds between two looks: the storage serves all pods
        self.used: str | None = None

    def path(self, *parts: str) -> str:
        return os.path.join(self.top, *parts)

    def make(self) -> None:
        above = os.path.dirname(os.path.abspath(self.top))
        make_folders(above)
        open_one = replaceable(above)
        if open_one:
            raise Failure(PLACE, "other users can put a folder of their own in the place of %s: chmod go-w %s, or "
                          "chmod +t" % (self.top, open_one))
        owner = os.lstat(private(self.top)).st_uid
        for folder in self.FOLDERS:
            private(self.path(folder), owner)

    def find(self) -> str:
        """The tree's path, in place and verified. Raises Failure(WAIT or PLACE), OSError."""
        name = self.provide() if self.rank == 0 else self.wait()
        return self.path("trees", name, "code")

    def leave(self, error: BaseException | None = None) -> None:
        """Give up the use. An error of rank 0 is told to the others; a signal is not, for rank 0 may come back."""
        self.release()
        if self.rank == 0 and isinstance(error, Exception):
            with contextlib.suppress(OSError):  # then the others wait for their deadline
                path = self.path("failed", "%06d-%s" % (self.next_number(), self.attempt))
                with open(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w", encoding="utf-8",
                          errors="backslashreplace") as file:
                    file.write(getattr(error, "seen", str(error)))

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
        with contextlib.suppress(OSError):
            alone = self.take(name) and not strays(self.path("trees", name, "code"), self.tar)
            if alone and self.mark(self.path("trees", name, "told", self.ready)):
                return True
        self.release()
        return False

    def publish(self) -> str:
        """A new tree. Begun anew when our folder was swept as if left behind, and once when the disk was full."""
        deadline, was_full = time.monotonic() + self.patience, False
        while True:
            name, begun = "%06d-%s.%s" % (self.next_number(), self.digest, os.urandom(4).hex()), False
            try:
                os.makedirs(self.path("private", name), 0o700, exist_ok=True)
                begun = True
                for folder in ("uses", "told", "code"):
                    os.makedirs(self.path("private", name, folder), 0o700, exist_ok=True)
                self.write(self.path("private", name))
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

    def write(self, private: str) -> None:
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
                reason = ""
                with contextlib.suppress(OSError), open(
                        self.path("failed", name), encoding="utf-8", errors="replace") as file:
                    reason = file.read(1000)
                raise Failure(WAIT, "rank 0 says: " + (reason or "it failed"))
            left = deadline - time.monotonic()
            if left <= 0:
                raise Failure(WAIT, "%s after %d s in %s" % (seen, self.patience, self.top))
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, self.pause)

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
            with contextlib.suppress(OSError):  # there is none; or it is as if this pod had been killed: the tree stays
                os.unlink(self.path("trees", self.used, "uses", self.use))
            self.used = None

    def sweep(self, keep: int, left: int) -> None:
        """Remove all but the newest, and no tree in use. What goes wrong here concerns nobody but the disk."""
        try:
            for name in self.trees()[:-keep or None]:  # all, if none is to be kept
                self.retire(name)
            for name in sorted(self.listed("private"), key=lambda name: (len(name), name))[:-left or None]:
                self.discard("private", name)
            for name in self.listed("failed")[:-self.LEFT]:
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
        """Beyond those of private folders, too: what killed pods left behind would have a new one swept."""
        numbers = [re.match("([0-9]{6,18})-", name) for name in self.trees() + self.listed("private")]
        return 1 + max([int(number[1]) for number in numbers if number] + [0])

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
            with contextlib.suppress(PermissionError):
                os.utime(folder)
            return sorted(os.listdir(folder))
        except OSError as error:
            if error.errno in self.GONE:
                return []
            raise

    def mark(self, path: str) -> bool:
        """An empty file; False if its folder is gone."""
        try:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            return True
        except OSError as error:
            if error.errno in self.GONE:
                return False
            raise

    def remove(self, folder: str, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(folder, name))


def replaceable(folder: str) -> str:
    """The nearest folder, from this one upwards, in which others can rename what lies there; "" if there is none. A
    group with this user's own number has no other member, by the custom of Linux."""
    alone, folder = os.getegid() == os.geteuid(), os.path.realpath(folder)
    while True:
        info = os.stat(folder)
        others = 0o002 if alone and info.st_gid == os.getegid() else 0o022
        if info.st_mode & others and not info.st_mode & stat.S_ISVTX:
            return folder
        if folder == "/":
            return ""
        folder = os.path.dirname(folder)
