"""An emulated DGX Cloud run:AI: its routes, rules, phases and pods, on loopback, as its public documentation tells them.

    with RunaiEmulator(root=tmp_path, claims=["workspace"]) as server:
        server.url                              # base_url, ends in /api/v1
        server.kube_apiserver_url               # where the logs are, with kube_logs=True
        workload = server.named("my-job")       # .state, .request, .pods, .wait("Completed")

Field names are those of the official client runapy 1.224.0, unknown ones refused. Where neither says a word:

- The Kubeflow rules are training-operator v1.9's, defaults included. restartPolicy OnFailure starts a dead container
  again in its pod, and only then counts: with backoffLimit 0 it has been started once more when the job fails. Never
  fails the job with the first pod, whatever the limit. cleanPodPolicy None (the default) leaves the other pods running
  after the job has ended. With a master its success is the job's; an elastic job succeeds with its first worker.
- masterSpecSameAsWorker makes a master besides numWorkers workers, and a second copy of the environment in the object.
- The operator's variables come after the user's and win; run:AI's own come first.
- A training (or workspace) is one pod <name>-0-0 with a container called <name>, retried up to backoffLimit times.
- An image that cannot be pulled ends the workload as Failed; /workloads/{id}/events tells why (the official client has
  that route). A Kubernetes secret that does not exist leaves it Initializing; an unknown user credential is refused.
"""

from __future__ import annotations

import re
import secrets as tokens
import shlex
import time
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .fields import RUNAI_REQUESTS
from .jobs import random_suffix
from .plane import Plane
from .rules import check, check_env_names, check_object_size
from .runai_job import RunaiJob
from .runai_logs import KUBE, log_routes
from .server import Refusal, Reply, Request, Route

VALUE_LIMIT = 10_000  # characters of one environment value, and of args
NAME = re.compile(r"[a-z]([a-z0-9-]{0,33}[a-z0-9])?")
SOURCES = ("value", "secret", "configMap", "podFieldRef", "userCredential")
POD_FIELDS = ("metadata.name", "metadata.namespace", "metadata.uid", "spec.nodeName", "status.podIP")
PRIORITIES = ("very-low", "low", "medium-low", "medium", "medium-high", "high", "very-high")
KEY = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
LIST_QUERY = ("filterBy", "sortBy", "sortOrder", "offset", "limit", "search")


class RunaiEmulator(Plane):
    """The control plane; see the top of this file, and plane.Plane for the parameters that both planes have.

    projects: {name: GPU quota}; namespaces: {project: its namespace, where it is not runai-<project>}; claims: names
    of PVCs that exist; credentials (the user's), secrets and config_maps (Kubernetes'): {name: {key: value}}; token_seconds: how long a token is valid; splitter: how `command` and `args`
    are cut into words, "shell" or "blanks"; kube_logs, cluster_logs: which of the log routes are there; node_pools: their
    names; waits: why the scheduler starts nothing at present, "" if it does.
    """

    base = "/api/v1"

    def __init__(
        self,
        root: Path | str | None = None,
        *,
        projects: Mapping[str, int] | None = None,
        namespaces: Mapping[str, str] | None = None,
        claims: Collection[str] = ("workspace",),
        credentials: Mapping[str, Mapping[str, str]] | None = None,
        secrets: Mapping[str, Mapping[str, str]] | None = None,
        config_maps: Mapping[str, Mapping[str, str]] | None = None,
        client_id: str = "airlift-test",
        client_secret: str = "runai-emulator-secret",
        token_seconds: float = 3600,
        splitter: str = "shell",
        kube_logs: bool = True,
        cluster_logs: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        self.kube_apiserver_url = self.origin + KUBE
        self.cluster_id = str(uuid.uuid4())
        quotas = {"team-a": 1024, "team-without-quota": 0} if projects is None else projects
        self.projects = {str(4500 + number): name for number, name in enumerate(quotas)}
        self.quotas = dict(quotas)
        self.namespaces = dict(namespaces or {})
        self.cluster_origin = self.also_at("127.0.0.2")
        self.claims = {name: self.volume(name) for name in claims}
        self.credentials = dict(credentials or {})
        self.secrets = dict(secrets or {})
        self.config_maps = dict(config_maps or {})
        self.client_id = client_id
        self.client_secret = client_secret
        self.token_seconds = token_seconds
        self.splitter = splitter
        self.kube_logs = kube_logs
        self.cluster_logs = cluster_logs
        self.node_pools = {"default", "a", "b"}
        self.waits = ""
        self.tokens: dict[str, float] = {}  # token: when it expires
        self.jobs: dict[str, RunaiJob] = {}  # by workload id

    def env(self) -> dict[str, str]:
        return {
            "RUNAI_BASE_URL": self.url,
            "RUNAI_KUBE_APISERVER_URL": self.kube_apiserver_url,
            "RUNAI_CLIENT_ID": self.client_id,
            "RUNAI_CLIENT_SECRET": self.client_secret,
            "RUNAI_PROJECT": next(iter(self.quotas)),
        }

    def named(self, requested: str) -> RunaiJob:
        """The newest workload that was asked for under this name."""
        return [job for job in self.jobs.values() if job.request["name"] == requested][-1]

    def routes(self) -> list[Route]:
        one = "/workloads/{kind}/{id}"
        return [
            Route("POST", "/token", self._token, public=True),
            Route("GET", "/org-unit/projects", self._list_projects, LIST_QUERY),
            Route("GET", "/clusters", self._list_clusters, ("verbosity", "includeRequestedForDelete")),
            Route("GET", "/asset/datasource/pvc", self._list_claims, ("name", "limit", "offset")),
            Route("GET", "/asset/credentials", self._list_credentials, ("name", "limit", "offset")),
            *(Route("POST", f"/workloads/{kind}", self._create) for kind in RUNAI_REQUESTS),
            Route("GET", "/workloads", self._list, (*LIST_QUERY, "deleted")),
            Route("GET", "/workloads/{id}", self._describe),
            Route("GET", "/workloads/{id}/events", self._events, ("offset", "limit", "sortOrder")),
            Route("GET", "/workloads/{id}/pods", self._pods, ("completed", "filterBy", "offset", "limit")),
            Route("GET", one, self._get),
            Route("DELETE", one, self._delete),
            Route("POST", one + "/suspend", self._suspend),
            Route("POST", one + "/resume", self._resume),
            *log_routes(self),
        ]

    def error_body(self, status: int, message: str, path: str) -> Any:
        if path.startswith(KUBE + "/"):
            return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": status}
        return {"code": status, "message": message}

    # -- tokens and projects -------------------------------------------------------------------------------------

    def authorize(self, request: Request) -> None:
        header = {name.lower(): value for name, value in request.headers.items()}.get("authorization", "")
        expiry = self.tokens.get(header.removeprefix("Bearer "))
        if expiry is None:
            raise Refusal(401, "Unauthorized: no valid bearer token")
        if time.time() > expiry:
            raise Refusal(401, "Unauthorized: the token has expired")

    def _token(self, request: Request) -> Reply:
        body = request.json()
        known = {"grantType", "clientID", "clientSecret", "appID", "appSecret"}
        given = {}
        for name, value in (body if isinstance(body, dict) else {}).items():
            field = next((field for field in known if field.lower() == name.lower()), None)  # as Go's decoder does
            if field is None or not isinstance(value, str):
                raise Refusal(400, f'unknown field "{name}"')
            given[field] = value
        kinds = {"client_credentials": ("clientID", "clientSecret"), "app_token": ("appID", "appSecret")}
        if given.get("grantType") not in kinds:
            raise Refusal(400, f"grantType must be one of {', '.join(kinds)}")
        who, what = kinds[given["grantType"]]
        if given.get(who) != self.client_id or given.get(what) != self.client_secret:
            raise Refusal(401, f'Unauthorized: wrong secret, or no service account "{given.get(who, "")}"')
        token = tokens.token_urlsafe(48)
        self.tokens[token] = time.time() + self.token_seconds
        return Reply(body={"accessToken": token, "expiresIn": int(self.token_seconds)})

    def _list_projects(self, request: Request) -> Reply:
        offset, limit = request.number("offset", 0), request.number("limit", 50, 1)
        found = [(number, name) for number, name in self.projects.items() if request.one("search") in name]
        for condition in request.query.get("filterBy", []):
            field, operator, value = condition.partition("==")
            if field != "name" or not operator:
                raise Refusal(400, f"filterBy {condition!r} is not emulated: only name==…")
            found = [(number, name) for number, name in found if name == value]
        page = found[offset : offset + min(limit, 50)]
        projects = [{"id": number, "name": name, "clusterId": self.cluster_id,
                     "status": {"namespace": self.namespaces.get(name, "runai-" + name)}} for number, name in page]
        more = offset + len(page) if offset + len(page) < len(found) else None
        return Reply(body={"projects": projects, **({} if more is None else {"next": more})})

    def _list_clusters(self, request: Request) -> Reply:
        other = {"uuid": str(uuid.uuid4()), "tenantId": 1, "name": "another", "domain": "another.invalid"}
        domain = self.cluster_origin.partition("//")[2]
        return Reply(body=[other, {"uuid": self.cluster_id, "tenantId": 1, "name": "cluster", "domain": domain}])

    def _pods(self, request: Request) -> Reply:
        with self.lock:
            job = self._find(request)
            pods = [{"name": job.pod_name(replica), "id": job.uids[replica.rank], "workloadId": job.id, "tenantId": 1,
                     "clusterId": self.cluster_id, "priorityClassName": "train",
                     "containers": [{"name": job.container, "image": job.image}]}
                    for replica in reversed(job.replicas) if replica.runs and job.phase not in ("stopped", "deleted")]
        offset = request.number("offset", 0)
        page = pods[offset : offset + request.number("limit", 50, 1)]
        return Reply(body={"pods": page, "next": offset + len(page) if offset + len(page) < len(pods) else None})

    def _list_claims(self, request: Request) -> Reply:
        return Reply(body={"entries": [{"meta": {"name": name}, "spec": {"claimName": name}} for name in self.claims]})

    def _list_credentials(self, request: Request) -> Reply:
        return Reply(body={"entries": [{"meta": {"name": name}, "spec": {}} for name in self.credentials]})

    # -- workloads -----------------------------------------------------------------------------------------------

    def _create(self, request: Request) -> Reply:
        kind = request.path.rpartition("/")[2]
        body = request.json()
        if not isinstance(body, dict):
            raise Refusal(400, "the body must be an object")
        check(body, RUNAI_REQUESTS[kind], kind)
        for field in ("name", "projectId", "clusterId", "spec"):
            if not body.get(field):
                raise Refusal(400, f"{field} is required")
        if not NAME.fullmatch(body["name"]):
            raise Refusal(400, f'invalid name "{body["name"]}": at most 35 of [a-z0-9-], a letter first, no "-" last')
        if body["projectId"] not in self.projects or body["clusterId"] != self.cluster_id:
            raise Refusal(404, f"no project {body['projectId']} on cluster {body['clusterId']}")
        specs = [body["spec"], *([body["masterSpec"]] if body.get("masterSpec") else [])]
        for spec in specs:
            self._check_spec(spec)
        if kind == "distributed":
            self._check_distributed(body)
        doubled = [body["spec"]] if body.get("masterSpecSameAsWorker") else []
        check_object_size([body, *doubled] if doubled else body, self.object_limit)
        with self.lock:
            job = self._new_job(kind, body)
            job.launch()
            return Reply(202, {**job.document(), "actualPhase": "Creating"})

    def _new_job(self, kind: str, body: dict[str, Any]) -> RunaiJob:
        name = body["name"]
        if body.get("useGivenNameAsPrefix"):
            name = f"{name}-{random_suffix(5)}"
        here = [job for job in self.jobs.values() if job.request["projectId"] == body["projectId"]]
        if any(job.name == name and job.phase != "deleted" for job in here):
            raise Refusal(409, f'a workload named "{name}" already exists in the project')
        job = RunaiJob(self, kind, name, body)
        quota = self.quotas[self.projects[body["projectId"]]]
        if job.gpus > quota:
            project = self.projects[body["projectId"]]
            raise Refusal(403, f'project "{project}" has a quota of {quota} GPUs; the workload asks for {job.gpus}')
        job.claim_volumes()
        self.jobs[job.id] = job
        self.everything.append(job)
        return job

    def _check_spec(self, spec: dict[str, Any]) -> None:
        if not spec.get("image"):
            raise Refusal(400, "spec.image is required")
        if len(spec.get("args") or "") > VALUE_LIMIT:
            raise Refusal(400, f"spec.args: at most {VALUE_LIMIT} characters, got {len(spec['args'])}")
        if not self.words(spec):
            raise Refusal(400, "spec.command or spec.args is required: the image has no entry point")
        for field in ("completions", "parallelism"):
            if spec.get(field, 1) != 1:
                raise Refusal(501, f"spec.{field} is not emulated")
        self._check_env(spec.get("environmentVariables") or [])
        self._check_placement(spec)
        storage = spec.get("storage") or {}
        for kind in storage:
            if kind != "pvc" and storage[kind]:
                raise Refusal(501, f"spec.storage.{kind} is not emulated")
        for number, pvc in enumerate(storage.get("pvc") or []):
            where = f"spec.storage.pvc[{number}]"
            if not (pvc.get("path") or "").startswith("/"):
                raise Refusal(400, f"{where}.path must be an absolute path")
            if pvc.get("existingPvc") and pvc.get("claimName") not in self.claims:
                raise Refusal(400, f'{where}: PVC "{pvc.get("claimName")}" does not exist')

    def _check_placement(self, spec: dict[str, Any]) -> None:
        if spec.get("priorityClass") and spec["priorityClass"] not in PRIORITIES:
            raise Refusal(400, f'unknown priorityClass "{spec["priorityClass"]}"')
        for pool in spec.get("nodePools") or []:
            if pool not in self.node_pools:
                raise Refusal(400, f'node pool "{pool}" not found')
        for field, values in (("labels", LABEL), ("annotations", re.compile(".*", re.S))):
            for entry in spec.get(field) or []:
                if not KEY.fullmatch(entry.get("name") or "") or not values.fullmatch(entry.get("value") or ""):
                    raise Refusal(400, f"spec.{field}: {entry} is not valid")
        notes = {entry["name"]: entry.get("value", "") for entry in spec.get("annotations") or []}
        if not notes.get("kai.scheduler/segment-size", "1").isdecimal():
            raise Refusal(400, "kai.scheduler/segment-size must be a number")
        marks = {entry["name"]: entry.get("value", "") for entry in spec.get("labels") or []}
        if marks.get("run.ai/MNNVL", "None") not in ("None", "Preferred", "Required"):
            raise Refusal(400, "run.ai/MNNVL must be None, Preferred or Required")
        for entry in spec.get("tolerations") or []:
            if not entry.get("key") or (entry.get("operator") == "Exists") == bool(entry.get("value")):
                raise Refusal(400, f"spec.tolerations: {entry} needs a key, and a value unless it is Exists")
        for entry in spec.get("imagePullSecrets") or []:
            if entry.get("userCredential") and entry.get("name") not in self.credentials:
                raise Refusal(400, f"spec.imagePullSecrets: no credential {entry.get('name')}")

    def words(self, spec: Mapping[str, Any]) -> list[str]:
        """command and args, which are single strings, as the container's argv."""
        parts = [spec.get("command") or "", spec.get("args") or ""]
        try:
            return [word for part in parts for word in (shlex.split if self.splitter == "shell" else str.split)(part)]
        except ValueError as error:
            raise Refusal(400, f"spec.command or spec.args: {error}") from None

    def _check_env(self, entries: list[dict[str, Any]]) -> None:
        check_env_names(entries, "environmentVariables")
        for number, entry in enumerate(entries):
            where = f"environmentVariables[{number}]"
            given = [source for source in SOURCES if entry.get(source) is not None]
            if len(given) != 1:
                raise Refusal(400, f"{where} must have exactly one of {', '.join(SOURCES)}")
            if len(entry.get("value") or "") > VALUE_LIMIT:
                raise Refusal(400, f"{where}.value: at most {VALUE_LIMIT} characters, got {len(entry['value'])}")
            reference = entry.get("userCredential")
            if reference and reference.get("key") not in self.credentials.get(reference.get("name"), {}):
                raise Refusal(400, f"{where}.userCredential: no credential {reference}")
            if entry.get("podFieldRef") and entry["podFieldRef"].get("path") not in POD_FIELDS:
                raise Refusal(400, f"{where}.podFieldRef.path must be one of {', '.join(POD_FIELDS)}")

    def _check_distributed(self, body: dict[str, Any]) -> None:
        spec = body["spec"]
        if spec.get("distributedFramework") != "PyTorch":
            raise Refusal(501, f"distributedFramework {spec.get('distributedFramework')!r} is not emulated")
        workers = spec.get("numWorkers") or 0
        if workers < 1:
            raise Refusal(400, "spec.numWorkers must be at least 1")
        least, most = spec.get("minReplicas"), spec.get("maxReplicas")
        if (least is None) != (most is None) or not (least or workers) <= workers <= (most or workers):
            raise Refusal(400, "spec.minReplicas <= numWorkers <= maxReplicas, both or neither")
        if body.get("masterSpecSameAsWorker") and body.get("masterSpec"):
            raise Refusal(400, "masterSpecSameAsWorker and masterSpec exclude each other")

    def _find(self, request: Request) -> RunaiJob:
        job = self.jobs.get(request.params["id"])
        kind = request.params.get("kind")
        if job is None or job.phase == "deleted" or kind not in (None, job.kind):
            raise Refusal(404, f"no workload {request.params['id']} among the {kind or 'workloads'}")
        return job

    def _get(self, request: Request) -> Reply:
        with self.lock:
            return Reply(body=self._find(request).document())

    def _describe(self, request: Request) -> Reply:
        """Of the official client's WorkloadDetailed what tells why it waits."""
        with self.lock:
            job = self._find(request)
            said = {"phaseMessage": self.waits} if self.waits and job.phase == "queued" else {}
            return Reply(body={"id": job.id, "name": job.name, "projectName": job.project, "phase": job.state, **said})

    def _list(self, request: Request) -> Reply:
        """Of the official client's Workload only what tells a workload by its name."""
        conditions = request.query.get("filterBy", [])
        if not all(condition.startswith("name==") for condition in conditions):
            raise Refusal(400, f"filterBy {conditions!r} is not emulated: only name==…")
        offset, limit = request.number("offset", 0), request.number("limit", 50, 1)
        with self.lock:
            jobs = [job for job in self.jobs.values() if job.phase != "deleted"]
            jobs = [job for job in jobs if all(condition == f"name=={job.name}" for condition in conditions)]
            page = [
                {"id": job.id, "name": job.name, "projectName": job.project, "phase": job.state}
                for job in jobs[offset : offset + limit]
            ]
        return Reply(body={"workloads": page, "next": offset + len(page) if offset + len(page) < len(jobs) else None})

    def _delete(self, request: Request) -> Reply:
        with self.lock:
            self._find(request).delete()
        return Reply(202, {})

    def _suspend(self, request: Request) -> Reply:
        with self.lock:
            self._find(request).stop()
        return Reply(202, {})

    def _resume(self, request: Request) -> Reply:
        with self.lock:
            job = self._find(request)
            if job.phase != "stopped":
                raise Refusal(409, f"the workload is {job.state}, not Stopped")
            job.launch()
        return Reply(202, {})

    def _events(self, request: Request) -> Reply:
        with self.lock:
            job = self._find(request)
            events = [job.event_document(event) for event in job.events]
        if request.one("sortOrder", "desc") == "desc":
            events.reverse()
        offset = request.number("offset", 0)
        return Reply(body={"events": events[offset : offset + request.number("limit", 50, 1)]})
