"""Records or text used directly as training data: prepared once into a cache beside the other sets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from data.manifest import resolve_data_dir
from data.settings import PrepareSettings, is_jinja_file
from data.templates import Template
from data.tokenizer import Tokenizer

_VERSION = 2  # of what `prepare` makes of a file; a larger one makes every cache anew


def prepare_records_cache(
    records: str,
    prompt_template: str,
    tokenizer: Tokenizer,
    *,
    template: Template | None = None,
    format: str = "auto",
    system: str | None = None,
    train_on: str = "all",
    max_length: int | None = None,
    bad_records: str = "error",
) -> Path:
    """The folder of shards for a JSONL or JSON of records; prepared unless these very bytes were before, in this way.

    `template` stands in for `prompt_template`, the others are settings of `prepare_data.py`. The set is of the kind
    that the records are: pairs give a "preference" set, format "prompts" one of prompts.
    Raises FileNotFoundError or ValueError naming the file.
    """
    path = Path(records)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of records")
    settings = PrepareSettings(
        source="jsonl",
        input=(str(path),),
        prompt_template=prompt_template,
        format=format,
        system=system,
        train_on=train_on,
        max_length=max_length,
        bad_records=bad_records,
    )
    return _prepared(path.stem, settings, tokenizer, template)


def prepare_text_cache(
    source: str, inputs: Sequence[str], tokenizer: Tokenizer, max_documents: int | None = None
) -> Path:
    """The folder of shards for a source of text (see `prepare_data.py`), or for text files; prepared once, as above.

    What the Hub has under a name is taken to stay the same. Raises ValueError or OSError, one line.
    """
    settings = PrepareSettings(source=source, input=tuple(inputs), format="text", max_documents=max_documents)
    name = Path(inputs[0]).stem if inputs else source.replace("/", "-").replace(":", "-")
    return _prepared(name, settings, tokenizer, None)


def _prepared(name: str, settings: PrepareSettings, tokenizer: Tokenizer, template: Template | None) -> Path:
    from data.prepare import prepare

    folder = resolve_data_dir(f"cache-{name}-{_digest(settings, tokenizer, template)[:12]}")
    if not (folder / "dataset.json").exists():
        prepare(dataclasses.replace(settings, data_dir=str(folder)), tokenizer, template)
    return folder


def _digest(settings: PrepareSettings, tokenizer: Tokenizer, template: Template | None) -> str:
    """SHA-256 over all that decides what the set holds: settings, vocabulary, template, the bytes of the files."""
    values = {**dataclasses.asdict(settings), "input": None}  # the same records elsewhere are the same set
    special = [tokenizer.fingerprint, tokenizer.eot_id, tokenizer.bos_id]
    spec = template.spec() if template else None
    digest = hashlib.sha256(json.dumps([_VERSION, values, special, spec], sort_keys=True).encode())
    files = [*settings.input, *([settings.prompt_template] if is_jinja_file(settings.prompt_template) else [])]
    for name in files:
        with open(name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
