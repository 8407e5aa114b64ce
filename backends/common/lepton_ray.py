"""The Lepton backend's other half: Ray recipes on a RayCluster, made for the run or there already.

A cluster that is made carries the source in the environment of its head and workers; the driver, a job of Ray's own
REST API behind the cluster's dashboard, is pod.py, which puts the source on every node before the recipe begins. A
cluster that is there already has no such environment: a small staging job, whose working_dir holds pod.py and the
chunks, leaves them on the head, where the driver then finds them. Neither driver has anything in its runtime_env.

What a run made ends with it: an attached launch deletes its cluster at the end, however that comes; after --detach the
first `status` or `logs` that sees the end does, or `cancel`.

The run is a job of a nemo-run Experiment, as any other. Its LeptonRayCluster and LeptonRayJob are not used: of what
they do, nothing could stay (18, 19, 20 of the design's facts/nemo_run.md; every failed question is taken for "not there
yet", no request has a timeout, and a RAY_ADDRESS in the launcher's environment wins over the cluster's address).
"""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

from backends import FINAL, GONE, Status
from backends.common import import_nemo
from backends.common.bodies import job_name, require_object, sent_by_value
from backends.common.follow import IMAGE_TROUBLE, POLL_S, Follower
from backends.common.lepton_client import asked
from jobs import Job
from runs import Run
from transport import Plan, Refusal

NAME_LIMIT = 35  # characters of a cluster's name (nemo-run 0.11.1)
STATES = {"PENDING": "waiting", "RUNNING": "running", "SUCCEEDED": "done", "FAILED": "failed", "STOPPED": "cancelled"}
STAGED = "/tmp/airlift-%s"  # where the source is left on a head that has no environment of ours, by run id
DASHBOARD_S = 120.0  # for a cluster that is Ready to answer as Ray's job API, too


class Record(TypedDict):
    """What is remembered of a run on a Ray cluster."""

    cluster: str  # its name
    made: bool  # for this run, so that it goes with it
    url: str  # of the workspace's API
    ca_bundle: str | None


# ---------------------------------------------------------------- what launch.py calls


def submit(run: Run, job: Job, plan: Plan, client: Any, plain: Callable[[str], Any]) -> None:
    """A cluster that is Ready, and the driver's job on it. Whatever goes wrong or is interrupted, nothing stays.
    `plain(name)` is the request for a job without Ray, whose fields the cluster's nodes take over."""
    settings = job.settings
    existing = settings.get("existing_ray_cluster")
    name = existing or job_name(job.name, job.run_id, NAME_LIMIT)
    body = None if existing else request(job, name, plain(name))
    run.keep(Record(cluster=name, made=not existing, url=client.url, ca_bundle=settings.get("ca_bundle")))
    try:
        if body is not None:
            create(client, body, name, sent_by_value(job, plan))
        await_ready(client, name, settings["rendezvous_timeout"])
        if existing:
            stage(client, run, plan)
        words = ["python3", *plan.argv[1:], "driver"]
        if existing:
            words = ["python3", STAGED % job.run_id + "/pod.py", "driver", STAGED % job.run_id + "/chunks.json"]
        submit_job(client, run, run.id, shlex.join(words), {})
        nemo = import_nemo()

        title = job_name(job.name, job.run_id, NAME_LIMIT)
        nemo.submit(title, nemo.lepton_executor(job), job.run_id, lambda: (run.id, "Running"))
    except BaseException:
        end(client, run)
        raise


def follow(run: Run, client: Any) -> Status:
    """To the end of the driver, and of what was made for it; Ctrl-C is an end as well."""
    try:
        found: Status = follower(run, client).follow()
        return found
    except KeyboardInterrupt:
        return Status("cancelled", "Ctrl-C")
    finally:
        end(client, run)


def status(run: Run, client: Any) -> Status:
    following = follower(run, client)
    found: Status = following.explain(following.ask())
    if found.state in FINAL:
        end(client, run)
    return found


def cancel(run: Run, client: Any) -> str:
    before = ask(client, run)
    said = end(client, run)
    return "it had already ended (%s); %s" % (before.detail, said) if before.state in FINAL else said


def follower(run: Run, client: Any) -> Any:
    return Follower(run, lambda: ask(client, run), lambda rank, on: open_log(client, run, rank, on),
                    lambda: trouble(client, run.record["cluster"]))


def end(client: Any, run: Run) -> str:
    """Delete the cluster, if it was made for this run, else stop the job on it. One sentence: what was done."""
    name = run.record["cluster"]
    if run.record["made"]:
        what, call = "delete Ray cluster " + name, lambda: client.raycluster.delete(name)
        done = "Ray cluster %s was deleted" % name
    else:
        what, call = "stop job " + run.id, lambda: ray(client, run, "POST", "/api/jobs/%s/stop" % run.id)
        done = "the job on Ray cluster %s was stopped" % name
    try:
        asked(what, client, call)
        return done
    except Refusal as refusal:
        if refusal.http == 404:
            return "nothing of it was left"
        print("-- %s; %s" % (refusal.what, refusal.fix), flush=True)
        return "it may go on: " + refusal.what


# ---------------------------------------------------------------- the cluster


def check(job: Job) -> None:
    """What a Ray cluster cannot have, found before anything is sent. Raises Refusal."""
    settings = job.settings
    if settings.get("unpack") == "shared":
        raise Refusal('unpack = "shared" is not for a Ray cluster on Lepton', "each node gets a tree of its own there")
    if settings.get("retries"):
        raise Refusal("retries is not for a Ray cluster on Lepton", "take it out; Ray's own tasks may be retried")
    if settings.get("existing_ray_cluster") and job.secrets:
        raise Refusal("secrets cannot be given to a Ray cluster that is there already: " + ", ".join(job.secrets),
                      "give them to that cluster when it is made, and take [secrets] out")
    if not settings.get("existing_ray_cluster") and not settings.get("ray_version"):
        raise Refusal("a Ray cluster on Lepton needs ray_version", "set it to the version of Ray in the image")


def request(job: Job, name: str, plain: Any) -> Any:
    """The LeptonRayCluster to create, like the job `plain`. Raises Refusal (exit code 3) where it is too big."""
    from leptonai.api.v1.types.common import Metadata
    from leptonai.api.v1.types.raycluster import LeptonRayCluster, LeptonRayClusterUserSpec
    from pydantic import ValidationError

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
    try:
        body = LeptonRayCluster(metadata=Metadata(id=name, name=name), spec=LeptonRayClusterUserSpec(**spec))
    except ValidationError as error:
        first = error.errors()[0]
        raise Refusal("the Ray cluster does not fit Lepton's API: %s: %s"
                      % (".".join(map(str, first["loc"])), first["msg"]), "mend it in the profile") from None
    require_object("Ray cluster", len(body.model_dump_json(exclude_none=True, by_alias=True)), "lepton")
    return body


def create(client: Any, body: Any, name: str, secrets: tuple[str, ...]) -> None:
    """POST it. That it is there already is no error: our names are never used twice, so an answer got lost."""
    try:
        asked("create Ray cluster " + name, client, lambda: client.raycluster.create(body), name, secrets)
    except Refusal as refusal:
        if refusal.http != 409:
            raise


def await_ready(client: Any, name: str, patience: float) -> None:
    """Until head and workers run. Raises Refusal (exit code 4) for what will never become Ready, or not in time."""
    last, begun = "", time.monotonic()
    while True:
        cluster = asked("read Ray cluster " + name, client, lambda: client.raycluster.get(name))
        word = cluster.status.state.value if cluster.status else "Unknown"
        if word != last:
            print("-- Ray cluster %s is %s after %.0f s" % (name, word, time.monotonic() - begun), flush=True)
        last = word
        if word == "Ready":
            return
        said = _conditions(cluster)
        if IMAGE_TROUBLE.search(said):
            raise Refusal("the image cannot be pulled: " + said[:300], "mend container_image or the pull secrets", 4)
        if word in ("Deleting", "Stopping", "Stopped"):
            raise Refusal("Ray cluster %s is %s" % (name, word), "start it in the console, or name another", 4)
        if time.monotonic() - begun > patience:
            raise Refusal("Ray cluster %s is still %s after %.0f s%s" % (name, word, patience, said and ": " + said),
                          "look whether the node group has room, or raise rendezvous_timeout", 4)
        time.sleep(POLL_S)


def _conditions(cluster: Any) -> str:
    conditions = (cluster.status.conditions if cluster.status else None) or []
    return "; ".join("%s: %s" % (c.reason, c.message) for c in conditions if c.status != "True")


def trouble(client: Any, name: str) -> str:
    return _conditions(asked("read Ray cluster " + name, client, lambda: client.raycluster.get(name)))


# ---------------------------------------------------------------- Ray's job API


def ray(client: Any, run: Run, method: str, path: str, **body: Any) -> Any:
    """An answer of the dashboard's API. Raises the SDK's error for one of 400 and more, and requests' own."""
    from leptonai.api.v1.api_resource import ClientError, ServerError

    url = "%s/rayclusters/%s/dashboard%s" % (client.url, run.record["cluster"], path)
    headers = {"Authorization": "Bearer " + (client.token() or ""), "origin": client.get_dashboard_base_url() or ""}
    response = client._session.request(method, url, headers=headers, **body)
    if response.status_code >= 400:
        raise (ClientError if response.status_code < 500 else ServerError)(response)
    return response.json() if response.content else {}


def submit_job(client: Any, run: Run, name: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
    """Have the head run a command. A new dashboard may need a moment. Raises Refusal."""
    body = {"entrypoint": entrypoint, "submission_id": name, "runtime_env": runtime_env}
    deadline = time.monotonic() + DASHBOARD_S
    while True:
        try:
            asked("submit job " + name, client, lambda: ray(client, run, "POST", "/api/jobs/", json=body), name)
            return
        except Refusal as refusal:
            if known(client, run, name):  # its answer got lost
                return
            if refusal.code != 5 or time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def known(client: Any, run: Run, name: str) -> bool:
    try:
        asked("look for job " + name, client, lambda: ray(client, run, "GET", "/api/jobs/" + name))
        return True
    except Refusal:
        return False


def stage(client: Any, run: Run, plan: Plan) -> None:
    """Leave pod.py and the chunks on the head of a cluster that lacks our environment. Raises Refusal."""
    chunks = {name: value for name, value in plan.env.items() if name.startswith("AIRLIFT_")}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr("pod.py", plan.program)
        package.writestr("chunks.json", json.dumps(chunks))
    data = buffer.getvalue()
    package_name = "_ray_pkg_%s.zip" % hashlib.sha1(data).hexdigest()
    path = "/api/packages/gcs/" + package_name
    asked("upload the source", client, lambda: ray(client, run, "PUT", path, data=data))
    name, folder = run.id + "-stage", STAGED % run.id
    script = "umask 077; mkdir %s && cp pod.py chunks.json %s/" % (folder, folder)  # what is there is not ours
    submit_job(client, run, name, script, {"working_dir": "gcs://" + package_name})
    deadline = time.monotonic() + DASHBOARD_S
    while (found := details(client, run, name))["status"] in ("PENDING", "RUNNING"):
        if time.monotonic() > deadline:
            raise Refusal("the source was not put on Ray cluster %s within %d s" % (run.record["cluster"], DASHBOARD_S),
                          "look whether it is busy", 4)
        time.sleep(POLL_S)
    if found["status"] != "SUCCEEDED":
        raise Refusal("the source could not be put on Ray cluster %s: %s"
                      % (run.record["cluster"], found.get("message") or found["status"]), "see the job's log there", 4)


def details(client: Any, run: Run, name: str) -> dict[str, Any]:
    found: dict[str, Any] = asked("read job " + name, client,
                                         lambda: ray(client, run, "GET", "/api/jobs/" + name))
    return found


def ask(client: Any, run: Run) -> Status:
    try:
        found = details(client, run, run.id)
    except Refusal as refusal:
        if refusal.http == 404:
            return Status("cancelled", GONE, gone=True)
        raise
    return Status(STATES.get(found["status"], "waiting"), found["status"])


def open_log(client: Any, run: Run, rank: int, on: bool) -> Iterator[str] | None:
    """The driver's log, so far or as it comes; the other nodes have none of their own."""
    if rank:
        return None
    read: Callable[[], str] = lambda: asked(  # noqa: E731
        "read the log", client, lambda: ray(client, run, "GET", "/api/jobs/%s/logs" % run.id))["logs"]
    return _growing(client, run, read) if on else iter([read()])


def _growing(client: Any, run: Run, read: Callable[[], str]) -> Iterator[str]:
    shown = 0
    while True:
        over = ask(client, run).state in FINAL  # before the log is read: then it is whole
        text = read()
        if text[shown:]:
            yield text[shown:]
        shown = len(text)
        if over:
            return
        time.sleep(POLL_S)
