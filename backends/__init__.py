"""The interface of every executor (Backend), the state of a job (Status), and the table of executors.

A backend is a module of this folder with the functions and the set CAN of the Protocol below. Backends do not import
each other; what several of them need is in common/. A new executor is one file here and one line each in BACKENDS and
transport.LIMITS.
"""

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import archive
from jobs import Job
from runs import Run
from transport import Plan, Refusal

BACKENDS = {"local": "backends.local", "docker": "backends.docker", "slurm": "backends.slurm",
            "lepton": "backends.lepton", "dgxcloud": "backends.dgxcloud"}
FINAL = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Status:
    """The state of a job."""

    state: str  # waiting, running, or one of FINAL
    detail: str = ""  # the platform's own name for it
    exit_code: int | None = None  # the recipe's; None if not known
    why: tuple[str, ...] = field(default=(), compare=False)  # lines that say which rank failed, and why
    gone: bool = False  # the state is a guess, since the platform no longer knows the job


GONE = "the platform no longer knows it"  # the detail of a Status with gone=True


@dataclass(frozen=True)
class Finding:
    """One result of `check`."""

    what: str  # was checked
    state: str  # ok; warning: a launch may still work, or it could not be checked; failure: it would not work
    said: str  # the result
    fix: str = ""
    code: int = 0  # the exit code for a failure


class Backend(Protocol):
    """The functions of an executor's module."""

    CAN: set[str]  # which of "detach", "chain" (run.after) and "ray" (a Ray recipe on several nodes) it supports

    def check(self, job: Job, plan: Plan) -> None:
        """Raise Refusal for what the platform would refuse, without contacting it."""

    def submit(self, run: Run, job: Job, plan: Plan, attached: bool) -> None:
        """Start the job. Before anything is sent, run.record is saved with what the other functions need."""

    def follow(self, run: Run) -> Status:
        """Print the logs of run.ranks until the job has ended."""

    def logs(self, run: Run) -> None:
        """Print the logs so far."""

    def status(self, run: Run) -> Status:
        """Ask the platform for the state."""

    def cancel(self, run: Run) -> str:
        """End the job. Returns a sentence that says what was done."""

    def jobs(self, settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """(name, state) of each job of Airlift's on the platform."""

    def adopt(self, settings: dict[str, Any], name: str) -> archive.Found:
        """What was sent to a job, read from the platform. Raises Refusal."""

    # And, where the platform has a way to what lies on its storage:
    # bring(run, pattern, folder) -> list[str]: copy outputs whose path fits the pattern; returns their paths

    def probe(self, settings: dict[str, Any], job: Job | None) -> Iterator[Finding]:
        """Check on the platform what a launch needs; without a job, for the profile alone."""


def backend(executor: str) -> Backend:
    """The module of an executor, imported on first use. Raises Refusal for an executor without one."""
    if executor not in BACKENDS:
        raise Refusal("executor %s can only make dry runs in this version" % executor,
                      "use one of " + ", ".join(BACKENDS))
    return cast(Backend, importlib.import_module(BACKENDS[executor]))


# What an executor's submission imports, which is done while the tree is packed.
WARM = {"lepton": ("leptonai.api.v2.client", "leptonai.api.v1.types.job"), "dgxcloud": ("requests",)}


def warm(executor: str) -> None:
    """Begin these imports; who needs them waits for the rest."""
    def imports() -> None:
        with contextlib.suppress(Exception):  # the submission runs into it again, and reports it
            for name in WARM.get(executor, ()):
                importlib.import_module(name)

    threading.Thread(target=imports, daemon=True).start()


def require(job: Job, attached: bool, several: bool = False) -> None:
    """Raises Refusal for a job, perhaps one of several stages, that needs what its backend does not support."""
    can = backend(job.executor).CAN
    if not attached and "detach" not in can:
        raise Refusal("--detach is not supported by executor %s" % job.executor, "launch without it")
    if not attached and several and "chain" not in can:
        raise Refusal("--detach is not possible with several stages on %s: the launcher has to start the next one"
                      % job.executor, "leave --detach out, or launch the stages one by one")
    if job.description.get("cluster") and "ray" not in can:
        raise Refusal("a Ray recipe on %d nodes is not supported by executor %s" % (job.nodes, job.executor),
                      "use --nodes 1, or another executor")


def status(run: Run) -> Status:
    """The state by the platform, or the final one if that is known. Raises Refusal if it cannot be read."""
    if run.ended:
        return Status(run.ended[0], run.ended[1], run.job_exit_code)
    found = backend(run.executor).status(run)
    keep_end(run, found)
    return found


def keep_end(run: Run, found: Status) -> None:
    """Save a final Status in the run's file."""
    if found.state in FINAL and not found.gone:
        run.ended, run.job_exit_code = [found.state, found.detail], found.exit_code
        run.save()


def exit_status(folder: Path) -> Status | None:
    """The final Status by the files `exit` and `cancelled` of a job on this machine; None if it has not ended."""
    try:
        code = int((folder / "exit").read_text())
    except FileNotFoundError:
        return None
    state = "done" if code == 0 else "cancelled" if (folder / "cancelled").exists() else "failed"
    return Status(state, "exit code %d" % code, code)


def require_about(what: str, name: str, said: object) -> None:
    """Raises Refusal for an answer that is about something else than `name`, as a proxy that mixes them up gives it."""
    if str(said or name) != name:
        raise Refusal("the answer about %s %s is about another" % (what, name), "try again, or look in the console", 5)


ENDED_ALREADY = "it had already ended (%s); nothing was done"  # the answer of cancel, with the detail


def stop_and_wait(what: str, ask: Callable[[], Status], stop: Callable[[], object]) -> str:
    """Stop a job that has not ended yet, and wait a minute at most for its end. Returns what was done."""
    found = ask()
    if found.state in FINAL:
        return ENDED_ALREADY % found.detail
    stop()
    deadline = time.monotonic() + 60
    while (found := ask()).state not in FINAL and time.monotonic() <= deadline:
        time.sleep(0.5)
    return what + (" was cancelled" if found.state in FINAL else " was told to stop, and is still " + found.detail)
