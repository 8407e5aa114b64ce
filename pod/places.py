"""Where things are in this pod, and how a text that names them is filled in.

The code root, <scratch>/airlift-<run>/code, holds the tree; the run root holds what the recipe writes. In the config
`/nemo_run/code` stands for the first and any other `/nemo_run/...` for the second, by whole path components. So it is
in the environment, unless the run root itself lies below /nemo_run: there a profile's paths are the real ones.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import tempfile
import zlib
from typing import Any

from pod.failures import PLACE, Failure
from pod.payload import check_tree, join, unpack


class Places:
    """Where things are in this pod. All are absolute paths."""

    def __init__(self, job: dict, env: dict[str, str], base: str = "", code: str = "") -> None:
        self.base = base or os.path.join(os.path.abspath(env.get("TMPDIR") or "/tmp"), "airlift-" + job["run"])
        self.code = code or os.path.join(self.base, "code")
        self.config = os.path.join(self.base, "config.yaml")
        self.run_root = job.get("run_root") or os.path.join(self.base, "output")
        self.logs = os.path.join(self.run_root, "runs", job["run"]) if job.get("run_root") else ""

    def make(self, folders: list[str]) -> None:
        """Make the folders; `base` only for this user, since the config lies in it."""
        os.makedirs(self.base, mode=0o700, exist_ok=True)
        for folder in [self.run_root] + ([self.logs] if self.logs else []) + [self.fill(folder) for folder in folders]:
            os.makedirs(folder, exist_ok=True)

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
            full = " (the disk is full)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            place = error.filename or (shared.top if shared else self.base)
            raise Failure(PLACE, "%s: %s%s" % (place, error.strerror, full)) from None

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

    def program(self, env: dict[str, str]) -> str:
        """The running program as a file, for the parts of a Ray cluster to be started from. Its path."""
        path = getattr(sys.modules["__main__"], "__file__", None)
        if not path:
            path = os.path.join(self.base, "pod.py")
            with open(path, "wb") as file:
                file.write(zlib.decompress(join(env, "POD")))
        return os.path.abspath(path)


def quoted(text: str) -> str:
    """`text` as it stands between the double quotes of YAML: as in JSON, but YAML reads no surrogate pairs, and wants
    some more characters in escapes."""
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda match: "\\u%04x" % ord(match.group()),
                  json.dumps(text, ensure_ascii=False)[1:-1])


def places_beside(manifest: str, job: dict, env: dict[str, str]) -> Places:
    """The places of a pod on Slurm, whose tree has come by itself and lies beside the manifest. Checks it, takes the
    secrets that lie above it into `env`, and writes the config into a folder of this pod's own. Raises Failure."""
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
