"""DGX Cloud Lepton, with common/lepton_client.py and lepton_logs.py: what only this platform has. The rest is in test_clouds.py."""

import datetime
import json
import time
import types

import pytest
from cloud import EMULATED, cloud, wait_for
from hypothesis import given
from hypothesis import strategies as st

import backends
import backends.lepton
import runs
from backends.common import lepton_logs, lepton_ray
from tests import newer
from transport import Refusal

pytestmark = EMULATED


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    yield from cloud("lepton", tmp_path, monkeypatch, capsys)


def test_the_job_that_is_asked_for(here):
    here.profile(shared_memory_size=1024, image_pull_secrets=["reg"], node_reservation="res-1", can_preempt=True,
                 queue_priority="low-2000", pre_launch_commands=["export A=from-setup"],
                 startup_commands=["export B=$A-too"])
    here.recipe("import os\nprint(os.environ['B'])")
    result = here.launch("--nodes", "2")
    assert result.code == 0 and "from-setup-too" in result.out
    spec = here.job.spec
    assert here.job.name == "nano3-sft-" + result.run
    assert (spec["completions"], spec["parallelism"], spec["intra_job_communication"]) == (2, 2, True)
    assert (spec["max_failure_retry"], spec["max_job_failure_retry"]) == (0, 0)  # the defaults start a dead rank again
    assert spec["shared_memory_size"] == 1024 and spec["image_pull_secrets"] == ["reg"]
    assert spec["reservation_config"] == {"reservation_id": "res-1"}
    assert spec["queue_config"] == {"priority_class": "low-2000", "can_preempt": True}
    assert spec["affinity"] == {"allowed_dedicated_node_groups": list(here.server.groups)}


def test_the_keys_of_placement(here):
    soon = datetime.datetime.now(datetime.UTC).replace(microsecond=0) + datetime.timedelta(seconds=2)
    here.profile('[labels]\n"team.x" = "a"\n[security]\nprivileged = true\n', segments=2, priority="high-7000",
                 preemptible=True, visibility="private", start_at=soon.isoformat())
    begun = here.launch("--nodes", "4", "--detach")
    wait_for(lambda: here.job.state == "Awaiting")
    assert "Awaiting" in here.main("status", begun.run).out
    spec, metadata = here.job.spec, here.job.metadata
    assert spec["segment_config"] == {"count_per_segment": 2}
    assert spec["time_schedule"] == {"start_at": int(soon.timestamp())}
    assert spec["queue_config"] == {"priority_class": "high-7000", "can_be_preempted": True}
    assert spec["user_security_context"] == {"privileged": True} and metadata["visibility"] == "private"
    digest = runs.load_run(begun.run).sha256
    assert metadata["labels"] == {"team.x": "a", "airlift-run": begun.run, "airlift-tree": digest[:32]}
    here.job.wait("Completed")


@pytest.mark.parametrize(("changes", "words"), [
    ({"mounts": [{"path": "/", "mount_path": "/usr//local/", "from": "node-nfs:shared"}], "nemo_run_dir": None},
     "reserves the mount path /usr//local/"),
    ({"mounts": [{"path": "/", "mount_path": "//opt", "from": "node-nfs:shared"}], "nemo_run_dir": None},
     "reserves the mount path //opt"),
    ({"segments": 3}, "4 nodes cannot be divided into 3 segments"), ({"segments": 4}, "segments of two or more"),
    ({"labels": {"x/y": "a"}}, "no / in the name of a label: x/y"), ({"labels": {"x": "a b"}}, "labels.x is 'a b'"),
    ({"labels": {"x": "a" * 64}}, "at most 63"), ({"labels": {"-x": "a"}}, "labels is ***"),
    ({"start_at": "2020-01-01T00:00:00Z"}, "start_at = 2020-01-01T00:00:00Z is over"),
    ({"start_at": "tomorrow"}, "it must be a time with its zone"), ({"start_at": "2099-01-01T00:00:00"}, "with its zone"),
    ({"host_network": True}, "host_network is only for jobs on a Ray cluster"), ({"rdma": True}, "rdma is only for jobs"),
    ({"security": {"runAsUid": 1}}, "no field user_security_context.runAsUid"), ({"visibility": "all"}, "public or private"),
    ({"preemptible": True, "can_be_preempted": True}, "preemptible is set twice"),
])
def test_keys_that_cannot_be_meant_are_refused_before_anything_is_sent(here, changes, words):
    here.profile(**changes)
    result = here.launch("--nodes", "4")
    assert result.code == 2 and words in result.err and here.server.requests == [], result.err


def test_what_a_toml_file_calls_a_time(here):
    here.profile()
    (here.folder / "lepton.toml").write_text((here.folder / "lepton.toml").read_text() + "start_at = 2099-01-01T01:00:00+01:00\n")
    assert here.launch("--detach").code == 0
    assert here.job.spec["time_schedule"] == {"start_at": 4070908800}


def test_both_sdks_take_every_kind_of_request(here):
    """The newer one with its own checks of a job. The emulator's tables are a part of both, so that each request of
    these tests is: tests/test_emulators.py."""
    soon = "2099-01-01T00:00:00Z"
    placed = {"segments": 2, "priority": "high-7000", "preemptible": True, "visibility": "public", "shared_memory_size": 64,
              "node_reservation": "res-1", "image_pull_secrets": ["reg"], "head_resource_shape": "cpu.small",
              "ray_version": "2.48.0", "labels": {"a": "b"}, "security": {"privileged": True}}
    bodies = []
    for launch, more in (("direct", {"start_at": soon}), ("torchrun", {"start_at": soon}),
                         ("ray", {"rdma": True, "host_network": True})):
        here.profile(**placed, **more)
        here.recipe("pass", launch=launch)
        seen = []
        here.monkeypatch.setattr(backends.lepton, "submit", lambda run, job, plan, attached, seen=seen: seen.append((job, plan)))
        assert here.launch("--nodes", "4", "--detach").code == 0
        job, plan = seen[0]
        plain = backends.lepton.request(job, plan, "a-name", "group", {})
        body = lepton_ray.request(job, "a-name", plain) if launch == "ray" else plain
        bodies.append(json.loads(body.model_dump_json(by_alias=True, exclude_none=True)))
    cluster = bodies[-1]["spec"]
    assert cluster["worker_group_specs"][0]["segment_config"] == {"count_per_segment": 2}
    for group in (cluster["head_group_spec"], cluster["worker_group_specs"][0]):
        assert group["enable_rdma"] is group["host_network"] is group["user_security_context"]["privileged"] is True
    assert bodies[-1]["metadata"]["labels"]["a"] == "b" and "segment_config" not in cluster["head_group_spec"]
    assert newer.ask(bodies) == {"lacking": [], "refused": []}
    assert newer.ask([bodies[0] | {"metadata": {"id": "made-by-lepton"}}])["refused"], "it does look"


@pytest.mark.parametrize(("changes", "words"), [
    ({"start_at": "2099-01-01T00:00:00Z"}, "start_at is only for jobs without a Ray cluster"),
    ({"segments": 2}, "needs a head of its own"),
])
def test_keys_that_a_ray_cluster_does_not_have(here, changes, words):
    here.profile(ray_version="2.48.0", **changes)
    here.recipe("pass", launch="ray")
    result = here.launch("--nodes", "4")
    assert result.code == 2 and words in result.err and here.server.requests == [], result.err


def test_a_preempting_job_has_a_priority(here):
    here.profile(can_be_preempted=True)
    assert here.launch("--detach").code == 0
    assert here.job.spec["queue_config"] == {"priority_class": "mid-4000", "can_be_preempted": True}


def test_a_node_group_that_is_not_there(here):
    here.profile(node_group="defualt-group")
    result = here.launch()
    assert result.code == 4 and "no node group 'defualt-group'" in result.err
    assert "this workspace has default-group" in result.err and here.posts == []


@pytest.mark.parametrize(("mount", "words"), [
    ({"path": "/", "mount_path": "/shared"}, "a mount lacks from"),  # the library finds this too late (15)
    ({"from": "node-nfs:shared"}, "a mount lacks path, mount_path"),
    ({"path": "/", "mount_path": "/shared", "from": "node-nfs:shared", "readonly": True}, "no field mounts.readonly"),
])
def test_mounts_are_checked_before_anything_is_sent(here, mount, words):
    here.profile(mounts=[mount])
    result = here.launch()
    assert result.code == 2 and words in result.err and here.posts == [], result.err


def test_a_wrong_type_in_custom_spec(here):
    here.profile(custom_spec={"log": {"save_termination_logs": "perhaps"}})
    result = here.launch()
    assert result.code == 2 and "log.save_termination_logs" in result.err and here.posts == []


def test_a_secret_cannot_have_a_name_of_the_platforms(here):
    here.profile("[secrets]\nLEPTON_JOB_NAME = 'lepton:x'\n")
    result = here.launch()
    assert result.code == 2 and "LEPTON_JOB_NAME" in result.err and here.server.requests == []


@pytest.mark.parametrize("missing", ["LEPTON_WORKSPACE_ID", "LEPTON_WORKSPACE_TOKEN"])
def test_no_credentials(here, missing):
    here.monkeypatch.delenv(missing)
    result = here.launch()
    assert result.code == 4 and "no Lepton credentials" in result.err and "lep login" in result.err


def test_id_and_token_in_one_variable(here):
    here.monkeypatch.setenv("LEPTON_WORKSPACE_ID", "ws0:" + here.server.token)
    here.monkeypatch.delenv("LEPTON_WORKSPACE_TOKEN")
    assert here.launch("--detach").code == 0


def test_another_workspace(here):
    """Credentials of another workspace are refused (403); a run of another workspace is not looked for in this one."""
    run = here.up()
    here.monkeypatch.setenv("LEPTON_WORKSPACE_TOKEN", here.server.foreign_token)
    assert "HTTP 403" in here.main("status", run).err
    here.monkeypatch.setenv("LEPTON_WORKSPACE_URL", "http://127.0.0.1:9/api")
    result = here.main("cancel", run)
    assert result.code == 4 and here.server.url in result.err and "127.0.0.1:9" in result.err


@pytest.mark.parametrize(("phase", "why"), [
    (None, "Queueing: 0 idle nodes in the node group, the job needs 2"),
    ("WaitingEffective", "Queueing: reservation res-1 is WaitingEffective, 4 nodes; the job needs 2"),
])
def test_why_it_waits(here, phase, why):
    if phase:
        here.profile(node_reservation="res-1")
        here.server.reservations["res-1"]["phase"] = phase
    else:
        here.server.unschedulable.update(*here.server.nodes.values())
    begun = here.launch("--detach", "--nodes", "2")
    assert why in here.main("status", begun.run).out
    with here.process("logs", "-f", begun.run) as following:
        assert "-- waiting (" + why in following.stdout.readline()
        here.server.unschedulable.clear()
        here.server.reservations["res-1"]["phase"] = "Reserved"
        assert why not in following.communicate()[0]
    assert following.returncode == 0


def test_logs_outlive_the_pods(here):
    """By the workspace's log store, in pages, for a rank whose pod has gone, and where none is listed any more."""
    here.recipe("import os\nfor n in range(25_000): print('line', n, 'of rank', os.environ['NODE_RANK'])\n")
    begun = here.launch("--detach", "--nodes", "2")
    here.job.wait("Completed")
    whole = here.main("logs", begun.run, "--rank", "1").out.splitlines()
    assert len(whole) > 25_000
    here.server.keeps_pods = False
    assert here.main("logs", begun.run, "--rank", "1").out.splitlines() == whole
    here.job.archived = True
    here.server.fault("status", status=429, path="/logs$", times=1, retry_after=1)
    asked = time.monotonic()
    assert here.main("logs", begun.run, "--rank", "1").out.splitlines() == whole and time.monotonic() - asked > 1
    assert "[1] line 24999 of rank 1" in here.main("logs", begun.run, "--all-ranks").out


def stored(answer):
    """A client of a log store with that answer, and a run."""
    def get(path, params):
        return types.SimpleNamespace(status_code=200, json=lambda: answer(params))
    return (types.SimpleNamespace(url="http://x", auth_token="", _get=get),
            types.SimpleNamespace(started=3601, record={"job": "j"}))


@pytest.mark.parametrize("answer", [{}, [], {"data": {}}, {"data": {"result": [{"stream": {}, "values": [["x", "y"]]}]}},
                                    {"data": {"result": [{"stream": [], "values": [["1", "y"]]}]}}])
def test_a_log_store_that_answers_something_else(answer):
    with pytest.raises(Refusal, match="did not answer with") as caught:
        lepton_logs.kept(*stored(lambda params: answer), 0)
    assert caught.value.code == 5


@given(moments=st.lists(st.integers(0, 30), max_size=80), page=st.integers(3, 20))
def test_pages_of_a_log_neither_lose_nor_repeat_a_line(moments, page):
    """Where less than a page of lines have one time."""
    lines = [(10**9 + moment, "line %d" % number) for number, moment in enumerate(sorted(moments))]
    most = max((moments.count(moment) for moment in moments), default=0)

    def answer(params):
        asked = [line for line in lines if int(params["start"]) <= line[0] < int(params["end"])]
        found = [[str(moment), text] for moment, text in reversed(asked[-page:])]
        return {"data": {"result": [{"stream": {}, "values": found}]}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lepton_logs, "PAGE", page)
        shown = list(lepton_logs.kept(*stored(answer), 0, "j-0-x") or ())
    if most < page:
        assert shown == [text + "\n" for _, text in lines]
    else:
        assert len(set(shown)) == len(shown)


def test_a_queued_job_waits_and_can_be_cancelled(here):
    here.server.unschedulable.update(*here.server.nodes.values())
    begun = here.launch("--detach")
    assert here.main("status", begun.run).out.splitlines()[1].split()[1] == "waiting"
    result = here.main("logs", begun.run)
    assert result.code == 2 and "has no log yet: it is waiting (Queueing)" in result.err and "logs -f" in result.err
    assert here.main("cancel", begun.run).out.endswith("was cancelled\n")
    result = here.main("logs", begun.run)
    assert result.code == 2 and "its pods never started" in result.err


def test_not_all_pods_are_ready(here):
    here.server.start_delays[1] = 1.0
    here.launch("--nodes", "2", "--detach")
    wait_for(lambda: here.job.state == "Running")
    assert "waiting" in (said := here.main("status").out) and "Running, " in said and "of 2 pods ready" in said


def test_an_archived_job_still_says_how_it_ended(here):
    here.profile(custom_spec={"ttl_seconds_after_finished": 0})
    begun = here.launch("--detach")
    here.job.wait("Archived")
    assert " done " in here.main("status", begun.run).out
    here.recipe("raise SystemExit(5)")
    begun = here.launch("--detach")
    here.job.wait("Archived")
    said = here.main("status", begun.run).out
    assert " failed " in said and "exit code 5" in said


def test_a_job_that_the_platform_forgot(here):
    run = here.up()
    here.server.jobs.clear()
    assert backends.GONE in here.main("status", run).out
    assert runs.load_run(run).ended is None  # that is no news of how it ended


def test_retries_that_are_asked_for_show_every_attempt(here):
    here.profile(custom_spec={"max_failure_retry": 1})
    here.recipe("import os\nfirst = not os.path.exists('/shared/seen')\nopen('/shared/seen', 'w').close()\n"
                "print('attempt', 1 if first else 2)\nraise SystemExit(9 * first)")
    result = here.launch()
    assert result.code == 0 and result.out.index("attempt 1") < result.out.index("attempt 2")
    assert len(here.jobs) == 1


def test_retries_start_the_whole_job_again_and_are_counted(here):
    here.profile(retries=2)
    here.recipe("import os\nprint('I am', os.environ['NODE_RANK'], flush=True)\n"
                "if os.environ['NODE_RANK'] == '1': raise SystemExit\nopen('/shared/seen', 'a').write('x')\n"
                "raise SystemExit(9 * (len(open('/shared/seen').read()) < 3))")
    result = here.launch("--nodes", "2")
    assert result.code == 0, result.err
    spec = here.job.spec
    assert (spec["max_failure_retry"], spec["max_job_failure_retry"]) == (0, 2)
    assert [line for line in result.out.splitlines() if "attempt" in line][:2] == [
        "-- attempt 2 of 3", "-- attempt 3 of 3"]
    assert result.out.count("I am 0") == 3
    row = json.loads(here.main("status", result.run, "--json").out)[0]
    assert (row["state"], row["detail"]) == ("done", "Completed, attempt 3 of 3")


def test_retries_end(here):
    here.profile(retries=1)
    here.recipe("raise SystemExit(9)")
    begun = here.launch("--detach")
    here.job.wait("Failed")
    row = json.loads(here.main("status", begun.run, "--json").out)[0]
    assert (row["state"], row["detail"], row["job_exit_code"]) == ("failed", "Failed, attempt 2 of 2", 9)


def test_states_of_the_platform_that_are_not_known():
    from leptonai.api.v1.types.job import LeptonJobState

    assert {state.value for state in LeptonJobState} | {"Terminating"} == set(backends.lepton.STATES)


@pytest.mark.parametrize(("word", "state"), [("Terminating", "running"), ("Brand new", "waiting"), (None, None)])
def test_a_state_of_a_newer_platform_is_shown_by_its_own_word(here, monkeypatch, word, state):
    """Also one that the SDK would make another."""
    begun = here.launch("--detach")
    document = type(here.job).document
    monkeypatch.setattr(type(here.job), "document", lambda job: document(job) | {"status": {"state": word}})
    said = here.main("status", begun.run, "--json")
    if word is None:
        assert said.code == 5 and "Lepton gave no state for job" in said.err
    else:
        row = json.loads(said.out)[0]
        assert (row["state"], row["detail"]) == (state, word)
