"""Where things are in this pod, and how a text that names them is filled in.

The code root, <scratch>/airlift-<run>/code, holds the tree; the run root holds what the recipe writes. In the config
`/nemo_run/code` stands for the first and any other `/nemo_run/...` for the second, by whole path components. So it is
in the environment, unless the run root itself lies below /nemo_run: there a profile's paths are the real ones.
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

    def __init__(self, job: dict, env: dict[str, str], base: str = "") -> None:
        self.base = base or os.path.join(os.path.abspath(env.get("TMPDIR") or "/tmp"), "airlift-" + job["run"])
        self.code = os.path.join(self.base, "code")
        self.config = os.path.join(self.base, "config.yaml")
        self.own = ""  # a folder of this start of the pod, which goes with it
        self.run_root = job.get("run_root") or os.path.join(self.base, "output")
        self.logs = os.path.join(self.run_root, "runs", job["run"]) if job.get("run_root") else ""

    def make(self, folders: list[str]) -> None:
        """Make the folders. Outputs follow the umask; what is our own only this user can enter."""
        make_folders(os.path.dirname(self.base))
        private(self.base)
        for folder in [os.path.dirname(self.logs) or self.run_root, *map(self.fill, folders)]:
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
            self.make(job.get("folders", []))
            if shared:
                self.code = shared.find()
            else:
                unpack(tar, self.code)
            self.write_config(job["config"])
        except BaseException as error:
            if shared:
                shared.leave(error)
            if isinstance(error, UnicodeEncodeError):
                raise Failure(PLACE, "%s is not UTF-8, so no config can name it" % self.base) from None
            if not isinstance(error, OSError):
                raise
            raise no_place(error, shared.top if shared else self.base) from None

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


def own_place(job: dict, env: dict[str, str]) -> str:
    """A new private folder for this start of a pod that leaves nothing behind, since nobody else removes it from a
    node's /tmp. What killed pods have left there goes now: a pod that lives holds a lock on its folder."""
    scratch = os.path.abspath(env.get("TMPDIR") or "/tmp")
    try:
        make_folders(scratch)
        for name in os.listdir(scratch):
            if re.fullmatch(r"airlift-[a-z0-9]{6}-\w{8}", name) and hold(os.path.join(scratch, name)):
                shutil.rmtree(os.path.join(scratch, name), ignore_errors=True)
        while True:
            own = tempfile.mkdtemp(prefix="airlift-%s-" % job["run"], dir=scratch)  # 0700
            if hold(own, forever=True):  # else another pod took it for left behind, in that moment
                return own
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
