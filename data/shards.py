"""Token shards: a folder of numbered files that hold one stream of token ids, its loss mask and its document starts.

    dataset.json        what the set is made of (data/manifest.py)
    train_000000.bin    token ids, uint16 or uint32
    train_000000.mask   uint8, 1 = supervised (only in sets that have a mask)
    train_000000.docs   uint64, where in this shard the documents begin that begin in it

Shards are cut at exactly `shard_size` tokens, also within a document; readers see one stream from 0 to n_tokens.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.manifest import (
    DTYPE_LIMITS,
    MANIFEST,
    REMEDY,
    damaged,
    read_manifest,
    resolve_data_dir,
    staged_folder,
    write_manifest,
)
from data.shard_file import HEADER, U1, U8, ArrayWriter, CheckedFile, MappedFiles, check_file

__all__ = [
    "SplitWriter",
    "TokenSet",
    "open_dataset",
    "resolve_data_dir",
    "staged_folder",
    "token_dtype",
    "write_manifest",
]

TOKENS, MASK, DOCS = ".bin", ".mask", ".docs"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype of a shard that holds the ids 0 to vocab_size - 1."""
    return np.dtype("<u2" if vocab_size <= DTYPE_LIMITS["uint16"] else "<u4")


# ---- writing


class SplitWriter:
    """Writes one split of a token set, document by document, in constant memory.

    `folder` is the one that `staged_folder` yields, `dtype` that of `token_dtype`, `shard_size` is in tokens.
    """

    def __init__(
        self, folder: Path, split: str, *, dtype: np.dtype, shard_size: int, with_mask: bool, vocab_size: int
    ) -> None:
        if shard_size < 1:
            raise ValueError(f"--shard_size is {shard_size}, expected at least 1 token")
        self.dtype: np.dtype = np.dtype(dtype).newbyteorder("<")
        if vocab_size > DTYPE_LIMITS.get(self.dtype.name, 0):
            raise ValueError(f"{self.dtype.name} does not hold token ids below {vocab_size:,}, uint16 or uint32 may")
        self.folder, self.split, self.shard_size = folder, split, shard_size
        self.with_mask, self.vocab_size = with_mask, vocab_size
        self._shards: list[dict[str, Any]] = []
        self._open: dict[str, ArrayWriter] = {}
        self._tokens = self._documents = self._supervised = 0

    def add(self, ids: np.ndarray, mask: np.ndarray | None = None, *, new_document: bool = True) -> None:
        """Append token ids (n,) and their 0/1 mask (n,), as a new document or as more of the last one.

        Raises ValueError on an id outside the vocabulary, a mask that does not fit, an empty document.
        """
        ids = np.asarray(ids)
        mask = None if mask is None else np.asarray(mask)
        self._check(ids, mask, new_document)
        done = 0
        while done < len(ids):
            files = self._files_with_room()
            start = files[TOKENS].count
            take = min(self.shard_size - start, len(ids) - done)
            if new_document and done == 0:
                files[DOCS].append(np.array([start]))
            files[TOKENS].append(ids[done : done + take])
            if mask is not None:
                files[MASK].append(mask[done : done + take])
            done += take
        self._documents += int(new_document)
        self._tokens += len(ids)
        self._supervised += len(ids) if mask is None else int(np.count_nonzero(mask))

    def close(self) -> dict[str, Any]:
        """Flush the last shard and return the split's entry for dataset.json.

        A split that got no document has 0 tokens and no shards: leave it out of dataset.json.
        """
        if self._open:
            self._close_shard()
        return {
            "tokens": self._tokens,
            "documents": self._documents,
            "supervised": self._supervised,
            "shards": self._shards,
        }

    def _check(self, ids: np.ndarray, mask: np.ndarray | None, new_document: bool) -> None:
        where = f"{self.split} document {self._documents:,}"
        if new_document and len(ids) == 0:
            raise ValueError(f"{where}: has no tokens, expected at least one")
        if not new_document and self._documents == 0:
            raise ValueError(f"{where}: the first tokens of a split must begin a document")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise ValueError(f"{where}: has token id {wrong}, expected 0 to {self.vocab_size - 1}")
        if (mask is not None) != self.with_mask:
            raise ValueError(f"{where}: expected {'a' if self.with_mask else 'no'} mask")
        if mask is not None and (mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"{where}: its mask of {len(mask)} values must hold 0 or 1 for each of {len(ids)} tokens")

    def _files_with_room(self) -> dict[str, ArrayWriter]:
        if self._open and self._open[TOKENS].count == self.shard_size:
            self._close_shard()
        if not self._open:
            dtypes = {TOKENS: self.dtype, DOCS: U8} | ({MASK: U1} if self.with_mask else {})
            stem = f"{self.split}_{len(self._shards):06d}"
            self._open = {kind: ArrayWriter(self.folder / (stem + kind), dtype) for kind, dtype in dtypes.items()}
        return self._open

    def _close_shard(self) -> None:
        count = self._open[TOKENS].count
        closed = {kind: file.close() for kind, file in self._open.items()}
        shard: dict[str, Any] = {"file": closed[TOKENS]["file"], "count": count, "sha256": closed[TOKENS]["sha256"]}
        self._shards.append(shard | ({"mask": closed[MASK]} if self.with_mask else {}) | {"docs": closed[DOCS]})
        self._open = {}


# ---- checking


@dataclass(frozen=True)
class _Shard:
    tokens: CheckedFile
    docs: CheckedFile
    mask: CheckedFile | None


def _check_split(folder: Path, meta: dict[str, Any], split: str, full: bool) -> list[_Shard]:
    entry = meta["splits"][split]

    def check(numbered: tuple[int, dict[str, Any]]) -> _Shard:
        return _check_shard(folder, meta, numbered[1], is_first=numbered[0] == 0, full=full)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        shards = list(pool.map(check, enumerate(entry["shards"])))  # in order: the first bad file is the one named
    _check_total(folder, f"splits.{split}.documents", entry["documents"], sum(shard.docs.count for shard in shards))
    if full:
        supervised = sum(
            shard.mask.facts.total if shard.mask and shard.mask.facts else shard.tokens.count for shard in shards
        )
        _check_total(folder, f"splits.{split}.supervised", entry["supervised"], supervised)
    return shards


def _check_total(folder: Path, name: str, told: int, found: int) -> None:
    if told != found:
        raise damaged(folder / MANIFEST, f"{name} is {told:,}, its shards hold {found:,}")


def _check_shard(folder: Path, meta: dict[str, Any], entry: dict[str, Any], *, is_first: bool, full: bool) -> _Shard:
    count, dtype = entry["count"], np.dtype(meta["dtype"]).newbyteorder("<")
    tokens = check_file(folder / entry["file"], dtype, entry, count, full)
    if tokens.facts and tokens.facts.largest >= meta["vocab_size"]:
        expected = f"expected 0 to {meta['vocab_size'] - 1}"
        raise damaged(tokens.path, f"has token id {tokens.facts.largest}, {expected}")
    docs = check_file(folder / entry["docs"]["file"], U8, entry["docs"], None, full)
    if docs.facts and not docs.facts.ascending:
        raise damaged(docs.path, "its document starts do not ascend")
    if docs.facts and docs.facts.largest >= count:
        raise damaged(docs.path, f"a document starts at {docs.facts.largest:,}, the shard has {count:,} tokens")
    if docs.facts and is_first and (docs.facts.first != 0 or docs.count == 0):
        raise damaged(docs.path, "the first document does not start at 0")
    if entry.get("mask") is None:
        return _Shard(tokens, docs, None)
    mask = check_file(folder / entry["mask"]["file"], U1, entry["mask"], count, full)
    if mask.facts and mask.facts.largest > 1:
        raise damaged(mask.path, f"has the value {mask.facts.largest}, expected 0 or 1")
    return _Shard(tokens, docs, mask)


# ---- reading


class TokenSet:
    """One split of a checked token set, read as one stream of tokens. Made by `open_dataset`."""

    def __init__(self, folder: Path, meta: dict[str, Any], split: str, shards: list[_Shard]) -> None:
        entry = meta["splits"][split]
        self.folder, self.meta, self.split = folder, meta, split
        self.n_tokens: int = entry["tokens"]
        self.n_documents: int = entry["documents"]
        self.n_supervised: int = entry["supervised"]
        self.vocab_size: int = meta["vocab_size"]
        self.tokenizer_fingerprint: str = meta["tokenizer_fingerprint"]
        self._shards = shards
        self._masks = [shard.mask for shard in shards if shard.mask is not None]  # of all shards or of none
        self.has_mask = bool(self._masks)
        self._ends = np.cumsum([shard.tokens.count for shard in shards], dtype=np.int64)  # where each shard ends
        self._files = MappedFiles()

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The token ids [start, stop) of the stream, int64 (stop - start,)."""
        pieces = [self._files.read(self._shards[at].tokens, low, high) for at, low, high in self._spans(start, stop)]
        return np.concatenate([np.empty(0, np.int64), *pieces], dtype=np.int64)

    def mask(self, start: int, stop: int) -> np.ndarray:
        """Which of the tokens [start, stop) are supervised, uint8 (stop - start,); all are in a set without a mask."""
        if not self._masks:
            return np.ones(stop - start, dtype=np.uint8)
        pieces = [self._files.read(self._masks[at], low, high) for at, low, high in self._spans(start, stop)]
        return np.concatenate([np.empty(0, np.uint8), *pieces])

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Where each document begins in the stream, and n_tokens at the end, int64 (n_documents + 1,)."""
        begins = self._ends - [shard.tokens.count for shard in self._shards]
        starts = [
            np.fromfile(shard.docs.path, dtype=U8, offset=HEADER.size).astype(np.int64) + begin
            for shard, begin in zip(self._shards, begins)
        ]
        return np.concatenate([*starts, [self.n_tokens]])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the digests of the split's files: what a run must find again when it resumes."""
        digest = hashlib.sha256()
        for entry in self.meta["splits"][self.split]["shards"]:
            for file in (entry, entry.get("mask") or {"sha256": "-"}, entry["docs"]):
                digest.update(file["sha256"].encode())
        return digest.hexdigest()

    def files(self, start: int, stop: int) -> list[str]:
        """The names of the shards that the tokens [start, stop) of the stream are in."""
        return [self._shards[at].tokens.path.name for at, _, _ in self._spans(start, stop)]

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The shards that [start, stop) of the stream lies in: number, and the part of it in the shard's own count."""
        assert 0 <= start <= stop <= self.n_tokens, f"tokens [{start}, {stop}) of {self.n_tokens}"
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[number])
            begin = end - self._shards[number].tokens.count
            yield number, start - begin, min(stop, end) - begin
            start, number = end, number + 1


def open_dataset(data_dir: str | os.PathLike[str], split: str, *, verify: Literal["full", "size"] = "full") -> TokenSet:
    """Open one split ("train", "val") of the token set at `data_dir` (a path, or a name under data/).

    Everything is checked before the first token is used: dataset.json, and of every file its presence, header, size,
    and with verify="full" its digest, its ids against the vocabulary, its document starts. "size" reads headers only,
    for sets so large that reading them once takes minutes. Raises ValueError, one line that names the file.
    """
    assert verify in ("full", "size"), verify
    folder = resolve_data_dir(data_dir)
    meta = read_manifest(folder)
    if split not in meta["splits"]:
        remedy = f"{REMEDY}, --val_fraction 0.01 for one" if split == "val" else REMEDY
        there = ", ".join(sorted(meta["splits"]))
        raise ValueError(f"{folder / MANIFEST}: there is no split {split!r}, only {there}; {remedy}")
    return TokenSet(folder, meta, split, _check_split(folder, meta, split, verify == "full"))
