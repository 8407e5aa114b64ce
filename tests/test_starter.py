"""src/starter: nano3/sft as a person runs it, and the parts that it stands on."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
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
from tokenizers import Tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from starter import chat, checkpoint, sft  # noqa: E402
from starter.config import RecipeError, SFTConfig, TrainConfig, apply_override, build, fill_references, parse_args  # noqa: E402
from starter.dialogue import BadRecordError, Dialogue, Message, read_chat  # noqa: E402
from starter.distributed import World  # noqa: E402
from starter.model import check_memory, load_model, model_config  # noqa: E402
from starter.run import batch_indices, learning_rate  # noqa: E402
from starter.template import Encoded, which_template  # noqa: E402
from starter.trainer import Trainer, loss_sum, shard  # noqa: E402

RECIPE = SRC / "starter/recipes/nano3/sft"
TINY, FINETUNE = RECIPE / "config/tiny.yaml", RECIPE / "config/finetune.yaml"
FEW_STEPS = ["train.warmup_steps=1", "train.log_every=1", "train.eval_every=3", "train.checkpoint_every=3"]
TOKENIZER = chat.byte_tokenizer()
CPU = World(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And no network."""

    def refuse(*args: Any) -> None:
        raise AssertionError(f"the recipe opened a connection: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with as_a_recipe(monkeypatch):
        yield


def train(output: Path, *overrides: str, config: Path = TINY) -> int:
    return sft.run(RECIPE, ["--config", str(config), f"output={output}", *FEW_STEPS, *overrides])


def read_metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def without_speed(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in metrics]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run of 6 steps on one process."""
    output = tmp_path_factory.mktemp("sft") / "out"
    assert train(output, "train.steps=6") == 0
    return output


# Config


def test_the_header_names_the_recipe_and_its_default_config() -> None:
    block = re.search(r"^# /// script\n(.*?)^# ///$", (RECIPE / "train.py").read_text(), re.DOTALL | re.MULTILINE)
    assert block
    header = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))["tool"]["runspec"]
    assert header["name"] == "nano3/sft"
    assert header["run"] == {"launch": "torchrun"}
    assert (RECIPE / header["config"]["dir"] / f"{header['config']['default']}.yaml").is_file()


def test_overrides_go_over_the_yaml_and_its_run_section_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(TINY.read_text() + "run: {env: {container: x}}\n")
    cfg = parse_args(SFTConfig, ["--config", str(path), "train.lr=1e-4", "data.val=null", "train.steps=7", "seed=3"])
    assert (cfg.train.lr, cfg.data.val, cfg.train.steps, cfg.seed) == (1e-4, None, 7, 3)
    assert cfg.train.global_batch_size == 16


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=5", r"unknown key train\.stepz\.\n.*nearest known key is train\.steps\."),
        ("train.steps=many", r"train\.steps must be int, not 'many'"),
        ("train.steps=true", r"train\.steps must be int, not True"),
        ("train.lr=fast", r"train\.lr must be float"),
        ("train.steps=0", r"train\.steps is 0, which is too small"),
        ("train=5", r"train must be a table"),
        ("seed.x=5", r"seed is a value, not a table"),
        ("--fast", r"cannot use the argument"),
        ("model.path=${oc.env:NO_SUCH_VARIABLE}", r"model\.path needs the environment variable NO_SUCH_VARIABLE"),
        ("model.path=${art:model,path}", r"model\.path: cannot resolve"),
        ("data={seq_length: 8}", r"the config lacks data\.train"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str) -> None:
    values = {"output": "o", "seed": 1, "model": {}, "data": {"train": "t", "seq_length": 8}, "train": {}}
    values["train"] = {"steps": 1, "global_batch_size": 1, "lr": 1.0}
    with pytest.raises(RecipeError, match=message) as caught:
        apply_override(values, override)
        build(SFTConfig, fill_references(values))
    assert len(str(caught.value).splitlines()) == 2


def test_env_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/models")
    assert fill_references({"a": ["${oc.env:PLACE}/x", 1], "b": "${oc.env:NO_SUCH_VARIABLE,y}"}) == {
        "a": ["/models/x", 1],
        "b": "y",
    }


# Chat, packing, sharding

MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant"]),
            "content": st.text(max_size=12) | st.sampled_from(["<|im_end|>", "a<|im_start|>assistant\nb", "<|pad|>"]),
        }
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(MESSAGES)
def test_the_mask_is_what_the_assistant_writes(dialogue: list[Message]) -> None:
    [encoded] = chat.encode(Dialogue(dialogue), TOKENIZER)
    assert len(encoded.ids) == len(encoded.mask)
    end = chat.token_id(TOKENIZER, chat.END)
    assert encoded.ids.count(end) == len(dialogue), "a mark inside a text must not end a turn"
    text = "".join(f"{chat.START}{m['role']}\n{m['content']}{chat.END}\n" for m in dialogue)
    assert TOKENIZER.decode(encoded.ids) == text
    answers = [m["content"] + chat.END for m in dialogue if m["role"] == "assistant"]
    assert TOKENIZER.decode([i for i, m in zip(encoded.ids, encoded.mask, strict=True) if m]) == "".join(answers)


def test_the_template_that_is_exported_gives_the_tokens_that_were_learned() -> None:
    for dialogue in read_chat(SRC / "starter/samples/chat.jsonl"):
        [encoded] = chat.encode(dialogue, TOKENIZER)
        assert TOKENIZER.apply_chat_template(dialogue.messages, return_dict=False) == encoded.ids


# Templates in the manner of several models, all but for the names of their marks.
HEADERS = (
    "{% for m in messages %}{{ '<|h|>' + m.role + '</h>\n\n' + m.content + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant</h>\n\n' }}{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '<|eot|>' }}"
    "{% else %}{{ raise_exception('no ' + m.role + ' here') }}{% endif %}{% endfor %}"
)
CLOSED = (  # which writes an end of its own behind all, so that a second answer would find it gone
    "{% for m in messages %}{{ '<|h|>' + m.role + '\n' + m.content + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant\n' }}{% else %}{{ '<s>' }}{% endif %}"
)
SILENT = "{% for m in messages if m.role != 'system' %}{{ m.role + ': ' + m.content + '<|eot|>' }}{% endfor %}"
THINKING = (  # in the manner of Nano 3
    "{% for m in messages %}{% if m.role != 'assistant' %}{{ '<|h|>' + m.role + '\n' + m.content + '<|eot|>\n' }}"
    "{% elif m.reasoning_content %}"
    "{{ '<|h|>assistant\n<think>\n' + m.reasoning_content + '</think>' + m.content + '<|eot|>\n' }}"
    "{% elif '<think>' in m.content %}{{ '<|h|>assistant\n' + m.content + '<|eot|>\n' }}"
    "{% else %}{{ '<|h|>assistant\n<think></think>' + m.content + '<|eot|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant\n<think>' }}"
    "{{ '</think>' if enable_thinking is defined and not enable_thinking else '\n' }}{% endif %}"
)
SHOUTED = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}{{ 'ASSISTANT: ' * add_generation_prompt }}"
FORGETTING = (  # in the manner of Nano 3 and Qwen 3: thoughts before the last question are left out; tools have marks
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}{{ '<|h|>tools\n' + tools | map(attribute='function.name') | join(' ') + '<|eot|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|h|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>' }}"
    "{{ '\n' + m.reasoning_content + '\n' if m.reasoning_content and loop.index0 > ns.last }}{{ '</think>' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<|call|>' + c.function.name }}"
    "{% for k, v in c.function.arguments | items %}{{ ' ' ~ k ~ '=' ~ v }}{% endfor %}{{ '<|/call|>' }}{% endfor %}"
    "{{ '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant\n<think>' }}"
    "{{ '</think>' if (chat_template_kwargs or {}).enable_thinking is false else '\n' }}{% endif %}"
)


def tokenizer_with(template: str) -> Any:
    """Bytes and marks that are not those of ChatML."""
    core = Tokenizer.from_str(json.dumps(json.loads(TOKENIZER.backend_tokenizer.to_str()) | {"added_tokens": []}))
    marks = ["<|h|>", "</h>", "<s>", "<think>", "</think>", "<|call|>", "<|/call|>"]
    tokenizer = type(TOKENIZER)(tokenizer_object=core, eos_token="<|eot|>", additional_special_tokens=marks)
    tokenizer.chat_template = template
    return tokenizer


def said(*contents: str, first: str = "user") -> list[Message]:
    roles = [first, "assistant", *["user", "assistant"] * len(contents)]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def marked(dialogue: list[Message], tokenizer: Any, tools: Any = None) -> list[str]:
    """The texts of a dialogue's sequences, with what is learned in ⟦ and ⟧."""
    texts = []
    for encoded in chat.encode(Dialogue(dialogue, tools), tokenizer):
        runs = itertools.groupby(zip(encoded.ids, encoded.mask, strict=True), key=lambda pair: pair[1])
        parts = [(counts, tokenizer.decode([i for i, _ in run])) for counts, run in runs]
        texts.append("".join(f"⟦{text}⟧" if counts else text for counts, text in parts))
    return texts


def learned(dialogue: list[Message], tokenizer: Any) -> str:
    return "".join(part.split("⟧")[0] for text in marked(dialogue, tokenizer) for part in text.split("⟦")[1:])


@settings(deadline=None)
@given(st.lists(st.text(max_size=12), min_size=2, max_size=7))
def test_a_tokenizers_own_template_is_used(contents: list[str]) -> None:
    tokenizer, dialogue = tokenizer_with(HEADERS), said(*contents)
    [encoded] = chat.encode(Dialogue(dialogue), tokenizer)
    text = "".join(f"<|h|>{m['role']}</h>\n\n{m['content']}<|eot|>" for m in dialogue)
    assert tokenizer.decode(encoded.ids) == text and len(encoded.ids) == len(encoded.mask)
    assert encoded.ids == tokenizer.apply_chat_template(dialogue, return_dict=False)
    answers = [m["content"] + "<|eot|>" for m in dialogue[1::2]]
    assert tokenizer.decode([i for i, m in zip(encoded.ids, encoded.mask, strict=True) if m]) == "".join(answers)
    prompt = chat.prompt_ids(Dialogue(dialogue[:1]), tokenizer)
    assert encoded.ids[: len(prompt)] == prompt and not any(encoded.mask[: len(prompt)])


def test_what_is_learned_is_what_comes_after_the_prompt() -> None:
    assert learned(said("a", "b", "c", "d"), tokenizer_with(INST)) == " b<|eot|> d<|eot|>"
    assert learned(said("a", "b"), tokenizer_with(CLOSED)) == "b<|eot|>"
    thinking, dialogue = tokenizer_with(THINKING), said("a", "b", "c", "<think>\nso</think>d")
    assert learned(dialogue, thinking) == "b<|eot|>so</think>d<|eot|>", "a thought only where it thinks"
    assert learned([dialogue[0], dialogue[1] | {"reasoning_content": "hm"}], thinking) == "hm</think>b<|eot|>"


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": "two"}}}
ADD = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def test_a_template_that_forgets_thoughts_gives_each_turn_a_sequence_of_its_own() -> None:
    tokenizer = tokenizer_with(FORGETTING)
    asked, calling = said("a", "b"), {"role": "assistant", "content": "", "tool_calls": [CALL]}
    first = [asked[0], asked[1] | {"reasoning_content": "hm"}]
    assert marked([*first, *said("c", "d")], tokenizer) == [
        "<|h|>user\na<|eot|>\n<|h|>assistant\n<think>\n⟦hm\n</think>b<|eot|>⟧\n",
        "<|h|>user\na<|eot|>\n<|h|>assistant\n<think></think>b<|eot|>\n"
        "<|h|>user\nc<|eot|>\n<|h|>assistant\n<think></think>⟦d<|eot|>⟧\n",
    ]
    assert len(marked(said("a", "b", "c", "d"), tokenizer)) == 1, "without thoughts there is nothing to forget"
    looped = [asked[0], calling | {"reasoning_content": "so"}, {"role": "tool", "content": "3"}, first[1]]
    assert marked(looped, tokenizer, ADD) == [
        "<|h|>tools\nadd<|eot|>\n<|h|>user\na<|eot|>\n"
        "<|h|>assistant\n<think>\n⟦so\n</think><|call|>add x=1 y=two<|/call|><|eot|>⟧\n<|h|>tool\n3<|eot|>\n"
        "<|h|>assistant\n<think>\n⟦hm\n</think>b<|eot|>⟧\n"
    ], "one turn, however many steps it takes"
    assert marked(said("a", "b", "c", "d"), tokenizer_with(CLOSED)) == [
        "<|h|>user\na<|eot|>\n<|h|>assistant\n⟦b<|eot|>⟧\n<s>",
        "<|h|>user\na<|eot|>\n<|h|>assistant\nb<|eot|>\n<|h|>user\nc<|eot|>\n<|h|>assistant\n⟦d<|eot|>⟧\n<s>",
    ]


WORDS = st.text("ab <\n", max_size=4)
TURN = st.tuples(WORDS, st.lists(WORDS, max_size=2), WORDS, WORDS)  # question, tool answers, thought, answer


@settings(deadline=None)
@given(st.lists(TURN, min_size=1, max_size=4), st.sampled_from([FORGETTING, THINKING]))
def test_each_answer_is_learned_once_and_as_it_was_given(turns: list[Any], template: str) -> None:
    dialogue: list[Message] = []
    answers = []
    for question, steps, thought, answer in turns:
        dialogue.append({"role": "user", "content": question})
        for step in steps if template == FORGETTING else []:
            call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
            dialogue += [call, {"role": "tool", "content": step}]
            answers.append("<|call|>add x=1 y=two<|/call|><|eot|>")
        dialogue.append({"role": "assistant", "content": answer} | ({"reasoning_content": thought} if thought else {}))
        end = "\n</think>" if template == FORGETTING else "</think>"
        answers.append((thought + end if thought else "") + answer + "<|eot|>")
    tokenizer, tools = tokenizer_with(template), ADD if template == FORGETTING else None
    texts = marked(dialogue, tokenizer, tools)
    assert re.findall("⟦(.*?)⟧", "".join(texts), re.DOTALL) == answers
    plain = [re.sub("[⟦⟧]", "", text) for text in texts]
    ends = [i + 1 for i, message in enumerate(dialogue) if message["role"] == "assistant"]
    shown = [tokenizer.apply_chat_template(dialogue[:end], tools=tools, tokenize=False) for end in ends]
    assert set(plain) <= set(shown) and plain[-1] == shown[-1]


def test_an_empty_thought_of_the_template_is_not_learned() -> None:
    opens_none = (  # in the manner of Qwen 3: the prompt has a thought only where it is off
        "{% for m in messages %}{{ '<|h|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n' }}{% endif %}"
        "{{ m.content + '<|eot|>\n' }}{% endfor %}{{ '<|h|>assistant\n' if add_generation_prompt }}"
        "{{ '<think>\n\n</think>\n' if add_generation_prompt and enable_thinking is false }}"
    )
    dialogue = said("a", "b", "c", "d")
    dialogue[1]["reasoning_content"] = "hm"
    assert learned(dialogue, tokenizer_with(opens_none)) == "<think>\nhm\n</think>\nb<|eot|>d<|eot|>"


def test_tools_that_a_template_does_not_show_are_refused() -> None:
    with pytest.raises(BadRecordError, match="leaves out its tools"):
        marked(said("a", "b"), tokenizer_with(HEADERS), ADD)
    with pytest.raises(BadRecordError, match=r"one of its tools spells <\|eot\|>"):
        marked(said("a", "b"), tokenizer_with(FORGETTING), [{"function": {"name": "<|eot|>"}}])


@pytest.mark.parametrize(
    ("template", "dialogue", "message"),
    [
        (CLOSED, said("a", "b", "c"), r"writes what precedes message 3 in another way .*\n.*follows the last answer"),
        (SHOUTED, said("a", "b"), r"writes what precedes message 2 in another way .*\n.*whose prompt is what"),
        (INST, said("a", "b", first="system"), r"chat template fails on it \(TemplateError: no system here\)"),
        ("{{ nothing.at.all }}", said("a", "b"), "chat template fails on it"),
        (SILENT, said("be brief", "b", first="system"), "leaves out the content of message 1"),
        (HEADERS, [said("a")[0], said("a", "b")[1] | {"reasoning_content": "hm"}], "leaves out the reasoning_content"),
        (HEADERS, said("a", "b", "x<|eot|>", "y"), r"message 3 spells <\|eot\|>, a special token"),
        (THINKING, said("<think>", "b"), r"message 1 spells <think>"),
        (HEADERS, said("a", "b")[1:], "the assistant has the first word"),
        (HEADERS, [*said("a"), {"role": "assistant", "tool_calls": [CALL]}], "leaves out the tool_calls of message 2"),
    ],
)
def test_what_a_template_cannot_render_is_named(
    tmp_path: Path, template: str, dialogue: list[Message], message: str
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n" + json.dumps({"messages": dialogue}))
    with pytest.raises(RecipeError, match=rf"d\.jsonl:2: .*{message}") as caught:
        chat.load_packed(path, 64, tokenizer_with(template))
    assert len(str(caught.value).splitlines()) == 2


def test_a_folder_for_chat_has_a_template_or_the_marks(tmp_path: Path) -> None:
    tokenizer_with(HEADERS).save_pretrained(tmp_path / "own")
    tokenizer = chat.load_tokenizer(str(tmp_path / "own"))
    assert which_template(tokenizer) == "chat template: the tokenizer's own"
    assert learned(said("a", "b"), tokenizer) == "b<|eot|>"
    TOKENIZER.save_pretrained(tmp_path / "built-in")
    assert which_template(chat.load_tokenizer(str(tmp_path / "built-in"))) == "chat template: ChatML, as built in"
    (tmp_path / "own/chat_template.jinja").unlink()
    with pytest.raises(RecipeError, match=r"no chat template, and for ChatML no .*\nGive model\.tokenizer=FOLDER"):
        chat.load_tokenizer(str(tmp_path / "own"))


@st.composite
def encoded_dialogues(draw: st.DrawFn) -> list[Encoded]:
    masks = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=12))
    ids = iter(range(1, 1 + sum(map(len, masks))))
    return [Encoded([next(ids) for _ in mask], mask) for mask in masks]


@settings(deadline=None)
@given(encoded_dialogues(), st.integers(1, 16))
def test_packing_keeps_every_token_once_and_in_order(dialogues: list[Encoded], seq_length: int) -> None:
    packed = chat.pack(dialogues, seq_length, padding=0)
    assert packed.input_ids.shape == packed.labels.shape == (len(packed), seq_length)
    rows = [ids[:n].tolist() for ids, n in zip(packed.input_ids, packed.lengths, strict=True)]
    labels = [row[:n].tolist() for row, n in zip(packed.labels, packed.lengths, strict=True)]
    assert [i for row in rows for i in row] == [i for d in dialogues for i in d.ids]
    expected = [i if m else chat.IGNORE for d in dialogues for i, m in zip(d.ids, d.mask, strict=True)]
    assert [i for row in labels for i in row] == expected
    for ids, row, n in zip(packed.input_ids, packed.labels, packed.lengths, strict=True):
        assert n > 0 and not ids[n:].any() and (row[n:] == chat.IGNORE).all()
    for d in dialogues:
        if len(d.ids) <= seq_length:
            assert any(set(d.ids) <= set(row) for row in rows), "a dialogue that fits must not be cut"


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_holds_every_sample_once_over_all_ranks(size: int, ranks: int, batch: int, seed: int) -> None:
    worlds = [World(rank, ranks, CPU.device) for rank in range(ranks)]
    seen: list[int] = []
    for first in range(0, 2 * size, batch):
        indices = batch_indices(size, seed, first, batch)
        assert sorted(i for w in worlds for i in shard(indices, w)) == sorted(indices)
        seen += indices
    assert sorted(seen[:size]) == sorted(seen[size : 2 * size]) == list(range(size))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a chat record"),
        ("[]", "not a chat record"),
        ('{"messages": [{"role": "user"}]}', "not a chat record.*content"),
        ('{"messages": [{"role": "critic", "content": ""}]}', "unknown role 'critic'"),
        ('{"messages": [{"role": "assistant", "content": 5}]}', "not a string"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no message of the assistant"),
        ('{"messages": [{"role": "assistant", "content": "a\\ud800"}]}', "half of a surrogate pair"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{}]}]}', "not a chat record.*name"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}', "not a chat record"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": 1}]}]}', "a table of arguments"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{"name": "\\ud800"}]}]}', "half of a surrogate pair"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "not a string"),
        ('{"messages": [{"role": "assistant", "content": "", "function_call": {"f": 1}}]}', "it has function_call"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "tools": [1]}', "its tools are no list of tables"),
    ],
)
def test_a_bad_line_of_data_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "ok"}]}\n\n' + line + "\n")
    with pytest.raises(RecipeError, match=rf"d\.jsonl:3: .*{message}"):
        read_chat(path)


# Model and optimizer


def tiny_model(**changes: Any) -> torch.nn.Module:
    cfg = parse_args(SFTConfig, ["--config", str(TINY)]).model
    cfg.config.update(changes)
    torch.manual_seed(0)
    return load_model(cfg, model_config(cfg, TOKENIZER), weights=True)


def test_every_parameter_has_a_gradient_though_most_experts_are_idle() -> None:
    model = tiny_model(n_routed_experts=32)  # DDP goes without find_unused_parameters for this reason
    ids = torch.tensor([[1, 2, 3]])
    loss_sum(model, ids, ids).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_padding_and_masked_tokens_do_not_count() -> None:
    model = tiny_model().eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    padded = torch.cat([ids, torch.full((1, 28), 257)], dim=1)
    labels = torch.full_like(padded, chat.IGNORE)
    labels[0, 2] = 7
    logits = model(input_ids=ids).logits
    expected = -logits.log_softmax(-1)[0, 1, 7]
    torch.testing.assert_close(loss_sum(model, padded, labels), expected)


def test_the_learning_rate_rises_and_falls() -> None:
    cfg = TrainConfig(steps=100, global_batch_size=1, lr=1.0, warmup_steps=10)
    rates = [learning_rate(step, cfg) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=/no/such/folder", "model.config={}"], "folder /no/such/folder does not exist"),
        (["model.path=/tmp"], "both model.path and model.config"),
        (["model.config.hiden_size=8"], r"unknown key model\.config\.hiden_size.\n.*model\.config\.hidden_size"),
        (["model.config.hidden_size=big"], "model.config is not valid"),
        (["model.config.vocab_size=100"], "vocab_size is 100"),
        (["model.tokenizer=/no/such/folder"], r"folder /no/such/folder does not exist\.\nGive model\.tokenizer=bytes"),
        (["model.tokenizer=null"], "names no tokenizer"),
        (["data.train=none.jsonl"], "cannot read the data file .*none.jsonl"),
        (["train.lr=1e30", "train.steps=9", "train.clip_grad_norm=1e30"], "gradient is not finite at step"),
        (["output=/proc/x"], "cannot write to /proc/x"),
    ],
)
def test_what_cannot_be_trained_is_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        train(tmp_path, *overrides)
    assert len(str(caught.value).splitlines()) == 2


def test_fewer_samples_than_ranks_is_an_error() -> None:
    cfg = TrainConfig(steps=1, global_batch_size=3, lr=1.0)
    data = chat.pack([Encoded([1], [True])], 8, 0)
    with pytest.raises(RecipeError, match="fewer than the 4 ranks"):
        Trainer(tiny_model(), data, None, cfg, 0, Path(), {}, World(0, 4, CPU.device))  # type: ignore[arg-type]


def test_a_model_that_no_gpu_holds_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 1 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cfg = parse_args(SFTConfig, ["--config", str(TINY)]).model
    with pytest.raises(RecipeError, match="does not shard"):
        check_memory(model_config(cfg, TOKENIZER), torch.device("cuda", 0))


# Runs on one process


def test_the_loss_falls(tmp_path: Path) -> None:
    assert train(tmp_path, "train.steps=30", "train.warmup_steps=5", "train.eval_every=30") == 0
    metrics = read_metrics(tmp_path)
    assert metrics[0]["loss"] > 5
    assert metrics[-1]["loss"] < 2 and metrics[-1]["val_loss"] < 2


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_step = Trainer.train_step

    def die_in_step_6(self: Trainer) -> tuple[torch.Tensor, dict[str, float]]:
        if self.step == 5:
            raise MemoryError  # as good as a kill: nothing of ours handles it
        return real_step(self)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Trainer, "train_step", die_in_step_6)
        train(tmp_path, "train.steps=6")
    assert read_metrics(tmp_path)[-1]["step"] == 5, "ahead of the checkpoint of step 3"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')

    assert train(tmp_path, "train.steps=6") == 0
    assert "resumed at step 3 of 6" in capsys.readouterr().out
    assert without_speed(read_metrics(tmp_path)) == without_speed(read_metrics(done))
    whole, resumed = (torch.load(output / "checkpoints/step-00000006.pt") for output in (done, tmp_path))
    for name in ("fingerprint", "config"):
        assert resumed.pop(name) == whole.pop(name)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_a_finished_run_ends_at_once_and_more_steps_extend_it(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "copy"
    subprocess.run(["cp", "-r", done, output], check=True)
    before = (output / "metrics.jsonl").read_bytes()
    assert train(output, "train.steps=6") == 0
    assert "resumed at step 6 of 6: nothing left to train, val_loss" in capsys.readouterr().out
    assert (output / "metrics.jsonl").read_bytes() == before

    assert train(output, "train.steps=7") == 0
    assert [line["step"] for line in read_metrics(output)] == [1, 2, 3, 4, 5, 6, 7]
    assert json.loads((output / "model/training.json").read_text())["step"] == 7
    assert len(list((output / "checkpoints").iterdir())) == 2


def test_another_config_does_not_pass_for_the_one_that_was_trained(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "copy"
    subprocess.run(["cp", "-r", done, output], check=True)
    assert json.loads((output / "config.json").read_text())["train.steps"] == 6
    with pytest.raises(RecipeError, match=r"step 6 of 6 was reached with another config: train\.lr was .* is 0\.5"):
        train(output, "train.steps=6", "train.lr=0.5")
    capsys.readouterr()
    assert train(output, "train.steps=7", "train.lr=0.5", "train.log_every=3") == 0
    said = capsys.readouterr().out
    assert "changed since the checkpoint: train.lr was" in said and "train.steps was 6 and is 7" in said
    assert "log_every" not in said and json.loads((output / "config.json").read_text())["train.lr"] == 0.5


def test_a_second_job_does_not_write_to_the_same_folder(done: Path, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    subprocess.run(["cp", "-r", done, output], check=True)
    holder = (
        "import fcntl, os, sys, time; lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); fcntl.lockf(lock, "
        "fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holder, str(output / ".lock")], stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with pytest.raises(RecipeError, match=r"another run writes to .*\n.*--name NAME"):
            train(output, "train.steps=7")
        other.kill()
    assert train(output, "train.steps=7") == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=../../../samples/chat-val.jsonl"], r"trained with data\.train = sha256 \w+, now it is sha256"),
        (["data.seq_length=128"], r"trained with data\.seq_length = 256, now it is 128"),
        (["model.config.ssm_state_size=8"], r"trained with model\.ssm_state_size = 16, now it is 8"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(done: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        train(done, "train.steps=6", *overrides)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000003.pt").write_bytes(b"PK torn")
    with pytest.raises(RecipeError, match=r"step-00000003\.pt is damaged\.\nRemove it"):
        train(tmp_path)


def test_a_checkpoint_is_whole_or_absent(tmp_path: Path) -> None:
    state: dict[str, Any] = {"step": 1, "x": torch.ones(3)}
    checkpoint.save_checkpoint(tmp_path, state, keep=2)

    def torn(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RecipeError, match=r"cannot write .*No space left on device\nFree space"):
        checkpoint.write_atomically(tmp_path / "step-00000002.pt", torn)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_the_export_is_the_model_and_finetune_takes_it(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(done / "model")
    weights = torch.load(done / "checkpoints/step-00000006.pt")["model"]
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    text = "héllo\n<|im_end|>"
    assert AutoTokenizer.from_pretrained(done / "model").encode(text) == TOKENIZER.encode(text)
    assert json.loads((done / "model/training.json").read_text())["tokenizer"] == "bytes"

    monkeypatch.setenv("MODEL_PATH", str(done / "model"))
    tiny = ["data.seq_length=256", "train.global_batch_size=16", "train.micro_batch_size=8", "train.steps=2"]
    assert train(tmp_path, *tiny, config=FINETUNE) == 0
    first = read_metrics(tmp_path)[0]["loss"]
    assert first == pytest.approx(read_metrics(done)[-1]["loss"], rel=0.15), "it must start where the other ended"
    (done / "model/model.safetensors").rename(tmp_path / "away")
    with pytest.raises(RecipeError, match="cannot load"):
        train(tmp_path / "other", *tiny, config=FINETUNE)
    (tmp_path / "away").rename(done / "model/model.safetensors")


def test_a_bfloat16_checkpoint_is_exported_as_one(done: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(done / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    TOKENIZER.save_pretrained(tmp_path / "bf16")
    sizes = ["data.seq_length=256", "train.global_batch_size=2", "train.steps=1", f"model.path={tmp_path / 'bf16'}"]
    assert train(tmp_path / "out", *sizes, config=FINETUNE) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model", dtype="auto").state_dict()
    assert exported["lm_head.weight"].dtype == torch.bfloat16
    assert exported["model.layers.1.mixer.gate.e_score_correction_bias"].dtype == torch.float32


# Runs on two processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: list[str], output: Path, log: Path, *overrides: str, **env: str) -> subprocess.Popen[bytes]:
    base = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SRC), "NEMO_RUN_DIR": str(output.parent)}
    base |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HOME": str(output.parent)}
    arguments = [str(RECIPE / "train.py"), "--config", str(TINY), f"output={output.name}", *FEW_STEPS, *overrides]
    with log.open("wb") as file:
        return subprocess.Popen([*command, *arguments], env=base | env, stdout=file, stderr=subprocess.STDOUT)


def end(processes: list[subprocess.Popen[bytes]], logs: list[Path], timeout: float = 90) -> list[int]:
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for log in logs:
            print(log.read_text())


def test_two_ranks_under_torchrun_learn_what_one_learns(done: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "static", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    output, logs = tmp_path / "out", [tmp_path / "0.log", tmp_path / "1.log"]
    processes = [
        start([*torchrun, "--node-rank", str(rank)], output, logs[rank], "train.steps=4", "train.micro_batch_size=3")
        for rank in (0, 1)
    ]
    assert end(processes, logs) == [0, 0]
    metrics = read_metrics(output)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert {line["world_size"] for line in metrics} == {2}
    alone = read_metrics(done)
    assert metrics[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-5)
    assert metrics[2]["val_loss"] == pytest.approx(alone[2]["val_loss"], rel=1e-2)  # another schedule by then
    assert [line["tokens"] for line in metrics] == [line["tokens"] for line in alone[:4]]
    assert (output / "checkpoints/step-00000004.pt").is_file() and (output / "model/config.json").is_file()
    assert "Warning" not in logs[0].read_text() + logs[1].read_text()


def test_a_signal_to_one_rank_ends_both_with_a_checkpoint(tmp_path: Path) -> None:
    output, logs, port = tmp_path / "out", [tmp_path / "0.log", tmp_path / "1.log"], str(free_port())
    rendezvous = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        start([sys.executable], output, logs[rank], "train.steps=100000", RANK=str(rank), **rendezvous)
        for rank in (0, 1)
    ]
    deadline = time.monotonic() + 60
    while not (output / "metrics.jsonl").exists() or len(read_metrics(output)) < 2:
        assert time.monotonic() < deadline and processes[0].poll() is None, logs[0].read_text()
        time.sleep(0.1)
    processes[1].terminate()
    assert end(processes, logs) == [143, 143]
    stopped = re.search(r"SIGTERM: stopped after step (\d+), checkpoint saved", logs[0].read_text())
    assert stopped
    newest = checkpoint.newest_checkpoint(output / "checkpoints")
    assert newest and newest.name == f"step-{int(stopped[1]):08d}.pt"
    assert read_metrics(output)[-1]["step"] == int(stopped[1])
