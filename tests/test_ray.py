"""Ray recipes on several nodes: pods that form a cluster, on every platform, and common/lepton_ray.py. The slow ones run
the real Ray."""

import contextlib
import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import requests
import support
from cloud import EMULATED, KEEPS_ON, cloud, wait_for
from layout import flat_folder, launcher, recipe

from backends.common import http
from pod import ray_cluster
from tests.emulators import fields

PATIENCE = 150

# Says where each node's tasks ran and which tree they found there: the code is imported on the node, from its own copy.
WHERE = """\
import collections, os, ray

ray.init(log_to_driver=False)
nodes = [node for node in ray.nodes() if node["Alive"]]

@ray.remote(num_cpus=0)
def where():
    import family_helper
    names = [name for name in os.environ if name.startswith("AIRLIFT_")]
    return ray.get_runtime_context().get_node_id(), family_helper.__file__, os.environ["AIRLIFT_CODE"], names

pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
found = ray.get([where.options(scheduling_strategy=pinned(node["NodeID"], soft=False)).remote() for node in nodes])
for node, file, code, names in found:
    assert file == code + "/src/family_helper.py", (file, code)
    assert sorted(names) == ["AIRLIFT_CODE", "AIRLIFT_CONFIG", "AIRLIFT_RUN"], names
# cosmos-xenna, on which NVIDIA's data preps run, asks so; who lacks the token gets no answer.
import urllib.error, urllib.request
from ray.util.state import list_actors, list_nodes
assert len(list_nodes(limit=40_000)) == len(nodes) and list_actors(limit=40_000) == []
try:
    raise SystemExit(urllib.request.urlopen("http://%s/api/jobs/" % ray.get_runtime_context().worker.node.webui_url).read())
except urllib.error.HTTPError as error:
    assert error.code == 401, error
print("nodes:", len({node for node, *_ in found}), 'said "so"', flush=True)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def pods(tmp_path, ranks, nodes=2, env=None, body=WHERE, **changes):
    """Pods of one Ray job on this machine; their driver is `body`."""
    files = {"src/family_helper.py": b"", support.SCRIPT: body.encode()}
    changes = {"launch": "ray", "nodes": nodes, "patience": PATIENCE, "cluster": "pods", "run": "r%05d" % (os.getpid() % 100000),
               "command": 'python "$AIRLIFT_CODE"/%s' % support.SCRIPT} | changes
    plan = support.plan(files, **changes)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "HOME": str(tmp_path)} | (env or {})
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(support.started(plan, tmp_path / str(rank), env=env | {"NODE_RANK": str(rank)}))
               for rank in ranks]
    assert not os.path.exists("/tmp/airlift-%s-ray" % changes["run"])


# ---------------------------------------------------------------- ends in bounded time, without Ray


def test_a_head_that_never_comes_up(tmp_path):
    with pods(tmp_path, [1], patience=2) as (worker,):
        assert worker.end() == 90
    assert "rank 1: the Ray cluster did not come up: rank 0 did not answer at 127.0.0.1:" in worker.text
    assert "within 2 s: Connection refused\nairlift: what to do: see the lines above" in worker.text


def test_a_worker_that_never_comes(tmp_path):
    with pods(tmp_path, [0, 2], nodes=3, patience=2) as (head, other):
        assert (head.end(), other.end()) == (90, 90)
    assert "of 3 pods, rank 1 did not come within 2 s" in head.text


def test_an_image_without_ray(tmp_path):
    with pods(tmp_path, [0, 1], env={"PATH": "/usr/bin:/bin"}, command="true") as (head, worker):
        assert (head.end(), worker.end()) == (87, 87)
    assert "rank 0: the image lacks what the recipe is started with: ray cannot be started" in head.text


@pytest.mark.parametrize("rank", [0, 1])
def test_ray_that_does_not_start_says_why(tmp_path, rank):
    tool = tmp_path / "bin/ray"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\ncase $NODE_RANK in %d) echo no room; exit 3 ;; esac\n" % rank)
    tool.chmod(0o755)
    with pods(tmp_path, [0, 1], env={"PATH": "%s:%s" % (tool.parent, support.PATH)}) as both:
        assert [pod.end() for pod in both] == [90, 90]
    assert "airlift: ray start: no room" in both[rank].text
    assert "`ray start` ended with exit code 3" in both[0].text


def test_a_stranger_at_the_port_is_no_pod(tmp_path):
    port = free_port()
    with pods(tmp_path, [0], patience=3, env={"MASTER_PORT": str(port)}) as (head,):
        said = [b'{"run": "other1", "rank": 1, "at": "127.0.0.1"}\n', b"GET / HTTP/1.1\r\n\r\n", b"x" * 100000,
                b'{"run": "r%05d", "rank": 2}\n' % (os.getpid() % 100000), b'{"run": 3, "rank": true}\n', b"[" * 60000 + b"\n"]
        for words in said:
            connection = connected(port)
            with contextlib.suppress(OSError):
                connection.sendall(words)
        assert head.end() == 90
    assert "rank 1 did not come within 3 s" in head.text


def test_a_pod_that_goes_before_the_cluster_is_up(tmp_path):
    """It may be started again: rank 0 waits, and ends with a word."""
    with pods(tmp_path, [0, 1, 2], nodes=4, patience=5) as (head, gone, other):
        time.sleep(1.5)
        kill(gone)
        assert (head.end(), other.end()) == (90, 90)
    assert "of 4 pods, rank 1, 3 did not come within 5 s" in head.text


def kill(pod):
    """As a container's end does: all that is in it."""
    for pid in [pod.process.pid, *pod.alive()]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def connected(port):
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


# ---------------------------------------------------------------- the real Ray


@pytest.mark.slow
def test_a_worker_whose_ray_ends_ends_the_job(tmp_path):
    with pods(tmp_path, [0, 1], body="import time\nprint('up', flush=True)\ntime.sleep(300)\n") as (head, worker):
        head.until(b"up\n", 60)
        before = time.monotonic()
        os.kill(next(pid for pid in worker.alive() if name(pid) == "raylet"), signal.SIGKILL)
        assert worker.end() == 91
        assert head.end() == 91 and time.monotonic() - before < 30
    assert "the Ray cluster lost a node: rank 1: its raylet has ended" in head.text


@pytest.mark.slow
def test_a_platform_that_ends_the_job_ends_the_driver_first(tmp_path):
    body = ("import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(9)))\n"
            "print('up', flush=True)\ntime.sleep(300)\n")
    with pods(tmp_path, [0, 1], body=body) as (head, worker):
        head.until(b"up\n", 60)
        os.kill(worker.process.pid, signal.SIGTERM)  # it stays as long as the driver needs it
        time.sleep(1)
        assert head.signal(signal.SIGTERM) == 9 and worker.end() == 9
    assert "saved\n" in head.text


def name(pid):
    with contextlib.suppress(OSError):
        return Path("/proc/%d/comm" % pid).read_text().strip()
    return ""


# ---------------------------------------------------------------- this machine


@pytest.mark.slow
def test_two_pods_of_the_local_profile(tmp_path):
    folder = flat_folder(tmp_path / "air")
    recipe(folder, "nano3/rl", WHERE + "print(os.environ['FROM_SETUP'])", launch="ray", nodes=2, gpus=0)
    (folder / "src/family_helper.py").touch()
    profile = folder / "profiles/local.toml"
    profile.write_text('startup_commands = ["export FROM_SETUP=\\"set up\\""]\n' + profile.read_text())
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "AIRLIFT_HOME": str(tmp_path / "state")}
    done = launcher(folder, "nano3", "rl", "local", env=env, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '[0] nodes: 2 said "so"\n[0] set up\n' in done.stdout
    assert "airlift: rank 0: a Ray cluster of 2 nodes is up at 127.77.0.1:" in done.stdout


# ---------------------------------------------------------------- DGX Cloud


@pytest.fixture
def runai(tmp_path, monkeypatch, capsys):
    yield from cloud("dgxcloud", tmp_path, monkeypatch, capsys)


def grpo(here, body, **profile):
    """A Ray recipe on this platform."""
    here.recipe(body, name="nano3/rl", launch="ray")
    helper = here.root / "src/family_helper.py"
    helper.touch()
    here.profile(rendezvous_timeout=PATIENCE, **profile)


@EMULATED
@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 3])
def test_a_workload_whose_pods_form_a_cluster(runai, nodes):
    grpo(runai, WHERE if nodes > 1 else "import os\nassert 'RAY_ADDRESS' not in os.environ\nprint('nodes: 1 said \"so\"')\n")
    result = runai.launch("--nodes", nodes, stage="rl")
    assert (result.code, result.err) == (0, ""), result.out
    assert 'nodes: %d said "so"\n' % nodes in result.out
    assert [pod.exit_code for pod in runai.job.pods] == [0] * nodes


@EMULATED
@pytest.mark.slow
@pytest.mark.parametrize("fails", ["driver", "worker", "head"])
def test_a_workload_that_fails_ends_with_a_code(runai, fails):
    grpo(runai, "import time\nprint('up', flush=True)\ntime.sleep(%d)\nraise SystemExit(3)\n" % (0 if fails == "driver" else 300))
    runai.server.grace = 10  # platforms give 30
    with runai.process("nano3", "rl", "dgxcloud", "--nodes", "2", "--repo-root", runai.root) as launched:
        if fails != "driver":
            wait_for(lambda: runai.jobs and runai.job.pods and "up\n" in runai.job.pods[0].output, "the driver", 60)
            runai.job.pods[1 if fails == "worker" else 0].kill()
        out, err = launched.communicate(timeout=90)
    assert launched.returncode == 1, out + err
    if fails == "driver":
        assert [pod.exit_code for pod in runai.job.pods] == [3, 3] and "exit code 3 " in err
    else:
        assert "the job failed with exit code 91" in err and "the Ray cluster lost a node" in err


# ---------------------------------------------------------------- Lepton


@pytest.fixture
def lepton(tmp_path, monkeypatch, capsys):
    yield from cloud("lepton", tmp_path, monkeypatch, capsys)


# As a driver that hands its whole environment to Ray does; the source is imported on every node, from one path.
HANDS_ALL_ON = """\
import os, ray, time

config = os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"]
assert "working_dir" not in config and "AIRLIFT_TREE" not in config and "sesame" not in config, config
ray.init(log_to_driver=False)

@ray.remote(num_cpus=0)
def where(code):
    import importlib
    for _ in range(300):  # a node that has just joined gets the source a moment later
        if os.path.exists(code):
            break
        time.sleep(0.1)
    importlib.invalidate_caches()
    import family_helper
    import subprocess, sys
    assert subprocess.run([sys.executable, "-c", "import family_helper"]).returncode == 0
    names = "ODD", "TOKEN", "HF_HOME", "NEMO_RUN_DIR", "AIRLIFT_CONFIG", "RAY_MAX_LIMIT_FROM_API_SERVER"
    env = [os.environ.get(name) for name in names]
    return ray.get_runtime_context().get_node_id(), family_helper.__file__, env, len(str(os.environ))

pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy

def found(wanted):
    deadline = time.monotonic() + 60
    while len(nodes := [node["NodeID"] for node in ray.nodes() if node["Alive"]]) < wanted:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    small = {"env_vars": dict(os.environ)}
    assert len(str(small)) < 20000, len(str(small))
    where_to = [where.options(scheduling_strategy=pinned(node, soft=False), **more) for node in nodes
                for more in ({}, {"runtime_env": small})]
    return ray.get([task.remote(os.environ["AIRLIFT_CODE"]) for task in where_to])

told = found(int(os.environ["WANTED"]))
assert {file for _, file, *_ in told} == {os.environ["AIRLIFT_CODE"] + "/src/family_helper.py"}, told
assert max(size for *_, size in told[1::2]) < 20000, told
told = told[::2]
print("env:", {tuple(env) for _, _, env, _ in told}, flush=True)
print("nodes:", len(told), 'said "so"', os.environ.get("TOKEN"), flush=True)
"""


@EMULATED
@pytest.mark.slow
def test_a_ray_cluster_on_lepton_and_a_node_that_joins_later(lepton):
    grpo(lepton, HANDS_ALL_ON + "raise SystemExit(4)\n", ray_version="2.60.0", env_vars={"WANTED": "3", "ODD": ODD},
         secrets={"TOKEN": "env"}, startup_commands=["touch /tmp/set-up"])
    lepton.monkeypatch.setenv("TOKEN", "sesame $(HOME) $$")
    lepton.pad(100_000)
    with lepton.process("nano3", "rl", "lepton", "--nodes", "2", "--repo-root", lepton.root) as launched:
        out = until(launched, "all nodes have the source")
        cluster, = lepton.server.clusters.values()
        with lepton.server.lock:
            cluster.grow(2)
        wait_for(lambda: len(cluster.pods) == 3 and (cluster.pods[2].root / "tmp/set-up").exists(), "the new node", 60)
        rest, err = launched.communicate(timeout=90)
    out += rest
    assert launched.returncode == 1 and "exit code 4 " in err, out + err
    assert 'nodes: 3 said "so" sesame $(HOME) $$\n' in out
    env = ODD, "sesame $(HOME) $$", "/shared/airlift/hf", "/shared/airlift/nano3"
    assert "env: {%s, " % repr(env)[:-1] in out and re.search(r"config.yaml', '40000'\)\}\n", out), "on each node the same"
    digest = re.search(r"rank 0 of 1, sha256 (\w{64})", out).group(1)
    places = re.findall(r"airlift: node (127.0.1.\d) has sha256 %s in /tmp/airlift-" % digest, out)
    assert sorted(places) == ["127.0.1.1", "127.0.1.2", "127.0.1.3"]
    assert cluster.phase in ("deleting", "deleted")
    specs = [cluster.spec["head_group_spec"], *cluster.spec["worker_group_specs"]]
    assert all("AIRLIFT_TREE_0001" in {env["name"] for env in spec["envs"]} for spec in specs)
    assert specs[1]["min_replicas"] == 1


ODD = "$(HOME) $$ ${HOME} $HOME \"'` ä"  # Kubernetes has rules of its own for the first two


def until(process, words):
    """What it prints, to a line with these words."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError("".join(lines) + process.stderr.read())


@EMULATED
@pytest.mark.slow
def test_a_ray_cluster_that_is_there_already(lepton):
    """It has none of our environment; it stays, also after Ctrl-C, but not the job on it."""
    group = {"resource_shape": "gpu.8xh100-80gb", "min_replicas": 1,
             "affinity": {"allowed_dedicated_node_groups": list(lepton.server.groups)}}
    made = {"metadata": {"id": "shared-ray"}, "spec": {
        "image": "registry.test/ray:1", "ray_version": "2.60.0", "head_group_spec": group,
        "worker_group_specs": [{**group, "group_name": "workers"}]}}
    assert requests.post(lepton.server.url + "/rayclusters", json=made, timeout=9,
                         headers={"Authorization": "Bearer " + lepton.server.token}).status_code == 201
    grpo(lepton, HANDS_ALL_ON, existing_ray_cluster="shared-ray", env_vars={"WANTED": "2", "ODD": "a b"})
    lepton.pad(100_000)
    result = lepton.launch("--nodes", 2, stage="rl")
    assert result.code == 0 and 'nodes: 2 said "so" None\n' in result.out, result.out + result.err
    assert "Ray cluster shared-ray was deleted" not in result.out
    assert "env: {%s, " % repr(("a b", None, "/shared/airlift/hf", "/shared/airlift/nano3"))[:-1] in result.out
    assert "nano3-rl-" + result.run in lepton.records
    cluster = lepton.server.clusters["shared-ray"]
    wait_for(lambda: not [place for pod in cluster.pods for place in (pod.root / "tmp").glob("airlift-*/*")])
    grpo(lepton, KEEPS_ON, existing_ray_cluster="shared-ray")
    with lepton.process("nano3", "rl", "lepton", "--repo-root", lepton.root) as launched:
        until(launched, "up\n")
        launched.send_signal(signal.SIGINT)
        _, err = launched.communicate(timeout=60)
    assert launched.returncode == 1 and "the job was cancelled" in err
    wait_for(lambda: not [pid for pid in support.marked("RAY_CLUSTER_NAME=shared-ray") if b"time.sleep(120)" in
                          Path("/proc/%d/cmdline" % pid).read_bytes()])
    assert cluster.state == "Ready"


@EMULATED
@pytest.mark.slow
def test_ctrl_c_deletes_the_cluster_that_was_made(lepton):
    """In the launcher alone: who only looks on goes, and the cluster stays."""
    grpo(lepton, KEEPS_ON, ray_version="2.60.0")
    with lepton.process("nano3", "rl", "lepton", "--nodes", "2", "--repo-root", lepton.root) as launched:
        until(launched, "up\n")
        cluster, = lepton.server.clusters.values()
        for number in (signal.SIGINT, signal.SIGTERM):
            with lepton.process("logs", "-f", cluster.name.rpartition("-")[2]) as looking:
                until(looking, "up\n")
                looking.send_signal(number)
                looking.communicate(timeout=60)
        assert cluster.state == "Ready"
        launched.send_signal(signal.SIGINT)
        _, err = launched.communicate(timeout=60)
    assert launched.returncode == 1 and "the job was cancelled" in err
    wait_for(lambda: all(cluster.phase == "deleted" for cluster in lepton.server.clusters.values()))


@EMULATED
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_launcher_that_is_ended_leaves_no_cluster(lepton, number):
    lepton.server.queue_seconds = 60
    grpo(lepton, KEEPS_ON, ray_version="2.60.0")
    with lepton.process("nano3", "rl", "lepton", "--nodes", "2", "--repo-root", lepton.root) as launched:
        until(launched, "is Starting after")
        launched.send_signal(number)
        launched.communicate(timeout=60)
    assert launched.returncode == 128 + number
    cluster, = lepton.server.clusters.values()
    wait_for(lambda: cluster.phase == "deleted")


@EMULATED
def test_a_look_while_the_cluster_comes_up_changes_nothing(lepton):
    """Its dashboard knows no job yet; what keeps it from being ready is said as it changes."""
    lepton.server.queue_seconds = 60
    grpo(lepton, KEEPS_ON, ray_version="2.60.0")
    with lepton.process("nano3", "rl", "lepton", "--nodes", "2", "--repo-root", lepton.root) as launched:
        until(launched, "is Starting after")
        cluster, = lepton.server.clusters.values()
        run = cluster.name.rpartition("-")[2]
        for _ in range(3):
            assert "waiting" in lepton.main("status", run).out and cluster.state == "Starting"
        assert "has no log yet: it is waiting (Ray cluster %s is Starting)" % cluster.name in lepton.main("logs", run).err
        cluster.event("Warning", "FailedScheduling", "0/4 nodes are available")
        assert "FailedScheduling: 0/4 nodes are available" in until(launched, "nodes are available")
        assert "is Starting: FailedScheduling: 0/4 nodes are available" in lepton.main("status", run).out
        lepton.server.fault("status", status=503, path="/dashboard/", times=99)
        result = lepton.main("cancel", run)
        assert (result.code, "Ray cluster %s was deleted" % cluster.name in result.out) == (0, True), result
        assert re.search("is Delet(ed|ing)\n", launched.communicate(timeout=60)[1]) and launched.returncode == 4


@EMULATED
def test_of_custom_spec_goes_through_what_a_cluster_has(lepton):
    lepton.server.queue_seconds = 60
    grpo(lepton, WHERE)
    custom = {"segment_config": {"count_per_segment": 1}, "envs": [{"name": "ALL", "value": "1"}],
              "autoscaler": {"ray_worker_idle_timeout": 9},
              "head_group_spec": {"user_security_context": {"privileged": True}},
              "worker_group_specs": {"enable_rdma": True, "envs": [{"name": "OWN", "value": "2"}]}}
    lepton.profile(rendezvous_timeout=1, ray_version="2.60.0", custom_spec=custom)
    assert lepton.launch("--nodes", 2, stage="rl").code == 4
    cluster, = lepton.server.clusters.values()
    head, (workers,) = cluster.spec["head_group_spec"], cluster.spec["worker_group_specs"]
    assert head["segment_config"] == workers["segment_config"] == {"count_per_segment": 1}
    assert head["user_security_context"] == {"privileged": True} and workers["enable_rdma"] is True
    assert "enable_rdma" not in head and cluster.spec["autoscaler"] == {"ray_worker_idle_timeout": 9}
    own = [[env["name"] for env in part["envs"] if env["name"] in ("ALL", "OWN")] for part in (head, workers)]
    assert own == [["ALL"], ["ALL", "OWN"]]


@EMULATED
@pytest.mark.slow
def test_a_detached_launch_leaves_its_cluster_until_it_is_asked_about(lepton):
    grpo(lepton, "print('quick')\n", ray_version="2.60.0", head_resource_shape="cpu.small")
    result = lepton.launch("--nodes", 2, "--detach", stage="rl")
    assert result.code == 0, result.err
    cluster, = lepton.server.clusters.values()
    assert len(cluster.replicas) == 3 and cluster.spec["head_group_spec"]["resource_shape"] == "cpu.small"
    own = lepton.place / "airlift"
    lepton.monkeypatch.setenv("AIRLIFT_HOME", str(lepton.place / "another"))
    assert cluster.name in lepton.main("adopt", "lepton").out
    adopted = lepton.main("adopt", "lepton", cluster.name)  # from the cluster that was made for it
    assert adopted.code == 0 and "run %s of" % result.run in adopted.out, adopted.err
    assert lepton.main("fetch", result.run, lepton.place / "there").code == 0
    lepton.monkeypatch.setenv("AIRLIFT_HOME", str(own))
    lepton.server.fault("status", status=404, path="/dashboard/api/jobs/")  # its head has started again, say
    said = lepton.main("status", result.run).out
    assert "failed" in said and "no longer knows the job" in said and cluster.phase not in ("deleting", "deleted")
    wait_for(lambda: "done" in lepton.main("status", result.run).out, "done", 60)
    assert cluster.phase in ("deleting", "deleted")
    assert "done" in lepton.main("status", result.run).out


@EMULATED
@pytest.mark.parametrize(("trouble", "code", "words"), [
    ({"status": 401}, 4, "HTTP 401: injected by the test"), ({"status": 403}, 4, "HTTP 403: injected"),
    ({"status": 503, "times": 9}, 5, "HTTP 503"), (None, 4, "Lepton has no node group 'elsewhere'"),
])
def test_a_cluster_that_is_refused(lepton, trouble, code, words):
    grpo(lepton, WHERE, ray_version="2.60.0", **({} if trouble else {"node_group": "elsewhere"}))
    lepton.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    if trouble:
        lepton.server.fault("status", method="POST", path="/rayclusters$", **trouble)
    result = lepton.launch("--nodes", 2, stage="rl")
    assert result.code == code and words in result.err and lepton.server.clusters == {}, result.err
    assert len(result.err.strip().splitlines()) == 2


@EMULATED
def test_an_image_that_cannot_be_pulled_ends_the_cluster(lepton):
    lepton.server.missing_images.add("registry.test/nemo:1")
    grpo(lepton, WHERE, ray_version="2.60.0")
    result = lepton.launch("--nodes", 2, stage="rl")
    assert result.code == 4 and "the image cannot be pulled: ErrImagePull" in result.err
    assert [cluster.phase for cluster in lepton.server.clusters.values()] == ["deleted"]


@EMULATED
def test_a_cluster_that_is_not_ready_in_time_is_deleted(lepton):
    lepton.server.queue_seconds = 60
    grpo(lepton, WHERE, ray_version="2.60.0")
    lepton.profile(rendezvous_timeout=1, ray_version="2.60.0")
    result = lepton.launch("--nodes", 2, stage="rl")
    assert result.code == 4 and "is still Starting after 1 s" in result.err
    assert [cluster.phase for cluster in lepton.server.clusters.values()] == ["deleted"]


@EMULATED
def test_that_the_cluster_is_there_already_is_no_error(lepton):
    """The answer to its creation got lost, and it was asked for again."""
    lepton.server.queue_seconds = 60
    lepton.server.fault("status", status=409, method="POST", path="/rayclusters$", done=True, message="already exists")
    grpo(lepton, WHERE, ray_version="2.60.0")
    lepton.profile(rendezvous_timeout=1, ray_version="2.60.0")
    assert "is still Starting after 1 s" in lepton.launch("--nodes", 2, stage="rl").err


@EMULATED
@pytest.mark.parametrize(("changes", "words"), [
    ({}, "needs ray_version"), ({"ray_version": "2.60.0", "unpack": "shared"}, 'unpack = "shared" is not possible'),
    ({"ray_version": "2.60.0", "retries": 1}, "retries is not possible"),
    ({"existing_ray_cluster": "x", "secrets": {"T": "lepton:t"}}, "secrets cannot be sent to an existing Ray cluster"),
    ({"existing_ray_cluster": "x", "env_vars": {"P": "a$b"}}, "env_vars.P has a $, which Ray would replace on the nodes"),
    ({"existing_ray_cluster": "x", "custom_spec": {"log": {}}}, "custom_spec has no effect on an existing Ray cluster"),
    *(({"ray_version": "2.60.0", "custom_spec": custom}, words) for custom, words in (
        ({"log": {"enable_collection": True}}, "has no field head_group_spec.log, worker_group_specs.log"),
        ({"stopped": True}, "has no field head_group_spec.stopped"), ({"image": "x"}, "custom_spec sets image, which"),
        ({"worker_group_specs": {"min_replicas": 9}}, "custom_spec sets min_replicas, which"),
        ({"container": {"command": ["true"]}}, "custom_spec sets container.command, which"),
        ({"head_group_spec": 5}, "custom_spec.head_group_spec is 5"))),
])
def test_what_a_cluster_cannot_have_is_refused_before_anything_is_sent(lepton, changes, words):
    grpo(lepton, WHERE, **changes)
    result = lepton.launch("--nodes", 2, stage="rl")
    assert result.code == 2 and words in result.err and lepton.server.requests == []


@EMULATED
def test_the_environment_counts_twice(lepton):
    grpo(lepton, WHERE, ray_version="2.60.0")
    lepton.pad(600_000)
    result = lepton.launch("--nodes", 2, stage="rl")
    assert result.code == 3 and "API object needs 1,6" in result.err and lepton.server.requests == []
    lepton.pad(300_000)
    assert lepton.launch("--nodes", 2, "--dry-run", "run.env.env_vars.BIG=" + "x" * 100_000, stage="rl").out.count("does not fit") == 0
    many = ["run.env.env_vars.BIG%d=%s" % (number, "x" * 100_000) for number in range(4)]
    result = lepton.launch("--nodes", 2, *many, stage="rl")
    assert result.code == 3 and "API object needs 1,6" in result.err, result.err
    assert lepton.launch("--nodes", 1, "--dry-run", stage="rl").code == 0


def test_the_emulators_fields_of_a_cluster_are_the_sdks():
    from leptonai.api.v1.types import raycluster

    def there(shape, model):
        names = {field.alias or name for name, field in model.model_fields.items()}
        return set(shape) <= names

    spec = fields.LEPTON_RAYCLUSTER["spec"]
    assert there(spec, raycluster.LeptonRayClusterUserSpec)
    assert there(spec["head_group_spec"], raycluster.RayHeadGroupSpec)
    assert there(spec["worker_group_specs"][0], raycluster.RayWorkerGroupSpec)


def test_a_driver_masks_the_chunks_and_tells_workers_where_the_source_is():
    env = {"AIRLIFT_TREE_0000": "x" * 98304, "HERE": "2", ray_cluster.RAY_JOB: '{"metadata": {"a": "b"}}'}
    result = {"A": "1", "AIRLIFT_RUN": "r", "NODE_RANK": "0", "HERE": "2"}
    given = ray_cluster.driver_env(env, result, "/tmp/airlift-r/code")
    config = {"metadata": {"a": "b"}, "py_driver_sys_path": ["/tmp/airlift-r/code/src"],
              "runtime_env": {"env_vars": {"A": "1", "AIRLIFT_RUN": "r"}}}
    assert json.loads(given.pop(ray_cluster.RAY_JOB)) == config
    assert given == {"AIRLIFT_TREE_0000": "", "A": "1", "AIRLIFT_RUN": "r", "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
                     "NODE_RANK": "0", "HERE": "2"}
