"""What a weight, or a block of weights, is worth: the higher its score, the longer it is kept.

All take a linear layer's weight (out, in) and what calibration text says about its inputs: `norms` (in,), the root mean
square of each, or `second` (in, in), the mean of x x^T. Scales that are common to a whole matrix do not matter within
it; only the Fisher-weighted scores, which are changes of the loss, can be compared between matrices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w| (out, in): what needs no text."""
    return weight.abs()


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """|w| * ||x|| (out, in) (Sun et al. 2023): a weight's part in the output, but for its sign."""
    return weight.abs() * norms


def ria(weight: Tensor, norms: Tensor, power: float = 0.5) -> Tensor:
    """Relative importance and activations (Zhang et al. 2024), (out, in).

    |w| as a share of its row plus |w| as a share of its column, so that no row or column is emptied, times ||x||^power.
    """
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny  # of an empty row or column every share is 0
    shares = size / size.sum(dim=0).clamp_min(tiny) + size / size.sum(dim=1, keepdim=True).clamp_min(tiny)
    return shares * norms**power


def fisher_squares(weight: Tensor, second: Tensor, output: Tensor) -> Tensor:
    """g_r w^2 H_cc (out, in): about twice the loss of one weight alone, nothing re-fitted.

    output (out,) is g, the mean over tokens of (dL / dy_r)^2: the Fisher matrix as its outputs' diagonal times H.
    """
    return output.unsqueeze(1) * weight.square() * second.diagonal()


def block_sums(scores: Tensor, rows: int, columns: int) -> Tensor:
    """The sum over each block of scores (out, in): (ceil(out / rows), ceil(in / columns)). Edge blocks are partial."""
    out, into = scores.shape
    padded = F.pad(scores, (0, -into % columns, 0, -out % rows))
    return padded.view(padded.size(0) // rows, rows, -1, columns).sum(dim=(1, 3))
