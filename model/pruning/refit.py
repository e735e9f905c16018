"""What remains of a matrix, fitted again by least squares so that its outputs stay near the whole matrix's.

For inputs x with second moment H = mean of x x^T, the weights W' on the kept inputs K that make mean |W x - W' x_K|^2
least are W H[:, K] H[K, K]^-1. Damping adds lambda |W' - W[:, K]|^2 for each row, lambda = damping * mean(diag H): what
calibration text says little about stays as it was, and inputs that are never active do not make H singular.
Everything is computed in the dtype of H. Sources: Optimal Brain Surgeon (Hassibi and Stork 1993), SparseGPT.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.masks import Mask
from model.pruning.statistics import Site


def damped(second: Tensor, damping: float) -> Tensor:
    """second (d, d) + damping * mean(diag) * I, a copy. ValueError where damping is negative."""
    if not damping >= 0:
        raise ValueError(f"damping is {damping!r}: give 0 or more (0.01 is usual)")
    result = second.clone()
    mean = second.diagonal().mean()
    # Where nothing was ever active the mean is 0; any positive number then leaves the weights as they are.
    result.diagonal().add_(damping * torch.where(mean > 0, mean, 1))
    return result


def cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor. ValueError naming the remedy where `matrix` is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any():
        raise ValueError("the inputs' second moment is singular: raise the damping, or take more calibration tokens")
    return factor


def refit_columns(weight: Tensor, second: Tensor, kept: Tensor, damping: float = 0.01) -> Tensor:
    """The weights (out, len(kept)) of the input columns `kept` that stand in for the whole of weight (out, in).

    second (in, in) is the inputs' second moment, kept int64 without repetition. With none kept the result is empty.
    Raises ValueError where the system is singular.
    """
    return _fit(weight, damped(second, damping), kept)


def _fit(weight: Tensor, whole: Tensor, kept: Tensor) -> Tensor:
    """W H[:, kept] H[kept, kept]^-1, (out, len(kept)), of a second moment that is damped already.

    H[:, kept] with its damping brings lambda W[:, kept] into the product, which is what damping adds on that side.
    """
    if len(kept) == weight.size(1):
        return weight[:, kept]
    right = weight.to(whole.dtype) @ whole[:, kept]  # (out, kept)
    return torch.cholesky_solve(right.t(), cholesky(whole[kept][:, kept])).t().to(weight.dtype)


def refit_with_bias(
    weight: Tensor, bias: Tensor, site: Site, kept: Tensor, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """As `refit_columns`, with the bias (out,) fitted too: returns (out, len(kept)) and (out,).

    The best bias makes the mean output equal; what is left to the weights is the inputs' covariance.
    """
    covariance = torch.addr(site.second, site.mean, site.mean, alpha=-1)
    fitted = refit_columns(weight, covariance, kept, damping)
    mean = site.mean.to(weight.dtype)
    return fitted, bias + weight @ mean - fitted @ mean[kept]


def refit_row_blocks(weight: Tensor, second: Tensor, mask: Mask, damping: float = 0.01) -> Tensor:
    """weight (out, in) fitted on the blocks that `mask` keeps, zero elsewhere.

    The rows of a block share one set of kept columns, so their exact optimum is one Cholesky factor (SparseGPT, whose
    rows all differ, must go from left to right instead). Rows that lose nothing stay as they are.
    """
    rows, columns = mask.block
    whole = damped(second, damping)
    result = torch.zeros_like(weight)
    for bits in mask.bits.unique(dim=0):
        same = (mask.bits == bits).all(dim=1)  # (row blocks,): all that share these columns are solved at once
        own = same.repeat_interleave(rows)[: weight.size(0)].nonzero().squeeze(1).to(weight.device)
        kept = bits.repeat_interleave(columns)[: weight.size(1)].nonzero().squeeze(1).to(weight.device)
        result[own.unsqueeze(1), kept] = _fit(weight[own], whole, kept)
    return result


def refit_scattered(
    weight: Tensor, second: Tensor, keep: Tensor, start: Tensor, damping: float = 0.01, steps: int = 20
) -> Tensor:
    """weight (out, in) fitted on the single weights that keep, bool (out, in), leaves; zero elsewhere.

    Each row has its own zeros, so that the exact optimum is a Cholesky factor a row. Instead all rows take `steps` of
    conjugate gradients together, preconditioned by H's diagonal, from `start` (SparseGPT's weights, say, which are
    zero outside keep): one product with H a step.
    """
    whole = damped(second, damping)
    inverse = 1 / whole.diagonal()
    fitted = start.to(whole.dtype)
    residual = ((weight - fitted) @ whole) * keep  # (out, in), minus half the gradient
    scaled = residual * inverse
    direction, size = scaled, (residual * scaled).sum(dim=1, keepdim=True)
    tiny = torch.finfo(whole.dtype).tiny
    for _ in range(steps):
        curve = (direction @ whole) * keep
        step = size / (direction * curve).sum(dim=1, keepdim=True).clamp_min(tiny)  # 0 where a row is settled
        fitted, residual = fitted + step * direction, residual - step * curve
        scaled, before = residual * inverse, size
        size = (residual * scaled).sum(dim=1, keepdim=True)
        direction = scaled + size / before.clamp_min(tiny) * direction
    return fitted.to(weight.dtype)
