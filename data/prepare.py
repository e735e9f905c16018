"""Text or records to a token set on disk: the work of `prepare_data.py`.

    manifest = prepare(PrepareSettings(source="text", input=("book.txt",), data_dir="book", tokenizer="byte"))

Documents stream from the source through the tokenizing processes into shards; the folder appears whole or not at all.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import sys
from collections.abc import Generator, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from data.encode import Encoded, Item, default_workers, encode_all
from data.manifest import resolve_data_dir, staged_folder, write_manifest
from data.settings import PrepareSettings
from data.shards import SplitWriter, token_dtype
from data.sources import Kind, documents, kind_of, records
from data.templates import Template, get_template, record_text
from data.tokenizer import Tokenizer, load_tokenizer, train_bpe

logger = logging.getLogger(__name__)

_DATA = Path(__file__).resolve().parent
TRAIN, VAL = "train", "val"
_BPE_CHARACTERS = 50_000_000  # of training text that a vocabulary is learned from; more changes it little
_SHARD_SIZE = {"text": 100_000_000, "instruction": 10_000_000}  # tokens


def prepare(settings: PrepareSettings, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Write the token set that `settings` describe and return its dataset.json. `tokenizer` stands in for the setting.

    Raises ValueError or OSError, one line, for input that cannot be used; then nothing is left behind and a set that
    stood there stays as it was.
    """
    folder = output_folder(settings)
    kind = kind_of(settings.source, settings.input, settings.format)
    template = get_template(settings.prompt_template) if kind == "instruction" else None
    val_fraction = settings.val_fraction
    if val_fraction is None:
        val_fraction = default_val_fraction(settings.source, kind)
    stream = _Stream(settings, kind, val_fraction)
    with staged_folder(folder) as staging:
        if tokenizer is None:
            tokenizer = _tokenizer(settings, stream, template)
        shard_size = settings.shard_size or _SHARD_SIZE[kind]
        writers = {
            split: SplitWriter(
                staging,
                split,
                dtype=token_dtype(tokenizer.vocab_size),
                shard_size=shard_size,
                with_mask=template is not None,
                vocab_size=tokenizer.vocab_size,
            )
            for split in (TRAIN, VAL)
        }
        _write(encode_all(stream, tokenizer, template, settings.workers or default_workers()), writers)
        splits = {split: writer.close() for split, writer in writers.items()}
        stream.report(splits)
        meta = _meta(settings, kind, val_fraction, tokenizer, template, splits)
        _write_tokenizer(staging, tokenizer)
        write_manifest(staging, meta)
    return meta


def output_folder(settings: PrepareSettings) -> Path:
    """The folder that `prepare` writes: --data_dir, or data/SOURCE of this repository."""
    return resolve_data_dir(settings.data_dir) if settings.data_dir else _DATA / settings.source


def default_val_fraction(source: str, kind: Kind) -> float:
    """The share of documents that validation gets: enough to measure on, little of a large set."""
    if source in ("fineweb-edu", "c4"):
        return 0.01
    return 0.05 if kind == "instruction" else 0.1


def in_validation(index: int, val_fraction: float, seed: int) -> bool:
    """Whether document `index` goes to validation: one of each run of 1 / val_fraction documents, at a seeded place.

    Stratified, so that both splits cover the whole source, and a function of the index alone, so that the number of
    documents need not be known. The very first document trains, so that a single one does.
    """
    share = Fraction(val_fraction).limit_denominator(1_000_000)
    if not share:
        return False
    run = index * share.numerator // share.denominator
    first = -(-run * share.denominator // share.numerator)
    following = -(-(run + 1) * share.denominator // share.numerator)
    if run == 0 and following > 1:
        first = 1
    place = hashlib.blake2b(f"{seed}/{run}".encode(), digest_size=8).digest()
    return index - first == int.from_bytes(place, "big") % (following - first)


# ---- the stream of items


class _Stream:
    """The items of a source with their splits, as often as they are asked for; counts what it had to leave out."""

    def __init__(self, settings: PrepareSettings, kind: Kind, val_fraction: float) -> None:
        self.settings, self.kind, self.val_fraction = settings, kind, val_fraction
        self.left_out = 0

    def __iter__(self) -> Iterator[Item]:
        self.left_out = 0
        return self._records() if self.kind == "instruction" else self._pieces()

    def report(self, splits: dict[str, Any]) -> None:
        """Complain about an empty training split, and mention what was left out."""
        what = "documents" if self.kind == "text" else "records"
        where = ", ".join(self.settings.input) or self.settings.source
        if not splits[TRAIN]["documents"]:
            validates = splits[VAL]["documents"]
            hint = f", only {validates} for validation; try --val_fraction 0" if validates else ""
            raise ValueError(f"{where}: holds no {what} to train on{hint}")
        if self.left_out:
            why = "without text" if self.kind == "text" else "without an instruction or a response"
            logger.warning("left out %s %s %s", f"{self.left_out:,}", what, why)
        if self.val_fraction and not splits[VAL]["documents"]:
            count = splits[TRAIN]["documents"]
            logger.warning("%d %s: too few for --val_fraction %g, no validation split", count, what, self.val_fraction)

    def _is_val(self, index: int) -> bool:
        return in_validation(index, self.val_fraction, self.settings.seed)

    def _records(self) -> Iterator[Item]:
        index = 0
        for record in records(self.settings.source, self.settings.input):
            if not record["response"] or not (record["instruction"] or record["context"]):
                self.left_out += 1
                continue
            if index == self.settings.max_documents:
                return
            yield Item(VAL if self._is_val(index) else TRAIN, record)
            index += 1

    def _pieces(self) -> Iterator[Item]:
        """Neighbouring pieces of a document stay one document in the same split, and part where the split changes."""
        started, before = 0, False
        index = itertools.count()
        is_val = self._is_val(next(index))
        for piece in documents(self.settings.source, self.settings.input, val_fraction=self.val_fraction):
            if piece.begins and piece.ends and (not piece.text or piece.text.isspace()):
                self.left_out += 1
                continue
            started += piece.begins
            if self.settings.max_documents and started > self.settings.max_documents:
                return
            after = self._is_val(next(index))
            begins, ends = piece.begins or before != is_val, piece.ends or after != is_val
            yield Item(VAL if is_val else TRAIN, piece.text, begins, ends)
            before, is_val = is_val, after


# ---- the parts of prepare


def _tokenizer(settings: PrepareSettings, stream: _Stream, template: Template | None) -> Tokenizer:
    if settings.tokenizer != "bpe":
        elsewhere = resolve_data_dir(settings.tokenizer)  # `--tokenizer pydocs` is the tokenizer of data/pydocs
        is_name = settings.tokenizer in ("gpt2", "byte") or not elsewhere.exists()
        return load_tokenizer(settings.tokenizer if is_name else str(elsewhere))
    tokenizer = train_bpe(_training_texts(stream, template), settings.vocab_size)
    if tokenizer.vocab_size < settings.vocab_size:
        logger.warning(
            "the text yields a vocabulary of %d ids, --vocab_size asked %d", tokenizer.vocab_size, settings.vocab_size
        )
    return tokenizer


def _training_texts(stream: _Stream, template: Template | None) -> Iterator[str]:
    left = _BPE_CHARACTERS
    for split, body, _, _ in stream:
        if split == TRAIN:
            if isinstance(body, str):
                text = body
            else:
                assert template is not None
                text = record_text(body, template)
            yield text
            left -= len(text)
            if left < 0:
                return


def _write(encoded: Generator[Encoded, None, None], writers: dict[str, SplitWriter]) -> None:
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # no watching thread: a process without threads may fork its workers

    bar = Bar(unit="tok", unit_scale=True, desc="tokenizing", disable=not sys.stderr.isatty())
    with bar, contextlib.closing(encoded):  # closing stops the workers, also when writing fails
        for batch in encoded:
            start = 0
            for split, begins, count in batch.parts:
                stop = start + count
                mask = None if batch.mask is None else batch.mask[start:stop]
                writers[split].add(batch.ids[start:stop], mask, new_document=begins)
                start = stop
            bar.update(start)


def _meta(
    settings: PrepareSettings,
    kind: Kind,
    val_fraction: float,
    tokenizer: Tokenizer,
    template: Template | None,
    splits: dict[str, Any],
) -> dict[str, Any]:
    return {
        "format": 1,
        "kind": kind,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer": {key: value for key, value in tokenizer.spec().items() if key != "json"},
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "template": template.spec() if template else None,
        "source": {
            "name": settings.source,
            "inputs": list(settings.input),
            "max_documents": settings.max_documents,
        },
        "seed": settings.seed,
        "val_fraction": val_fraction,
        "splits": {split: entry for split, entry in splits.items() if entry["documents"]},
    }


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """A learned vocabulary lies beside dataset.json, in the form that other tools read."""
    text = tokenizer.spec().get("json")
    if text is not None:
        with open(folder / "tokenizer.json", "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
