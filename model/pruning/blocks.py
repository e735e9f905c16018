"""Blocks of zeros that a network survives: second-order costs, one ranking, an order of its units, a re-fit.

Half of all 16x16 blocks by their Wanda scores, the same share of each matrix, leaves nothing of a small language model.
What is done instead, each step of little use without the others:

1. The network's units are brought into an order in which its blocks are nearly all important or nearly all not.
2. A block costs what the loss is expected to rise by when it goes and its rows' other weights are re-fitted, to second
   order: sum over its rows r of g_r w_B (P_BB)^-1 w_B^T, P the inverse of the inputs' second moment, g_r the mean
   squared gradient at the output. Such costs can be compared between matrices, so there is one threshold for all.
3. Blocks go in rounds. After each, what is left is re-fitted, exactly, since the rows of a block share their zeros, and
   costs are computed anew without the inputs that are gone: of two blocks that can stand in for each other, one stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.gpt import GPT
from model.masks import Mask, Masks
from model.pruning.allocation import lowest_blocks
from model.pruning.matrices import layer_matrices, matrices
from model.pruning.orders import find_orders
from model.pruning.patterns import block_mask, block_sizes
from model.pruning.permute import permute_, permute_gradients, permute_statistics
from model.pruning.refit import cholesky, damped
from model.pruning.scores import block_sums, fisher_squares
from model.pruning.statistics import SITE_OF, Gradients, LayerStatistics

Statistics = Callable[[int], LayerStatistics]
# Shares of what is to go: the later a round, the less it takes. One round instead of seven: ratio 25 instead of 10.
ROUNDS = (0.2, 0.4, 0.6, 0.76, 0.88, 0.96, 1.0)


@dataclass(frozen=True)
class BlockSettings:
    """What `prune_blocks` removes, and from where."""

    size: int
    sparsity: float
    layers: Sequence[int]
    cap: float = 0.9  # the most that one matrix loses
    damping: float = 0.01
    together: bool = True  # one threshold for all matrices; False: the same share of each
    reorder: bool = True  # units may change places; ruled out where zeros of before have theirs


@torch.no_grad()
def prune_blocks(
    model: GPT,
    statistics: Statistics,
    output: dict[str, Tensor],
    settings: BlockSettings,
    old: dict[str, Tensor],
) -> Masks:
    """Removes blocks as described above, in place; returns the masks of the layers in range.

    statistics and output (mean squared gradients, (out,) by matrix) are the dense model's; old, bool (out, in) by
    weight: what is kept of one that is sparse already.
    """
    if settings.reorder and not old:
        statistics, output = _reorder_(model, statistics, output, settings)
    return _remove_(model, statistics, output, settings, old)


def _reorder_(
    model: GPT, statistics: Statistics, output: dict[str, Tensor], settings: BlockSettings
) -> tuple[Statistics, dict[str, Tensor]]:
    """Brings the model's units into an order for blocks, in place; returns statistics and gradients in that order."""

    def squares(layer: int) -> dict[str, Tensor]:
        own = statistics(layer)
        return {
            linear: fisher_squares(module.weight, own.of(linear).second, output[f"h.{layer}.{linear}"])
            for linear, module in layer_matrices(model, layer)
        }

    orders = find_orders(model.config, squares, settings.size, settings.sparsity)
    permute_(model, orders)
    return (
        lambda layer: permute_statistics(statistics(layer), layer, orders, model.config),
        permute_gradients(Gradients(output), orders).output,
    )


def _remove_(
    model: GPT, statistics: Statistics, output: dict[str, Tensor], settings: BlockSettings, old: dict[str, Tensor]
) -> Masks:
    """Removes blocks in rounds, each time re-fitting the others, from the weights as they were at first."""
    block = (settings.size, settings.size)
    whole = {name: module.weight.clone() for name, module in matrices(model, settings.layers).items()}
    gone = {name: block_sums(old[f"{name}.weight"].float(), *block) == 0 for name in whole if f"{name}.weight" in old}
    costs: dict[str, Tensor] = {}
    masks: Masks = {}
    # What cuts through blocks is re-fitted weight by weight: too slow for more than one round.
    for part in (0.0, 1.0) if old else (0.0, *ROUNDS):
        if part:
            bits = _choose(costs, output, whole, gone, part * settings.sparsity, settings)
            gone = {name: ~kept for name, kept in bits.items()}
            masks = {
                f"{name}.weight": block_mask(bits[name], _shape(weight), block, old.get(f"{name}.weight"))
                for name, weight in whole.items()
            }
        for layer in settings.layers:
            inverses: dict[str, Tensor] = {}
            own = statistics(layer)
            for linear, module in layer_matrices(model, layer):
                name, site = f"h.{layer}.{linear}", SITE_OF[linear]
                if site not in inverses:
                    second = damped(own.of(linear).second, settings.damping)
                    inverses[site] = torch.cholesky_inverse(cholesky(second))
                mask = masks.get(f"{name}.weight", Mask.of(torch.ones_like(whole[name], dtype=torch.bool), block))
                weight, costs[name] = remove_blocks(whole[name], inverses[site], mask)
                module.weight.copy_(weight)
    return masks


def _choose(
    costs: dict[str, Tensor],
    output: dict[str, Tensor],
    weights: dict[str, Tensor],
    gone: dict[str, Tensor],
    sparsity: float,
    settings: BlockSettings,
) -> dict[str, Tensor]:
    """The blocks kept, bool by matrix, when those go that cost the loss least; first of all what is `gone` already."""
    prices, sizes = [], []
    for name, cost in costs.items():
        out, into = weights[name].shape
        size = block_sizes((out, into), (settings.size, settings.size))
        price = block_sums(output[name].unsqueeze(1) * cost, settings.size, 1) / size.to(cost.device)
        prices.append(price.masked_fill(gone[name], -1.0) if name in gone else price)
        sizes.append(size)
    if settings.together:
        kept = lowest_blocks(prices, sizes, sparsity, settings.cap)
    else:
        kept = [lowest_blocks([price], [size], sparsity, cap=1.0)[0] for price, size in zip(prices, sizes)]
    return dict(zip(costs, kept))


def remove_blocks(weight: Tensor, inverse: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """weight (out, in) without the blocks that `mask` removes, the others re-fitted, and what each of those costs now.

    inverse (in, in) is P, of the damped second moment of all inputs. When the inputs D go, the rest of a row becomes
    w - w_D P_DD^-1 P_D, which is its least-squares fit, and P itself P - P_:D P_DD^-1 P_D:, so one small Cholesky
    factor for all rows with the same D gives both: Optimal Brain Surgeon (Hassibi and Stork 1993) for many weights at
    once. The costs (out, block columns) are w_B (P_BB)^-1 w_B^T with the new w and P, 0 for what is gone.
    """
    rows, columns = mask.block
    into = weight.size(1)
    fitted = F.pad(weight.to(inverse.dtype), (0, -into % columns))  # the last block made whole by inputs of no effect
    inverse = torch.block_diag(inverse, torch.eye(-into % columns, dtype=inverse.dtype, device=inverse.device))
    diagonal = inverse.unflatten(0, (-1, columns)).unflatten(2, (-1, columns)).diagonal(dim1=0, dim2=2)
    costs = fitted.new_zeros(fitted.size(0), mask.bits.size(1))
    for bits in mask.bits.unique(dim=0):
        own = (mask.bits == bits).all(dim=1).repeat_interleave(rows)[: len(fitted)].nonzero().squeeze(1)
        lost = (~bits).repeat_interleave(columns).nonzero().squeeze(1)  # D
        factor = cholesky(inverse[lost][:, lost])
        half = torch.linalg.solve_triangular(factor, inverse[lost], upper=False)  # (D, in)
        row = fitted[own]
        row -= torch.linalg.solve_triangular(factor, row[:, lost].t(), upper=False).t() @ half
        row[:, lost] = 0.0
        fitted[own] = row
        half = half.unflatten(1, (-1, columns)).permute(1, 2, 0)  # (blocks, columns, D)
        left = (diagonal.permute(2, 0, 1) - half @ half.transpose(1, 2))[bits]
        parts = row.unflatten(1, (-1, columns)).permute(1, 2, 0)[bits]  # (kept blocks, columns, own)
        squares = torch.linalg.solve_triangular(cholesky(left), parts, upper=False).square().sum(dim=1)
        costs[own.unsqueeze(1), bits.nonzero().squeeze(1)] = squares.t()
    return fitted[:, :into].to(weight.dtype), costs


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.size(0), weight.size(1)
