"""Chat data: JSONL dialogues → token ids by a chat template, with a loss mask → sequences of one length.

The tokenizer's own chat template renders a dialogue's messages; without one each becomes, in ChatML,

    <|im_start|>ROLE\\nCONTENT<|im_end|>\\n

and the loss counts what the assistant has to write: the CONTENT and the end mark of its messages.
Dialogues share a sequence, one after the other; nothing hides the earlier ones from the later, since the state of a
Mamba layer runs through the sequence in any case.
"""

from __future__ import annotations

import functools
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from starter import manifest
from starter.config import RecipeError
from starter.dialogue import BadRecordError, Dialogue, parse_dialogue, read_lines
from starter.files import sync_file
from starter.template import (
    CHAT_TEMPLATE,
    Encoded,
    encode_by_template,
    first_line,
    own_template,
    refuse_marks,
    render,
    tokenize_marked,
)

IGNORE = -100  # the label of a token that is no target
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"


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


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Of a token that is there. Asked for each dialogue, so not of get_vocab, which makes a table of all tokens."""
    found: Any = tokenizer.convert_tokens_to_ids(token)
    return int(found)


def id_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id; not len(tokenizer), since a vocabulary may have holes."""
    return max(tokenizer.get_vocab().values()) + 1


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


def encode(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Token ids of a dialogue, by the tokenizer's own template or else in ChatML. Each answer counts in one of them."""
    return encode_by_template(dialogue, tokenizer) if own_template(tokenizer) else [encode_chatml(dialogue, tokenizer)]


def prompt_ids(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a dialogue, up to where the assistant begins to write."""
    if own_template(tokenizer):
        refuse_marks(dialogue, tokenizer)
        return tokenize_marked(render(dialogue, tokenizer, add_generation_prompt=True), tokenizer)["input_ids"]
    encoded = encode_chatml(dialogue, tokenizer)
    return [*encoded.ids, token_id(tokenizer, START), *text_ids("assistant\n", tokenizer)]


# ---------------------------------------------------------------- ChatML


def encode_chatml(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    refuse_for_chatml(dialogue)
    start, end = token_id(tokenizer, START), token_id(tokenizer, END)
    ids: list[int] = []
    mask: list[bool] = []
    for message in dialogue.messages:
        header = [start, *text_ids(f"{message['role']}\n", tokenizer)]
        body = [*text_ids(message["content"], tokenizer), end]
        newline = text_ids("\n", tokenizer)
        ids += header + body + newline
        answer = message["role"] == "assistant"
        mask += [False] * len(header) + [answer] * len(body) + [False] * len(newline)
    return Encoded(ids, mask)


def refuse_for_chatml(dialogue: Dialogue) -> None:
    beyond = ["tools"] if dialogue.tools else []
    for message in dialogue.messages:
        beyond += [name for name in ("reasoning_content", "tool_calls") if name in message]
        beyond += ["messages of a tool"] if message["role"] == "tool" else []
    if beyond:
        raise BadRecordError(
            f"it has {beyond[0]}, for which ChatML has no place",
            "Empty that, or give a tokenizer with a chat template that takes it.",
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
    return pack((one for each in encoded for one in each), seq_length, pad_id(tokenizer))


@functools.lru_cache(maxsize=4)  # asked for each file, and of a large vocabulary it takes a while
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
