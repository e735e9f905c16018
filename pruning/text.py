"""Text for pruning: what --calibration, --eval_text and --finetune_data name, as tokens of the model's tokenizer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.manifest import MANIFEST, resolve_data_dir
from data.pydocs import pydocs_documents
from data.settings import SOURCES
from data.shards import open_dataset
from data.sources import HUB_SETS, Piece, documents
from data.stream import TRAIN, VAL, in_validation
from data.tokenizer import Tokenizer

EMBEDDED = "pydocs"
_KEPT_FOR_EVALUATION = 0.1  # of the embedded documents; calibration and recovery read the others
_SPLIT_SEED = 1337
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_RECORDS = (".jsonl", ".json", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Text:
    """Tokens (n,) of documents, each followed by the end-of-text token, and what they are called."""

    name: str
    ids: np.ndarray

    def chosen_windows(self, count: int, length: int, seed: int, flags: str) -> Tensor:
        """(count, length) int64: windows that do not overlap, drawn without replacement. ValueError naming `flags`."""
        there = self._windows(length, count, flags)
        order = torch.randperm(len(there), generator=torch.Generator().manual_seed(seed))
        return there[order[:count]]

    def even_windows(self, count: int, length: int, flags: str) -> Tensor:
        """(count, length) int64, evenly spread from the first window to the last; all of them for count 0."""
        there = self._windows(length, max(1, count), flags)
        places = np.linspace(0, len(there) - 1, count).round().astype(np.int64)
        return there[torch.from_numpy(places)] if count else there

    def _windows(self, length: int, needed: int, flags: str) -> Tensor:
        found = len(self.ids) // length
        if found < needed:
            raise ValueError(
                f"{self.name}: has {len(self.ids):,} tokens, {needed} windows of {length} take {needed * length:,}: "
                f"give more text, or less with {flags}"
            )
        return torch.from_numpy(self.ids[: found * length].astype(np.int64)).view(found, length)


def fingerprint(tokens: np.ndarray) -> str:
    """A short name for int64 tokens of any shape, another for others: what a text's own name does not tell."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype=np.int64).data).hexdigest()[:16]


def read_text(ref: str | None, tokenizer: Tokenizer, split: str, limit: int | None = None) -> Text:
    """The text that `ref` names, None for the embedded one; at least `limit` tokens of its beginning if it has them.

    `split` ("train" or "val") chooses among the embedded documents, and the shards of a prepared set.
    Raises ValueError or OSError, one line, for what is no text or speaks another vocabulary.
    """
    folder = resolve_data_dir(ref) if ref is not None else None
    if folder is not None and (folder / MANIFEST).is_file():
        tokens = open_dataset(folder, split)
        if tokens.tokenizer_fingerprint != tokenizer.fingerprint:
            raise ValueError(f"{folder}: was prepared with another tokenizer than the model's: name a text instead")
        stop = tokens.n_tokens if limit is None else min(limit, tokens.n_tokens)
        return Text(f"{folder.name}/{split}", tokens.tokens(0, stop))
    name = "the embedded text" if ref in (None, EMBEDDED) else Path(str(ref)).name
    if ref in (None, EMBEDDED):
        name += " (documents kept for evaluation)" if split == VAL else " (documentation of Python)"
    pieces: list[np.ndarray] = []
    end, count = np.array([tokenizer.eot_id]), 0
    for piece in _pieces(ref, split):
        ids = tokenizer.encode_numpy(piece.text)
        pieces += [ids, end] if piece.ends else [ids]
        count += len(ids) + piece.ends
        if limit is not None and count >= limit:
            break
    return Text(name, np.concatenate([*pieces, end[:0]]).astype(np.int64))


def _pieces(ref: str | None, split: str) -> Iterator[Piece]:
    if ref is None or ref == EMBEDDED:
        for index, document in enumerate(pydocs_documents()):
            if in_validation(index, _KEPT_FOR_EVALUATION, _SPLIT_SEED) == (split == VAL):
                yield Piece(document)
        return
    source, inputs = source_of(ref)
    yield from documents(source, inputs)


def is_streamed(ref: str | None) -> bool:
    """Whether `ref` names a set of the Hub, whose end one may not want to wait for. ValueError for no text."""
    return not is_split(ref) and not source_of(str(ref))[1]


def is_split(ref: str | None) -> bool:
    """Whether the text keeps a part for evaluation: the embedded one, and sets made by prepare_data.py."""
    return ref in (None, EMBEDDED) or (resolve_data_dir(str(ref)) / MANIFEST).is_file()


def source_of(ref: str) -> tuple[str, tuple[str, ...]]:
    """The source and input under which the data room reads a file, or a set of the Hub. ValueError for neither."""
    path = Path(ref)
    if path.is_file():
        suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
        kind = "parquet" if suffix == ".parquet" else "jsonl" if suffix in _RECORDS else "text"
        return kind, (ref,)
    if path.is_dir():
        raise ValueError(f"{ref}: is a folder without dataset.json; expected a text, or a set made by prepare_data.py")
    hub_like = _HUB.fullmatch(ref) and not path.parent.is_dir() and path.suffix not in (*_RECORDS, ".txt", ".md", ".gz")
    if ref == EMBEDDED or ref in HUB_SETS or hub_like:
        return ref, ()
    known = ", ".join(name for name in SOURCES if name in HUB_SETS)
    raise ValueError(f"{ref}: no such text; expected a file, a prepared set, or a set of the Hub ({known}, owner/name)")


__all__ = ["EMBEDDED", "TRAIN", "VAL", "Text", "fingerprint", "is_split", "is_streamed", "read_text", "source_of"]
