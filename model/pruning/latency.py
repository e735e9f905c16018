"""What a unit costs in time, measured: the budget of structured pruning where parameters are not what counts."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from model.cache import KVCache
from model.gpt import GPT
from model.pack import pack
from model.pruning.layers import layer_parameters
from model.pruning.units import Kept, UnitCosts, all_units, drop_layers, keep_units

_ENOUGH = 64 * 2**20  # weights that no cache of a processor holds


def decoding_seconds(model: GPT, context: int = 128, repeats: int = 30) -> float:
    """The shortest time of a decoding step through the blocks, without the head, after `context` tokens.

    The shortest, because whatever else the machine does only ever adds. `model` is packed, as generation packs it.
    """
    device = model.wte.weight.device
    context = min(context, model.config.block_size - 1)
    times = []
    with torch.inference_mode():
        pack(model)
        cache = KVCache(1, context + 1)
        model.hidden(torch.zeros(1, context, dtype=torch.int64, device=device), cache=cache)
        for _ in range(repeats):
            started = time.perf_counter()
            model.hidden(torch.zeros(1, 1, dtype=torch.int64, device=device), cache=cache)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
            cache.set_lengths([context])
    return min(times)


def unit_seconds(model: GPT, measure: Callable[[GPT], float] = decoding_seconds) -> UnitCosts:
    """Seconds that one unit of each kind takes: `measure` of some layers, less that without half of their units.

    As many layers as fill 64 Mi weights, so that they come from memory as they do in the whole model, of which no
    second copy is made. ValueError where taking units away does not save time that can be measured.
    """
    n_layer, stay, weights = model.config.n_layer, 0, 0
    while stay < n_layer and weights < _ENOUGH:
        weights += layer_parameters(model.config, stay)
        stay += 1
    some = drop_layers(model, range(stay, n_layer)).eval()
    units = all_units(some.config)
    fewer_groups = [Kept(own.groups[: len(own.groups) // 2], own.channels) for own in units]
    fewer_channels = [Kept(own.groups, own.channels[: len(own.channels) // 2]) for own in units]
    groups = sum(len(own.groups) - len(less.groups) for own, less in zip(units, fewer_groups))
    channels = sum(len(own.channels) - len(less.channels) for own, less in zip(units, fewer_channels))
    without_groups, without_channels = (measure(keep_units(some, kept)) for kept in (fewer_groups, fewer_channels))
    whole = measure(some)  # last, since it packs the layers
    costs = UnitCosts((whole - without_groups) / max(groups, 1), (whole - without_channels) / max(channels, 1))
    if (groups and costs.group <= 0) or (channels and costs.channel <= 0):
        raise ValueError(
            f"half of the units save no time here ({whole * 1e3:.2f} ms, {without_groups * 1e3:.2f} without heads, "
            f"{without_channels * 1e3:.2f} without channels): make the budget one of parameters or FLOPs"
        )
    return costs
