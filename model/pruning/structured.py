"""Structured pruning: which kv groups and MLP channels go, under one budget, and the re-fit of what reads the rest.

Every unit gets an importance, an estimate of how much the loss rises when it goes. Divided by what the unit costs,
units of both kinds and of all layers stand in one ranking, and the cheapest losses go first: layers then keep as much
as they are worth (`unbalanced`). Afterwards o_proj and down_proj are fitted again on the inputs that are left.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import GPTConfig
from model.gpt import GPT, Block
from model.linear import Linear
from model.pruning.obs import removal_costs
from model.pruning.refit import refit_columns, refit_with_bias
from model.pruning.statistics import Gradients, LayerStatistics, Site
from model.pruning.units import Kept, UnitCosts, all_units, keep_units, query_rows, unit_parameters

IMPORTANCES = ("obs", "fisher", "taylor", "activation")
ALLOCATIONS = ("unbalanced", "uniform")


@dataclass(frozen=True, kw_only=True)
class StructuredSettings:
    """What goes; ValueError if out of range. `ratio` is the share of the cost of the unit kinds in the layer range.

    obs: the rise of the loss when a unit goes, after those worth less, and the others of its matrix are fitted again:
    Optimal Brain Surgeon with the outputs weighted by their Fisher information. fisher: the second-order rise, without
    a re-fit. taylor: the first-order change (LLM-Pruner). activation: Wanda's norms, as shares of their sub-layer times
    the layer's influence.
    """

    ratio: float = 0.25
    prune_mlp: bool = False  # kv groups always, MLP channels with this
    importance: str = "obs"
    allocation: str = "unbalanced"
    layer_start: int = 0
    layer_end: int | None = None  # exclusive
    protect_first: int = 0  # so many layers of the model, whatever the range, keep all they have
    protect_last: int = 0
    min_groups: int = 1  # that each layer keeps; 0: a sub-layer may go as a whole
    min_channels: int = 0
    channel_multiple: int = 1  # kept channels are a multiple of this, for kernels that want 32 or 64
    refit: bool = True
    damping: float = 0.01  # of the re-fit and of OBS, as a share of the mean squared input

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"pruning ratio is {self.ratio!r}: give a share above 0 and below 1")
        for name, choices in (("importance", IMPORTANCES), ("allocation", ALLOCATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        for name in ("protect_first", "protect_last", "min_groups", "min_channels"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give 0 or more")
        if self.channel_multiple < 1:
            raise ValueError(f"channel_multiple is {self.channel_multiple!r}: give at least 1")


class NothingToPrune(ValueError):
    """What is asked for is less than any unit, or gone already."""


class LayerRow(NamedTuple):
    """What one layer kept, and of how much; parameters are those of its units."""

    layer: int
    groups: int
    groups_before: int
    channels: int
    channels_before: int
    parameters: int
    parameters_before: int


@dataclass(frozen=True)
class StructuredReport:
    """What was asked, what was reached, and where."""

    rows: list[LayerRow]
    asked: float  # share of the cost of the units in range
    achieved: float
    removed_parameters: int
    notes: list[str]  # what could not be met, a line each


class Scores(NamedTuple):
    """How much the loss would rise without each unit of a layer, on one scale for all layers."""

    groups: Tensor  # (n_kv_head,)
    channels: Tensor  # (mlp_dim,)


@torch.no_grad()
def prune_structured(
    model: GPT,
    statistics: Callable[[int], LayerStatistics],
    gradients: Gradients | None,
    settings: StructuredSettings,
    costs: UnitCosts | None = None,
) -> tuple[GPT, StructuredReport]:
    """A new, physically smaller network, and what each of its layers kept. `model` stays as it is.

    statistics(i) are those of layer i; each is asked for twice (scores, then the re-fit) and not held. `gradients` may
    be None for `activation`. `costs` of the units make the budget; by default their parameters.
    Raises ValueError for a range outside the model, and NothingToPrune where no unit may go.
    """
    layers = layers_in_range(model.config, settings)
    scores = {i: unit_scores(model, i, statistics(i), gradients, settings) for i in layers}
    costs = costs or unit_parameters(model.config)
    kept = choose_units(model.config, scores, costs, settings)
    refitted: dict[str, Tensor] = {}
    if settings.refit:
        for i in layers:
            refitted |= refit_layer(model, i, kept[i], statistics(i), settings.damping)
    return keep_units(model, kept, refitted), report(model.config, kept, layers, costs, settings)


def layers_in_range(config: GPTConfig, settings: StructuredSettings) -> list[int]:
    """The layers that may lose units. ValueError where the range does not fit the model or leaves nothing."""
    start, end = settings.layer_start, config.n_layer if settings.layer_end is None else settings.layer_end
    if not 0 <= start < end <= config.n_layer:
        raise ValueError(
            f"layers {start} to {end} (exclusive) of a model with {config.n_layer}: "
            f"give 0 <= layer_start < layer_end <= {config.n_layer}"
        )
    layers = list(range(max(start, settings.protect_first), min(end, config.n_layer - settings.protect_last)))
    if not layers:
        raise ValueError(f"layers {start} to {end} (exclusive) are all protected: protect fewer, or widen the range")
    return layers


@torch.no_grad()
def unit_scores(
    model: GPT, layer: int, statistics: LayerStatistics, gradients: Gradients | None, settings: StructuredSettings
) -> Scores:
    """The importance of every unit of a layer. ValueError where it needs gradients and there are none."""
    if gradients is None and settings.importance != "activation":
        raise ValueError(f"importance {settings.importance!r} needs gradients of the calibration text")
    block = model.h[layer]
    assert isinstance(block, Block)
    found = Scores(torch.zeros(0), torch.zeros(0))
    if block.attn is not None and statistics.attn_out is not None:
        width = len(query_rows(torch.zeros(1, dtype=torch.int64), model.config))
        read = _Reader(f"h.{layer}.attn", block.attn.o_proj, statistics.attn_out, width)
        found = found._replace(groups=_site_scores(read, gradients, statistics.influence, settings))
    if block.mlp is not None and statistics.mlp_out is not None:
        read = _Reader(f"h.{layer}.mlp", block.mlp.down_proj, statistics.mlp_out, 1)
        found = found._replace(channels=_site_scores(read, gradients, statistics.influence, settings))
    return found


class _Reader(NamedTuple):
    """The layer that reads the units' outputs, and what it reads."""

    name: str  # of its sub-layer
    linear: Linear  # o_proj or down_proj
    site: Site
    width: int  # columns of a unit


def _site_scores(read: _Reader, gradients: Gradients | None, influence: float, settings: StructuredSettings) -> Tensor:
    """The importance of the units of one sub-layer, fp64 on the CPU."""
    if settings.importance == "activation":
        norms = (read.linear.weight.abs().sum(dim=0) * read.site.norms).view(-1, read.width).sum(dim=1)  # (units,)
        return (norms / norms.sum() * influence).double().cpu()
    assert gradients is not None
    if settings.importance == "obs":
        fisher = gradients.output[read.name + (".o_proj" if read.name.endswith("attn") else ".down_proj")]
        moment = _moment(read.linear, read.site)
        return removal_costs(read.linear.weight, moment, fisher, read.width, damping=settings.damping)
    gate = gradients.gate[f"{read.name}_out"]  # (windows, in)
    gate = gate.double().unflatten(1, (-1, read.width)).sum(dim=2).cpu()  # (windows, units)
    return gate.sum(dim=0).abs() if settings.importance == "taylor" else gate.square().sum(dim=0)


def _moment(linear: Linear, site: Site) -> Tensor:
    """(in, in): what an input's loss is measured by; its mean costs nothing where a bias can stand for it."""
    return site.second if linear.bias is None else torch.addr(site.second, site.mean, site.mean, alpha=-1)


class _Step(NamedTuple):
    """Units of one layer and kind that go together: one, or as many channels as keep the rest a round number."""

    density: float  # rise of the loss per cost
    cost: float
    layer: int
    kind: int  # of Kept: 0 groups, 1 channels
    units: tuple[int, ...]


def choose_units(
    config: GPTConfig, scores: Mapping[int, Scores], costs: UnitCosts, settings: StructuredSettings
) -> list[Kept]:
    """The units that stay in every layer; layers without scores keep all.

    unbalanced: what costs the loss least per cost goes first, over all layers, until the budget is met as nearly as
    whole units can. uniform: the same share of every layer's kv groups, to the nearest; its channels even that out.
    Raises NothingToPrune where nothing may go.
    """
    steps = [_steps(i, own, costs, settings) for i, own in scores.items()]
    if settings.allocation == "unbalanced":
        budget = settings.ratio * sum(_cost(config, i, costs, settings) for i in scores)
        chosen = _cheapest([step for groups, channels in steps for step in groups + channels], budget)
    else:
        chosen = []
        for i, (groups, channels) in zip(scores, steps):
            first = groups[: math.floor(settings.ratio * config.layer(i).n_kv_head + 0.5)]
            left = settings.ratio * _cost(config, i, costs, settings) - sum(step.cost for step in first)
            chosen += first + _cheapest(channels, left)
    if not chosen:
        raise NothingToPrune(
            f"a ratio of {settings.ratio:g} removes nothing: every unit is larger than that, or the floors keep it; "
            "raise the ratio, prune the MLP too, or lower the floors (min_groups)"
        )
    gone: dict[tuple[int, int], list[int]] = defaultdict(list)
    for step in chosen:
        gone[step.layer, step.kind] += step.units
    return [
        Kept(_without(every.groups, gone[i, 0]), _without(every.channels, gone[i, 1]))
        for i, every in enumerate(all_units(config))
    ]


def _steps(
    layer: int, scores: Scores, costs: UnitCosts, settings: StructuredSettings
) -> tuple[list[_Step], list[_Step]]:
    """What may go from a layer, groups and channels, each from the least important on; floors are left out."""
    groups, channels = ([(float(x), int(i)) for x, i in zip(*own.sort(stable=True))] for own in scores)
    n_groups = max(0, len(groups) - settings.min_groups)
    group_steps = [_Step(score / costs.group, costs.group, layer, 0, (unit,)) for score, unit in groups[:n_groups]]
    channel_steps = []
    start, multiple = 0, settings.channel_multiple
    size = len(channels) % multiple or multiple  # the first step makes a round number of what is left
    while settings.prune_mlp and start + size <= len(channels) - settings.min_channels:
        scores_of, units = zip(*channels[start : start + size])
        cost = size * costs.channel
        channel_steps.append(_Step(sum(scores_of) / cost, cost, layer, 1, units))
        start, size = start + size, multiple
    return group_steps, channel_steps


def _cheapest(steps: Sequence[_Step], budget: float) -> list[_Step]:
    """Steps in the order of density, those left out that no longer fit; then one more where that comes nearer."""
    chosen, too_large = [], []
    for step in sorted(steps):
        if step.cost <= budget:
            chosen.append(step)
            budget -= step.cost
        else:
            too_large.append(step)
    nearer = [step for step in too_large if step.cost <= 2 * budget]
    return [*chosen, min(nearer, key=lambda step: step.cost)] if nearer else chosen


def _cost(config: GPTConfig, layer: int, costs: UnitCosts, settings: StructuredSettings) -> float:
    """What a layer's units of the kinds that may go cost together."""
    sizes = config.layer(layer)
    return sizes.n_kv_head * costs.group + (sizes.mlp_dim * costs.channel if settings.prune_mlp else 0)


def _without(units: Tensor, gone: list[int]) -> Tensor:
    stays = torch.ones(len(units), dtype=torch.bool)
    stays[gone] = False
    return units[stays]


@torch.no_grad()
def refit_layer(model: GPT, layer: int, kept: Kept, statistics: LayerStatistics, damping: float) -> dict[str, Tensor]:
    """o_proj and down_proj fitted on the inputs that stay, by name: what `keep_units` takes; none where all stay."""
    block = model.h[layer]
    assert isinstance(block, Block)
    fitted: dict[str, Tensor] = {}
    if block.attn is not None and len(kept.groups) < block.attn.heads[1]:
        assert statistics.attn_out is not None
        columns = query_rows(kept.groups, model.config)
        fitted |= _refit(block.attn.o_proj, f"h.{layer}.attn.o_proj", columns, statistics.attn_out, damping)
    if block.mlp is not None and len(kept.channels) < block.mlp.down_proj.in_features:
        assert statistics.mlp_out is not None
        name = f"h.{layer}.mlp.down_proj"
        fitted |= _refit(block.mlp.down_proj, name, kept.channels, statistics.mlp_out, damping)
    return fitted


def _refit(linear: Linear, name: str, columns: Tensor, site: Site, damping: float) -> dict[str, Tensor]:
    columns = columns.to(linear.weight.device)
    if linear.bias is None:
        return {f"{name}.weight": refit_columns(linear.weight, site.second, columns, damping)}
    weight, bias = refit_with_bias(linear.weight, linear.bias, site, columns, damping)
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def report(
    config: GPTConfig, kept: Sequence[Kept], layers: Sequence[int], costs: UnitCosts, settings: StructuredSettings
) -> StructuredReport:
    """What every layer kept, the share of the cost in `layers` that went, and how far that is from what was asked."""
    each = unit_parameters(config)
    rows = []
    for i, units in enumerate(kept):
        sizes = config.layer(i)
        before = sizes.n_kv_head * each.group + sizes.mlp_dim * each.channel
        now = len(units.groups) * each.group + len(units.channels) * each.channel
        rows.append(
            LayerRow(i, len(units.groups), sizes.n_kv_head, len(units.channels), sizes.mlp_dim, int(now), int(before))
        )
    cost = sum((row.groups_before - row.groups) * costs.group for row in rows)
    cost += sum((row.channels_before - row.channels) * costs.channel for row in rows)
    achieved = cost / sum(_cost(config, i, costs, settings) for i in layers)
    removed = sum(row.parameters_before - row.parameters for row in rows)
    return StructuredReport(rows, settings.ratio, achieved, removed, _notes(achieved, settings))


def _notes(achieved: float, settings: StructuredSettings) -> list[str]:
    if abs(achieved - settings.ratio) < 0.005:
        return []
    return [f"asked to remove {settings.ratio:.1%}; whole units and the floors allow {achieved:.1%}"]
