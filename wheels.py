"""Packages that travel with the tree, or lie on storage that the pods see: pip, or uv, installs them without an index.

`wheels` names files of this machine (patterns that end in .whl), which are sent, and folders as the pods see them.
"""

import glob
import os
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from transport import MAX_FILE, Entry, Refusal, human

FOLDER = "wheels"  # of the tree, beside src
NAME = re.compile(r"([A-Za-z0-9][\w.]*)-([\w.!+]+)(-\d[\w.]*)?-[\w.]+-[\w.]+-[\w.]+\.whl", re.ASCII)  # PEP 427
OPTION = re.compile(r"-|[a-z+]+://|\.{0,2}/")  # a word of pip_extras that is no name of a package


class Wheels(NamedTuple):
    """What pip is told. Without wheels, `extras` are the profile's pip_extras and the rest is empty."""

    files: tuple[str, ...]  # of this machine, which are sent
    links: list[str]  # folders with wheels: FOLDER below the code root, or as the pods see them
    install: list[str]  # what is installed from those alone
    extras: list[str]  # what is installed from an index, too


def wheels(settings: dict[str, Any]) -> Wheels:
    """By the settings `wheels` and `pip_extras`. Of these, what a wheel that is sent provides is installed from it, and
    everything where a folder is named. Raises Refusal."""
    named, extras = settings.get("wheels") or [], list(settings.get("pip_extras") or [])
    files, folders = [], [name for name in named if not name.endswith(".whl")]
    for pattern in (name for name in named if name.endswith(".whl")):
        found = sorted(glob.glob(pattern))
        if not found:
            raise Refusal("wheels names %s, and there is no such file" % pattern, "pip download --no-deps fetches one")
        files += found
    for folder in folders:
        if not folder.startswith("/"):
            raise Refusal("wheels names %s, neither a wheel nor a folder" % folder,
                          "write files as *.whl, and folders as absolute paths, as the pods see them")
        if not extras:
            raise Refusal("wheels names the folder %s, and nothing says what to install from it" % folder,
                          "name the packages in pip_extras")
    provided = dict(map(_provides, files))
    own = extras if folders else [word for word in extras if not OPTION.match(word) and plain(word) in provided]
    rest = {plain(word) for word in own}
    install = [*("%s==%s" % pair for pair in provided.items() if pair[0] not in rest), *own]
    return Wheels(tuple(dict.fromkeys(files)), [FOLDER] * bool(files) + folders, install,
                  [word for word in extras if word not in own])


def _provides(path: str) -> tuple[str, str]:
    """(the package, its version) of a wheel. Raises Refusal for what is none."""
    found = NAME.fullmatch(os.path.basename(path))
    if not found or not zipfile.is_zipfile(path):
        raise Refusal("%s is no wheel" % path, "a wheel is a zip file named NAME-VERSION-PYTHON-ABI-PLATFORM.whl")
    if os.path.getsize(path) > MAX_FILE:
        raise Refusal("%s has %s, more than a job can carry" % (path, human(os.path.getsize(path))),
                      "put it into a folder on storage that the pods see, and name that in wheels")
    return plain(found.group(1)), found.group(2)


def plain(requirement: str) -> str:
    """The name of the package in a requirement, as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement.strip())[0]).lower()


def entries(files: tuple[str, ...]) -> tuple[Entry, ...]:
    """The files as a part of the tree."""
    return tuple(Entry("%s/%s" % (FOLDER, os.path.basename(path)), Path(path).read_bytes()) for path in files)
