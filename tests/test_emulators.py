"""The emulators are what every other cloud test leans on: here they are held against the real clients and the rules.

The leptonai SDK, nemo-run's executors and `requests` talk to them unmodified.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

os.environ.setdefault("LEPTON_CACHE_DIR", os.path.join(tempfile.gettempdir(), "no-such-lepton-cache"))  # read at import

from leptonai.api.v1.types.affinity import LeptonResourceAffinity
from leptonai.api.v1.types.common import Metadata
from leptonai.api.v1.types.deployment import EnvValue, EnvVar, LeptonContainer, Mount
from leptonai.api.v1.types.job import LeptonJob, LeptonJobUserSpec
from leptonai.api.v2.client import APIClient

from tests import newer
from tests.emulators import Image, LeptonEmulator, RunaiEmulator, fields, no_pods_because
from tests.emulators.rules import check, expand
from tests.emulators.server import Refusal

pytestmark = pytest.mark.skipif(no_pods_because() is not None, reason=str(no_pods_because()))

ROOT = Path(__file__).resolve().parent.parent
NO_RETRY = {"max_failure_retry": 0, "max_job_failure_retry": 0}


def gone(pid: int, seconds: float = 5) -> bool:
    """Has this process ended?"""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.02)
    return False


# --- Lepton -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lepton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LeptonEmulator]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with LeptonEmulator(root=tmp_path / "lepton", secrets={"my-token": "s3cret $(A) $$"}, grace=0.3) as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        yield server


def lepton_job(server: LeptonEmulator, name: str, *argv: str, workers: int = 1, **spec: Any) -> LeptonJob:
    """A job as the SDK's own types spell it."""
    env = [EnvVar(name=key, value=value) for key, value in spec.pop("env", {}).items()]
    mounts = [Mount(**mount) for mount in spec.pop("mounts", [])]
    values: dict[str, Any] = {
        "resource_shape": "gpu.8xh100-80gb",
        "affinity": LeptonResourceAffinity(allowed_dedicated_node_groups=[next(iter(server.groups))]),
        "container": LeptonContainer(image=spec.pop("image", "python"), command=list(argv)),
        "completions": workers,
        "parallelism": workers,
        "intra_job_communication": True,
        "envs": env + spec.pop("secret_envs", []),
        "mounts": mounts,
    }
    return LeptonJob(metadata=Metadata(id=name), spec=LeptonJobUserSpec(**{**values, **spec}))


def lepton_run(server: LeptonEmulator, name: str, *argv: str, **spec: Any) -> Any:
    """Submit through the SDK; the emulator's own view of the job."""
    APIClient().job.create(lepton_job(server, name, *argv, **spec))
    return server.jobs[name]


def test_lepton_fields_are_the_sdks() -> None:
    shape = newer.shape_of(LeptonJob)
    assert {name: shape[name] for name in ("metadata", "spec")} == fields.LEPTON_JOB


def test_lepton_fields_are_the_newer_sdks_too() -> None:
    """So that each request of these tests, which the emulator takes, is one that both know."""
    assert newer.ask([]) == {"lacking": [], "refused": []}


def test_lepton_job_from_create_to_completed(lepton: LeptonEmulator) -> None:
    script = "env; echo pid $$; hostname; getent hosts worker-1.two-job-svc; sleep 0.3; echo end $LEPTON_WORKER_ID"
    job = lepton_run(lepton, "two", "bash", "-c", script.replace("$$", "$BASHPID"), workers=2)
    client = APIClient()
    assert job.wait("Running", "Completed") == "Running"
    replicas = client.job.get_replicas("two")
    assert [re.fullmatch(r"two-\d-[a-z0-9]{5}", r.metadata.id_) is not None for r in replicas] == [True, True]
    log = "".join(client.job.get_log("two", replicas[1]))  # follows to the end of the pod
    assert f"end {replicas[1].metadata.id_}" in log.splitlines()
    assert job.wait("Completed") == "Completed"
    assert "".join(client.job.get_log("two", replicas[1])) == log  # a finished job's log prints and ends
    status = client.job.get("two").status
    assert status is not None and (status.state, status.succeeded, status.active) == ("Completed", 2, 0)
    assert "pid 1" in log and "\nworker-1\n" in log and "127.0.1.2 " in log
    names = {line.partition("=")[0] for line in log.splitlines() if "=" in line}
    ours = {"PATH", "HOME", "LANG", "HOSTNAME", "PWD", "SHLVL", "_"}  # the image's, the runtime's, bash's own
    assert {name for name in names if not name.startswith("LEPTON_")} <= ours
    assert "LEPTON_JOB_WORKER_INDEX=1" in log and "LEPTON_JOB_TOTAL_WORKERS=2" in log
    assert "LEPTON_RESOURCE_ACCELERATOR_NUM=8" in log and "LEPTON_SUBDOMAIN=two-job-svc" in log
    assert not names & {"NODE_RANK", "MASTER_ADDR"}


def test_a_pod_has_its_own_root_and_no_network(lepton: LeptonEmulator) -> None:
    probe = f"""
import os, socket
for host, port in (("127.0.0.1", {lepton.port}), ("192.0.2.1", 80)):
    try: socket.create_connection((host, port), 2); print("REACHED", host)
    except OSError as error: print("no way", error.errno)
server = socket.create_server(("worker-0.alone-job-svc", 4711))
print("loopback works", socket.create_connection(("worker-0", 4711)).getpeername()[0])
print(os.getpid(), sorted(p for p in os.listdir("/proc") if p.isdigit()),
      [name for name in os.listdir("/tmp") if not {str(ROOT)!r}.startswith("/tmp/" + name)])  # the running Python is kept
print("repository hidden:", not os.path.exists({str(ROOT / "tests")!r}), "wget:", os.path.exists("/usr/bin/wget"))
open("/usr/written", "w").close()
"""
    lepton.image = Image(hide=["wget", "/usr/share"])  # or LeptonEmulator(hide=…)
    job = lepton_run(lepton, "alone", "python3", "-c", probe, **NO_RETRY)
    job.wait("Completed")
    lines = job.pods[0].output.splitlines()
    assert lines[0].startswith("no way") and lines[1].startswith("no way")
    assert lines[2:] == ["loopback works 127.0.1.1", "1 ['1'] []", "repository hidden: True wget: False"]
    assert not Path("/usr/written").exists() and Path("/usr/share").is_dir()


def test_lepton_failure_keeps_the_exit_code(lepton: LeptonEmulator) -> None:
    job = lepton_run(lepton, "fails", "sh", "-c", "exit 37", **NO_RETRY)
    assert job.wait("Failed", "Completed") == "Failed"
    assert (job.pods[0].exit_code, job.pods[0].reason) == (37, "Error")
    assert APIClient().job.get("fails").status.failed == 1


@pytest.mark.parametrize("spec", [{}, {"max_failure_retry": 0}, {"max_job_failure_retry": 0}, NO_RETRY])
def test_lepton_dead_rank_ends_the_job_only_without_retries(lepton: LeptonEmulator, spec: dict[str, int]) -> None:
    job = lepton_run(lepton, "ranks", "sleep", "60", workers=2, **spec)
    job.wait("Running")
    while not all(pod.state == "Running" for pod in job.pods):
        time.sleep(0.01)
    rank0, rank1 = job.pods
    rank1.kill()
    assert rank1.wait() == 137
    if spec == NO_RETRY:
        job.wait("Failed", timeout=3)
        assert rank0.wait() == 137  # sleep as process 1 does not hear SIGTERM: the grace period, then SIGKILL
        return
    deadline = time.monotonic() + 5
    while len(job.replicas[1].runs) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert job.state in ("Running", "Restarting") and len(job.replicas[1].runs) == 2
    assert job.failures == (1 if spec == {"max_failure_retry": 0} else 0)
    ids = [replica.metadata.id_ for replica in APIClient().job.get_replicas("ranks")]
    assert len(ids) == len(set(ids)) >= 3


def test_lepton_stop_delete_and_archive(lepton: LeptonEmulator) -> None:
    client = APIClient()
    job = lepton_run(
        lepton, "stops", "sh", "-c", "trap 'echo TERM; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    )
    while "up" not in (job.pods[0].output if job.pods else ""):
        time.sleep(0.02)
    client.job.update("stops", {"spec": {"stopped": True}})
    job.wait("Stopped")
    assert "TERM" in job.pods[0].output
    assert client.job.delete("stops") and job.wait("Deleted")
    assert client.job.get("stops").status.state == "Deleted"  # alive_and_archive
    with pytest.raises(RuntimeError, match="404"):
        client.job.get("stops", job_query_mode="alive_only")
    with pytest.raises(RuntimeError, match="404"):
        client.job.delete("stops")
    lepton_run(lepton, "stops", "true", ttl_seconds_after_finished=0).wait("Archived")  # the name is free again
    assert client.job.list_all() == []
    assert [j.metadata.id_ for j in client.job.list_all(job_query_mode="archive_only")] == ["stops"]


def test_lepton_says_no(lepton: LeptonEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    client = APIClient()
    client.job.create(lepton_job(lepton, "taken", "sleep", "9"))
    with pytest.raises(RuntimeError, match=r"409 .*already exists"):
        client.job.create(lepton_job(lepton, "taken", "true"))
    for token, status in ((lepton.foreign_token, 403), ("wrong", 401)):
        with pytest.raises(RuntimeError, match=str(status)):
            APIClient(auth_token=token).job.get("taken")
    with pytest.raises(RuntimeError, match="403"):
        APIClient(url=lepton.url.replace("ws0", "ws1")).job.list_all()
    get, post = client._get, client._post
    assert get("/deployments").status_code == 404
    assert client._put("/jobs", json={}).status_code == 405
    assert get("/jobs", params={"nonsense": 1}).status_code == 400
    assert post("/jobs", data="{not json").status_code == 400
    assert post("/jobs", data="x" * (3 * 1024 * 1024 + 1)).status_code == 413
    assert client._patch("/jobs/taken", json={"spec": {"completions": 2}}).status_code == 400
    assert lepton.requests[-1] == ("PATCH", "/jobs/taken", 400)


BAD_SPECS: list[tuple[dict[str, Any], str]] = [
    ({"unknown": 1}, 'unknown field "unknown"'),
    ({"container": {"image": "x", "command": ["true"], "args": []}}, 'unknown field "args"'),
    ({"completions": "2"}, "must be a integer"),
    ({"completions": 0}, "must be positive"),
    ({"resource_shape": ""}, "unknown resource_shape"),
    ({"container": {"image": "x"}}, "are required"),
    ({"affinity": {"allowed_dedicated_node_groups": ["default-group"]}}, "not found"),  # the name is not the id
    ({"envs": [{"name": "1A", "value": "x"}]}, "not a valid"),
    ({"envs": [{"name": "A B", "value": "x"}]}, "not a valid"),
    ({"envs": [{"name": "LEPTON_JOB_NAME", "value": "x"}]}, "reserved"),
    ({"envs": [{"name": "A", "value": "x"}, {"name": "A", "value": "y"}]}, "duplicate"),
    ({"envs": [{"name": "A", "value_from": {"secret_name_ref": "nobody"}}]}, 'secret "nobody" not found'),
    ({"mounts": [{"path": "/", "mount_path": "/x"}]}, r"mounts\[0\].from is required"),
    ({"mounts": [{"from": "node-nfs:other", "path": "/", "mount_path": "/x"}]}, "unknown volume"),
    ({"mounts": [{"from": "node-nfs:shared", "path": "/../..", "mount_path": "/x"}]}, "must not contain"),
    ({"mounts": [{"from": "node-nfs:shared", "path": "/", "mount_path": "/usr//local/"}]}, "is reserved"),
    ({"segment_config": {"count_per_segment": 2}}, "do not divide 1"),
    ({"reservation_config": {"reservation_id": "gone"}}, 'reservation "gone" not found'),
    ({"queue_config": {"priority_class": "urgent"}}, "priority_class"),
    ({"ttl_seconds_after_finished": -1}, "must not be negative"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_SPECS)
def test_lepton_refuses_specs(lepton: LeptonEmulator, change: dict[str, Any], reason: str) -> None:
    client = APIClient()
    body = client.job.safe_json(lepton_job(lepton, "bad", "true"))
    assert isinstance(body, dict)
    body["spec"].update(change)
    answer = client._post("/jobs", json=body)
    assert answer.status_code == 400 and re.search(reason, answer.json()["message"]), answer.text
    assert not lepton.jobs


@pytest.mark.parametrize(
    ("name", "fits"),
    [("a", 1), ("a" * 36, 1), ("a" * 37, 0), ("a-", 0), ("1a", 0), ("a_b", 0), ("A", 0), ("", 0), ("a.b", 0)],
)
def test_lepton_job_names(lepton: LeptonEmulator, name: str, fits: int) -> None:
    lepton.missing_images.add("python")  # no pod is needed
    body = APIClient().job.safe_json(lepton_job(lepton, name, "true"))
    assert APIClient()._post("/jobs", json=body).status_code == (201 if fits else 400)


def test_lepton_object_limit_to_the_byte(lepton: LeptonEmulator) -> None:
    client = APIClient()
    chunks = {f"CHUNK_{number}": "x" * 98304 for number in range(15)}
    base = client.job.safe_json(lepton_job(lepton, "size-0", "true", env={**chunks, "FILL": ""}, **NO_RETRY))
    fill = lepton.object_limit - len(json.dumps(base, separators=(",", ":")))
    for name, more, status in (("size-1", -1, 201), ("size-2", 0, 201), ("size-3", 1, 500)):
        job = lepton_job(lepton, name, "true", env={**chunks, "FILL": "y" * (fill + more)}, **NO_RETRY)
        answer = client._post("/jobs", json=client.job.safe_json(job))
        assert answer.status_code == status
    assert answer.json()["message"] == "etcdserver: request is too large"
    for name in ("size-1", "size-2"):
        lepton.jobs[name].wait("Completed")


@pytest.mark.parametrize(("length", "starts"), [(131069, True), (131070, False)])
def test_exec_meets_the_kernels_limit(lepton: LeptonEmulator, length: int, starts: bool) -> None:
    job = lepton_run(lepton, "big", "true", env={"A": "x" * length}, **NO_RETRY)
    job.wait("Completed" if starts else "Failed")
    if not starts:
        assert (job.pods[0].exit_code, job.pods[0].reason) == (128, "StartError")
        assert "argument list too long" in job.pods[0].message
        assert [event.reason for event in job.events] == ["StartError"]


def test_kubernetes_rewrites_text(lepton: LeptonEmulator) -> None:
    env = {"A": "1", "B": "$(A) $(NONE) $$(A) $$ $A $(", "C": "$(LEPTON_JOB_NAME) $(D)", "D": "later"}
    secret = EnvVar(name="S", value_from=EnvValue(secret_name_ref="my-token"))
    code = "import os, sys; print([os.environ[n] for n in 'BCS'], sys.argv[1:])"
    job = lepton_run(lepton, "dollar", "python3", "-c", code, "$(D)-$$-$(X)", env=env, secret_envs=[secret])
    job.wait("Completed")
    # what comes from a secret is not touched; a reference to a later variable is not resolved; the command sees all
    seen = (["1 $(NONE) $(A) $ $A $(", "dollar $(D)", "s3cret $(A) $$"], ["later-$-$(X)"])
    assert job.pods[0].output.strip() == f"{seen[0]} {seen[1]}"
    assert expand("$$$(A)$$$$", {"A": "x"}) == "$x$$"


def test_lepton_volumes_stay(lepton: LeptonEmulator) -> None:
    mount = {"from": "node-nfs:shared", "path": "/team a", "mount_path": "/mnt/$x y"}
    lepton_run(lepton, "writes", "sh", "-c", "echo kept > '/mnt/$x y/file'", mounts=[mount]).wait("Completed")
    assert (lepton.volumes["node-nfs:shared"] / "team a/file").read_text() == "kept\n"
    locked = {**mount, "mount_options": {"read_only": True}}
    job = lepton_run(lepton, "reads", "sh", "-c", "cat /mnt/*/file; touch '/mnt/$x y/b'", mounts=[locked], **NO_RETRY)
    job.wait("Failed")
    assert job.pods[0].output.startswith("kept\n") and "Read-only" in job.pods[0].output


def test_lepton_lists_by_pages(lepton: LeptonEmulator) -> None:
    lepton.missing_images.add("python")
    for number in range(5):
        lepton_run(lepton, f"page-{number}", "true")
    client = APIClient()
    assert len(client.job.list_all()) == 5
    assert [path for _, path, _ in lepton.requests[-2:]] == ["/jobs", "/jobs"]  # the SDK asks until a page is empty
    assert [len(client.job.list_all(page=page, page_size=2)) for page in (1, 2, 3, 4)] == [2, 2, 1, 0]
    assert [job.metadata.id_ for job in client.job.list_all(q="e-3")] == ["page-3"]


def test_lepton_image_and_nodes_that_are_missing(lepton: LeptonEmulator) -> None:
    lepton.missing_images.add("typo")
    job = lepton_run(lepton, "image", "true", image="typo")
    assert job.wait("Starting") == "Starting"
    assert [event.reason for event in APIClient().job.get_events("image")] == ["ErrImagePull", "ImagePullBackOff"]
    group = APIClient().nodegroup.list_all()[0]
    lepton.unschedulable.update(lepton.nodes[str(group.metadata.id_)])
    assert all(node.spec.unschedulable for node in APIClient().nodegroup.list_nodes(group))
    waiting = lepton_run(lepton, "nodes", "true")
    assert waiting.state == "Queueing"
    lepton.unschedulable.clear()
    waiting.wait("Completed")


def test_faults(lepton: LeptonEmulator) -> None:
    def get(timeout: float = 5) -> requests.Response:
        return requests.get(lepton.url + "/jobs", headers={"Authorization": f"Bearer {lepton.token}"}, timeout=timeout)

    lepton.fault("status", status=429, retry_after=1.5, times=2, method="GET", path="^/jobs$")
    assert requests.get(lepton.url + "/dedicated-node-groups", timeout=5).status_code == 401  # not for this path
    assert [(a.status_code, a.headers.get("Retry-After")) for a in (get(), get())] == [(429, "1.5")] * 2
    assert get().status_code == 200
    lepton.fault("slow", seconds=0.3)
    begin = time.monotonic()
    assert get().status_code == 200 and time.monotonic() - begin >= 0.3
    for kind, error in (("reset", requests.exceptions.RequestException), ("drop", requests.ConnectionError)):
        lepton.fault(kind)
        with pytest.raises(error):
            get()
        assert lepton.requests[-1].status == 0
    lepton.fault("hang")
    with pytest.raises(requests.Timeout):
        get(timeout=0.3)
    lepton.fault("drop", method="POST", path="/jobs$", done=True)  # carried out, and only the answer is lost
    with pytest.raises(requests.ConnectionError):
        APIClient().job.create(lepton_job(lepton, "lost", "true"))
    assert lepton.jobs["lost"].wait("Completed")
    with pytest.raises(ValueError, match="unknown fault"):
        lepton.fault("flood")


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.emulators import LeptonEmulator
from tests.emulators.pods import Network, Pod, PodSpec
from pathlib import Path
spec = PodSpec("p", "h", ["sh", "-c", "sleep 99 & sleep 99"], {{}})
pod = Pod(spec, Path({str(tmp_path)!r}) / "pod", Network(), lambda pod: None)
pod.start()
while pod.pid is None: time.sleep(0.01)
print("PID", pod.pid, pod._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    output = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=20).stdout
    pids = [int(word) for word in re.findall(r"PID (\d+) (\d+)", output)[0]]
    assert all(gone(pid) for pid in pids)
    with LeptonEmulator(root=tmp_path / "closed") as server:
        os.environ.update(env := server.env())
        job = lepton_run(server, "closing", "sleep", "60", workers=2)
        job.wait("Running")
        pids = [pod.pid for pod in job.pods if pod.pid]
    assert pids and all(gone(pid) for pid in pids)
    assert "emulator" not in Path("/proc/mounts").read_text()
    for name in env:
        del os.environ[name]


def test_nemo_runs_lepton_executor_talks_to_it(lepton: LeptonEmulator) -> None:
    from nemo_run.core.execution.lepton import LeptonExecutor

    folder = lepton.volumes["node-nfs:shared"] / "run"
    folder.mkdir()
    (folder / "launch_script.sh").write_text("sleep 0.3; echo from nemo-run, $LEPTON_JOB_WORKER_INDEX, $A")
    mounts = [{"path": "/", "mount_path": "/nemo", "from": "node-nfs:shared"}]
    executor = LeptonExecutor(
        container_image="python", nemo_run_dir="/nemo", nodes=2, gpus_per_node=8, resource_shape="gpu.8xh100",
        node_group="default-group", mounts=mounts, env_vars={"A": "b"}, can_preempt=True,
    )  # fmt: skip
    executor.lepton_job_dir = "/nemo/run"
    job = executor.create_lepton_job("from-nemo-run")
    lepton.jobs["from-nemo-run"].wait("Completed")
    assert executor.status(str(job.metadata.id_)) == "Completed"
    assert lepton.jobs["from-nemo-run"].pods[1].output == "from nemo-run, 1, b\n"
    executor.cancel("from-nemo-run")
    lepton.jobs["from-nemo-run"].wait("Deleted")


# --- run:AI -------------------------------------------------------------------------------------------------------


class Client:
    """As small a client as can be."""

    def __init__(self, server: RunaiEmulator) -> None:
        self.server = server
        body = {"grantType": "client_credentials", "clientId": server.client_id, "clientSecret": server.client_secret}
        answer = requests.post(server.url + "/token", json=body, timeout=10)
        self.headers = {"Authorization": "Bearer " + answer.json()["accessToken"]}

    def __call__(self, method: str, path: str, body: Any = None, base: str | None = None, **query: Any) -> Any:
        url = (self.server.url if base is None else base) + path
        return requests.request(method, url, json=body, params=query, headers=self.headers, timeout=10)

    def request(self, name: str, command: str, args: str = "", **spec: Any) -> Any:
        """A creation request."""
        project = next(iter(self.server.projects))
        values = {"image": "python", "command": command, **({"args": args} if args else {}), **spec}
        top = {"projectId": project, "clusterId": self.server.cluster_id, "useGivenNameAsPrefix": True}
        return {"name": name, **top, "spec": values}

    def run(self, kind: str, name: str, command: str, args: str = "", **spec: Any) -> Any:
        """Create a workload; the emulator's own view of it."""
        top = spec.pop("top", {})
        if kind == "distributed":
            spec = {"distributedFramework": "PyTorch", "numWorkers": 2, **spec}
        answer = self("POST", f"/workloads/{kind}", {**self.request(name, command, args, **spec), **top})
        assert answer.status_code == 202 and answer.json()["actualPhase"] == "Creating", answer.text
        return self.server.jobs[answer.json()["workloadId"]]


@pytest.fixture
def runai(tmp_path: Path) -> Iterator[RunaiEmulator]:
    keys = {"hf": {"token": "hf_x $(A)"}}
    with RunaiEmulator(root=tmp_path / "runai", credentials=keys, secrets=keys, grace=0.3) as server:
        yield server


@pytest.fixture
def client(runai: RunaiEmulator) -> Client:
    return Client(runai)


ONCE = {"restartPolicy": "Never", "backoffLimit": 0, "cleanPodPolicy": "Running"}


def test_runai_fields_are_runapys() -> None:
    models = pytest.importorskip("runai.models")
    for kind, name in (("workspaces", "Workspace"), ("trainings", "Training"), ("distributed", "Distributed")):
        assert fields.RUNAI_REQUESTS[kind] == newer.shape_of(getattr(models, name + "CreationRequest")), kind


def test_runai_tokens(runai: RunaiEmulator, client: Client) -> None:
    url = runai.url + "/token"
    for secret, status in ((runai.client_secret, 200), ("wrong", 401)):
        for grant in (("client_credentials", "clientID", "clientSecret"), ("app_token", "appId", "appSecret")):
            body = {"grantType": grant[0], grant[1]: runai.client_id, grant[2]: secret}
            answer = requests.post(url, json=body, timeout=10)
            assert answer.status_code == status, answer.text
    assert "wrong secret" in answer.json()["message"]
    assert requests.post(url, json={"grantType": "guess"}, timeout=10).status_code == 400
    assert requests.get(runai.url + "/org-unit/projects", timeout=10).status_code == 401
    runai.tokens = dict.fromkeys(runai.tokens, time.time() - 1)
    assert client("GET", "/org-unit/projects").json()["message"].endswith("expired")


def test_runai_projects_by_pages(tmp_path: Path) -> None:
    with RunaiEmulator(root=tmp_path, projects={f"p{number:03}": 8 for number in range(120)}) as server:
        client, names, offset = Client(server), [], 0
        while offset is not None:
            page = client("GET", "/org-unit/projects", offset=offset, limit=1000).json()
            names += [project["name"] for project in page["projects"]]
            offset = page.get("next")
        assert len(names) == len(set(names)) == 120 and len(page["projects"]) == 20
        found = client("GET", "/org-unit/projects", filterBy="name==p077").json()["projects"]
        assert [project["name"] for project in found] == ["p077"]


def test_runai_training_and_its_log(runai: RunaiEmulator, client: Client) -> None:
    args = "-c 'env; echo one two; sleep 0.3; echo ended'"
    entries = [
        {"name": "A", "value": "$$x"},
        {"name": "T", "userCredential": {"name": "hf", "key": "token"}},
        {"name": "P", "podFieldRef": {"path": "metadata.name"}},
    ]
    job = client.run("trainings", "hello", "bash", args, environmentVariables=entries, compute={"gpuDevicesRequest": 8})
    assert re.fullmatch("hello-[a-z0-9]{5}", job.name)
    job.wait("Running")
    pod = f"/api/v1/namespaces/runai-team-a/pods/{job.name}-0-0/log"
    log = client("GET", pod, base=runai.kube_apiserver_url, follow="true", container=job.name).text
    assert log.endswith("ended\n") and f"HOSTNAME={job.name}-0-0" in log and "RUNAI_NUM_OF_GPUS=8" in log
    assert {"A=$x", "T=hf_x $(A)", f"P={job.name}-0-0"} <= set(log.splitlines()) and "\nRANK=" not in log
    assert job.wait("Completed") and client("GET", f"/workloads/trainings/{job.id}").json()["requestedName"] == "hello"
    assert client("GET", pod, base=runai.kube_apiserver_url, tailLines=1).text == "ended\n"
    assert client("GET", pod, base=runai.kube_apiserver_url, container="pytorch").status_code == 400
    assert client("GET", f"/workloads/distributed/{job.id}").status_code == 404
    runai.kube_logs = False
    assert client("GET", pod, base=runai.kube_apiserver_url).json()["kind"] == "Status"
    path = f"/cluster-api/api/v1/team-a/workloads/training/runai/{job.name}/logs/download"
    assert client("GET", path, base=runai.origin).status_code == 404
    runai.cluster_logs = True
    assert client("GET", path, base=runai.origin).status_code == 404, "that is the control plane's address"
    domain = next(each["domain"] for each in client("GET", "/clusters").json() if each["uuid"] == runai.cluster_id)
    assert client("GET", path, base="http://" + domain).text == log
    assert client("GET", "/cluster-api/status", base="http://" + domain).text == "OK"
    assert [pod["name"] for pod in client("GET", f"/workloads/{job.id}/pods").json()["pods"]] == [job.name + "-0-0"]


@pytest.mark.parametrize(("policy", "starts"), [({}, 7), (ONCE, 1), ({"backoffLimit": 1}, 2)])
def test_runai_training_retries(client: Client, policy: dict[str, Any], starts: int) -> None:
    policy = {name: value for name, value in policy.items() if name != "cleanPodPolicy"}
    client.server.restart_seconds = 0.01
    job = client.run("trainings", "fails", "false", **policy)
    job.wait("Failed")
    assert len(job.replicas[0].runs) == starts


SHOW = "-c 'env | grep -E \"^(RANK|WORLD|MASTER|PET_|NODE_RANK|POD_INDEX)\" | sort; hostname'"


def test_runai_with_a_master(client: Client) -> None:
    job = client.run("distributed", "m", "sh", SHOW, top={"masterSpecSameAsWorker": True}, **ONCE)
    job.wait("Completed")
    assert [pod.wait() for pod in job.pods] == [0, 0, 0]
    master, _, second = (pod.output.split() for pod in job.pods)
    assert {f"MASTER_ADDR={job.name}-master-0", "WORLD_SIZE=3", "RANK=0", "POD_INDEX=0"} <= set(master)
    assert {"RANK=2", "PET_NODE_RANK=2", "POD_INDEX=1", f"{job.name}-worker-1"} <= set(second)


@pytest.mark.parametrize("elastic", [False, True])
def test_runai_without_a_master(client: Client, elastic: bool) -> None:
    job = client.run("distributed", "w", "sh", SHOW, **({"minReplicas": 2, "maxReplicas": 2} if elastic else {}))
    job.wait("Completed")
    assert [pod.wait() for pod in job.pods] == [0, 0]  # an elastic job completes with its first worker
    seen = set(job.pods[0].output.split())
    assert not [line for line in seen if line.startswith(("RANK", "MASTER", "WORLD", "NODE_RANK"))]
    assert (f"PET_RDZV_ENDPOINT={job.name}-worker-0:23456" in seen) == elastic == ("PET_RDZV_BACKEND=c10d" in seen)


@pytest.mark.parametrize("policy", [{}, ONCE, {"restartPolicy": "Never"}, {"backoffLimit": 0}])
def test_runai_dead_rank(client: Client, policy: dict[str, Any]) -> None:
    job = client.run("distributed", "ranks", "sleep", "60", **policy)
    job.wait("Running")
    rank0, rank1 = job.pods
    rank1.kill()
    rank1.wait()
    if policy == {}:  # started again in place, and the job goes on
        deadline = time.monotonic() + 5
        while len(job.replicas[1].runs) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert job.state in ("Running", "Initializing") and job.pods[1].name == rank1.name and rank0.alive
        return
    job.wait("Failed", timeout=3)
    if policy == ONCE:
        assert rank0.wait() == 137
    else:  # without cleanPodPolicy the others stay, and hold their GPUs
        time.sleep(0.3)
        assert rank0.alive
    assert len(job.replicas[1].runs) == (2 if policy == {"backoffLimit": 0} else 1)


def test_runai_suspend_is_a_post(client: Client) -> None:
    job = client.run("trainings", "stops", "sleep 60")
    job.wait("Running")
    path = f"/workloads/trainings/{job.id}/suspend"
    assert client("GET", path).status_code == 405
    assert client("POST", path.replace("trainings", "distributed")).status_code == 404
    assert client("POST", path).status_code == 202 and job.wait("Stopped")
    assert client("GET", f"/workloads/trainings/{job.id}").json()["desiredPhase"] == "Stopped"
    assert client("DELETE", f"/workloads/trainings/{job.id}").status_code == 202 and job.wait("Deleted")
    assert client("GET", f"/workloads/trainings/{job.id}").status_code == 404


@pytest.mark.parametrize(("length", "fits"), [(9_999, True), (10_000, True), (10_001, False)])
def test_runai_limits(client: Client, length: int, fits: bool) -> None:
    client.server.missing_images.add("python")
    chunk: Any = {"environmentVariables": [{"name": "CHUNK", "value": "x" * length}]}
    for body in (client.request("a", "true", **chunk), client.request("b", "true", "y" * length)):
        answer = client("POST", "/workloads/trainings", body)
        assert answer.status_code == (202 if fits else 400)
        assert fits or f"got {length}" in answer.json()["message"]


def test_runai_object_limit_counts_the_master(client: Client) -> None:
    client.server.missing_images.add("python")
    chunks = [{"name": f"C{number}", "value": "x" * 9216} for number in range(100)]
    spec: Any = {"distributedFramework": "PyTorch", "numWorkers": 2, "environmentVariables": chunks}
    body = client.request("big", "true", **spec)
    assert client("POST", "/workloads/distributed", body).status_code == 202
    answer = client("POST", "/workloads/distributed", {**body, "masterSpecSameAsWorker": True})
    assert (answer.status_code, answer.json()["message"]) == (500, "etcdserver: request is too large")


BAD_REQUESTS: list[tuple[str, dict[str, Any], dict[str, Any], int, str]] = [
    ("trainings", {"unknown": 1}, {}, 400, 'unknown field "unknown"'),
    ("trainings", {}, {"masterSpecSameAsWorker": True}, 400, "unknown field"),
    ("trainings", {"numWorkers": 2}, {}, 400, "unknown field"),
    ("trainings", {"restartPolicy": "never"}, {}, 400, "must be one of"),
    ("trainings", {"image": ""}, {}, 400, "image is required"),
    ("trainings", {}, {"name": "a_b"}, 400, "invalid name"),
    ("trainings", {}, {"name": "a" * 36}, 400, "invalid name"),
    ("trainings", {}, {"projectId": "1"}, 404, "no project"),
    ("trainings", {}, {"projectId": "4501"}, 403, "quota of 0 GPUs"),
    ("trainings", {"environmentVariables": [{"name": "A"}]}, {}, 400, "exactly one of"),
    ("trainings", {"environmentVariables": [{"name": "A", "value": "x", "secret": {}}]}, {}, 400, "exactly one of"),
    (
        "trainings",
        {"environmentVariables": [{"name": "A", "userCredential": {"name": "no", "key": "x"}}]},
        {},
        400,
        "no credential",
    ),
    ("trainings", {"storage": {"pvc": [{"claimName": "no", "path": "/x", "existingPvc": True}]}}, {}, 400, "not exist"),
    ("trainings", {"storage": {"nfs": [{"server": "x"}]}}, {}, 501, "not emulated"),
    ("distributed", {"numWorkers": 0, "distributedFramework": "PyTorch"}, {}, 400, "at least 1"),
    ("distributed", {"numWorkers": 2, "distributedFramework": "PyTorch", "minReplicas": 3}, {}, 400, "minReplicas"),
    ("jobs", {}, {}, 405, ""),
    ("trainings", {"priorityClass": "urgent"}, {}, 400, "unknown priorityClass"),
    ("trainings", {"nodePools": ["a", "nowhere"]}, {}, 400, "not found"),
    ("trainings", {"labels": [{"name": "a/b/c", "value": "x"}]}, {}, 400, "not valid"),
    ("trainings", {"labels": [{"name": "a", "value": "x y"}]}, {}, 400, "not valid"),
    ("trainings", {"tolerations": [{"key": "a", "operator": "Exists", "value": "x"}]}, {}, 400, "a value unless"),
    ("trainings", {"imagePullSecrets": [{"name": "no", "userCredential": True}]}, {}, 400, "no credential no"),
    ("trainings", {"annotations": [{"name": "kai.scheduler/segment-size", "value": "x"}]}, {}, 400, "a number"),
]


@pytest.mark.parametrize(("kind", "spec", "top", "status", "reason"), BAD_REQUESTS)
def test_runai_says_no(client: Client, kind: str, spec: Any, top: Any, status: int, reason: str) -> None:
    body = client.request("no", "true", compute={"gpuDevicesRequest": 1}, **spec) if "image" not in spec else None
    body = body or {**client.request("no", "true"), "spec": {"command": "true", **spec}}
    answer = client("POST", f"/workloads/{kind}", {**body, **top})
    assert answer.status_code == status and reason in answer.json()["message"], answer.text
    assert not client.server.jobs


def test_runai_names_claims_and_images(runai: RunaiEmulator, client: Client) -> None:
    pvc = {"claimName": "workspace", "path": "/data", "existingPvc": True}
    client.run("trainings", "w", "sh", "-c 'echo kept > /data/file'", storage={"pvc": [pvc]}).wait("Completed")
    assert (runai.claims["workspace"] / "file").read_text() == "kept\n"
    typo = {"claimName": "workspase", "path": "/data"}  # existingPvc is false by default: a new volume, and empty
    job = client.run("trainings", "r", "ls -A /data", storage={"pvc": [typo]})
    assert job.wait("Completed") and job.pods[0].output == "" and "workspase" in runai.claims
    exact: Any = {"top": {"useGivenNameAsPrefix": False}}
    assert client.run("trainings", "same", "true", **exact).name == "same"
    body = {**client.request("same", "true"), "useGivenNameAsPrefix": False}
    assert client("POST", "/workloads/trainings", body).status_code == 409
    runai.missing_images.add("typo")
    job = client.run("trainings", "image", "true", image="typo")
    job.wait("Failed")
    events = client("GET", f"/workloads/{job.id}/events").json()["events"]
    assert [event["reason"] for event in events] == ["ImagePullBackOff", "ErrImagePull"]
    lost = [{"name": "A", "secret": {"name": "nobody", "key": "x"}}]
    assert client.run("trainings", "secret", "true", environmentVariables=lost).wait("Initializing")


def test_nemo_runs_dgxcloud_executor_talks_to_it(runai: RunaiEmulator) -> None:
    from nemo_run.core.execution.dgxcloud import DGXCloudExecutor

    (runai.claims["workspace"] / "launch_script.sh").write_text("echo rank $HOSTNAME; sleep 60")
    executor = DGXCloudExecutor(
        base_url=runai.url, kube_apiserver_url=runai.kube_apiserver_url, client_id=runai.client_id,
        client_secret=runai.client_secret, project_name="team-a", container_image="python", nodes=1, gpus_per_node=8,
        pvc_nemo_run_dir="/nemo", pvcs=[{"claimName": "workspace", "path": "/nemo", "existingPvc": True}],
    )  # fmt: skip
    executor.pvc_job_dir = "/nemo"
    token = executor.get_auth_token()
    project, cluster = executor.get_project_and_cluster_id(str(token))
    answer = executor.create_training_job(str(token), str(project), str(cluster), "from-nemo-run")
    job = runai.jobs[answer.json()["workloadId"]]
    job.wait("Running")
    assert str(executor.status(job.id).value) == "Running"
    executor.cancel(job.id)  # a GET where the API wants a POST, and of the wrong kind
    assert runai.requests[-1] == ("GET", f"/workloads/distributed/{job.id}/suspend", 405)
    assert job.state == "Running" and job.pods[0].alive


# --- by hand, and the small parts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", ["lepton", "runai"])
def test_started_by_hand(plane: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.emulators", plane, "--root", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = list(iter(process.stdout.readline, "Ctrl-C ends it, and every pod with it.\n"))
            exported = dict(re.findall(r"export (\w+)='([^']*)'", "".join(lines)))
            url = exported["LEPTON_WORKSPACE_URL" if plane == "lepton" else "RUNAI_BASE_URL"]
            assert url.startswith("http://127.0.0.1:")
            assert requests.get(url + "/jobs", timeout=5).status_code in (401, 404)
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_shapes() -> None:
    shape = {"a": [{"b": int}], "c": frozenset({"x"}), "d": {"*": str}, "e": float, "f": bool}
    check({"a": [{"b": 1}, {}], "c": "x", "d": {"any": "t"}, "e": 1, "f": None}, shape, "it")
    wrong: list[Any] = [{"a": {}}, {"a": [None]}, {"a": [{"b": True}]}, {"c": "y"}, {"d": {"k": 1}}, {"e": "1"}]
    for bad in [*wrong, {"g": 1}, []]:
        with pytest.raises(Refusal):
            check(bad, shape, "it")
