"""Compact storage: a pruned model's checkpoint without its zeros.

A checkpoint like any other, with an entry `compact` = {"dtype"} more, in which a weight under a mask is one row: its
kept numbers, from left to right and from top to bottom. The masks (a bit a block) say where they belong. SmolLM2-135M
with half of its blocks' weights gone: 106.2M / 2 + 28.3M (the embedding, which is not pruned) = 81.4M of 134.5M numbers
are left, 0.605 of the bytes in fp32, with 52,000 bytes of masks in 16x16 blocks; 0.63 with a bit for each weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.masks import Mask, Masks, check_weights

ENTRY = "compact"
# As many times its own numbers a file may take in memory, so that a small one cannot claim all of it. The embedding is
# never pruned, so that real ones stay far below: SmolLM2-135M with every weight of its blocks gone would be at 4.8.
_MOST = 100
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def to_compact(payload: Mapping[str, Any], masks: Masks, dtype: str = "f32") -> dict[str, Any]:
    """The payload of a pruned model without its zeros; in f16 and bf16 its matrices are rounded.

    ValueError where a weight is not zero that its mask says is, or not finite in that type, or hardly any is kept.
    """
    weights = payload["model"]
    check_weights(weights, masks)
    model = {}
    for name, weight in weights.items():
        kept = weight[masks[name].dense()] if name in masks else weight
        stored = kept.to(DTYPES[dtype]) if weight.dim() > 1 else kept  # norms and biases are few, and sensitive
        if not torch.isfinite(stored).all():
            raise ValueError(f"{name} holds numbers that {dtype} does not reach: choose f32 or bf16")
        model[name] = stored
    _check_growth(model, masks)
    return {**payload, "model": model, ENTRY: {"dtype": dtype}}


def from_compact(payload: Mapping[str, Any], masks: Masks, path: str | Path) -> dict[str, Any]:
    """The payload as it was, in fp32 and in memory. ValueError naming `path` where masks and kept numbers disagree."""
    entry = payload[ENTRY]
    if not isinstance(entry, dict) or str(entry.get("dtype")) not in DTYPES:
        raise ValueError(f"{path}: is stored compactly as {entry!r:.80}, this version reads {', '.join(DTYPES)}")
    stored = payload["model"]
    unknown = [name for name in masks if name not in stored]
    if unknown:
        raise ValueError(f"{path}: has a mask of {unknown[0]}, but no such weight")
    try:
        _check_growth(stored, masks)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model = {
        name: _spread(tensor, masks[name], f"{path}: {name}") if name in masks else tensor.float().clone()
        for name, tensor in stored.items()
    }
    rest = {key: value for key, value in payload.items() if key != ENTRY}
    return {**rest, "model": model, "in_memory": True}


def _check_growth(stored: Mapping[str, Tensor], masks: Masks) -> None:
    """ValueError where the dense model would be out of proportion to what the file holds. Allocates nothing."""
    held = sum(tensor.numel() for tensor in stored.values())
    claimed = sum(math.prod(mask.shape) for mask in masks.values())
    if claimed > _MOST * held:
        raise ValueError(
            f"its masks make {claimed:,} numbers of the {held:,} that it holds, more than {_MOST} times as many: "
            "a model with so few is stored without --compact"
        )


def _spread(kept: Tensor, mask: Mask, what: str) -> Tensor:
    if not kept.is_floating_point() or kept.shape != (mask.kept,):
        raise ValueError(f"{what} holds {tuple(kept.shape)} of {kept.dtype}, its mask keeps {mask.kept:,} numbers")
    return torch.zeros(mask.shape).masked_scatter_(mask.dense(), kept.float())
