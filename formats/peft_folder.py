"""The two files of a folder that PEFT saves: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.errors import FormatError
from formats.hf_folder import file_in, read_object
from formats.safetensors_file import read_blocks, read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    """What the folder says of its adapter. FormatError if it says nothing."""
    written = read_object(folder, CONFIG)
    if written is None:
        raise FormatError(f"{folder}: holds no {CONFIG}, expected a folder that PEFT saved")
    return written


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by name, fp32. FormatError if they are missing or damaged."""
    path, tensors = file_in(folder, WEIGHTS), {}
    if path is None:
        raise FormatError(f"{folder / WEIGHTS}: no such file; adapters are read from safetensors")
    for name, entry in read_header(path).items():
        blocks = [rows.float().clone() for _, rows in read_blocks(path, name, entry)]
        tensors[name] = torch.cat(blocks) if blocks else torch.empty(entry.shape)
    return tensors


def refuse_rest(tensors: dict[str, Tensor], folder: Path) -> None:
    """FormatError naming a tensor that nobody took."""
    if tensors:
        raise FormatError(f"{folder / WEIGHTS}: holds {next(iter(tensors))}, which the base has no place for")
