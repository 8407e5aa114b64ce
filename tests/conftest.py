"""In CI a test that skips itself has failed: whatever it lacks, .ci/run was to install."""

import os

import pytest

ALLOWED = "CI has none"  # a reason that ends so: Nemotron is not ours to keep


def _no_skip(report):
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ALLOWED
    if os.environ.get("CI") and not reason.endswith(ALLOWED):
        report.outcome, report.longrepr = "failed", "skipped in CI: " + reason
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return _no_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _no_skip((yield))
