"""Whole layers by their influence: the cheapest way to a smaller model, and the rival that any other has to beat.

A block whose output points where its input did (mean cosine near 1) changes little when it goes: ShortGPT (Men et al.
2024). No weight is touched, so it costs one forward over the calibration text, and no second look.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from model.config import GPTConfig
from model.pruning.units import unit_parameters


def layer_parameters(config: GPTConfig, layer: int) -> int:
    """All parameters of a block: its units, its norms, the biases of its outputs."""
    sizes, each = config.layer(layer), unit_parameters(config)
    norm = config.n_embd * (1 + config.norm_bias)
    attention = (
        sizes.n_kv_head * each.group + norm + config.n_embd * config.o_bias + 2 * sizes.head_dim * config.qk_norm
    )
    mlp = sizes.mlp_dim * each.channel + norm + config.n_embd * config.mlp_bias
    return int(attention * (sizes.n_head > 0) + mlp * (sizes.mlp_dim > 0))


def layers_worth(
    config: GPTConfig, influences: Sequence[float], parameters: float, layers: Iterable[int] | None = None
) -> list[int]:
    """The layers of least influence that hold together as near to `parameters` as that order allows, ascending.

    influences has one number per layer (`LayerStatistics.influence`); `layers` are those that may go, by default all.
    At least one layer of the model stays. ValueError where the nearest is to drop none.
    """
    candidates = range(config.n_layer) if layers is None else layers
    order = sorted(candidates, key=lambda i: influences[i])[: config.n_layer - 1]
    dropped = []
    for i in order:
        size = layer_parameters(config, i)
        if size > 2 * parameters:  # without it the sum is nearer
            break
        dropped.append(i)
        parameters -= size
    if not dropped:
        raise ValueError(
            f"the least influential layer holds {size:,} parameters, more than twice the {parameters:,.0f} asked for: "
            "raise the ratio"
        )
    return sorted(dropped)
