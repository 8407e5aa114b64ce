"""What every executor is to the rest: its seven functions (Backend), the answer to "how is the job?" (Status), and the
table of executors.

A backend is a module, one file of this folder, with the functions and the set CAN of the Protocol below. Backends do
not import each other; what several of them need lies in common/. A new executor is one file here and one line each in
BACKENDS and transport.LIMITS.
"""

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

from jobs import Job
from runs import Run
from transport import Plan, Refusal

BACKENDS = {"local": "backends.local", "docker": "backends.docker", "slurm": "backends.slurm",
            "lepton": "backends.lepton", "dgxcloud": "backends.dgxcloud"}
FINAL = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Status:
    """How a job is. `gone` marks a final state that is only concluded: the platform no longer knows the job."""

    state: str  # waiting, running, or one of FINAL
    detail: str = ""  # the platform's own word
    exit_code: int | None = None  # the recipe's; None where it is not known
    gone: bool = False


GONE = "the platform no longer knows it"  # the detail of a Status with gone=True


@dataclass(frozen=True)
class Finding:
    """One line of `check`: what was looked at, how it came out, and for a failure what to do and the exit code."""

    what: str
    state: str  # ok; warning: a launch may still work, or it could not be found out; failure: it would not
    said: str
    fix: str = ""
    code: int = 0


class Backend(Protocol):
    """The seven functions of an executor's module."""

    CAN: set[str]  # which of "detach" and "ray" (a Ray recipe on several nodes) it supports

    def check(self, job: Job, plan: Plan) -> None:
        """Raise Refusal for what the platform would refuse, without asking it."""

    def submit(self, run: Run, job: Job, plan: Plan, attached: bool) -> None:
        """Start the job. What the other functions need is in run.record, and saved before anything is sent."""

    def follow(self, run: Run) -> Status:
        """Pass the logs of run.ranks on until the job has ended."""

    def logs(self, run: Run) -> None:
        """Print the logs that there are, and return."""

    def status(self, run: Run) -> Status:
        """Ask the platform."""

    def cancel(self, run: Run) -> str:
        """End the job. One sentence that says what was done."""

    def probe(self, settings: dict[str, Any], job: Job | None) -> Iterator[Finding]:
        """What can be asked before a launch; without a job, of the profile alone."""


def backend(executor: str) -> Backend:
    """The module of an executor, imported now. Raises Refusal for an executor that there is none for."""
    if executor not in BACKENDS:
        raise Refusal("executor %s can plan (--dry-run) but not launch in this version" % executor,
                      "use one of " + ", ".join(BACKENDS))
    return cast(Backend, importlib.import_module(BACKENDS[executor]))


def require(job: Job, attached: bool) -> None:
    """The one check of what a backend can do. Raises Refusal."""
    can = backend(job.executor).CAN
    if not attached and "detach" not in can:
        raise Refusal("--detach is not supported by executor %s" % job.executor, "launch without it")
    if job.description.get("cluster") and "ray" not in can:
        raise Refusal("a Ray recipe on %d nodes is not supported by executor %s" % (job.nodes, job.executor),
                      "use --nodes 1, or another executor")


def status(run: Run) -> Status:
    """The platform's word, or how the run ended where that is known. Raises Refusal if it cannot be read."""
    if run.ended:
        return Status(run.ended[0], run.ended[1], run.job_exit_code)
    found = backend(run.executor).status(run)
    keep_end(run, found)
    return found


def keep_end(run: Run, found: Status) -> None:
    """Remember a final Status in the run's file."""
    if found.state in FINAL and not found.gone:
        run.ended, run.job_exit_code = [found.state, found.detail], found.exit_code
        run.save()


def await_end(ask: Callable[[], Status], pause: float = 0.5, seconds: float = 60.0) -> Status:
    """The Status once the job has ended, or as it is after `seconds`; asked for with pauses between."""
    deadline = time.monotonic() + seconds
    while (found := ask()).state not in FINAL and time.monotonic() <= deadline:
        time.sleep(pause)
    return found


def ended_already(detail: str) -> str:
    """What cancel says of a job that is over."""
    return "it had already ended (%s); nothing was done" % detail
