"""A Hugging Face folder as an ordinary checkpoint payload, without transformers and without its code."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import Tokenizer, load_tokenizer
from formats.checkpoint import FORMAT
from formats.errors import FormatError
from formats.hf_config import to_gpt_config
from formats.hf_folder import Found, find_tensors, read_object
from formats.hf_names import is_buffer, stored_tensors, without_prefix
from formats.hf_tokenizer import has_tokenizer, read_hf_tokenizer
from formats.stored import Stored
from model.config import GPTConfig, padded_vocab

__all__ = ["read_hf_tokenizer", "read_huggingface"]
_GPT2_VOCABULARY = 50_257


def read_huggingface(folder: str | Path) -> dict[str, Any]:
    """The checkpoint payload of a folder with config.json, weights and a tokenizer.

    Its tensors are float32 and in memory; one block is read at a time, so the peak is their size and a few MiB (with
    pytorch_model.bin also the mapped file). "notes" says what was adapted. FormatError names the file and what is
    wrong: damaged, missing, surplus or misshapen tensors, an architecture or variant that is not supported.
    """
    folder = Path(folder)
    hf = read_object(folder, "config.json")
    if hf is None:
        raise FormatError(f"{folder}: holds no config.json, expected the folder of a Hugging Face model")
    config, notes = to_gpt_config(hf, str(folder / "config.json"))
    if config.vocab_size == _GPT2_VOCABULARY and not has_tokenizer(folder):
        tokenizer, template = load_tokenizer("gpt2"), None
        notes.append("the folder has no tokenizer: GPT-2's is taken, whose vocabulary has the same 50,257 ids")
    else:
        tokenizer, template = read_hf_tokenizer(folder)
    rows = config.vocab_size
    config = _fit_vocabulary(config, tokenizer, folder, notes)
    config, weights = _read_weights(folder, config, str(hf["model_type"]), rows, notes)
    return {
        "format": FORMAT,
        "config": config.to_dict(),
        "model": weights,
        "in_memory": True,
        "tokenizer": tokenizer.spec(),
        "template": None if template is None else template.spec(),
        "step": None,
        "val_loss": None,
        "source": {"kind": "huggingface", "path": str(folder)},
        "notes": notes,
    }


def _fit_vocabulary(config: GPTConfig, tokenizer: Tokenizer, folder: Path, notes: list[str]) -> GPTConfig:
    """The config without ids that the tokenizer lacks: published tables are often padded, and nothing decodes those."""
    known, rows = tokenizer.vocab_size, config.vocab_size
    if known < rows:
        notes.append(f"vocabulary of {rows:,} cut to the {known:,} ids that the tokenizer has")
        return dataclasses.replace(config, vocab_size=known, padded_vocab_size=padded_vocab(known))
    if known > rows:
        raise FormatError(
            f"{folder}: its tokenizer has {known:,} ids, its config.json a vocab_size of {rows:,}: remove what was "
            "added to the tokenizer, or resize the model's embeddings with transformers"
        )
    return config


def _read_weights(
    folder: Path, config: GPTConfig, model_type: str, rows: int, notes: list[str]
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """All weights by our names, and the config with a head of its own where the stored one differs from the table."""
    found: dict[str, Found] = {}
    for raw, tensor in find_tensors(folder).items():
        name = without_prefix(raw, model_type)
        if name in found:
            raise FormatError(f"{tensor.where}: holds {name!r} twice, with and without its prefix")
        found[name] = tensor
    layout = stored_tensors(config, model_type, rows)
    if config.tie_embeddings and "lm_head.weight" in found:
        table = found.get(layout[0].name)
        if table is not None and not _equal(table, found["lm_head.weight"]):
            notes.append("config.json says that head and embedding are one, but the files hold two: both are kept")
            config = dataclasses.replace(config, tie_embeddings=False)
            layout = stored_tensors(config, model_type, rows)
    _check_layout(folder, layout, found, config)
    weights: dict[str, Tensor] = {}
    for stored in layout:
        _allocate(stored, config, weights)
        for first, block in found[stored.name].blocks():
            stored.copy_rows(first, block, weights)
    return config, weights


def _equal(first: Found, second: Found) -> bool:
    return first.shape == second.shape and all(
        one.dtype == other.dtype and torch.equal(one, other)
        for (_, one), (_, other) in zip(first.blocks(), second.blocks())
    )


def _check_layout(folder: Path, layout: list[Stored], found: dict[str, Found], config: GPTConfig) -> None:
    """FormatError for the first tensor that is missing, misshapen, or more than the config asks for."""
    for stored in layout:
        if stored.name not in found:
            hint = ": set tie_word_embeddings to true if the head is the embedding" * (stored.name == "lm_head.weight")
            raise FormatError(f"{folder}: lacks the tensor {stored.name} {stored.shape} of its config.json{hint}")
        if found[stored.name].shape != stored.shape:
            where, shape = found[stored.name].where, found[stored.name].shape
            raise FormatError(f"{where}: {stored.name} has shape {shape}, config.json asks for {stored.shape}")
    known = {stored.name for stored in layout} | ({"lm_head.weight"} if config.tie_embeddings else set())
    for name in sorted(found.keys() - known):
        if not is_buffer(name):
            raise FormatError(
                f"{found[name].where}: holds {name[:80]!r}, which a model of its config.json does not have"
            )


def _allocate(stored: Stored, config: GPTConfig, weights: dict[str, Tensor]) -> None:
    """Memory for the parts of one stored tensor; a table gets rows of zeros up to the padded vocabulary."""
    for name, start, stop in stored.parts:
        if name in ("wte.weight", "lm_head.weight"):
            weights[name] = torch.empty(config.padded_vocab_size, config.n_embd)
            weights[name][config.vocab_size :] = 0.0
        elif stored.transposed:
            weights[name] = torch.empty(stop - start, stored.shape[0])
        else:
            weights[name] = torch.empty(stop - start, *stored.shape[1:])
