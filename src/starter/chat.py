"""Chat data: JSONL dialogues → ChatML token ids with a loss mask → sequences of one length.

A dialogue is a list of messages. Each becomes

    <|im_start|>ROLE\\nCONTENT<|im_end|>\\n

and the loss counts what the assistant has to write: the CONTENT and the <|im_end|> of its messages.
Dialogues share a sequence, one after the other; nothing hides the earlier ones from the later, since the state of a
Mamba layer runs through the sequence in any case.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from starter.config import RecipeError
from starter.files import sync_file

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


def load_tokenizer(name: str, chat: bool = True) -> PreTrainedTokenizerBase:
    """The byte tokenizer, or the one in a local folder. For chat it must know the chat marks as single tokens."""
    if name == "bytes":
        return byte_tokenizer()
    if not Path(name).is_dir():
        raise RecipeError(f"the tokenizer folder {name} does not exist.\nGive model.tokenizer=bytes or a local folder.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"no tokenizer in {name}: {first_line(error)}\nGive model.tokenizer=FOLDER.") from error
    missing = [mark for mark in (START, END) if mark not in tokenizer.get_vocab()]
    if missing and chat:
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
    dialogues = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                dialogues.append(parse_dialogue(line))
            except BadRecordError as error:
                raise RecipeError(f"{path}:{number}: {error.what}.\n{error.fix}") from error
    if not dialogues:
        raise RecipeError(f"{path} holds no dialogue.\nPut one JSON object with messages on each line.")
    return dialogues


class BadRecordError(Exception):
    """What is wrong with a record, wherever it stands, and what to do about it."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


def parse_dialogue(line: bytes) -> Dialogue:
    try:
        messages = json.loads(line)["messages"]
        dialogue = [{"role": message["role"], "content": message["content"]} for message in messages]
    except (ValueError, KeyError, TypeError) as error:
        raise BadRecordError(
            f"not a chat record ({type(error).__name__}: {error})",
            'Write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.',
        ) from error
    for message in dialogue:
        if message["role"] not in ROLES:
            raise BadRecordError(f"unknown role {message['role']!r}", f"Use {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            raise BadRecordError("the content of a message is not a string", "Put its text there.")
    if all(message["role"] != "assistant" for message in dialogue):
        raise BadRecordError("no message of the assistant to learn from", "Add one or drop the line.")
    return dialogue


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
    """ChatML token ids of a dialogue."""
    start, end = token_id(tokenizer, START), token_id(tokenizer, END)
    ids: list[int] = []
    mask: list[bool] = []
    for message in dialogue:
        header = [start, *text_ids(f"{message['role']}\n", tokenizer)]
        body = [*text_ids(message["content"], tokenizer), end]
        newline = text_ids("\n", tokenizer)
        ids += header + body + newline
        answer = message["role"] == "assistant"
        mask += [False] * len(header) + [answer] * len(body) + [False] * len(newline)
    return Encoded(ids, mask)


def prompt_ids(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """ChatML token ids of a dialogue, up to where the assistant begins to write."""
    return [*encode(dialogue, tokenizer).ids, token_id(tokenizer, START), *text_ids("assistant\n", tokenizer)]


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
    encoded = [encode(dialogue, tokenizer) for dialogue in read_chat(path)]
    return pack(encoded, seq_length, pad_id(tokenizer))


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Two tokenizers with one fingerprint give the same numbers to the same tokens."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def write_packed(path: Path, packed: Packed, tokenizer: PreTrainedTokenizerBase) -> None:
    facts = {"seq_length": str(packed.seq_length), "tokenizer": fingerprint(tokenizer)}
    tensors = {"input_ids": packed.input_ids, "loss_mask": packed.mask, "lengths": packed.lengths}
    save_file(tensors, path, metadata=facts)
    sync_file(path)


def read_packed(folder: Path, seq_length: int, tokenizer: PreTrainedTokenizerBase) -> Packed:
    wanted = {"seq_length": str(seq_length), "tokenizer": fingerprint(tokenizer)}
    shards = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                shards.append([file.get_tensor(name) for name in ("input_ids", "loss_mask", "lengths")])
        except (SafetensorError, OSError) as error:
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
