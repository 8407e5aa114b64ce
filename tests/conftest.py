"""Pytest's own settings: the repository on sys.path, how hard hypothesis tries, and no skip in CI."""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# A shell that starts the tests in the background, or nohup, ignores these, and with it whatever the tests start.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

os.environ.pop("PYTEST_ADDOPTS", None)  # it is for this run of pytest, not for those that tests start

SLOW_MACHINE = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("default", deadline=None, max_examples=60, suppress_health_check=SLOW_MACHINE)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


# Tests that wait for a busy machine, and why each may need a second go (.ci/run). No storm, fuzzer or attack is one.
BUSY = {
    "test_a_signal_to_all_its_processes_ends_in_a_checkpoint": "Ray starts, and three steps of a training",
    "test_a_node_that_dies_ends_the_run_and_the_next_goes_on": "Ray notices a dead node after its own time",
    "test_the_reward_rises_on_two_nodes_by_the_launcher_alone": "30 steps within ten minutes",
    "test_a_killed_rank_ends_the_job": "a pod is killed in a moment that it must be caught in",
    "test_a_preempted_job_is_followed_into_its_next_start_and_keeps_its_secrets": "Slurm's own pauses",
    "test_a_long_job_goes_on_in_parts_until_it_ends_by_itself": "time limits of Slurm, in whole minutes",
    "test_cancel_from_another_process": "a process starts while pods do",
}


def pytest_addoption(parser):
    parser.addoption("--again", action="store_true", help="refuse tests that BUSY does not name")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    others = [item.nodeid for item in items if item.originalname not in BUSY]
    if config.getoption("again") and others:
        raise pytest.UsageError("no second go for " + ", ".join(others))


def _no_skip(report):
    """In CI a test that skips itself has failed: whatever it lacks, .ci/run was to install. But for a checkout of
    Nemotron, which is not ours to keep."""
    reason = str(report.longrepr[2]) if report.skipped and isinstance(report.longrepr, tuple) else ""
    if os.environ.get("CI") and reason and "NEMOTRON_ROOT" not in reason:
        report.outcome, report.longrepr = "failed", "skipped in CI: " + reason
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return _no_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _no_skip((yield))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A small checkout of NVIDIA's layout, which the launcher takes for its own."""
    import inside

    return inside.checkout(tmp_path, monkeypatch)


@pytest.fixture
def say(here, capsys):
    """Runs the launcher in this process, in that checkout: (exit code, output, errors)."""
    import inside

    return inside.speaker(capsys)
