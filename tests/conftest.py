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
