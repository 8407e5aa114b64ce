"""The part of the Lepton backend for Ray recipes on a RayCluster, which is created for the run or exists already.

A new cluster has the source in the environment of its nodes. The driver, a job of Ray's REST API behind the cluster's
dashboard, is pod.py, which puts the source on every node before the recipe begins. On an existing cluster, a small
staging job, whose working_dir contains pod.py and the chunks, first leaves them on the head for the driver.

A cluster that was created for a run ends with it: an attached launch deletes it in the end, whatever happens; after
--detach the first `status` that sees the end deletes it, or `cancel`.

nemo-run's LeptonRayCluster and LeptonRayJob are not used. A cluster name with `_` is created under one name and asked
for under another, the job client trusts any certificate, a failed wait passes for a cluster, they take every failed
request for "does not exist yet", set no timeouts, and a RAY_ADDRESS in the launcher's environment wins over the
cluster's address.
"""

import contextlib
import hashlib
import io
import json
import shlex
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypedDict

import screen
from backends import FINAL, GONE, Status
from backends.common import import_nemo, job_name, require_object, sent_by_value
from backends.common.follow import IMAGE_TROUBLE, POLL_S, Follower
from backends.common.lepton_client import ask_lepton, valid
from jobs import Job
from runs import Run
from transport import Plan, Refusal

NAME_LIMIT = 35  # characters of a cluster's name (nemo-run 0.11.1)
STATES = {"PENDING": "waiting", "RUNNING": "running", "SUCCEEDED": "done", "FAILED": "failed", "STOPPED": "cancelled"}
# By run id, the folder on the head of an existing cluster where the source is put: made with mode 0700, by mkdir, which
# fails if it is there.
STAGED = "/tmp/airlift-%s"  # noqa: S108
DASHBOARD_S = 120.0  # how long Ray's job API may take to answer after the cluster is Ready


class Record(TypedDict):
    """What is kept of a run on a Ray cluster."""

    cluster: str  # its name
    made: bool  # created for this run, so that it is deleted with it
    url: str  # of the workspace's API
    ca_bundle: str | None


def submit(run: Run, job: Job, plan: Plan, client: Any, plain: Callable[[str], Any]) -> None:
    """Have a cluster that is Ready, and submit the driver to it. If that fails or is interrupted, all is removed.
    `plain(name)` is the request for a job without Ray, from which the cluster's nodes take their fields."""
    settings = job.settings
    existing = settings.get("existing_ray_cluster")
    name = existing or job_name(job.name, job.run_id, NAME_LIMIT)
    body = None if existing else request(job, name, plain(name))
    run.keep(Record(cluster=name, made=not existing, url=client.url, ca_bundle=settings.get("ca_bundle")))
    try:
        if body is not None:
            create(client, body, name, sent_by_value(job, plan))
        await_ready(client, name, settings["rendezvous_timeout"])
        argv = ["python3", *plan.argv[1:], "driver"]
        if existing:
            stage(client, run, plan)
            argv = ["python3", STAGED % job.run_id + "/pod.py", "driver", STAGED % job.run_id + "/chunks.json"]
        submit_job(client, run, run.id, shlex.join(argv), {})
        nemo = import_nemo()
        title = job_name(job.name, job.run_id, NAME_LIMIT)
        nemo.submit(title, nemo.lepton_executor(job), job.run_id, lambda: (run.id, "Running"))
    except BaseException:
        end(client, run)
        raise


def follow(run: Run, client: Any) -> Status:
    """To the end of the driver, or to Ctrl-C; then the cluster is deleted."""
    try:
        return follower(run, client).follow()
    except KeyboardInterrupt:
        return Status("cancelled", "Ctrl-C")
    finally:
        end(client, run)


def status(run: Run, client: Any) -> Status:
    found = follower(run, client).status()
    if found.state in FINAL:
        end(client, run)
    return found


def cancel(run: Run, client: Any) -> str:
    before = ask(client, run)
    done = end(client, run)
    return "it had already ended (%s); %s" % (before.detail, done) if before.state in FINAL else done


def follower(run: Run, client: Any) -> Follower:
    return Follower(run, partial(ask, client, run), partial(open_log, client, run),
                    lambda: _conditions(read_cluster(client, run.record["cluster"])))


def end(client: Any, run: Run) -> str:
    """Delete the cluster, if it was created for this run, else stop the job on it. Returns what was done."""
    name = run.record["cluster"]
    if run.record["made"]:
        what, call = "delete Ray cluster " + name, lambda: client.raycluster.delete(name)
        done = "Ray cluster %s was deleted" % name
    else:
        what, call = "stop job " + run.id, lambda: ray(client, run, "POST", "/api/jobs/%s/stop" % run.id)
        done = "the job on Ray cluster %s was stopped" % name
    try:
        ask_lepton(what, client, call)
        return done
    except Refusal as refusal:
        if refusal.http == 404:
            return "there was nothing left to remove"
        print(screen.plain("-- %s; %s" % (refusal.what, refusal.fix))[:screen.LONGEST], flush=True)
        return "it may still be running: " + refusal.what


def check(job: Job) -> None:
    """Raises Refusal for what is not possible on a Ray cluster."""
    settings = job.settings
    if settings.get("unpack") == "shared":
        raise Refusal('unpack = "shared" is not possible on a Ray cluster of Lepton',
                      "remove it: each node unpacks a tree of its own there")
    if settings.get("retries"):
        raise Refusal("retries is not possible on a Ray cluster of Lepton", "remove it; Ray can retry its own tasks")
    if settings.get("existing_ray_cluster") and job.secrets:
        raise Refusal("secrets cannot be sent to an existing Ray cluster: " + ", ".join(job.secrets),
                      "set them in that cluster when it is created, and remove [secrets]")
    if not settings.get("existing_ray_cluster") and not settings.get("ray_version"):
        raise Refusal("a Ray cluster on Lepton needs ray_version", "set it to the version of Ray in the image")


def request(job: Job, name: str, plain: Any) -> Any:
    """The LeptonRayCluster to create, like the job `plain`. Raises Refusal (exit code 3) if it is too big."""
    from leptonai.api.v1.types.common import Metadata
    from leptonai.api.v1.types.raycluster import LeptonRayCluster, LeptonRayClusterUserSpec
    settings = job.settings
    fields = plain.spec.model_dump(exclude_none=True, by_alias=True)
    part = {key: fields[key] for key in ("affinity", "envs", "mounts", "shared_memory_size", "reservation_config",
                                        "queue_config") if fields.get(key)}
    head = settings.get("head_resource_shape")
    spec = {
        "image": job.image, "image_pull_secrets": settings.get("image_pull_secrets", []), "suspend": False,
        "ray_version": settings["ray_version"],
        "head_group_spec": part | {"resource_shape": head or settings["resource_shape"], "min_replicas": 1},
        "worker_group_specs": [part | {"resource_shape": settings["resource_shape"], "group_name": "workers",
                                       "min_replicas": job.nodes if head else job.nodes - 1}],
    }
    body = valid("Ray cluster", lambda: LeptonRayCluster(
        metadata=Metadata(id=name, name=name), spec=LeptonRayClusterUserSpec(**spec)))
    require_object("Ray cluster", len(body.model_dump_json(exclude_none=True, by_alias=True)), "lepton")
    return body


def create(client: Any, body: Any, name: str, secrets: tuple[str, ...]) -> None:
    """POST the cluster. It exists already (409) if an answer was lost and the request repeated: names are used once."""
    try:
        ask_lepton("create Ray cluster " + name, client, lambda: client.raycluster.create(body), name, secrets)
    except Refusal as refusal:
        if refusal.http != 409:
            raise


def await_ready(client: Any, name: str, patience: float) -> None:
    """Wait until head and workers run. Raises Refusal (exit code 4) if they do not within `patience` seconds."""
    last, begun = "", time.monotonic()
    while True:
        cluster = read_cluster(client, name)
        state = cluster.status.state.value if cluster.status else "Unknown"
        if state != last:
            after = time.monotonic() - begun
            print(screen.plain("-- Ray cluster %s is %s after %.0f s" % (name, state, after)), flush=True)
        last = state
        if state == "Ready":
            return
        why = _conditions(cluster)
        if IMAGE_TROUBLE.search(why):
            raise Refusal("the image cannot be pulled: " + why, "correct container_image or the pull secrets", 4)
        if state in ("Deleting", "Stopping", "Stopped"):
            raise Refusal("Ray cluster %s is %s" % (name, state), "start it in the console, or name another", 4)
        if time.monotonic() - begun > patience:
            raise Refusal("Ray cluster %s is still %s after %.0f s%s" % (name, state, patience, why and ": " + why),
                          "check that the node group has free nodes, or raise rendezvous_timeout", 4)
        time.sleep(POLL_S)


def read_cluster(client: Any, name: str) -> Any:
    return ask_lepton("read Ray cluster " + name, client, lambda: client.raycluster.get(name))


def _conditions(cluster: Any) -> str:
    """What keeps a cluster from being Ready."""
    conditions = (cluster.status.conditions if cluster.status else None) or []
    return screen.said("; ".join("%s: %s" % (c.reason, c.message) for c in conditions if c.status != "True"))


def ray(client: Any, run: Run, method: str, path: str, **body: Any) -> Any:
    """An answer of the dashboard's API. Raises the SDK's error for an answer of 400 or more, and those of requests."""
    from leptonai.api.v1.api_resource import ClientError, ServerError
    url = "%s/rayclusters/%s/dashboard%s" % (client.url, run.record["cluster"], path)
    headers = {"Authorization": "Bearer " + (client.token() or ""), "origin": client.get_dashboard_base_url() or ""}
    response = client._session.request(method, url, headers=headers, **body)
    if response.status_code >= 400:
        raise (ClientError if response.status_code < 500 else ServerError)(response)
    return response.json() if response.content else {}


def submit_job(client: Any, run: Run, name: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
    """Run a command on the head. A new dashboard is retried for a while. Raises Refusal."""
    body = {"entrypoint": entrypoint, "submission_id": name, "runtime_env": runtime_env}
    deadline = time.monotonic() + DASHBOARD_S
    while True:
        try:
            ask_lepton("submit job " + name, client, lambda: ray(client, run, "POST", "/api/jobs/", json=body), name)
            return
        except Refusal as refusal:
            with contextlib.suppress(Refusal):
                details(client, run, name)
                return  # it exists: the answer was lost
            if refusal.code != 5 or time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def stage(client: Any, run: Run, plan: Plan) -> None:
    """Put pod.py and the chunks on the head of an existing cluster. Raises Refusal."""
    chunks = {name: value for name, value in plan.env.items() if name.startswith("AIRLIFT_")}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr("pod.py", plan.program)
        package.writestr("chunks.json", json.dumps(chunks))
    data = buffer.getvalue()
    package_name = "_ray_pkg_%s.zip" % hashlib.sha1(data).hexdigest()  # noqa: S324 - Ray's own name for it
    path = "/api/packages/gcs/" + package_name
    ask_lepton("upload the source", client, lambda: ray(client, run, "PUT", path, data=data))
    name, folder = run.id + "-stage", STAGED % run.id
    script = "umask 077; mkdir %s && cp pod.py chunks.json %s/" % (folder, folder)  # what is there is not ours
    submit_job(client, run, name, script, {"working_dir": "gcs://" + package_name})
    deadline = time.monotonic() + DASHBOARD_S
    while (found := details(client, run, name))["status"] in ("PENDING", "RUNNING"):
        if time.monotonic() > deadline:
            raise Refusal("the source was not put on Ray cluster %s within %d s" % (run.record["cluster"], DASHBOARD_S),
                          "check whether the cluster is busy", 4)
        time.sleep(POLL_S)
    if found["status"] != "SUCCEEDED":
        why = screen.said(str(found.get("message") or found["status"]))
        raise Refusal("the source could not be put on Ray cluster %s: %s" % (run.record["cluster"], why),
                      "see the job's log there", 4)


def details(client: Any, run: Run, name: str) -> Any:
    return ask_lepton("read job " + name, client, lambda: ray(client, run, "GET", "/api/jobs/" + name))


def ask(client: Any, run: Run) -> Status:
    try:
        found = details(client, run, run.id)
    except Refusal as refusal:
        if refusal.http == 404:
            return Status("cancelled", GONE, gone=True)
        raise
    word = screen.said(str(found["status"]))
    return Status(STATES.get(word, "waiting"), word)


def open_log(client: Any, run: Run, rank: int, on: bool) -> Iterator[str] | None:
    """The driver's log, so far or as it grows; the other nodes have none."""
    def read() -> Iterator[str]:
        shown, over, path = 0, False, "/api/jobs/%s/logs" % run.id
        while not over:
            over = not on or ask(client, run).state in FINAL  # before the log is read, so that it is complete then
            text = ask_lepton("read the log", client, lambda: ray(client, run, "GET", path))["logs"]
            yield text[shown:]
            shown = len(text)
            time.sleep(0 if over else POLL_S)

    return None if rank else read()
