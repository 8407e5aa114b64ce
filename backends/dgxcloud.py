"""DGX Cloud on run:AI: one POST creates a workload that carries its own source.

One node is a training; several are a distributed PyTorch training whose master is like the workers, since only then
does the operator tell each pod its rank. Retries are off unless the profile sets them (restartPolicy Never,
backoffLimit 0, cleanPodPolicy Running, no elastic policy), so that a dead rank ends the job.

The control plane has no API for logs. They are read from the Kubernetes API (kube_apiserver_url) with the same token,
or from the API that each cluster of a self-hosted installation serves at its own address.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import archive
import profiles
import screen
from backends import GONE, Finding, Status, require_about, stop_and_wait
from backends.common import checks, job_name, record, require_object, require_records, sent_by_value, with_custom
from backends.common.placing import labels, per_segment
from jobs import BY_VALUE, Job, is_mounted, require_image, workspace
from runs import Run
from transport import Plan, Refusal

if TYPE_CHECKING:
    from backends.common.follow import Follower
    from backends.common.runai_client import Client, Project

CAN = {"detach", "ray"}
NAME_LIMIT = 34  # characters of a workload's name (nemo-run 0.11.1 cuts here)
PATH = "/workloads/%(kind)s/%(id)s"  # of a workload, with its Record
PHASES = {
    "Creating": "waiting", "Initializing": "waiting", "Resuming": "waiting", "Pending": "waiting", "Unknown": "waiting",
    "Running": "running", "Updating": "running", "Degraded": "running", "Stopping": "running", "Terminating": "running",
    "Completed": "done", "Failed": "failed", "Stopped": "cancelled", "Deleting": "cancelled",
}


class Record(TypedDict, total=False):
    """What is kept of a workload."""

    kind: str  # "trainings" or "distributed": a part of its URL
    project: str
    cluster: str  # its id
    namespace: str  # the project's
    name: str
    log: str  # the file that each pod logs to, with %d for the rank; "" for none
    id: str  # run:AI's, once it is known


def submit(run: Run, job: Job, plan: Plan, attached: bool) -> None:
    """Create the workload, after everything that can be checked has been checked."""
    from backends.common.runai_client import Client
    settings = job.settings
    require_records()
    client = Client(settings)
    project = client.project(settings["project_name"])
    name = job_name(job.name, job.run_id, NAME_LIMIT)
    body = request(job, plan, name, project.id, project.cluster)
    size = len(json.dumps(body)) * (2 if job.nodes > 1 else 1)  # the operator's object holds master and workers
    require_object("workload", size, "dgxcloud", ", or make custom_spec smaller")
    root = job.description["run_root"]
    log = os.path.join(root.replace("%", "%%"), "runs", job.run_id, "rank-%d.log") if root else ""
    run.keep(Record(kind="distributed" if job.nodes > 1 else "trainings", project=settings["project_name"], name=name,
                    cluster=project.cluster, namespace=project.namespace, log=log))
    made = create(client, run, body, sent_by_value(job, plan))
    record(name, lambda nemo, job: nemo.dgxcloud_executor(job), job, (made, "Creating"))


def create(client: "Client", run: Run, body: dict[str, Any], secrets: tuple[str, ...]) -> str:
    """POST the workload and return its id."""
    from backends.common.http import created
    name = body["name"]

    def post() -> str:
        made = client.call("POST", "/workloads/" + run.record["kind"], "create workload " + name, body, name, secrets)
        if not made.get("workloadId"):
            raise Refusal("run:AI gave no id for workload " + name, "look for it in the console", 5)
        return str(made["workloadId"])

    run.keep(Record(id=created(post, lambda: client.find(name))))
    return str(run.record["id"])


def follow(run: Run) -> Status:
    return _follower(run).follow()


def logs(run: Run) -> None:
    _follower(run).logs()


def status(run: Run) -> Status:
    return _follower(run).status()


def _follower(run: Run) -> "Follower":
    from backends.common.follow import Follower
    client = reconnect(run)
    return Follower(run, partial(_status, client, run), partial(open_log, client, run), partial(trouble, client, run))


def cancel(run: Run) -> str:
    """Suspend the workload, and wait for it to stop."""
    client, name = reconnect(run), run.record["name"]
    return stop_and_wait("workload " + name, partial(_status, client, run),
                         lambda: client.call("POST", PATH % run.record + "/suspend", "suspend workload " + name))


def jobs(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """By their names: the list does not have their labels."""
    from backends.common.runai_client import Client
    for found in Client(settings).pages("/workloads", "workloads", "list the workloads"):
        name, ours = str(found.get("name")), found.get("projectName") == settings["project_name"]
        if ours and re.search("-[a-z][a-z2-9]{5}$", name):
            yield name, str(found.get("phase") or "")


def adopt(settings: dict[str, Any], name: str) -> archive.Found:
    from backends.common.runai_client import Client
    client = Client(settings)
    project, found = client.project(settings["project_name"]), client.find(name)
    if found is None:
        raise Refusal("run:AI has no workload %s" % name, "python launch.py adopt PROFILE lists those of Airlift", 4)
    for kind in ("distributed", "trainings"):
        record = Record(kind=kind, project=settings["project_name"], name=name, cluster=project.cluster,
                        namespace=project.namespace, log="", id=found)
        try:
            answer = client.call("GET", PATH % record, "read workload " + name)
            break
        except Refusal as refusal:
            if refusal.http != 404 or kind == "trainings":
                raise
    env = {str(entry.get("name")): str(entry.get("value") or "")
           for entry in (answer.get("spec") or {}).get("environmentVariables") or []}
    job = archive.from_env(env, record, when(answer.get("createdAt")))
    root = str(job.sent.get("run_root") or "").replace("%", "%%")
    job.record["log"] = os.path.join(root, "runs", str(job.sent["run"]), "rank-%d.log") if root else ""
    return job


def when(text: object) -> float:
    """A time of the API in seconds since 1970; now, where it cannot be read."""
    return float(profiles.moment(str(text).replace("Z", "+00:00")) or time.time())


def probe(settings: dict[str, Any], job: Job | None) -> Iterator[Finding]:
    """The credentials, the project, volumes, credentials of [secrets], access to the logs."""
    from backends.common.runai_client import Client
    client, found = checks.attempt("credentials", lambda: Client(settings).signed_in(),
                                   lambda client: "client %s at %s" % (client.identity, client.base))
    yield found
    if client is None:
        return
    project, found = checks.attempt("project", lambda: client.project(settings["project_name"]),
                                    lambda project: "%s, id %s, namespace %s" % (
                                        settings["project_name"], project.id, project.namespace))
    yield found
    yield checks.image_finding(settings, job)
    claims = [str(pvc.get("claimName")) for pvc in settings.get("pvcs") or []]
    yield from checks.listed("claim", claims, lambda: [
        str((entry.get("spec") or {}).get("claimName")) for entry in client.call(
            "GET", "/asset/datasource/pvc", "list the data sources").get("entries", [])],
        "check that the claim exists in the project's namespace: not every claim is a data source", False)
    yield checks.workspace_finding(settings)
    pulls = settings.get("image_pull_secrets", [])
    wanted = [source.partition(":")[2].partition("/")[0] for source in settings.get("secrets", {}).values()
              if source not in BY_VALUE] + [name.partition(":")[2] for name in pulls if name.startswith("runai:")]
    yield from checks.listed("credential", wanted, lambda: [
        str((entry.get("meta") or {}).get("name")) for entry in client.call(
            "GET", "/asset/credentials", "list the credentials").get("entries", [])],
        "create it, or correct the profile; a user's own credentials are not listed", False)
    yield from checks.pull_secrets([name for name in pulls if not name.startswith("runai:")])
    if project:
        yield _log_access(client, project)


def _log_access(client: "Client", project: "Project") -> Finding:
    """Whether one of the two APIs for logs would give one: the way that open_log() goes, to a pod that is not there."""
    no_pod = KUBE_LOG % (client.kube, project.namespace, "airlift-check")
    ways = {"the Kubernetes API": lambda: bool(client.kube) and client.send("GET", no_pod, "check").status_code == 404,
            "the cluster API": lambda: client.send("GET", client.cluster_api(project.cluster) + "/cluster-api/status",
                                                   "check").status_code < 400}
    for name, answers in ways.items():
        with contextlib.suppress(Refusal):
            if answers():
                return Finding("logs", "ok", "from %s" % name)
    return Finding("logs", "warning", "neither the Kubernetes API nor the cluster API answers",
                   "set kube_apiserver_url; without it, logs are only in the workspace")


def reconnect(run: Run) -> "Client":
    """A client with the present credentials of the run's profile. Raises Refusal."""
    from backends.common.runai_client import Client
    with profiles.pinned(run.origin and run.origin["env_file"]):
        profile = profiles.load(run.profile, run.recipe.partition("/")[2])
    profile.require_set()
    client = Client(profile.settings)
    if "id" not in run.record:  # the answer to its creation was lost
        found = client.find(run.record["name"])
        if found is None:
            raise Refusal("run:AI has no workload %s: its creation failed" % run.record["name"], "launch again", 4)
        run.keep(Record(id=found))
    return client


def check(job: Job, plan: Plan) -> None:
    """Raises Refusal for what the API would refuse, or accept and get wrong."""
    require_image(job)
    if not re.match("https?://[^/]", job.settings["base_url"]):
        raise Refusal("base_url is %r" % job.settings["base_url"], "write the whole URL, like https://…/api/v1")
    if job.gpus_per_node == "gpu":
        raise Refusal('gpus_per_node is "gpu"', "run:AI needs a number; set gpus_per_node in the profile")
    for volume in job.settings.get("pvcs") or []:
        missing = [key for key in ("claimName", "path") if not volume.get(key)]
        missing += ["existingPvc"] if not isinstance(volume["existingPvc"], bool) else []
        if missing:
            raise Refusal("a pvc lacks %s: %s" % (", ".join(missing), volume),
                          'like: { claimName = "data", path = "/data", existingPvc = true }')
    base = workspace(job.settings)
    if base and not is_mounted(base, job.settings):
        raise Refusal("the workspace %s is on none of the pvcs" % base,
                      "add the claim that holds it, or change the workspace")
    if job.nodes > 1 and job.settings.get("retries"):
        raise Refusal("retries is %d, and the job has %d nodes" % (job.settings["retries"], job.nodes),
                      "run:AI restarts one pod without the others; remove retries, and launch again to resume")
    framework = job.settings["distributed_framework"]
    if job.nodes > 1 and framework != "PyTorch":
        raise Refusal("distributed_framework is %r" % framework, "only PyTorch tells each pod its rank; remove the key")
    if "preemptible" in job.settings and "preemptibility" in job.settings:
        raise Refusal("both preemptible and preemptibility are set", "keep one of them")
    odd = [name for name in job.settings.get("security", {}) if name not in SECURITY]
    if odd:
        raise Refusal("security has no field " + odd[0], "its fields are " + ", ".join(SECURITY))
    lacking = [entry for entry in job.settings.get("tolerations", []) if not entry.get("key")]
    if lacking:
        raise Refusal("a toleration lacks key: %s" % lacking[0], 'like: { key = "gpu", operator = "Exists" }')
    request(job, plan, job.run_id, "", "")


def request(job: Job, plan: Plan, name: str, project: str, cluster: str) -> dict[str, Any]:
    """The creation request. Command and args are single strings, which run:AI splits at blanks."""
    env: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in plan.env.items()]
    for key, source in job.secrets.items():
        if source not in BY_VALUE:
            credential, _, field = source.partition(":")[2].partition("/")
            env.append({"name": key, "userCredential": {"name": credential, "key": field}})
    spec: dict[str, Any] = {
        "command": plan.argv[0], "args": " ".join(plan.argv[1:]), "image": job.image,
        "compute": {"gpuDevicesRequest": job.gpus_per_node, "largeShmRequest": True} | resources(job),
        "storage": {"pvc": job.settings.get("pvcs") or []}, "environmentVariables": env,
        "restartPolicy": "Never", "backoffLimit": job.settings.get("retries", 0),
    }
    body: dict[str, Any] = {"name": name, "projectId": project, "clusterId": cluster}
    if job.nodes > 1:
        spec |= {"distributedFramework": "PyTorch", "numWorkers": job.nodes - 1, "cleanPodPolicy": "Running"}
        body["masterSpecSameAsWorker"] = True
    spec |= placement(job, plan)
    custom = job.settings.get("custom_spec", {})
    return body | {"spec": with_custom(spec, custom, ("command", "args", "numWorkers"))}


def resources(job: Job) -> dict[str, Any]:
    others = [{"resource": name, "quantity": str(count)}
              for name, count in job.settings.get("extended_resources", {}).items()]
    return {"extendedResources": others} if others else {}


SAME = {"priority": "priorityClass", "preemptibility": "preemptibility", "node_pools": "nodePools",
        "node_type": "nodeType", "tolerations": "tolerations"}  # keys of a profile that are fields of the API


SECURITY = ("allowPrivilegeEscalation", "capabilities", "hostIpc", "hostNetwork", "readOnlyRootFilesystem", "runAsGid",
            "runAsNonRoot", "runAsUid", "seccompProfileType", "supplementalGroups", "uidGidSource")


def placement(job: Job, plan: Plan) -> dict[str, Any]:
    """The fields that say where and how the pods run, and how they are found."""
    settings = job.settings
    spec = {field: settings[key] for key, field in SAME.items() if settings.get(key)}
    if "preemptible" in settings:
        spec["preemptibility"] = "preemptible" if settings["preemptible"] else "non-preemptible"
    marks, notes = labels(job, plan), {name: str(value) for name, value in settings.get("annotations", {}).items()}
    if settings.get("mnnvl"):
        marks["run.ai/MNNVL"] = settings["mnnvl"].capitalize()
    if settings.get("topology"):
        notes["kai.scheduler/topology-required-placement"] = settings["topology"]
    size = per_segment(job)
    if size:
        notes["kai.scheduler/segment-size"] = str(size)
    spec |= {field: [{"name": name, "value": value} for name, value in table.items()]
             for field, table in (("labels", marks), ("annotations", notes)) if table}
    pulls = [name.partition("runai:")[2] or name for name in settings.get("image_pull_secrets", [])]
    if pulls:
        spec["imagePullSecrets"] = [{"name": name} | ({"userCredential": True} if name not in settings[
            "image_pull_secrets"] else {}) for name in pulls]
    security = settings.get("security", {}) | ({"hostNetwork": True} if settings.get("host_network") else {})
    if security:
        spec["security"] = security
    return spec


def _status(client: "Client", run: Run) -> Status:
    try:
        answer = client.call("GET", PATH % run.record, "read workload " + run.record["name"])
    except Refusal as refusal:
        if refusal.http == 404:
            return Status("cancelled", GONE, gone=True)
        raise
    require_about("workload", run.record["id"], answer.get("workloadId"))
    phase = answer.get("actualPhase") or answer.get("phase")
    if not phase:
        raise Refusal("run:AI gave no phase for workload " + run.record["name"], "try again, or look in the console", 5)
    word = screen.said(str(phase))
    return Status(PHASES.get(word, "waiting"), word)


def trouble(client: "Client", run: Run) -> str:
    """What keeps the workload from starting: its scheduler's words, then its warnings, newest first."""
    said, path = [], "/workloads/" + run.record["id"]
    with contextlib.suppress(Refusal):  # an older installation may have either of the two
        found = client.call("GET", path, "read what it waits for")
        said = [found.get("phaseMessage")] + [
            each.get("userMessage") or each.get("reason") for each in found.get("pendingSchedulingMessages") or []]
    with contextlib.suppress(Refusal):
        page = client.call("GET", path + "/events", "read the events", limit="20")
        said += ["%s: %s" % (event.get("reason"), event.get("message")) for event in page.get("events", [])
                 if event.get("type") == "Warning"]
    return "; ".join(dict.fromkeys(str(each) for each in said if each))


KUBE_LOG = "%s/api/v1/namespaces/%s/pods/%s/log"


def open_log(client: "Client", run: Run, rank: int, follow: bool = True) -> Iterator[str] | None:
    """The log of one rank from its beginning, so far or as it grows; None while the pod has none. Raises Refusal (exit
    code 4) if no API gives it."""
    from backends.common.http import decoded
    record, single = run.record, run.record["kind"] == "trainings"
    why = "no kube_apiserver_url in the profile"
    if client.kube:
        pod = pod_of(client, run, rank)
        if pod is None:
            return None
        url = KUBE_LOG % (client.kube, record.get("namespace") or "runai-" + record["project"], pod)
        query = {"follow": "true" if follow else "false"} | ({} if single else {"container": "pytorch"})
        response = client.send("GET", url, "read the log", query=query, stream=True)
        if response.status_code < 400:
            return decoded(response)
        if response.status_code not in (401, 403):  # the container waits to start, or the pod is gone
            return None
        why = "the Kubernetes API answered %d" % response.status_code
    if rank == 0:  # the cluster API has the log of the first pod only
        url = "%s/cluster-api/api/v1/%s/workloads/training/%s/%s/logs/download" % (
            client.cluster_api(record.get("cluster", "")), record["project"], "runai" if single else "pytorch",
            record["name"])
        response = client.send("GET", url, "read the log", stream=True)
        if response.status_code < 400:
            return decoded(response)
        why += ", the cluster API %d" % response.status_code
    raise Refusal("run:AI gives no access to the logs (%s)" % why,
                  "read the pod's own log at %s" % (record["log"] % rank) if record["log"] else
                  "set kube_apiserver_url; there is no workspace where the pods keep logs", 4)


def pod_of(client: "Client", run: Run, rank: int) -> str | None:
    """The name of a rank's pod; None while there is none. Where the control plane lists no pods, as the operator names
    them."""
    single, name = run.record["kind"] == "trainings", run.record["name"]
    end = "" if single else "-master-0" if rank == 0 else "-worker-%d" % (rank - 1)
    try:
        return next((pod for pod in client.pods(run.record["id"]) if pod.endswith(end)), None)
    except Refusal as refusal:
        if refusal.http not in (403, 404, 405):
            raise
        return name + (end or "-0-0")


def log_lines(run: Run) -> Iterator[str]:
    """The lines of rank 0's log as it grows, for nemo-run. Raises Refusal if no API gives it."""
    from backends.common.follow import lines
    return lines(open_log(reconnect(run), run, 0) or ())
