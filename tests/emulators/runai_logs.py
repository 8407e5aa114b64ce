"""The two ways to a pod's log on run:AI, each of which a site may lack; the control plane has no log route.

Kubernetes       GET {kube_apiserver_url}/api/v1/namespaces/<the project's>/pods/<pod>/log?container=pytorch
                 container may be left out; follow, previous, tailLines. Switched off: 403, as for lack of a right.
the cluster API  at the cluster's own address, the `domain` of GET /clusters, not at the control plane's:
                 GET /cluster-api/api/v1/<project>/workloads/training/pytorch/<name>/logs/download
                 (training/runai for a standard training, workspace/runai), and /cluster-api/status. Its query
                 parameters are not known here: none is taken, and it gives the first pod's. Switched off: 404.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .plane import not_started
from .pods import Pod
from .runai_job import RunaiJob
from .server import Refusal, Reply, Request, Route

if TYPE_CHECKING:
    from .runai import RunaiEmulator

KUBE = "/kube"
CLUSTER = "/cluster-api"
KUBE_LOG = KUBE + "/api/v1/namespaces/{namespace}/pods/{pod}/log"
CLUSTER_LOG = CLUSTER + "/api/v1/{project}/workloads/{type}/{framework}/{name}/logs/download"


def log_routes(plane: RunaiEmulator) -> list[Route]:
    """All of them; those that are switched off say no."""
    return [
        Route("GET", KUBE_LOG, lambda r: kube_log(plane, r), ("container", "follow", "previous", "tailLines")),
        Route("GET", KUBE + "/version", lambda r: kube_version(plane, r)),
        Route("GET", CLUSTER + "/status", lambda r: cluster_status(plane, r)),
        Route("GET", CLUSTER_LOG, lambda r: cluster_log(plane, r)),
    ]


def on_cluster(plane: RunaiEmulator, request: Request) -> bool:
    host = {name.lower(): value for name, value in request.headers.items()}.get("host", "")
    return plane.cluster_origin.endswith("//" + host)


def kube_log(plane: RunaiEmulator, request: Request) -> Reply:
    """The current (or the previous) container of a pod."""
    name, namespace = request.params["pod"], request.params["namespace"]
    if not plane.kube_logs:
        raise Refusal(403, f'pods "{name}" is forbidden: cannot get resource "pods/log" in namespace "{namespace}"')
    with plane.lock:
        job, runs = find_runs(plane, namespace, name)
    if request.one("container", job.container) != job.container:
        raise Refusal(400, f"container {request.one('container')} is not valid for pod {name}")
    previous = request.one("previous", "false") == "true"
    if previous and len(runs) < 2:
        raise Refusal(400, f'previous terminated container in pod "{name}" not found')
    pod = runs[-2] if previous else runs[-1]
    if not pod.started:
        raise not_started(name)
    follow = request.one("follow", "false") == "true"
    if "tailLines" in request.query:
        return Reply(stream=tail(plane, pod, request.number("tailLines", 0), follow))
    return Reply(stream=plane.follow(pod, follow))


def tail(plane: RunaiEmulator, pod: Pod, lines: int, follow: bool) -> Iterator[bytes]:
    """The last lines, and what comes after them."""
    seen = pod.log.read_bytes()
    skip = len(seen) - len(b"".join(seen.splitlines(True)[-lines:] if lines else []))
    for block in plane.follow(pod, follow):
        if len(block) > skip:
            yield block[skip:]
        skip = max(0, skip - len(block))


def find_runs(plane: RunaiEmulator, namespace: str, name: str) -> tuple[RunaiJob, list[Pod]]:
    """The workload that has a pod of this name, and that pod's container starts."""
    for job in plane.jobs.values():
        if job.phase not in ("deleted", "stopped") and job.namespace == namespace:
            for replica in job.replicas:
                if job.pod_name(replica) == name and replica.runs:
                    return job, replica.runs
    raise Refusal(404, f'pods "{name}" not found')


def kube_version(plane: RunaiEmulator, request: Request) -> Reply:
    """Is the Kubernetes API there?"""
    if not plane.kube_logs:
        raise Refusal(403, 'forbidden: cannot get path "/version"')
    return Reply(body={"major": "1", "minor": "31"})


def cluster_status(plane: RunaiEmulator, request: Request) -> Reply:
    """Is the cluster API there?"""
    if not plane.cluster_logs or not on_cluster(plane, request):
        raise Refusal(404, "404 page not found")
    return Reply(stream=iter([b"OK"]))


def cluster_log(plane: RunaiEmulator, request: Request) -> Reply:
    """What the workload's first pod has printed."""
    if not plane.cluster_logs or not on_cluster(plane, request):
        raise Refusal(404, "404 page not found")
    wanted = request.params
    for job in plane.jobs.values():
        where = (job.project, job.cluster_type, job.framework, job.name)
        if where == (wanted["project"], wanted["type"], wanted["framework"], wanted["name"]) and job.pods:
            if not job.pods[0].started:
                raise not_started(job.pods[0].name)
            return Reply(stream=plane.follow(job.pods[0], follow=False))
    raise Refusal(404, f"workload {wanted['name']} not found")
