"""What several executors share: each larger subject in a file of its own, the smaller ones here. Nothing imports an
executor."""

import contextlib
import importlib.util
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import screen
import state
from jobs import BY_VALUE, Job
from transport import LIMITS, Plan, Refusal, human


def import_nemo() -> ModuleType:
    """nemo.py of this folder. Its import takes two seconds, so what can be refused should be refused before."""
    with screen.step("import nemo_run"):
        from backends.common import nemo
    return nemo


def nemo_ahead() -> threading.Thread:
    """Begin import_nemo() beside what else must be waited for; to be joined before nemo is used."""
    def ahead() -> None:
        with contextlib.suppress(Exception):  # import_nemo() runs into it again, and reports it
            import_nemo()

    thread = threading.Thread(target=ahead, daemon=True)
    thread.start()
    return thread


def records_home() -> Path:
    """nemo-run's folder, as its get_nemorun_home() has it."""
    return Path(os.path.expanduser(os.environ.get("NEMORUN_HOME", "~/.nemo_run")))


def require_records() -> None:
    """What can be known of nemo-run's records before its import: that it is there, and that its folder is ours alone.
    Raises ImportError, Refusal."""
    if importlib.util.find_spec("nemo_run") is None:
        raise ImportError("No module named 'nemo_run'")
    home = records_home()
    for path in (home, *(home.iterdir() if home.is_dir() else ())):
        if path.exists():
            state.require_own(path, path.stat(), lambda mode: True)


def record(name: str, executor: Callable[[ModuleType, Job], Any], job: Job, made: tuple[str, str]) -> None:
    """Put a job that the platform has accepted on nemo-run's list; its import takes seconds, so the job comes first.
    That it fails is said, and nothing else: the run's own file has the job."""
    try:
        nemo = import_nemo()
        nemo.submit(name, executor(nemo, job), job.run_id, lambda: made)
    except Exception as error:
        screen.note("the job is accepted, but not on nemo-run's list: %s" % (
            error.what if isinstance(error, Refusal) else error))


# ---------------------------------------------------------------- requests

def job_name(recipe: str, run_id: str, longest: int) -> str:
    """A name for the platform: lower case, letters, digits and dashes, a letter first, ending in the run's id."""
    stem = re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")
    stem = stem if re.match(r"[a-z]", stem) else "job-" + stem
    return stem[: longest - len(run_id) - 1].rstrip("-") + "-" + run_id


def with_custom(spec: dict[str, Any], custom: Mapping[str, Any], ours: tuple[str, ...], where: str = "") -> Any:
    """`spec` with custom_spec merged over it: tables deeply, lists of variables appended, everything else replaced.
    Raises Refusal for a field in `ours` (dotted names), without which the job could not start."""
    merged = dict(spec)
    for key, value in custom.items():
        here = merged.get(key)
        if where + key in ours:
            raise Refusal("custom_spec sets %s, which Airlift sets itself" % (where + key), "remove it")
        if isinstance(here, (dict, type(None))) and isinstance(value, dict):
            merged[key] = with_custom(here or {}, value, ours, where + key + ".")
        elif key in ("envs", "environmentVariables") and isinstance(value, list):
            merged[key] = here + value if here else value
        else:
            merged[key] = value
    return merged


def require_object(what: str, size: int, executor: str, also: str = "") -> None:
    """Raises Refusal (exit code 3) for an API object of more bytes than the limit; `also` is another way to fix it."""
    limit = LIMITS[executor].object
    if size > limit:
        raise Refusal("the %s's API object is %s of %s; nothing was submitted" % (what, human(size), human(limit)),
                      "leave files out with exclude" + also, 3)


def sent_by_value(job: Job, plan: Plan) -> tuple[str, ...]:
    """The values of secrets that are in the request, and that a server's answer may repeat."""
    values = tuple(plan.env[name] for name, source in job.secrets.items() if source in BY_VALUE)
    screen.conceal(*values)
    return values
