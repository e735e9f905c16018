"""A GGUF file as an ordinary checkpoint payload: float32, whatever its tensors are quantised to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from data.chat import ChatTemplate
from data.tokenizer import Tokenizer
from formats.checkpoint import FORMAT
from formats.errors import FormatError
from formats.gguf_config import to_gpt_config
from formats.gguf_header import GgufHeader, TensorInfo, read_gguf_header
from formats.gguf_names import stored_tensors
from formats.gguf_tokenizer import has_vocabulary, read_vocabulary
from formats.stored import Stored
from model.config import GPTConfig

DTYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_ROPE_FACTORS = "rope_freqs.weight"
_BLOCK = 2 << 20  # bytes of float32 that are dequantised at once: `gguf` needs three times as much beside them


def read_gguf(path: str | Path) -> dict[str, Any]:
    """The checkpoint payload of a GGUF file, its tokenizer and chat template included.

    Its tensors are float32 and in memory; one block is read at a time, so the peak is their size and some MiB. "notes"
    says what was adapted. FormatError names the file and what is wrong: a damaged header, missing, surplus or
    misshapen tensors, an architecture, variant, tensor type or vocabulary that is not supported.
    """
    header = read_gguf_header(path)
    config, notes = read_config(header)
    tokenizer, template = read_vocabulary(header) if has_vocabulary(header) else (None, None)
    if tokenizer is None:
        notes.append("the file has no vocabulary")
    weights: dict[str, Tensor] = {}
    for tensors in read_weights(header, config):
        weights |= tensors
    return {
        "format": FORMAT,
        "config": config.to_dict(),
        "model": weights,
        "in_memory": True,
        "tokenizer": None if tokenizer is None else tokenizer.spec(),
        "template": None if template is None else template.spec(),
        "step": None,
        "val_loss": None,
        "source": {"kind": "gguf", "path": str(path), "architecture": header.metadata["general.architecture"]},
        "notes": notes,
    }


def read_gguf_tokenizer(path: str | Path) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer of a GGUF file, and its chat template if it has one. FormatError where it has no vocabulary."""
    header = read_gguf_header(path)
    if not has_vocabulary(header):
        raise FormatError(f"{path}: has no vocabulary")
    return read_vocabulary(header)


def read_config(header: GgufHeader) -> tuple[GPTConfig, list[str]]:
    """The network that a header describes, and notes on what was adapted. FormatError says what is not supported."""
    factors = None
    if _ROPE_FACTORS in header.tensors:
        info = header.tensors[_ROPE_FACTORS]
        if len(info.shape) != 1 or info.shape[0] > 1 << 16 or info.type != "F32":
            found = f"{info.type} {info.shape}"
            raise FormatError(f"{header.path}: {_ROPE_FACTORS} is {found}, expected one F32 value for each pair")
        with open(header.path, "rb") as file:
            ((_, factors),) = _blocks(file, info, header.path)
    return to_gpt_config(header, factors)


def read_weights(header: GgufHeader, config: GPTConfig) -> Iterator[dict[str, Tensor]]:
    """Our tensors by name, float32, as many at a time as one stored tensor holds (three for GPT-2's q, k and v).

    Everything is checked before the first is read. ValueError where the package `gguf` is missing.
    """
    layout = stored_tensors(
        config, header.metadata["general.architecture"], header.tensors["token_embd.weight"].shape[0]
    )
    _check_layout(header, layout)
    with open(header.path, "rb") as file:
        for stored in layout:
            weights = {name: _allocate(stored, name, stop - start, config) for name, start, stop in stored.parts}
            for first, rows in _blocks(file, header.tensors[stored.name], header.path):
                stored.copy_rows(first, rows, weights)
            yield weights


def _check_layout(header: GgufHeader, layout: list[Stored]) -> None:
    """FormatError for the first tensor that is missing, misshapen, of a strange type, or more than was asked for."""
    where = header.path
    for stored in layout:
        if stored.name not in header.tensors:
            raise FormatError(f"{where}: lacks the tensor {stored.name} {stored.shape} that its metadata ask for")
        info = header.tensors[stored.name]
        if info.shape != stored.shape:
            raise FormatError(f"{where}: {stored.name} has shape {info.shape}, its metadata ask for {stored.shape}")
        if info.type not in DTYPES:
            raise FormatError(f"{where}: {stored.name} is of type {info.type}; read are {', '.join(DTYPES)}")
    known = {stored.name for stored in layout} | {_ROPE_FACTORS}
    for name in header.tensors:
        if name not in known:
            raise FormatError(f"{where}: holds {name[:80]!r}, which a model of its metadata does not have")


def _allocate(stored: Stored, name: str, rows: int, config: GPTConfig) -> Tensor:
    """Memory for one of our tensors; a table gets rows of zeros up to the padded vocabulary."""
    if name not in ("wte.weight", "lm_head.weight"):
        return torch.empty(rows, *stored.shape[1:])
    table = torch.empty(config.padded_vocab_size, config.n_embd)
    table[rows:] = 0.0
    return table


def _blocks(file: IO[bytes], info: TensorInfo, where: Path) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows as float32) of a tensor from its beginning to its end; a vector is one block."""
    quants = import_gguf().quants
    kind = import_gguf().GGMLQuantizationType[info.type]
    rows = info.shape[0] if len(info.shape) > 1 else 1
    row_bytes, columns = (info.stop - info.start) // rows, info.shape[-1]
    at_once = max(1, _BLOCK // (4 * columns))
    file.seek(info.start)
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        raw = bytearray(count * row_bytes)
        if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
            raise FormatError(f"{where}: became shorter while it was read")
        with np.errstate(all="ignore"):  # scales that are no numbers are the file's, and stay so
            values = quants.dequantize(np.frombuffer(raw, dtype=np.uint8).reshape(count, row_bytes), kind)
        block = torch.from_numpy(values)  # (count, columns)
        yield first, block[0] if len(info.shape) == 1 else block


def import_gguf() -> Any:
    """The package `gguf`; ValueError that says how to install it where it is missing."""
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files need the package gguf: pip install gguf") from None
    return gguf
