"""Sparse pruning, all ways through one door: scores by method, zeros in a pattern, shares by allocation.

For blocks, magnitude, wanda and ria remove those with the smallest sums of their scores, and nothing makes up for them;
sparsegpt is the way of blocks.py, whose ranking of all matrices together is allocation "unbalanced". Half of the 16x16
blocks of SmolLM2-135M, as the ratio of its perplexity to the dense one: wanda uniform 669, sparsegpt unbalanced 8.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.gpt import GPT
from model.masks import UNSTRUCTURED, Mask, Masks, SparsityRow, sparsity_report
from model.pruning.allocation import Ranking, evenly, lowest_blocks, outlier_share, owl, uniform
from model.pruning.blocks import BlockSettings, prune_blocks
from model.pruning.matrices import layer_matrices, matrices
from model.pruning.patterns import (
    BLOCK,
    block_mask,
    block_sizes,
    kept_in_blocks,
    parse_pattern,
    prune_matrix,
    prune_n_of_m,
    prune_rows,
)
from model.pruning.refit import refit_scattered
from model.pruning.scores import block_sums, fisher_squares, magnitude, ria, wanda
from model.pruning.sparsegpt import sparsegpt
from model.pruning.statistics import Gradients, LayerStatistics, Site, collect, gradients

METHODS = ("magnitude", "wanda", "ria", "sparsegpt")
ALLOCATIONS = ("uniform", "owl", "unbalanced")
Source = Callable[[int], LayerStatistics] | Tensor | None


@dataclass(frozen=True)
class SparseSettings:
    """What is to be zero. ValueError for values that do not go together."""

    method: str = "wanda"
    sparsity: float = 0.5  # of all matrices of the layers in range, together
    pattern: str = UNSTRUCTURED  # or "2:4", "4:8", "block"
    block_size: int = 16
    allocation: str = "uniform"
    layer_start: int = 0
    layer_end: int | None = None  # exclusive; None: the last layer too
    reorder: bool = True  # blocks by sparsegpt: hidden units may change places, also against a dense model beside it
    refit: bool = True  # sparsegpt, single weights: what stays is fitted again, all at once, after the last column
    damping: float = 0.01  # of least squares and H^-1, as a share of the mean of H's diagonal

    def __post_init__(self) -> None:
        for name, choices in (("method", METHODS), ("allocation", ALLOCATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity is {self.sparsity!r}: give a share above 0 and below 1")
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size!r}: give a whole number of at least 1 (16 is usual)")
        n_of_m = parse_pattern(self.pattern)
        if n_of_m is not None and self.sparsity != n_of_m[0] / n_of_m[1]:
            raise ValueError(f"pattern {self.pattern} has a sparsity of 0.5, not {self.sparsity}: leave --sparsity out")
        if n_of_m is not None and self.allocation != "uniform":
            raise ValueError(f"pattern {self.pattern} takes the same share everywhere: leave --allocation out")
        if self.pattern == BLOCK and self.method == "sparsegpt" and self.allocation == "owl":
            raise ValueError(
                "blocks by method sparsegpt are ranked by their loss: give --allocation unbalanced or uniform"
            )

    @property
    def cap(self) -> float:
        """The most that an unbalanced allocation takes of one matrix: 0.9, or half way from the share to all."""
        return max(0.9, (1 + self.sparsity) / 2)

    def layers(self, n_layer: int) -> range:
        """The layers in range. ValueError where they are not in the model."""
        end = n_layer if self.layer_end is None else self.layer_end
        if not 0 <= self.layer_start < end <= n_layer:
            raise ValueError(
                f"layers {self.layer_start} to {end} (exclusive) are not in a model of {n_layer}: give "
                f"0 <= layer_start < layer_end <= {n_layer}"
            )
        return range(self.layer_start, end)


@torch.no_grad()
def prune_sparse(
    model: GPT,
    source: Source,
    found: Gradients | Tensor | None,
    settings: SparseSettings,
    masks: Masks | None = None,
) -> tuple[Masks, list[SparsityRow]]:
    """Makes the model's matrices sparse in place; returns all masks, and a row on each.

    source: the statistics of a layer by its number, as `collect` found them in this model (cached ones, say); or
    windows (N, T) int64, from which each layer's are collected once those before it are pruned, as Wanda and SparseGPT
    do; or None for magnitude. found: gradients of this model, or the windows to make them from; allocation "unbalanced"
    and the second-order block method ask for them. masks: those of a model that is sparse already; its zeros stay.
    Raises ValueError for settings that do not fit the model, or when something that they need is not given.
    """
    old = {name: mask.dense().to(model.wte.weight.device) for name, mask in (masks or {}).items()}
    prune = _second_order_blocks if settings.pattern == BLOCK and settings.method == "sparsegpt" else _one_by_one
    new = prune(model, source, found, settings, old)
    result = {**(masks or {}), **new}
    return result, sparsity_report(model, result)


def _second_order_blocks(
    model: GPT,
    source: Source,
    found: Gradients | Tensor | None,
    settings: SparseSettings,
    old: dict[str, Tensor],
) -> Masks:
    if source is None:
        raise ValueError(f"method {settings.method} needs calibration text")
    if isinstance(source, Tensor):
        source = [statistics for _, statistics in collect(model, source, frozen=True)].__getitem__
    block = BlockSettings(
        settings.block_size,
        settings.sparsity,
        settings.layers(model.config.n_layer),
        settings.cap,
        settings.damping,
        together=settings.allocation == "unbalanced",
        reorder=settings.reorder,
    )
    sizes = {name: module.weight.numel() for name, module in matrices(model, block.layers).items()}
    limit = {name: round(block.sparsity * size) for name, size in sizes.items()}
    if block.together:
        total = sum(limit.values())
        limit = {name: min(int(block.cap * size), total) for name, size in sizes.items()}
    _check_blocks(model, limit, settings, old)
    return prune_blocks(model, source, _squared_gradients(model, found), block, old)


def _check_blocks(model: GPT, removed: dict[str, int], settings: SparseSettings, old: dict[str, Tensor]) -> None:
    """ValueError where no matrix has a block that is as small as what the matrix may lose."""
    block = (settings.block_size, settings.block_size)
    for name, module in matrices(model, settings.layers(model.config.n_layer)).items():
        shape = (module.out_features, module.in_features)
        left = kept_in_blocks(shape, block, old.get(f"{name}.weight"))
        room = removed[name] - (module.weight.numel() - int(left.sum()))
        if bool(((left > 0) & (left <= room)).any()):
            return
    raise ValueError(
        f"--block_size {settings.block_size}: not one block fits into a sparsity of {settings.sparsity:g}: give a "
        "smaller one, or a larger --sparsity"
    )


def _one_by_one(
    model: GPT,
    source: Source,
    found: Gradients | Tensor | None,
    settings: SparseSettings,
    old: dict[str, Tensor],
) -> Masks:
    """Prunes layer by layer, each matrix by its own scores."""
    layers = settings.layers(model.config.n_layer)
    removed = _removed(model, source, found, settings, old)
    if settings.pattern == BLOCK:
        _check_blocks(model, removed, settings, old)
    masks = {}
    for layer, statistics in _statistics(model, source, settings):
        if layer not in layers:
            continue
        for linear, module in layer_matrices(model, layer):
            name = f"h.{layer}.{linear}"
            site = None if statistics is None else statistics.of(linear)
            weight, mask = _prune(module.weight, site, removed[name], settings, old.get(f"{name}.weight"))
            module.weight.copy_(weight)
            masks[f"{name}.weight"] = mask
    return masks


def _prune(
    weight: Tensor, site: Site | None, removed: int, settings: SparseSettings, kept: Tensor | None
) -> tuple[Tensor, Mask]:
    """One matrix without `removed` of its weights, and its mask."""
    n_of_m = parse_pattern(settings.pattern)
    if settings.method == "sparsegpt":
        assert site is not None
        share = removed / weight.numel()
        fitted, keep = sparsegpt(weight, site.second, n_of_m or share, kept, settings.damping)
        if settings.refit:
            fitted = refit_scattered(weight, site.second, keep, fitted, settings.damping)
        return fitted, Mask.of(keep)
    scores = _scores(weight, site, settings.method)
    if settings.pattern == BLOCK:
        block = (settings.block_size, settings.block_size)
        mask = _lowest_of_one(scores, removed, block, kept)
        return weight * mask.dense(), mask
    if n_of_m is not None:
        keep = prune_n_of_m(scores, *n_of_m, kept)
    elif settings.method == "magnitude":
        keep = prune_matrix(scores, removed, kept)  # as its authors do; the others compare within a row
    else:
        keep = prune_rows(scores, removed, kept)
    return weight * keep, Mask.of(keep)


def _lowest_of_one(scores: Tensor, removed: int, block: tuple[int, int], kept: Tensor | None) -> Mask:
    """The blocks of a matrix with the lowest sums of scores go, up to `removed` weights; 001's way."""
    shape = (scores.size(0), scores.size(1))
    sizes, left = block_sizes(shape, block), kept_in_blocks(shape, block, kept)
    if removed in (0, scores.numel()):  # of a matrix that an allocation spares, or takes as a whole
        bits = torch.full_like(sizes, removed == 0, dtype=torch.bool, device=scores.device)
        return block_mask(bits, shape, block, kept)
    price = block_sums(scores if kept is None else scores * kept, *block) / left.clamp_min(1).to(scores.device)
    (bits,) = lowest_blocks([price], [sizes], removed / scores.numel(), 1.0, [left])
    return block_mask(bits, shape, block, kept)


def _scores(weight: Tensor, site: Site | None, method: str) -> Tensor:
    if method == "magnitude":
        return magnitude(weight)
    assert site is not None
    return wanda(weight, site.norms) if method == "wanda" else ria(weight, site.norms)


def _statistics(
    model: GPT, source: Source, settings: SparseSettings, frozen: bool = False
) -> Iterator[tuple[int, LayerStatistics | None]]:
    """Each layer's statistics in turn; `frozen`: nothing is changed between them."""
    if isinstance(source, Tensor):
        yield from collect(model, source, frozen=frozen)
        return
    if source is None and settings.method != "magnitude":
        raise ValueError(f"method {settings.method} needs calibration text")
    for layer in range(model.config.n_layer):
        yield layer, None if source is None else source(layer)


def _removed(
    model: GPT, source: Source, found: Gradients | Tensor | None, settings: SparseSettings, old: dict[str, Tensor]
) -> dict[str, int]:
    """How many weights each matrix loses, by its name."""
    layers = settings.layers(model.config.n_layer)
    if settings.allocation != "uniform" and source is None:
        raise ValueError(f"allocation {settings.allocation} needs calibration text")
    sizes = {name: module.weight.numel() for name, module in matrices(model, layers).items()}
    if settings.allocation == "uniform":
        return dict(zip(sizes, uniform(list(sizes.values()), settings.sparsity)))
    if settings.allocation == "owl":
        return _by_outliers(model, source, settings, sizes)
    ranking = Ranking(settings.cap)
    output = _squared_gradients(model, found)
    for layer, statistics in _statistics(model, source, settings, frozen=True):
        assert statistics is not None
        for linear, module in layer_matrices(model, layer) if layer in layers else ():
            name = f"h.{layer}.{linear}"
            ranking.add(fisher_squares(module.weight, statistics.of(linear).second, output[name]))
    return dict(zip(sizes, ranking.counts_for(settings.sparsity)))


def _by_outliers(model: GPT, source: Source, settings: SparseSettings, sizes: dict[str, int]) -> dict[str, int]:
    """OWL's shares of the layers, the same for each matrix of a layer."""
    removed: dict[str, int] = {}
    layers = settings.layers(model.config.n_layer)
    outliers, names = [], []
    for layer, statistics in _statistics(model, source, settings, frozen=True):
        own = dict(layer_matrices(model, layer)) if layer in layers else {}
        if own:
            assert statistics is not None
            outliers.append(outlier_share([wanda(m.weight, statistics.of(linear).norms) for linear, m in own.items()]))
            names.append([f"h.{layer}.{linear}" for linear in own])
    together = [sum(sizes[name] for name in layer) for layer in names]
    for layer_names, lost in zip(names, owl(together, outliers, settings.sparsity)):
        removed |= dict(zip(layer_names, evenly([sizes[name] for name in layer_names], lost)))
    return removed


def _squared_gradients(model: GPT, found: Gradients | Tensor | None) -> dict[str, Tensor]:
    """The mean squared gradient at each matrix's outputs, (out,) by its name."""
    if found is None:
        raise ValueError("unbalanced allocation and second-order blocks need gradients on calibration text")
    return (gradients(model, found) if isinstance(found, Tensor) else found).output
