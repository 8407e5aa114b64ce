"""Both clouds: the same launches, troubles and promises, against emulated platforms whose pods are real processes."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import layout
import pytest
from cloud import EMULATED, HELLO, KEEPS_ON, PLATFORMS, cloud, noise, seen_in, wait_for
from hypothesis import given
from hypothesis import strategies as st

import backends
import runs
from backends import common
from backends.common import follow, http

pytestmark = EMULATED


@pytest.fixture(params=PLATFORMS)
def here(request, tmp_path, monkeypatch, capsys):
    yield from cloud(request.param, tmp_path, monkeypatch, capsys)


# ---------------------------------------------------------------- jobs, and what they carry

MEETS = """
    import os, socket, time
    rank, nodes = int(os.environ["NODE_RANK"]), int(os.environ["NNODES"])
    where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    def reaches(port):
        try: return bool(socket.create_connection(("127.0.0.1", port), 1))
        except OSError: return False
    print("interfaces", [name for _, name in socket.if_nameindex()], "platform reached:", reaches(%d), flush=True)
    if rank == 0:
        server = socket.create_server(("", where[1]))
        names = sorted(server.accept()[0].makefile().readline().strip() for _ in range(nodes - 1))
        print("met", names, flush=True)
    else:
        for _ in range(200):
            try: link = socket.create_connection(where); break
            except OSError: time.sleep(0.02)
        link.sendall(b"rank %%d\\n" %% rank)
"""


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_every_rank_meets_rank_0_and_nothing_else(here, nodes):
    here.recipe(MEETS % here.server.port)
    result = here.launch("--nodes", nodes, "--all-ranks")
    assert (result.code, result.err) == (0, ""), result.out
    mark = "[%d] " if nodes > 1 else "%.0s"
    for rank in range(nodes):
        assert (mark % rank) + "interfaces ['lo'] platform reached: False" in result.out.splitlines()
        assert (mark % rank) + "airlift: rank %d ended with exit code 0" % rank in result.out.splitlines()
    assert (mark % 0) + "met %s" % ["rank %d" % rank for rank in range(1, nodes)] in result.out
    kept = here.volume / "airlift/nano3/runs" / result.run
    assert sorted(path.name for path in kept.iterdir()) == sorted(
        "rank-%d.%s" % (rank, end) for rank in range(nodes) for end in ("exit", "log"))
    assert len(here.posts) == len(here.jobs) == 1


SLOW = pytest.mark.slow
# What starts launchers of their own, at 3 s each: on the other platform with the slow tests.
ON_BOTH_IN_TIME = pytest.mark.parametrize("here", ["lepton", pytest.param("dgxcloud", marks=SLOW)], indirect=True)


@pytest.mark.parametrize(("here", "nodes", "method"), [
    ("lepton", 2, "gz"), ("dgxcloud", 1, "gz"), ("dgxcloud", 2, "gz"), *(
        pytest.param(kind, nodes, "xz", marks=SLOW) for kind in PLATFORMS for nodes in (1, 2, 4))], indirect=["here"])
def test_the_payload_up_to_the_edge(here, nodes, method):
    here.profile(compression=method)
    first, last = runs.new_run_id(), runs.new_run_id()
    here.monkeypatch.setattr(runs, "new_run_id", lambda: last)  # it has its share in the sum
    fits, over = 0, 1_400_000
    while over - fits > 1:
        middle = (over + fits) // 2
        here.pad(middle)
        fits, over = (middle, over) if here.launch("--json", "--nodes", nodes).code == 0 else (fits, middle)
    here.pad(over)
    result = here.launch("--nodes", nodes)
    assert result.code == 3 and "API object needs" in result.err and "nothing was submitted" in result.err
    assert here.server.requests == []
    for number, (size, run) in enumerate(((fits // 3, first), (fits, last))):
        here.monkeypatch.setattr(runs, "new_run_id", lambda run=run: run)
        here.pad(size)
        result = here.launch("--nodes", nodes)
        assert (result.code, result.err) == (0, ""), result.out
        assert "hello from 0" in result.out and len(here.jobs) == number + 1
    assert fits > (1_120_000 if here.kind == "lepton" or nodes == 1 else 550_000)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_the_real_recipe_trains(here, nodes):
    """nano3/sft of src/starter under torchrun, and a second launch that goes on where the first ended."""
    here.profile(gpus_per_node=0)
    words = ["nano3", "sft", here.kind, "--repo-root", layout.REPO, "--nodes", nodes, "train.checkpoint_every=2"]
    first = here.main(*words, "train.steps=4")
    assert (first.code, first.err) == (0, ""), first.out
    assert "%d ranks on cpu" % nodes in first.out, first.out
    assert "step 4/4" in first.out, first.out
    assert (here.volume / "airlift/nano3/sft/model/config.json").is_file()
    if nodes == 2:
        again = here.main(*words, "train.steps=6")
        assert again.code == 0 and "step 6/6" in again.out and "step 4/" not in again.out


def test_values_arrive_as_they_were_written(here):
    odd = {"lower": "a b; c", "QUOTES": "it's \"so\" \\ `x`", "DOLLAR": "$HOME $(HOSTNAME) $$ ${HOME}", "EMPTY": "",
           "LINES": "a\nb\tc", "UMLAUT": "äöü €"}
    here.profile("[env_vars]\n" + "".join("%s = %s\n" % (name, json.dumps(text)) for name, text in odd.items()))
    here.recipe("import json, os, sys\nprint('SEEN', json.dumps([{name: os.environ.get(name) for name in %r},"
                " open(os.environ['AIRLIFT_CONFIG']).read(), sys.argv[3:]]))" % list(odd), yaml="text: $(A) $$\n")
    result = here.launch("extra=$(B) 'c'", "--", "two words", "$(HOSTNAME)", "--flag='x'")
    assert result.code == 0, result.err
    env, config, args = json.loads(re.search("SEEN (.*)", result.out).group(1))
    assert env == odd and args == ["two words", "$(HOSTNAME)", "--flag='x'"]
    assert "text: $(A) $$\n" in config and "extra: $(B) 'c'" in config
    assert not [name for name, value in here.env().items() if "$" in str(value)]


def test_a_workspace_with_a_hostile_name(here):
    place = "/shared/a b;$(touch x)'\""
    here.profile(**{"nemo_run_dir" if here.kind == "lepton" else "pvc_nemo_run_dir": place})
    here.recipe("import os, pathlib\n(pathlib.Path(os.environ['NEMO_RUN_DIR']) / 'out').write_text('kept')\n"
                "print(open(os.environ['AIRLIFT_CONFIG']).read(), os.environ['HF_HOME'])", yaml="out: /nemo_run/x\n")
    result = here.launch()
    assert result.code == 0, result.err
    assert (here.volume / "a b;$(touch x)'\"" / "nano3/out").read_text() == "kept"
    assert place + "/hf" in result.out and json.dumps(place + "/nano3/x") in result.out


def test_the_environment_of_nvidias_launcher(here):
    names = ["HF_HOME", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_NAME", "WANDB_TAGS", "HF_TOKEN", "WANDB_GROUP"]
    here.recipe("import os\nprint([os.environ.get(name) for name in %r])" % names,
                yaml="run: {wandb: {project: p q, entity: e, tags: [a, b], group: g}}\n")
    here.profile("[env_vars]\nWANDB_GROUP = 'mine'\n")
    here.monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = here.launch()
    assert str(["/shared/airlift/hf", "p q", "e", "nano3-sft", "a,b", None, "mine"]) in result.out, result.err
    assert "note: HF_TOKEN is set here but not sent" in result.out and "hf_secret" not in result.out


def test_a_stage_on_one_cpu_node(here):
    here.profile('[stages."data/prep"]\ngpus_per_node = 0\nnodes = 1\n' + 'resource_shape = "cpu.large"\n' * (
        here.kind == "lepton"), nodes=2)
    here.recipe("import os\nprint('prepared by', os.environ['NNODES'])", "nano3/data/prep/sft", gpus=8)
    result = here.launch(stage="data/prep/sft")
    assert (result.code, "prepared by 1" in result.out, "1 node, CPU only" in result.out) == (0, True, True)
    spec = here.job.spec
    assert spec["resource_shape"] == "cpu.large" if here.kind == "lepton" else spec["compute"]["gpuDevicesRequest"] == 0


def test_no_gpus_means_one_process(here):
    here.profile(gpus_per_node=0)
    here.recipe(HELLO, launch="torchrun", gpus=8)
    assert "--nproc-per-node 1 " in json.loads(here.launch("--json").out)["command"]


# ---------------------------------------------------------------- exit codes, and ranks that die


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_exit_code_is_the_recipes(here, nodes):
    here.recipe("import os, sys, time\nif os.environ['NODE_RANK'] != '%d': time.sleep(60)\nprint('bye')\nsys.exit(37)"
                % (nodes - 1))
    result = here.launch("--nodes", nodes)
    assert (result.code, "the job failed with exit code 37 after" in result.err) == (1, True), result.err
    assert runs.load_run(result.run).job_exit_code == 37
    assert json.loads(here.main("status", result.run, "--json").out)[0]["job_exit_code"] == 37


def test_a_failure_of_our_own_is_told_in_words(here):
    here.server.image = type(here.server.image)(hide=["bash"])
    result = here.launch()
    assert result.code == 1 and "with exit code 87" in result.err and "the image lacks" in result.err


class Begun:
    """A launch in a thread, so that the test can meanwhile do harm."""

    def __init__(self, here, *words):
        self.result, self.thread = None, threading.Thread(target=self.run, args=(here, words))
        self.thread.start()

    def run(self, here, words):
        self.result = here.launch(*words)

    def end(self, seconds):
        begin = time.monotonic()
        self.thread.join(seconds)
        assert self.result, "the launcher still runs after %d s" % seconds
        return self.result, time.monotonic() - begin


def unpacking(pod):
    return any(Path(pod.root, "tmp").glob("airlift-*/code.*"))


BEFORE = {  # when a pod is killed: what the test waits for
    "before unpacking": lambda pod: pod.pid and pod.state == "Running",
    "while unpacking": lambda pod: pod.pid and unpacking(pod),
    "after unpacking": lambda pod: "up\n" in pod.output,
}


@pytest.mark.parametrize("moment", BEFORE)
@pytest.mark.parametrize(("nodes", "victim"), [(1, 0), pytest.param(2, 0, marks=SLOW), (2, 1)])
def test_a_killed_rank_ends_the_job(here, moment, nodes, victim):
    here.recipe(KEEPS_ON)
    if moment == "while unpacking":
        for number in range(2500):
            (here.root / ("src/many%02d" % (number % 40))).mkdir(exist_ok=True)
            (here.root / ("src/many%02d/f%d.py" % (number % 40, number))).write_text("x")
    begun = Begun(here, "--nodes", nodes)
    wait_for(lambda: here.jobs and len(here.job.pods) == nodes and BEFORE[moment](here.job.pods[victim]), moment)
    pod = here.job.pods[victim]
    pod.kill()
    result, took = begun.end(10)
    assert pod.wait() == 137 and ("files in" in pod.output) == (moment == "after unpacking")
    assert result.code == 1 and "the job failed, and its exit code is not known" in result.err
    silent = re.search(r"rank ([\d, ]+) ended without an exit code", result.err).group(1).split(", ")
    assert str(victim) in silent  # TERM may find the others before they can say a word, too
    assert len(here.jobs) == 1 and all(len(replica.runs) == 1 for replica in here.job.replicas)  # nothing was retried
    assert not any(pod.alive for pod in here.job.pods)
    print("ended %.1f s after the kill" % took)


# ---------------------------------------------------------------- later, from another shell


def test_detached_then_followed_from_another_shell(here):
    here.recipe("import os, time\nprint('hello from', os.environ['NODE_RANK'], flush=True)\n"
                "while not os.path.exists('/shared/go'): time.sleep(0.02)\nprint('went', flush=True)")
    begun = here.launch("--nodes", "2", "--detach")
    assert begun.code == 0 and "started; to follow it: python launch.py logs -f " + begun.run in begun.out
    wait_for(lambda: here.job.pods and all("hello" in pod.output for pod in here.job.pods))
    assert re.fullmatch(r"%s  running  \d+ s +nano3/sft  %s +2      Running" % (begun.run, here.kind),
                        here.main("status").out.splitlines()[1])
    now = here.main("logs", begun.run, "--rank", "1")  # of a job that still runs: what there is
    assert now.code == 0 and now.out.splitlines()[1:] == ["hello from 1"]
    reader = here.process("logs", "-f", begun.run, "--all-ranks")
    first = reader.stdout.readline()
    (here.volume / "go").write_text("")
    out = first + reader.stdout.read()
    assert (reader.wait(10), reader.stderr.read()) == (0, "")
    assert {"[0] hello from 0", "[1] hello from 1", "[0] went", "[1] went"} <= set(out.splitlines())
    assert re.search(r"-- done \(Completed\) after \d+ s", out)
    again = here.main("logs", begun.run)  # a finished job's log prints and returns
    assert again.code == 0 and again.out.splitlines()[1:3] == ["hello from 0", "went"]
    assert json.loads(here.main("status", begun.run, "--json").out)[0]["state"] == "done"
    seen = len(here.server.requests)
    assert " done " in here.main("status").out and len(here.server.requests) == seen  # how it ended is remembered


@ON_BOTH_IN_TIME
def test_ctrl_c_detaches(here):
    here.recipe(KEEPS_ON)
    launcher = here.process("nano3", "sft", here.kind, "--repo-root", here.root)
    while "up\n" not in launcher.stdout.readline():
        pass
    launcher.send_signal(signal.SIGINT)
    run = here.job.pods[0].output.split("airlift-")[1][:6]
    assert launcher.wait(20) == 0
    assert launcher.stderr.read() == "\nthe job goes on; to follow it again: python launch.py logs -f %s\n" % run
    assert here.main("status", run).out.splitlines()[1].split()[1] == "running"


@pytest.mark.parametrize("nodes", [pytest.param(1, marks=SLOW), 2])
def test_cancel_from_another_process(here, nodes):
    run = here.up("--nodes", nodes)
    process = here.process("cancel", run)
    assert process.communicate(timeout=20) == (
        "%s, nano3/sft on %s: %s %s was cancelled\n" % (
            run, here.kind, "job" if here.kind == "lepton" else "workload", here.job.name), "")
    assert here.job.state == "Stopped" and not any(pod.alive for pod in here.job.pods)
    assert "cancelled" in here.main("status", run).out
    assert "it had already ended" in here.main("cancel", run).out


def test_a_cancelled_job_ends_the_launcher(here):
    here.recipe(KEEPS_ON)
    begun = Begun(here)
    wait_for(lambda: here.jobs and here.job.pods and "up" in here.job.pods[0].output)
    run = here.job.pods[0].output.split("airlift-")[1][:6]
    assert backends.backend(here.kind).cancel(runs.load_run(run)).endswith("was cancelled")
    result, _ = begun.end(10)
    assert result.code == 1 and "the job was cancelled" in result.err


@ON_BOTH_IN_TIME
def test_four_launches_at_once(here):
    """Each from a process of its own: all are there, also in nemo-run's records, followed, and can be cancelled."""
    here.recipe("import os, time\nprint('up', flush=True)\nwhile not os.path.exists('/shared/go'): time.sleep(0.05)")
    launchers = [here.process("nano3", "sft", here.kind, "--repo-root", here.root) for _ in range(4)]
    wait_for(lambda: len(here.jobs) == 4 and all(job.pods and "up" in job.pods[0].output for job in here.jobs), "", 120)
    rows = json.loads(here.main("status", "--json").out)
    assert len({row["run"] for row in rows}) == 4 and {row["state"] for row in rows} == {"running"}
    assert {row["run"] for row in rows} <= {name.rpartition("-")[2] for name in here.records}
    stopped = {row["run"] for row in rows[:2]}
    for run in stopped:
        assert here.main("cancel", run).out.endswith("was cancelled\n")
    (here.volume / "go").write_text("")
    codes = []
    for launcher in launchers:
        out, _ = launcher.communicate(timeout=60)
        codes.append((launcher.returncode, re.search(r"run (\w+)\n", out).group(1) in stopped, "up\n" in out))
    assert sorted(codes) == [(0, False, True)] * 2 + [(1, True, True)] * 2


def test_two_in_one_second_and_a_rerun_have_their_own_names(here):
    now = time.time()
    here.monkeypatch.setattr(time, "time", lambda: now)
    assert [here.launch("--detach").code for _ in range(3)] == [0, 0, 0]
    assert len({job.name for job in here.jobs}) == 3


@given(st.text(max_size=60), st.from_regex(r"[a-z][a-z0-9]{5}", fullmatch=True), st.sampled_from([34, 36]))
def test_names_fit_the_platforms_rules(recipe, run, longest):
    name = common.job_name(recipe, run, longest)
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,%d}[a-z0-9])?" % (longest - 2), name) and name.endswith("-" + run)


# ---------------------------------------------------------------- a platform that says no, or nothing


def secret_of(here):
    return here.server.token if here.kind == "lepton" else here.server.client_secret


def test_bad_credentials(here):
    wrong = "wrong-secret-value-4711"
    here.monkeypatch.setenv("LEPTON_WORKSPACE_TOKEN" if here.kind == "lepton" else "RUNAI_CLIENT_SECRET", wrong)
    begin = time.monotonic()
    result = here.launch()
    assert time.monotonic() - begin < 5 and result.code == 4 and len(result.err.splitlines()) == 2
    named = {"lepton": "LEPTON_WORKSPACE_TOKEN", "dgxcloud": "client_secret"}[here.kind]
    assert "HTTP 401" in result.err and named in result.err.splitlines()[1] and wrong not in result.out + result.err
    assert ("invalid or expired token" if here.kind == "lepton" else "wrong secret") in result.err
    assert here.posts == [] and runs.all_runs() == ([], [])


def test_a_secret_that_the_server_repeats_is_not_shown(here):
    here.profile("[secrets]\nHF_TOKEN = 'env'\n")
    here.monkeypatch.setenv("HF_TOKEN", "hf_4711 secret")
    here.server.fault("status", status=422, method="POST", path="/(jobs|trainings)$",
                      message="bad body: {'value': 'hf_4711 secret'}, " + secret_of(here))
    result = here.launch()
    assert result.code == 4 and "bad body: {'value': '***'}, ***" in result.err


def test_an_image_that_cannot_be_pulled(here):
    here.server.missing_images.add("registry.test/nemo:1")
    result = here.launch()
    assert result.code == 4 and "the image cannot be pulled: " in result.err and "ErrImagePull" in result.err
    assert "python launch.py cancel " in result.err


def test_a_platform_that_is_not_there(here):
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    run = here.up()
    url = "http://127.0.0.1:9/api"
    here.monkeypatch.setenv("LEPTON_WORKSPACE_URL" if here.kind == "lepton" else "RUNAI_BASE_URL", url)
    for words in (["nano3", "sft", here.kind, "--repo-root", here.root], *(
            [] if here.kind == "lepton" else [["status", run], ["logs", run], ["cancel", run]])):
        result = here.main(*words)
        assert result.code == 5 and url in result.err and "cannot be reached" in result.err, result.err


def test_the_table_waits_for_a_silent_platform_once(here):
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    for _ in range(3):
        here.up()
    here.server.fault("drop", times=999)
    seen = len(here.server.requests)
    table = here.main("status")
    assert table.code == 5 and table.out.count("  unknown  ") == 3 and "cannot be reached" in table.out
    assert len(here.server.requests) - seen <= http.READ_RETRIES + 1


def test_a_status_that_cannot_be_read_is_an_error(here):
    """And in the table it does not hide the others."""
    first, name = here.up(), "LEPTON_WORKSPACE_TOKEN" if here.kind == "lepton" else "RUNAI_CLIENT_SECRET"
    (here.folder / "local.toml").write_text('executor = "local"\n')
    here.recipe(HELLO)
    assert here.launch("--nodes", 1, profile="local").code == 0
    here.monkeypatch.setenv(name, "wrong")
    result = here.main("status", first)
    assert result.code == 4 and "HTTP 401" in result.err and result.out == ""
    table = here.main("status")
    assert table.code == 4 and len(table.out.splitlines()) == 1 + 2
    assert re.search(first + r"  unknown .*HTTP 401", table.out) and " local " in table.out


TROUBLE = {  # a bad moment, and whether a request that creates survives it by itself
    "429": {"kind": "status", "status": 429, "retry_after": 0.05}, "503": {"kind": "status", "status": 503},
    "500": {"kind": "status", "status": 500}, "drop": {"kind": "drop"}, "reset": {"kind": "reset"},
    "slow": {"kind": "slow", "seconds": 0.2},
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_bad_moment_is_survived(here, trouble):
    """In every request but the one that creates: that is for the tests below."""
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    for path in ("node-groups", "/token", "/projects", r"/(jobs|trainings)/[\w-]+$", "log$"):
        here.server.fault(**TROUBLE[trouble], path=path, times=2)
    if trouble in ("429", "503", "slow"):
        here.server.fault(**TROUBLE[trouble], path="/(jobs|trainings)$", method="POST", times=2)
    result = here.launch()
    assert (result.code, result.err) == (0, "") and "hello from 0" in result.out
    assert len(here.jobs) == 1


@pytest.mark.parametrize("trouble", ["429", "500", "drop", "hang"])
def test_trouble_that_lasts_ends_in_bounded_time(here, trouble):
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    here.monkeypatch.setattr(http, "READ_S", 0.2)
    here.server.fault(**TROUBLE.get(trouble, {"kind": trouble}), times=99)
    begin = time.monotonic()
    result = here.launch()
    assert result.code == 5 and len(result.err.splitlines()) == 2 and time.monotonic() - begin < 5
    assert len(here.server.requests) <= http.RETRIES + 1


@pytest.mark.parametrize("trouble", [{"kind": "drop"}, {"kind": "reset"}, {"kind": "status", "status": 500},
                                     {"kind": "status", "status": 503}, {"kind": "status", "status": 504}])
def test_a_creation_whose_answer_got_lost_is_not_doubled(here, trouble):
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    here.server.fault(**trouble, done=True, method="POST", path="/(jobs|trainings)$")
    result = here.launch()
    assert (result.code, result.err) == (0, "") and "hello from 0" in result.out
    assert len(here.jobs) == 1


def test_a_creation_that_never_arrived(here):
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    here.server.fault("drop", method="POST", path="/(jobs|trainings)$")
    result = here.launch("--detach")
    assert result.code == 5 and "look for nano3-sft-" in result.err and here.jobs == []
    assert len(here.posts) == 1
    assert here.launch("--detach").code == 0


def test_a_platform_that_is_out_of_reach_for_a_while_does_not_end_the_following(here):
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    here.recipe("import os, time\nprint('up', flush=True)\nwhile not os.path.exists('/shared/go'): time.sleep(0.02)")
    begun = Begun(here)
    wait_for(lambda: here.jobs and here.job.pods and "up" in here.job.pods[0].output)
    here.server.fault("status", status=503, times=8, path=r"/(jobs|trainings)/[\w-]+$")
    wait_for(lambda: not here.server._faults[-1].times)
    (here.volume / "go").write_text("")
    result, _ = begun.end(20)
    assert result.code == 0 and result.out.count("trying again for 10 minutes") == 1
    here.monkeypatch.setattr(follow, "PATIENCE_S", 0)
    run = here.up()
    here.server.fault("status", status=503, times=99, path=r"/(jobs|trainings)/[\w-]+$")
    result = here.main("logs", run)
    assert result.code == 5 and "503" in result.err


@pytest.mark.parametrize("answer", [b"<html>Please log in</html>", b"[1, 2]", b"", b"{}"])
def test_what_answers_is_not_the_platform(here, answer):
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

        def log_message(self, *words):
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = "http://127.0.0.1:%d/api/v1" % server.server_address[1]
    here.monkeypatch.setenv("LEPTON_WORKSPACE_URL" if here.kind == "lepton" else "RUNAI_BASE_URL", url)
    result = here.launch()
    server.shutdown()
    server.server_close()
    assert result.code in (4, 5) and "a bug" not in result.err, result.err  # the SDK may have its own word before


# ---------------------------------------------------------------- certificates and proxies


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1: (its file, its key's file)."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=airlift",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "ca.pem"],
                   cwd=folder, check=True, capture_output=True)
    return folder / "ca.pem", folder / "key.pem"


def relay(port, wrap=lambda connection: connection, head=lambda data: data):
    """Listen on loopback, and pass bytes on to `port`; `head` may change each piece of a request."""
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source, target, change=lambda data: data):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(change(data))
            target.shutdown(socket.SHUT_WR)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                try:
                    inner = wrap(connection)
                except OSError:  # the client did not trust us
                    continue
                outer = socket.create_connection(("127.0.0.1", port))
                threading.Thread(target=copy, args=(inner, outer, head), daemon=True).start()
                threading.Thread(target=copy, args=(outer, inner), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener


URLS = {"lepton": ("LEPTON_WORKSPACE_URL",), "dgxcloud": ("RUNAI_BASE_URL", "RUNAI_KUBE_APISERVER_URL")}


def test_a_private_certificate_authority(here, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with relay(here.server.port, lambda plain: context.wrap_socket(plain, server_side=True)) as listener:
        for name in URLS[here.kind]:
            url = os.environ[name].replace("http://127.0.0.1:%d" % here.server.port,
                                           "https://127.0.0.1:%d" % listener.getsockname()[1])
            here.monkeypatch.setenv(name, url)
        begin = time.monotonic()
        result = here.launch()
        assert result.code == 5 and "is not trusted (TLS)" in result.err and "ca_bundle" in result.err
        assert time.monotonic() - begin < 5 and here.server.requests == []
        here.profile(ca_bundle=str(certificate[0]))
        here.monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/etc/hostname")  # the profile's own comes first
        result = here.launch()
        assert (result.code, result.err) == (0, "") and "hello from 0" in result.out
        assert here.main("logs", result.run).code == 0
        here.profile(ca_bundle="/no/such/file.pem")
        result = here.launch()
        assert result.code == 2 and "ca_bundle /no/such/file.pem does not exist" in result.err


def test_the_usual_proxy_variables(here):
    passed = []

    def direct(data):
        first = re.match(rb"[A-Z]+ (http://127.0.0.1:%d)/" % here.server.port, data)
        passed.append(bool(first))
        return data.replace(first.group(1), b"", 1) if first else data

    with relay(here.server.port, head=direct) as listener:
        here.monkeypatch.setenv("http_proxy", "http://127.0.0.1:%d" % listener.getsockname()[1])
        here.monkeypatch.setenv("no_proxy", "")
        result = here.launch()
        assert (result.code, result.err) == (0, "") and passed.count(True) == len(here.server.requests)
        here.monkeypatch.setenv("no_proxy", "127.0.0.1")
        seen = len(passed)
        assert here.launch().code == 0 and len(passed) == seen


# ---------------------------------------------------------------- nothing lies about


def test_no_chunk_and_no_secret_lies_about(here, caplog):
    """In files of ours and of nemo-run, its logs at DEBUG, the arguments of any process, what a pod prints."""
    from nemo_run.config import get_nemorun_home

    here.profile("[secrets]\nHF_TOKEN = 'env'\n[env_vars]\nMINE = 'plain-value-4711'\n")
    here.monkeypatch.setenv("HF_TOKEN", "hf-secret-4711")
    here.pad(200_000)
    for name in [*logging.root.manager.loggerDict, None]:
        logger = logging.getLogger(name)
        here.monkeypatch.setattr(logger, "setLevel", lambda level: None)
        here.monkeypatch.setattr(logger, "level", logging.DEBUG)
        here.monkeypatch.setattr(logger, "disabled", False)
        here.monkeypatch.setattr(logger, "handlers", [caplog.handler])  # nemo-run takes away the root's
    logging.root.manager._clear_cache()
    run = here.up()
    sent = here.env()
    assert sent["HF_TOKEN"] == "hf-secret-4711"
    secrets = ["hf-secret-4711", secret_of(here), "plain-value-4711"]
    for name, value in sent.items():
        if re.match(r"AIRLIFT_[A-Z]+_\d", name):
            secrets += [value[:60], value[-60:]]
    assert len(secrets) > 8
    commands = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            commands += path.read_bytes()
    assert b"AIRLIFT_POD_SHA256" in commands  # the pod's bootstrap
    shown = here.main("status", run, "--json").out + here.main("cancel", run).out
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert {"urllib3", "nemo_run"} <= {record.name.split(".")[0] for record in caplog.records}
    for secret in secrets:
        assert secret.encode() not in commands
        assert secret not in shown + logged + here.job.pods[0].output
    folders = [get_nemorun_home(), here.place / "airlift", here.place / "home", here.volume]
    assert seen_in(folders, secrets) == []
    assert seen_in(folders, [run])  # the search does find what is there
    assert seen_in([get_nemorun_home()], ["registry.test/nemo:1"])  # also in nemo-run's base64


# ---------------------------------------------------------------- what a profile may add


def test_custom_spec_passes_through(here):
    custom = {"lepton": {"log": {"save_termination_logs": True}, "envs": [{"name": "ADDED", "value": "x y"}]},
              "dgxcloud": {"nodePools": ["a"], "compute": {"cpuCoreRequest": 4}, "environmentVariables": [
                  {"name": "ADDED", "value": "x y"}]}}[here.kind]
    here.profile(custom_spec=custom)
    here.recipe("import os\nprint('added', os.environ['ADDED'])")
    result = here.launch()
    assert (result.code, "added x y" in result.out) == (0, True), result.err
    spec = here.job.spec
    if here.kind == "lepton":
        assert spec["log"] == {"save_termination_logs": True} and spec["max_failure_retry"] == 0
    else:
        assert spec["compute"] == {"gpuDevicesRequest": 1, "largeShmRequest": True, "cpuCoreRequest": 4}


@pytest.mark.parametrize(("custom", "code", "words"), [
    ({"nonsense": 1}, None, "nonsense"), ({"log": {"nonsense": 1}}, None, "nonsense"),
    ({"container": {"command": ["x"]}, "command": "x"}, 2, "command, which Airlift sets itself"),
])
def test_custom_spec_with_what_the_platform_does_not_know(here, custom, code, words):
    here.profile(custom_spec=custom)
    result = here.launch()
    if "log" in custom and here.kind == "dgxcloud":
        words = '"log"'
    assert result.code == (code or (2 if here.kind == "lepton" else 4)) and words in result.err, result.err
    assert here.jobs == []


SECRET = {"lepton": {"secrets": {"my-token": "hf_by $(reference)"}},
          "dgxcloud": {"credentials": {"mine": {"token": "hf_by $(reference)"}}}}
REFERENCE = {"lepton": "lepton:my-token", "dgxcloud": "runai:mine/token"}


@pytest.mark.parametrize("kind", PLATFORMS)
def test_secrets_by_reference_and_by_value(kind, tmp_path, monkeypatch, capsys):
    for here in cloud(kind, tmp_path, monkeypatch, capsys, **SECRET[kind]):
        here.profile("[secrets]\nHF_TOKEN = '%s'\nWANDB_API_KEY = 'env'\n" % REFERENCE[kind])
        here.recipe("import os, base64\nfor name in ('HF_TOKEN', 'WANDB_API_KEY'):\n"
                    "    print(base64.b16encode(os.environ[name].encode()).decode())")
        result = here.launch()
        assert result.code == 2 and "WANDB_API_KEY is not set here" in result.err and here.server.requests == []
        monkeypatch.setenv("WANDB_API_KEY", "by value $(x)")
        result = here.launch()
        assert result.code == 0 and "note: WANDB_API_KEY is sent by value" in result.out
        assert b"hf_by $(reference)".hex().upper() in result.out and b"by value".hex().upper() in result.out
        assert "by value $" not in result.out and "hf_by" not in str(here.env()) + result.out


@pytest.mark.parametrize("source", ["file", "env2", "", "docker:x", "lepton:", "lepton:a b", "runai:only", "runai:a/",
                                    "runai:/b", "runai:a/b/c"])
def test_malformed_references(here, source):
    here.profile("[secrets]\nHF_TOKEN = '%s'\n" % source)
    result = here.launch()
    assert result.code == 2 and "secrets.HF_TOKEN" in result.err and 'write "env"' in result.err
    assert here.server.requests == []


def test_a_profile_of_its_own_size_limit(here):
    """What custom_spec adds counts too, and is found before anything is sent."""
    here.profile(custom_spec={"lepton": {"envs": [{"name": "BIG", "value": noise(600_000).hex()}]},
                              "dgxcloud": {"annotations": [{"name": "big", "value": noise(800_000).hex()}]}}[here.kind])
    here.pad(300_000)
    result = here.launch()
    assert result.code == 3 and "nothing was submitted" in result.err and here.posts == []
