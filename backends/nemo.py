"""nemo-run's records of the jobs that go to the clouds: executors of ours that it registers, submits and finds again.

The subclasses mend nemo-run 0.11.1 where it is broken (the numbers are those of the design's facts/nemo_run.md); no
library is patched. What they submit is made by the backend (`create` below), since nemo-run writes every field of an
executor to disk: environment, chunks and secrets are never among them.

Importing this costs two seconds, nemo-run's own: backends import it only where they submit.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nemo_run as run
from nemo_run.config import get_nemorun_home
from nemo_run.core.execution.base import Executor
from nemo_run.core.execution.dgxcloud import DGXCloudExecutor, DGXCloudState
from nemo_run.core.execution.lepton import LeptonExecutor
from nemo_run.run.torchx_backend.schedulers import api

from backends import Run, load_run

CREATE: dict[str, Callable[[], tuple[str, Any]]] = {}  # run -> what creates its job and gives (job id, state)


@dataclass(kw_only=True)
class CarriedLepton(LeptonExecutor):
    """A Lepton job that carries itself: no data mover (12, 17), names of ours (13, 14), logs that end (16)."""

    airlift_run: str = ""

    def package(self, packager: Any, job_name: str) -> None:
        """Nothing to package: the source is in the job's environment."""

    def package_configs(self, *cfgs: tuple[str, str]) -> list[str]:
        return []

    def assign(self, exp_id: str, exp_dir: str, task_id: str, task_dir: str) -> None:
        _assign(self, exp_id, exp_dir, task_id, task_dir)

    def launch(self, name: str, cmd: list[str]) -> tuple[str, Any]:
        return CREATE[self.airlift_run]()

    def status(self, job_id: str) -> Any:
        from backends import lepton

        return lepton.platform_state(load_run(self.airlift_run))

    def cancel(self, job_id: str) -> None:
        from backends import lepton

        lepton.cancel(load_run(self.airlift_run))

    @classmethod
    def logs(cls, app_id: str, fallback_path: str | None) -> None:
        from backends import lepton

        lepton.logs(_run_of(app_id))


@dataclass(kw_only=True)
class CarriedDGXCloud(DGXCloudExecutor):
    """A run:AI workload that carries itself: no launch script (1, 2, 5), a cancel that ends it (3), nothing secret on
    disk or in a log (4), errors at once (6), timeouts (7)."""

    airlift_run: str = ""

    def package(self, packager: Any, job_name: str) -> None:
        """Nothing to package: the source is in the workload's environment."""

    def package_configs(self, *cfgs: tuple[str, str]) -> list[str]:
        return []

    def assign(self, exp_id: str, exp_dir: str, task_id: str, task_dir: str) -> None:
        _assign(self, exp_id, exp_dir, task_id, task_dir)

    def launch(self, name: str, cmd: list[str]) -> tuple[str, Any]:
        return CREATE[self.airlift_run]()

    def status(self, job_id: str) -> Any:
        from backends import dgxcloud

        return DGXCloudState(dgxcloud.platform_state(load_run(self.airlift_run)))

    def cancel(self, job_id: str) -> None:
        from backends import dgxcloud

        dgxcloud.cancel(load_run(self.airlift_run))

    def fetch_logs(self, job_id: str, stream: bool, stderr: bool | None = None, stdout: bool | None = None) -> Any:
        from backends import dgxcloud

        return dgxcloud.log_lines(load_run(self.airlift_run))


def _assign(executor: Any, exp_id: str, exp_dir: str, task_id: str, task_dir: str) -> None:
    """As the library's, without the folder on shared storage, which nothing is copied to."""
    executor.job_name, executor.experiment_id, executor.experiment_dir = task_id, exp_id, exp_dir
    executor.job_dir = os.path.join(exp_dir, task_dir)


def _run_of(app_id: str) -> Run:
    """The run of <experiment>___<task>___<job id>: an experiment's title ends in our run id."""
    return load_run(app_id.split("___")[1].rpartition("-")[2])


for subclass, scheduler in ((CarriedLepton, "lepton"), (CarriedDGXCloud, "dgx_cloud")):
    api.EXECUTOR_MAPPING[subclass] = scheduler  # type: ignore[index]
    for table in ("_PARALLEL_SUPPORTED_EXECUTORS", "_DETACH_SUPPORTED_EXECUTORS"):
        setattr(run.Experiment, table, (*getattr(run.Experiment, table), subclass))


def submit(title: str, executor: Executor, run_id: str, create: Callable[[], tuple[str, Any]]) -> None:
    """Have an Experiment call `create()`, once, and remember the job. Whatever `create` raises comes out.

    One launcher at a time: nemo-run rewrites its lists of jobs without a lock (21).
    """
    logging.getLogger("nemo_run").setLevel(logging.WARNING)
    home = get_nemorun_home()
    os.makedirs(home, exist_ok=True)
    CREATE[run_id] = create
    with open(os.path.join(home, ".airlift.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with run.Experiment(title, executor=executor, log_level="WARNING", clean_mode=True, enable_goodbye_message=False,
                            skip_status_at_exit=True) as experiment:
            experiment.add(run.Script(inline="# Airlift run %s: pod.py starts the recipe" % run_id), name=title)
            experiment.run(detach=True)
    sys.stdout.flush()
