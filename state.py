"""Airlift's own files on this machine, in AIRLIFT_HOME, else <XDG_STATE_HOME or ~/.local/state>/airlift.

What lies there is believed, so nobody else may write to it: folders are made with mode 0700 and files with 0600,
whatever the umask, and their owner and mode are checked before they are used. A checkout's files are not believed:
require_small() is for what is read of them as a whole.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from transport import Refusal, human

MOST = 64 << 20  # bytes of one file of ours: the list of files of a run, or a kept log
SMALL = 4 << 20  # bytes of a config, or of a file of profiles
LOCKED_S = 60.0  # seconds to wait for another launcher
UMASK = os.umask(0o077)  # the person's own
os.umask(UMASK)


def home() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    named = os.environ.get("AIRLIFT_HOME") or os.path.join(base or Path.home() / ".local" / "state", "airlift")
    return Path(os.path.realpath(named))


def folder(*names: str, make: bool = True) -> Path:
    """home()/names, made where it is missing unless this is only a look. Raises Refusal where another user could write
    to it."""
    place = home()
    missing = [parent for parent in place.parents if not parent.exists()] if make else []
    ours = [place, *(place.joinpath(*names[:end]) for end in range(1, len(names) + 1))]
    for path in [*reversed(missing), *ours]:
        with contextlib.suppress(FileExistsError):
            if make:
                path.mkdir(mode=0o700)
        if path in ours and os.path.lexists(path):
            require_own(path, os.lstat(path))
    return ours[-1]


def require_own(path: Path, info: os.stat_result, kind: Callable[[int], bool] = stat.S_ISDIR) -> None:
    """Raises Refusal unless the path is of that kind, belongs to this user, and only this user can write to it."""
    if not kind(info.st_mode):
        raise Refusal("%s is not what Airlift put there" % path, "look at it, and remove it")
    if info.st_uid != os.geteuid():
        raise Refusal("%s belongs to another user (uid %d)" % (path, info.st_uid),
                      "remove it, or set AIRLIFT_HOME or NEMORUN_HOME to a folder of your own")
    if info.st_mode & 0o022:
        raise Refusal("%s can be changed by other users (mode %o)" % (path, stat.S_IMODE(info.st_mode)),
                      "check what is in it, then: chmod -R go-w %s" % path)


def read(path: Path, most: int = MOST) -> bytes:
    """A file of ours, its first `most` bytes. Raises OSError, and Refusal where another user could have written it."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        require_own(path, os.fstat(file.fileno()), stat.S_ISREG)
        return file.read(most)


def write(path: Path, data: bytes) -> None:
    """Replace a file whose folder is there; it appears whole or not at all, with mode 0600."""
    descriptor, private = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.rename(private, path)
    except BaseException:
        os.unlink(private)
        raise


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Take turns with this user's other launchers. Raises Refusal for a file that is not ours, or held for too long."""
    deadline = time.monotonic() + LOCKED_S
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC  # to read, too, or the opening of a FIFO would wait
    with open(path, "ab", opener=lambda name, _: os.open(name, flags, 0o600)) as file:
        require_own(path, os.fstat(file.fileno()), stat.S_ISREG)
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Refusal("another launch has held %s for %d s" % (path, LOCKED_S),
                                  "wait until it has submitted its job, or end it") from None
                time.sleep(0.05)
        yield


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within it, a library makes no files that other users can change."""
    before = os.umask(UMASK | 0o022)
    try:
        yield
    finally:
        os.umask(before)


def require_small(path: Path) -> None:
    """Raises Refusal for what cannot be read to its end, like a device, a FIFO or a file of gigabytes."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise Refusal("%s is not a file" % path, "name a file")
    if path.is_file() and path.stat().st_size > SMALL:
        raise Refusal("%s has more than %s" % (path, human(SMALL)), "name a smaller file")
