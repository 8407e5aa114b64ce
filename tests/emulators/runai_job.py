"""One workload on the emulated run:AI: what its pods get, when it is retried, how its phase is worded.

Sources: run:AI's public documentation, its official client runapy 1.224.0, and Kubeflow's training-operator v1.9 for
distributed PyTorch, which run:AI is taken to use as it is (see runai.py).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from .jobs import Event, Job, Replica, random_suffix
from .pods import Bind, Pod, PodSpec, address
from .rules import expand, expand_environment

if TYPE_CHECKING:
    from .runai import RunaiEmulator

PORT = "23456"  # Kubeflow's pytorchjob-port
BACKOFF_LIMIT = 6
PHASES = {
    "queued": "Pending",
    "starting": "Initializing",
    "running": "Running",
    "restarting": "Running",  # its pods are in CrashLoopBackOff, which is no phase of the workload
    "succeeded": "Completed",
    "failed": "Failed",
    "stopping": "Stopping",
    "stopped": "Stopped",
    "deleting": "Deleting",
    "deleted": "Deleted",
}


class RunaiJob(Job):
    """A workspace, a training or a distributed training; see jobs.Job. `request` is what the client sent."""

    plane: RunaiEmulator

    def __init__(self, plane: RunaiEmulator, kind: str, name: str, request: dict[str, Any]) -> None:
        self.kind = kind
        self.request = request
        self.id = str(uuid.uuid4())
        self.spec: dict[str, Any] = request["spec"]
        self.master = bool(request.get("masterSpecSameAsWorker") or request.get("masterSpec"))
        self.elastic = self.spec.get("minReplicas") is not None
        workers = self.spec["numWorkers"] if kind == "distributed" else 1
        replicas = [Replica("master", 0, 0)] if self.master else []
        replicas += [Replica("worker", index, index + len(replicas)) for index in range(workers)]
        super().__init__(plane, name, self.spec["image"], replicas, len(replicas))
        self.project = plane.projects[request["projectId"]]
        self.namespace = plane.namespaces.get(self.project, "runai-" + self.project)
        self.framework = "pytorch" if kind == "distributed" else "runai"
        self.container = "pytorch" if kind == "distributed" else name
        self.cluster_type = "workspace" if kind == "workspaces" else "training"
        self.uids = {replica.rank: str(uuid.uuid4()) for replica in replicas}
        self.binds: dict[str, list[Bind]] = {}

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        waiting = [replica for replica in self.replicas if replica.pod is None or replica.pod.state == "Waiting"]
        if self.phase == "running" and any(len(replica.runs) < 2 for replica in waiting):
            return "Initializing"  # Running is for workloads all of whose pods have started
        return PHASES[self.phase]

    @property
    def gpus(self) -> int:
        """How many it asks for in all."""
        return sum((self._spec_of(r).get("compute") or {}).get("gpuDevicesRequest") or 0 for r in self.replicas)

    def document(self) -> dict[str, Any]:
        """The workload as the API shows it."""
        desired = {"stopping": "Stopped", "stopped": "Stopped", "deleting": "Deleted"}.get(self.phase, "Running")
        document = {
            "name": self.name,
            "requestedName": self.request["name"],
            "workloadId": self.id,
            "projectId": self.request["projectId"],
            "clusterId": self.request["clusterId"],
            "createdBy": self.plane.client_id,
            "createdAt": timestamp(self.created),
            "desiredPhase": desired,
            "actualPhase": self.state,
            "spec": self.spec,
        }
        if self.kind == "distributed":
            document["masterSpecSameAsWorker"] = bool(self.request.get("masterSpecSameAsWorker"))
            document["masterSpec"] = self.request.get("masterSpec")
        return document

    def event_document(self, event: Event) -> dict[str, Any]:
        """An event as the API shows it."""
        return {
            "createdAt": timestamp(event.time),
            "type": event.kind,
            "clusterId": self.request["clusterId"],
            "message": event.message,
            "reason": event.reason,
            "source": "kubelet",
            "involvedObject": {"kind": "Pod", "name": event.subject, "namespace": self.namespace, "uid": self.id},
        }

    def image_missing(self) -> None:
        self._finish("failed")

    # -- retries -------------------------------------------------------------------------------------------------

    def verdict(self, replica: Replica, pod: Pod) -> str:
        policy = self.spec.get("restartPolicy") or ("OnFailure" if self.kind == "distributed" else "Never")
        limit = self.spec.get("backoffLimit")
        limit = BACKOFF_LIMIT if limit is None else limit
        if pod.state == "Succeeded" and policy != "Always":
            if self.kind == "distributed" and (replica.role == "master" or (self.elastic and not self.master)):
                return "succeed"
            return "done"
        if policy == "Never":
            if self.kind == "distributed":
                return "fail"
            return "restart" if replica.restarts < limit else "fail"
        restarts = sum(other.restarts for other in self.replicas) + 1
        return "restart-then-fail" if restarts >= max(1, limit) else "restart"

    def clean(self) -> Collection[str]:
        if self.kind == "distributed" and (self.spec.get("cleanPodPolicy") or "None") == "None":
            return ()
        return ("Waiting", "Running")

    # -- pods ----------------------------------------------------------------------------------------------------

    def _spec_of(self, replica: Replica) -> dict[str, Any]:
        master: dict[str, Any] | None = self.request.get("masterSpec")
        return master if replica.role == "master" and master else self.spec

    def pod_name(self, replica: Replica) -> str:
        """Also its hostname."""
        return f"{self.name}-{replica.role}-{replica.index}" if self.kind == "distributed" else f"{self.name}-0-0"

    def _begin(self) -> None:
        if self.plane.waits:  # it stays Pending
            self._later(0.05, self._begin)
            return
        for entry in self.spec.get("imagePullSecrets") or []:
            if not entry.get("userCredential") and entry["name"] not in self.plane.secrets:
                self._become("starting")  # and that is how it stays
                self.event("Warning", "FailedToRetrieveImagePullSecret", f"Unable to retrieve {entry['name']}")
                return
        for replica in self.replicas:
            for entry in self._spec_of(replica).get("environmentVariables") or []:
                for kind, known in (("secret", self.plane.secrets), ("configMap", self.plane.config_maps)):
                    reference = entry.get(kind)
                    if reference and reference.get("key") not in known.get(reference.get("name"), {}):
                        self._become("starting")  # and that is how it stays: CreateContainerConfigError
                        self.event("Warning", "Failed", f"Error: {kind} {reference} not found", self.pod_name(replica))
                        return
        super()._begin()

    def claim_volumes(self) -> None:
        """Find the PVCs; one that is not said to exist, and does not, is made, new and empty."""
        for role, spec in {replica.role: self._spec_of(replica) for replica in self.replicas}.items():
            self.binds[role] = []
            for pvc in (spec.get("storage") or {}).get("pvc") or []:
                if not pvc.get("exclude"):
                    claim = pvc.get("claimName") or f"{self.name}-{random_suffix()}"
                    if claim not in self.plane.claims:
                        self.plane.claims[claim] = self.plane.volume(claim)
                    self.binds[role].append(Bind(self.plane.claims[claim], pvc["path"], bool(pvc.get("readOnly"))))

    def pod_spec(self, replica: Replica) -> PodSpec:
        spec, name = self._spec_of(replica), self.pod_name(replica)
        env = self._environment(replica)
        large = (spec.get("compute") or {}).get("largeShmRequest")
        return PodSpec(
            name=name,
            hostname=name,
            argv=[expand(word, env) for word in self.plane.words(spec)],
            env=env,
            image=self.plane.image,
            binds=self.binds[replica.role],
            hosts=[(self.pod_name(other), address(other.rank)) for other in self.replicas],
            workdir=spec.get("workingDir"),
            shm_mib=4096 if large else 64,
        )

    def _environment(self, replica: Replica) -> dict[str, str]:
        spec = self._spec_of(replica)
        own = {
            "JOB_NAME": self.name,
            "JOB_UUID": self.id,
            "POD_INDEX": str(replica.index),
            "POD_UUID": self.uids[replica.rank],
            "NODE_NAME": f"node-{replica.rank}",
            "RUNAI_NUM_OF_GPUS": str((spec.get("compute") or {}).get("gpuDevicesRequest") or 0),
        }
        pairs = [(name, value, True) for name, value in own.items()]
        for entry in spec.get("environmentVariables") or []:
            if not entry.get("exclude"):
                pairs.append((entry["name"], *self._value(entry, replica)))
        if self.kind == "distributed":
            pairs += [(name, value, True) for name, value in self._kubeflow(replica).items()]
        return expand_environment(pairs)

    def _value(self, entry: dict[str, Any], replica: Replica) -> tuple[str, bool]:
        """The value of an environment entry, and whether Kubernetes leaves it as it is."""
        tables = {
            "secret": self.plane.secrets,
            "configMap": self.plane.config_maps,
            "userCredential": self.plane.credentials,
        }
        for source, table in tables.items():
            if entry.get(source):
                return table[entry[source]["name"]][entry[source]["key"]], True
        if entry.get("podFieldRef"):
            fields = {
                "metadata.name": self.pod_name(replica),
                "metadata.namespace": self.namespace,
                "metadata.uid": self.uids[replica.rank],
                "spec.nodeName": f"node-{replica.rank}",
                "status.podIP": address(replica.rank),
            }
            return fields[entry["podFieldRef"]["path"]], True
        return entry["value"], False

    def _kubeflow(self, replica: Replica) -> dict[str, str]:
        """What the training operator adds; with no master and no elastic policy that is next to nothing."""
        env = {"PET_NPROC_PER_NODE": "auto", "PET_NNODES": str(len(self.replicas))}
        if self.master:
            host = f"{self.name}-master-0"
            env |= {"MASTER_ADDR": host, "MASTER_PORT": PORT, "PET_MASTER_ADDR": host, "PET_MASTER_PORT": PORT}
            env |= {"WORLD_SIZE": str(len(self.replicas)), "RANK": str(replica.rank)}
            env["PET_NODE_RANK"] = str(replica.rank)
        if self.elastic:
            env["PET_RDZV_ENDPOINT"] = f"{self.name}-worker-0:{PORT}"
            env["PET_RDZV_BACKEND"] = "c10d"
            env["PET_NNODES"] = f"{self.spec['minReplicas']}:{self.spec['maxReplicas']}"
        return env


def timestamp(seconds: float) -> str:
    """RFC 3339."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
