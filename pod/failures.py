"""The pod's own failures: an exit code and one plain sentence for each, and how a pod says them."""

from __future__ import annotations

import contextlib
import os
import re

POD, PAYLOAD, RANK, PLACE, WAIT, PYTHON, SETUP, TOOL, CLONE, INTERNAL, RAY, LOST = range(80, 92)

FAILURES = {
    POD: ("the program that unpacks did not arrive whole", "the platform dropped or changed a part of the environment"),
    PAYLOAD: ("the payload did not arrive whole", "the platform dropped or changed a part of it"),
    RANK: ("the pod's rank is not certain", "set NODE_RANK in every pod, or remove what contradicts it"),
    PLACE: ("the pod could not put the files in place", "give the pod disk space, or a writable TMPDIR and workspace"),
    WAIT: ("rank 0 did not put the shared tree in place", "see rank 0's log, and whether all pods see the workspace"),
    PYTHON: ("the pod's python3 cannot unpack the payload", 'use an image with Python 3.8, or compression = "gz"'),
    SETUP: ("a startup command failed", "fix startup_commands in the profile; its output is above"),
    TOOL: ("the image lacks what the recipe is started with", "use an image that has it, or set run_command"),
    CLONE: ("a repository that the recipe mounts could not be cloned",
            'name a mirror that pods reach in [git_mirrors], or use the image\'s copy with auto_mount = "image"'),
    INTERNAL: ("the pod program itself failed", "please report it with the lines above"),
    RAY: ("the Ray cluster did not come up", "see the lines above, and whether all pods run and reach each other"),
    LOST: ("the Ray cluster lost a node", "see why that pod ended, then launch again: a recipe resumes"),
}


class Failure(Exception):
    """A failure of ours: its exit code and what was seen."""

    def __init__(self, code: int, seen: str) -> None:
        super().__init__(seen)
        self.code, self.seen = code, seen


def hide(text: str) -> str:
    """`text` without the names and passwords in its URLs."""
    return re.sub(r"([A-Za-z][\w+.-]*://)[^/\s]+@", r"\1***@", text)


def say(text: str, to: int = 1) -> None:
    """One line on standard output (or error, `to` 2), past Python's buffers and locale; where nobody reads, nothing."""
    with contextlib.suppress(OSError):
        os.write(to, ("airlift: " + hide(text) + "\n").encode("utf-8", "backslashreplace"))


def complain(rank: str, failure: Failure) -> int:
    """Say a failure, and what to do about it. Its exit code."""
    what, fix = FAILURES[failure.code]
    say("rank %s: %s: %s" % (rank, what, failure.seen))
    say("what to do: " + fix)
    return failure.code
