"""An emulated DGX Cloud Lepton: its routes, rules, states and pods, on loopback, as nemo-run 0.11.1 and the leptonai
SDK 0.27.3 use them and NVIDIA's documentation tells them.

    with LeptonEmulator(root=tmp_path) as server:
        os.environ.update(server.env())         # the real, unmodified leptonai SDK then finds it
        ...
        job = server.jobs["my-job"]             # job.state, job.spec, job.pods, job.wait("Completed")
        job.pods[1].kill()                      # a node fails
        server.fault("status", status=429, method="POST", path="/jobs$", retry_after=1)

Where those are silent the emulator is on the hostile side, so that a client which relies on luck fails here:

- Retries that are not given are not zero: a failed worker is started again (`worker_retries` times), then the whole
  job (`job_retries` times). With max_failure_retry and max_job_failure_retry both 0 the first failure ends the job.
  (NVIDIA's configuration page says "defaults to zero" of the dashboard's first field; nothing says it of the API.)
- The names of other workers resolve only with intra_job_communication.
- An image that cannot be pulled leaves the job Starting for ever; only /jobs/{id}/events tells.
- A finished job is Archived when its ttl is over: no longer alive, and its state no longer says how it ended.
- A worker that was started again is a new replica; the list has the old one too, oldest first.
- Every env name that begins with LEPTON_ is refused, and so is a name that comes twice.

A RayCluster has a real Ray head and real workers; see lepton_ray.py.
"""

from __future__ import annotations

import posixpath
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .fields import LEPTON_JOB
from .lepton_job import ALIVE, LeptonJob
from .lepton_ray import RayCluster, RayClusters
from .plane import Plane, not_started
from .rules import check, check_env_names, check_object_size
from .server import Refusal, Reply, Request, Route

JOB_NAME = re.compile(r"[a-z]([a-z0-9-]{0,34}[a-z0-9])?")
SHAPE = re.compile(r"cpu\.[a-z0-9]+|gpu\.(\d+x)?[a-z][a-z0-9-]*")
PRIORITY = re.compile(r"(low|mid|high)-[1-9]000")
MODES = ("alive_only", "archive_only", "alive_and_archive")
LIST_QUERY = ("page", "page_size", "job_query_mode", "q", "query", "status", "node_groups", "created_by")
LOG_QUERY = ("job", "replica", "start", "end", "timestamps", "direction", "limit", "q", "job_query_mode")
LOG_PAGE = 10_000  # lines of one answer at most
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
RESERVED_PATHS = frozenset((
    "/", "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/media", "/opt", "/proc", "/proc/bus", "/proc/sys", "/run",
    "/sbin", "/srv", "/sys", "/sys/fs/cgroup", "/sys/kernel/security", "/usr", "/usr/bin", "/usr/lib", "/usr/local",
    "/usr/sbin", "/var"))
DEFAULT_GROUPS: Mapping[str, Sequence[str]] = {"default-group": ("node-a", "node-b", "node-c", "node-d")}


class LeptonEmulator(RayClusters, Plane):
    """The control plane; see the top of this file, and plane.Plane for the parameters that both planes have.

    node_groups: {name: node ids}; volumes: {what a mount's `from` says: folder} (default: node-nfs:shared, made under
    root); secrets: {name: value}; unschedulable: nodes that take no pods (a set, to change at any time); reservations:
    {id: {"phase": …, "nodes": …, "begin": …, "end": …}}, of any group; keeps_pods: whether ended pods stay with their logs.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        *,
        node_groups: Mapping[str, Sequence[str]] = DEFAULT_GROUPS,
        reservations: Mapping[str, Mapping[str, Any]] | None = None,
        volumes: Mapping[str, Path] | None = None,
        secrets: Mapping[str, str] | None = None,
        worker_retries: int = 6,
        job_retries: int = 1,
        workspace: str = "ws0",
        token: str = "lepton-emulator-token",
        **options: Any,
    ) -> None:
        self.base = f"/api/v2/workspaces/{workspace}"
        super().__init__(root, **options)
        self.workspace = workspace
        self.token = token
        self.foreign_token = "token-of-another-workspace"  # valid, but not here: 403
        self.groups = {f"{name}-{zlib.crc32(name.encode()) & 0xFFFF:04x}": name for name in node_groups}
        self.nodes = {group: list(node_groups[name]) for group, name in self.groups.items()}
        self.unschedulable: set[str] = set()
        self.reservations = {"res-1": {"phase": "Reserved", "nodes": 4}} if reservations is None else dict(reservations)
        self.keeps_pods = True
        self.volumes = {"node-nfs:shared": self.volume("shared")} if volumes is None else dict(volumes)
        self.secrets = dict(secrets or {})
        self.shapes = ["cpu.small", "cpu.large", "gpu.1xh100-80gb", "gpu.8xh100-80gb"]
        self.worker_retries = worker_retries
        self.job_retries = job_retries
        self.clusters: dict[str, RayCluster] = {}
        self.jobs: dict[str, LeptonJob] = {}  # by id; a deleted job stays until its name is used again

    def env(self) -> dict[str, str]:
        return {
            "LEPTON_WORKSPACE_ID": self.workspace,
            "LEPTON_WORKSPACE_TOKEN": self.token,
            "LEPTON_WORKSPACE_URL": self.url,
            "LEPTON_WORKSPACE_ORIGIN_URL": self.origin,
        }

    def routes(self) -> list[Route]:
        mode = ("job_query_mode",)
        return [
            Route("GET", "/dedicated-node-groups", self._list_groups),
            Route("GET", "/dedicated-node-groups/{group}", self._get_group),
            Route("GET", "/dedicated-node-groups/{group}/nodes", self._list_nodes, ("idle",)),
            Route("GET", "/dedicated-node-groups/{group}/reservations", self._list_reservations),
            Route("GET", "/usersecrets", self._list_secrets),
            Route("GET", "/shapes", self._list_shapes, ("node_groups", "purpose")),
            Route("POST", "/jobs", self._create),
            Route("GET", "/jobs", self._list_jobs, LIST_QUERY),
            Route("GET", "/jobs/{id}", self._get, mode),
            Route("PATCH", "/jobs/{id}", self._patch),
            Route("DELETE", "/jobs/{id}", self._delete, mode),
            Route("GET", "/jobs/{id}/events", self._events),
            Route("GET", "/jobs/{id}/replicas", self._replicas, mode),
            Route("GET", "/jobs/{id}/replicas/{replica}/log", self._log),
            Route("GET", "/logs", self._logs, LOG_QUERY),
            *self.rayclusters(),
        ]

    def rayclusters(self) -> list[Route]:
        """Clusters, and the proxy to each one's own dashboard."""
        return [
            Route("POST", "/rayclusters", self.create_cluster),
            Route("GET", "/rayclusters", self.list_clusters),
            Route("GET", "/rayclusters/{name}", self.get_cluster),
            Route("PATCH", "/rayclusters/{name}", self.patch_cluster),
            Route("DELETE", "/rayclusters/{name}", self.delete_cluster),
            *(Route(method, "/rayclusters/{name}/dashboard/{path*}", self.pass_on) for method in ("GET", "POST", "PUT")),
        ]

    def check_metadata(self, metadata: dict[str, Any]) -> None:
        name = metadata.get("id") or ""
        if not JOB_NAME.fullmatch(name) or name.endswith("by-lepton"):
            raise Refusal(400, f'invalid job name "{name}": at most 36 of [a-z0-9-], a letter first, no "-" at the end')
        for label in metadata.get("labels") or {}:
            if not LABEL.fullmatch(label):
                raise Refusal(400, f'invalid label key "{label}"')

    def check_group(self, group: dict[str, Any]) -> None:
        if not SHAPE.fullmatch(group.get("resource_shape", "")):
            raise Refusal(400, f'unknown resource_shape "{group.get("resource_shape", "")}"')
        self._check_affinity(group.get("affinity") or {})
        self._check_envs(group.get("envs") or [])
        self._check_mounts(group.get("mounts") or [])

    def check_size(self, body: Any) -> None:
        check_object_size(body, self.object_limit)

    def authorize(self, request: Request) -> None:
        header = {name.lower(): value for name, value in request.headers.items()}.get("authorization", "")
        if header == f"Bearer {self.foreign_token}":
            raise Refusal(403, f"the token has no access to workspace {self.workspace}")
        if header != f"Bearer {self.token}":
            raise Refusal(401, "invalid or expired token" if header else "missing bearer token")

    def error_body(self, status: int, message: str, path: str) -> Any:
        codes = {400: "InvalidRequest", 401: "Unauthorized", 403: "Forbidden", 404: "ResourceNotFound"}
        codes |= {409: "ResourceConflict", 413: "RequestEntityTooLarge", 429: "TooManyRequests"}
        return {"code": codes.get(status, "InternalError"), "message": message}

    def answer(self, request: Request) -> Reply:
        if request.path.startswith("/api/v2/workspaces/"):  # the base has been cut off: this is another workspace's
            return Reply(403, self.error_body(403, "no access to this workspace", request.path))
        return super().answer(request)

    # -- node groups and secrets ---------------------------------------------------------------------------------

    def _list_groups(self, request: Request) -> Reply:
        return Reply(body=[self._group(group) for group in self.groups])

    def _get_group(self, request: Request) -> Reply:
        return Reply(body=self._group(self._known_group(request.params["group"])))

    def _list_nodes(self, request: Request) -> Reply:
        nodes = self.nodes[self._known_group(request.params["group"])]
        if request.one("idle") == "true":
            with self.lock:
                jobs = [job for job in self.jobs.values() if job.phase in ("starting", "running", "restarting")]
                used = {job.node(replica) for job in jobs for replica in job.replicas}
            nodes = [node for node in nodes if node not in used | self.unschedulable]
        return Reply(body=[self._node(request.params["group"], node) for node in nodes])

    def _list_reservations(self, request: Request) -> Reply:
        self._known_group(request.params["group"])
        return Reply(body=[{
            "metadata": {"id": name, "name": "the " + name},
            "spec": {"time_rule": {"start_timestamp": each.get("begin"), "end_timestamp": each.get("end")}},
            "status": {"phase": each["phase"], **({"reserved_count": each["nodes"]} if each.get("nodes") else {})},
        } for name, each in self.reservations.items()])

    def _list_secrets(self, request: Request) -> Reply:
        return Reply(body=[{"name": name} for name in self.secrets])

    def _list_shapes(self, request: Request) -> Reply:
        self._known_group(request.one("node_groups"))
        return Reply(body=[{"metadata": {"id": name, "name": name}, "spec": {"name": name}} for name in self.shapes])

    def _known_group(self, group: str) -> str:
        if group not in self.groups:
            raise Refusal(404, f'dedicated node group "{group}" not found')
        return group

    def _group(self, group: str) -> dict[str, Any]:
        ready = [node for node in self.nodes[group] if node not in self.unschedulable]
        volumes = [{"from": "nfs", "name": name.partition(":")[2], "size_in_gb": 1} for name in self.volumes]
        return {
            "metadata": {"id": group, "name": self.groups[group], "created_at": 0},
            "spec": {"workspaces": [self.workspace], "volumes": volumes, "desired_nodes": len(self.nodes[group])},
            "status": {"ready_nodes": len(ready)},
        }

    def _node(self, group: str, node: str) -> dict[str, Any]:
        closed = node in self.unschedulable
        return {
            "metadata": {"id": node, "name": node},
            "spec": {"dedicated_node_group": group, "unschedulable": closed},
            "status": {"status": ["Unschedulable" if closed else "Ready"], "workloads": []},
        }

    # -- jobs ----------------------------------------------------------------------------------------------------

    def _create(self, request: Request) -> Reply:
        body = request.json()
        if not isinstance(body, dict) or not body.get("spec") or not body.get("metadata"):
            raise Refusal(400, "metadata and spec are required")
        check(body, LEPTON_JOB, "job")
        name = body["metadata"].get("id") or ""
        self.check_metadata(body["metadata"])
        spec = {key: value for key, value in body["spec"].items() if value is not None}
        self._check_spec(spec)
        check_object_size(body, self.object_limit)
        with self.lock:
            if name in self.jobs and self.jobs[name].alive:
                raise Refusal(409, f'job "{name}" already exists')
            job = LeptonJob(self, name, body["metadata"], spec)
            self.jobs[name] = job
            self.everything.append(job)
            job.launch()
            return Reply(201, job.document())

    def _check_spec(self, spec: dict[str, Any]) -> None:
        if not SHAPE.fullmatch(spec.get("resource_shape", "")):
            raise Refusal(400, f'unknown resource_shape "{spec.get("resource_shape", "")}"')
        container = spec.get("container") or {}
        if not container.get("image") or not container.get("command"):
            raise Refusal(400, "container.image and container.command are required")
        for count in ("completions", "parallelism"):
            if spec.get(count, 1) < 1:
                raise Refusal(400, f"{count} must be positive")
        for count in ("max_failure_retry", "max_job_failure_retry", "ttl_seconds_after_finished", "shared_memory_size"):
            if spec.get(count, 0) < 0:
                raise Refusal(400, f"{count} must not be negative")
        size = (spec.get("segment_config") or {}).get("count_per_segment", 1)
        if size < 1 or spec.get("completions", 1) % size:
            raise Refusal(400, f"segments of {size} workers do not divide {spec.get('completions', 1)}")
        reservation = (spec.get("reservation_config") or {}).get("reservation_id")
        if reservation and reservation not in self.reservations:
            raise Refusal(400, f'reservation "{reservation}" not found')
        queue = spec.get("queue_config") or {}
        if queue.get("priority_class") and not PRIORITY.fullmatch(queue["priority_class"]):
            raise Refusal(400, f'unknown priority_class "{queue["priority_class"]}"')
        self._check_affinity(spec.get("affinity") or {})
        self._check_envs(spec.get("envs") or [])
        self._check_mounts(spec.get("mounts") or [])

    def _check_affinity(self, affinity: dict[str, Any]) -> None:
        groups = affinity.get("allowed_dedicated_node_groups") or []
        if not groups:
            raise Refusal(400, "affinity.allowed_dedicated_node_groups is required")
        for group in groups:
            if group not in self.groups:
                raise Refusal(400, f'node group "{group}" not found')
        known = {node for group in groups for node in self.nodes[group]}
        for node in affinity.get("allowed_nodes_in_node_group") or []:
            if node not in known:
                raise Refusal(400, f'node "{node}" is not in the node groups {", ".join(groups)}')

    def _check_envs(self, envs: list[dict[str, Any]]) -> None:
        check_env_names(envs, "envs")
        for env in envs:
            if env["name"].startswith("LEPTON_"):
                raise Refusal(400, f'env name "{env["name"]}" is reserved')
            source = env.get("value_from")
            if source is not None and env.get("value") is not None:
                raise Refusal(400, f'env "{env["name"]}" has both value and value_from')
            if source is not None and source.get("secret_name_ref") not in self.secrets:
                raise Refusal(400, f'secret "{source.get("secret_name_ref")}" not found')

    def _check_mounts(self, mounts: list[dict[str, Any]]) -> None:
        targets: set[str] = set()
        for number, mount in enumerate(mounts):
            where = f"mounts[{number}]"
            for key in ("from", "mount_path"):
                if not mount.get(key):
                    raise Refusal(400, f"{where}.{key} is required")
            if mount["from"] not in self.volumes:
                raise Refusal(400, f'{where}: unknown volume "{mount["from"]}"')
            if ".." in Path(mount.get("path") or "/").parts:
                raise Refusal(400, f"{where}.path must not contain ..")
            target = mount["mount_path"].rstrip("/")
            if posixpath.normpath("/" + target.lstrip("/")) in RESERVED_PATHS:
                raise Refusal(400, f'{where}.mount_path "{target or "/"}" is reserved')
            if not target.startswith("/") or target in targets:
                raise Refusal(400, f"{where}.mount_path must be an absolute path other than / that no other mount has")
            targets.add(target)

    def _find(self, request: Request, default: str = "alive_and_archive") -> LeptonJob:
        mode = request.one("job_query_mode", default)
        if mode not in MODES:
            raise Refusal(400, f'unknown job_query_mode "{mode}"')
        job = self.jobs.get(request.params["id"])
        if job is None or (mode != "alive_and_archive" and job.alive != (mode == ALIVE)):
            raise Refusal(404, f'job "{request.params["id"]}" not found')
        return job

    def _get(self, request: Request) -> Reply:
        with self.lock:
            return Reply(body=self._find(request, ALIVE).document())

    def _list_jobs(self, request: Request) -> Reply:
        mode = request.one("job_query_mode", ALIVE)
        if mode not in MODES:
            raise Refusal(400, f'unknown job_query_mode "{mode}"')
        page, size = request.number("page", 1, 1), request.number("page_size", 20, 1)
        with self.lock:
            jobs = [job for job in self.jobs.values() if mode == "alive_and_archive" or job.alive == (mode == ALIVE)]
            jobs = [job for job in jobs if request.one("q") in job.name]
            jobs = [job for job in jobs if job.state in request.query.get("status", [job.state])]
            jobs.sort(key=lambda job: -job.created)
            shown = [job.document() for job in jobs[(page - 1) * size : page * size]]
        return Reply(body={"jobs": shown, "total": len(jobs)})

    def _patch(self, request: Request) -> Reply:
        body = request.json()
        check(body, {"spec": {"stopped": bool}}, "patch")
        with self.lock:
            job = self._find(request, ALIVE)
            stopped = ((body or {}).get("spec") or {}).get("stopped")
            if stopped is None:
                raise Refusal(400, "only spec.stopped can be changed")
            job.spec["stopped"] = stopped
            if stopped:
                job.stop()
            elif job.phase == "stopped":
                job.launch()
            return Reply(body=job.document())

    def _delete(self, request: Request) -> Reply:
        with self.lock:
            self._find(request, ALIVE).delete()
        return Reply(body={})

    def _events(self, request: Request) -> Reply:
        with self.lock:
            events = list(self._find(request).events)
        return Reply(
            body=[
                {
                    "type": event.kind,
                    "reason": event.reason,
                    "regarding": {"kind": "Pod", "name": event.subject},
                    "count": event.count,
                    "last_observed_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(event.time)),
                }
                for event in events
            ]
        )

    def _logs(self, request: Request) -> Reply:
        """The log store: it has what pods printed also when they are gone. One stream for each pod; a line's time is
        that of its pod's start and its number. The newest lines first, `end` not included."""
        if not request.one("start") or not request.one("end") or request.one("direction", "backward") != "backward":
            raise Refusal(400, "start and end are required, and only direction=backward is emulated")
        begin, end = request.number("start", 0), request.number("end", 0)
        with self.lock:
            job = self.jobs.get(request.one("job"))
            pods = [pod for replica in job.replicas for pod in replica.runs if pod.started] if job else []
        if job is None:
            raise Refusal(404, f'job "{request.one("job")}" not found')
        wanted = [pod for pod in pods if request.one("replica", pod.name) == pod.name]
        lines = [(int(job.created * 10**9) + number * 1000 + place, line, pod.name) for place, pod in enumerate(wanted)
                 for number, line in enumerate(pod.output.splitlines())]
        lines = sorted((line for line in lines if begin <= line[0] < end), reverse=True)
        lines = lines[:min(request.number("limit", 5000, 1), LOG_PAGE)]
        streams = [{"stream": {"job": job.name, "pod_name": pod.name},
                    "values": [[str(moment), line] for moment, line, name in lines if name == pod.name]}
                   for pod in wanted]
        return Reply(body={"status": "success", "data": {"resultType": "streams", "result": streams}})

    def _replicas(self, request: Request) -> Reply:
        with self.lock:
            job = self._find(request)
            runs = [(replica, pod) for replica in job.replicas for pod in replica.runs if self._stays(job, pod)]
        return Reply(
            body=[
                {
                    "id": pod.name,
                    "metadata": {"id": pod.name},
                    "status": {"node": {"id": job.node(replica), "name": job.node(replica)}},
                }
                for replica, pod in runs
            ]
        )

    def _stays(self, job: LeptonJob, pod: Any) -> bool:
        """Whether a pod is still there: with the job's end in the archive, its pods are gone."""
        return not job.archived and (self.keeps_pods or pod.alive or not pod.started)

    def _log(self, request: Request) -> Reply:
        with self.lock:
            job = self._find(request)
            wanted = request.params["replica"]
            found = [pod for replica in job.replicas for pod in replica.runs if pod.name == wanted]
            found = [pod for pod in found if self._stays(job, pod)]
            if not found:
                raise Refusal(404, f'replica "{wanted}" of job "{job.name}" not found')
            if not found[0].started:
                raise not_started(wanted)
        return Reply(stream=self.follow(found[0]))
