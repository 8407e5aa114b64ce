"""launch.py as a process of its own, forked from one that has already imported what takes seconds: nemo-run and the SDKs.

That one is multiprocessing's fork server, a fresh Python with one thread, which nothing but imports has run in.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["launch", "backends.lepton", "backends.dgxcloud", "backends.common.follow",
                              "backends.common.nemo", "leptonai.api.v2.client"])


def main(words: list[str], folder: str, cwd: str, env: Mapping[str, str], out: Connection, err: Connection) -> None:
    """The forked process: launch.py's main with profiles of the test's, and questions to the platform in quick order."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, end in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out.fileno()), (2, err.fileno())):
        os.dup2(end, number)
    out.close()
    err.close()
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    import launch
    import profiles
    from backends.common import follow

    profiles.FOLDER = Path(folder)
    follow.POLL_S = 0.1
    sys.exit(launch.main(words))


class Forked:
    """What a test needs of subprocess.Popen, with text."""

    def __init__(self, words: list[str], folder: Path, cwd: Path) -> None:
        ends = [FORKS.Pipe(duplex=False) for _ in range(2)]
        arguments = (words, str(folder), str(cwd), dict(os.environ), *(there for _, there in ends))
        self.process = FORKS.Process(target=main, args=arguments, daemon=True)
        self.process.start()
        self.stdout, self.stderr = (open(os.dup(here.fileno()), encoding="utf-8") for here, _ in ends)
        for pair in ends:
            for end in pair:
                end.close()

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        assert self.returncode is not None, "it still runs"
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it says to its end."""
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(self.stderr.read()), daemon=True)
        reader.start()
        out = self.stdout.read()
        self.wait(timeout)
        reader.join()
        return out, said[0]
