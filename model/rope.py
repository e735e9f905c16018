"""Rotary positions: each head's vector is turned by angles that grow with the position (Su et al. 2021, RoFormer)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def rope_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None, device: torch.device) -> Tensor:
    """Radians per position of each pair i of dimensions, fp32 (head_dim / 2,): theta ** (-2i / head_dim), scaled."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    assert scaling["rope_type"] == "llama3"
    return _llama3_scaled(frequencies, scaling)


def _llama3_scaled(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1's stretch of the context: slow pairs turn `factor` times slower, fast ones as before, a blend between.

    A pair is fast when it turns at least high_freq_factor times within the context that the model was first trained on,
    and slow when it turns at most low_freq_factor times.
    """
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    fast = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # 0 = slow, 1 = fast
    return fast * frequencies + (1.0 - fast) * frequencies / scaling["factor"]


def rope_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of each position (..., T), fp32 (..., T, 1, head_dim): the 1 is the head axis.

    Both halves of a pair have their entry; the sine of the first half is negative, as `apply_rope` wants it.
    They are computed once per forward and shared by all layers. Kept as buffers they would be rounded by
    `model.to(torch.bfloat16)`, and bf16 cannot tell position 257 from 256.
    """
    angles = (positions.unsqueeze(-1).float() * frequencies).unsqueeze(-2)  # (..., T, 1, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair (i, i + head_dim / 2) of x (B, T, heads, head_dim): the half-split order of Llama files.

    (a, b) becomes (a cos - b sin, b cos + a sin): x with its halves exchanged, times the signed sine, is the second
    term of both. Three operations instead of eight halve the time of a decoding step's rotations.
    """
    cos, sin = tables
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.size(-1) // 2, dims=-1), sin).to(x.dtype)
