"""src/starter/manifest.py: how a recipe's config finds what a data prep wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from starter import manifest
from starter.config import RecipeError, fill_references
from starter.files import sha256


def facts(path: Path, rows: int = 1) -> dict[str, Any]:
    return {"rows": rows, "bytes": path.stat().st_size, "sha256": sha256(path)}


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder with a manifest of a file, a folder of shards and a pair of files."""
    folder = tmp_path / "data"
    names = ["train/a.jsonl", "packed/0.st", "packed/1.st", "tokens-0.bin", "tokens-0.idx"]
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    text = {
        "train": "train/a.jsonl",
        "val": None,
        "mode": "rl",
        "rows": 7,
        "splits": {"a": {"train": "train/a.jsonl", "val": "packed", "prefix": "tokens-0"}},
        "run_hash": "cafe",
        "files": {name: facts(folder / name) for name in names},
    }
    (folder / "manifest.json").write_text(json.dumps(text))
    return folder


def resolve(folder: Path, key: str, default: str | None = None) -> Any:
    end = f",{default}" if default is not None else ""
    return fill_references({"data": {"train": f"${{manifest:{folder},{key}{end}}}"}})["data"]["train"]


def test_entries_are_found_by_dotted_keys_relative_to_the_manifest(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolve(prepared, "train") == str(prepared / "train/a.jsonl")
    assert resolve(prepared, "splits.a.val") == str(prepared / "packed")
    assert resolve(prepared, "splits.a.prefix") == str(prepared / "tokens-0")
    assert resolve(prepared, "train", "sample.jsonl") == str(prepared / "train/a.jsonl")
    assert "data.train: %s/train/a.jsonl (manifest of %s, run cafe)" % (prepared, prepared) in capsys.readouterr().out


def test_what_is_no_path_stays_what_it_is(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(prepared, "mode") == "rl"
    assert resolve(prepared, "rows") == 7
    monkeypatch.setenv("PLACE", str(prepared))
    assert fill_references("x-${manifest:${oc.env:PLACE}, rows}-${manifest:${oc.env:PLACE},mode}") == "x-7-rl"


def test_a_name_with_dots_and_a_folder_from_here(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.loads((prepared / "manifest.json").read_text())
    text["splits"]["a.v1"] = {"train": "packed"}
    text["mode"] = "train"  # a folder's name, too
    (prepared / "manifest.json").write_text(json.dumps(text))
    assert resolve(prepared, "splits.a.v1.train") == str(prepared / "packed")
    assert resolve(prepared, "splits.a.val") == str(prepared / "packed") and resolve(prepared, "mode") == "train"
    monkeypatch.chdir(prepared.parent)
    assert resolve(Path(prepared.name), "train") == str(prepared / "train/a.jsonl")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("trian", r"has no trian.\nIt has: mode, rows, run_hash, splits\.a\.prefix, splits\.a\.train"),
        ("splits.b.train", r"has no splits\.b\.train"),
        ("train.x", r"has no train\.x"),
        ("splits.a", r"splits\.a of .* is a table.\nName one in it: train, val, prefix"),
        ("val", r"val of .* is empty: the data prep had nothing for it\.\n.*data\.train=null"),
    ],
)
def test_a_key_that_is_not_there_lists_what_is(prepared: Path, key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        resolve(prepared, key)
    assert str(caught.value).startswith("data.train: ") and len(str(caught.value).splitlines()) == 2


def test_a_default_counts_only_where_no_data_prep_ever_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = tmp_path / "nowhere"
    assert resolve(nowhere, "train", "../sample.jsonl") == "../sample.jsonl"
    assert f"data.train: there is no {nowhere}, so this run takes ../sample.jsonl" in capsys.readouterr().out
    with pytest.raises(RecipeError, match=r"there is no .*nowhere/manifest\.json \(no such folder\)"):
        resolve(nowhere, "train")
    (nowhere / ".work").mkdir(parents=True)  # of a data prep that was killed
    with pytest.raises(RecipeError, match=r"there is no .*manifest\.json \(\.work\)"):
        resolve(nowhere, "train", "../sample.jsonl")
    for text in ("", "{", "[]", '"x"', "\xff"):
        (nowhere / "manifest.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(RecipeError, match="cannot read"):
            resolve(nowhere, "train", "../sample.jsonl")


def test_a_file_that_is_gone_or_cut_is_named(prepared: Path) -> None:
    (prepared / "packed/1.st").write_text("cut")
    with pytest.raises(RecipeError, match=r"packed/1\.st has 3 bytes, not 11, against its manifest"):
        resolve(prepared, "splits.a.val")
    (prepared / "tokens-0.idx").unlink()
    with pytest.raises(RecipeError, match=r"tokens-0\.idx is not there"):
        resolve(prepared, "splits.a.prefix")


def test_a_changed_byte_is_found_on_request(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (prepared / "packed/1.st").write_text("Packed/1.st")
    path = Path(resolve(prepared, "splits.a.val"))
    with pytest.raises(RecipeError, match=r"packed/1\.st is not what its manifest tells"):
        manifest.check(path)
    manifest.check(prepared / "train/a.jsonl")
    manifest.check(prepared / "tokens-0")
    capsys.readouterr()
    (prepared / "other").write_text("")
    manifest.check(prepared / "other")
    assert "other: no manifest lists it" in capsys.readouterr().out
    assert manifest.digest_of(prepared / "train/a.jsonl") == sha256(prepared / "train/a.jsonl")
    assert manifest.digest_of(prepared / "other") == sha256(prepared / "other")


def test_a_manifest_without_files_serves_too(prepared: Path) -> None:
    """As NVIDIA's data preps write them."""
    (prepared / "manifest.json").write_text(json.dumps({"train": "train/a.jsonl", "val": "/abs/v.jsonl", "mode": "m"}))
    assert resolve(prepared, "train") == str(prepared / "train/a.jsonl")
    assert resolve(prepared, "val") == "/abs/v.jsonl"
    assert resolve(prepared, "mode") == "m"


KEYS = st.text("abc_-1", min_size=1, max_size=4)


@given(st.recursive(st.integers() | st.text("xyz", max_size=3), lambda inner: st.dictionaries(KEYS, inner, max_size=3)))
def test_every_listed_key_leads_to_its_value(tmp_path: Path, table: Any) -> None:
    text = {"top": table, "files": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(text))
    for key in manifest.keys(text):
        value: Any = text
        for part in key.split("."):
            value = value[part]
        assert resolve(tmp_path, key) == value
