"""Work on many items at once: in processes on this machine's cores, or as tasks of the Ray cluster in RAY_ADDRESS."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from starter import cluster
from starter.config import RecipeError

A = TypeVar("A")
B = TypeVar("B")
PR_SET_PDEATHSIG = 1


def parallel(function: Callable[[A], B], items: Sequence[A], workers: int | None) -> Iterator[B]:
    """The results, in the order of the items. The first error in that order is raised, and ends the rest."""
    if os.environ.get("RAY_ADDRESS"):
        return on_ray(function, items)
    count = min(workers or len(os.sched_getaffinity(0)), len(items))
    return on_processes(function, items, count) if count > 1 else map(function, items)


def on_processes(function: Callable[[A], B], items: Sequence[A], count: int) -> Iterator[B]:
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, fork, die_with_parent, (os.getpid(),))
    try:
        yield from pool.map(function, items)
    except BrokenProcessPool as error:
        raise RecipeError(
            "a worker process was killed, most likely for its memory.\nGive the pod more of it, or set workers=1."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def die_with_parent(parent: int) -> None:
    """A worker ends when the recipe does, however that ends, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def on_ray(function: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
    """One task for each item, as many at a time as keep the cluster busy.

    The nodes must see the same data files, and have the source where the driver has it.
    """
    try:
        import ray
    except ImportError as error:
        raise RecipeError("RAY_ADDRESS is set, but Ray is not installed.\nUse another image, or unset it.") from error
    if not ray.is_initialized():
        cluster.connect(ray, os.environ["RAY_ADDRESS"])
        print(f"on the Ray cluster {os.environ['RAY_ADDRESS']}, {ray.cluster_resources().get('CPU', 0):.0f} CPUs")

    def call(source: str, work: bytes) -> Any:  # travels by value, so that it can tell where all else lies
        import pickle
        import sys

        sys.path[:0] = [] if source in sys.path else [source]
        function, item = pickle.loads(work)
        return function(item)

    task: Any = ray.remote(call)
    source = str(Path(__file__).resolve().parents[1])
    ahead = int(2 * ray.cluster_resources().get("CPU", 1)) + 1
    waiting: deque[Any] = deque()
    try:
        for item in items:
            waiting.append(task.remote(source, pickle.dumps((function, item))))
            if len(waiting) > ahead:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    except ray.exceptions.RayTaskError as error:
        for rest in waiting:
            ray.cancel(rest)
        if isinstance(error.cause, RecipeError):
            raise error.cause from None
        raise
