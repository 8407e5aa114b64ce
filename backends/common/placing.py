"""How a job is found on a cloud, and how its nodes are grouped."""

import re

from jobs import Job
from transport import Plan, Refusal


def labels(job: Job, plan: Plan) -> dict[str, str]:
    """The labels of a job: the profile's, and ours, by which others can find the run and its tree. Raises Refusal."""
    found = {name: str(value) for name, value in job.settings.get("labels", {}).items()}
    for name, value in found.items():
        if not re.fullmatch("([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", value):
            raise Refusal("labels.%s is %r" % (name, value),
                          "a label has at most 63 letters, digits, . _ and -, a letter or digit first and last")
    return found | {"airlift-run": job.run_id, "airlift-tree": plan.digest[:32]}


def per_segment(job: Job) -> int | None:
    """Nodes of one segment, None where there are none. Raises Refusal where the nodes cannot be divided so."""
    segments = job.settings.get("segments")
    if segments and (job.nodes % segments or 1 < job.nodes == segments):
        raise Refusal("%d nodes cannot be divided into %d segments of two or more" % (job.nodes, segments),
                      "correct nodes, or segments in the profile")
    return job.nodes // segments if segments and job.nodes > 1 else None
