"""`check`: what it finds on each platform, and that it says 0 only where a launch would work."""

import importlib.metadata
import json
import shutil

import pytest
from cloud import EMULATED, PLATFORMS, cloud
from inside import checkout, speaker
from test_local import Place

import jobs
from backends import docker, local, slurm
from backends.common import checks, http
from tests import layout, support
from transport import Refusal

ORDER = {
    "lepton": ["profile", "omegaconf", "nemo-run", "leptonai", "credentials", "node group", "nodes", "resource shape",
               "image", "storage", "workspace"],
    "dgxcloud": ["profile", "omegaconf", "nemo-run", "requests", "credentials", "project", "image", "claim",
                 "workspace", "logs"],
}


@pytest.fixture(params=PLATFORMS)
def here(request, tmp_path, monkeypatch, capsys):
    yield from cloud(request.param, tmp_path, monkeypatch, capsys)


@pytest.fixture
def lepton(tmp_path, monkeypatch, capsys):
    yield from cloud("lepton", tmp_path, monkeypatch, capsys, secrets={"there": "x"})


@pytest.fixture
def runai(tmp_path, monkeypatch, capsys):
    yield from cloud("dgxcloud", tmp_path, monkeypatch, capsys, credentials={"there": {"key": "x"}})


def checked(here, *words):
    """(exit code, {what: finding}), by --json; in words it must come to the same."""
    said = here.main("check", *(words or [here.kind]), "--json")
    found = json.loads(said.out)
    plain = here.main("check", *(words or [here.kind]))
    assert plain.code == said.code and (said.code == 0) == all(one["state"] != "failure" for one in found)
    for one in found:
        assert any(line.startswith("%-7s  %s" % (one["state"], one["what"])) for line in plain.out.splitlines())
        assert one["state"] == "ok" or one["fix"] or one["what"] in ("note", "nodes")
    assert here.posts == []  # nothing was created
    return said.code, {one["what"]: one for one in found}


@EMULATED
def test_all_is_well(here):
    code, found = checked(here)
    assert code == 0 and list(found) == ORDER[here.kind]
    assert {one["state"] for one in found.values()} == {"ok"}, found
    assert here.launch("--detach").code == 0  # and so it is


@EMULATED
def test_with_a_recipe(here):
    here.recipe("pass", nodes=2)
    code, found = checked(here, "nano3", "sft", here.kind, "--repo-root", here.root)
    assert code == 0 and found["recipe"]["said"].startswith("nano3/sft, direct, ") and "API object" in found
    assert found["job"]["state"] == "ok"
    here.pad(1_400_000)
    code, found = checked(here, "nano3", "sft", here.kind, "--repo-root", here.root)
    assert code == 3 and found["API object"]["state"] == "failure"


@EMULATED
def test_bad_credentials_are_a_failure_and_not_shown(here):
    wrong = "wrong-secret-value-4711"
    here.monkeypatch.setenv("LEPTON_WORKSPACE_TOKEN" if here.kind == "lepton" else "RUNAI_CLIENT_SECRET", wrong)
    code, found = checked(here)
    assert code == 4 and found["credentials"]["state"] == "failure" and "401" in found["credentials"]["said"]
    assert wrong not in json.dumps(found) and list(found)[-1] == "credentials"  # nothing more is asked


@EMULATED
def test_a_platform_that_is_not_there(here):
    name = "LEPTON_WORKSPACE_URL" if here.kind == "lepton" else "RUNAI_BASE_URL"
    here.monkeypatch.setenv(name, "http://127.0.0.1:9/api/v1")
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    code, found = checked(here)
    assert code == 5 and "cannot be reached" in found["credentials"]["said"]


@EMULATED
def test_variables_that_are_not_set(here):
    here.profile(container_image="${env:NOT_SET_HERE}")
    code, found = checked(here)
    assert code == 2 and "NOT_SET_HERE" in found["profile"]["said"] and "credentials" not in found


@EMULATED
@pytest.mark.parametrize(("change", "what", "code", "said"), [
    ({"node_group": "defualt"}, "node group", 4, "no node group 'defualt'"),
    ({"resource_shape": "gpu.8xb200"}, "resource shape", 4, "gpu.8xb200 is not among cpu.large, cpu.small"),
    ({"mounts": [{"path": "/", "mount_path": "/shared", "from": "node-nfs:gone"}]}, "storage", 4, "gone is not among"),
    ({"nemo_run_dir": "/elsewhere"}, "workspace", 2, "/elsewhere is on none of the mounts"),
    ({"nodes": 9}, "nodes", 4, "4 of 4 are ready, the job needs 9; 4 are idle"),
    ({"secrets": {"T": "lepton:gone"}}, "secret", 4, "gone is not among there"),
    ({"secrets": {"T": "lepton:there"}, "image_pull_secrets": ["reg"]}, "pull secret", 0, "reg: cannot be checked"),
    ({"container_image": None}, "image", 0, "the profile has none"),
    ({"existing_ray_cluster": "gone"}, "Ray cluster", 4, "HTTP 404"),
    ({"ray_version": "2.60.0", "head_resource_shape": "cpu.huge"}, "resource shape", 4, "cpu.huge is not among"),
])
def test_lepton_knows(lepton, change, what, code, said):
    lepton.profile(**change)
    got, found = checked(lepton)
    assert got == code and said in found[what]["said"]
    assert found[what]["state"] == ("failure" if code else "warning")


@EMULATED
@pytest.mark.parametrize(("change", "code", "said"), [
    ({}, 0, "res-1 is Reserved, 4 nodes; the job needs 2"), (None, 4, "res-1 is not among none"),
    ({"phase": "Expired"}, 4, "res-1 is Expired"), ({"end": 1_700_000_000}, 4, "res-1 is Reserved"),
    ({"phase": "WaitingEffective"}, 0, "res-1 is WaitingEffective"), ({"begin": 4_000_000_000}, 0, "res-1 is Reserved"),
    ({"nodes": 1}, 0, "1 nodes; the job needs 2"), ({"nodes": 0}, 0, "0 nodes; the job needs 2"),
    ({"phase": "Postponed"}, 0, "res-1 is Postponed"),
])
def test_reservations(lepton, change, code, said):
    lepton.profile(node_reservation="res-1", nodes=2)
    if change is None:
        lepton.server.reservations.clear()
    else:
        lepton.server.reservations["res-1"].update(change)
    got, found = checked(lepton)
    state = "ok" if change == {} else "failure" if code else "warning"
    assert got == code and found["reservation"]["state"] == state and said in found["reservation"]["said"]


@EMULATED
def test_a_lepton_where_everything_is_wrong(lepton):
    """One finding for each, and nothing else that is not ok."""
    nodes = next(iter(lepton.server.nodes.values()))
    lepton.server.unschedulable.update(nodes[1:])
    lepton.server.reservations["res-1"]["phase"] = "Expired"
    lepton.profile(nodes=2, node_reservation="res-1", resource_shape="gpu.8xb200", container_image=None, nemo_run_dir="/no",
                   mounts=[{"path": "/", "mount_path": "/shared", "from": "node-nfs:gone"}], secrets={"T": "lepton:gone"},
                   image_pull_secrets=["reg"], existing_ray_cluster="gone")
    code, found = checked(lepton)
    assert code and {what: one["state"] for what, one in found.items() if one["state"] != "ok"} == {
        "nodes": "warning", "reservation": "failure", "resource shape": "failure", "Ray cluster": "failure",
        "image": "warning", "storage": "failure", "workspace": "failure", "secret": "failure", "pull secret": "warning"}


@EMULATED
def test_a_runai_where_everything_is_wrong(runai):
    runai.server.kube_logs = False
    runai.profile(container_image=None, project_name="team-z", pvc_nemo_run_dir="/no",
                  pvcs=[{"claimName": "gone", "path": "/shared", "existingPvc": True}], secrets={"T": "runai:gone/key"},
                  image_pull_secrets=["runai:mine", "reg"])
    code, found = checked(runai)
    assert code and {what: one["state"] for what, one in found.items() if one["state"] != "ok"} == {
        "project": "failure", "image": "warning", "claim": "warning", "workspace": "failure", "credential": "warning",
        "pull secret": "warning"}  # without a project nothing says whose logs
    runai.profile(kube_apiserver_url=None)
    assert checked(runai)[1]["logs"]["state"] == "warning"


@EMULATED
def test_nodes_that_work_already(lepton):
    lepton.up("--nodes", "3")
    lepton.server.requests.clear()
    lepton.profile(nodes=2)
    found = json.loads(lepton.main("check", "lepton", "--json").out)
    (nodes,) = [one for one in found if one["what"] == "nodes"]
    assert (nodes["state"], nodes["said"]) == ("warning", "4 of 4 are ready, the job needs 2; 1 are idle")


@EMULATED
def test_nodes_that_take_no_pods(lepton):
    nodes = next(iter(lepton.server.nodes.values()))
    lepton.server.unschedulable.update(nodes[1:])
    lepton.profile(nodes=2)
    code, found = checked(lepton)
    assert code == 0 and (found["nodes"]["state"], found["nodes"]["fix"]) == ("warning", "it would wait")
    lepton.server.unschedulable.update(nodes)
    assert checked(lepton)[0] == 4


@EMULATED
def test_a_list_that_may_not_be_read_is_a_warning(lepton):
    lepton.server.fault("status", status=403, path="/shapes", message="not for you", times=9)
    code, found = checked(lepton)
    assert code == 0 and found["resource shape"]["state"] == "warning" and "403" in found["resource shape"]["said"]


@EMULATED
@pytest.mark.parametrize(("change", "what", "code", "said"), [
    ({"project_name": "team-z"}, "project", 4, "no project 'team-z'"),
    ({"pvcs": [{"claimName": "gone", "path": "/shared", "existingPvc": True}]}, "claim", 0, "gone is not among"),
    ({"pvc_nemo_run_dir": "/elsewhere"}, "workspace", 2, "on none of the mounts"),
    ({"secrets": {"T": "runai:gone/key"}}, "credential", 0, "gone is not among there"),
    ({"kube_apiserver_url": None}, "logs", 0, "neither the Kubernetes API nor"),
])
def test_runai_knows(runai, change, what, code, said):
    runai.profile(**change)
    got, found = checked(runai)
    assert got == code and said in found[what]["said"]
    assert found[what]["state"] == ("failure" if code else "warning")


def test_libraries_that_are_not_there_or_not_those_that_are_pinned(monkeypatch):
    found = {one.what: one for one in checks.versions("lepton")}
    assert {one.state for one in found.values()} == {"ok"} and found["leptonai"].said == "0.27.3"

    def version(name):
        if name == "nemo-run":
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.9"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {one.what: one for one in checks.versions("lepton")}
    assert (found["nemo-run"].state, found["leptonai"].state) == ("failure", "warning")
    assert found["leptonai"].said == "9.9, and requirements.txt pins 0.27.3"


# ---------------------------------------------------------------- this machine, Docker, Slurm


def states(findings):
    return {one.what: one.state for one in findings}


def test_this_machine(tmp_path, monkeypatch):
    found = states(local.probe({"workspace": str(tmp_path / "new/output")}, None))
    assert found == dict.fromkeys(["python3", "bash", "cores", "scratch", "workspace"], "ok")
    assert states(local.probe({"gpus_per_node": 4096}, None))["GPUs"] == "failure"
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(local.sys, "executable", str(tmp_path / "bin/python3"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert states(local.probe({}, None))["bash"] == "failure"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(local.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert states(local.probe({}, None))["scratch"] == "warning"
    monkeypatch.setattr(local.os, "access", lambda path, mode: False)
    assert states(local.probe({}, None))["workspace"] == "failure"


def test_check_as_a_command(tmp_path):
    place = Place(tmp_path)
    place.recipe("pass")
    done = place.run("check", "nano3", "sft", "local")
    assert done.returncode == 0 and done.stdout.startswith("ok       profile         local, executor local"), done.stderr
    assert place.run("check").stderr.startswith("airlift: check takes PROFILE")
    assert place.run("check", "lokal").returncode == 2
    assert place.run("check", "nano3", "sft,rl", "local").returncode == 2


def test_docker_that_is_not_there(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/socket")
    (only,) = docker.probe({}, None)
    assert (only.what, only.state, only.code) == ("daemon", "failure", 5)


def test_a_job_that_slurm_cannot_have_is_found_before_anything_is_asked():
    settings = {"account": "a", "partition": "p", "remote_job_dir": "jobs"}
    job = jobs.Job("t23456", "a/b", "slurm", 1, 0, 1, None, settings, support.job(), {})
    (only,) = slurm.probe(settings, job)
    assert (only.what, only.state, only.code) == ("profile", "failure", 2)


@pytest.mark.parametrize("word", ["ok", "failure"])
def test_a_look_that_is_refused_is_a_failure(word):
    def look():
        if word == "failure":
            raise Refusal("no", "do", 4)
        return ""

    found = checks.finding("x", look, "fine")
    assert (found.state, found.said, found.code) == ((word, "no", 4) if word == "failure" else (word, "fine", 0))


# ---------------------------------------------------------------- what must fail is not expected to work


@pytest.fixture
def asked(capsys, monkeypatch, tmp_path):
    """(exit code, findings by name, the last line) of `check` for a recipe of this machine."""
    root, say = checkout(tmp_path, monkeypatch), speaker(capsys)
    monkeypatch.delenv("NETRC", raising=False)

    def ask(*words, yaml="{}\n", **fields):
        layout.recipe(root, "nano3/sft", path="src/nemotron/recipes/nano3/stage1_sft/train.py", yaml=yaml,
                      **({"nodes": 1, "gpus": 0, "launch": "python"} | fields))
        code, out, _ = say("check", "nano3", "sft", "local", *words, "--json")
        found = {one["what"]: (one["state"], one["said"]) for one in json.loads(out)}
        return code, found, say("check", "nano3", "sft", "local", *words)[1].splitlines()[-1]

    return ask


def test_a_launch_that_can_be_expected_to_work(asked):
    code, _, last = asked()
    assert (code, last) == (0, "a launch can be expected to work")


def test_a_tool_that_is_not_here(asked, monkeypatch):
    monkeypatch.setattr(local.shutil, "which", lambda tool, path: None if tool in ("uv", "ray") else "/bin/" + tool)
    code, found, last = asked(cmd="uv run python {script} --config {config}", launch="ray")
    assert code == 2 and found["ray"] == ("failure", "is not in the PATH") and "uv" not in found, "plain python would do"
    assert last == "a launch cannot be expected to work: ray"
    own = "run.env.run_command=uv run x"
    assert asked(own, launch="ray")[1]["uv"] == ("failure", "is not in the PATH")
    code, found, last = asked(own, "run.env.startup_commands=[pip install uv ray]", launch="ray")
    assert code == 0 and found["uv"][0] == "warning" and last == "a launch may work, but look at: uv, ray"


def test_more_pods_than_this_machine_can_hold(asked, monkeypatch):
    monkeypatch.setattr(local.os, "sched_getaffinity", lambda pid: {0, 1})
    assert asked("--nodes", "2")[1]["cores"] == ("ok", "2 here, for 2 pods")
    assert asked("--nodes", "8")[1]["cores"][0] == "warning"
    code, found, _ = asked("--nodes", "109")
    assert code == 2 and found["cores"] == ("failure", "2 here, for 109 pods")


def test_wandb_without_a_key(asked, tmp_path):
    yaml = "run: {wandb: {project: p}}\n"
    code, found, _ = asked(yaml=yaml)
    assert code == 2 and found["W&B"] == ("failure", "run.wandb.project is set, and no WANDB_API_KEY is sent")
    assert "W&B" not in asked("run.env.env_vars.WANDB_MODE=offline", yaml=yaml)[1]
    layout.write(tmp_path / "home/.netrc", "machine api.wandb.ai login user password %s\n" % ("k" * 40))
    code, found, _ = asked(yaml=yaml)
    assert code == 0 and found["W&B"] == ("ok", "a key is in %s" % (tmp_path / "home/.netrc"))


def test_a_reference_that_nothing_sets(asked):
    code, found, _ = asked(yaml="logger: ${run.wandb.entity}\n")
    assert code == 2 and found["config"] == ("failure", "it refers to ${run.wandb.entity}, which nothing sets")


def test_a_value_that_a_person_must_give(asked):
    code, found, _ = asked(yaml="a: '???'\n")
    assert code == 2 and "the config wants a value for a" in found["job"][1]
