"""common/nemo.py: nemo-run's defects that touch the two clouds, each as what the library's own method does on the
emulated platform, and what ours does there. And nemo-run's records, read by a fresh process.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
import types

import layout
import pytest
from cloud import EMULATED, PLATFORMS, cloud, noise, seen_in, wait_for

import runs

pytestmark = EMULATED


@pytest.fixture(params=PLATFORMS)
def here(request, tmp_path, monkeypatch, capsys):
    yield from cloud(request.param, tmp_path, monkeypatch, capsys)


@pytest.fixture
def lepton(tmp_path, monkeypatch, capsys):
    yield from cloud("lepton", tmp_path, monkeypatch, capsys)


@pytest.fixture
def runai(tmp_path, monkeypatch, capsys):
    yield from cloud("dgxcloud", tmp_path, monkeypatch, capsys)


@pytest.fixture
def naps(monkeypatch):
    """The library's sleeps, a hundred times shorter; what it asked for is listed."""
    from nemo_run.core.execution import dgxcloud, lepton

    asked = []

    def sleep(seconds):
        asked.append(seconds)
        time.sleep(seconds / 100)

    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # the library's `ctx.run` reads it
    for module in (dgxcloud, lepton):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(sleep=sleep, time=time.time))
    return asked


def dgx_executor(here, **changes):
    import nemo_run as run

    server = here.server
    return run.DGXCloudExecutor(**{
        "base_url": server.url, "kube_apiserver_url": server.kube_apiserver_url, "client_id": server.client_id,
        "client_secret": server.client_secret, "project_name": "team-a", "container_image": "python",
        "pvc_nemo_run_dir": "/shared/nemo", "packager": run.Packager(),
        "pvcs": [{"claimName": "workspace", "path": "/shared", "existingPvc": True}]} | changes)


def lepton_executor(**changes):
    import nemo_run as run

    return run.LeptonExecutor(**{
        "container_image": "python", "nemo_run_dir": "/shared/nemo", "resource_shape": "gpu.8xh100",
        "node_group": "default-group", "packager": run.Packager(),
        "mounts": [{"path": "/", "mount_path": "/shared", "from": "node-nfs:shared"}]} | changes)


def experiment(executor, title, **tasks):
    """The library's own path: one Experiment with one inline script for each task."""
    import nemo_run as run

    with run.Experiment(title, executor=executor, skip_status_at_exit=True, clean_mode=True,
                        enable_goodbye_message=False) as made:
        for name, script in tasks.items():
            made.add(script if isinstance(script, run.Script) else run.Script(inline=script), name=name)
        made.run(detach=True)
    return made


def trained(here):
    """The workloads of a DGX Cloud experiment without its data movers, when they have ended, by name."""
    jobs = {job.request["name"]: job for job in here.jobs if job.kind == "trainings"}
    for job in jobs.values():
        job.wait("Completed", "Failed")
    return jobs


# ---------------------------------------------------------------- DGX Cloud


def test_exit_codes_scripts_and_secrets(runai, naps):
    """The library pipes into tee without pipefail, so that a job that exits 3 succeeds; two jobs of one experiment run
    the script that was written last; secrets lie on the volume, and `set -evx` puts them into the log."""
    experiment(dgx_executor(runai, env_vars={"TOKEN": "secret-4711"}), "pair", one="echo it is one; exit 3",
               two="echo it is two; exit 3")
    jobs = trained(runai)
    assert {job.state for job in jobs.values()} == {"Completed"}
    texts = [job.pods[0].output for job in jobs.values()]
    assert all("scripts/two.sh\n" in text and "it is one\n" not in text for text in texts)
    assert "secret-4711" in texts[0] and seen_in([runai.volume], ["secret-4711"])
    assert seen_in([runai.volume], [runai.server.client_secret])

    runai.profile("[secrets]\nTOKEN = 'env'\n")
    runai.monkeypatch.setenv("TOKEN", "secret-0815")
    for word in ("four", "five"):
        runai.recipe("import os, sys\nassert os.environ['TOKEN']\nprint('it is %s')\nsys.exit(3)" % word)
        result = runai.launch()
        assert result.code == 1 and "exit code 3" in result.err and "it is %s\n" % word in result.out
    assert "secret-0815" not in result.out and seen_in([runai.volume], ["secret-0815"]) == []


def test_values_and_names(runai, naps):
    """The library writes `export LOWER=a b; c`, in capitals and unquoted, and its script ends there, as a success."""
    experiment(dgx_executor(runai, env_vars={"lower": "a b; c"}), "alone", task="echo here; exit 0")
    job = trained(runai)["task"]
    assert "export LOWER=a b; c\n" in job.pods[0].output and "here\n" not in job.pods[0].output
    assert job.state == "Completed"
    runai.profile("[env_vars]\nlower = 'a b; c'\n")
    runai.recipe("import os\nprint(os.environ['lower'], os.environ.get('LOWER'))")
    assert "a b; c None\n" in runai.launch().out


@pytest.mark.parametrize("nodes", [1, 2])
def test_cancel(runai, nodes):
    """The library cancels with a GET, always of a distributed workload: the API wants a POST, and the job goes on."""
    executor = dgx_executor(runai, nodes=nodes)
    run = runai.up("--nodes", nodes)
    executor.cancel(runai.job.id)
    assert runai.server.requests[-1].status == 405 and runai.job.state == "Running"
    assert runai.main("cancel", run).out.endswith("was cancelled\n") and runai.job.state == "Stopped"


def test_a_bad_secret(runai, naps):
    """The library asks again with pauses, gives no reason, and then takes the job for one that waits."""
    executor = dgx_executor(runai, client_secret="wrong")
    assert executor.get_auth_token() is None and naps == [10, 10, 10]  # half a minute, and no reason
    assert executor.status("any") is None  # which reads as pending, for ever
    run = runai.up()
    runai.monkeypatch.setenv("RUNAI_CLIENT_SECRET", "not-it-4711")
    begin = time.monotonic()
    for words in (["nano3", "sft", "dgxcloud", "--repo-root", runai.root], ["status", run]):
        result = runai.main(*words)
        assert result.code == 4 and "wrong secret" in result.err
    assert time.monotonic() - begin < 5


def test_timeouts(runai):
    """The library's requests have none. Spied on below both: what each asks of requests' transport."""
    from requests.adapters import HTTPAdapter

    asked, real = [], HTTPAdapter.send

    def spy(adapter, request, stream=False, timeout=None, *rest, **more):
        asked.append(timeout)
        return real(adapter, request, stream, timeout, *rest, **more)

    runai.monkeypatch.setattr(HTTPAdapter, "send", spy)
    token = dgx_executor(runai).get_auth_token()
    dgx_executor(runai).get_project_and_cluster_id(token)
    assert asked == [None, None]
    asked.clear()
    assert runai.launch().code == 0
    assert len(asked) >= 4 and set(asked) <= {(5.0, 30.0), (5.0, 300.0)}


def test_data_that_does_not_fit_one_string(here, naps, tmp_path):
    """The library: one helper job for each 9.5 kB on DGX Cloud; on Lepton one argument that no kernel takes. No network
    is needed, but an image `busybox:1.37.0`."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "big").write_bytes(noise(150_000))
    if here.kind == "dgxcloud":
        (data / "big").write_bytes(noise(30_000))
        executor = dgx_executor(here)
        executor.job_dir, executor.pvc_job_dir = str(data), "/shared/data"
        token = executor.get_auth_token()
        executor.move_data(token, *executor.get_project_and_cluster_id(token))
        assert len(here.posts) == 6 and len(naps) >= 6  # five pieces and one to put them together, 10 s each and more
    else:
        executor = lepton_executor()
        executor.job_dir, executor.lepton_job_dir = str(data), "/shared/data"
        with pytest.raises(RuntimeError, match="failed with status"):
            executor.move_data()
        assert here.job.pods[0].reason == "StartError" and "argument list too long" in here.job.pods[0].message
    before = len(here.posts)
    here.pad(150_000)
    result = here.launch()
    assert (result.code, len(here.posts)) == (0, before + 1) and "hello from 0" in result.out


# ---------------------------------------------------------------- Lepton


def test_a_scripts_environment(lepton, naps):
    """The library drops that of a Script: only the executor's is sent."""
    import nemo_run as run

    lepton.server.image = type(lepton.server.image)(hide=["wget"])
    experiment(lepton_executor(), "dropped", show=run.Script(inline="echo see=$MINE.", env={"MINE": "x"}))
    lepton.job.wait("Completed", "Failed")
    assert "see=.\n" in lepton.job.pods[0].output
    lepton.profile("[env_vars]\nMINE = 'x'\n")
    lepton.recipe("import os\nprint('see=' + os.environ['MINE'])")
    assert "see=x\n" in lepton.launch().out


def test_names_that_are_taken(lepton, naps, tmp_path):
    """The library names its data mover by the second, and the job by its task."""
    from leptonai.api.v1.api_resource import ClientError
    from nemo_run.core.execution import lepton as library

    now = library.datetime.now()
    lepton.monkeypatch.setattr(library, "datetime", types.SimpleNamespace(now=lambda: now))
    lepton.server.queue_seconds = 0.2  # the first is still there when the second comes
    executor, errors = lepton_executor(), []
    executor.job_dir, executor.lepton_job_dir = str(tmp_path / "home"), "/shared/data"
    (tmp_path / "home").mkdir()

    def move():
        try:
            executor.move_data()
        except ClientError as error:
            errors.append(error.response.status_code)

    movers = [threading.Thread(target=move) for _ in range(2)]
    for mover in movers:
        mover.start()
    for mover in movers:
        mover.join(20)
    assert errors == [409]  # two data movers in one second
    executor.create_lepton_job("task")
    with pytest.raises(ClientError, match="409"):  # a rerun
        executor.create_lepton_job("task")
    lepton.monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)
    assert [lepton.launch("--detach").code for _ in range(2)] == [0, 0]


def test_a_name_that_ends_in_a_dash(lepton, tmp_path):
    """The library cuts a name to 34 characters, wherever that is."""
    from leptonai.api.v1.api_resource import ClientError

    name = "a" * 33 + "-" + "b" * 5
    executor = lepton_executor()
    executor.job_dir, executor.move_data = str(tmp_path), lambda: None
    with pytest.raises(ClientError, match=r'invalid job name .{2}a*-'):
        executor.launch(name, ["true"])
    stage = "b" * 21 + "-" + "c" * 9  # cut at 36, with our run id behind it, this one ends in a dash, too
    lepton.recipe("print('hello')", "nano3/" + stage)
    assert lepton.launch("--detach", stage=stage).code == 0 and "-" + "b" * 21 + "-" in lepton.job.name


def test_a_mount_without_from(lepton, tmp_path):
    """The library checks mounts for less than the API wants, and meets it when the submission has begun."""
    executor = lepton_executor(mounts=[{"path": "/", "mount_path": "/shared"}])
    executor.job_dir, executor.lepton_job_dir = str(tmp_path / "home"), "/shared/data"
    (tmp_path / "home").mkdir()
    executor._validate_mounts()  # finds nothing
    with pytest.raises(ValueError, match="from"):
        executor.launch("job", ["true"])
    assert lepton.server.requests  # by then it had begun
    before = len(lepton.server.requests)
    lepton.profile(mounts=[{"path": "/", "mount_path": "/shared"}])
    assert lepton.launch().code == 2 and len(lepton.server.requests) == before


def test_logs_of_a_job_that_has_ended(lepton, naps):
    """The library waits for Running, for ever."""
    from nemo_run.core.execution import lepton as library

    result = lepton.launch()

    class Enough(Exception):
        """Waited long enough."""

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) > 30:
            raise Enough

    lepton.monkeypatch.setattr(library.time, "sleep", sleep)
    with pytest.raises(Enough):
        library.LeptonExecutor.logs("x___y___" + lepton.job.name, None)
    assert lepton.job.state == "Completed"
    begin = time.monotonic()
    assert "hello from 0\n" in lepton.main("logs", result.run).out and time.monotonic() - begin < 2


# ---------------------------------------------------------------- both


def test_lists_of_jobs_without_a_lock(here):
    """The library's list of jobs: four writers, each of which has read before any has written, and one job is left. That
    all four of ours stay, from four processes, is shown in test_clouds.py."""
    module = importlib.import_module("nemo_run.run.torchx_backend.schedulers." + here.kind)
    executor = lepton_executor() if here.kind == "lepton" else dgx_executor(here)
    name = "LEPTON_JOB_DIRS" if here.kind == "lepton" else "DGX_JOB_DIRS"
    here.monkeypatch.setattr(module, name, str(here.place / "jobs.json"))
    executor.env_vars["TOKEN"] = "secret-4711"
    barrier, load = threading.Barrier(4), json.load

    def together(file):
        try:
            return load(file)
        finally:
            barrier.wait(10)

    here.monkeypatch.setattr(module, "json", types.SimpleNamespace(load=together, dump=json.dump))
    writers = [threading.Thread(target=module._save_job_dir, args=("app%d" % number, "Running", executor))
               for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    left = json.loads((here.place / "jobs.json").read_text())
    assert len(left) == 1
    assert seen_in([here.place], ["secret-4711"])  # values of the environment, too


def test_a_status_that_cannot_be_read(here):
    """The library shows it as SUBMITTED."""
    import nemo_run as run

    begun = here.up()
    title = here.job.name
    secret = "LEPTON_WORKSPACE_TOKEN" if here.kind == "lepton" else "RUNAI_CLIENT_SECRET"
    here.monkeypatch.setenv(secret, "wrong")
    said = run.Experiment.from_title(title).status(return_dict=True)
    assert said[title]["status"].name == "SUBMITTED"
    result = here.main("status", begun)
    assert result.code == 4 and "HTTP 401" in result.err


# ---------------------------------------------------------------- nemo-run's records

READ = """
import json, pathlib, sys
import nemo_run as run
import profiles
profiles.FOLDER = pathlib.Path(sys.argv[1])
seen = []
for title, action in zip(sys.argv[2::2], sys.argv[3::2]):
    for found in (run.Experiment.from_title(title), run.Experiment.from_id(run.Experiment.catalog(title)[0])):
        job = found.status(return_dict=True)[title]
        seen.append((job["status"].name, job["handle"]))
    getattr(found, action)(title)
print("SEEN", json.dumps(seen))
"""


def test_a_fresh_process_knows_the_jobs(here):
    """By title and by id: state, handle and log; and it can end them."""
    assert here.launch().code == 0
    ended = here.job
    run = here.up()
    jobs = [ended, here.job]
    done = subprocess.run([sys.executable, "-c", READ, here.folder, ended.name, "logs", here.job.name, "cancel"],
                          cwd=layout.REPO, capture_output=True, text=True, timeout=60)
    assert "SEEN " in done.stdout, done.stderr
    seen = json.loads(done.stdout.rpartition("SEEN ")[2])
    assert [state for state, _ in seen] == ["SUCCEEDED", "SUCCEEDED", "RUNNING", "RUNNING"]
    for number, (_, handle) in enumerate(seen):
        assert (jobs[number // 2].name if here.kind == "lepton" else jobs[number // 2].id) in handle
    assert "hello from 0" in done.stdout + done.stderr
    wait_for(lambda: here.job.state == "Stopped")
    assert "cancelled" in here.main("status", run).out


def test_states_for_nemo_run(here):
    """nemo-run leaves Queueing and others unknown, and calls Unknown a failure."""
    import nemo_run as run

    here.server.queue_seconds = 60
    assert here.launch("--detach").code == 0
    status = run.Experiment.from_title(here.job.name).status(return_dict=True)[here.job.name]["status"]
    assert status.name == "PENDING"


LAUNCH = """
import pathlib, sys
import launch, profiles
profiles.FOLDER = pathlib.Path(sys.argv[1])
sys.exit(launch.main([*sys.argv[2:], "--detach"]))
"""


@pytest.mark.parametrize("seconds", [0, 1.0])
def test_a_launcher_that_is_killed_behind_the_request_loses_and_doubles_nothing(here, seconds):
    """The job comes first, nemo-run's import and its list after it."""
    words = [here.folder, "nano3", "sft", here.kind, "--repo-root", here.root]
    with subprocess.Popen([sys.executable, "-c", LAUNCH, *map(str, words)], cwd=layout.REPO, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        wait_for(lambda: here.posts, seconds=30)
        time.sleep(seconds)
        process.kill()
    (run,) = runs.all_runs()[0]
    wait_for(lambda: here.jobs and here.job.state == "Completed")
    assert len(here.jobs) == 1 and " done " in here.main("status", run.id).out


def test_a_job_that_nemo_runs_list_cannot_take_goes_on(here):
    from backends.common import nemo

    def full(*args):
        raise OSError(28, "No space left on device")

    here.monkeypatch.setattr(nemo, "_experiment", full)
    done = here.launch()
    assert done.code == 0 and "note: the job is accepted, but not on nemo-run's list: " in done.out


def test_a_refused_job_leaves_no_record(here):
    import nemo_run as run

    here.server.fault("status", status=400, method="POST", path="/(jobs|trainings)$")
    here.monkeypatch.setattr(runs, "new_run_id", lambda: "refuse")
    assert here.launch().code == 4
    assert run.Experiment.catalog("nano3-sft-refuse") == [] and runs.all_runs() == ([], [])
