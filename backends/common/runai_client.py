"""The client of run:AI's control plane: its REST API, a token that is renewed, and its errors in plain English."""

import math
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

import requests

import screen
from backends.common import http
from transport import Refusal

PAGES = 1_000  # of 50 entries each: far more than any installation has
FRESH_S = 1.0  # seconds that a list of pods serves: the ranks that are followed ask for theirs at the same time


class Project(NamedTuple):
    """A project, as the control plane knows it."""

    id: str
    cluster: str  # its id
    namespace: str  # runai-<name>, unless another was chosen


class Client:
    """The control plane's REST API with the profile's client id and secret; a token is requested when it is needed."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.base = settings["base_url"].rstrip("/")
        self.origin = "%s://%s" % urllib.parse.urlsplit(self.base)[:2]
        self.kube = (settings.get("kube_apiserver_url") or "").rstrip("/")
        self.identity, self.secret = settings["client_id"], settings["client_secret"]
        self.session = http.harden(requests.Session(), settings.get("ca_bundle"))
        self.session.mount(self.base + "/token", http.Adapter(settings.get("ca_bundle"), http.REPEATABLE | {"POST"}))
        self.token = ""
        self.listed, self.names, self.apis = -math.inf, list[str](), dict[str, str]()  # see pods() and cluster_api()
        screen.conceal(self.secret)

    def signed_in(self) -> "Client":
        self.token = self.ask_token()
        return self

    def call(self, method: str, path: str, doing: str, body: Any = None, sent: str = "", secrets: tuple[str, ...] = (),
             **query: str) -> Any:
        """The answer's JSON, {} where it has none. Raises Refusal."""
        response = self.send(method, self.base + path, doing, body, sent, query)
        if response.status_code >= 400:
            raise http.refused("run:AI", response, doing, (self.secret, *secrets))
        try:
            answer = response.json() if response.content else {}
            if isinstance(answer, dict) or (isinstance(answer, list) and path == "/clusters"):
                return answer
        except (ValueError, RecursionError):
            pass
        raise Refusal("run:AI at %s did not answer with a JSON object to: %s" % (self.base, doing),
                      "check base_url: it ends in /api/v1", 5)

    def send(self, method: str, url: str, doing: str, body: Any = None, sent: str = "", query: Any = None,
             stream: bool = False) -> Any:
        """One request with the bearer token; a token that has expired is renewed, once."""
        for attempt in (1, 2):
            if not self.token:
                self.token = self.ask_token()
            try:
                response = self.session.request(method, url, json=body, params=query, stream=stream,
                                                headers={"Authorization": "Bearer " + self.token})
            except requests.RequestException as error:
                raise http.unreachable("run:AI", url, error, sent) from None
            if response.status_code != 401 or attempt == 2:
                break
            self.token = ""
        return response

    def ask_token(self) -> str:
        body = {"grantType": "client_credentials", "clientId": self.identity, "clientSecret": self.secret}
        try:
            response = self.session.post(self.base + "/token", json=body)
        except requests.RequestException as error:
            raise http.unreachable("run:AI", self.base, error) from None
        if response.status_code >= 400:
            refusal = http.refused("run:AI", response, "get a token for client_id %s" % self.identity, [self.secret])
            if refusal.code == 4:
                refusal.fix = http.CREDENTIALS["run:AI"]
            raise refusal
        try:
            token = str(response.json()["accessToken"])
            screen.conceal(token)
            return token
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Refusal("run:AI at %s gave no token" % self.base, "check base_url: it ends in /api/v1", 5) from None

    def project(self, name: str) -> "Project":
        """Raises Refusal (exit code 4) that names the existing projects."""
        known: list[str] = []
        for project in self.pages("/org-unit/projects", "projects", "list the projects"):
            if project["name"] == name:
                status = project.get("status") if isinstance(project.get("status"), dict) else {}
                return Project(str(project["id"]), str(project["clusterId"]),
                               str(status.get("namespace") or "runai-" + name))
            known += [str(project["name"])] * (len(known) < 100)
        raise Refusal("run:AI has no project %r that this client may see" % name,
                      "it sees %s; set project_name in the profile" % (", ".join(known) or "none"), 4)

    def pages(self, path: str, key: str, doing: str) -> Iterator[Any]:
        """The entries of a list, page by page. Raises Refusal."""
        offset, deadline = 0, time.monotonic() + http.ANSWER_S
        for _ in range(PAGES):
            page = self.call("GET", path, doing, offset=str(offset), limit="50")
            entries = page.get(key, [])[:50]
            yield from entries
            offset += len(entries)
            if not entries or not page.get("next"):
                return
            if time.monotonic() > deadline:
                raise http.endless(self.origin, "has not listed its %s after %.0f s" % (key, http.ANSWER_S))
        raise http.endless(self.origin, "lists more than %d %s" % (50 * PAGES, key))

    def pods(self, workload: str) -> list[str]:
        """The names of a workload's pods, asked for once in FRESH_S for all ranks. Raises Refusal."""
        if time.monotonic() > self.listed + FRESH_S:
            self.names = [str(pod["name"]) for pod in self.pages("/workloads/%s/pods" % workload, "pods",
                                                                 "list the pods")]
            self.listed = time.monotonic()
        return self.names

    def cluster_api(self, cluster: str) -> str:
        """Where a cluster serves its own API: by the domain that the control plane gives for it, with the scheme that
        this has itself, else beside it. Raises Refusal."""
        if cluster not in self.apis:
            found = self.call("GET", "/clusters", "list the clusters")
            entries = found.get("clusters", []) if isinstance(found, dict) else found
            domain = next((str(each.get("domain") or "") for each in entries if each.get("uuid") == cluster), "")
            scheme, host = self.origin.split("//")
            self.apis[cluster] = "%s//%s" % (scheme, domain.rpartition("://")[2].strip("/") or host)
        return self.apis[cluster]

    def find(self, name: str) -> str | None:
        """The id of a workload, by its name; None if there is none."""
        page = self.call("GET", "/workloads", "look for workload " + name, filterBy="name==" + name)
        return next((str(workload["id"]) for workload in page.get("workloads", []) if workload["name"] == name), None)
