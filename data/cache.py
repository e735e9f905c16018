"""A file of records used directly as training data: prepared once into a cache beside the other sets."""

from __future__ import annotations

import hashlib
from pathlib import Path

from data.manifest import resolve_data_dir
from data.settings import PrepareSettings
from data.tokenizer import Tokenizer


def prepare_records_cache(records: str, prompt_template: str, tokenizer: Tokenizer) -> Path:
    """The folder of shards for a JSONL or JSON of records; prepared unless these very bytes were before.

    Raises FileNotFoundError or ValueError naming the file.
    """
    from data.prepare import prepare

    path = Path(records)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of records")
    digest = hashlib.sha256(f"{prompt_template} {tokenizer.fingerprint} ".encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    folder = resolve_data_dir(f"cache-{path.stem}-{digest.hexdigest()[:12]}")
    if not (folder / "dataset.json").exists():
        settings = PrepareSettings(
            source="jsonl",
            input=(str(path),),
            data_dir=str(folder),
            format="instruction",
            prompt_template=prompt_template,
        )
        prepare(settings, tokenizer)
    return folder
