"""Text or records to a token set on disk: the work of `prepare_data.py`.

    manifest = prepare(PrepareSettings(source="text", input=("book.txt",), data_dir="book", tokenizer="byte"))

Documents stream from the source through the tokenizing processes into shards; the folder appears whole or not at all.
"""

import contextlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from data.chat import conversation_text
from data.encode import Encoded, default_workers, encode_all
from data.manifest import resolve_data_dir, staged_folder, write_manifest
from data.records import KINDS, Kind
from data.rendering import Renderer
from data.settings import MODEL_TEMPLATE, PrepareSettings, is_jinja_file
from data.shards import SplitWriter, token_dtype
from data.sources import source_format
from data.stream import TRAIN, VAL, ItemStream
from data.templates import Template, get_template, template_from_file
from data.tokenizer import Tokenizer, load_tokenizer, train_bpe

logger = logging.getLogger(__name__)

_DATA = Path(__file__).resolve().parent
_BPE_CHARACTERS = 50_000_000  # of training text that a vocabulary is learned from; more changes it little
_SHARD_SIZE = {"text": 100_000_000, "instruction": 10_000_000}  # tokens


def prepare(
    settings: PrepareSettings, tokenizer: Tokenizer | None = None, template: Template | None = None
) -> dict[str, Any]:
    """Write the token set that `settings` describe and return its dataset.json.

    `tokenizer` and `template` stand in for the settings. A "preference" set has two documents a record: 2i is the
    chosen and 2i + 1 the rejected answer to the same prompt. In a "prompts" set nothing is supervised.
    Raises ValueError or OSError, one line, for input that cannot be used; then nothing is left behind and a set that
    stood there stays as it was.
    """
    folder = output_folder(settings)
    format = source_format(settings.source, settings.input, settings.format)
    kind = KINDS[format]
    val_fraction = settings.val_fraction
    if val_fraction is None:
        val_fraction = default_val_fraction(settings.source, kind)
    stream = ItemStream(settings, format, val_fraction)
    with staged_folder(folder) as staging:
        if tokenizer is None and settings.tokenizer != "bpe":
            tokenizer = _tokenizer(settings.tokenizer)
        renderer = _renderer(settings, kind, tokenizer, template)
        if tokenizer is None:
            tokenizer = _learned(settings, stream, renderer)
        shard_size = settings.shard_size or _SHARD_SIZE["text" if kind == "text" else "instruction"]
        writers = {
            split: SplitWriter(
                staging,
                split,
                dtype=token_dtype(tokenizer.vocab_size),
                shard_size=shard_size,
                with_mask=renderer is not None,
                vocab_size=tokenizer.vocab_size,
            )
            for split in (TRAIN, VAL)
        }
        workers = settings.workers or default_workers()
        cut = _write(encode_all(stream, tokenizer, renderer, workers, settings.bad_records == "skip"), writers, stream)
        splits = {split: writer.close() for split, writer in writers.items()}
        stream.report(splits)
        for what, count in cut.items():
            logger.warning("%s %s %s", f"{count:,}", stream.what, what)
        meta = _meta(settings, format, val_fraction, tokenizer, renderer, splits)
        meta["left_out"], meta["cut"] = dict(stream.left_out), dict(cut)
        meta["augmented"] = stream.augmented
        meta["cleaned"] = dict(stream.cleaner.changed) if stream.cleaner else None
        _write_tokenizer(staging, tokenizer)
        write_manifest(staging, meta)
    return meta


def output_folder(settings: PrepareSettings) -> Path:
    """The folder that `prepare` writes: --data_dir, or data/SOURCE of this repository, data/NAME for OWNER/NAME."""
    name = settings.source.partition(":")[0].rpartition("/")[2]
    return resolve_data_dir(settings.data_dir) if settings.data_dir else _DATA / name


def default_val_fraction(source: str, kind: Kind) -> float:
    """The share of documents that validation gets: enough to measure on, little of a large set."""
    if source in ("fineweb-edu", "c4"):
        return 0.01
    return 0.1 if kind == "text" else 0.05


# ---- the parts of prepare


def _tokenizer(name: str) -> Tokenizer:
    elsewhere = resolve_data_dir(name)  # `--tokenizer pydocs` is the tokenizer of data/pydocs
    is_name = name in ("gpt2", "byte") or not elsewhere.exists()
    return load_tokenizer(name if is_name else str(elsewhere))


def _learned(settings: PrepareSettings, stream: ItemStream, renderer: Renderer | None) -> Tokenizer:
    tokenizer = train_bpe(_training_texts(stream, renderer), settings.vocab_size)
    if tokenizer.vocab_size < settings.vocab_size:
        logger.warning(
            "the text yields a vocabulary of %d ids, --vocab_size asked %d", tokenizer.vocab_size, settings.vocab_size
        )
    return tokenizer


def _training_texts(stream: ItemStream, renderer: Renderer | None) -> Iterator[str]:
    left = _BPE_CHARACTERS
    for split, body, _, _ in stream:
        if split == TRAIN:
            if isinstance(body, str):
                text = body
            else:
                assert renderer is not None
                text = conversation_text(body.messages, renderer.template)
            yield text
            left -= len(text)
            if left < 0:
                return


def _renderer(
    settings: PrepareSettings, kind: Kind, tokenizer: Tokenizer | None, template: Template | None
) -> Renderer | None:
    """What makes documents of samples; None for text. `template` stands in for the setting. No tokenizer: a new one."""
    if kind == "text":
        if settings.system is not None or settings.max_length is not None:
            raise ValueError("--system and --max_length are for records, and this is text")
        return None
    if template is None:
        name = settings.prompt_template
        if name == MODEL_TEMPLATE:
            raise ValueError(
                f"--prompt_template model: --tokenizer {settings.tokenizer} names no model with a template; name one "
                "with --tokenizer, or choose a template"
            )
        template = template_from_file(Path(name), tokenizer) if is_jinja_file(name) else get_template(name)
    return Renderer(kind, template, settings.system, settings.train_on, settings.max_length)


def _write(
    encoded: Generator[Encoded, None, None], writers: dict[str, SplitWriter], stream: ItemStream
) -> Counter[str]:
    """Write all batches and tell the stream what they left out. Returns how many samples lost what."""
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # no watching thread: a process without threads may fork its workers

    cut: Counter[str] = Counter()
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
            cut.update(batch.cut)
            stream.left_out.update(batch.left_out)
    return cut


def _meta(
    settings: PrepareSettings,
    format: str,
    val_fraction: float,
    tokenizer: Tokenizer,
    renderer: Renderer | None,
    splits: dict[str, Any],
) -> dict[str, Any]:
    return {
        "format": 1,
        "kind": KINDS[format],
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer": {key: value for key, value in tokenizer.spec().items() if key != "json"},
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "template": renderer.template.spec() if renderer else None,
        "rendering": renderer.spec() if renderer else None,
        "source": {
            "name": settings.source,
            "format": format,
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
