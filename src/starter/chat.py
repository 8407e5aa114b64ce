"""Chat data: JSONL dialogues → token ids by a chat template, with a loss mask → sequences of one length.

A dialogue is a list of messages. The tokenizer's own chat template renders them; without one each becomes, in ChatML,

    <|im_start|>ROLE\\nCONTENT<|im_end|>\\n

and the loss counts what the assistant has to write: the CONTENT and the end mark of its messages.
Dialogues share a sequence, one after the other; nothing hides the earlier ones from the later, since the state of a
Mamba layer runs through the sequence in any case.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from starter import manifest
from starter.config import RecipeError
from starter.files import sync_file

T = TypeVar("T")

IGNORE = -100  # the label of a token that is no target
ROLES = ("system", "user", "assistant")
RENDERED = ("content", "reasoning_content")  # what a message says …
NOT_RENDERED = ("tool_calls", "function_call", "tools", "functions")  # … and what no recipe here renders
THOUGHT = ("<think>", "</think>")  # marks that the assistant may write itself
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Dialogue = list[dict[str, str]]


@dataclass(frozen=True)
class Encoded:
    """One dialogue: its token ids, and for each whether the loss counts it."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class Packed:
    """N sequences of length L. The loss counts a token where its mask is set, and compares it with the token before."""

    input_ids: torch.Tensor  # [N, L], int32
    mask: torch.Tensor  # [N, L], bool
    lengths: torch.Tensor  # [N], int32: tokens before the padding

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def seq_length(self) -> int:
        return self.input_ids.shape[1]

    @property
    def labels(self) -> torch.Tensor:
        """[N, L], int64: a token's id, or IGNORE."""
        return self.batch(list(range(len(self))))[1]

    def batch(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels of some sequences, int64."""
        ids = self.input_ids[indices].long()
        return ids, torch.where(self.mask[indices], ids, IGNORE)

    def tokens(self, indices: list[int]) -> int:
        return int(self.lengths[indices].sum())

    def digest(self) -> str:
        found = hashlib.sha256(self.input_ids.numpy().tobytes())
        found.update(self.mask.numpy().tobytes())
        return found.hexdigest()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without a vocabulary file: one token for each byte, and the chat marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PAD, additional_special_tokens=[START]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(name: str, chat: bool = True, key: str = "model.tokenizer") -> PreTrainedTokenizerBase:
    """The byte tokenizer, or the one in a local folder. For chat it needs a template, or the marks of ChatML as tokens.

    ``key`` is where the recipe's config names it.
    """
    if name == "bytes":
        return byte_tokenizer()
    if not Path(name).is_dir():
        raise RecipeError(f"the tokenizer folder {name} does not exist.\nGive {key}=bytes or a local folder.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"no tokenizer in {name}: {first_line(error)}\nGive {key}=FOLDER.") from error
    if chat:
        check_chat(tokenizer, name, key)
    return tokenizer


def check_chat(tokenizer: PreTrainedTokenizerBase, name: str, key: str) -> None:
    missing = [mark for mark in (START, END) if mark not in tokenizer.get_vocab()]
    if own_template(tokenizer) and not tokenizer.is_fast:  # only these tell which text a token stands for
        raise RecipeError(
            f"the tokenizer in {name} has a chat template, and no tokenizer.json.\n"
            f"Give {key}=FOLDER, with the tokenizer in that format."
        )
    if missing and not own_template(tokenizer):
        raise RecipeError(
            f"the tokenizer in {name} has no chat template, and for ChatML no {' and no '.join(missing)}.\n"
            f"Give {key}=FOLDER, one that is for chat."
        )


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template. None where it has none, or the one that is built in here."""
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    return None if template == CHAT_TEMPLATE else template


def which_template(tokenizer: PreTrainedTokenizerBase) -> str:
    return "chat template: " + ("the tokenizer's own" if own_template(tokenizer) else "ChatML, as built in")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_chat(path: Path) -> list[Dialogue]:
    return read_lines(path, parse_dialogue)


def read_lines(path: Path, parse: Callable[[bytes], T]) -> list[T]:
    """Read JSONL: ``{"messages": [{"role": …, "content": …}, …]}``. A bad line is an error: none is skipped."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecipeError(
            f"cannot read the data file {path}: {error.strerror}.\nSee data.train and data.val."
        ) from error
    parsed = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                parsed.append(parse(line))
            except BadRecordError as error:
                raise RecipeError(f"{path}:{number}: {error.what}.\n{error.fix}") from error
    if not parsed:
        raise RecipeError(f"{path} holds no dialogue.\nPut one JSON object with messages on each line.")
    return parsed


class BadRecordError(ValueError):
    """What is wrong with a record, wherever it stands, and what to do about it."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


def parse_dialogue(line: bytes) -> Dialogue:
    try:
        record = json.loads(line)
        messages = record["messages"]
        dialogue = [{"role": message["role"], "content": message["content"]} for message in messages]
        tables = [record, *messages]
        for message, parsed in zip(messages, dialogue, strict=True):
            if message.get("reasoning_content"):
                parsed["reasoning_content"] = message["reasoning_content"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRecordError(
            f"not a chat record ({type(error).__name__}: {error})",
            'Write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.',
        ) from error
    for field in NOT_RENDERED:
        if any(table.get(field) for table in tables):
            raise BadRecordError(f"it has {field}, which would be left out", "Empty that, or drop the line.")
    for message in dialogue:
        check_message(message)
    if all(message["role"] != "assistant" for message in dialogue):
        raise BadRecordError("no message of the assistant to learn from", "Add one or drop the line.")
    return dialogue


def check_message(message: dict[str, str]) -> None:
    if message["role"] not in ROLES:
        raise BadRecordError(f"unknown role {message['role']!r}", f"Use {', '.join(ROLES)}.")
    for field in RENDERED:
        text = message.get(field, "")
        if not isinstance(text, str):
            raise BadRecordError(f"the {field} of a message is not a string", "Put its text there.")
        if not is_unicode(text):
            raise BadRecordError(f"the {field} of a message {HALF_A_PAIR[0]}", HALF_A_PAIR[1])


HALF_A_PAIR = ("holds half of a surrogate pair", "Mend that line: half a character is no text.")


def is_unicode(text: str) -> bool:
    r"""Not so with \ud800 alone, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    return tokenizer.get_vocab()[token]


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What ends a turn or a document: the chat mark, or with a tokenizer that is not for chat its own."""
    if END not in tokenizer.get_vocab() and not tokenizer.eos_token:
        raise RecipeError(f"the tokenizer has neither {END} nor an eos_token.\nGive a tokenizer that ends documents.")
    return token_id(tokenizer, END if END in tokenizer.get_vocab() else str(tokenizer.eos_token))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a sequence up. Nothing learns from it, so that any token will do where the tokenizer has none."""
    return token_id(tokenizer, str(tokenizer.pad_token)) if tokenizer.pad_token else end_id(tokenizer)


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text, in which marks are text, so that no content ends a turn."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Token ids of a dialogue, by the tokenizer's own template or else in ChatML."""
    return encode_by_template(dialogue, tokenizer) if own_template(tokenizer) else encode_chatml(dialogue, tokenizer)


def prompt_ids(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a dialogue, up to where the assistant begins to write."""
    if own_template(tokenizer):
        refuse_marks(dialogue, tokenizer)
        return tokenize_marked(render(dialogue, tokenizer, add_generation_prompt=True), tokenizer)["input_ids"]
    encoded = encode_chatml(dialogue, tokenizer)
    return [*encoded.ids, token_id(tokenizer, START), *text_ids("assistant\n", tokenizer)]


# ---------------------------------------------------------------- ChatML


def encode_chatml(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    start, end = token_id(tokenizer, START), token_id(tokenizer, END)
    ids: list[int] = []
    mask: list[bool] = []
    for message in dialogue:
        if message.get("reasoning_content"):
            raise BadRecordError(
                "it has reasoning_content, for which ChatML has no place",
                "Empty that, or give a tokenizer with a chat template that takes it.",
            )
        header = [start, *text_ids(f"{message['role']}\n", tokenizer)]
        body = [*text_ids(message["content"], tokenizer), end]
        newline = text_ids("\n", tokenizer)
        ids += header + body + newline
        answer = message["role"] == "assistant"
        mask += [False] * len(header) + [answer] * len(body) + [False] * len(newline)
    return Encoded(ids, mask)


# ---------------------------------------------------------------- the tokenizer's own template


def encode_by_template(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    refuse_marks(dialogue, tokenizer)
    text, answers = render_answers(dialogue, tokenizer)
    refuse_losses(dialogue, text)
    found = tokenize_marked(text, tokenizer, return_offsets_mapping=True)
    counted = bytearray(len(text) + 1)  # for each place in the text, whether a token that ends there counts
    for start, end in answers:
        counted[start + 1 : end + 1] = b"\1" * (end - start)
    return Encoded(found["input_ids"], [bool(counted[end]) for _, end in found["offset_mapping"]])


def render_answers(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The dialogue's text, and where in it the assistant writes: from its prompt to the mark that ends its turn.

    For that the template must write what it wrote before, and add to it, with each message that follows.
    """
    text, answers = "", []
    for i, message in enumerate(dialogue):
        if message["role"] == "assistant":
            before, text = text, render(dialogue[: i + 1], tokenizer)
            prompt = next((p for p in prompts(dialogue[:i], tokenizer) if text.startswith(p)), None)
            if prompt is None or not prompt.startswith(before):
                raise unsteady(i)
            answers.append((len(prompt), end_of_turn(text, len(prompt), tokenizer)))
    whole = render(dialogue, tokenizer)
    if not whole.startswith(text):
        raise unsteady(len(dialogue) - 1)
    return whole, answers


def prompts(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the assistant may be shown before it writes: some templates open a thought for it, or leave one out."""
    if not dialogue:
        raise BadRecordError("the assistant has the first word", "Put before it what it answers, or drop the line.")
    yield render(dialogue, tokenizer, add_generation_prompt=True)
    yield render(dialogue, tokenizer, add_generation_prompt=True, enable_thinking=False)


def unsteady(i: int) -> BadRecordError:
    return BadRecordError(
        f"the chat template writes what precedes message {i + 1} in another way once that is there",
        "Give dialogues with one answer each, or a tokenizer with a template that only adds to what it wrote.",
    )


def render(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(dialogue, chat_template=own_template(tokenizer), tokenize=False, **settings)
        )
    except Exception as error:  # a template is a program, which raises what it likes
        raise BadRecordError(
            f"the tokenizer's chat template fails on it ({type(error).__name__}: {first_line(error)})",
            "Mend the line, or the template.",
        ) from error


def end_of_turn(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Behind the first mark that is no thought's; without a mark, all that the template wrote is the turn."""
    ends = (found.end() for found in marks(tokenizer).finditer(text, start) if found[0] not in THOUGHT)
    return next(ends, len(text))


@functools.lru_cache(maxsize=2)
def marks(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    every = {*added, *tokenizer.all_special_tokens}
    return re.compile("|".join(re.escape(mark) for mark in sorted(every, key=len, reverse=True)) or "(?!)")


def tokenize_marked(text: str, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Any:
    """The tokens of a text in which marks are marks."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False, **settings)


def refuse_marks(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> None:
    """A mark that a message spells would end its turn: in what a template has written they are all alike."""
    for number, message in enumerate(dialogue, 1):
        for mark in marks(tokenizer).findall("\n".join(message.get(field, "") for field in RENDERED)):
            if mark not in THOUGHT or message["role"] != "assistant":
                raise BadRecordError(
                    f"message {number} spells {mark}, a special token of the tokenizer",
                    "Write it in another way, or drop the line.",
                )


def refuse_losses(dialogue: Dialogue, text: str) -> None:
    for number, message in enumerate(dialogue, 1):
        for field in RENDERED:
            said = message.get(field, "").strip()
            if said not in text and THOUGHT[1] not in said:  # around thoughts, templates change the blanks
                raise BadRecordError(
                    f"the tokenizer's chat template leaves out the {field} of message {number}",
                    "Empty it, or give a tokenizer with a template that takes it.",
                )


# ---------------------------------------------------------------- packing


def pack(dialogues: Iterable[Encoded], seq_length: int, padding: int) -> Packed:
    """Fill sequences with whole dialogues, in their order; only one that is longer than a sequence is cut."""
    ids, mask, lengths = array("i"), bytearray(), array("i")
    for row in pack_rows(dialogues, seq_length):
        missing = seq_length - len(row.ids)
        ids.extend(row.ids + [padding] * missing)
        mask.extend(bytes(row.mask) + bytes(missing))
        lengths.append(len(row.ids))
    if not lengths:
        return Packed(torch.empty(0, seq_length), torch.empty(0, seq_length), torch.empty(0))
    shape = (len(lengths), seq_length)
    return Packed(
        torch.frombuffer(ids, dtype=torch.int32).view(shape),
        torch.frombuffer(mask, dtype=torch.bool).view(shape),
        torch.frombuffer(lengths, dtype=torch.int32),
    )


def pack_rows(dialogues: Iterable[Encoded], seq_length: int) -> Iterator[Encoded]:
    row = Encoded([], [])
    for dialogue in dialogues:
        if len(row.ids) + len(dialogue.ids) > seq_length and row.ids:
            yield row
            row = Encoded([], [])
        row = Encoded(row.ids + dialogue.ids, row.mask + dialogue.mask)
        while len(row.ids) > seq_length:
            yield Encoded(row.ids[:seq_length], row.mask[:seq_length])
            row = Encoded(row.ids[seq_length:], row.mask[seq_length:])
    if row.ids:
        yield row


def load_packed(path: Path, seq_length: int, tokenizer: PreTrainedTokenizerBase) -> Packed:
    """The sequences of a chat file, packed now, or of a folder that data/prep/sft has packed."""
    if path.is_dir():
        return read_packed(path, seq_length, tokenizer)
    encoded = read_lines(path, lambda line: encode(parse_dialogue(line), tokenizer))
    return pack(encoded, seq_length, pad_id(tokenizer))


def fingerprint(tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> str:
    """Two tokenizers with one fingerprint make the same numbers of the same text, and for chat of the same dialogue."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    facts: dict[str, Any] = json.loads(core.to_str()) if core else {"vocab": tokenizer.get_vocab()}
    for state in ("truncation", "padding"):  # of the last call
        facts.pop(state, None)
    parts = [facts, tokenizer.eos_token, tokenizer.pad_token, *([own_template(tokenizer)] if chat else [])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def packed_with(seq_length: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {"seq_length": seq_length, "tokenizer": fingerprint(tokenizer, chat=True)}


def write_packed(path: Path, packed: Packed, tokenizer: PreTrainedTokenizerBase) -> None:
    # Under one key: safetensors writes several in an order of chance.
    facts = {"prep": json.dumps(packed_with(packed.seq_length, tokenizer), sort_keys=True)}
    tensors = {"input_ids": packed.input_ids, "loss_mask": packed.mask, "lengths": packed.lengths}
    save_file(tensors, path, metadata=facts)
    sync_file(path)


def read_packed(folder: Path, seq_length: int, tokenizer: PreTrainedTokenizerBase) -> Packed:
    wanted = packed_with(seq_length, tokenizer)
    shards = []
    for path in packed_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("prep", "{}"))
                shards.append([file.get_tensor(name) for name in ("input_ids", "loss_mask", "lengths")])
        except (SafetensorError, OSError, ValueError) as error:
            raise RecipeError(f"cannot read {path}: {first_line(error)}\nRun its data prep again.") from error
        for name, value in wanted.items():
            if facts.get(name) != value:
                raise RecipeError(
                    f"{path} was packed with {name} {facts.get(name)}, now it is {value}.\n"
                    "Run data/prep/sft with the seq_length and the tokenizer of this recipe."
                )
    if not shards:
        raise RecipeError(f"{folder} holds no packed sequences.\nRun data/prep/sft, or name a chat file.")
    return Packed(*(torch.cat(tensors) for tensors in zip(*shards, strict=True)))


def packed_files(folder: Path) -> list[Path]:
    """The files that the manifest lists; where there is none, all that are there."""
    there = sorted(folder.glob("*.safetensors"))
    owned = manifest.owner(folder)
    if not owned:
        return there
    root, found, name = owned
    listed = {folder / Path(file).name for file in manifest.files_of(found, name) if Path(file).parent == Path(name)}
    for path in there:
        if path not in listed:
            raise RecipeError(f"{path} is not in {root / 'manifest.json'}.\nMove it away, or run data/prep/sft again.")
    return sorted(listed)
