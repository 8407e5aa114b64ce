"""Ray: the cluster in RAY_ADDRESS, or one on this machine while a run lasts; and a crew of actors spread over it."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from starter.config import RecipeError

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
STORE = 80 << 20  # bytes of the object store; Ray takes no less than 75 MiB
PATIENCE = 120  # seconds for the actors to find their places, as nodes may still be joining


@contextlib.contextmanager
def joined(cpus: int, store: int = STORE) -> Iterator[Any]:
    """The ``ray`` module, connected. A cluster of our own has ``cpus`` or more, and listens on loopback only.

    Nothing of the environment goes into a runtime_env: what the nodes need is the source, where the driver has it.
    """
    address, folder = os.environ.get("RAY_ADDRESS"), None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported, as is:
    if not address:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # so that its servers bind to 127.0.0.1
    try:
        import ray
    except ImportError as error:
        raise RecipeError("Ray is not installed here.\nUse an image with Ray, or add ray to pip_extras.") from error
    try:
        if address:
            connect(ray, address)
        else:
            folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: names of sockets have at most 107 characters
            ray.init(
                "local", num_cpus=max(cpus, len(os.sched_getaffinity(0))), object_store_memory=max(store, STORE),
                include_dashboard=False, _temp_dir=folder, **QUIET,
            )  # fmt: skip
        yield ray
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def connect(ray: Any, address: str) -> None:
    """Join the cluster at host:port, or at what else Ray takes for an address."""
    host, colon, port = address.rpartition(":")
    try:
        if colon and port.isdigit() and "/" not in host:  # where nobody listens, Ray would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=30).close()
        ray.init(address, **QUIET)
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(
            f"cannot reach the Ray cluster at {address}: {' '.join(str(error).split())}\n"
            "Mend RAY_ADDRESS, or unset it: then the recipe starts Ray itself."
        ) from error


class Crew:
    """Actors that each hold one object, made by ``make`` on their node, placed on as many nodes as there are.

    Without a ``count`` there is one for each node that has CPUs, and two on a single one with two CPUs.
    """

    def __init__(self, ray: Any, make: Callable[[], Any], count: int | None) -> None:
        self.ray = ray
        have = ray.cluster_resources()
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        count = self.count = count or max(1, len(nodes), min(2, int(have.get("CPU", 0))))
        gpus = min(1.0, have.get("GPU", 0) / count)
        self.places = ray.util.placement_group([{"CPU": 1.0} | ({"GPU": gpus} if gpus else {})] * count, "SPREAD")
        if not self.places.wait(PATIENCE):
            raise RecipeError(
                f"the Ray cluster has no room for {count} rollout actors in {PATIENCE} s; in all it has "
                f"{have.get('CPU', 0):.0f} CPUs and {have.get('GPU', 0):.0f} GPUs.\nLower rollout.actors, or add nodes."
            )
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self.places)
        actor = ray.remote(num_cpus=1, num_gpus=gpus, scheduling_strategy=strategy)(host_class())
        source, work = str(Path(__file__).resolve().parents[1]), pickle.dumps(make)
        self.actors = [actor.remote(source, work) for _ in range(count)]
        self.nodes = len(set(self._get([one.node.remote() for one in self.actors])))

    def share(self, value: Any) -> Any:
        """Put a value where all actors can take it from."""
        return self.ray.put(value)

    def call(self, method: str, *arguments: Sequence[Any]) -> list[Any]:
        """Call each actor's object with its item of each sequence, and wait for all results."""
        return self._get([one.call.remote(method, *mine)
                          for one, *mine in zip(self.actors, *arguments, strict=True)])  # fmt: skip

    def _get(self, waiting: list[Any]) -> list[Any]:
        try:
            found: list[Any] = self.ray.get(waiting)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RecipeError):
                raise error.cause from None
            raise
        except self.ray.exceptions.RayError as error:
            told = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RecipeError(
                f"a rollout actor was lost: {told}\nStart again: the run goes on from its last checkpoint."
            ) from error
        return found


def host_class() -> type:
    """What an actor is: a class that travels by value, since a worker does not yet know where our modules are."""

    class Host:
        def __init__(self, source: str, work: bytes) -> None:
            import pickle
            import sys

            sys.path[:0] = [] if source in sys.path else [source]
            self.object = pickle.loads(work)()

        def node(self) -> str:
            import ray

            return str(ray.get_runtime_context().get_node_id())

        def call(self, method: str, *arguments: Any) -> Any:
            return getattr(self.object, method)(*arguments)

    return Host
