"""One job on the emulated Lepton: what its pods get, when it is retried, how its state is worded.

Sources: the leptonai SDK 0.27.3, and "Predefined environment variables" of NVIDIA's documentation.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .jobs import Job, Replica, random_suffix
from .pods import Bind, Pod, PodSpec, address
from .rules import expand, expand_environment

if TYPE_CHECKING:
    from .lepton import LeptonEmulator

ALIVE = "alive_only"
STATES = {
    "queued": "Queueing",
    "starting": "Starting",
    "running": "Running",
    "restarting": "Restarting",
    "succeeded": "Completed",
    "failed": "Failed",
    "stopping": "Stopping",
    "stopped": "Stopped",
    "deleting": "Deleting",
    "deleted": "Deleted",
}


class LeptonJob(Job):
    """See jobs.Job."""

    plane: LeptonEmulator

    def __init__(self, plane: LeptonEmulator, name: str, metadata: dict[str, Any], spec: dict[str, Any]) -> None:
        workers = spec.get("completions") or 1
        replicas = [Replica("worker", index, index) for index in range(workers)]
        super().__init__(plane, name, spec["container"]["image"], replicas, spec.get("parallelism") or 1)
        self.metadata = metadata
        self.spec = spec
        self.archived = False
        self.early = False  # its start_at is to come

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Is it more than an entry in the archive?"""
        return self.phase != "deleted" and not self.archived

    @property
    def state(self) -> str:
        if self.phase == "queued" and self.early:
            return "Awaiting"
        return "Archived" if self.archived and self.phase != "deleted" else STATES[self.phase]

    def document(self) -> dict[str, Any]:
        """The job as the API shows it."""
        pods = self.pods
        status = {
            "job_name": self.name,
            "state": self.state,
            "ready": sum(pod.state == "Running" for pod in pods),
            "active": sum(pod.alive for pod in pods),
            "failed": sum(pod.state == "Failed" for replica in self.replicas for pod in replica.runs),
            "succeeded": sum(pod.state == "Succeeded" for pod in pods),
            "creation_time": int(self.created),
            "completion_time": None if self.completed is None else int(self.completed),
            "job_history": [],
        }
        metadata = {"name": self.name, **self.metadata, "id": self.name, "created_at": int(self.created * 1000)}
        return {"metadata": metadata, "spec": self.spec, "status": status}

    def _become(self, phase: str) -> None:
        super()._become(phase)
        if phase in ("succeeded", "failed", "stopped"):
            ttl = self.spec.get("ttl_seconds_after_finished")  # not given: 3 days, longer than an emulator lives
            if ttl is not None:
                self._later(max(0.01, ttl), self._archive)

    def _archive(self) -> None:
        self.archived = True
        self.changed.notify_all()

    # -- retries -------------------------------------------------------------------------------------------------

    def verdict(self, replica: Replica, pod: Pod) -> str:
        if pod.state == "Succeeded":
            return "done"
        worker, job = self.spec.get("max_failure_retry"), self.spec.get("max_job_failure_retry")
        if replica.restarts < (self.plane.worker_retries if worker is None else worker):
            return "restart"
        if self.failures < (self.plane.job_retries if job is None else job):
            return "restart-all"
        return "fail"

    # -- pods ----------------------------------------------------------------------------------------------------

    def node(self, replica: Replica) -> str:
        """The node it runs on."""
        nodes = self._nodes()
        return nodes[replica.rank % len(nodes)] if nodes else ""

    def _nodes(self) -> list[str]:
        affinity = self.spec["affinity"]
        wanted = affinity.get("allowed_nodes_in_node_group") or [
            node for group in affinity["allowed_dedicated_node_groups"] for node in self.plane.nodes[group]
        ]
        return [node for node in wanted if node not in self.plane.unschedulable]

    def _begin(self) -> None:
        reservation = (self.spec.get("reservation_config") or {}).get("reservation_id")
        held = bool(reservation) and self.plane.reservations[reservation]["phase"] != "Reserved"
        self.early = ((self.spec.get("time_schedule") or {}).get("start_at") or 0) > time.time()
        if self._nodes() and not held and not self.early:
            super()._begin()
        else:  # nothing to run on, or not yet: it stays in the queue until there is
            self._later(0.05, self._begin)

    @property
    def subdomain(self) -> str:
        """The name of the job's headless service."""
        return f"{self.name}-job-svc"

    def pod_spec(self, replica: Replica) -> PodSpec:
        spec, hostname = self.spec, f"worker-{replica.index}"
        name = f"{self.name}-{replica.index}-{random_suffix()}"
        env = self._environment(replica, name)
        others = self.replicas if spec.get("intra_job_communication") else [replica]
        hosts = [(f"worker-{other.index}.{self.subdomain}", address(other.rank)) for other in others]
        shared = spec.get("shared_memory_size") or 0
        return PodSpec(
            name=name,
            hostname=hostname,
            argv=[expand(word, env) for word in spec["container"]["command"]],
            env=env,
            image=self.plane.image,
            binds=[self._bind(mount) for mount in spec.get("mounts") or []],
            hosts=[*hosts, (hostname, address(replica.rank))],
            shm_mib=shared or 64,
        )

    def _bind(self, mount: dict[str, Any]) -> Bind:
        folder: Path = self.plane.volumes[mount["from"]] / (mount.get("path") or "/").strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        read_only = bool((mount.get("mount_options") or {}).get("read_only"))
        return Bind(folder, mount["mount_path"], read_only)

    def _environment(self, replica: Replica, name: str) -> dict[str, str]:
        count, kind = accelerators(self.spec["resource_shape"])
        platform = {
            "LEPTON_JOB_NAME": self.name,
            "LEPTON_JOB_SERVICE_PREFIX": self.name,
            "LEPTON_JOB_WORKER_INDEX": str(replica.index),
            "LEPTON_JOB_TOTAL_WORKERS": str(len(self.replicas)),
            "LEPTON_JOB_FAILURE_COUNT": str(self.failures),
            "LEPTON_SUBDOMAIN": self.subdomain,
            "LEPTON_JOB_WORKER_PREFIX": "worker",
            "LEPTON_JOB_WORKER_HOSTNAME_PREFIX": "worker",
            "LEPTON_WORKER_ID": name,
            "LEPTON_WORKSPACE_ID": self.plane.workspace,
            "LEPTON_RESOURCE_ACCELERATOR_NUM": str(count),
            "LEPTON_RESOURCE_ACCELERATOR_TYPE": kind,
            "LEPTON_VIRTUAL_ENV": "/opt/lepton/venv",
        }
        return environment(self.plane, self.spec, platform)


def environment(plane: LeptonEmulator, spec: dict[str, Any], platform: dict[str, str]) -> dict[str, str]:
    """What a container gets: the platform's own variables, then those of its spec, secrets resolved."""
    pairs = [(key, value, True) for key, value in platform.items()]
    for env in spec.get("envs") or []:
        if env.get("value_from"):
            pairs.append((env["name"], plane.secrets[env["value_from"]["secret_name_ref"]], True))
        else:
            pairs.append((env["name"], env.get("value") or "", False))
    return expand_environment(pairs)


def accelerators(shape: str) -> tuple[int, str]:
    """gpu.8xh100-80gb has 8 of the type NVIDIA-H100-80GB; cpu.small has none."""
    found = re.fullmatch(r"gpu\.(?:(\d+)x)?(.+)", shape)
    return (int(found[1] or 1), "NVIDIA-" + found[2].upper()) if found else (0, "")
