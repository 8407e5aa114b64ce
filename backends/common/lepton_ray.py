"""The part of the Lepton backend for Ray recipes on a RayCluster, which is created for the run or exists already.

A new cluster has the source in the environment of its nodes. The driver, a job of Ray's REST API behind the cluster's
dashboard, is pod.py, which puts the source on every node before the recipe begins. On an existing cluster, a small
staging job, whose working_dir contains pod.py and the chunks, first leaves them on the head for the driver.

A cluster that was created for a run ends with it: an attached launch deletes it in the end, whatever happens; after
--detach the first `status` or `logs -f` that sees the job's end deletes it, or `cancel`. An answer that the dashboard
does not give is no end: the job's own API knows nothing while the cluster comes up, or while its head starts again.

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
import signal
import time
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypedDict

import screen
from backends import FINAL, GONE, Status, require_about
from backends.common import job_name, record, require_object, sent_by_value, with_custom
from backends.common.follow import IMAGE_TROUBLE, POLL_S, Follower
from backends.common.lepton_client import ask_lepton, checked, read, require_known, valid
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
    submitted: bool  # the driver


LAUNCHED: set[str] = set()  # runs that this process has launched: their clusters do not outlive it


def _ended(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def submit(run: Run, job: Job, plan: Plan, client: Any, plain: Callable[[str], Any]) -> None:
    """Have a cluster that is Ready, and submit the driver to it. If that fails or is interrupted, all is removed.
    `plain(name)` is the request for a job without Ray, from which the cluster's nodes take their fields."""
    settings = job.settings
    existing = settings.get("existing_ray_cluster")
    name = existing or job_name(job.name, job.run_id, NAME_LIMIT)
    body = None if existing else request(job, name, plain(name))
    run.keep(Record(cluster=name, made=not existing, url=client.url, ca_bundle=settings.get("ca_bundle"),
                    submitted=False))
    LAUNCHED.add(run.id)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ended)
    try:
        if body is not None:
            create(client, body, name, sent_by_value(job, plan))
        await_ready(client, name, settings["rendezvous_timeout"])
        argv = ["python3", *plan.argv[1:], "driver"]
        if existing:
            stage(client, run, plan)
            argv = ["python3", STAGED % job.run_id + "/pod.py", "driver", STAGED % job.run_id + "/chunks.json"]
        submit_job(client, run, run.id, shlex.join(argv), {})
        run.keep({"submitted": True})
        title = job_name(job.name, job.run_id, NAME_LIMIT)
        record(title, lambda nemo, job: nemo.lepton_executor(job), job, (run.id, "Running"))
    except BaseException:
        end(client, run)
        raise


def follow(run: Run, client: Any) -> Status:
    """To the end of the driver; then the cluster is deleted, by the process that launched it in any case."""
    found = None
    try:
        found = follower(run, client).follow()
        return found
    except KeyboardInterrupt:
        if run.id not in LAUNCHED:
            raise
        return Status("cancelled", "Ctrl-C")
    finally:
        if run.id in LAUNCHED or _over(found):
            end(client, run)


def status(run: Run, client: Any) -> Status:
    found = follower(run, client).status()
    if _over(found):
        end(client, run)
    return found


def _over(found: Status | None) -> bool:
    return bool(found and found.state in FINAL and not found.gone)


def cancel(run: Run, client: Any) -> str:
    """Raises Refusal. That a cluster is deleted needs no dashboard."""
    if run.record["made"]:
        return _removed(client, run)
    before, done = ask(client, run), _removed(client, run)
    return "it had already ended (%s); %s" % (before.detail, done) if before.state in FINAL else done


def follower(run: Run, client: Any) -> Follower:
    return Follower(run, partial(ask, client, run), partial(open_log, client, run),
                    lambda: _state(read_cluster(client, run.record["cluster"]))[1])


def end(client: Any, run: Run) -> None:
    """As _removed; where that fails it is said, and nothing else."""
    try:
        _removed(client, run)
    except Refusal as refusal:
        print(screen.plain("-- it may still be running: %s; %s" % (refusal.what, refusal.fix))[:screen.LONGEST],
              flush=True)


def _removed(client: Any, run: Run) -> str:
    """Delete the cluster, if it was created for this run, else stop the job on it. Says what was done. Raises
    Refusal."""
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
        raise


def check(job: Job, plain: Callable[[str], Any]) -> None:
    """Raises Refusal for what is not possible on a Ray cluster. `plain` as for submit."""
    settings = job.settings
    if settings.get("unpack") == "shared":
        raise Refusal('unpack = "shared" is not possible on a Ray cluster of Lepton',
                      "remove it: each node unpacks a tree of its own there")
    if settings.get("retries"):
        raise Refusal("retries is not possible on a Ray cluster of Lepton", "remove it; Ray can retry its own tasks")
    if settings.get("existing_ray_cluster") and job.secrets:
        raise Refusal("secrets cannot be sent to an existing Ray cluster: " + ", ".join(job.secrets),
                      "set them in that cluster when it is created, and remove [secrets]")
    odd = [name for name, value in settings["env_vars"].items() if "$" in value]
    if settings.get("existing_ray_cluster") and odd:  # in a runtime_env, the only way to the workers there
        raise Refusal("env_vars.%s has a $, which Ray would replace on the nodes of an existing cluster" % odd[0],
                      "set it in startup_commands, where only the driver needs it")
    if settings.get("existing_ray_cluster") and settings.get("custom_spec"):
        raise Refusal("custom_spec has no effect on an existing Ray cluster", "remove it")
    if not settings.get("existing_ray_cluster") and not settings.get("ray_version"):
        raise Refusal("a Ray cluster on Lepton needs ray_version", "set it to the version of Ray in the image")
    if settings.get("custom_spec"):
        request(job, job.run_id, plain(job.run_id))


GROUPS = ("head_group_spec", "worker_group_specs")
OURS = ("resource_shape", "min_replicas", "max_replicas", "group_name", "container.command")


def request(job: Job, name: str, plain: Any) -> Any:
    """The LeptonRayCluster to create, like the job `plain`. A field of custom_spec that the cluster has is the
    cluster's, any other head's and workers', unless it stands in one of GROUPS. Raises Refusal, with exit code 3 if it
    is too big."""
    from leptonai.api.v1.types.raycluster import LeptonRayCluster, LeptonRayClusterUserSpec
    settings = job.settings
    fields = plain.spec.model_dump(exclude_none=True, by_alias=True)
    part = {key: fields[key] for key in ("affinity", "envs", "mounts", "shared_memory_size", "reservation_config",
                                        "queue_config", "user_security_context") if fields.get(key)}
    part |= {field: True for key, field in (("rdma", "enable_rdma"), ("host_network", "host_network"))
             if settings.get(key)}
    custom = dict(settings.get("custom_spec", {}))
    of_cluster = {key: custom.pop(key) for key in list(custom) if key in LeptonRayClusterUserSpec.model_fields}
    heads, workers = (of_cluster.pop(key, {}) for key in GROUPS)
    workers = workers[0] if isinstance(workers, list) and len(workers) == 1 else workers
    for key, value in zip(GROUPS, (heads, workers), strict=True):
        if not isinstance(value, dict):
            raise Refusal("custom_spec.%s is %r" % (key, value), "it must be a table")
    part = with_custom(part, custom, OURS)
    head = settings.get("head_resource_shape")
    spec = with_custom({
        "image": job.image, "image_pull_secrets": settings.get("image_pull_secrets", []), "suspend": False,
        "ray_version": settings["ray_version"],
        "head_group_spec": {"resource_shape": head or settings["resource_shape"], "min_replicas": 1}
        | with_custom(part, heads, OURS),
        "worker_group_specs": [{"resource_shape": settings["resource_shape"], "group_name": "workers",
                                "min_replicas": job.nodes if head else job.nodes - 1}
                               | {key: fields[key] for key in ("segment_config",) if fields.get(key)}
                               | with_custom(part, workers, OURS)],
    }, of_cluster, ("image", "suspend", "ray_version"))
    body = valid("Ray cluster", lambda: LeptonRayCluster(
        metadata=plain.metadata.model_copy(update={"id_": name, "name": name}), spec=LeptonRayClusterUserSpec(**spec)))
    require_known("Ray cluster of Lepton", spec, body.spec)
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
    last, begun = ("", ""), time.monotonic()
    while True:
        try:
            state, why = _state(read_cluster(client, name))
        except Refusal as refusal:
            state, why = "Deleted", ""
            if refusal.http != 404:
                raise
        if (state, why) != last:
            after = time.monotonic() - begun
            print(screen.plain("-- Ray cluster %s is %s after %.0f s%s" % (name, state, after, why and ": " + why)),
                  flush=True)
        last = state, why
        if state == "Ready":
            return
        if IMAGE_TROUBLE.search(why):
            raise Refusal("the image cannot be pulled: " + why, "correct container_image or the pull secrets", 4)
        if state in ("Deleted", "Deleting", "Stopping", "Stopped"):
            raise Refusal("Ray cluster %s is %s" % (name, state), "start it in the console, or name another", 4)
        if time.monotonic() - begun > patience:
            raise Refusal("Ray cluster %s is still %s after %.0f s%s" % (name, state, patience, why and ": " + why),
                          "check that the node group has free nodes, or raise rendezvous_timeout", 4)
        time.sleep(POLL_S)


def read_cluster(client: Any, name: str) -> dict[str, Any]:
    found = read("read Ray cluster " + name, client, "/rayclusters/" + name)
    require_about("Ray cluster", name, (found.get("metadata") or {}).get("id"))
    return found


def found(client: Any, settings: dict[str, Any], name: str) -> tuple[dict[str, Any], Record]:
    """A cluster that was made for a run, for `adopt`, and the record of that run. Raises Refusal."""
    record = Record(cluster=name, made=True, url=client.url, ca_bundle=settings.get("ca_bundle"), submitted=True)
    return read_cluster(client, urllib.parse.quote(name, "")), record


def _state(cluster: dict[str, Any]) -> tuple[str, str]:
    """(a cluster's state, what keeps it from being Ready)."""
    status = cluster.get("status") or {}
    why = "; ".join("%s: %s" % (each.get("reason"), each.get("message")) for each in status.get("conditions") or []
                    if each.get("status") != "True")
    state = screen.said(str(status.get("state") or "Unknown"))
    return state, "" if state == "Ready" else screen.said(why)


def ray(client: Any, run: Run, method: str, path: str, **body: Any) -> Any:
    """An answer of the dashboard's API. Raises the SDK's error for an answer of 400 or more, and those of requests."""
    url = "%s/rayclusters/%s/dashboard%s" % (client.url, run.record["cluster"], path)
    headers = {"Authorization": "Bearer " + (client.token() or ""), "origin": client.get_dashboard_base_url() or ""}
    response = checked(client._session.request(method, url, headers=headers, **body))
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


def details(client: Any, run: Run, name: str) -> dict[str, Any]:
    """What the dashboard says of a job. Raises Refusal."""
    found = ask_lepton("read job " + name, client, lambda: ray(client, run, "GET", "/api/jobs/" + name))
    require_about("job", name, found.get("submission_id") if isinstance(found, dict) else "no job")
    return found


def ask(client: Any, run: Run) -> Status:
    """The state of the driver; where the dashboard does not know it, what the cluster says of itself."""
    name, submitted = run.record["cluster"], run.record.get("submitted", True)
    try:
        cluster = None if submitted else read_cluster(client, name)
        if cluster is None or _state(cluster)[0] == "Ready":
            found = details(client, run, run.id)
            word = screen.said(str(found.get("status")))
            return Status(STATES.get(word, "waiting"), word)
    except Refusal as refusal:
        if refusal.http != 404:
            raise
    try:
        state, _ = _state(cluster or read_cluster(client, name))
    except Refusal as refusal:
        if refusal.http == 404:
            return Status("cancelled", GONE, gone=True)
        raise
    if submitted and state == "Ready":
        return Status("failed", "Ray cluster %s no longer knows the job, as after a new start of its head" % name,
                      gone=True)
    return Status("waiting", "Ray cluster %s is %s" % (name, state))


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

    return None if rank or ask(client, run).state == "waiting" else read()
