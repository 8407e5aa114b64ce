"""What the request bodies of the two clouds have in common: a job's name, custom_spec, and the size of the object."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jobs import Job
from transport import LIMITS, Plan, Refusal, human


def job_name(recipe: str, run_id: str, longest: int) -> str:
    """A name for the platform: lower case, letters, digits and dashes, a letter first, ending in our run id."""
    stem = re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")
    stem = stem if re.match(r"[a-z]", stem) else "job-" + stem
    return stem[: longest - len(run_id) - 1].rstrip("-") + "-" + run_id


def with_custom(spec: dict[str, Any], custom: Mapping[str, Any], ours: tuple[str, ...], where: str = "") -> Any:
    """`spec` with custom_spec over it: tables deeply, lists of variables added to ours, everything else replaced.
    Raises Refusal for a field in `ours` (dotted names), without which the job could not start."""
    merged = dict(spec)
    for key, value in custom.items():
        here = merged.get(key)
        if where + key in ours:
            raise Refusal("custom_spec sets %s, which Airlift sets itself" % (where + key), "take it out")
        if isinstance(here, dict) and isinstance(value, dict):
            merged[key] = with_custom(here, value, ours, where + key + ".")
        elif key in ("envs", "environmentVariables") and isinstance(value, list):
            merged[key] = here + value if here else value
        else:
            merged[key] = value
    return merged


def require_object(what: str, size: int, executor: str, also: str = "") -> None:
    """Raises Refusal (exit code 3) for an API object that is too big; `also` names what may be smaller, too."""
    limit = LIMITS[executor].object
    if size > limit:
        raise Refusal("the %s's API object is %s of %s; nothing was submitted" % (what, human(size), human(limit)),
                      "leave files out with exclude" + also, 3)


def sent_by_value(job: Job, plan: Plan) -> tuple[str, ...]:
    """The secrets that a server may repeat, since it is given them."""
    return tuple(plan.env[name] for name, source in job.secrets.items() if source == "env")
