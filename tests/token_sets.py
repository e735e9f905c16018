"""Token sets of any content for the tests of the data room."""

import hashlib
import json
from pathlib import Path

import numpy as np

from data.manifest import MANIFEST, write_manifest
from data.shards import SplitWriter, TokenSet, open_dataset, token_dtype
from data.tokenizer import ByteTokenizer


def write_set(folder: Path, documents, *, kind="text", shard_size=1000, vocab_size=257, masks=None, val=()) -> Path:
    """Write a set: `documents` are lists of ids, `masks` lists of 0/1 like them or None; `val` the validation split."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": write_split(folder, "train", documents, masks, shard_size, vocab_size)}
    if len(val):
        val_masks = None if masks is None else [np.ones(len(ids), dtype=np.uint8) for ids in val]
        splits["val"] = write_split(folder, "val", val, val_masks, shard_size, vocab_size)
    write_manifest(folder, manifest(splits, kind, vocab_size))
    return folder


def write_split(folder, split, documents, masks, shard_size, vocab_size):
    dtype = token_dtype(vocab_size)
    writer = SplitWriter(
        folder, split, dtype=dtype, shard_size=shard_size, with_mask=masks is not None, vocab_size=vocab_size
    )
    for number, ids in enumerate(documents):
        writer.add(np.asarray(ids), None if masks is None else np.asarray(masks[number]))
    return writer.close()


def manifest(splits, kind="text", vocab_size=257):
    tokenizer = ByteTokenizer()
    return {
        "format": 1,
        "kind": kind,
        "dtype": token_dtype(vocab_size).name,
        "tokenizer": tokenizer.spec(),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": vocab_size,
        "eot_id": vocab_size - 1,
        "template": None,
        "source": {"name": "test", "inputs": []},
        "seed": 1,
        "val_fraction": 0.1,
        "splits": splits,
    }


def open_set(folder: Path, documents, **options) -> TokenSet:
    """`write_set`, and its training split opened."""
    return open_dataset(write_set(folder, documents, **options), "train")


def edit_manifest(folder: Path, edit) -> None:
    """Change dataset.json through `edit(meta)`."""
    path = folder / MANIFEST
    meta = json.loads(path.read_text())
    edit(meta)
    path.write_text(json.dumps(meta))


def overwrite(folder: Path, name: str, data: bytes, *, trusted: bool) -> None:
    """Give a shard file other bytes; `trusted` writes their digest into dataset.json, so that only content is wrong."""
    (folder / name).write_bytes(data)
    if not trusted:
        return

    def sign(meta):
        for shard in meta["splits"]["train"]["shards"]:
            for entry in (shard, shard.get("mask", {}), shard["docs"]):
                if entry.get("file") == name:
                    entry["sha256"] = hashlib.sha256(data).hexdigest()

    edit_manifest(folder, sign)


# ---- sets whose token ids count up through the stream: a batch shows by its ids where it was cut from

VOCABULARY = 70_000  # uint32 shards
EOT = VOCABULARY - 1


def counting_text(folder, n_tokens, shard_size=1000, mask=None):
    """A text set whose token i is i."""
    masks = None if mask is None else [mask]
    return open_set(folder, [np.arange(n_tokens)], shard_size=shard_size, vocab_size=VOCABULARY, masks=masks)


def counting_records(folder, lengths, shard_size=1000, mask=None):
    """An instruction set whose token i is i, cut into records; without `mask` all but a record's first third counts."""
    ends = np.cumsum(lengths)
    documents = [np.arange(end - length, end) for end, length in zip(ends, lengths)]
    masks = mask or [(np.arange(length) >= length // 3).astype(np.uint8) for length in lengths]
    return open_set(folder, documents, shard_size=shard_size, vocab_size=VOCABULARY, masks=masks, kind="instruction")
