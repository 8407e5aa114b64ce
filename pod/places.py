"""Where things are in this pod, and how a text that names them is filled in.

The code root, <scratch>/airlift-<user>/<digest>/code, holds the tree; the run root, on the workspace, what the recipe
writes. The recipe starts in <run root>/work, so that what it writes by a relative path stays; `src` in there leads to
the code root's. In the config `/nemo_run/code/src` stands for that, any other `/nemo_run/code/...` for the folder
where it starts, any other `/nemo_run/...` for the run root, by whole path components. So it is in the environment,
unless the run root itself lies below /nemo_run: there a profile's paths are the real ones.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import zlib
from typing import Any

from pod.failures import PLACE, Failure, say
from pod.payload import content, join, make_folders, unpack


class Places:
    """Where things are in this pod. All are absolute paths."""

    def __init__(self, job: dict, env: dict[str, str], base: str = "", goes: bool = False) -> None:
        self.env, self.digest = env, job["tree"]["sha256"]
        self.own = ""  # a folder of files that are for this start of the pod alone
        self.short = self.staged = ""  # a folder for Ray's sockets; the one that a driver on a cluster came in
        self.goes = goes  # with this pod, since nobody else removes it from a node's /tmp
        self.kept = bool(job.get("run_root"))
        self.run_root = job.get("run_root") or ""
        self.logs = os.path.join(self.run_root, "runs", job["run"]) if self.kept else ""
        self.set(base)

    def set(self, base: str) -> None:
        self.base, self.code = base, os.path.join(base, "code")
        self.config = os.path.join(base, "config.yaml")
        self.run_root = self.run_root or (base and os.path.join(base, "output"))

    def ending(self) -> list[str]:
        """The folders that go with this start of the pod."""
        return [folder for folder in (self.base if self.goes else self.own, self.short, self.staged) if folder]

    @property
    def work(self) -> str:
        """Where the recipe starts: what it writes by a relative path stays, unless it has no workspace."""
        return os.path.join(self.run_root, "work") if self.kept else self.code

    def make(self, folders: list[str]) -> None:
        """Make the folders. Outputs follow the umask; what is our own only this user can enter."""
        make_folders(os.path.dirname(os.path.dirname(self.base)))
        private(os.path.dirname(self.base))
        private(self.base)
        kept = [os.path.dirname(self.logs), self.work] if self.kept else [self.run_root]
        for folder in [*kept, *map(self.fill, folders)]:
            os.makedirs(folder, exist_ok=True)
        try:
            self.logs = self.logs and private(self.logs)
        except Failure as failure:
            say("no log is kept: " + failure.seen)
            self.logs = ""

    def put(self, tar: bytes, job: dict, shared: Any = None) -> None:
        """Tree and config in place; the tree is unpacked here, or that of `shared`, a SharedTree. Raises Failure."""
        try:
            if shared:
                shared.make()
            self.set(self.base or own_place(self.digest[:16], self.env))
            self.make(job.get("folders", []))
            if shared:
                self.code = shared.find()
            else:
                unpack(tar, self.code)
            self.lead()
            self.write_config(job["config"])
        except BaseException as error:
            if shared:
                shared.leave(error)
            if isinstance(error, UnicodeEncodeError):
                raise Failure(PLACE, "%s is not UTF-8, so no config can name it" % self.base) from None
            if not isinstance(error, OSError):
                raise
            raise no_place(error, shared.top if shared else self.base) from None

    def lead(self) -> None:
        """Where the recipe starts, have `src` lead to this tree, and what else was sent. Pods on other nodes have it at
        the same path."""
        if not self.kept:
            return
        tops = [top for top in os.listdir(self.code) if top not in ("src", "wheels")]
        others = [os.path.relpath(os.path.join(place, name), self.code) for top in tops
                  for place, _, names in os.walk(os.path.join(self.code, top)) for name in names]
        for name in ["src", *others]:
            link, new = os.path.join(self.work, name), os.path.join(self.work, ".src-" + os.urandom(4).hex())
            try:
                there = os.readlink(link) if os.path.lexists(link) else ""
                if self.digest[:16] in there and os.path.exists(link):
                    continue
                if there and os.path.exists(link):  # not one that a sibling makes in this moment
                    say("%s led to another tree, and now leads to this one" % link)
                os.makedirs(os.path.dirname(link), exist_ok=True)
                os.symlink(os.path.join(self.code, name), new)
                os.rename(new, link)
            except OSError as error:  # a file of somebody's, or storage without links
                say("what is read as %s by a relative path is not what was sent: %s: %s" % (name, link, error.strerror))

    def fill(self, text: str, config: bool = False) -> str:
        """`text` with /nemo_run/code and /nemo_run replaced, by whole path components; in a config within "..."."""

        def place(match: re.Match) -> str:
            if not (config or match.group(1)) and self.run_root.startswith("/nemo_run/"):
                return match.group(0)  # storage is mounted there
            path = {"/code/src": self.code + "/src", "/code": self.work}.get(match.group(1), self.run_root)
            return quoted(path) if config else path

        return re.sub(r"(?<![\w./})\]~-])/nemo_run(/code/src(?![\w.-])|/code)?(?![\w.-])", place, text)

    def write_config(self, text: str) -> None:
        descriptor, private = tempfile.mkstemp(dir=self.base)  # 0600
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self.fill(text, config=True))
        os.rename(private, self.config)

    def keep(self, name: str, data: bytes) -> str:
        """What no argv may hold, since all users of a machine can read those, as a file of our own. Its path."""
        try:
            self.own = self.own or tempfile.mkdtemp(dir=self.base)  # 0700
            path = os.path.join(self.own, name)
            with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(data)
            return path
        except OSError as error:
            raise no_place(error, self.base) from None

    def program(self, env: dict[str, str]) -> str:
        """The running program as a file, for the parts of a Ray cluster to be started from. Its path."""
        path = getattr(sys.modules["__main__"], "__file__", None)
        if path:
            return os.path.abspath(path)
        source = getattr(sys.modules["pod"], "SOURCE", None)
        return self.keep("pod.py", source or zlib.decompress(join(env, "POD")))


def no_place(error: OSError, place: str) -> Failure:
    full = " (the disk is full)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return Failure(PLACE, "%s: %s%s" % (error.filename or place, error.strerror, full))


def private(folder: str, owner: int = -1) -> str:
    """`folder`, which only this user can enter: made, or there and ours, or `owner`'s. Raises Failure(PLACE) where it
    is another user's or could have been filled by one; OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
        return folder
    info = os.lstat(folder)
    ours = info.st_uid in (owner, os.geteuid()) or info.st_uid == own_number(folder)
    wrong = "is no folder" if not stat.S_ISDIR(info.st_mode) else "belongs to another user" if (
        not ours) else "can be written by other users" if info.st_mode & 0o022 else ""
    if wrong:
        raise Failure(PLACE, "%s %s: remove it, or name another place" % (folder, wrong))
    if info.st_mode & 0o055:
        os.chmod(folder, 0o700)
    return folder


def own_number(folder: str) -> int:
    """The user that what we write there belongs to: a server may file it under another one (NFS with root_squash)."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=folder) as probe:
        return os.lstat(probe).st_uid
    return os.geteuid()


def quoted(text: str) -> str:
    """`text` as it stands between the double quotes of YAML: as in JSON, but YAML reads no surrogate pairs, and wants
    some more characters in escapes."""
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda match: "\\u%04x" % ord(match.group()),
                  json.dumps(text, ensure_ascii=False)[1:-1])


def own_place(name: str, env: dict[str, str]) -> str:
    """<scratch>/airlift-<user>/<name>, empty, and this process's alone until it ends; with a number behind it where
    another has it. The same path again, since caches and names are made of paths; one that can be foretold lies below
    a folder that only this user can enter. What processes have left there that are gone goes now."""
    scratch = os.path.abspath(env.get("TMPDIR") or "/tmp")
    top = os.path.join(scratch, "airlift-%d" % os.geteuid())
    try:
        make_folders(scratch)
        lock = os.open(private(top), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in os.listdir(top):
                if hold(os.path.join(top, left)):
                    shutil.rmtree(os.path.join(top, left), ignore_errors=True)
            for number in range(10_000):
                own = os.path.join(top, name + "-%d" % number * bool(number))
                with contextlib.suppress(FileExistsError):
                    os.mkdir(own, 0o700)
                    if hold(own, forever=True):
                        return own
            raise OSError(errno.EUSERS, os.strerror(errno.EUSERS), top)
        finally:
            os.close(lock)
    except OSError as error:
        raise no_place(error, scratch) from None


def hold(folder: str, forever: bool = False) -> bool:
    """Whether a folder of this user's is held by no pod; with `forever`, this process holds it from now on."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(handle).st_uid == os.geteuid():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
        finally:
            if not forever:
                os.close(handle)
    return False


def take_secrets(folder: str, names: list[str], env: dict[str, str]) -> None:
    """The secrets that have come as a file, into `env`: those that were sent, and nothing else that lies in it."""
    path = os.path.join(folder, "secrets.json")
    try:
        found = json.loads(content(path, 1 << 22)) if names else {}
        env.update({name: str(found[name]) for name in names})
    except OSError as error:
        raise no_place(error, path) from None
    except (ValueError, KeyError, TypeError):
        raise Failure(PLACE, "%s does not hold the secrets that were sent" % path) from None
