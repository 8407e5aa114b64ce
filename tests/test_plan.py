"""The test plan that this project began from: each line of CONTRIBUTING's table names a test that is there. What no
other file tests stands below."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests import layout
from tests.cloud import EMULATED, PLATFORMS, Cloud, cloud

PLAN = (layout.REPO / "CONTRIBUTING.md").read_text().split("## The test plan")[1].split("\n## ")[0]
ROWS = re.findall(r"^\| ([^|]+) \| (`tests/[^|]+) \|$", PLAN, re.MULTILINE)


def test_every_line_of_the_plan_names_tests_that_run() -> None:
    names = [name for _, cell in ROWS for name in re.findall(r"`([^`]+)`", cell)]
    assert len(ROWS) >= 10 and all(name.startswith("tests/") for name in names)
    done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-m", "slow or not slow", *names],
                          cwd=layout.REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = re.findall(r"^(tests/\S+?::\w+)", done.stdout, re.MULTILINE)
    assert {name.partition("[")[0] for name in names} <= set(found)
    ci = (layout.REPO / ".ci/run").read_text()
    for words in ("make run", "make test", "proofs one $ONE", "proofs two $TWO",
                  "proofs slurm $SLURM", "proofs others $(printf -- '--ignore=%s ' $ONE $TWO $SLURM)"):
        assert words in ci, words


slow = pytest.mark.slow


@pytest.fixture(params=PLATFORMS)
def here(request: pytest.FixtureRequest, tmp_path: Any, monkeypatch: Any, capsys: Any) -> Iterator[Cloud]:
    yield from cloud(request.param, tmp_path, monkeypatch, capsys)


@pytest.fixture
def lepton(tmp_path: Any, monkeypatch: Any, capsys: Any) -> Iterator[Cloud]:
    yield from cloud("lepton", tmp_path, monkeypatch, capsys)


@slow
@EMULATED
@pytest.mark.parametrize("stage", ["pretrain", "rl", "sft"])
def test_data_prep_on_one_node_of_a_cloud(here: Cloud, stage: str) -> None:
    """super3's; nano3's are those of test_pipelines.py."""
    family = "super3"
    here.profile(gpus_per_node=0)
    done = here.main(family, "data/prep/" + stage, here.kind, "--repo-root", layout.REPO)
    assert (done.code, done.err) == (0, ""), done.out
    manifest = json.loads((here.volume / "airlift" / family / "data" / stage / "manifest.json").read_text())
    assert len(here.job.pods) == 1 and (stage != "rl" or (manifest["train"], manifest["val"]) == (
        "train/train-split.jsonl", "train/val-split.jsonl"))


@slow
@EMULATED
def test_rank_0_unpacks_once_for_all_and_the_others_wait_for_its_marker(lepton: Cloud) -> None:
    """nano3/sft on four nodes of Lepton, from the local source alone: the image has no git, and rank 0 comes late."""
    lepton.profile(gpus_per_node=0, unpack="shared")
    lepton.server.image = type(lepton.server.image)(hide=["git"])
    lepton.server.start_delays[0] = 3.0
    begun = time.time()
    done = lepton.main("nano3", "sft", "lepton", "--repo-root", layout.REPO, "--nodes", "4", "train.steps=3",
                       "--all-ranks")
    assert (done.code, done.err) == (0, ""), done.out
    chunks = int(lepton.env()["AIRLIFT_TREE_CHUNKS"])
    (marker,) = (lepton.volume / "airlift/.airlift").glob("**/told/*.ready-%d" % chunks)
    assert marker.stat().st_mtime > begun + 3.0
    first = {rank: re.search(r"^\[%d\] airlift: rank %d of 4, sha256 (\w+), \d+ files in (\S+)" % (rank, rank), done.out,
                             re.MULTILINE).groups() for rank in (0, 3)}
    assert first[0] == first[3] and first[0][1].startswith("/shared/airlift/.airlift/")
    assert "4 ranks on cpu" in done.out and "git" not in json.dumps(lepton.job.spec["container"])


@slow
@EMULATED
@pytest.mark.parametrize("family", ["nano3"])  # super3's is trained in test_rl.py
def test_rl_on_two_nodes_of_lepton(lepton: Cloud, family: str) -> None:
    """The starter's own rl recipe: a RayCluster is made, a Ray job runs on it, and it goes."""
    lepton.profile(gpus_per_node=0, ray_version="2.60.0")
    assert lepton.main(family, "data/prep/rl", "lepton", "--repo-root", layout.REPO).code == 0
    done = lepton.main(family, "rl", "lepton", "--repo-root", layout.REPO, "--nodes", "2", "train.steps=2")
    assert (done.code, done.err) == (0, ""), done.out
    (cluster,) = lepton.server.clusters.values()
    assert cluster.phase in ("deleting", "deleted") and len(re.findall(r"airlift: node \S+ has sha256", done.out)) == 2
    assert "step " in done.out
