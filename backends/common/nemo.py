"""nemo-run's part in every job: Airlift's subclasses of its executors, and the submission with its experiments.

Each subclass works around defects of nemo-run 0.11.1, which its docstring names; the library is not patched. nemo-run
writes every field of an executor to disk, so environment, chunks and secrets are not fields: the backend hands them
over in Handed. The import takes two seconds, so backends import this only when they submit.
"""

import contextlib
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import nemo_run as run
from docker.types import DeviceRequest
from leptonai.api.v1.types.job import LeptonJobState
from nemo_run.config import get_nemorun_home
from nemo_run.core.execution.base import Executor
from nemo_run.core.execution.dgxcloud import DGXCloudExecutor, DGXCloudState
from nemo_run.core.execution.docker import LABEL_ID, LABEL_NAME, DockerContainer, DockerExecutor, DockerJobRequest
from nemo_run.core.execution.lepton import LeptonExecutor
from nemo_run.core.execution.slurm import SlurmExecutor, SlurmJobDetails
from nemo_run.core.packaging.base import Packager
from nemo_run.core.tunnel.client import Tunnel
from nemo_run.run.torchx_backend.schedulers import api

import backends
import state
from backends.common.ssh import Host, last_lines
from jobs import Job, workspace
from runs import Run, load_run
from transport import Refusal


@dataclass
class Handed:
    """What a launch hands over to nemo-run's objects for one run; each executor uses a part of it."""

    create: Callable[[], tuple[str, Any]] | None = None  # on a cloud: create the job and return (job id, state)
    sbatch: Callable[[str], str] | None = None  # on Slurm: submit this batch script and return the job's id
    environment: dict[str, str] | None = None  # of a container


HANDED: dict[str, Handed] = {}  # by run id


class Carried:
    """Jobs on the clouds. The library copies a package to shared storage; these jobs are in their own environment."""

    airlift_run: str
    STATES: ClassVar[dict[str, Any]]  # Airlift's states -> the library's

    def package(self, packager: Any, job_name: str) -> None:
        """Nothing to package."""

    def package_configs(self, *cfgs: tuple[str, str]) -> list[str]:
        return []

    def assign(self: Any, exp_id: str, exp_dir: str, task_id: str, task_dir: str) -> None:
        """Like the library's, without a folder on shared storage."""
        self.job_name, self.experiment_id, self.experiment_dir = task_id, exp_id, exp_dir
        self.job_dir = os.path.join(exp_dir, task_dir)

    def launch(self, name: str, cmd: list[str]) -> tuple[str, Any]:
        create = HANDED[self.airlift_run].create
        assert create
        return create()

    def status(self, job_id: str) -> Any:
        return self.STATES[backends.status(load_run(self.airlift_run)).state]

    def cancel(self, job_id: str) -> None:
        known = load_run(self.airlift_run)
        backends.backend(known.executor).cancel(known)


@dataclass(kw_only=True)
class CarriedLepton(Carried, LeptonExecutor):
    """A Lepton job. The library's data movers collide if two start in one second, and take the job folder as one
    argument; its job names may end in `-` or repeat, which the API refuses; its logs() waits for ended jobs to run."""

    airlift_run: str = ""
    STATES: ClassVar[dict[str, Any]] = {
        "waiting": LeptonJobState.Starting, "running": LeptonJobState.Running, "done": LeptonJobState.Completed,
        "failed": LeptonJobState.Failed, "cancelled": LeptonJobState.Stopped}

    @classmethod
    def logs(cls, app_id: str, fallback_path: str | None) -> None:
        try:
            ours = _run_of(app_id)
        except Refusal:  # this is called for every job on Lepton, other people's too
            super().logs(app_id, fallback_path)
        else:
            backends.backend(ours.executor).logs(ours)


def lepton_executor(job: Job) -> CarriedLepton:
    """The executor for nemo-run's records of a job on Lepton."""
    return CarriedLepton(
        container_image=str(job.image), nemo_run_dir=workspace(job.settings) or "", nodes=job.nodes,
        resource_shape=job.settings["resource_shape"], node_group=job.settings["node_group"], airlift_run=job.run_id)


@dataclass(kw_only=True)
class CarriedDGXCloud(Carried, DGXCloudExecutor):
    """A run:AI workload. The library's launch script loses the exit code in a pipe into `tee`, and two jobs of one
    experiment run the same script; it writes `export NAME=VALUE` without quotes; its cancel is a GET, for distributed
    workloads only; it logs the environment and writes the client secret to disk and shared storage; it retries a bad
    secret for half a minute and then reports PENDING for ever; its requests have no timeouts."""

    airlift_run: str = ""
    STATES: ClassVar[dict[str, Any]] = {
        "waiting": DGXCloudState.PENDING, "running": DGXCloudState.RUNNING, "done": DGXCloudState.COMPLETED,
        "failed": DGXCloudState.FAILED, "cancelled": DGXCloudState.STOPPED}

    def fetch_logs(self, job_id: str, stream: bool, stderr: bool | None = None, stdout: bool | None = None) -> Any:
        known = load_run(self.airlift_run)
        return cast(Any, backends.backend(known.executor)).log_lines(known)


def dgxcloud_executor(job: Job) -> CarriedDGXCloud:
    """The executor for nemo-run's records of a workload, without credentials."""
    settings = job.settings
    return CarriedDGXCloud(
        base_url=settings["base_url"], kube_apiserver_url=settings.get("kube_apiserver_url", ""), client_id="",
        client_secret="", project_name=settings["project_name"], container_image=str(job.image), pvc_nemo_run_dir="",
        nodes=job.nodes, airlift_run=job.run_id)


def _run_of(app_id: str) -> Run:
    """The run of <experiment>___<task>___<job id>: an experiment's title ends in the run id."""
    return load_run(app_id.split("___")[1].rpartition("-")[2])


@dataclass(kw_only=True)
class LogOfEachRank(SlurmJobDetails):
    """One log for each task and each start of the job, written on its node, instead of one log for all."""

    @property
    def srun_stdout(self) -> Path:
        return Path(str(self.folder)) / ("log-%s_%%j_%%t_${SLURM_RESTART_COUNT:-0}.out" % self.job_name)


@dataclass(kw_only=True)
class CarriedSlurm(SlurmExecutor):
    """A Slurm job without an environment: the library does not quote its exports, and traces them into the log."""

    airlift_run: str = ""

    def package(self, packager: Packager, job_name: str) -> None:
        """Nothing to package: what the job needs goes to the cluster with the batch script."""


class Session:
    """How the records' tunnels run a command: on the machine that has sbatch, by the system's ssh."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def run(self, command: str, hide: bool = True, warn: bool = False, **_: Any) -> SimpleNamespace:
        if command.startswith("sbatch "):
            return SimpleNamespace(command=command, stdout=_sbatch(Path(command.split()[-1])), return_code=0)
        done = self._host.run(command)
        if done.returncode and not warn:
            raise Refusal("%s: cannot run `%s`: %s" % (self._host, command, last_lines(done.stderr)),
                          "fix what it names, then launch again", 4)
        return SimpleNamespace(command=command, stdout=done.stdout.decode("utf-8", "replace"),
                               return_code=done.returncode)

    def clear(self) -> None:
        """The shared connection ends with the launcher."""


def _sbatch(script: Path) -> str:
    """Submit the batch script that nemo-run has written here under the name of that on the cluster; the job's id."""
    title = script.name.removesuffix("_sbatch.sh")
    written = Path(get_nemorun_home(), "experiments", title, title + "_1", script.name)
    sbatch = HANDED[title.rpartition("-")[2]].sbatch
    assert sbatch
    return sbatch(written.read_text(encoding="utf-8"))


@dataclass(kw_only=True)
class LocalTunnel(run.LocalTunnel):
    """nemo-run's, but the job's folder is not that of the records."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.session = Session(Host())


@dataclass(kw_only=True)
class SSHTunnel(Tunnel):
    """nemo-run's list of jobs needs this name. Its own ssh client accepts any host key, asks for passwords and ends the
    process; and for its own class it calls rsync, which opens a connection of its own and leaves out links."""

    port: int | None = None
    identity: str | None = None
    _set_job_dir = run.SSHTunnel._set_job_dir

    def connect(self) -> None:
        """The first command does."""

    def run(self, command: str, hide: bool = True, warn: bool = False, **_: Any) -> Any:
        return Session(Host(self.host, self.user, self.port, self.identity)).run(command, warn=warn)

    def put(self, local_path: str, remote_path: str) -> None:
        raise NotImplementedError

    get = put

    def cleanup(self) -> None:
        """The shared connection ends with the launcher."""


def tunnel(host: Host, folder: str) -> Any:
    if not host.name:
        return LocalTunnel(job_dir=folder)
    return SSHTunnel(host=host.name, user=host.user, port=host.port, identity=host.identity, job_dir=folder)


def submit_slurm(title: str, executor: CarriedSlurm, run_id: str, argv: list[str], sbatch: Callable[[str], str]) -> str:
    """Have an Experiment write the batch script, in which srun starts `argv` in each task, and give it to `sbatch()`,
    which returns Slurm's job id; so does this."""
    HANDED[run_id] = Handed(sbatch=sbatch)
    words = [shlex.quote(word) for word in argv[2:]]  # they go into the script as they are
    return _experiment(title, executor, run.Script(path=argv[1], args=words, entrypoint=argv[0])).split("/")[-1]


@dataclass(kw_only=True)
class CarriedContainer(DockerContainer):
    """A container that carries its source. nemo-run writes its own environment and the executor's to disk, quotes argv
    for a shell, and has the daemon remove the container together with its log."""

    def run(self, client: Any, id: str) -> Any:
        executor, options = self.executor, {}
        if executor.num_gpus:
            options["device_requests"] = [DeviceRequest(count=executor.num_gpus, capabilities=[["gpu"]])]
        options |= {name: getattr(executor, name) for name in ("runtime", "shm_size", "ipc_mode")
                    if getattr(executor, name)}
        return client.containers.run(
            executor.container_image, self.command, detach=True, name=self.name, network=executor.network,
            labels={LABEL_ID: id, LABEL_NAME: self.name}, environment=HANDED[id].environment, volumes=executor.volumes,
            entrypoint=[], **options)


def submit_docker(executor: DockerExecutor, run_id: str, name: str, argv: list[str], env: dict[str, str],
                  client: Any) -> None:
    """Start the container and put it on nemo-run's list."""
    HANDED[run_id] = Handed(environment=env)
    executor.experiment_id, executor.job_name = name, name
    container = CarriedContainer(name=name, command=argv, executor=executor, extra_env={})
    request = DockerJobRequest(id=run_id, executor=executor, containers=[container])
    request.run(client)
    with _records():
        request.save()


for subclass, scheduler in ((CarriedLepton, "lepton"), (CarriedDGXCloud, "dgx_cloud"), (CarriedSlurm, "slurm_tunnel")):
    api.EXECUTOR_MAPPING[subclass] = scheduler
    for table in ("_PARALLEL_SUPPORTED_EXECUTORS", "_DETACH_SUPPORTED_EXECUTORS"):
        setattr(run.Experiment, table, (*getattr(run.Experiment, table), subclass))
api.REVERSE_EXECUTOR_MAPPING["lepton"] = CarriedLepton  # its logs() is called


def submit(title: str, executor: Executor, run_id: str, create: Callable[[], tuple[str, Any]]) -> None:
    """Have an Experiment call `create()`, once, and record the job. What `create` raises is passed on."""
    HANDED[run_id] = Handed(create)
    _experiment(title, executor, run.Script(inline="# Airlift run %s: pod.py starts the recipe" % run_id))


@contextlib.contextmanager
def _records() -> Iterator[None]:
    """nemo-run's own folder, in which nobody else may write: it would make any Python object of what lies there."""
    home = Path(get_nemorun_home())
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in filter(Path.exists, (home, *home.iterdir())):
        state.require_own(path, path.stat(), lambda mode: True)
    with state.guarded():
        yield


def _experiment(title: str, executor: Executor, script: run.Script) -> str:
    """Run an Experiment of one job without waiting for it; returns nemo-run's handle of the job. Launchers take turns,
    since nemo-run rewrites its lists of jobs without a lock."""
    logging.getLogger("nemo_run").setLevel(logging.WARNING)
    home = get_nemorun_home()
    with _records(), state.lock(Path(home, ".airlift.lock")):
        folder = Path(home, "experiments", title)  # used by this run only
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)  # never one that somebody has prepared
        with run.Experiment(title, executor=executor, id=title + "_1", log_level="WARNING", clean_mode=True,
                            enable_goodbye_message=False, skip_status_at_exit=True) as experiment:
            experiment.add(script, name=title)
            try:
                experiment.run(detach=True)
            except Exception:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            handle = str(experiment.jobs[0].handle)
    sys.stdout.flush()
    return handle
