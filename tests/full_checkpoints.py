"""A small checkpoint with training state, made without a network, for tests of files and folders."""

from __future__ import annotations

from typing import Any

import torch


def full_payload(step: int = 3, fill: float = 1.0) -> dict[str, Any]:
    """A small checkpoint with every kind of value that real ones hold."""
    generator = torch.Generator().manual_seed(step)
    weights = {f"h.{i}.w": torch.randn(24, 16, generator=generator) * fill for i in range(4)}
    return {
        "model": {**weights, "half": torch.arange(6, dtype=torch.bfloat16)},
        "config": {"n_layer": 4, "name": "x", "sizes": [1, 2], "none": None},
        "optimizer": {"adamw": {"h.0.w": {"step": torch.tensor(3.0), "exp_avg": torch.zeros(24, 16)}}},
        "scaler": {},
        "step": step,
        "val_loss": 1.25,
        "train_loader_state": {"sample": 12, "data": "abc"},
        "rng": [{"torch": torch.get_rng_state(), "numpy": ["MT19937", [1, 2], 3, 0, 0.0], "cuda": None}],
        "progress": {"step": step},
        "big": 2**100,
        "text": "größer",
    }


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, with the same types."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
