"""Outputs that come home: files of a run's outputs that fit a pattern, from a folder of this disk or from a tar."""

import fnmatch
import io
import os
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from transport import Refusal, human

MOST = 256 << 20  # bytes of all files together: what is larger is copied by other means


def copied(root: Path, pattern: str, folder: Path) -> list[str]:
    """Copy the files below `root` whose path fits; returns their paths. Raises Refusal."""
    found, total = [], 0
    for place, _, names in os.walk(root):
        for name in names:
            path = os.path.relpath(os.path.join(place, name), root)
            if fnmatch.fnmatchcase(path, pattern) and os.path.isfile(os.path.join(place, name)):
                found.append(path)
                total += os.path.getsize(os.path.join(place, name))
    require_small(total, str(root))
    for path in found:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, folder / path)
    return sorted(found)


def require_small(total: int, root: str) -> None:
    if total > MOST:
        raise Refusal("what fits has %s of at most %s" % (human(total), human(MOST)),
                      "name fewer files, or copy them from %s by other means" % root)


def unpacked(data: bytes, folder: Path) -> list[str]:
    """Write the files of a tar, below the folder and nowhere else; returns their paths. Raises Refusal."""
    found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for info in tar:
                path = os.path.normpath(info.name)
                inner = PurePosixPath(path)
                file = tar.extractfile(info) if info.isreg() else None
                if file is None or inner.is_absolute() or ".." in inner.parts:
                    continue
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(file.read())
                found.append(path)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise Refusal("what came is no tar: %s" % error, "try again") from None
    return sorted(found)
