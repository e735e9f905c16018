"""Optimal Brain Surgeon for units of input columns: what the loss pays as they go one after the other.

With P the inverse of the inputs' second moment H, taking the columns U out of w and fitting the others again costs
w_U (P_UU)^-1 w_U^T a row, and rows are weighted by the Fisher information g of their outputs. Two units that say the
same are each worth nothing while the other stays; so units go in order, and what is left is fitted before the next are
looked at, as in ZipLM (Kurtic et al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.pruning.refit import cholesky, damped


def removal_costs(
    weight: Tensor, second: Tensor, fisher: Tensor, width: int = 1, *, damping: float = 0.01, steps: int = 64
) -> Tensor:
    """(in / width,) the rise of sum_r g_r |error of output r|^2 as each unit of `width` columns goes, cheapest first.

    weight (out, in), second (in, in), fisher (out,). The costs never fall along the order of removal, so that the order
    can be read off them. Of many units the cheapest `in / width / steps` go at a time and share their joint cost: 64
    steps take as long as one more inversion of H. fp64 on the CPU.
    """
    inverse = torch.cholesky_inverse(cholesky(damped(second, damping)))
    weight = weight.to(inverse.dtype).clone()
    n_units = weight.size(1) // width
    alive = torch.ones(n_units, dtype=torch.bool, device=weight.device)
    costs = torch.zeros(n_units, dtype=torch.float64)
    highest = 0.0
    for rank, size in enumerate(_sizes(n_units, steps)):
        alone = torch.where(alive, _alone(weight, inverse, fisher, width), torch.inf)  # (units,)
        going = alone.argsort(stable=True)[:size]
        columns = (going.unsqueeze(1) * width + torch.arange(width, device=going.device)).flatten()
        joint = _remove_(weight, inverse, fisher, columns)
        alive[going] = False
        # A cost below the one before it is lifted to it, and a hair more: sorting then gives the order of removal.
        highest = max(joint / size, highest * (1 + 1e-9), torch.finfo(torch.float64).tiny * (rank + 1))
        costs[going.cpu()] = highest
    return costs


def _sizes(n_units: int, steps: int) -> list[int]:
    """How many units go in each step: as even as whole numbers are, the sum is n_units."""
    steps = min(steps, n_units)
    return [n_units * (i + 1) // steps - n_units * i // steps for i in range(steps)]


def _alone(weight: Tensor, inverse: Tensor, fisher: Tensor, width: int) -> Tensor:
    """(units,) the cost of each unit if it is the next to go, alone; that of units already gone means nothing."""
    if width == 1:
        return (fisher @ weight.square()) / inverse.diagonal()
    n_units = weight.size(1) // width
    own = weight.unflatten(1, (n_units, width)).transpose(0, 1)  # (units, out, width)
    corners = inverse.unflatten(0, (n_units, width)).unflatten(2, (n_units, width))
    corners = corners.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (units, width, width)
    factors, failed = torch.linalg.cholesky_ex(corners)
    gram = own.transpose(1, 2) @ (own * fisher.unsqueeze(1))  # (units, width, width)
    costs = torch.cholesky_solve(gram, factors).diagonal(dim1=1, dim2=2).sum(dim=1)
    return torch.where(failed == 0, costs, torch.inf)


def _remove_(weight: Tensor, inverse: Tensor, fisher: Tensor, columns: Tensor) -> float:
    """Takes columns out of weight and inverse, in place, the others fitted again; returns what that costs."""
    own, rows = weight[:, columns], inverse[columns]  # (out, c), (c, in)
    factor = cholesky(rows[:, columns])
    solved = torch.cholesky_solve(own.t(), factor)  # (c, out)
    cost = float((own.t() * solved * fisher).sum())
    weight -= solved.t() @ rows
    inverse -= rows.t() @ torch.cholesky_solve(rows, factor)
    weight[:, columns] = 0  # exactly, where rounding leaves a little
    inverse[columns], inverse[:, columns] = 0, 0
    return cost
