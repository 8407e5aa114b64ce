"""Tokens in Megatron's indexed format: PREFIX.bin holds them, PREFIX.idx tells where each document lies. Little-endian:

    .bin    the tokens of all documents, one after the other
    .idx    9 bytes   "MMIDIDX", 0, 0
            uint64    version, 1
            uint8     type of a token: 4 is int32, 8 is uint16
            uint64    S, the number of sequences; here each document is one
            uint64    D + 1, for D documents
            int32     S times: how many tokens a sequence has
            int64     S times: at which byte of .bin it begins
            int64     D + 1 times: the sequence that a document begins with; the last is S

blend.json names the parts of a data set, with weights and prefixes by turns, prefixes relative to it:

    {"train": ["0.7", "train/train/web-00000", "0.3", …], "valid": […], "test": […]}
"""

from __future__ import annotations

import array
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from starter import manifest
from starter.config import RecipeError
from starter.files import sha256

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES: dict[int, Any] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}


def token_type(vocabulary: int) -> int:
    """The code of the smaller type that holds all ids."""
    return 8 if vocabulary <= 1 << 16 else 4


class Writer:
    """Writes one pair of files, a document at a time."""

    def __init__(self, prefix: Path, code: int) -> None:
        self.prefix, self.code, self.lengths = prefix, code, array.array("i")
        self.file, self.digest = Path(f"{prefix}.bin").open("wb"), hashlib.sha256()

    def add(self, ids: list[int]) -> None:
        data = np.asarray(ids, TYPES[self.code]).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.lengths.append(len(ids))

    def close(self) -> dict[str, dict[str, Any]]:
        """Finish both files. Returns name -> rows, bytes and sha256."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        lengths = np.asarray(self.lengths, "<i4")
        ends = np.cumsum(lengths, dtype="<i8") * TYPES[self.code].itemsize
        count = len(lengths)
        index = Path(f"{self.prefix}.idx")
        with index.open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, self.code, count, count + 1))
            file.write(lengths.tobytes() + (ends - lengths.astype("<i8") * TYPES[self.code].itemsize).tobytes())
            file.write(np.arange(count + 1, dtype="<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        bin_path = Path(self.file.name)
        digests = {bin_path: self.digest.hexdigest(), index: sha256(index)}
        return {p.name: {"rows": count, "bytes": p.stat().st_size, "sha256": digests[p]} for p in digests}


def read_tokens(prefix: Path) -> np.ndarray[Any, Any]:
    """All tokens of a pair of files, mapped into memory."""
    try:
        with Path(f"{prefix}.idx").open("rb") as file:
            magic, version, code, count, _ = HEADER.unpack(file.read(HEADER.size))
            if magic != MAGIC or version != 1 or code not in TYPES:
                raise ValueError("it has another format, or tokens of another type")
            lengths = np.frombuffer(file.read(4 * count), "<i4").astype("<i8")
            places = np.frombuffer(file.read(8 * count), "<i8")
        tokens = np.memmap(f"{prefix}.bin", TYPES[code], "r") if lengths.sum() else np.empty(0, TYPES[code])
        if not np.array_equal(places, (np.cumsum(lengths) - lengths) * TYPES[code].itemsize):
            raise ValueError("its documents do not lie one after the other")
        if lengths.sum() != len(tokens):
            raise ValueError(f"it tells of {lengths.sum():,} tokens, and .bin has {len(tokens):,}")
        return tokens
    except (OSError, ValueError, struct.error) as error:
        raise RecipeError(f"cannot read {prefix}.idx and .bin: {error}\nRun data/prep/pretrain again.") from error


class TokenBlend:
    """The sequences of one part of a blend: L tokens in a row of one data set, each a target.

    An epoch has as many sequences as the data sets together; each of these gives its weight's share of them.
    """

    def __init__(self, path: Path, part: str, seq_length: int) -> None:
        self.path, self.seq_length = path, seq_length
        entries = read_blend(path).get(part, [])
        self.prefixes = [path.parent / prefix for prefix in entries[1::2]]
        self.sets = [read_tokens(prefix) for prefix in self.prefixes]
        counts = np.array([len(tokens) // seq_length for tokens in self.sets], dtype=np.int64)
        weights = np.array([float(weight) for weight in entries[::2]]) * (counts > 0)
        if not counts.sum():
            raise RecipeError(
                f"{path}: {part} has no {seq_length} tokens in a row.\nPrepare more data, or lower data.seq_length."
            )
        shares = np.maximum(np.round(counts.sum() * weights / weights.sum()).astype(np.int64), counts > 0)
        self.which = np.repeat(np.arange(len(counts)), shares)
        self.place = np.concatenate([np.arange(n) % max(1, count) for n, count in zip(shares, counts, strict=True)])

    def __len__(self) -> int:
        return len(self.which)

    def batch(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = np.empty((len(indices), self.seq_length), dtype=np.int64)
        for row, i in zip(rows, indices, strict=True):
            begin = self.place[i] * self.seq_length
            row[:] = self.sets[self.which[i]][begin : begin + self.seq_length]
        ids = torch.from_numpy(rows)
        return ids, ids.clone()

    def tokens(self, indices: list[int]) -> int:
        return len(indices) * self.seq_length

    def digest(self) -> str:
        """What the data are, by the SHA-256 of their files; those that a manifest tells are not read again."""
        found = hashlib.sha256(self.path.read_bytes())
        for prefix in self.prefixes:
            for suffix in (".bin", ".idx"):
                found.update(manifest.digest_of(Path(f"{prefix}{suffix}")).encode())
        return found.hexdigest()


def read_blend(path: Path) -> dict[str, list[str]]:
    try:
        blend = json.loads(path.read_bytes())
        for entries in blend.values():
            if len(entries) % 2 or any(not float(weight) > 0 for weight in entries[::2]):
                raise ValueError("weights and prefixes must stand by turns")
        return blend
    except OSError as error:
        raise RecipeError(f"cannot read the blend {path}: {error.strerror}.\nRun data/prep/pretrain first.") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise RecipeError(f"{path} is no blend of data/prep/pretrain: {error}.\nSet data.blend to one.") from error
