"""src/starter: data/prep/pretrain and data/prep/sft, Megatron's format, and the training that reads what they wrote."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import as_a_recipe

pytest.importorskip("torch")
pytest.importorskip("transformers")
SRC = Path(__file__).resolve().parents[1] / "src"
sys.path.insert(0, str(SRC))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from starter import chat, megatron, prep, pretrain, pretrain_prep, sft, sft_prep  # noqa: E402
from starter.config import RecipeError, SFTConfig, parse_args  # noqa: E402
from starter.dialogue import read_chat  # noqa: E402
from starter.template import Encoded  # noqa: E402

RECIPES = SRC / "starter/recipes"
SAMPLES = SRC / "starter/samples"
TOKENIZER = chat.byte_tokenizer()
END = chat.token_id(TOKENIZER, chat.END)
FEW_STEPS = ["train.warmup_steps=1", "train.log_every=1", "train.eval_every=3", "train.checkpoint_every=3"]


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with as_a_recipe(monkeypatch):
        yield


def config(run: Path, recipe: str) -> Path:
    """The recipe's tiny config, with its places in ``run``, as pod.py would put them."""
    path = run / "configs" / (recipe.replace("/", "-") + ".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((RECIPES / recipe / "config/tiny.yaml").read_text().replace("/nemo_run", str(run)))
    return path


def prepare_docs(run: Path, *overrides: str, family: str = "nano3") -> Path:
    recipe = RECIPES / family / "data_prep_pretrain"
    arguments = ["--config", str(config(run, f"{family}/data_prep_pretrain")), *overrides]
    cfg = parse_args(pretrain_prep.PretrainPrepConfig, arguments)
    return prep.run(cfg, recipe, pretrain_prep.PretrainPrep(cfg, recipe)).parent


def prepare_chat(run: Path, *overrides: str, family: str = "nano3") -> Path:
    recipe = RECIPES / family / "data_prep_sft"
    arguments = ["--config", str(config(run, f"{family}/data_prep_sft")), *overrides]
    cfg = parse_args(sft_prep.SFTPrepConfig, arguments)
    return prep.run(cfg, recipe, sft_prep.SFTPrep(cfg, recipe)).parent


def train(run: Path, *overrides: str, family: str = "nano3", stage: str = "pretrain") -> int:
    module = {"pretrain": pretrain, "sft": sft}[stage]
    arguments = ["--config", str(config(run, f"{family}/{stage}")), *FEW_STEPS, *overrides]
    return module.run(RECIPES / family / stage, arguments)


def read_metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def texts(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (SAMPLES / name).read_text().splitlines()]


def independent_read(prefix: Path) -> list[list[int]]:
    """The documents of a pair of files, by the format's public description and nothing of ours."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1 and documents == sequences + 1
    size, letter = {4: (4, "i"), 8: (2, "H")}[code]
    at = 34
    lengths = struct.unpack_from(f"<{sequences}i", index, at)
    pointers = struct.unpack_from(f"<{sequences}q", index, at + 4 * sequences)
    starts = struct.unpack_from(f"<{documents}q", index, at + 12 * sequences)
    assert len(index) == at + 12 * sequences + 8 * documents
    assert list(starts) == list(range(documents))
    assert len(data) == size * sum(lengths)
    return [list(struct.unpack_from(f"<{n}{letter}", data, p)) for n, p in zip(lengths, pointers, strict=True)]


# Megatron's format


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=20), max_size=8), st.sampled_from([4, 8]))
def test_bin_and_idx_round_trip(tmp_path: Path, documents: list[list[int]], code: int) -> None:
    writer = megatron.Writer(tmp_path / "x", code)
    for document in documents:
        writer.add(document)
    facts = writer.close()
    assert independent_read(tmp_path / "x") == documents
    assert megatron.read_tokens(tmp_path / "x").tolist() == [i for document in documents for i in document]
    assert {name: f["bytes"] for name, f in facts.items()} == {
        name: (tmp_path / name).stat().st_size for name in ("x.bin", "x.idx")
    }


def test_the_type_holds_all_ids() -> None:
    assert [megatron.token_type(size) for size in (264, 65_536, 65_537, 131_072)] == [8, 8, 4, 4]


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".idx", lambda data: data[:20], "unpack requires"),
        (".idx", lambda data: b"X" + data[1:], "another format"),
        (".idx", lambda data: data[:-40], "buffer|lie one after|tells of"),
        (".bin", lambda data: data[:-2], "it tells of 5 tokens, and .bin has 4"),
        (".bin", None, "No such file"),
    ],
)
def test_a_damaged_pair_is_named(tmp_path: Path, suffix: str, change: Any, message: str) -> None:
    writer = megatron.Writer(tmp_path / "x", 8)
    writer.add([1, 2, 3])
    writer.add([4, 5])
    writer.close()
    path = tmp_path / f"x{suffix}"
    data = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(data))
    with pytest.raises(RecipeError, match=message):
        megatron.read_tokens(tmp_path / "x")


# data/prep/pretrain


@pytest.mark.parametrize("family", ["nano3", "super3"])
def test_every_document_comes_out_once(tmp_path: Path, family: str) -> None:
    folder = prepare_docs(tmp_path, family=family)
    blend = json.loads((folder / "blend.json").read_bytes())
    assert list(blend) == ["train", "valid"]
    found: dict[str, list[str]] = {"docs": [], "sums": []}
    held = 0
    for part, entries in blend.items():
        weights = [float(weight) for weight in entries[::2]]
        assert sum(weights) == pytest.approx(1.0)
        for prefix in entries[1::2]:
            for document in independent_read(folder / prefix):
                assert document.pop() == END
                found[Path(prefix).name.split("-")[0]].append(TOKENIZER.decode(document))
                held += part == "valid"
    assert held == 8
    assert sorted(found["docs"]) == sorted(texts("docs.jsonl"))
    assert sorted(found["sums"]) == sorted(texts("sums.jsonl"))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["blend"] == "blend.json" and "blend.json" in manifest["files"]
    assert manifest["tokenizer"] == chat.fingerprint(TOKENIZER)


def test_ranges_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_prep.PretrainPrep, "range_size", 700)
    folder = prepare_docs(tmp_path, "workers=2")
    entries = json.loads((folder / "blend.json").read_bytes())["train"]
    weights: dict[str, float] = {}
    for weight, prefix in zip(entries[::2], entries[1::2], strict=True):
        name = Path(prefix).name.split("-")[0]
        weights[name] = weights.get(name, 0) + float(weight)
    assert len(entries) > 8 and weights == pytest.approx({"docs": 0.6, "sums": 0.4})
    documents = [d for prefix in entries[1::2] for d in independent_read(folder / prefix)]
    assert len(documents) == 58 - 8
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    prepare_docs(tmp_path, "workers=1", "force=true")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"txt": "a"}\n', "text is no text"),
        (b'{"text": 1}\n', "text is no text"),
        (b'{"text": "\\ud800"}\n', "text holds half of a surrogate pair"),
        (b"{\n", "not JSON"),
    ],
)
def test_a_bad_document_is_named(tmp_path: Path, row: bytes, message: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "ok"}\n\n' + row)
    (tmp_path / "b.json").write_text('{"datasets": [{"name": "d", "path": "d.jsonl"}]}')
    with pytest.raises(RecipeError, match=rf"d\.jsonl:3: {message}"):
        prepare_docs(tmp_path, f"blend={tmp_path}/b.json")
    assert not (tmp_path / "data/pretrain/manifest.json").exists()


def save_tokenizer(folder: Path, **changes: Any) -> Path:
    """The byte tokenizer as a folder, with changes to its tokenizer.json: parts of the model, or keys beside it."""
    TOKENIZER.save_pretrained(folder)
    path = folder / "tokenizer.json"
    facts = json.loads(path.read_bytes())
    facts["model"] |= {name: value for name, value in changes.items() if name in facts["model"]}
    facts |= {name: value for name, value in changes.items() if name not in facts["model"]}
    path.write_text(json.dumps(facts))
    return folder


def vocabulary(**more: int) -> dict[str, int]:
    plain = {token: i for token, i in TOKENIZER.get_vocab().items() if not token.startswith("<|")}
    return plain | more


def test_ids_beyond_the_size_of_the_vocabulary_fit(tmp_path: Path) -> None:
    many = save_tokenizer(tmp_path / "t", vocab=vocabulary(the=76_500, th=76_499), merges=[["t", "h"], ["th", "e"]])
    assert len(chat.load_tokenizer(str(many))) < 1 << 16
    folder = prepare_docs(tmp_path, f"tokenizer={many}")
    prefix = json.loads((folder / "blend.json").read_bytes())["train"][1]
    assert any(76_500 in document for document in independent_read(folder / prefix))


@pytest.mark.parametrize("prepare", [prepare_docs, prepare_chat])
def test_a_changed_tokenizer_is_noticed(tmp_path: Path, prepare: Any, capsys: pytest.CaptureFixture[str]) -> None:
    more, folder = {"vocab": vocabulary(ab=300, cd=301)}, tmp_path / "t"
    changes: list[dict[str, Any]] = [
        {"merges": [["a", "b"], ["c", "d"]]},
        {"merges": [["c", "d"], ["a", "b"]]},
        {"merges": [["c", "d"], ["a", "b"]], "normalizer": {"type": "Lowercase"}},
    ]

    def unchanged() -> bool:
        for module in (pretrain_prep, sft_prep):
            module.tokenizer.cache_clear()
        prepare(tmp_path, f"tokenizer={folder}")
        return "unchanged" in capsys.readouterr().out

    for change in changes:
        save_tokenizer(folder, **more, **change)
        assert not unchanged()
        assert unchanged()
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", " <|im_end|>"))
    assert unchanged() == (prepare is prepare_docs), "a template makes no difference to documents"


@pytest.mark.parametrize("prepare", [prepare_docs, prepare_chat])
def test_a_missing_tokenizer_names_the_key_of_the_data_prep(tmp_path: Path, prepare: Any) -> None:
    with pytest.raises(RecipeError, match=r"does not exist\.\nGive tokenizer=bytes or a local folder"):
        prepare(tmp_path, f"tokenizer={tmp_path}/none")


def test_a_tokenizer_that_was_saved_is_the_same(tmp_path: Path) -> None:
    saved = chat.load_tokenizer(str(save_tokenizer(tmp_path / "t")))
    saved(["a", "b c"], padding=True, truncation=True, max_length=2)
    for for_chat in (False, True):
        assert chat.fingerprint(saved, for_chat) == chat.fingerprint(TOKENIZER, for_chat)


def test_a_blend_gives_each_data_set_its_share(tmp_path: Path) -> None:
    for name, tokens in (("a", 1000), ("b", 3000), ("c", 5)):
        writer = megatron.Writer(tmp_path / name, 8)
        writer.add(list(range(tokens)))
        writer.close()
    (tmp_path / "blend.json").write_text(json.dumps({"train": ["0.75", "a", "0.25", "b", "1", "c"]}))
    data = megatron.TokenBlend(tmp_path / "blend.json", "train", 10)
    assert len(data) == 400
    first = [int(data.batch([i])[0][0, 0]) for i in range(400)]
    assert first[:300] == [10 * (i % 100) for i in range(300)], "a set that is asked for more begins anew"
    assert first[300:] == [10 * i for i in range(100)]
    ids, labels = data.batch([0, 301])
    assert ids.tolist() == labels.tolist() == [list(range(10)), list(range(10, 20))]
    with pytest.raises(RecipeError, match="train has no 4000 tokens in a row"):
        megatron.TokenBlend(tmp_path / "blend.json", "train", 4000)


# data/prep/sft


@pytest.mark.parametrize("family", ["nano3", "super3"])
def test_packed_chat_is_what_the_recipe_packs_itself(tmp_path: Path, family: str) -> None:
    folder = prepare_chat(tmp_path, family=family)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert (manifest["source_splits"], manifest["seq_length"]) == (["train", "validation"], 256)
    for part, name in (("train", "chat.jsonl"), ("val", "chat-val.jsonl")):
        packed = chat.load_packed(folder / manifest[part], 256, TOKENIZER)
        alone = chat.load_packed(SAMPLES / name, 256, TOKENIZER)
        assert packed.digest() == alone.digest() and torch.equal(packed.lengths, alone.lengths)
        (path,) = (folder / manifest[part]).iterdir()
        assert set(load_file(path)) == {"input_ids", "loss_mask", "lengths"}
        assert manifest["files"][path.relative_to(folder).as_posix()]["rows"] == len(packed)


def test_held_out_dialogues_are_packed_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_prep.SFTPrep, "range_size", 3000)
    folder = prepare_chat(tmp_path, "holdout=20", "workers=2")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["splits"]["train"] == {"train": "train/train", "val": "train/val"}
    texts = {}
    for part in ("train", "val"):
        packed = chat.read_packed(folder / "train" / part, 256, TOKENIZER)
        rows = [ids[:n].tolist() for ids, n in zip(packed.input_ids, packed.lengths, strict=True)]
        texts[part] = TOKENIZER.decode([i for row in rows for i in row])
    ends = {part: text.count(chat.END) for part, text in texts.items()}
    dialogues = [dialogue.messages for dialogue in read_chat(SAMPLES / "chat.jsonl")]
    assert sum(ends.values()) == sum(map(len, dialogues))
    whole = ["".join(f"{chat.START}{m['role']}\n{m['content']}{chat.END}\n" for m in d) for d in dialogues]
    assert sum(text in texts["val"] for text in whole) >= 20 > sum(text not in texts["train"] for text in whole) - 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "critic", "content": "x"}]}, "unknown role 'critic'"),
        ({"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"}]}, "it has messages of a"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant"),
        ({"text": "x"}, "not a chat record"),
        ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "the content of a message holds half of a"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]}, "it has tool_calls"),
        ({"messages": [{"role": "assistant", "content": "x"}], "tools": [{"name": "f"}]}, "it has tools"),
        ({"messages": [{"role": "assistant", "content": "x", "reasoning_content": "y"}]}, "it has reasoning_content"),
    ],
)
def test_a_bad_dialogue_is_named(tmp_path: Path, row: Any, message: str) -> None:
    good = json.dumps({"messages": [{"role": "assistant", "content": "x"}]})
    (tmp_path / "c.jsonl").write_text(f"{good}\n\n{good}\n{json.dumps(row)}\n")
    (tmp_path / "b.json").write_text('{"datasets": [{"name": "c", "path": "c.jsonl"}]}')
    with pytest.raises(RecipeError, match=rf"c\.jsonl:4: {message}"):
        prepare_chat(tmp_path, f"blend={tmp_path}/b.json")


def test_a_dialogue_that_the_template_does_not_take_is_named(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "t")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    with pytest.raises(RecipeError, match=r"chat\.jsonl:1: the tokenizer's chat template fails .*not today"):
        prepare_chat(tmp_path, f"tokenizer={folder}")


def test_the_same_sequences_are_the_same_bytes(tmp_path: Path) -> None:
    packed = chat.pack([Encoded([1, 2], [False, True])], 4, 0)
    written = set()
    for _ in range(60):  # chance would have to go one way 60 times
        chat.write_packed(tmp_path / "x", packed, TOKENIZER)
        written.add((tmp_path / "x").read_bytes())
    assert len(written) == 1


def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    folder = prepare_chat(tmp_path) / "train/train"
    (path,) = folder.iterdir()
    (folder / "more.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(RecipeError, match=r"more\.safetensors is not in .*manifest\.json\.\nMove it away"):
        train(tmp_path, "train.steps=1", "data.verify=true", stage="sft")


def test_data_packed_for_another_length_or_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = prepare_chat(tmp_path, "seq_length=128")
    with pytest.raises(RecipeError, match=r"packed with seq_length 128, now it is 256"):
        train(tmp_path, "train.steps=1", stage="sft")
    path = next((folder / "train/train").iterdir())
    chat.save_file(load_file(path), path, metadata={"prep": '{"seq_length": 256, "tokenizer": "other"}'})
    with pytest.raises(RecipeError, match=r"packed with tokenizer other, now it is"):
        chat.read_packed(path.parent, 256, TOKENIZER)
    chat.save_file(load_file(path), path, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"packed with seq_length None, now it is 256"):
        chat.read_packed(path.parent, 256, TOKENIZER)
    path.write_bytes(b"torn")
    with pytest.raises(RecipeError, match=r"cannot read .*safetensors"):
        chat.read_packed(path.parent, 256, TOKENIZER)


# Training on it, with no path in the commands


def test_sft_takes_the_sample_until_a_data_prep_has_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "train.steps=3", "output=a", f"output={tmp_path}/a", stage="sft") == 0
    said = capsys.readouterr().out
    assert f"data.train: there is no {tmp_path}/data/sft, so this run takes ../../../samples/chat.jsonl" in said
    prepare_chat(tmp_path)
    assert train(tmp_path, "train.steps=3", f"output={tmp_path}/b", stage="sft") == 0
    said = capsys.readouterr().out
    assert f"data.train: {tmp_path}/data/sft/train/train (manifest of {tmp_path}/data/sft, run " in said

    def figures(name: str) -> list[Any]:
        return [(m["loss"], m.get("val_loss")) for m in read_metrics(tmp_path / name)]

    assert figures("a") == figures("b")
    path = next((tmp_path / "data/sft/train/train").iterdir())
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(RecipeError, match="is not what its manifest tells"):
        train(tmp_path, "train.steps=4", f"output={tmp_path}/b", stage="sft")


def test_pretrain_without_its_data_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.blend: there is no .*data/pretrain/manifest\.json") as caught:
        train(tmp_path)
    assert "data/prep" in str(caught.value)


def test_pretrain_learns_resumes_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_docs(tmp_path, family="super3")
    assert train(tmp_path, "train.steps=3", f"output={tmp_path}/a", family="super3") == 0
    assert train(tmp_path, "train.steps=6", f"output={tmp_path}/a", "train.lr=0.003", family="super3") == 0
    assert "resumed at step 3 of 6" in capsys.readouterr().out
    metrics = read_metrics(tmp_path / "a")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[-1]["loss"] < metrics[0]["loss"] and metrics[-1]["val_loss"] < metrics[0]["loss"]
    assert metrics[0]["tokens"] == 16 * 128
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "a/model").config.layers_block_type) == 5
    # The export is what fine-tuning takes; other data are refused for this checkpoint.
    overrides = [f"model={{path: {tmp_path}/a/model}}", "train.steps=1", f"output={tmp_path}/s"]
    assert train(tmp_path, *overrides, family="super3", stage="sft") == 0
    prepare_docs(tmp_path, "holdout=9", family="super3")
    with pytest.raises(RecipeError, match=r"was trained with data\.train = sha256 \w+, now it is"):
        train(tmp_path, "train.steps=7", f"output={tmp_path}/a", family="super3")


def test_pretrain_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = prepare_docs(tmp_path)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace(chat.fingerprint(TOKENIZER), "other"))
    with pytest.raises(RecipeError, match="was prepared with tokenizer other"):
        train(tmp_path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_ranks_pretrain_what_one_does(tmp_path: Path) -> None:
    prepare_docs(tmp_path)
    assert train(tmp_path, "train.steps=3", f"output={tmp_path}/one") == 0
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    script = [sys.executable, str(RECIPES / "nano3/pretrain/train.py"), "--config", str(config(tmp_path, "nano3/pretrain"))]
    script += [*FEW_STEPS, "train.steps=3", f"output={tmp_path}/two"]
    processes = [
        subprocess.Popen(script, env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[0].count("data.blend:") == 1 and "data.blend:" not in said[1]
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [m["loss"] for m in two] == pytest.approx([m["loss"] for m in one], rel=1e-3)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-3)


def test_a_killed_data_prep_of_tokens_comes_out_the_same(tmp_path: Path) -> None:
    dice = random.Random(3)
    rows = [json.dumps({"text": "x y " * dice.randint(1, 60)}) for _ in range(8000)]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.json").write_text('{"datasets": [{"name": "d", "path": "d.jsonl"}]}')
    script = [sys.executable, str(RECIPES / "nano3/data_prep_pretrain/prep.py")]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SRC)}

    def start(run: Path) -> subprocess.Popen[bytes]:
        command = [*script, "--config", str(config(run, "nano3/data_prep_pretrain")), f"blend={tmp_path}/b.json"]
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def shape(run: Path) -> dict[str, bytes]:
        files = [p for p in (run / "data").rglob("*") if p.is_file() and p.name != ".lock"]
        return {str(p.relative_to(run)): p.read_bytes() for p in files}

    prepare_docs(tmp_path / "whole", f"blend={tmp_path}/b.json")
    run, deadline = tmp_path / "killed", time.monotonic() + 60
    process = start(run)
    while not list((run / "data").rglob("*.bin")):  # at work on the tokens
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (run / "data/pretrain/manifest.json").exists()
    assert start(run).wait() == 0
    assert shape(run) == shape(tmp_path / "whole")


def test_the_samples_stay_small() -> None:
    """They travel with every payload of the starter recipes."""
    assert sum(p.stat().st_size for p in SAMPLES.iterdir()) < 50_000
    assert not [p for p in (SRC / "starter").rglob("*") if p.suffix in (".bin", ".idx", ".parquet")]


def test_config_folders_are_each_recipes_own() -> None:
    for family in ("nano3", "super3"):
        recipes = sorted(p.parent for p in (RECIPES / family).rglob("*.py"))
        assert len(set(recipes)) == len(recipes) and all((p / "config/tiny.yaml").is_file() for p in recipes)
        cfg = parse_args(SFTConfig, ["--config", str(RECIPES / family / "sft/config/tiny.yaml")])
        for path in (cfg.data.train, cfg.data.val):
            assert path and (RECIPES / family / "sft" / path).is_file()
