"""SparseGPT (Frantar and Alistarh 2023): removes weights column by column, and lets the columns to the right make up.

For the upper Cholesky factor U of H^-1, the row U[c, c:] / U[c, c] is what the inputs from c on must take over when a
weight of column c goes, with everything left of c already settled. All rows of the matrix so share one factor, though
each has its own zeros. Columns go in groups, so that most of the updates are one matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.pruning.refit import cholesky, damped

GROUP = 128  # columns that are settled before those to the right of them are updated; the mask is chosen at its start


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    second: Tensor,
    pattern: float | tuple[int, int] | Tensor,
    kept: Tensor | None = None,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """weight (out, in) made sparse and re-fitted; returns it and the weights kept, bool (out, in).

    second (in, in) is the inputs' mean x x^T. `pattern` is a share to remove (of each group of 128 columns), (n, m) for
    n zeros in each m neighbours, or a bool mask (out, in) to re-fit on. `kept`: what was there; its zeros stay.
    As in the authors' program, a share removes the weight at the threshold too, one more than asked in 128 columns.
    Raises ValueError where m does not divide the inputs, or H is singular.
    """
    if isinstance(pattern, tuple) and weight.size(1) % pattern[1]:
        raise ValueError(f"a matrix with {weight.size(1)} inputs has no pattern {pattern[0]}:{pattern[1]}")
    factor, work = _factor(weight, second, damping)
    keep = torch.ones_like(weight, dtype=torch.bool) if kept is None else kept.clone()
    if isinstance(pattern, Tensor):
        keep &= pattern
    for start in range(0, weight.size(1), GROUP):
        columns = slice(start, min(start + GROUP, weight.size(1)))
        own = factor[columns, columns]
        if isinstance(pattern, float) and pattern > 0:
            keep[:, columns] &= ~_lowest(work[:, columns], own, pattern, keep[:, columns])
        errors = _settle(work[:, columns], own, keep[:, columns], pattern if isinstance(pattern, tuple) else None)
        work[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return work.to(weight.dtype), keep


def _factor(weight: Tensor, second: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the damped H^-1 (in, in), and a working copy of the weight.

    Inputs that are never active lose their weights: nothing tells what those are for.
    """
    second = second.clone()
    dead = second.diagonal() == 0
    second.diagonal()[dead] = 1
    work = weight.to(second.dtype).masked_fill(dead, 0.0)
    inverse = torch.cholesky_inverse(cholesky(damped(second, damping)))
    return torch.linalg.cholesky(inverse, upper=True), work


def _salience(work: Tensor, own: Tensor, keep: Tensor) -> Tensor:
    """w^2 / U_cc^2, the squared error of removing each weight alone; what is removed already comes first."""
    return (work / own.diagonal()).square().masked_fill(~keep, -1.0)


def _lowest(work: Tensor, own: Tensor, share: float, keep: Tensor) -> Tensor:
    """The weights of a group of columns, bool (out, columns), that go for a share of them to be zero."""
    salience = _salience(work, own, keep)
    place = min(int(salience.numel() * share), salience.numel() - 1)
    return salience <= salience.flatten().sort().values[place]


def _settle(work: Tensor, own: Tensor, keep: Tensor, n_of_m: tuple[int, int] | None) -> Tensor:
    """Goes through a group's columns from left to right, in place; returns their errors (out, columns) over U_cc.

    work and keep (out, columns) are views; own (columns, columns) is the group's part of the factor. With n of m, the
    zeros of m columns are chosen when the first of them is reached, by what its neighbours have made of them.
    """
    errors = torch.zeros_like(work)
    for c in range(work.size(1)):
        if n_of_m is not None and c % n_of_m[1] == 0:
            n, m = n_of_m
            salience = _salience(work[:, c : c + m], own[c : c + m, c : c + m], keep[:, c : c + m])
            keep[:, c : c + m].scatter_(1, salience.topk(n, dim=1, largest=False).indices, False)
        removed = work[:, c].masked_fill(keep[:, c], 0.0)
        errors[:, c] = removed / own[c, c]
        work[:, c:] -= errors[:, c : c + 1] * own[c, c:]
        work[:, c].masked_fill_(~keep[:, c], 0.0)
    return errors
