"""Tiny data sets and settings that several rooms' tests share: byte tokens, a network of a few thousand numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from data.manifest import write_manifest
from data.shards import SplitWriter
from data.templates import TEMPLATES, render_record
from data.tokenizer import tokenizer_from_spec
from model.config import PRESETS
from training.run_settings import FinetuneSettings, TrainSettings

BYTES = tokenizer_from_spec({"kind": "byte"})
WORDS = tuple("the quick brown fox jumps over a lazy dog and then sleeps under an old tree by a river".split())  # noqa: SIM905


def tiny_preset() -> str:
    """The name of a preset with 2 layers of width 16, made known to the model room."""
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "head_dim": 8, "n_embd": 16, "mlp_dim": 32}
    PRESETS["test"] = dataclasses.replace(PRESETS["tiny"], **sizes)
    return "test"


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, size=words))


def text_set(folder: Path, n_documents: int = 60, seed: int = 0) -> Path:
    """A text set of byte tokens with a validation split, in small shards."""
    rng = np.random.default_rng(seed)
    documents = [[*BYTES.encode(sentence(rng, int(rng.integers(5, 30)))), BYTES.eot_id] for _ in range(n_documents)]
    return write_set(folder, [(ids, None) for ids in documents], "text", None)


def record_set(folder: Path, n_records: int = 60, seed: int = 0) -> Path:
    """An instruction set of byte tokens in the Dolly format, with a validation split."""
    rng = np.random.default_rng(seed)
    template = TEMPLATES["dolly"]
    rendered: list[tuple[list[int], list[int] | None]] = []
    for _ in range(n_records):
        record = {"instruction": sentence(rng, 3), "context": "", "response": sentence(rng, 4), "category": "open_qa"}
        rendered.append(render_record(record, template, BYTES))
    return write_set(folder, rendered, "instruction", template.spec())


def pair_set(folder: Path, n_pairs: int = 30, seed: int = 0) -> Path:
    """A preference set: the same prompts as `record_set`'s, chosen answers of words, rejected ones of their letters."""
    rng = np.random.default_rng(seed)
    template = TEMPLATES["dolly"]
    rendered: list[tuple[list[int], list[int] | None]] = []
    for _ in range(n_pairs):
        record = {"instruction": sentence(rng, 3), "context": "", "response": sentence(rng, 4), "category": "open_qa"}
        worse = {**record, "response": "".join(rng.permutation(list(sentence(rng, 3))))}
        rendered += [render_record(each, template, BYTES) for each in (record, worse)]
    return write_set(folder, rendered, "preference", template.spec())


def sum_set(folder: Path, n_records: int = 30, seed: int = 0) -> Path:
    """An instruction set of sums of two digits."""
    rng = np.random.default_rng(seed)
    template = TEMPLATES["dolly"]
    rendered: list[tuple[list[int], list[int] | None]] = []
    for _ in range(n_records):
        one, two = rng.integers(0, 10, size=2).tolist()
        record = {"instruction": f"{one} + {two}", "context": "", "response": str(one + two), "category": "sums"}
        rendered.append(render_record(record, template, BYTES))
    return write_set(folder, rendered, "instruction", template.spec())


def write_set(folder: Path, documents: list[tuple[list[int], list[int] | None]], kind: str, template: Any) -> Path:
    """A set of byte tokens with its last fifth of documents, (ids, mask), for validation."""
    folder.mkdir(parents=True)
    cut = len(documents) * 4 // 5
    cut -= cut % 2 if kind == "preference" else 0
    splits = {}
    for split, part in {"train": documents[:cut], "val": documents[cut:]}.items():
        masked = kind != "text"
        writer = SplitWriter(folder, split, dtype=np.dtype("uint16"), shard_size=700, with_mask=masked, vocab_size=257)
        for ids, mask in part:
            writer.add(np.array(ids), None if mask is None else np.array(mask, dtype=np.uint8))
        splits[split] = writer.close()
    meta = {
        "format": 1,
        "kind": kind,
        "dtype": "uint16",
        "tokenizer": BYTES.spec(),
        "tokenizer_fingerprint": BYTES.fingerprint,
        "vocab_size": BYTES.vocab_size,
        "eot_id": BYTES.eot_id,
        "template": template,
        "source": {"name": "tiny", "inputs": []},
        "seed": 1,
        "val_fraction": 0.2,
        "splits": splits,
    }
    write_manifest(folder, meta)
    return folder


def train_settings(data_dir: Path, log_dir: Path, **changes: Any) -> TrainSettings:
    """A pretraining of 8 steps of 4 x 128 tokens with dropout, evaluation, samples and checkpoints."""
    values: dict[str, Any] = {
        "preset": tiny_preset(),
        "data_dir": str(data_dir),
        "log_dir": str(log_dir),
        "block_size": 128,
        "batch_size": 2,
        "total_batch_size": 512,
        "max_steps": 8,
        "max_lr": 1e-2,
        "warmup_steps": 2,
        "dropout": 0.1,
        "eval_interval": 2,
        "generate_interval": 4,
        "checkpoint_interval": 3,
        "sample_prompts": ("the quick",),
        "sample_tokens": 4,
        "device": "cpu",
    }
    return TrainSettings(**{**values, **changes})


def finetune_settings(data_dir: Path, log_dir: Path, pretrained: Path, **changes: Any) -> FinetuneSettings:
    """A fine-tuning of 6 steps with dropout, on packed records."""
    values: dict[str, Any] = {
        "pretrained_checkpoint": str(pretrained),
        "data_dir": str(data_dir),
        "log_dir": str(log_dir),
        "block_size": 128,
        "batch_size": 1,
        "total_batch_size": 256,
        "max_lr": 1e-3,
        "dropout": 0.1,
        "sample_prompts": ("the fox",),
        "sample_tokens": 4,
        "device": "cpu",
    }
    return FinetuneSettings(**{**values, **changes})
