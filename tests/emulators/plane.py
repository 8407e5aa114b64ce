"""The server with what every job needs, on both planes: the image, volumes, timers, logs, the clean-up."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from .jobs import Job
from .pods import Image, Pod, why_not
from .server import HttpServer, Refusal


class Plane(HttpServer):
    """A control plane with pods behind it.

    root: where volumes, logs and the pods' mount points lie (a temporary folder when not given).
    path, image_env, hide: what the containers find: their PATH, more environment, and names of tools or paths that the
    image lacks (or `image`, see pods.Image, for all of it); missing_images: names that cannot be pulled.
    network: "isolated" (each job a network of its own, with nothing else in it) or "host".
    queue_seconds: time in the queue; start_delays: {rank: seconds} until a pod starts, as slow nodes do;
    restart_seconds: pause before a retry; grace: seconds between SIGTERM and SIGKILL; object_limit: of one object.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        *,
        port: int = 0,
        image: Image | None = None,
        path: str | None = None,
        image_env: Mapping[str, str] | None = None,
        hide: Sequence[str] = (),
        missing_images: Collection[str] = (),
        network: str = "isolated",
        queue_seconds: float = 0,
        start_delays: Mapping[int, float] | None = None,
        restart_seconds: float = 0.1,
        grace: float = 2.0,
        object_limit: int = 1536 * 1024,
    ) -> None:
        reason = why_not()
        if reason is not None:
            raise RuntimeError(reason)
        super().__init__(port)
        self._temporary = root is None
        self.root = Path(tempfile.mkdtemp(prefix="emulator-") if root is None else root).resolve()
        plain = Image()
        self.image = image or Image(path or plain.path, {**plain.env, **(image_env or {})}, hide)
        self.missing_images = set(missing_images)
        self.network = network
        self.queue_seconds = queue_seconds
        self.start_delays = dict(start_delays or {})
        self.restart_seconds = restart_seconds
        self.grace = grace
        self.object_limit = object_limit
        self.everything: list[Job] = []  # also what has been deleted
        self._timers: set[threading.Timer] = set()

    def env(self) -> dict[str, str]:
        """What a client exports to find this plane."""
        raise NotImplementedError

    def volume(self, name: str) -> Path:
        """The folder behind a volume, made when it is new."""
        folder = self.root / "volumes" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something under the lock, at once or after a while."""

        def act() -> None:
            with self.lock:
                self._timers.discard(timer)
                if not self.closing.is_set():
                    action()

        if seconds <= 0:
            with self.lock:
                if not self.closing.is_set():
                    action()
            return
        timer = threading.Timer(seconds, act)
        timer.daemon = True
        self._timers.add(timer)
        timer.start()

    def follow(self, pod: Pod, follow: bool = True) -> Iterator[bytes]:
        """A pod's log to its end, as it comes; without `follow`, what there is. It may be cut inside a letter."""
        with pod.log.open("rb") as file:
            while True:
                ended = not pod.alive
                block = file.read(65536)
                if block:
                    yield block
                elif ended or not follow or self.closing.is_set():
                    return
                else:
                    time.sleep(0.02)

    def close(self) -> None:
        """End every pod and leave nothing behind but the files under a root that was given."""
        super().close()
        with self.lock:
            for timer in list(self._timers):
                timer.cancel()
            jobs = list(self.everything)
        for job in jobs:
            job.close()
        if self._temporary:
            shutil.rmtree(self.root, ignore_errors=True)


def not_started(name: str) -> Refusal:
    """What Kubernetes answers when the log of a pod is asked for too early."""
    return Refusal(400, f'container in pod "{name}" is waiting to start: ContainerCreating')
