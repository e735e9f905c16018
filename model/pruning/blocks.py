"""Blocks of zeros that a network survives: second-order costs, one ranking, an order of its units, a re-fit.

Half of all 16x16 blocks by their Wanda scores, the same share of each matrix, leaves nothing of a small language model.
What is done instead, each step of little use without the others:

1. The network's units are brought into an order in which its blocks are nearly all important or nearly all not.
2. A block costs what the loss is expected to rise by when it goes and its rows' other weights are re-fitted, to second
   order: sum over its rows r of g_r w_B (P_BB)^-1 w_B^T, P the inverse of the inputs' second moment, g_r the mean
   squared gradient at the output. Such costs can be compared between matrices, so there is one threshold for all.
3. A row of blocks gives up one after the other, and a block costs what it costs when its turn comes: of two that can
   stand in for each other, the first is cheap, the second dear.
4. What stays is re-fitted, exactly, since the rows of a block share their zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.gpt import GPT
from model.masks import Masks
from model.pruning.allocation import lowest_blocks
from model.pruning.matrices import layer_matrices
from model.pruning.orders import find_orders
from model.pruning.patterns import block_mask, block_sizes, kept_in_blocks
from model.pruning.permute import permute_, permute_gradients, permute_statistics
from model.pruning.refit import cholesky, damped, refit_row_blocks
from model.pruning.scores import fisher_squares
from model.pruning.statistics import SITE_OF, Gradients, LayerStatistics

Statistics = Callable[[int], LayerStatistics]
# In which a row of blocks goes, a few at a time where it is longer. SmolLM2-135M, half of all blocks: 25 times the
# dense perplexity without turns, 10.3 with seven rounds over all matrices, 8.3 so.
STEPS = 12


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
    """Chooses the blocks that go and re-fits the others, in place."""
    prices, sizes, left = {}, {}, {}
    block = (settings.size, settings.size)
    for layer in settings.layers:
        inverses: dict[str, Tensor] = {}
        own = statistics(layer)
        for linear, module in layer_matrices(model, layer):
            name, site = f"h.{layer}.{linear}", SITE_OF[linear]
            if site not in inverses:
                second = damped(own.of(linear).second, settings.damping)
                inverses[site] = torch.cholesky_inverse(cholesky(second))
            sizes[name] = block_sizes(_shape(module), block)
            left[name] = kept_in_blocks(_shape(module), block, old.get(f"{name}.weight"))
            costs = removal_costs(module.weight, inverses[site], output[name], settings.size)
            prices[name] = costs / left[name].clamp_min(1).to(costs.device)
    bits = _choose(prices, sizes, left, settings)
    masks: Masks = {}
    for layer in settings.layers:
        own = statistics(layer)
        for linear, module in layer_matrices(model, layer):
            name = f"h.{layer}.{linear}"
            mask = block_mask(bits[name], _shape(module), block, old.get(f"{name}.weight"))
            module.weight.copy_(refit_row_blocks(module.weight, own.of(linear).second, mask, settings.damping))
            masks[f"{name}.weight"] = mask
    return masks


def _choose(
    prices: dict[str, Tensor], sizes: dict[str, Tensor], left: dict[str, Tensor], settings: BlockSettings
) -> dict[str, Tensor]:
    """The blocks kept, bool by matrix, when those with the lowest price go: of all matrices, or the same of each."""
    if settings.together:
        every, own = list(prices.values()), list(left.values())
        kept = lowest_blocks(every, list(sizes.values()), settings.sparsity, settings.cap, own)
    else:
        kept = [lowest_blocks([prices[n]], [sizes[n]], settings.sparsity, 1.0, [left[n]])[0] for n in prices]
    return dict(zip(prices, kept))


def removal_costs(weight: Tensor, inverse: Tensor, output: Tensor, size: int, steps: int = STEPS) -> Tensor:
    """What each block of size x size costs the loss when its turn comes: (block rows, block columns).

    weight (out, in), inverse (in, in) P of the damped second moment, output (out,) the rows' squared gradients g. In a
    block row the cheapest go first, `in / size / steps` at a time, with their joint cost in equal parts; then the
    others take over, w - w_D P_DD^-1 P_D, and P loses the inputs D (Optimal Brain Surgeon; as ZipLM does it for
    columns). A cost is never below those before it in its row, so a threshold over all rows takes each row's first.
    """
    out, into = weight.shape
    # Partial blocks at the edges are made whole by rows and inputs of no effect.
    weight = F.pad(weight.to(inverse.dtype), (0, -into % size, 0, -out % size))
    inverse = torch.block_diag(inverse, torch.eye(-into % size, dtype=inverse.dtype, device=inverse.device))
    scale = F.pad(output.to(inverse.dtype).sqrt(), (0, -out % size)).unsqueeze(1)
    # A row scaled by sqrt(g) pays g times as much.
    return torch.stack([_costs_of_row(rows, inverse, size, steps) for rows in (weight * scale).split(size)])


def _costs_of_row(rows: Tensor, inverse: Tensor, size: int, steps: int) -> Tensor:
    """`removal_costs` of one block row (size, in), its rows scaled: (block columns,)."""
    left = torch.arange(rows.size(1) // size, device=rows.device)
    costs = rows.new_empty(len(left))
    highest = 0.0
    counts = [len(left) * (i + 1) // steps - len(left) * i // steps for i in range(steps)]
    for count in filter(None, counts):
        corners = inverse.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        parts = rows.unflatten(1, (-1, size)).permute(1, 2, 0)  # (blocks, size, rows)
        alone = torch.linalg.solve_triangular(cholesky(corners), parts, upper=False).square().sum(dim=(1, 2))
        going = alone.sort(stable=True).indices[:count]
        stays = torch.ones_like(left, dtype=torch.bool).index_fill(0, going, False)
        lost, kept = (m.repeat_interleave(size).nonzero().squeeze(1) for m in (~stays, stays))
        factor = cholesky(inverse[lost][:, lost])
        half = torch.linalg.solve_triangular(factor, inverse[lost].index_select(1, kept), upper=False)
        paid = torch.linalg.solve_triangular(factor, rows[:, lost].t(), upper=False)
        highest = max(highest, float(paid.square().sum()) / count)
        costs[left[going]] = highest
        rows = rows[:, kept] - paid.t() @ half
        inverse = inverse.index_select(0, kept).index_select(1, kept).addmm_(half.t(), half, alpha=-1)
        left = left[stays]
    return costs


def _shape(module: nn.Linear) -> tuple[int, int]:
    return module.out_features, module.in_features
