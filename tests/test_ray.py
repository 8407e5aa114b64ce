"""Ray recipes on several nodes: pods that form a cluster, on every platform. The slow ones run the real Ray."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import support
from cloud import EMULATED, cloud, wait_for
from layout import flat_folder, launcher, recipe

PATIENCE = 40

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
    changes = {"launch": "ray", "nodes": nodes, "patience": PATIENCE, "run": "r%05d" % (os.getpid() % 100000),
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
def test_pods_form_a_cluster_and_the_driver_runs_on_all_of_it(tmp_path, nodes=3):
    setup = ["export FROM_SETUP=yes"]
    command = 'echo "$FROM_SETUP at $RAY_ADDRESS" && python "$AIRLIFT_CODE"/%s; exit 7' % support.SCRIPT
    with pods(tmp_path, range(nodes), nodes, setup=setup, command=command) as all_of_them:
        codes = [pod.end(90) for pod in all_of_them]
    assert codes == [7] * nodes, "\n".join(pod.text for pod in all_of_them)
    head, *others = [pod.text for pod in all_of_them]
    assert "airlift: rank 0: a Ray cluster of %d nodes is up at 127.77.0.1:" % nodes in head
    assert 'nodes: %d said "so"\n' % nodes in head and "yes at 127.77.0.1:" in head
    assert all("nodes:" not in text and "ended with exit code 7" in text for text in others)


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
    recipe(folder, "nano3/rl", WHERE, launch="ray", nodes=2, gpus=0)
    (folder / "src/family_helper.py").touch()
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "AIRLIFT_HOME": str(tmp_path / "state")}
    done = launcher(folder, "nano3", "rl", "local", env=env, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '[0] nodes: 2 said "so"\n' in done.stdout


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
@pytest.mark.parametrize("nodes", [1, 2, 3])
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
    runai.server.grace = 20  # platforms give 30
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
