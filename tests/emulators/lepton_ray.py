"""One RayCluster on the emulated Lepton: a real Ray head and real Ray workers in pods, and the way to their dashboard.

What a pod gets is what KubeRay gives: the image, the group's envs and mounts, and a command of the platform's own. The
cluster is Ready when each `ray start` has said so and the dashboard answers; a pod that ends is started again.
"""

from __future__ import annotations

import ctypes
import http.client
import threading
from typing import TYPE_CHECKING, Any

from .fields import LEPTON_RAYCLUSTER
from .jobs import Job, Replica
from .lepton_job import environment
from .pods import CLONE_NEWNET, Bind, Pod, PodSpec, address
from .rules import check
from .server import Refusal, Reply, Request

if TYPE_CHECKING:
    from .lepton import LeptonEmulator

GCS, DASHBOARD = 6379, 8265


class RayCluster(Job):
    """See jobs.Job. `dashboard` passes a request on to Ray's own job API."""

    plane: LeptonEmulator

    def __init__(self, plane: LeptonEmulator, name: str, metadata: dict[str, Any], spec: dict[str, Any]) -> None:
        workers = sum(group.get("min_replicas") or 0 for group in spec["worker_group_specs"])
        replicas = [Replica("head", 0, 0)] + [Replica("worker", index, index + 1) for index in range(workers)]
        super().__init__(plane, name, spec.get("image") or "", replicas, workers + 1)
        self.metadata, self.spec = metadata, spec

    @property
    def state(self) -> str:
        if self.phase in ("deleting", "deleted"):
            return "Deleting"
        if self.phase in ("stopping", "stopped"):
            return "Stopping" if self.phase == "stopping" else "Stopped"
        up = [pod.state == "Running" and "Ray runtime started." in pod.output for pod in self.pods]
        if len(up) == len(self.replicas) and all(up) and self._answers():
            return "Ready"
        return "Starting" if self.phase in ("queued", "starting") else "Not Ready"

    def _answers(self) -> bool:
        try:
            return self.dashboard("GET", "/api/version", b"", "").status == 200
        except OSError:
            return False

    def document(self) -> dict[str, Any]:
        """The cluster as the API shows it."""
        failed = [event for event in self.events if event.kind == "Warning"]
        conditions = [{"type": "HeadPodReady", "status": "False", "reason": event.reason, "message": event.message,
                       "lastTransitionTime": ""} for event in failed]
        status = {"state": self.state, "conditions": conditions, "desiredWorkerReplicas": len(self.replicas) - 1}
        return {"metadata": {**self.metadata, "id": self.name}, "spec": self.spec, "status": status}

    def verdict(self, replica: Replica, pod: Pod) -> str:
        return "restart"

    def grow(self, workers: int) -> None:
        """More workers: they join the cluster that runs."""
        for index in range(len(self.replicas) - 1, workers):
            self.replicas.append(Replica("worker", index, index + 1))
        self.parallelism = len(self.replicas)
        self._fill()

    def pod_spec(self, replica: Replica) -> PodSpec:
        group = self.spec["head_group_spec"] if replica.role == "head" else self.spec["worker_group_specs"][0]
        here = address(replica.rank)
        words = ["ray", "start", "--block", f"--node-ip-address={here}", "--disable-usage-stats", "--num-cpus=2",
                 "--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0",
                 f"--dashboard-agent-listen-port={52365 + replica.rank}"]
        if replica.role == "head":
            words += ["--head", f"--port={GCS}", "--dashboard-host=127.0.0.1", f"--dashboard-port={DASHBOARD}"]
        else:  # KubeRay waits for the head in an init container
            head = f"{address(0)}:{GCS}"
            words = ["sh", "-c", f"until ray health-check --address {head} 2>/dev/null; do sleep 0.2; done; "
                                 f"exec {' '.join(words)} --address={head}"]
        pairs = {"RAY_AUTH_MODE": "disabled", "RAY_CLUSTER_NAME": self.name}
        return PodSpec(
            name=f"{self.name}-{replica.role}-{replica.index}-{len(replica.runs)}",
            hostname=f"{self.name}-{replica.role}-{replica.index}",
            argv=words,
            env=environment(self.plane, group, pairs),
            image=self.plane.image,
            binds=[self._bind(mount) for mount in group.get("mounts") or []],
            hosts=[(f"{self.name}-{other.role}-{other.index}", address(other.rank)) for other in self.replicas],
            shm_mib=group.get("shared_memory_size") or 256,
        )

    def _bind(self, mount: dict[str, Any]) -> Bind:
        folder = self.plane.volumes[mount["from"]] / (mount.get("path") or "/").strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        return Bind(folder, mount["mount_path"], False)

    # -- the dashboard ---------------------------------------------------------------------------------------------

    def dashboard(self, method: str, path: str, body: bytes, kind: str) -> Reply:
        """One request to Ray's own API, from a thread in the cluster's network. Raises OSError."""
        found: list[Any] = []

        def ask() -> None:
            try:
                if ctypes.CDLL(None, use_errno=True).setns(self._network.fd, CLONE_NEWNET) != 0:  # type: ignore[union-attr]
                    raise OSError(ctypes.get_errno(), "enter the cluster's network")
                connection = http.client.HTTPConnection("127.0.0.1", DASHBOARD, timeout=30)
                connection.request(method, path, body or None, {"Content-Type": kind} if kind else {})
                answer = connection.getresponse()
                found.append((answer.status, answer.read()))
                connection.close()
            except (OSError, http.client.HTTPException) as error:
                found.append(OSError(str(error)))

        if self._network is None:
            raise OSError("the cluster has no network yet")
        thread = threading.Thread(target=ask)  # setns() changes this one thread only
        thread.start()
        thread.join()
        if isinstance(found[0], OSError):
            raise found[0]
        status, data = found[0]
        return Reply(status, stream=iter([data] if data else []))


class RayClusters:
    """The routes' part of the emulator."""

    def create_cluster(self: Any, request: Request) -> Reply:
        body = request.json()
        check(body, LEPTON_RAYCLUSTER, "raycluster")
        name = (body.get("metadata") or {}).get("id") or ""
        spec = body.get("spec") or {}
        self.check_metadata(body.get("metadata") or {})
        if not spec.get("ray_version") or not spec.get("head_group_spec") or not spec.get("worker_group_specs"):
            raise Refusal(400, "ray_version, head_group_spec and worker_group_specs are required")
        for group in [spec["head_group_spec"], *spec["worker_group_specs"]]:
            self.check_group(group)
        self.check_size(body)
        with self.lock:
            if name in self.clusters and self.clusters[name].phase != "deleted":
                raise Refusal(409, f'ray cluster "{name}" already exists')
            cluster = RayCluster(self, name, body["metadata"], spec)
            self.clusters[name] = cluster
            self.everything.append(cluster)
            cluster.launch()
            return Reply(201, {"metadata": cluster.metadata, "spec": spec, "status": {"state": "Starting"}})

    def find_cluster(self: Any, request: Request) -> RayCluster:
        cluster: RayCluster | None = self.clusters.get(request.params["name"])
        if cluster is None or cluster.phase in ("deleting", "deleted"):
            raise Refusal(404, f'ray cluster "{request.params["name"]}" not found')
        return cluster

    def list_clusters(self: Any, request: Request) -> Reply:
        with self.lock:
            return Reply(body=[cluster.document() for cluster in self.clusters.values() if cluster.phase != "deleted"])

    def get_cluster(self: Any, request: Request) -> Reply:
        return Reply(body=self.find_cluster(request).document())

    def patch_cluster(self: Any, request: Request) -> Reply:
        body = request.json()
        check(body, {"spec": {"worker_group_specs": [{"group_name": str, "min_replicas": int}], "suspend": bool}}, "patch")
        with self.lock:
            cluster = self.find_cluster(request)
            if body["spec"].get("suspend"):
                cluster.stop()
            for group in body["spec"].get("worker_group_specs") or []:
                cluster.grow(group["min_replicas"])
            return Reply(body=cluster.document())

    def delete_cluster(self: Any, request: Request) -> Reply:
        with self.lock:
            self.find_cluster(request).delete()
        return Reply(body={})

    def pass_on(self: Any, request: Request) -> Reply:
        cluster = self.find_cluster(request)
        kind = {name.lower(): value for name, value in request.headers.items()}.get("content-type", "")
        try:
            reply: Reply = cluster.dashboard(request.method, "/" + request.params["path"], request.body, kind)
            return reply
        except OSError as error:
            raise Refusal(503, f"no healthy upstream: {error}") from None
