"""What both planes have in common between an accepted request and an end: jobs, their replicas, retries, logs.

`Job` runs its replicas as pods and moves through phases; a plane subclasses it to say which pods there are, what one
pod gets (`pod_spec`), what a pod's end means (`verdict`), and how the phases are worded. Phases:

    queued → starting → running → succeeded | failed       stopping → stopped       deleting → deleted

with `restarting` while a failed pod, or the whole job, waits to be started again. `starting` turns `running` with the
first pod, as on Lepton, which calls a job Running while not all of its pods are ready. When a job has ended for good, `clean` says which pods are ended with it.
"""

from __future__ import annotations

import random
import string
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .pods import Network, Pod, PodSpec

if TYPE_CHECKING:
    from .plane import Plane

FINISHED = ("succeeded", "failed")
GONE = ("stopped", "deleted")
ALPHABET = string.ascii_lowercase + string.digits


def random_suffix(length: int = 5) -> str:
    """Random characters, as Kubernetes appends them to a name."""
    return "".join(random.choices(ALPHABET, k=length))


@dataclass
class Event:
    """Something that a platform tells about a job besides its state."""

    kind: str  # Normal, Warning
    reason: str
    message: str
    subject: str
    count: int = 1
    time: float = field(default_factory=time.time)


@dataclass
class Replica:
    """One worker (or the master) of a job; `runs` are its container starts, oldest first."""

    role: str
    index: int
    rank: int  # over all roles
    runs: list[Pod] = field(default_factory=list)
    stage: str = "idle"  # then active, then done
    restarts: int = 0

    @property
    def pod(self) -> Pod | None:
        """The current (or last) run."""
        return self.runs[-1] if self.runs else None


class Job:
    """A job and its pods. Everything here runs under the plane's lock."""

    def __init__(self, plane: Plane, name: str, image: str, replicas: list[Replica], parallelism: int) -> None:
        self.plane = plane
        self.name = name
        self.image = image
        self.replicas = replicas
        self.parallelism = parallelism
        self.phase = "queued"
        self.events: list[Event] = []
        self.failures = 0  # whole attempts that failed
        self.created = time.time()
        self.completed: float | None = None
        self.changed = threading.Condition(plane.lock)
        self._network: Network | None = None
        self._attempt = 0  # starts of the whole job; a timer of an older one does nothing

    # -- what a plane says ---------------------------------------------------------------------------------------

    def pod_spec(self, replica: Replica) -> PodSpec:
        """The container of this replica."""
        raise NotImplementedError

    def verdict(self, replica: Replica, pod: Pod) -> str:
        """What the end of a pod means: for itself done, restart or restart-then-fail, or for the whole job restart-all,
        succeed or fail."""
        raise NotImplementedError

    def clean(self) -> Collection[str]:
        """States of pods that are ended with a job that has ended."""
        return ("Waiting", "Running")

    def image_missing(self) -> None:
        """The image cannot be pulled."""

    # -- what a test sees ----------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """The phase in the platform's words."""
        raise NotImplementedError

    @property
    def pods(self) -> list[Pod]:
        """The current pod of each replica that has one, in rank order."""
        return [replica.pod for replica in self.replicas if replica.pod is not None]

    def wait(self, *states: str, timeout: float = 30) -> str:
        """Wait until the job is in one of these states (in the platform's words) and return it."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.state in states, timeout):
                logs = "\n".join(f"--- {pod.name} {pod.state} {pod.message}\n{pod.output[-1500:]}" for pod in self.pods)
                raise TimeoutError(f"{self.name} is {self.state}, not {' or '.join(states)}, after {timeout} s\n{logs}")
            return self.state

    # -- life ----------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Queue the job; it starts when its time in the queue is over."""
        self._reset()
        self.completed = None
        self._become("queued")
        self._later(self.plane.queue_seconds, self._begin)

    def stop(self) -> None:
        """End the pods and keep the job."""
        if self.phase not in FINISHED + GONE:
            self._end_pods("stopping")

    def delete(self) -> None:
        """End the pods and the job."""
        self._end_pods("deleting")

    def close(self) -> None:
        """Nothing is left after this."""
        self._attempt += 1
        for replica in self.replicas:
            for pod in replica.runs:
                pod.close()
        if self._network is not None:
            self._network.close()

    def _begin(self) -> None:
        self._become("starting")
        if self.image in self.plane.missing_images:
            self.event("Warning", "ErrImagePull", f'Failed to pull image "{self.image}": not found')
            self.event("Warning", "ImagePullBackOff", f'Back-off pulling image "{self.image}"')
            self.image_missing()
            return
        self._fill()

    def _fill(self) -> None:
        """Start the replicas that are still to run, up to the parallelism."""
        active = sum(1 for replica in self.replicas if replica.stage == "active")
        for replica in self.replicas:
            if replica.stage == "idle" and active < self.parallelism:
                active += 1
                replica.stage = "active"
                self._run(replica, self.plane.start_delays.get(replica.rank, 0))

    def _run(self, replica: Replica, delay: float = 0) -> None:
        """One more container start of this replica."""
        if self._network is None and self.plane.network == "isolated":
            self._network = Network()
        base = self.plane.root / "pods" / f"{self.name}-{random_suffix(8)}"
        pod = Pod(self.pod_spec(replica), base, self._network, lambda pod: self._heard(replica, pod))
        replica.runs.append(pod)
        self._later(delay, lambda: pod.start() if replica.pod is pod else None)

    def _heard(self, replica: Replica, pod: Pod) -> None:
        """A pod has started or ended (called from the thread that watches it)."""
        with self.plane.lock:
            if not self.plane.closing.is_set() and replica.pod is pod:
                self._react(replica, pod)
            self.changed.notify_all()

    def _react(self, replica: Replica, pod: Pod) -> None:
        if pod.alive:
            if self.phase in ("starting", "restarting"):
                self._become("running")
            return
        if self.phase in ("stopping", "deleting"):
            self._settle()
            return
        if replica.stage != "active":  # of an attempt that is over
            return
        if pod.state == "Failed":
            self.event("Warning", pod.reason or "Error", pod.message or f"exit code {pod.exit_code}", pod.name)
        if self.phase in FINISHED + GONE:
            return
        word = self.verdict(replica, pod)
        if word == "done":
            replica.stage = "done"
            self._fill()
            if all(other.stage == "done" for other in self.replicas):
                self._finish("succeeded")
        elif word == "restart":
            replica.restarts += 1
            if not any(other.alive for other in self.pods):
                self._become("restarting")
            self._later(self.plane.restart_seconds, lambda: self._run(replica) if replica.pod is pod else None)
        elif word == "restart-then-fail":
            replica.restarts += 1
            self._run(replica)
            self._finish("failed")
        elif word == "restart-all":
            self.failures += 1
            self._restart_all()
        else:
            self._finish("succeeded" if word == "succeed" else "failed")

    def _restart_all(self) -> None:
        """End what still runs and start everything again."""
        self._become("restarting")
        self._reset()
        old = [pod for pod in self.pods if pod.alive]
        for pod in old:
            self._end(pod)

        def again() -> None:
            if any(pod.alive for pod in old):
                self._later(0.05, again)
            else:
                self._fill()

        self._later(self.plane.restart_seconds, again)

    def _reset(self) -> None:
        """Every replica is still to run; timers of the attempt before do nothing."""
        self._attempt += 1
        for replica in self.replicas:
            replica.stage, replica.restarts = "idle", 0

    def _finish(self, phase: str) -> None:
        self._attempt += 1
        self.completed = time.time()
        for pod in self.pods:
            if pod.alive and pod.state in self.clean():
                self._end(pod)
        self._become(phase)

    def _end_pods(self, phase: str) -> None:
        self._attempt += 1
        self._become(phase)
        for pod in self.pods:
            if pod.alive:
                self._end(pod)
        self._settle()

    def _end(self, pod: Pod) -> None:
        """SIGTERM and a grace period; a pod that has not started yet never will."""
        if pod.started:
            pod.terminate(self.plane.grace)
        else:
            pod.cancel()

    def _settle(self) -> None:
        """Stopping becomes stopped with the last pod."""
        if not any(pod.alive for pod in self.pods):
            self.completed = self.completed or time.time()
            self._become("stopped" if self.phase == "stopping" else "deleted")

    def _become(self, phase: str) -> None:
        self.phase = phase
        self.changed.notify_all()

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do this later, unless the job has been stopped or restarted by then."""
        attempt = self._attempt
        self.plane.later(seconds, lambda: action() if self._attempt == attempt else None)

    def event(self, kind: str, reason: str, message: str, subject: str = "") -> None:
        """Note something that the platform would tell about this job."""
        self.events.append(Event(kind, reason, message, subject or self.name))
