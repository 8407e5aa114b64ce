"""Start a Slurm cluster by hand, to try the real commands without one.

    sudo .venv/bin/python -m tests.slurm

It listens on a loopback of its own, prints how to launch on it from another shell, and ends with Ctrl-C, and its jobs.
"""

from __future__ import annotations

import shlex
import signal
import sys
from types import FrameType

from . import Cluster, why_not


def describe(cluster: Cluster) -> str:
    """What a person needs to know."""
    env = {"HOME": str(cluster.laptop), "SLURM_HOST": cluster.host, "SLURM_USER": cluster.user,
           "SLURM_ACCOUNT": cluster.account, "SLURM_JOB_DIR": "%s/jobs" % cluster.shared}
    laptop = shlex.join(cluster.laptop_command(["env", *("%s=%s" % pair for pair in env.items()), "bash"]))
    login = shlex.join(cluster.login_command(["env", "HOME=%s" % cluster.home, "bash"]))
    return "\n".join([
        "a shell on a person's machine, which reaches the cluster by SSH (port = %d in the profile):" % cluster.port,
        "  " + laptop, "a shell on the login node:", "  " + login, "images: " + ", ".join(cluster.images),
        "the cluster's files and logs: %s" % cluster.root, "Ctrl-C ends it, and every job with it."])


def stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM is as good as Ctrl-C."""
    raise KeyboardInterrupt


def main() -> int:
    """Serve until somebody stops it."""
    reason = why_not()
    if reason:
        print("cannot start: " + reason, file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, stop)
    with Cluster() as cluster:
        try:
            print(describe(cluster), flush=True)
            signal.pause()
        except KeyboardInterrupt:
            print("ending …", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
