"""DGX Cloud on run:AI, with common/runai_client.py and placing.py: what only this platform has. The rest is in test_clouds.py."""

import json

import pytest
from cloud import EMULATED, KEEPS_ON, cloud, wait_for
from support import plant

import backends
import runs
from backends import dgxcloud
from backends.common import http

pytestmark = EMULATED


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    yield from cloud("dgxcloud", tmp_path, monkeypatch, capsys)


def holds(whole, part):
    if isinstance(part, dict):
        return all(name in whole and holds(whole[name], item) for name, item in part.items())
    return len(whole) == len(part) and all(map(holds, whole, part)) if isinstance(part, list) else whole == part


@pytest.mark.parametrize(("nodes", "model"), [(1, "TrainingCreationRequest"), (3, "DistributedCreationRequest")])
def test_the_request_is_one_of_the_official_client(here, nodes, model):
    """runapy's own models take it, and keep every field of it."""
    from runai import models

    here.profile('[secrets]\nHF_TOKEN = "runai:mine/token"\n', custom_spec={"nodePools": ["a"]})
    here.server.credentials["mine"] = {"token": "x"}
    assert here.launch("--nodes", nodes).code == 0
    sent = here.job.request
    assert holds(json.loads(getattr(models, model).from_dict(sent).to_json()), sent)
    assert here.env()["HF_TOKEN"]["userCredential"] == {"name": "mine", "key": "token"}
    spec = sent["spec"]
    assert (spec["restartPolicy"], spec["backoffLimit"]) == ("Never", 0)  # by default a dead rank is started again
    if nodes > 1:
        assert (spec["cleanPodPolicy"], spec["numWorkers"]) == ("Running", nodes - 1)
        assert sent["masterSpecSameAsWorker"] is True
        assert not {"minReplicas", "maxReplicas"} & set(spec)  # no elastic policy: pods would have no rank
    assert max(len(value) for value in here.env().values() if isinstance(value, str)) <= 9216


PLACED = {
    "priority": "medium-high", "preemptible": False, "node_pools": ["b", "a"], "node_type": "dgx-b200", "segments": 2,
    "image_pull_secrets": ["k8s-secret", "runai:mine"], "labels": {"team": "x"}, "annotations": {"example.com/note": "a b"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}], "topology": "example.com/rack",
    "mnnvl": "required", "extended_resources": {"rdma/ib": 1}, "security": {"runAsUid": 1000}, "host_network": True,
}


def test_the_keys_of_placement(here):
    """Each in run:AI's own fields; runapy's models and the emulator know them all."""
    from runai import models

    here.server.secrets["k8s-secret"] = {"a": "b"}
    here.server.credentials["mine"] = {"token": "x"}
    here.profile(**PLACED)
    begun = here.launch("--nodes", "4", "--detach")
    assert begun.code == 0, begun.err
    sent, spec = here.job.request, here.job.request["spec"]
    assert holds(json.loads(models.DistributedCreationRequest.from_dict(sent).to_json()), sent)
    assert (spec["priorityClass"], spec["preemptibility"], spec["nodePools"], spec["nodeType"]) == (
        "medium-high", "non-preemptible", ["b", "a"], "dgx-b200")
    assert spec["imagePullSecrets"] == [{"name": "k8s-secret"}, {"name": "mine", "userCredential": True}]
    named = {field: {each["name"]: each["value"] for each in spec[field]} for field in ("labels", "annotations")}
    digest = runs.load_run(begun.run).sha256
    assert named == {
        "labels": {"team": "x", "airlift-run": begun.run, "airlift-tree": digest[:32], "run.ai/MNNVL": "Required"},
        "annotations": {"example.com/note": "a b", "kai.scheduler/topology-required-placement": "example.com/rack",
                        "kai.scheduler/segment-size": "2"}}
    assert spec["tolerations"] == PLACED["tolerations"]
    assert spec["compute"]["extendedResources"] == [{"resource": "rdma/ib", "quantity": "1"}]
    assert spec["security"] == {"runAsUid": 1000, "hostNetwork": True}
    assert "run:AI counts segments without the first pod: ranks 1 to 2 are the first" in begun.out
    here.job.wait("Completed")


@pytest.mark.parametrize(("changes", "words"), [
    ({"segments": 3}, "4 nodes cannot be divided into 3 segments"), ({"labels": {"x": "a b"}}, "labels.x is 'a b'"),
    ({"preemptible": True, "preemptibility": "preemptible"}, "both preemptible and preemptibility"),
    ({"preemptibility": "sometimes"}, "preemptible or non-preemptible or semi-preemptible"),
    ({"tolerations": [{"operator": "Exists"}]}, "a toleration lacks key"), ({"mnnvl": "Required"}, "none or preferred"),
    ({"extended_resources": {"rdma/": 1}}, "it must be a table of texts or numbers"), ({"start_at": "x"}, "is not for executor"),
    ({"security": {"privileged": True}}, "security has no field privileged"),
])
def test_keys_that_cannot_be_meant_are_refused_before_anything_is_sent(here, changes, words):
    here.profile(**changes)
    result = here.launch("--nodes", "4")
    assert result.code == 2 and words in result.err and here.server.requests == [], result.err


def test_the_fields_of_security_are_runapys():
    from runai import models

    fields = models.SupersetSpecAllOfSecurity.model_fields.items()
    assert {field.alias or name for name, field in fields} == set(dgxcloud.SECURITY)


def test_why_it_waits(here):
    here.server.waits = "Not enough resources in the requested nodepool"
    begun = here.launch("--detach")
    why = "waiting (Pending: Not enough resources in the requested nodepool)"
    assert "Pending: Not enough resources" in here.main("status", begun.run).out
    with here.process("logs", "-f", begun.run) as following:
        assert "-- " + why in following.stdout.readline()
        here.server.waits = ""
        following.communicate()
    assert following.returncode == 0
    here.profile(image_pull_secrets=["gone"])
    begun = here.launch("--detach")
    wait_for(lambda: "Unable to retrieve gone" in here.main("status", begun.run).out)
    for times, path in ((1, "/events"), (2, "/workloads/[^/]*$")):  # an installation that has neither
        here.server.fault("status", status=404, path=path, times=9 * times)
    assert "Initializing" in here.main("status", begun.run).out


@pytest.mark.parametrize("splitter", ["shell", "blanks"])
def test_command_and_args_survive_any_split(here, splitter):
    here.server.splitter = splitter
    assert here.launch().code == 0


def test_a_quota(here):
    here.profile(project_name="team-without-quota")
    result = here.launch()
    assert result.code == 4 and "has a quota of 0 GPUs; the workload asks for 1" in result.err
    assert here.jobs == [] and runs.all_runs() == ([], [])


def test_a_project_that_is_not_there_and_one_on_the_third_page(here):
    here.server.projects = {str(number): "p%d" % number for number in range(120)}
    here.server.quotas = dict.fromkeys(here.server.projects.values(), 8)
    result = here.launch()
    assert result.code == 4 and "no project 'team-a'" in result.err and "p0, p1, " in result.err
    here.profile(project_name="p117")
    assert here.launch("--detach").code == 0 and here.job.project == "p117"


@pytest.mark.parametrize(("volume", "words"), [
    ({"claimName": "workspace", "path": "/shared", "existingPvc": "yes"}, "lacks existingPvc"),
    ({"existingPvc": True}, "lacks claimName, path"),
    ({"claimName": "workspace", "path": "/other", "existingPvc": True}, "/shared/airlift is on none of the pvcs"),
])
def test_volumes_are_checked_before_anything_is_sent(here, volume, words):
    here.profile(pvcs=[volume])
    result = here.launch()
    assert result.code == 2 and words in result.err and here.server.requests == []


@pytest.mark.parametrize("volume", [{"existingPvc": True}, {}])
def test_a_claim_that_is_not_there(here, volume):
    """Without existingPvc it is taken as one that is there: a misspelt one would be made, and empty."""
    here.profile(pvcs=[{"claimName": "workspase", "path": "/shared"} | volume])
    result = here.launch()
    assert bool(volume) != ("workspase is taken as one that is there" in result.out)
    assert result.code == 4 and 'PVC "workspase" does not exist' in result.err


@pytest.mark.parametrize(("changes", "words"), [
    ({"gpus_per_node": "gpu"}, 'gpus_per_node is "gpu"'), ({"container_image": None}, "the job has no image"),
    ({"distributed_framework": "MPI"}, "distributed_framework is 'MPI'"),
])
def test_what_cannot_work_is_refused_before_anything_is_sent(here, changes, words):
    here.profile(**changes)
    result = here.launch("--nodes", "2")
    assert result.code == 2 and words in result.err and here.server.requests == []


def test_a_token_that_expires_is_renewed(here):
    here.server.token_seconds = 0.3
    here.recipe("import time\nprint('up', flush=True)\ntime.sleep(1)")
    result = here.launch()
    assert (result.code, result.err) == (0, "")
    assert len([1 for asked in here.server.requests if asked.path == "/token"]) > 2


@pytest.mark.parametrize(("kube", "cluster"), [(True, False), (False, True), (False, False)])
def test_logs_by_the_routes_there_are(here, kube, cluster):
    here.server.kube_logs, here.server.cluster_logs = kube, cluster
    here.recipe("import time\nprint('hello', flush=True)\ntime.sleep(0.6)")
    result = here.launch("--nodes", "2", "--all-ranks")
    assert result.code == 0
    for rank in (0, 1):
        there = kube or (cluster and rank == 0)
        assert ("[%d] hello" % rank in result.out) == there
        none = "-- no log of rank %d: run:AI gives no access to the logs (the Kubernetes API answered 403" % rank
        assert result.out.count(none) == (not there)  # said once
        assert there or "own log at /shared/airlift/nano3/runs/%s/rank-%d.log" % (result.run, rank) in result.out
    result = here.main("logs", result.run)
    assert (result.code, "hello" in result.out) == (0, True) if kube or cluster else "own log at /shared" in result.err


@pytest.mark.parametrize("kube", [True, False])
def test_a_project_with_a_namespace_of_its_own(here, kube):
    """Which the control plane tells, as it does the address of the project's cluster, and the names of pods."""
    here.server.namespaces["team-a"] = "research"
    here.server.kube_logs, here.server.cluster_logs = kube, not kube
    here.recipe("import time\nprint('hello', flush=True)\ntime.sleep(0.6)")
    checked = here.main("check", "nano3", "sft", "dgxcloud", "--repo-root", here.root).out
    assert "namespace research" in checked and "from the %s API" % ("Kubernetes" if kube else "cluster") in checked, checked
    result = here.launch("--nodes", "2", "--all-ranks")
    assert result.code == 0 and "[0] hello" in result.out and ("[1] hello" in result.out) == kube, result.out
    asked = {request.path for request in here.server.requests}
    assert "/workloads/%s/pods" % here.job.id in asked or not kube
    assert not [path for path in asked if "runai-team-a" in path]


def test_a_control_plane_that_lists_neither_pods_nor_clusters(here):
    here.server.fault("status", status=404, path="/pods$", times=99)
    here.recipe("import time\nprint('hello', flush=True)\ntime.sleep(0.6)")
    result = here.launch("--nodes", "2", "--all-ranks")
    assert result.code == 0 and "[0] hello" in result.out and "[1] hello" in result.out, result.out


def test_the_code_of_a_rank_that_was_ended_is_not_told_for_that_of_one_whose_log_is_closed_to_us(here):
    """The cluster's API has rank 0's log only, and rank 1 has failed."""
    here.server.kube_logs, here.server.cluster_logs = False, True
    here.recipe("import os, time\nif os.environ['NODE_RANK'] == '1':\n    time.sleep(1)\n    raise SystemExit(3)\ntime.sleep(300)")
    result = here.launch("--nodes", "2")
    assert result.code == 1 and "airlift: rank 0 ended with exit code 143" in result.out
    assert "its exit code is not known (Failed; the logs of 1 other ranks could not be read" in result.err, result.err
    here.server.kube_logs = True
    result = here.launch("--nodes", "2")
    assert result.code == 1 and "the job failed with exit code 3 " in result.err, result.err


def test_without_any_address_for_logs(here):
    here.profile(kube_apiserver_url=None)
    here.recipe("import time\ntime.sleep(0.5)\nraise SystemExit(3)")
    result = here.launch()
    assert result.code == 1 and "no kube_apiserver_url in the profile" in result.out
    assert "its exit code is not known (Failed" in result.err
    log = here.volume / "airlift/nano3/runs" / result.run / "rank-0.log"
    assert log.exists() and (log.parent / "rank-0.exit").read_text() == "3\n"


def test_retries_of_one_node_are_followed_and_several_refused(here):
    here.profile(retries=2)
    here.recipe("open('/shared/seen', 'a').write('x')\nprint('try', len(open('/shared/seen').read()), flush=True)\n"
                "raise SystemExit(9 * (len(open('/shared/seen').read()) < 3))")
    result = here.launch()
    assert result.code == 0, result.out + result.err
    assert (here.job.spec["restartPolicy"], here.job.spec["backoffLimit"]) == ("Never", 2)
    assert result.out.index("-- attempt 2 of 3") < result.out.index("try 2") < result.out.index("-- attempt 3 of 3")
    assert "Completed, attempt 3 of 3" in here.main("status", result.run).out
    refused = here.launch("--nodes", "2")
    assert refused.code == 2 and "retries is 2, and the job has 2 nodes" in refused.err and len(here.jobs) == 1


def test_the_answer_of_a_creation_that_comes_too_late(here):
    """It and the look for it fail; later commands find the workload by its name."""
    here.recipe(KEEPS_ON)
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    here.server.fault("drop", done=True, method="POST", path="/trainings$")
    here.server.fault("status", status=503, times=9, path="^/workloads$")
    result = here.launch()
    assert result.code == 5 and "the request may have arrived" in result.err and len(here.jobs) == 1
    here.server._faults.clear()
    run = runs.all_runs()[0][0].id
    assert here.main("status", run).code == 0
    assert here.main("cancel", run).out.endswith("was cancelled\n") and here.job.state == "Stopped"


def test_one_that_never_came_to_be(here):
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    here.server.fault("drop", method="POST", path="/trainings$")
    assert here.launch().code == 5
    result = here.main("status", runs.all_runs()[0][0].id)
    assert result.code == 4 and "its creation failed" in result.err


def test_a_run_is_found_from_anywhere(here, tmp_path):
    """Its profile was a section of an env.toml beside where it was launched; another of that name is not meant."""
    keys = (here.folder / "dgxcloud.toml").read_text()
    assert "\n[" not in keys
    plant(tmp_path, {"there/env.toml": "[mine]\n" + keys,
                     "elsewhere/env.toml": '[mine]\nexecutor = "slurm"\n'})
    here.recipe(KEEPS_ON)
    here.monkeypatch.chdir(tmp_path / "there")
    assert here.main("allow").code == 0
    assert here.main("nano3", "sft", "mine", "--detach", "--repo-root", here.root).code == 0
    run = runs.all_runs()[0][0].id
    here.monkeypatch.chdir(tmp_path / "elsewhere")
    for words in (["status", run], ["diff", run], ["cancel", run]):
        result = here.main(*words)
        assert (result.code, result.err) == (0, ""), words
    assert here.job.state == "Stopped"


def test_a_deleted_workload(here):
    run = here.up()
    with here.server.lock:
        here.job.delete()
    wait_for(lambda: here.job.state == "Deleted")
    assert backends.GONE in here.main("status", run).out


def test_phases_of_the_platform_that_are_not_known():
    from runai.models.phase import Phase

    assert {phase.value for phase in Phase} <= set(dgxcloud.PHASES)
