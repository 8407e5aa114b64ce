"""Files that exist only whole, their digests, and a folder that one run at a time may write. No torch in here."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from starter.config import RecipeError

BLOCK = 1 << 18  # what is read at once: it stays in a core's cache


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have ``write`` fill a file that appears at ``path`` complete and on the disk, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise RecipeError(f"cannot write {path}: {error}\nFree space there, or set output=FOLDER.") from error


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: a rename is not durable before that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def only_run(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold ``folder`` against other runs that would write to it: wait for them, or raise RecipeError. The kernel ends
    the lock with its process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RecipeError(f"cannot write to {folder}: {error.strerror}\nSet output=FOLDER, writable.") from error
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN) and not wait:
                raise RecipeError(
                    f"another run writes to {folder}.\nWait for it, or give this experiment its own name: --name NAME."
                ) from error
            if error.errno in (errno.EACCES, errno.EAGAIN):
                print(f"another run writes to {folder}: waiting for it", flush=True)
                fcntl.lockf(lock, fcntl.LOCK_EX)
            else:  # a file system without locks
                print(f"{folder} cannot be locked ({error.strerror}): start one run at a time on it", flush=True)
        yield
    finally:
        os.close(lock)
