"""commands.py: list, profiles, files and status. `check` is in test_checks.py; logs, cancel and diff stand with the
executors."""

import json

from inside import CONFIGS, FAMILY
from layout import REPO, write


def test_list(say, here):
    code, out, err = say("list")
    assert (code, err) == (0, "")
    assert [line for line in out.splitlines() if not line.startswith(" ")] == ["nano3", "steps", "super3"]
    assert ("  sft                          torchrun     1 x 8    src/nemotron/recipes/nano3/stage1_sft/train.py"
            "  [nvcr.io/nemo:25.11]") in out
    assert "super3" not in say("list", "nano3")[1]
    rows = json.loads(say("list", "super3", "--json")[1])
    assert rows == [{"name": "super3/rl/stage1_rlvr", "launch": "ray", "nodes": 109, "gpus_per_node": 8, "image": None,
                     "script": "src/nemotron/recipes/super3/stage2_rl/stage1_rlvr/train.py"}]
    assert json.loads(say("list", "--json", "--repo-root", here)[1])[0]["name"] == "nano3/data/prep/rl"


def test_profiles(say):
    code, out, _ = say("profiles")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == sorted(
        path.stem for path in (REPO / "profiles").glob("*.toml"))
    rows = json.loads(say("profiles", "--json")[1])
    assert {row["name"]: row["executor"] for row in rows}["lepton_gcp"] == "lepton"
    assert set(rows[0]) == {"name", "executor", "about"}


def test_files(say, here):
    write(here / "src/nemotron/kit/key.pem", "x")
    write(here / "src/nemotron/kit/run.sh", "echo\n")
    code, out, _ = say("files", *FAMILY, "lepton")
    assert code == 0
    rows = dict(reversed(line.split(None, 1)) for line in out.splitlines())
    for path in ("src/nemotron/kit/io.py", "src/nemo_runspec/__init__.py", CONFIGS + "/default.yaml",
                 "src/nemotron/recipes/_shared/util.py", "src/nemotron/recipes/nano3/stage2_rl/train.py"):
        assert int(rows[path]) == (here / path).stat().st_size
    assert not any("super3" in path for path, size in rows.items() if size != "-"), "another family stays here"
    assert rows["src/nemotron/kit/key.pem (credential)"] == "-"
    assert rows["src/nemotron/recipes/nano3/README.md (documentation)"] == "-"
    told = json.loads(say("files", *FAMILY, "--json")[1])
    assert {"path": "src/nemotron/kit/run.sh", "bytes": 5} in told["files"]
    assert {"path": "src/nemotron/kit/key.pem", "reason": "credential"} in told["left_out"]
    assert not any(path.startswith("src/nemotron/steps/env") for path in rows)  # another family
    assert "src/nemotron/steps/eval/step.py" in say("files", "steps", "eval")[1]


def test_status_of_nothing(say, here):
    assert say("status") == (0, "there are no runs yet\n", "")
    assert say("status", "--json") == (0, "[]\n", "")
