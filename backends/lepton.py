"""DGX Cloud Lepton: one POST /jobs creates a job that carries its own source.

The SDK finds credentials and address: LEPTON_WORKSPACE_ID, LEPTON_WORKSPACE_TOKEN and LEPTON_WORKSPACE_URL, or the file
of `lep login`. Retries are off unless the profile sets them, so that a dead rank ends the job.
"""

import math
import posixpath
import re
import time
import urllib.parse
from collections.abc import Iterator
from functools import partial
from typing import Any, TypedDict

import archive
import profiles
import screen
from backends import FINAL, GONE, Finding, Status, require_about, stop_and_wait
from backends.common import checks, job_name, record, require_object, require_records, sent_by_value, with_custom
from backends.common.checks import finding
from backends.common.lepton_client import ask_lepton, connect, node_group, read, reconnect, require_known, valid
from backends.common.placing import labels, per_segment
from jobs import BY_VALUE, Job, require_image
from runs import Run
from transport import Plan, Refusal

CAN = {"detach", "ray"}
NAME_LIMIT = 36  # characters of a job's name (this and RESERVED: leptonai 0.47.1, job_validation.py)
RESERVED = frozenset((  # where nothing can be mounted; below them it can
    "/", "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/media", "/opt", "/proc", "/proc/bus", "/proc/sys", "/run",
    "/sbin", "/srv", "/sys", "/sys/fs/cgroup", "/sys/kernel/security", "/usr", "/usr/bin", "/usr/lib", "/usr/local",
    "/usr/sbin", "/var"))
STATES = {
    "Starting": "waiting", "Queueing": "waiting", "Awaiting": "waiting", "PendingRetry": "waiting",
    "Restarting": "waiting", "UNK": "waiting", "Running": "running", "Completed": "done", "Archived": "done",
    "Failed": "failed", "Stopping": "running", "Terminating": "running", "Stopped": "cancelled",
    "Deleting": "cancelled", "Deleted": "cancelled",
}
FLAGS = {"preemptible": "can_be_preempted", "can_preempt": "can_preempt"}


class Record(TypedDict):
    """What is kept of a job on Lepton; lepton_ray.Record is that of a run on a Ray cluster."""

    job: str  # its name, which is its id
    url: str  # of the workspace's API
    ca_bundle: str | None
    group: str  # the node group's id
    reservation: str | None


def submit(run: Run, job: Job, plan: Plan, attached: bool) -> None:
    """Create the job, after everything that can be checked has been checked."""
    settings = job.settings
    require_records()
    client = connect(settings.get("ca_bundle"))
    if wants_cluster(job):
        return lepton_ray().submit(run, job, plan, client, lambda name: request(
            job, plan, name, node_group(client, settings["node_group"]), {}))
    group = node_group(client, settings["node_group"])
    name = job_name(job.name, job.run_id, NAME_LIMIT)
    body = request(job, plan, name, group)
    size = len(body.model_dump_json(exclude_none=True, by_alias=True))
    require_object("job", size, "lepton", ", or make custom_spec smaller")
    run.keep(Record(job=name, url=client.url, ca_bundle=settings.get("ca_bundle"), group=group,
                    reservation=settings.get("node_reservation")))
    made = create(client, body, name, sent_by_value(job, plan))
    record(name, lambda nemo, job: nemo.lepton_executor(job), job, (made, "Starting"))


def wants_cluster(job: Job) -> bool:
    """Whether the job runs on a Ray cluster of the platform."""
    return bool(job.description.get("cluster") == "platform")


def lepton_ray() -> Any:
    """The part of this backend for Ray clusters."""
    from backends.common import lepton_ray
    return lepton_ray


def follow(run: Run) -> Status:
    return lepton_ray().follow(run, reconnect(run)) if run.record.get("cluster") else _follower(run).follow()


def logs(run: Run) -> None:
    _follower(run).logs()


def status(run: Run) -> Status:
    if run.record.get("cluster"):
        return lepton_ray().status(run, reconnect(run))
    client = reconnect(run)
    follower = _follower(run, client)
    found: Status = follower.status()
    if run.starts > 1 and not found.gone:
        found = follower.with_attempt(found, len(replicas(client, run, 0)))
    return found


def _follower(run: Run, client: Any = None) -> Any:
    from backends.common.follow import Follower
    client = client or reconnect(run)
    if run.record.get("cluster"):
        return lepton_ray().follower(run, client)
    return Follower(run, partial(_status, client, run), partial(open_log, client, run), partial(trouble, client, run))


def cancel(run: Run) -> str:
    client = reconnect(run)
    if run.record.get("cluster"):
        return lepton_ray().cancel(run, client)
    job, stop = run.record["job"], {"spec": {"stopped": True}}
    return stop_and_wait("job " + job, partial(_status, client, run),
                         lambda: ask_lepton("stop job " + job, client, lambda: client.job.update(job, stop)))


def jobs(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    client = connect(settings.get("ca_bundle"))
    for job in ask_lepton("list the jobs", client, client.job.list_all):
        if (job.metadata.labels or {}).get("airlift-run"):
            yield str(job.metadata.id_), job.status.state.value if job.status and job.status.state else ""
    for cluster in ask_lepton("list the Ray clusters", client, client.raycluster.list_all):
        if (cluster.metadata.labels or {}).get("airlift-run"):
            yield str(cluster.metadata.id_), cluster.status.state.value if cluster.status else ""


def adopt(settings: dict[str, Any], name: str) -> archive.Found:
    client = connect(settings.get("ca_bundle"))
    try:
        found = read("read job " + name, client, "/jobs/" + urllib.parse.quote(name, ""),
                     job_query_mode="alive_and_archive")
        spec = found.get("spec") or {}
        group = ((spec.get("affinity") or {}).get("allowed_dedicated_node_groups") or [""])[0]
        reservation = (spec.get("reservation_config") or {}).get("reservation_id")
        record: Any = Record(job=name, url=client.url, ca_bundle=settings.get("ca_bundle"), group=group,
                             reservation=reservation)
    except Refusal as refusal:
        if refusal.http != 404:
            raise
        found, record = lepton_ray().found(client, settings, name)
        spec = (found.get("spec") or {}).get("head_group_spec") or {}
    env = {str(entry.get("name")): str(entry.get("value") or "") for entry in spec.get("envs") or []}
    started = (found.get("metadata") or {}).get("created_at")
    return archive.from_env(env, record, started / 1000 if isinstance(started, (int, float)) else time.time())


def probe(settings: dict[str, Any], job: Job | None) -> Iterator[Finding]:
    """The credentials, the node group and its nodes, the shape, mounts, secrets."""
    def sign_in() -> tuple[Any, list[Any]]:
        client = connect(settings.get("ca_bundle"))
        return client, ask_lepton("list the node groups", client, client.nodegroup.list_all)

    made, found = checks.attempt("credentials", sign_in, lambda made: made[0].url)
    yield found
    if not made or not made[1]:
        return
    client, groups = made

    def find_group() -> Any:
        found = node_group(client, settings["node_group"])
        return next(group for group in groups if group.metadata.id_ == found)

    group, found = checks.attempt("node group", find_group, lambda group: "%s, id %s" % (
        group.metadata.name, group.metadata.id_))
    yield found
    if group is None:
        return
    wanted = job.nodes if job else settings.get("nodes", 1)
    yield from checks.guarded("nodes", lambda: _nodes(client, group.metadata.id_, wanted))
    if settings.get("node_reservation"):
        yield from checks.guarded("reservation", lambda: _reservation(
            client, group.metadata.id_, settings["node_reservation"], wanted))
    shapes = [settings[key] for key in ("resource_shape", "head_resource_shape") if settings.get(key)]
    yield from checks.listed("resource shape", shapes, lambda: [
        str(shape.metadata.id_ or shape.spec.name) for shape in ask_lepton(
            "list the resource shapes", client, lambda: client.shapes.list_shapes(group.metadata.id_, "job"))],
        "set resource_shape in the profile")
    if settings.get("existing_ray_cluster"):
        name = settings["existing_ray_cluster"]
        yield finding("Ray cluster", lambda: "%s is %s" % (name, ask_lepton(
            "read Ray cluster " + name, client, lambda: client.raycluster.get(name)).status.state.value))
    yield checks.image_finding(settings, job)
    mounts = [mount for mount in settings.get("mounts") or [] if isinstance(mount, dict)]
    storage = [str(mount.get("from", "")).partition(":")[2] for mount in mounts]
    yield from checks.listed("storage", storage, lambda: [volume.name for volume in group.spec.volumes or []],
                             "in mounts, set from to a storage of the node group")
    yield checks.workspace_finding(settings)
    secrets = [source.partition(":")[2] for source in settings.get("secrets", {}).values() if source not in BY_VALUE]
    yield from checks.listed("secret", secrets, lambda: [
        secret.name for secret in ask_lepton("list the secrets", client, client.secret.list_all)],
        "create it in the workspace, or correct [secrets]")
    yield from checks.pull_secrets(settings.get("image_pull_secrets", []))


def _nodes(client: Any, group: str, wanted: int) -> Finding:
    """Whether a node group has enough nodes for the job, and enough that are ready and idle now."""
    nodes = ask_lepton("list the nodes", client, lambda: client.nodegroup.list_nodes(group))
    ready = [node for node in nodes if not node.spec.unschedulable and (
        not node.status or not node.status.status or "Ready" in node.status.status)]
    idle = _idle(client, group)
    said = "%d of %d are ready, the job needs %d; %d are idle" % (len(ready), len(nodes), wanted, idle)
    if len(nodes) < wanted or not ready:
        return Finding("nodes", "failure", said, "choose another node group, or fewer nodes", 4)
    enough = min(len(ready), idle) >= wanted
    return Finding("nodes", "ok", said) if enough else Finding("nodes", "warning", said, "it would wait")


def _idle(client: Any, group: str) -> int:
    """The number of a group's nodes that no workload uses."""
    return len(read("list the idle nodes", client, "/dedicated-node-groups/%s/nodes" % group, list, idle="true"))


def _reservation(client: Any, group: str, name: str, wanted: int) -> Finding:
    """Whether a reservation is there, has begun, is not over, and has enough nodes."""
    known = read("list the reservations", client, "/dedicated-node-groups/%s/reservations" % group, list)
    found = next((each for each in known if name in (each["metadata"].get("id"), each["metadata"].get("name"))), None)
    if found is None:
        ids = ", ".join(str(each["metadata"].get("id")) for each in known) or "none"
        return Finding("reservation", "failure", "%s is not among %s" % (name, ids), "correct node_reservation", 4)
    status, spec = found.get("status") or {}, found.get("spec") or {}
    phase, rule = screen.said(str(status.get("phase") or "Unknown")), spec.get("time_rule") or {}
    count = status.get("reserved_count") or len(status.get("reserved_nodes") or ())
    said = "%s is %s, %d nodes; the job needs %d" % (name, phase, count, wanted)
    if phase in ("Expired", "Rejected") or (rule.get("end_timestamp") or math.inf) < time.time():
        return Finding("reservation", "failure", said, "name another reservation, or none", 4)
    if phase != "Reserved" or (rule.get("start_timestamp") or 0) > time.time() or count < wanted:
        return Finding("reservation", "warning", said, "it would wait")
    return Finding("reservation", "ok", said)


def check(job: Job, plan: Plan) -> None:
    """Raises Refusal for what the API would refuse."""
    require_image(job)
    for mount in job.settings.get("mounts") or []:
        if isinstance(mount, dict):
            missing = [key for key in ("path", "mount_path", "from") if not mount.get(key)]
            if missing:
                raise Refusal("a mount lacks %s: %s" % (", ".join(missing), mount),
                              'like: { path = "/", mount_path = "/shared", from = "node-nfs:my-storage" }')
            if posixpath.normpath("/" + mount["mount_path"].lstrip("/")) in RESERVED:
                raise Refusal("Lepton reserves the mount path " + mount["mount_path"], "mount it below, or elsewhere")
    for name in job.secrets:
        if name.startswith("LEPTON_"):
            raise Refusal("Lepton reserves the variable %s" % name, "use another name in [secrets]")
    require_possible(job, plan)
    if wants_cluster(job):
        lepton_ray().check(job, lambda name: request(job, plan, name, job.settings["node_group"], {}))
    elif job.settings.get("custom_spec") or job.settings.get("security"):
        request(job, plan, job.run_id, job.settings["node_group"])


def require_possible(job: Job, plan: Plan) -> None:
    """Raises Refusal for keys of the profile that this kind of job does not have, or not so."""
    settings, ray = job.settings, wants_cluster(job)
    per_segment(job)
    odd = [name for name in labels(job, plan) if "/" in name]
    if odd:
        raise Refusal("Lepton takes no / in the name of a label: " + odd[0], "use . or - there")
    begin = profiles.moment(settings.get("start_at"))
    if begin and begin < time.time():
        raise Refusal("start_at = %s is over" % settings["start_at"], "remove it, or name a time to come")
    for key in ("host_network", "rdma") if not ray else ("start_at",):
        if settings.get(key):
            raise Refusal("%s is only for jobs %s a Ray cluster on Lepton" % (key, "without" if ray else "on"),
                          "move it to the [stages.…] that it is for")
    if ray and settings.get("segments") and not settings.get("head_resource_shape"):
        raise Refusal("a Ray cluster with segments needs a head of its own, for the others to be divided",
                      "set head_resource_shape, like a cpu shape")


def request(job: Job, plan: Plan, name: str, group: str, custom: dict[str, Any] | None = None) -> Any:
    """The LeptonJob to create, with the profile's custom_spec, or with `custom`. Raises Refusal for a field that the
    API does not have."""
    from leptonai.api.v1.types.common import Metadata
    from leptonai.api.v1.types.job import LeptonJob, LeptonJobUserSpec
    settings = job.settings
    envs: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in plan.env.items()]
    envs += [{"name": key, "value_from": {"secret_name_ref": source.partition(":")[2]}}
             for key, source in job.secrets.items() if source not in BY_VALUE]
    spec: dict[str, Any] = {
        "resource_shape": settings["resource_shape"],
        "affinity": {"allowed_dedicated_node_groups": [group]},
        "container": {"image": job.image, "command": plan.argv},
        "completions": job.nodes, "parallelism": job.nodes, "intra_job_communication": True,
        # The platform's defaults would restart a dead rank alone; retries start all ranks again.
        "max_failure_retry": 0, "max_job_failure_retry": settings.get("retries", 0),
        "envs": envs, "mounts": [mount for mount in settings.get("mounts") or [] if isinstance(mount, dict)],
        "image_pull_secrets": settings.get("image_pull_secrets", []), "ttl_seconds_after_finished": None,
    }
    if settings.get("shared_memory_size"):
        spec["shared_memory_size"] = settings["shared_memory_size"]
    if settings.get("node_reservation"):
        spec["reservation_config"] = {"reservation_id": settings["node_reservation"]}
    flags = {field: True for key, field in FLAGS.items() if settings.get(key)}
    if flags or settings.get("priority"):  # the flags need a priority; the default is nemo-run's
        spec["queue_config"] = {"priority_class": settings.get("priority", "mid-4000"), **flags}
    size = per_segment(job)
    for key, value in (("segment_config", size and {"count_per_segment": size}),
                       ("time_schedule", {"start_at": profiles.moment(settings.get("start_at"))}),
                       ("user_security_context", settings.get("security"))):
        if value and value != {"start_at": None}:
            spec[key] = value
    ours = ("container.command", "completions", "parallelism")
    spec = with_custom(spec, settings.get("custom_spec", {}) if custom is None else custom, ours)
    body = valid("job", lambda: LeptonJob(spec=LeptonJobUserSpec(**spec), metadata=Metadata(
        id=name, name=name, labels=labels(job, plan), visibility=settings.get("visibility"))))
    require_known("Lepton job", spec, body.spec)
    return body


def create(client: Any, body: Any, name: str, secrets: tuple[str, ...]) -> str:
    """POST the job and return its id."""
    from backends.common.http import created
    return created(lambda: str(ask_lepton("create job " + name, client, lambda: client.job.create(body), name,
                                          secrets).metadata.id_), lambda: str(client.job.get(name).metadata.id_))


def _status(client: Any, run: Run) -> Status:
    try:
        job = read("read job " + run.record["job"], client, "/jobs/" + run.record["job"],
                   job_query_mode="alive_and_archive")
    except Refusal as refusal:
        if refusal.http == 404:
            return Status("cancelled", GONE, gone=True)
        raise
    require_about("job", run.record["job"], (job.get("metadata") or {}).get("id"))
    found = job.get("status") or {}
    word, ready, succeeded = screen.said(str(found.get("state") or "")), found.get("ready") or 0, \
        found.get("succeeded") or 0
    if not word:
        raise Refusal("Lepton gave no state for job " + run.record["job"], "try again, or look in the console", 5)
    state = STATES.get(word, "waiting")
    if word == "Running" and ready + succeeded < run.nodes:
        return Status("waiting", "%s, %d of %d pods ready" % (word, ready, run.nodes))
    if word == "Archived" and succeeded < run.nodes:  # this state does not say how it ended
        state = "failed"
    return Status(state, word)


def trouble(client: Any, run: Run) -> str:
    """What keeps the job from starting: its warnings, newest first (only its events show that an image cannot be
    pulled), else its reservation, or too few idle nodes."""
    events = ask_lepton("read the job's events", client, lambda: client.job.get_events(run.record["job"]))
    found = ", ".join(dict.fromkeys(event.reason for event in reversed(events) if event.type_ == "Warning"))
    group, reservation = run.record.get("group"), run.record.get("reservation")
    if found or not group or replicas(client, run, 0):
        return found
    if reservation:
        return "reservation " + _reservation(client, group, reservation, run.nodes).said
    idle = _idle(client, group)
    return "" if idle >= run.nodes else "%d idle nodes in the node group, the job needs %d" % (idle, run.nodes)


def open_log(client: Any, run: Run, rank: int, follow: bool = True) -> Iterator[str] | None:
    """The log of one rank from its beginning, so far or as it grows; None while there is none. A pod that was started
    again is another replica, later in the list. What is gone with its pod is in the workspace's log store."""
    from backends.common.follow import so_far
    from backends.common.lepton_logs import kept
    names = replicas(client, run, rank)
    if not names and _status(client, run).state in FINAL:  # with the pods, the list of them is gone
        return kept(client, run, rank)
    found = [log for log in (_stream(client, run, rank, name) for name in names) if log]
    if not follow:  # the API has no parameter for it
        found = [so_far(log) for log in found]
    return (text for log in found for text in log) if found else None


def replicas(client: Any, run: Run, rank: int) -> list[str]:
    """The names of a rank's pods, one for each start, oldest first."""
    found = ask_lepton("list the replicas", client, lambda: client.job.get_replicas(run.record["job"]))
    names = [str(replica.metadata.id_ or replica.id_) for replica in found]
    return [name for name in names if re.match(re.escape(run.record["job"]) + "-%d(-|$)" % rank, name)]


def _stream(client: Any, run: Run, rank: int, replica: str) -> Iterator[str] | None:
    from backends.common import http
    from backends.common.lepton_logs import kept
    path = "/jobs/%s/replicas/%s/log" % (run.record["job"], replica)
    response = ask_lepton("read the log", client, lambda: client._get(path, stream=True))
    if response.status_code == 400:  # the container waits to start
        return None
    if response.status_code == 404:
        return kept(client, run, rank, replica)
    if response.status_code >= 400:
        raise http.refused("Lepton", response, "read the log", (client.auth_token or "",))
    return http.decoded(response)
