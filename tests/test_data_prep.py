"""src/starter: data/prep/rl as a person runs it, and the parts that all data preps stand on. No torch in here."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

SRC = Path(__file__).resolve().parents[1] / "src"
sys.path.insert(0, str(SRC))

from starter import pool, prep, progress, rl_prep, shards, tables  # noqa: E402
from starter.config import RecipeError, parse_args  # noqa: E402
from starter.files import only_run, sha256  # noqa: E402
from starter.shards import Dataset, Range, Shard  # noqa: E402

RECIPE = SRC / "starter/recipes/super3/data_prep_rl"
TINY = RECIPE / "config/tiny.yaml"
OWN = "required=[]"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NEMO_RUN_DIR", "RAY_ADDRESS", "RANK"):
        monkeypatch.delenv(name, raising=False)


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def blend(folder: Path, **splits: list[Any]) -> Path:
    """A blend of one shard for each split."""
    items = []
    for split, rows in splits.items():
        write(folder / f"{split}.jsonl", rows)
        items.append({"name": split, "path": f"{split}.jsonl", "split": split})
    path = folder / "blend.json"
    path.write_text(json.dumps({"datasets": items}))
    return path


def prepare(output: Path, *overrides: str, config: Path = TINY) -> dict[str, Any]:
    cfg = parse_args(rl_prep.RLPrepConfig, ["--config", str(config), f"output={output}", *overrides])
    return json.loads(prep.run(cfg, RECIPE, rl_prep.RLPrep(cfg, RECIPE)).read_bytes())


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def shape(folder: Path) -> dict[str, bytes]:
    """All that a data prep leaves, but for its lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def numbered(count: int) -> list[Any]:
    return [{"id": i, "text": f"row {i} é"} for i in range(count)]


# What comes out


@pytest.mark.parametrize("family", ["nano3", "super3"])
def test_the_tiny_config_as_the_launcher_starts_it(family: str, tmp_path: Path) -> None:
    recipe = SRC / f"starter/recipes/{family}/data_prep_rl"
    config = tmp_path / "c.yaml"
    config.write_text((recipe / "config/tiny.yaml").read_text().replace("/nemo_run", str(tmp_path / "run")))
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SRC)}
    command = [sys.executable, str(recipe / "prep.py"), "--config", str(config)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    output = tmp_path / "run/data/rl"
    manifest = json.loads((output / "manifest.json").read_bytes())
    assert list(manifest) == ["train", "val", "test", "mode", "source_splits", "run_hash", "splits", "files"]
    assert manifest["splits"] == {"train": {"train": "train/train-split.jsonl", "val": "train/val-split.jsonl"}}
    train, val = read(output / manifest["train"]), read(output / manifest["val"])
    assert (len(train), len(val)) == (84, 16)
    for name, facts in manifest["files"].items():
        path = output / name
        assert facts == {"rows": len(read(path)), "bytes": path.stat().st_size, "sha256": sha256(path)}
    for row in train + val:
        assert "_hf_placeholder" not in row
        prompt = row["responses_create_params"]["input"][0]["content"]
        a, b = map(int, re.findall(r"\d+", prompt))
        assert int(row["expected_answer"]) == a + b
    assert "\r" not in done.stdout and len(done.stdout.splitlines()) < 8, "a log file gets no moving line"
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert "train: unchanged, 100 rows" in again.stdout


@pytest.mark.parametrize("family", ["nano3", "super3"])
def test_the_full_config_knows_the_sources_of_its_family(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"nano3": "nano_v3_sft_profiled_dapo17k", "super3": "super_v3_lcsft_step1000_dapo17k"}
    place = {"row": 2, "question_template": {"prefix": "P: ", "suffix": "\nA:\n\n"}}
    monkeypatch.setenv("RL_BLEND", str(blend(tmp_path, rlvr=[{"dataset": names[family], "_hf_placeholder": place}])))
    monkeypatch.setenv("DAPO_TABLE", str(SRC / "starter/samples/dapo.jsonl"))
    monkeypatch.setenv("SKYWORK_TABLE", str(SRC / "starter/samples/skywork.jsonl"))
    manifest = prepare(tmp_path / "out", config=SRC / f"starter/recipes/{family}/data_prep_rl/config/full.yaml")
    (row,) = read(tmp_path / "out" / manifest["train"])
    assert row["question"] == "P: What is 4 plus 3?\nA:" and row["expected_answer"] == 7


def test_rows_are_copied_byte_for_byte(tmp_path: Path) -> None:
    odd = [
        b'{"b": 1.0000000000000000001, "a": 1e999,  "u": "\\u00e9\xc3\xa9", "n": NaN, "half": "\\ud800"}\n',
        b'\t{"deep": [[[{}]]], "a": 1, "a": 2 }\r\n',
        b'{"last": "without an end"}',
    ]
    path = blend(tmp_path, train=[odd[0], b"\n", b"  \n", *odd[1:]])
    prepare(tmp_path / "out", f"blend={path}", "holdout=0", OWN)
    assert (tmp_path / "out/train/train-split.jsonl").read_bytes() == b"".join(odd) + b"\n"
    assert (tmp_path / "out/train/val-split.jsonl").read_bytes() == b""


def test_splits_of_the_source_for_validation_and_test_are_passed_through(tmp_path: Path) -> None:
    path = blend(tmp_path, rlvr=numbered(40), swe=numbered(7), validation=numbered(30), test=numbered(20))
    manifest = prepare(tmp_path / "out", f"blend={path}", "holdout=10", OWN)
    assert manifest["source_splits"] == ["rlvr", "swe", "validation", "test"]
    assert manifest["splits"] == {
        "rlvr": {"train": "rlvr/train-split.jsonl", "val": "rlvr/val-split.jsonl"},
        "swe": {"train": "swe/train-split.jsonl", "val": "swe/val-split.jsonl"},
        "val": {"train": None, "val": "val/val-split.jsonl"},
        "test": {"train": None, "val": None, "test": "test/test-split.jsonl"},
    }
    top = [manifest["train"], manifest["val"], manifest["test"]]
    assert top == ["rlvr/train-split.jsonl", "val/val-split.jsonl", "test/test-split.jsonl"]
    rows = {name: facts["rows"] for name, facts in manifest["files"].items()}
    assert rows["rlvr/train-split.jsonl"] == 30 and rows["rlvr/val-split.jsonl"] == 10
    assert rows["swe/train-split.jsonl"] == 7 and rows["swe/val-split.jsonl"] == 0
    assert read(tmp_path / "out/val/val-split.jsonl") == numbered(30)
    assert read(tmp_path / "out/test/test-split.jsonl") == numbered(20)


def test_a_split_is_known_in_any_case(tmp_path: Path) -> None:
    made = prepare(tmp_path / "out", f"blend={blend(tmp_path, train=numbered(9), TEST=numbered(3))}", OWN, "holdout=1")
    assert made["test"] == "test/test-split.jsonl" and made["splits"]["train"]["val"]


def test_input_in_the_place_of_the_output_is_refused(tmp_path: Path) -> None:
    path = blend(tmp_path / "train", train=numbered(9))
    with pytest.raises(RecipeError, match=r"train\.jsonl lies in the output"):
        prepare(tmp_path, f"blend={path}", OWN)
    assert len(read(tmp_path / "train/train.jsonl")) == 9


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"key": 1}', "\xff"])
@pytest.mark.parametrize("file", ["train/.receipt.json", "manifest.json"])
def test_a_damaged_file_of_our_own_is_written_anew(tmp_path: Path, file: str, text: str) -> None:
    words = (f"blend={blend(tmp_path, train=numbered(20))}", OWN)
    prepare(tmp_path / "out", *words)
    whole = shape(tmp_path / "out")
    for more in ((), ("force=true",)):
        (tmp_path / "out" / file).write_bytes(text.encode("latin-1"))
        prepare(tmp_path / "out", *words, *more)
        assert shape(tmp_path / "out") == whole


def test_an_error_leaves_nothing_at_work(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        prepare(tmp_path / "out", f"blend={blend(tmp_path, train=[*numbered(20), b'{'])}", OWN)
    assert not (tmp_path / "out/.work").exists()


def test_too_few_rows_all_go_to_train_and_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = prepare(tmp_path / "out", f"blend={blend(tmp_path, train=numbered(100))}", "holdout=100", OWN)
    assert "train: only 100 rows, and 100 were to be held out: all of them go to train" in capsys.readouterr().out
    assert [facts["rows"] for facts in manifest["files"].values()] == [100, 0]


def test_progress_tells_rows_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 100.0, 101.0, 101.1, 103.0, 103.0, 104.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = progress.Progress("train: read", 8_000_000)
    shown.add(2_000_000, 1500)
    shown.add(1_000_000, 500)  # too soon
    shown.add(1_000_000, 1000)
    assert [line.strip(" \x1b[K") for line in capsys.readouterr().out.split("\r")[1:]] == [
        "train: read: 0 rows, 0.0 of 8.0 MB, 0 MB/s",
        "train: read: 1,500 rows, 2.0 of 8.0 MB, 2 MB/s  0:03 left",
        "train: read: 3,000 rows, 4.0 of 8.0 MB, 1 MB/s  0:03 left",
    ]


def test_progress_goes_to_the_launchers_file_and_the_log_stays_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = tmp_path / "progress-0"
    monkeypatch.setenv("PROGRESS_FILE", str(line))
    monkeypatch.setattr(progress, "PAUSE", 0)
    with progress.Progress("train: read", 8_000_000) as shown:
        assert line.read_text().startswith("train: read: 0 rows, 0.0 of 8.0 MB")
        shown.add(2_000_000, 1500)
        assert re.fullmatch(r"train: read: 1,500 rows, 2\.0 of 8\.0 MB, .* left", line.read_text())
    assert line.read_text() == "" and capsys.readouterr().out.startswith("train: read: 1,500 rows, 2.0 MB in ")
    monkeypatch.setenv("PROGRESS_FILE", str(tmp_path / "gone/progress-0"))
    with pytest.raises(KeyError), progress.Progress("train: read", 8_000_000):
        raise KeyError
    assert capsys.readouterr().out == ""  # nothing was read to its end


def test_a_table_shows_how_far_it_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"_hf_placeholder": SKY, "dataset": "skywork"}]
    prepare(tmp_path / "out", f"blend={blend(tmp_path, train=rows)}", OWN, "holdout=1")
    assert re.search(r"^table skywork: read: [1-9]\d* rows, 0\.0 MB in ", capsys.readouterr().out, re.MULTILINE)


def test_progress_moves_on_a_terminal(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [b'{"text": "' + b"x" * 4000 + b'"}\n'] * 30000)
    (tmp_path / "b.json").write_text('{"datasets": [{"name": "a", "path": "train.jsonl"}]}')
    main, terminal = pty.openpty()
    command = [sys.executable, str(RECIPE / "prep.py"), "--config", str(TINY), f"output={tmp_path}/out", "workers=1"]
    command += [f"blend={tmp_path}/b.json", OWN]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SRC)}
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=env)
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(main, 4096)
        except OSError:
            break
    assert process.wait() == 0
    assert re.search(rb"\rtrain: read: 0 rows, 0.0 of 120.4 MB", shown)  # the first word comes at once


# Placeholders

TABLES = {
    "d": tables.Table("d", "", "", "dapo", "prompt.0.content", "reward_model.ground_truth"),
    "s": tables.Table("s", "", "", "skywork", "q", "a"),
}


@pytest.fixture
def lookup(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    def set_row(question: str, answer: Any) -> None:
        monkeypatch.setattr(tables.Table, "question_and_answer", lambda self, row: (question, answer))

    return set_row


def filled(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(rl_prep.fill(json.dumps(row).encode(), row, TABLES))


def test_a_dapo_row_gets_the_templates_ends(lookup: Callable[[str, Any], None]) -> None:
    row = {"dataset": "d", "_hf_placeholder": {"row": 0, "question_template": {"prefix": "P ", "suffix": " S\n\n"}}}
    for source, bare in (("in\n\nA\n\nB\n\nout", "A\n\nB"), ("no wrapper", "no wrapper"), ("x\n\ny", "x\n\ny")):
        lookup(source, "34")
        prompt = f"P {bare} S"
        params = {"input": [{"role": "user", "content": prompt}]}
        assert filled(row) == {
            "dataset": "d", "question": prompt, "expected_answer": 34, "responses_create_params": params,
        }  # fmt: skip


def test_a_skywork_row_and_its_other_fields(lookup: Callable[[str, Any], None]) -> None:
    lookup("1+1?", '["2", "3"]')
    row = {
        "id": 7, "dataset": "s", "_hf_placeholder": {"row": 1, "question_template": "Q: {question} {question}"},
        "responses_create_params": {"tools": [1], "input": "old"}, "question": None, "half": "\ud800", "x": 0.1,
    }  # fmt: skip
    assert filled(row) == {
        "id": 7, "dataset": "s", "half": "\ud800", "x": 0.1, "question": "1+1?", "expected_answer": "2",
        "responses_create_params": {"tools": [1], "input": [{"role": "user", "content": "Q: 1+1? 1+1?"}]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('["42"]', "42"), ("[0.10, 1]", 0.1), ('{"a": "b", "c": 1}', "b"), ("34", 34), ('"t"', "t"), ("x+1", "x+1"),
        ("[]", []), ("{}", {}), ("Infinity", "Infinity"), ("\\frac{1}{2}", "\\frac{1}{2}"), (5, 5), (["a"], ["a"]),
        (' [ {"k": [1]} ] ', {"k": [1]}), ("", ""), ("1 2", "1 2"),
    ],
)  # fmt: skip
def test_answers(answer: Any, expected: Any) -> None:
    assert json.loads(rl_prep.first_value(answer)) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=5), st.sampled_from([None, 1]), st.booleans())
def test_members_are_what_json_reads(row: dict[str, Any], indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(row, indent=indent, ensure_ascii=ascii_only)
    found = rl_prep.members(text)
    assert {name: json.loads(value) for name, value in found.items()} == row
    assert json.loads(rl_prep.joined(found)) == row


# Errors

GOOD = {"responses_create_params": {"input": "x"}}
SKY = {"row": 0, "question_template": "{question}"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1\n', r"not JSON \(Expecting"),
        (b'{"a": 1} {"b": 2}\n', r"not JSON \(Extra data"),
        (b'{"a": "\xff"}\n', r"not JSON \(not UTF-8 at byte 8"),
        (b"[" * 100_000 + b"\n", r"not JSON \(nested too deeply"),
        (b"[1]\n", "not a JSON object"),
        (b'{"a": 1}\n', "the row has no responses_create_params"),
        ({"_hf_placeholder": 1}, "cannot fill the row: _hf_placeholder must have row and question_template"),
        ({"_hf_placeholder": {"row": 0}}, "must have row and question_template"),
        ({"_hf_placeholder": SKY, "dataset": "other"}, "its dataset is 'other', and sources has dapo, skywork"),
        ({"_hf_placeholder": SKY, "dataset": "dapo"}, "must be a table of prefix and suffix"),
        ({"_hf_placeholder": SKY | {"row": 6}, "dataset": "skywork"}, "row 6 is not among the 6 rows of skywork"),
        ({"_hf_placeholder": SKY | {"row": -1}, "dataset": "skywork"}, "row -1 is not among"),
        ({"_hf_placeholder": SKY | {"row": "1"}, "dataset": "skywork"}, "row '1' is not among"),
        ({"_hf_placeholder": SKY | {"question_template": "Q"}, "dataset": "skywork"}, "a text with {question}"),
        (
            {"_hf_placeholder": SKY | {"question_template": {"prefix": "p", "suffix": None}}, "dataset": "dapo"},
            "must be a table of prefix and suffix",
        ),
        *(
            ({"_hf_placeholder": SKY, "dataset": "skywork", "responses_create_params": params}, "is no table")
            for params in (5, "abc", "}", "", [], [1], True, False)
        ),
    ],
)
@pytest.mark.parametrize("quick", [True, False])
def test_a_bad_row_is_named_by_file_and_line(
    tmp_path: Path, line: Any, message: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not quick:
        monkeypatch.setattr(rl_prep, "quick_check", lambda required: None)
    path = blend(tmp_path, train=[GOOD, b"\n", GOOD, line, GOOD])
    with pytest.raises(RecipeError, match=rf"train\.jsonl:4: .*{message}") as caught:
        prepare(tmp_path / "out", f"blend={path}", "workers=2")
    assert len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "out/manifest.json").exists()
    assert not list((tmp_path / "out").glob("*/*.jsonl"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"train": []}', "is not a blend"),
        ('{"datasets": []}', "lists no dataset"),
        ('{"datasets": [{"name": "a", "path": "none.jsonl"}]}', "cannot read the shard .*none.jsonl of a"),
        ('{"datasets": [{"name": "a", "path": "."}]}', "no \\*.jsonl is in"),
        ('{"datasets": [{"name": "a", "path": "x*.jsonl"}]}', "no \\*.jsonl is in"),
        ('{"datasets": [{"name": "a", "path": "empty"}]}', "the shard .*empty of a is empty"),
        ('{"datasets": [{"name": "a", "path": "blank"}]}', "the shard .*blank is empty: its lines are blank"),
        ('{"datasets": [{"name": "a", "path": "hf://x/y"}]}', "reads local files only"),
        ('{"datasets": [{"name": "a", "path": "one", "split": "manifest.json"}]}', "must be plain words"),
        (
            '{"datasets": [{"name": "a", "path": "one", "weight": 0.7}, {"name": "a", "path": "one", "weight": 0.3}]}',
            "a has two weights",
        ),
        ('{"datasets": [{"name": "../a", "path": "b"}]}', "must be plain words"),
        ('{"datasets": [{"name": "a", "pth": "b"}]}', r"unknown key blend\.json: datasets\.0\.pth"),
        ('{"datasets": [{"name": "a", "path": "one", "weight": 2}]}', "a has a weight in the blend"),
        ('{"datasets": [{"name": "a", "path": "one", "text_field": "x"}]}', "a has a text_field in the blend"),
        ('{"datasets": [{"name": "a", "path": "one", "weight": 0}]}', "the weight of a is 0"),
        (
            '{"datasets": [{"name": "a", "path": "one", "split": "val"},'
            ' {"name": "a", "path": "one", "split": "dev"}]}',
            "two splits of .* mean the same",
        ),
    ],
)
def test_a_bad_blend_is_named(tmp_path: Path, text: str, message: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "blend.json").write_text(text)
    (folder / "empty").write_text("")
    (folder / "one").write_text("{}\n")
    (folder / "blank").write_text("\n \t\n\r\n")
    with pytest.raises(RecipeError, match=message) as caught:
        prepare(tmp_path / "out", f"blend={folder}/blend.json", OWN)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("none.jsonl", None, r"cannot read the source table of skywork, .*none\.jsonl: No such file"),
        ("bad.jsonl", b'{"q": 1}\n{\n', r"bad\.jsonl:2: not JSON"),
        ("empty.jsonl", b"", "it has no rows"),
        ("t.jsonl", b'{"q": 1}\n', r"cannot fill the row: row 0 of skywork has no prompt\.0\.content"),
        ("t.jsonl", b'{"prompt": []}\n', r"row 0 of skywork has no prompt\.0\.content"),
        (
            "t.jsonl",
            b'{"prompt": [{"content": "q"}], "reward_model": {"ground_truth": null}}\n',
            "ground_truth is null",
        ),
        ("t.jsonl", b'{"prompt": [{"content": 5}], "reward_model": {"ground_truth": 1}}\n', "is no text"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(tmp_path: Path, path: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / path).write_bytes(content)
    rows = [{"_hf_placeholder": SKY, "dataset": "skywork"}]
    with pytest.raises(RecipeError, match=message):
        table = f"sources.skywork.path={tmp_path / path}"
        prepare(tmp_path / "out", f"blend={blend(tmp_path, train=rows)}", table, OWN)
    assert not (tmp_path / "out/train").exists()


def test_parquet_needs_pyarrow_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"_hf_placeholder": SKY | {"row": i}, "dataset": "skywork"} for i in range(6)]
    path = blend(tmp_path, train=rows)
    table = f"sources.skywork.path={tmp_path / 'parquet'}"
    (tmp_path / "parquet").mkdir()
    source = read(SRC / "starter/samples/skywork.jsonl")
    with monkeypatch.context() as patch, pytest.raises(RecipeError, match="pyarrow, which reads it, is not installed"):
        patch.setitem(sys.modules, "pyarrow.parquet", None)
        (tmp_path / "parquet/0.parquet").write_bytes(b"")
        prepare(tmp_path / "out", f"blend={path}", table, OWN)
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for i in (0, 1):
        parquet.write_table(arrow.Table.from_pylist(source[3 * i : 3 * i + 3]), tmp_path / f"parquet/{i}.parquet")
    prepare(tmp_path / "a", f"blend={path}", table, OWN)
    prepare(tmp_path / "b", f"blend={path}", OWN)
    name = "train/train-split.jsonl"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    path = blend(tmp_path, train=numbered(3))
    write(tmp_path / "out/train/mine.jsonl", [1])
    with pytest.raises(RecipeError, match="train is there, and no data prep wrote it"):
        prepare(tmp_path / "out", f"blend={path}", OWN)
    assert read(tmp_path / "out/train/mine.jsonl") == [1]


def test_a_full_disk_or_a_forbidden_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot write to /proc/x"):
        prepare(Path("/proc/x"))
    command = ["bash", "-c", 'ulimit -f 4; trap "" XFSZ; exec "$@"', "-", sys.executable, str(RECIPE / "prep.py")]
    command += ["--config", str(TINY), f"output={tmp_path}/out"]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SRC), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr and len(done.stderr.splitlines()) == 2


# Ranges and holdout

LINES = st.lists(
    st.sampled_from([b"\n", b"  \n", b"{}\n", b'{"a": 1}\n', b'{"long": "' + b"x" * 40 + b'"}\n']), min_size=1
)


@given(LINES, st.booleans(), st.integers(1, 30))
def test_every_line_lies_in_one_range(tmp_path: Path, rows: list[bytes], ended: bool, size: int) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"".join(rows)[: None if ended else -1] or b"{}")
    text = path.read_bytes()
    shard = Shard(Dataset("s", "s"), path)
    found = [(at, line) for part in shards.cut([shard], size) for at, line in shards.lines(part)]
    expected, at = [], 0
    for line in text.splitlines(keepends=True):
        if line.strip():
            expected.append((at, line if line.endswith(b"\n") else line + b"\n"))
        at += len(line)
    assert found == expected
    for number, (at, _) in enumerate(expected):
        where = shards.bad_row(Range(shard, 0, 1), at, "x", "y")
        line = text[:at].count(b"\n") + 1
        assert str(where) == f"{path}:{line}: x.\ny", number
    scans = [shards.scan(part, 1, 2) for part in shards.cut([shard], size)]
    assert sum(found.rows for found in scans) == len(expected)


def hold(folder: Path, rows: list[int], count: int, seed: int, size: int) -> list[int]:
    """The rows that are held out, by their keys."""
    path = write(folder / "s.jsonl", [{"row": row} for row in rows])
    ranges = shards.cut([Shard(Dataset("s", "s"), path)], size)
    held = shards.choose([shards.scan(part, seed, count) for part in ranges], count)
    assert len(set(held)) == len(held)
    text = path.read_bytes()
    return [json.loads(text[row.at :].split(b"\n", 1)[0])["row"] for row in held]


@settings(max_examples=100)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(0, 12), st.integers(0, 3), st.randoms())
@example([1] * 20, 5, 0, random.Random(0))
def test_the_holdout_has_its_size_and_does_not_depend_on_the_order(
    tmp_path: Path, rows: list[int], count: int, seed: int, dice: random.Random
) -> None:
    held = hold(tmp_path, rows, count, seed, 1 << 20)
    assert len(held) == (count if len(rows) > count else 0)
    shuffled = dice.sample(rows, len(rows))
    assert hold(tmp_path, shuffled, count, seed, 100) == held
    whole = {row for row in held if held.count(row) == rows.count(row)}
    assert len(set(held) - whole) <= 1, "copies of a row stay together, but for the last one"


def test_another_seed_holds_out_other_rows(tmp_path: Path) -> None:
    rows = list(range(1000))
    first, second = (hold(tmp_path, rows, 100, seed, 4096) for seed in (1, 2))
    assert first != second and len(set(first) & set(second)) < 40
    assert 350 < sum(first) / 100 < 650, "spread over the rows"


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=1), st.integers(0, 9)), max_size=400), st.integers(0, 5))
def test_lowest_is_what_sorting_gives(rows: list[tuple[bytes, int]], count: int) -> None:
    lowest = shards.Lowest(count)
    ordered = [(key, at) for at, (key, _) in enumerate(rows)]
    for key, at in ordered:
        if key < lowest.bound:
            lowest.add(key, at)
    assert lowest.cut() == sorted(ordered)[:count]


@given(
    st.one_of(JSON.map(lambda v: json.dumps(v).encode()), st.binary(max_size=30)), st.binary(max_size=2), st.integers(0)
)
def test_the_quick_check_takes_only_what_the_slow_one_takes(line: bytes, extra: bytes, at: int) -> None:
    quick = rl_prep.quick_check(("a",))
    if not quick:
        pytest.skip("pydantic is not installed")
    place = at % (len(line) + 1)
    for text in (
        line,
        line[:place] + extra + line[place:],
        b'{"a": %s}' % line,
        b'{"a": 1, "b": %s%s}' % (line, extra),
    ):
        try:
            found = quick(text)
        except ValueError:
            continue
        row = shards.read_json(text)
        assert isinstance(row, dict) and "a" in row
        assert ("_hf_placeholder" in found) == ("_hf_placeholder" in row)


@settings(max_examples=25)
@given(st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=4), min_size=1, max_size=30), st.integers(0, 9))
def test_all_rows_come_out_once_with_all_fields(rows: list[dict[str, Any]], holdout: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = prepare(folder / "out", f"blend={blend(folder, train=rows)}", f"holdout={holdout}", OWN, "workers=1")
        train, val = (read(folder / "out" / manifest[part]) for part in ("train", "val"))
        assert len(val) == (holdout if len(rows) > holdout else 0)
        left = list(val)
        kept = [left.remove(row) if row in left else row for row in rows]
        assert not left and sorted(map(repr, train)) == sorted(repr(row) for row in kept if row is not None)


def test_many_ranges_and_workers_give_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = []
    for i in range(3000):
        rows.append({"id": i, "t": "é" * (i % 50)})
        if i % 7 == 0:
            rows.append({"id": i, "_hf_placeholder": SKY | {"row": i % 6}, "dataset": "skywork"})
        if i % 500 == 0:
            rows.append(b"\n")
    path = blend(tmp_path, train=rows)
    monkeypatch.setattr(rl_prep.RLPrep, "range_size", 10_000)
    prepare(tmp_path / "a", f"blend={path}", OWN, "workers=3", "holdout=200")
    monkeypatch.setattr(rl_prep, "quick_check", lambda required: None)
    monkeypatch.setattr(rl_prep, "copy_some", lambda s, t, start, size: os.write(t, os.pread(s, min(size, 999), start)))
    prepare(tmp_path / "b", f"blend={path}", OWN, "workers=1", "holdout=200")
    assert shape(tmp_path / "a") == shape(tmp_path / "b")
    monkeypatch.setattr(rl_prep.RLPrep, "range_size", 1 << 24)
    prepare(tmp_path / "c", f"blend={path}", OWN, "workers=1", "holdout=200")
    for name in ("train/train-split.jsonl", "train/val-split.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


# What is redone


def test_what_changed_is_noticed_by_content_and_only_that_is_redone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = blend(tmp_path, a=numbered(50), b=numbered(60)), tmp_path / "out"
    table = tmp_path / "sky.jsonl"
    shutil.copy(SRC / "starter/samples/skywork.jsonl", table)
    base = [f"blend={path}", OWN, f"sources.skywork.path={table}"]

    def said(*overrides: str) -> list[str]:
        capsys.readouterr()
        prepare(output, *base, *overrides)
        text = capsys.readouterr().out
        return ["kept" if f"{split}: unchanged" in text else "built" for split in "ab"]

    assert said("holdout=5") == ["built", "built"]
    first = shape(output)
    stamp = (output / "manifest.json").stat().st_mtime_ns
    assert said("holdout=5") == ["kept", "kept"]
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert said("holdout=5") == ["kept", "kept"], "a time is no content"
    assert (output / "manifest.json").stat().st_mtime_ns == stamp and shape(output) == first
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(text.replace("row 17", "row 71"))  # as long as before
    assert said("holdout=5") == ["built", "kept"]
    assert shape(output) != first
    (tmp_path / "a.jsonl").write_text(text)
    assert said("holdout=5") == ["built", "kept"]
    assert shape(output) == first
    assert said("holdout=6") == ["built", "built"]
    assert said("holdout=6", "seed=5") == ["built", "built"]
    assert said("holdout=6", "seed=5", "required=[id]") == ["built", "built"]
    table.write_text(table.read_text().replace("10", "20"))
    assert said("holdout=6", "seed=5", "required=[id]") == ["built", "built"]
    assert said("holdout=5", "force=true") == ["built", "built"]
    damaged = output / "b/val-split.jsonl"
    damaged.write_text(damaged.read_text()[:-9])
    assert said("holdout=5") == ["kept", "built"]
    damaged.unlink()
    assert said("holdout=5") == ["kept", "built"]
    (output / "manifest.json").write_text("{}")
    assert said("holdout=5") == ["kept", "kept"]
    assert {name: data for name, data in shape(output).items() if name.endswith("l")} == {
        name: data for name, data in first.items() if name.endswith("l")
    }


def test_a_split_that_left_the_blend_leaves_the_output(tmp_path: Path) -> None:
    prepare(tmp_path / "out", f"blend={blend(tmp_path, a=numbered(5), b=numbered(5))}", OWN)
    prepare(tmp_path / "out", f"blend={blend(tmp_path, a=numbered(5))}", OWN)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".lock", "a", "manifest.json"]


def test_a_table_that_changes_meanwhile_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write(tmp_path / "a name/t.jsonl", [{"prompt": [{"content": "q"}], "reward_model": {"ground_truth": "7"}}])
    rows = [GOOD | {"_hf_placeholder": SKY, "dataset": "x/y"}] * 5
    (tmp_path / "c.yaml").write_text(
        f"output: {tmp_path}/out\nblend: {blend(tmp_path, train=rows)}\nholdout: 0\n"
        f"sources: {{'x/y': {{path: '{table}', template: skywork}}}}\n"
    )
    prepare(tmp_path / "out", config=tmp_path / "c.yaml")
    begin = rl_prep.RLPrep.begin

    def then_replace(self: Any, scratch: Path) -> None:
        begin(self, scratch)
        table.write_bytes(table.read_bytes().replace(b"7", b"8"))
        os.utime(table, (1, 1))

    monkeypatch.setattr(rl_prep.RLPrep, "begin", then_replace)
    with pytest.raises(RecipeError, match=r"t\.jsonl changed while rows were filled from it"):
        prepare(tmp_path / "out", "force=true", config=tmp_path / "c.yaml")


def test_input_that_changes_meanwhile_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = blend(tmp_path, a=numbered(50))
    real = shards.choose

    def meddle(scans: Any, count: int) -> Any:
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write("{}\n")
        return real(scans, count)

    monkeypatch.setattr(shards, "choose", meddle)
    with pytest.raises(RecipeError, match="a shard of a changed while it was read"):
        prepare(tmp_path / "out", f"blend={path}", OWN)
    assert not (tmp_path / "out/a").exists()


# Kills and company


def big_blend(folder: Path, megabytes: int = 24) -> Path:
    rows = [json.dumps({"id": i, "text": "x" * (i % 900)}).encode() + b"\n" for i in range(megabytes * 2300)]
    place = {"_hf_placeholder": SKY, "dataset": "skywork"}
    return blend(folder, a=[*rows, place], b=rows[:2000], test=rows[:500])


def start(output: Path, *overrides: str, **options: Any) -> subprocess.Popen[bytes]:
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SRC)}
    command = [sys.executable, str(RECIPE / "prep.py"), "--config", str(TINY), f"output={output}", OWN, *overrides]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, **options)


def check_whole(output: Path) -> None:
    """Whatever happened, what the manifest names is whole, and so is each split with a receipt."""
    for receipt in output.glob("*/.receipt.json"):
        for name, facts in json.loads(receipt.read_bytes())["files"].items():
            assert sha256(receipt.parent / name) == facts["sha256"]
    if (output / "manifest.json").exists():
        for name, facts in json.loads((output / "manifest.json").read_bytes())["files"].items():
            assert sha256(output / name) == facts["sha256"]


def storm(folder: Path, kills: int, megabytes: int) -> None:
    path, output = big_blend(folder, megabytes), folder / "out"
    settings = [f"blend={path}", "workers=2", "holdout=50"]
    assert start(folder / "whole", *settings).wait() == 0
    began = time.monotonic()
    assert start(folder / "timed", *settings).wait() == 0
    seconds, dice, alone = time.monotonic() - began, random.Random(5), shape(folder / "whole")
    other = [*settings[:2], "holdout=60"]
    for number in range(kills):
        process = start(output, *(other if number % 4 == 3 else settings), stderr=subprocess.DEVNULL)
        time.sleep(dice.uniform(0.05, 1.2 * seconds))
        process.kill()
        process.wait()
        check_whole(output)
        if number % 3 == 2:
            assert start(output, *settings).wait() == 0
            assert shape(output) == alone
            if number % 2:
                shutil.rmtree(output)
    assert start(output, *settings).wait() == 0
    assert shape(output) == alone


WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def dies_at(point: int, output: Path, *overrides: str) -> bool:
    """Run in a child that is killed before its ``point``-th touch of the file system. Whether it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: Any) -> None:
            nonlocal count
            count += event in WATCHED
            if event in WATCHED and count > point:
                os.kill(os.getpid(), signal.SIGKILL)

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.addaudithook(hook)
        try:
            prepare(output, *overrides)
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("before", [None, "holdout=9"])
def test_a_kill_before_each_touch_of_the_file_system(tmp_path: Path, before: str | None) -> None:
    rows = [*numbered(40), {"_hf_placeholder": SKY, "dataset": "skywork"}]
    path = blend(tmp_path, a=rows, test=numbered(5))
    settings = [f"blend={path}", OWN, "holdout=8", "workers=1"]
    prepare(tmp_path / "whole", *settings)
    expected, point, output = shape(tmp_path / "whole"), 0, tmp_path / "out"
    while True:
        shutil.rmtree(output, ignore_errors=True)
        if before:
            prepare(output, *settings, before)
        died = dies_at(point, output, *settings)
        check_whole(output)
        for folder in (output / "a", output / "test"):
            assert not folder.exists() or (folder / ".receipt.json").exists()
        prepare(output, *settings)
        assert shape(output) == expected, point
        if not died:
            break
        point += 1
    assert point > 40


def test_a_kill_at_any_point_and_a_rerun_give_the_same(tmp_path: Path) -> None:
    storm(tmp_path, kills=6, megabytes=12)


@pytest.mark.slow
def test_a_storm_of_kills(tmp_path: Path) -> None:
    storm(tmp_path, kills=30, megabytes=40)


def test_the_workers_end_with_the_recipe(tmp_path: Path) -> None:
    path = big_blend(tmp_path, 60)
    process = start(tmp_path / "out", f"blend={path}", "workers=2")
    children: list[str] = []
    deadline = time.monotonic() + 30
    while len(children) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    time.sleep(0.1)
    process.kill()
    process.wait()
    while any(alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_that_dies_ends_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"a worker process was killed, most likely for its memory\.\nGive the pod"):
        list(pool.on_processes(lethal, [1, 2], 2))


def lethal(item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_two_runs_at_once_do_no_harm(tmp_path: Path) -> None:
    path, output = big_blend(tmp_path, 12), tmp_path / "out"
    assert start(tmp_path / "alone", f"blend={path}", "holdout=40").wait() == 0
    processes = [start(output, f"blend={path}", f"holdout={n}", "workers=2") for n in (40, 50, 40)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    check_whole(output)
    assert start(output, f"blend={path}", "holdout=40").wait() == 0
    assert shape(output) == shape(tmp_path / "alone")


def test_a_lock_goes_with_its_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = f"from pathlib import Path\nfrom starter.files import only_run\nwith only_run(Path({str(tmp_path)!r})): "
    code += "print('held', flush=True); import time; time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], env={"PYTHONPATH": str(SRC)}, stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {holder.pid}"])
    with only_run(tmp_path):
        assert "another run writes to" in capsys.readouterr().out
    holder.wait()
    holder.stdout.close()


# Scale


@pytest.mark.slow
def test_half_a_gigabyte_takes_less_than_200_mib(tmp_path: Path) -> None:
    sys.path.insert(0, str(SRC.parent))
    from benchmarks import data_prep

    shard = tmp_path / "shard.jsonl"
    data_prep.generate(shard, 512 << 20)
    seconds, _, peak = data_prep.ours(shard, tmp_path / "run", None)
    print(f"{seconds:.2f} s, {peak >> 20} MiB")
    assert peak < 200 << 20


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    port = 20000 + os.getpid() % 20000
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    env = {"PATH": os.environ["PATH"], "RAY_TMPDIR": "/tmp", "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    options = ["--num-cpus=2", "--disable-usage-stats", "--include-dashboard=false", f"--temp-dir=/tmp/r{port}"]
    options.append("--node-ip-address=127.77.0.1")  # 127.0.0.1 is not an address to Ray
    head = subprocess.Popen(
        [*ray, "start", "--head", "--block", f"--port={port}", *options], env=env, stdout=subprocess.DEVNULL
    )
    try:
        path = big_blend(tmp_path, 60)
        assert start(tmp_path / "alone", f"blend={path}").wait() == 0
        command = [sys.executable, str(RECIPE / "prep.py"), "--config", str(TINY), OWN, f"blend={path}"]
        env |= {"PYTHONPATH": str(SRC), "RAY_ADDRESS": f"127.77.0.1:{port}"}
        output, deadline = tmp_path / "out", time.monotonic() + 60
        while subprocess.run([*ray, "status", f"--address=127.77.0.1:{port}"], env=env, capture_output=True).returncode:
            assert time.monotonic() < deadline, "Ray's head does not start"
        done = subprocess.run([*command, f"output={output}"], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "on the Ray cluster" in done.stdout
        assert shape(output) == shape(tmp_path / "alone")
        write(tmp_path / "b.jsonl", [b"{\n"])
        done = subprocess.run([*command, f"output={output}"], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and "b.jsonl:1: not JSON" in done.stderr and "Traceback" not in done.stderr
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(f"/tmp/r{port}", ignore_errors=True)
