"""Tiny random checkpoints and token sets with the byte tokenizer, for tests of what reads them."""

from pathlib import Path

import numpy as np
import torch

from data.manifest import write_manifest
from data.shards import SplitWriter, TokenSet, open_dataset
from data.templates import TEMPLATES
from data.tokenizer import ByteTokenizer
from formats.checkpoint import save_checkpoint
from model.config import GPTConfig, preset
from model.gpt import GPT


def tiny_config(block_size: int = 64, **overrides) -> GPTConfig:
    sizes = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "head_dim": 16, "n_embd": 32, "mlp_dim": 64}
    vocabulary = {"vocab_size": 257, "padded_vocab_size": 384}
    return preset("tiny", block_size=block_size, **{**sizes, **vocabulary, **overrides})


def tiny_model(seed: int = 0, block_size: int = 64, scale: float = 5.0, **overrides) -> GPT:
    """Random weights, large enough that the predictions depend on the context."""
    model = GPT(tiny_config(block_size, **overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02 * scale, generator=generator)
    return model.eval()


def save_tiny(path: Path, seed: int = 0, template: str | None = None, **overrides) -> Path:
    """A weights-only checkpoint at `path`; `step` 7, `val_loss` 4.5."""
    model = tiny_model(seed, **overrides)
    payload = {
        "model": model.state_dict(),
        "config": model.config.to_dict(),
        "step": 7,
        "val_loss": 4.5,
        "tokenizer": ByteTokenizer().spec(),
        "template": TEMPLATES[template].spec() if template else None,
    }
    save_checkpoint(path, payload)
    return path


def instruction_set(folder: Path, records, shard_size: int = 10_000) -> TokenSet:
    """The `val` split of a prepared set in the new `folder`; records are (ids, mask) pairs."""
    tokenizer = ByteTokenizer()
    folder.mkdir()
    writer = SplitWriter(
        folder, "val", dtype=np.dtype(np.uint16), shard_size=shard_size, with_mask=True, vocab_size=257
    )
    for ids, mask in records:
        writer.add(np.asarray(ids), np.asarray(mask, np.uint8))
    meta = {"kind": "instruction", "dtype": "uint16", "tokenizer": tokenizer.spec(), "vocab_size": 257, "eot_id": 256}
    source = {"name": "test", "inputs": []}
    more = {"tokenizer_fingerprint": tokenizer.fingerprint, "template": None, "source": source, "seed": 0}
    entry = writer.close()
    write_manifest(folder, {"format": 1, **meta, **more, "val_fraction": 0.5, "splits": {"val": entry}})
    return open_dataset(folder, "val")
