"""--method as calls of model/pruning: what each takes of the calibration text, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from model.gpt import GPT
from model.masks import Mask, Masks, share_of_zeros, sparsity_line, sparsity_report
from model.pruning.latency import unit_seconds
from model.pruning.layers import layers_worth
from model.pruning.matrices import matrices
from model.pruning.sparse import SparseSettings, prune_sparse
from model.pruning.structured import NothingToPrune, StructuredSettings, layers_in_range, prune_structured
from model.pruning.units import UnitCosts, drop_layers, unit_flops, unit_parameters
from pruning.cache import StatisticsCache
from pruning.settings import (
    SPARSE,
    PruneSettings,
    allocation,
    check_layers,
    gradient_samples,
    reorders,
    second_order_blocks,
)

Say = Callable[[str], None]
# Share of zeros in a matrix without a mask, above which somebody has pruned it. Symmetric quantisation makes zero 6%
# of normal weights in Q5_0, 12% in Q4_0, 22% in Q3_K; where tails are heavy 12%, 23% and 35%.
_PRUNED_ELSEWHERE, _PRUNED_AND_QUANTISED = 0.05, 1 / 3
_NEIGHBOURS = 16  # share a scale in every kind of quantisation
_REPEATED = 0.2  # of a group's numbers: Q4_0 0.6, Q5_0 0.4, Q8_0 0.07, bf16 0.01


class Outcome(NamedTuple):
    """A pruned model, the layers of the base that its layers are, and what is to be said of it."""

    model: GPT
    layers: list[int]
    notes: list[str]
    gone: float = 0.0  # structured: share of the cost of the units in range
    removed: int = 0  # structured: their parameters


def prune_model(model: GPT, settings: PruneSettings, cache: StatisticsCache | None) -> Outcome:
    """The pruned model; for zeros it is `model`, changed in place. `cache` may be None where no text is needed.

    Raises ValueError for what the model does not allow, and NothingToPrune, a ValueError too, where nothing would go.
    """
    _check_work(model, settings)
    if settings.method == "structured":
        return _structured(model, settings, cache)
    if settings.method == "drop_layers":
        assert cache is not None
        layers = range(*check_layers(settings, model.config.n_layer))
        return _drop_cheapest(model, cache, settings.pruning_ratio * _units_in(model, layers), layers)
    return _sparse(model, settings, cache)


def needs_text(settings: PruneSettings) -> bool:
    """Whether the method looks at calibration text at all; magnitudes alone do not."""
    return settings.method != "magnitude" or allocation(settings) != "uniform"


def unpruned(model: GPT, note: str) -> Outcome:
    """The outcome that leaves a model as it is."""
    return Outcome(model, list(range(model.config.n_layer)), [note])


def _check_work(model: GPT, settings: PruneSettings) -> None:
    """NothingToPrune for the part of a round that the rounds before it have done with what they took beyond theirs."""
    if settings.method == "structured" and settings.pruning_ratio <= 0:
        raise NothingToPrune("the rounds before it took its part already")
    if settings.method in SPARSE and model.masks and (enough := _enough_zeros(model, settings)):
        raise NothingToPrune(enough)


def _structured(model: GPT, settings: PruneSettings, cache: StatisticsCache | None) -> Outcome:
    assert cache is not None
    wanted = structured_settings(settings)
    gradients = None if settings.importance == "activation" else cache.gradients(gradient_samples(settings))
    smaller, report = prune_structured(model, cache.layer, gradients, wanted, _costs(model, settings))
    note = f"{report.removed_parameters:,} parameters removed, {report.achieved:.1%} of the units in range"
    notes = [note, *report.notes]
    return Outcome(smaller, list(range(model.config.n_layer)), notes, report.achieved, report.removed_parameters)


def structured_settings(settings: PruneSettings) -> StructuredSettings:
    """What model/pruning takes of them. ValueError for what does not go together."""
    return StructuredSettings(
        ratio=settings.pruning_ratio,
        prune_mlp=settings.prune_mlp,
        importance=settings.importance,
        allocation=settings.allocation,
        layer_start=settings.layer_start,
        layer_end=settings.layer_end,
        protect_first=settings.protect_first,
        protect_last=settings.protect_last,
        min_groups=settings.min_groups,
        channel_multiple=settings.channel_multiple,
        refit=settings.refit,
    )


def _costs(model: GPT, settings: PruneSettings) -> UnitCosts:
    """What a unit of each kind costs of --budget."""
    if settings.budget == "latency":
        return unit_seconds(model)
    context = min(settings.importance_seq_len, model.config.block_size)
    return unit_parameters(model.config) if settings.budget == "parameters" else unit_flops(model.config, context)


def cheap_rival(model: GPT, pruned: GPT, settings: PruneSettings, cache: StatisticsCache) -> Outcome:
    """`model` without whole layers, of those that might lose units, for as many parameters as `pruned` has lost.

    ValueError where that is less than half a layer.
    """
    layers = layers_in_range(model.config, structured_settings(settings))
    return _drop_cheapest(model, cache, model.num_params() - pruned.num_params(), layers)


def _drop_cheapest(model: GPT, cache: StatisticsCache, parameters: float, layers: Sequence[int]) -> Outcome:
    """Without the layers of least influence that hold about so many parameters; shares the others with `model`."""
    influences = [cache.layer(i).influence for i in range(model.config.n_layer)]
    gone = layers_worth(model.config, influences, parameters, layers)
    smaller = drop_layers(model, gone, share=True)
    removed = model.num_params() - smaller.num_params()
    names = ", ".join(map(str, gone))
    note = f"{removed:,} parameters removed with {len(gone)} whole layers ({names}); asked for {parameters:,.0f}"
    return Outcome(smaller, [i for i in range(model.config.n_layer) if i not in gone], [note])


def _units_in(model: GPT, layers: Sequence[int]) -> float:
    """The parameters of the kv groups and the MLP channels of these layers."""
    each = unit_parameters(model.config)
    sizes = map(model.config.layer, layers)
    return sum(own.n_kv_head * each.group + own.mlp_dim * each.channel for own in sizes)


def sparse_settings(settings: PruneSettings) -> SparseSettings:
    """What model/pruning takes of them. ValueError for what does not go together."""
    return SparseSettings(
        method=settings.method,
        sparsity=settings.sparsity,
        pattern=settings.pattern,
        block_size=settings.block_size,
        allocation=allocation(settings),
        layer_start=settings.layer_start,
        layer_end=settings.layer_end,
        refit=settings.refit,
        reorder=reorders(settings),
    )


def _sparse(model: GPT, settings: PruneSettings, cache: StatisticsCache | None) -> Outcome:
    wanted = sparse_settings(settings)
    source: Any = None
    found = None
    if cache is not None:
        # Once for all layers where all are ranked together or nothing is compensated; else each layer's statistics are
        # those of the layers before it as they are pruned by then, as the methods' authors do it.
        at_once = settings.method == "magnitude" or settings.pattern == "block"
        source = cache.layer if at_once else cache.windows
        ranked = wanted.allocation == "unbalanced" or second_order_blocks(settings)
        found = cache.gradients(gradient_samples(settings)) if ranked else None
    model.masks, rows = prune_sparse(model, source, found, wanted, model.masks)
    return Outcome(model, list(range(model.config.n_layer)), [sparsity_line(rows)])


# -- models that were pruned before ----------------------------------------------------------------------------------


def zeros_as_masks(model: GPT) -> Masks:
    """Masks of the matrices that hold so many zeros that something pruned them that leaves no masks.

    Of quantised weights many are zero though nothing pruned them; there it takes more.
    """
    found = {}
    for name, module in matrices(model, range(model.config.n_layer)).items():
        weight = module.weight.detach()
        share = share_of_zeros(weight)
        if share > _PRUNED_ELSEWHERE and (share > _PRUNED_AND_QUANTISED or not _is_quantised(weight)):
            found[f"{name}.weight"] = Mask.of(weight != 0)
    return found


def _is_quantised(weight: Tensor) -> bool:
    """Whether neighbours share so many magnitudes that they were rounded to the few of a quantised group."""
    groups = weight.flatten()[: weight.numel() // _NEIGHBOURS * _NEIGHBOURS].view(-1, _NEIGHBOURS)
    some = groups[:: max(1, len(groups) // 2**16)].abs().sort(dim=1).values
    repeated = (some.diff(dim=1) == 0) & (some[:, 1:] > 0)
    return int(repeated.sum()) > _REPEATED * int((some > 0).sum())


def check_model(model: GPT, settings: PruneSettings, name: str) -> None:
    """ValueError where the settings do not fit the model, or its zeros leave nothing to do or would not survive."""
    check_layers(settings, model.config.n_layer)
    if settings.method == "structured":
        structured_settings(settings)
    elif settings.method in SPARSE:
        sparse_settings(settings)
    _check_left(model, settings, name)
    if not model.masks:
        return
    if settings.method not in SPARSE:
        line = sparsity_line(sparsity_report(model, model.masks))
        raise ValueError(
            f"{name}: is sparse already ({line}): --method {settings.method} takes whole units, whose zeros would be "
            f"lost with them; prune the dense model, or its zeros further with {', '.join(SPARSE)}"
        )
    if enough := _enough_zeros(model, settings):
        pattern = " and another --pattern" if settings.pattern in ("2:4", "4:8") else ""
        raise ValueError(
            f"{name}: {enough}: --sparsity {settings.sparsity:g} asks for no more; give a larger one{pattern}"
        )


def _enough_zeros(model: GPT, settings: PruneSettings) -> str | None:
    """What is to be said where not one weight is left to become zero."""
    inside = matrices(model, range(*check_layers(settings, model.config.n_layer))).values()
    zeros = sum(int((module.weight == 0).sum()) for module in inside)
    weights = sum(module.weight.numel() for module in inside)
    if zeros >= round(settings.sparsity * weights):
        return f"{zeros / weights:.1%} of the weights of the chosen layers are zero already"
    return None


def _check_left(model: GPT, settings: PruneSettings, name: str) -> None:
    """ValueError where pruning of before has left nothing in the chosen layers that the method could take."""
    start, end = check_layers(settings, model.config.n_layer)
    units = settings.method == "structured"
    chosen = layers_in_range(model.config, structured_settings(settings)) if units else range(start, end)
    sizes = [model.config.layer(i) for i in chosen]
    groups, channels = (any(getattr(size, kind) for size in sizes) for kind in ("n_kv_head", "mlp_dim"))
    if groups or (channels and (settings.prune_mlp or not units)):
        return
    part = "matrices" if not units else "units" if settings.prune_mlp else "kv groups"
    instead = "add --prune_mlp, or " * (channels and units)
    raise ValueError(
        f"{name}: layers {start} to {end} (exclusive) have no {part} left that --method {settings.method} may take: "
        f"{instead}choose other layers with --layer_start and --layer_end, or another model"
    )
