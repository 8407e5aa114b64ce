"""DGX Cloud Lepton, with common/lepton_client.py: what only this platform has. The rest is in test_clouds.py."""

import json

import pytest
from cloud import EMULATED, cloud, wait_for

import backends
import backends.lepton
import runs

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
