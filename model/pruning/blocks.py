"""Blocks of zeros that a network survives (NAME OF RECIPE BELOW)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from model.gpt import GPT
from model.masks import Masks
from model.pruning.allocation import lowest_blocks
from model.pruning.matrices import layer_matrices, matrices
from model.pruning.orders import find_orders
from model.pruning.patterns import block_mask, block_sizes
from model.pruning.permute import permute_, permute_gradients, permute_statistics
from model.pruning.refit import refit_row_blocks
from model.pruning.scores import block_sums, fisher_squares, row_costs
from model.pruning.statistics import Gradients, LayerStatistics, gradients

Statistics = Callable[[int], LayerStatistics]


def squared_gradients(model: GPT, found: Gradients | Tensor | None) -> dict[str, Tensor]:
    """The mean squared gradient at each matrix's outputs, (out,) by its name. ValueError where there is no text."""
    if found is None:
        raise ValueError("unbalanced allocation and second-order blocks need gradients on calibration text")
    return (gradients(model, found) if isinstance(found, Tensor) else found).output


def block_costs(
    model: GPT, statistics: Statistics, layers: Iterable[int], size: int, damping: float
) -> dict[str, Tensor]:
    """`row_costs` of each matrix of some layers, by its name."""
    costs = {}
    for layer in layers:
        own = statistics(layer)
        for linear, module in layer_matrices(model, layer):
            costs[f"h.{layer}.{linear}"] = row_costs(module.weight, own.of(linear).second, size, damping)
    return costs


def choose_blocks(
    model: GPT,
    costs: dict[str, Tensor],
    output: dict[str, Tensor],
    size: int,
    sparsity: float,
    cap: float,
    old: dict[str, Tensor],
) -> Masks:
    """The masks of matrices, by their weights' names, when the blocks that cost the loss least go, from all at once.

    costs are `block_costs`, output the squared gradients; old: what is kept of matrices that are sparse already.
    """
    shapes = {
        name: (module.out_features, module.in_features) for name, module in matrices(model, _layers(costs)).items()
    }
    prices, sizes = [], []
    for name, cost in costs.items():
        each = block_sizes(shapes[name], (size, size))
        price = block_sums(output[name].unsqueeze(1) * cost, size, 1) / each.to(cost.device)
        if f"{name}.weight" in old:
            empty = block_sums(old[f"{name}.weight"].float(), size, size) == 0
            price = price.masked_fill(empty, -1.0)
        prices.append(price)
        sizes.append(each)
    bits = lowest_blocks(prices, sizes, sparsity, cap)
    return {
        f"{name}.weight": block_mask(kept, shapes[name], (size, size), old.get(f"{name}.weight"))
        for name, kept in zip(costs, bits)
    }


def _layers(names: Iterable[str]) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in names})


def second_order_blocks(
    model: GPT,
    statistics: Statistics,
    output: dict[str, Tensor],
    layers: Iterable[int],
    size: int,
    sparsity: float,
    cap: float,
    damping: float,
    old: dict[str, Tensor],
    permute: bool,
) -> Masks:
    if permute and not old:

        def squares(layer: int) -> dict[str, Tensor]:
            own = statistics(layer)
            return {
                linear: fisher_squares(module.weight, own.of(linear).second, output[f"h.{layer}.{linear}"])
                for linear, module in layer_matrices(model, layer)
            }

        orders = find_orders(model.config, squares, size, sparsity)
        permute_(model, orders)
        output = permute_gradients(Gradients(output), orders).output
        before = statistics
        statistics = lambda layer: permute_statistics(before(layer), layer, orders, model.config)  # noqa
    costs = block_costs(model, statistics, layers, size, damping)
    masks = choose_blocks(model, costs, output, size, sparsity, cap, old)
    for layer in layers:
        own = statistics(layer)
        for linear, module in layer_matrices(model, layer):
            mask = masks[f"h.{layer}.{linear}.weight"]
            module.weight.copy_(refit_row_blocks(module.weight, own.of(linear).second, mask, damping))
    return masks


def prune_blocks(model, source, found, settings, old) -> Masks:
    output = squared_gradients(model, found)
    return second_order_blocks(
        model,
        source,
        output,
        settings.layers(model.config.n_layer),
        settings.block_size,
        settings.sparsity,
        settings.cap,
        settings.damping,
        old,
        True,
    )
