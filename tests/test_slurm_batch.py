"""common/slurm_batch.py: the options of sbatch and srun, and the lines of the batch script, run here by a real bash."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import profiles
from backends.common import slurm_batch
from transport import Refusal


def settings(**more: Any) -> dict[str, Any]:
    return profiles.defaults("slurm") | more


@given(st.dictionaries(st.from_regex("[a-z][a-z-]{1,8}", fullmatch=True), st.text(max_size=9) | st.booleans() | st.none()))
def test_an_option_reaches_a_shell_as_it_was_written(values: dict[str, Any]) -> None:
    words = slurm_batch.as_options(values)
    assert shlex.split(shlex.join(words)) == words
    given_ones = {name: value for name, value in values.items() if value is not None and value is not False}
    assert words == ["--" + name if value is True else "--%s=%s" % (name, value) for name, value in given_ones.items()]


@pytest.mark.parametrize("table, name, value, said, fix", [
    ("sbatch", "partition", "x", "sbatch.partition is set by Airlift", "the key partition"),
    ("sbatch", "gpus_per_node", 4, "is set by Airlift", "the key gpus_per_node"),
    ("sbatch", "job-name", "x", "is set by Airlift", "itself"), ("sbatch", "export", "NONE", "is set by Airlift", "env_vars"),
    ("sbatch", "signal", "USR1@60", "is set by Airlift", "grace"), ("srun", "container-mounts", "x", "is set", "mounts"),
    ("sbatch", "dependency", "afterok:1", "is set by Airlift", "stages"), ("sbatch", "--qos", "x", "is no option", "without dashes"),
    ("sbatch", "q", "x", "is no option", "long name"), ("sbatch", "qos", "a\n#SBATCH --hold", "is no option", ""),
    ("sbatch", "qos", {"a": 1}, "is no option", ""), ("sbatch", "qos", [], "is no option", "")])
def test_options_that_are_ours_are_refused_with_the_key_to_use(table: str, name: str, value: Any, said: str, fix: str) -> None:
    with pytest.raises(Refusal) as caught:
        slurm_batch.require_options(settings(**{table: {name: value}}))
    assert said in caught.value.what and fix in caught.value.fix and caught.value.code == 2


def test_what_sites_insist_on_is_passed_on() -> None:
    more = {"qos": "high", "reservation": "r", "gres": "gpu:8", "mail_type": ["END", "FAIL"], "segment": 4, "hold": False}
    slurm_batch.require_options(settings(sbatch=more))
    found = slurm_batch.flags(settings(sbatch=more, mem="4G"), 8)
    assert (found["qos"], found["mail-type"], found["segment"], found["mem"]) == ("high", "END,FAIL", 4, "4G")
    assert found["gpus-per-node"] is None and found["account"] is None  # gres asks for the GPUs
    assert slurm_batch.flags(settings(), 8)["gpus-per-node"] == 8
    assert slurm_batch.flags(settings(continuations=1, grace=90), 0)["signal"] == "B:USR1@90"


def test_srun_takes_the_same_spellings() -> None:
    assert slurm_batch.as_options({"cpu_bind": ["verbose", "cores"], "label": True, "mpi": None}) == [
        "--cpu-bind=verbose,cores", "--label"]


# ---------------------------------------------------------------- the script, with a Slurm of shell functions


def script(tmp_path: Path, body: str, **more: Any) -> subprocess.Popen[str]:
    lines = slurm_batch.setup_lines(settings(**more), str(tmp_path), True)
    for name in ("scontrol", "scancel", "srun"):
        (tmp_path / name).write_text('#!/bin/sh\necho "%s $*" >>%s/asked\n%s' % (
            name, tmp_path, "echo ' Restarts=0'\n" if name == "scontrol" else body if name == "srun" else ""))
        (tmp_path / name).chmod(0o755)
    env = {"PATH": "%s:/usr/bin:/bin" % tmp_path, "SLURM_JOB_ID": "7", "HOME": str(tmp_path)}
    return subprocess.Popen(["bash", "-c", lines + "\nsrun a b\nexit $?\n"], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def asked(tmp_path: Path) -> str:
    return (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""


@pytest.mark.parametrize("retries, last", [(0, True), (1, False)])
def test_the_last_start_is_not_requeued_and_the_secrets_go(tmp_path: Path, retries: int, last: bool) -> None:
    (tmp_path / "secrets.json").write_text("{}")
    with script(tmp_path, "exit 3\n", retries=retries) as done:
        assert done.wait(10) == 3
    assert ("scontrol update JobId=7 Requeue=0" in asked(tmp_path)) == last
    assert not (tmp_path / "secrets.json").exists()


@pytest.mark.parametrize("before, again", [("", True), ("1", True), ("2", False)])
def test_at_the_time_limit_the_recipe_is_told_and_the_job_queued_again(tmp_path: Path, before: str, again: bool) -> None:
    (tmp_path / "secrets.json").write_text("{}")
    if before:
        (tmp_path / "parts").write_text(before + "\n")
    with script(tmp_path, "touch %s/runs\nwhile [ ! -f %s/saved ]; do sleep 0.05; done\nexit 4\n" % (tmp_path, tmp_path),
                continuations=2) as job:
        until = time.monotonic() + 10
        while not (tmp_path / "runs").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(job.pid, signal.SIGUSR1)
        while "scancel --signal=URG 7" not in asked(tmp_path):
            assert time.monotonic() < until and job.poll() is None
            time.sleep(0.02)
        (tmp_path / "saved").touch()
        assert job.stdout and job.wait(10) == 4
    assert ("scontrol requeue 7" in asked(tmp_path)) == again and (tmp_path / "secrets.json").exists() == again
    assert not before or (tmp_path / "parts").read_text() == ("2\n" if again else before + "\n")
    assert re.search("srun a b", asked(tmp_path))


def test_a_recipe_that_ends_by_itself_ends_the_chain(tmp_path: Path) -> None:
    with script(tmp_path, "exit 0\n", continuations=2) as done:
        assert done.wait(10) == 0
    assert "requeue 7" not in asked(tmp_path) and not (tmp_path / "parts").exists()
