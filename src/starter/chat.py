"""Chat data: JSONL dialogues → ChatML token ids with a loss mask → sequences of one length.

A dialogue is a list of messages. Each becomes

    <|im_start|>ROLE\\nCONTENT<|im_end|>\\n

and the loss counts what the assistant has to write: the CONTENT and the <|im_end|> of its messages.
Dialogues share a sequence, one after the other; nothing hides the earlier ones from the later, since the state of a
Mamba layer runs through the sequence in any case.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from starter.config import RecipeError

IGNORE = -100  # the label of a token that is no target
ROLES = ("system", "user", "assistant")
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
    """N sequences of length L. A label is its token's id or IGNORE; the loss compares it with the token before it."""

    input_ids: torch.Tensor  # [N, L], int64
    labels: torch.Tensor  # [N, L], int64
    lengths: torch.Tensor  # [N], int64: tokens before the padding

    def __len__(self) -> int:
        return len(self.input_ids)


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


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The byte tokenizer, or the one in a local folder. It must know the chat marks as single tokens."""
    if name == "bytes":
        return byte_tokenizer()
    if not Path(name).is_dir():
        raise RecipeError(f"the tokenizer folder {name} does not exist.\nGive model.tokenizer=bytes or a local folder.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"no tokenizer in {name}: {first_line(error)}\nGive model.tokenizer=FOLDER.") from error
    missing = [mark for mark in (START, END) if mark not in tokenizer.get_vocab()]
    if missing:
        raise RecipeError(
            f"the tokenizer in {name} has no {' and no '.join(missing)}.\nGive model.tokenizer=FOLDER, one for ChatML."
        )
    return tokenizer


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_chat(path: Path) -> list[Dialogue]:
    """Read JSONL: ``{"messages": [{"role": …, "content": …}, …]}``. A bad line is an error: none is skipped."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecipeError(
            f"cannot read the data file {path}: {error.strerror}.\nSee data.train and data.val."
        ) from error
    dialogues = [parse_dialogue(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not dialogues:
        raise RecipeError(f"{path} holds no dialogue.\nPut one JSON object with messages on each line.")
    return dialogues


def parse_dialogue(line: bytes, where: str) -> Dialogue:
    try:
        messages = json.loads(line)["messages"]
        dialogue = [{"role": message["role"], "content": message["content"]} for message in messages]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{where}: not a chat record ({type(error).__name__}: {error}).\n"
            'Write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.'
        ) from error
    for message in dialogue:
        if message["role"] not in ROLES:
            raise RecipeError(f"{where}: unknown role {message['role']!r}.\nUse {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            raise RecipeError(f"{where}: the content of a message is not a string.\nPut its text there.")
    if all(message["role"] != "assistant" for message in dialogue):
        raise RecipeError(f"{where}: no message of the assistant to learn from.\nAdd one or drop the line.")
    return dialogue


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    return tokenizer.get_vocab()[token]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a sequence up. Nothing learns from it, so that any token will do where the tokenizer has none."""
    return token_id(tokenizer, str(tokenizer.pad_token or END))


def encode(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """ChatML token ids of a dialogue. Marks inside a text are encoded as text, so that no content ends a turn."""

    def text_ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    start, end = token_id(tokenizer, START), token_id(tokenizer, END)
    ids: list[int] = []
    mask: list[bool] = []
    for message in dialogue:
        header = [start, *text_ids(f"{message['role']}\n")]
        body = [*text_ids(message["content"]), end]
        newline = text_ids("\n")
        ids += header + body + newline
        answer = message["role"] == "assistant"
        mask += [False] * len(header) + [answer] * len(body) + [False] * len(newline)
    return Encoded(ids, mask)


def pack(dialogues: Iterable[Encoded], seq_length: int, padding: int) -> Packed:
    """Fill sequences with whole dialogues, in their order; only one that is longer than a sequence is cut."""
    rows: list[Encoded] = []
    row = Encoded([], [])
    for dialogue in dialogues:
        if len(row.ids) + len(dialogue.ids) > seq_length and row.ids:
            rows.append(row)
            row = Encoded([], [])
        row = Encoded(row.ids + dialogue.ids, row.mask + dialogue.mask)
        while len(row.ids) > seq_length:
            rows.append(Encoded(row.ids[:seq_length], row.mask[:seq_length]))
            row = Encoded(row.ids[seq_length:], row.mask[seq_length:])
    if row.ids:
        rows.append(row)

    input_ids = torch.full((len(rows), seq_length), padding)
    labels = torch.full((len(rows), seq_length), IGNORE)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row.ids)
        input_ids[i, : len(tokens)] = tokens
        labels[i, : len(tokens)] = torch.where(torch.tensor(row.mask), tokens, IGNORE)
    return Packed(input_ids, labels, torch.tensor([len(row.ids) for row in rows]))


def load_packed(path: Path, seq_length: int, tokenizer: PreTrainedTokenizerBase) -> Packed:
    encoded = [encode(dialogue, tokenizer) for dialogue in read_chat(path)]
    return pack(encoded, seq_length, pad_id(tokenizer))
