"""common/__init__.py: names of jobs, custom_spec and the size of the API object, on both clouds."""

import re

import pytest
from cloud import EMULATED, PLATFORMS, cloud, noise
from hypothesis import given
from hypothesis import strategies as st

from backends import common

pytestmark = EMULATED


@pytest.fixture(params=PLATFORMS)
def here(request, tmp_path, monkeypatch, capsys):
    yield from cloud(request.param, tmp_path, monkeypatch, capsys)


@given(st.text(max_size=60), st.from_regex(r"[a-z][a-z0-9]{5}", fullmatch=True), st.sampled_from([34, 36]))
def test_names_fit_the_platforms_rules(recipe, run, longest):
    name = common.job_name(recipe, run, longest)
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,%d}[a-z0-9])?" % (longest - 2), name) and name.endswith("-" + run)


def test_custom_spec_passes_through(here):
    custom = {"lepton": {"log": {"save_termination_logs": True}, "envs": [{"name": "ADDED", "value": "x y"}]},
              "dgxcloud": {"nodePools": ["a"], "compute": {"cpuCoreRequest": 4}, "environmentVariables": [
                  {"name": "ADDED", "value": "x y"}]}}[here.kind]
    here.profile(custom_spec=custom)
    here.recipe("import os\nprint('added', os.environ['ADDED'])")
    result = here.launch()
    assert (result.code, "added x y" in result.out) == (0, True), result.err
    spec = here.job.spec
    if here.kind == "lepton":
        assert spec["log"] == {"save_termination_logs": True} and spec["max_failure_retry"] == 0
    else:
        assert spec["compute"] == {"gpuDevicesRequest": 1, "largeShmRequest": True, "cpuCoreRequest": 4}


@pytest.mark.parametrize(("custom", "code", "words"), [
    ({"nonsense": 1}, None, "nonsense"), ({"log": {"nonsense": 1}}, None, "nonsense"),
    ({"container": {"command": ["x"]}, "command": "x"}, 2, "command, which Airlift sets itself"),
])
def test_custom_spec_with_what_the_platform_does_not_know(here, custom, code, words):
    here.profile(custom_spec=custom)
    result = here.launch()
    if "log" in custom and here.kind == "dgxcloud":
        words = '"log"'
    assert result.code == (code or (2 if here.kind == "lepton" else 4)) and words in result.err, result.err
    assert here.jobs == []


def test_a_profile_of_its_own_size_limit(here):
    """What custom_spec adds counts too, and is found before anything is sent."""
    here.profile(custom_spec={"lepton": {"envs": [{"name": "BIG", "value": noise(600_000).hex()}]},
                              "dgxcloud": {"annotations": [{"name": "big", "value": noise(800_000).hex()}]}}[here.kind])
    here.pad(300_000)
    result = here.launch()
    assert result.code == 3 and "nothing was submitted" in result.err and here.posts == []
