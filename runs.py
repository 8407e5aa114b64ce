"""What Airlift keeps of each run: a small private file in <home>/runs, the same for every executor. It never contains
a secret or a chunk."""

import hashlib
import json
import os
import re
import secrets
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import state
from transport import Refusal, Tree


class Origin(TypedDict):
    """What `diff` needs to collect a launch's tree again."""

    repo_root: str
    env_file: str  # the env.toml in use; /dev/null for none
    config: str | None  # of -c: a file's absolute path, a config's name, or None
    overrides: list[str]  # only run.env.exclude, include and scope, since others may contain secrets


@dataclass
class Run:
    """The file of one run: what status, logs and cancel need."""

    id: str  # six letters and digits
    recipe: str
    profile: str
    executor: str
    nodes: int
    sha256: str  # of the tree's tar
    started: float = field(default_factory=time.time)
    running_since: float | None = None  # when the job was first seen to run
    ended: list[str] | None = None  # final state and detail, kept because platforms forget their jobs
    job_exit_code: int | None = None
    retries: int = 0
    ranks: list[int] = field(default_factory=lambda: [0])  # whose logs are shown
    outputs: str | None = None  # the run root, where it outlives the pods
    origin: Origin | None = None
    notify: str | None = None  # the command for the end of an attached run
    after: str | None = None  # the run of the stage before it, which must succeed first
    record: dict[str, Any] = field(default_factory=dict)  # the backend's own data; its class Record has the keys
    carries: dict[str, str] = field(default_factory=dict, repr=False)  # fingerprints(), saved in a file of its own
    came: dict[str, Any] = field(default_factory=dict, repr=False)  # an archive.Made ("made") and "config"; likewise

    @property
    def starts(self) -> int:
        """How often the job may be started in total."""
        return 1 + self.retries

    def keep(self, record: Mapping[str, object]) -> None:
        """Add to the backend's data, and save the run."""
        self.record.update(record)
        self.save()

    def save(self) -> None:
        for suffix, data in ((".files", self.carries), (".made", self.came)):
            if data:
                state.write(_path(self.id, suffix, True), zlib.compress(json.dumps(data).encode(), 9))
        self.carries, self.came = {}, {}
        fields = {name: value for name, value in self.__dict__.items() if name not in ("carries", "came")}
        state.write(_path(self.id, ".json", True), json.dumps(fields, indent=1).encode())

    def files(self) -> dict[str, str]:
        """The fingerprints() of the tree that the run carries. Raises Refusal where they were not kept."""
        return self._beside(".files", "list of files")

    def made(self) -> tuple[Any, str]:
        """(how it came about, an archive.Made; its config). Raises Refusal where they were not kept."""
        found = self._beside(".made", "record")
        return found["made"], str(found["config"])

    def _beside(self, suffix: str, what: str) -> dict[str, Any]:
        path = _path(self.id, suffix)
        try:
            return dict(json.loads(zlib.decompress(state.read(path))))
        except (OSError, ValueError, zlib.error):
            raise Refusal("the %s of run %s cannot be read: %s" % (what, self.id, path),
                          "only runs of this version have one") from None

    def forget(self) -> None:
        for suffix in (".json", ".files", ".made"):
            _path(self.id, suffix).unlink(missing_ok=True)


def _path(run_id: str, suffix: str, make: bool = False) -> Path:
    return state.folder("runs", make=make) / (run_id + suffix)


def fingerprints(tree: Tree) -> dict[str, str]:
    """path -> SHA-256 of a file (and " x" where it is executable), or "-> target" of a link."""
    return {entry.path: "-> %s" % os.fsdecode(entry.data) if entry.link else
            hashlib.sha256(entry.data).hexdigest() + " x" * entry.executable for entry in tree.entries}


def load_run(run_id: str) -> Run:
    """Raises Refusal for a run that was not launched from this account."""
    path = _path(run_id, ".json")
    if not re.fullmatch(r"[a-z0-9]+", run_id) or not os.path.lexists(path):
        raise Refusal("there is no run %r" % run_id, "python launch.py status lists them")
    try:
        run = Run(**_current(json.loads(state.read(path))))
        if run.id != run_id or not isinstance(run.started, (int, float)) or not isinstance(run.record, dict):
            raise ValueError
        return run
    except (OSError, ValueError, TypeError, AttributeError):
        raise Refusal("the file of run %s cannot be read: %s" % (run_id, path), "remove it") from None


def _current(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a run's file; version 1.0 called the id "run" and kept more of them in the record."""
    if "run" in fields:
        fields["id"] = fields.pop("run")
        record = fields.get("record", {})
        fields["origin"] = record.pop("again", None)
        moved = ("ranks", "outputs", "retries", "running_since")
        fields |= {name: record.pop(name) for name in moved if name in record}
    return fields


def all_runs() -> tuple[list[Run], list[Refusal]]:
    """(all runs, newest first; the problems of files that cannot be read)."""
    found, problems = [], []
    for path in state.folder("runs", make=False).glob("*.json"):
        try:
            found.append(load_run(path.stem))
        except Refusal as problem:
            problems.append(problem)
    return sorted(found, key=lambda run: -run.started), problems


def chain(run: Run) -> list[Run]:
    """A run and those that come after it, in their order."""
    found = [run]
    for other in reversed(all_runs()[0]):
        found += [other] * (other.after == found[-1].id)
    return found


def new_run_id() -> str:
    """Six letters and digits, a letter first, so that names of jobs can begin or end with it."""
    return secrets.choice("abcdefghjkmnpqrstuvwxyz") + "".join(
        secrets.choice("abcdefghjkmnpqrstuvwxyz23456789") for _ in range(5))
