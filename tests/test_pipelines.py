"""Data prep and the training that stands on it, by the launcher alone: on both clouds with a shared workspace, and on
two nodes of a real Slurm. No command names a path of data."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import layout, support
from tests.cloud import PLATFORMS, cloud
from tests.emulators import no_pods_because
from tests.slurm import Cluster, why_not
from tests.slurm.person import Person

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
Launch = Callable[..., str]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The starter recipes, with tiny configs of four steps."""
    root = tmp_path / "checkout-of-starter"
    shutil.copytree(layout.REPO / "src/starter", root / "src/starter", ignore=shutil.ignore_patterns("__pycache__"))
    for config in root.glob("src/starter/recipes/*/*/config/tiny.yaml"):
        config.write_text(re.sub(r"(?m)^  steps: \d+$", "  steps: 4", config.read_text()))
    return root


@pytest.fixture(params=[*PLATFORMS, "slurm"])
def platform(
    request: pytest.FixtureRequest, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[tuple[str, Launch, Path]]:
    """A platform's name; what launches on it and gives all that was said; the workspace, as this machine sees it."""
    if request.param == "slurm":
        support.need(not why_not(), why_not() or "")
        with Cluster() as cluster:
            person = Person(cluster, "ssh")
            profile = person.folder / "profiles/here.toml"
            profile.write_text(profile.read_text().replace("nodes = 1\n", ""))  # as many as the recipe says

            def on_slurm(*words: str) -> str:
                done = person.run(*words, "here", "--repo-root", str(checkout))
                assert done.returncode == 0, done.stdout + done.stderr
                return done.stdout

            yield "slurm", on_slurm, person.base
    else:
        support.need(not no_pods_because(), str(no_pods_because()))
        halves = cloud(request.param, tmp_path, monkeypatch, capsys)
        here = next(halves)
        here.profile(gpus_per_node=0)

        def on_a_cloud(*words: str) -> str:
            done = here.main(*words, here.kind, "--repo-root", checkout)
            assert done.code == 0, done.out + done.err
            return done.out

        yield request.param, on_a_cloud, here.volume / "airlift"
        next(halves, None)


def test_what_data_prep_writes_is_what_training_reads(platform: tuple[str, Launch, Path]) -> None:
    """On the clouds only sft: what a pod finds of either is the same there."""
    name, launch, workspace = platform
    root = workspace / "nano3"
    for stage, key in (("sft", "train"), ("pretrain", "blend"))[:2 if name == "slurm" else 1]:
        said = launch("nano3", f"data/prep/{stage},{stage}")
        assert re.search(rf"data\.{key}: \S+ \(manifest of \S+/data/{stage}, run \w+\)", said), said
        assert "2 ranks on cpu" in said and "step 4/4" in said, said
        assert json.loads((root / f"data/{stage}/manifest.json").read_text())["mode"] == stage
        assert json.loads((root / stage / "model/training.json").read_text())["step"] == 4
    if name == "slurm":
        assert "2 nodes" in launch("nano3", "data/prep/sft", "--nodes", "2", "-c", "tiny")
        assert json.loads((root / "data/sft/manifest.json").read_text())["mode"] == "sft"
    for family in ("nano3", "super3"):
        launch(family, "data/prep/rl")
        manifest = json.loads((workspace / family / "data/rl/manifest.json").read_text())
        assert {name: facts["rows"] for name, facts in manifest["files"].items()} == {
            "train/train-split.jsonl": 84, "train/val-split.jsonl": 16}  # fmt: skip
    assert "train: unchanged, 100 rows" in launch("nano3", "data/prep/rl")
