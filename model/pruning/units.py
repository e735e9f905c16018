"""The units that structured pruning removes, and the smaller network without them.

A kv group is a key/value head with the query heads that it serves: rows of q, k, v and their biases, columns of o. The
ratio n_head / n_kv_head thus stays. An MLP channel is a row of gate and of up, and a column of down. What is left is an
ordinary network whose config lists its sizes layer by layer; a sub-layer that lost all its units is absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import GPTConfig
from model.gpt import GPT


class Kept(NamedTuple):
    """The units of one layer that stay, as ascending indices into those that it has now."""

    groups: Tensor  # int64, kv groups
    channels: Tensor  # int64, MLP channels


class UnitCosts(NamedTuple):
    """What one unit of each kind costs, in any unit of measure: parameters, operations, microseconds."""

    group: float
    channel: float


def all_units(config: GPTConfig) -> list[Kept]:
    """Every unit of every layer."""
    layers = map(config.layer, range(config.n_layer))
    return [Kept(torch.arange(sizes.n_kv_head), torch.arange(sizes.mlp_dim)) for sizes in layers]


def unit_parameters(config: GPTConfig) -> UnitCosts:
    """The parameters that one kv group and one channel hold, with the biases of their rows."""
    rows = config.head_dim * (_queries_per_key(config) + 2)  # of q, k and v
    columns = config.head_dim * _queries_per_key(config)  # of o
    channel_rows = 2 if config.mlp == "swiglu" else 1
    return UnitCosts(
        rows * (config.n_embd + config.qkv_bias) + columns * config.n_embd,
        channel_rows * (config.n_embd + config.mlp_bias) + config.n_embd,
    )


def unit_flops(config: GPTConfig, T: int) -> UnitCosts:
    """Floating-point operations of a token's forward through one unit of each kind, in a context of T.

    Two a weight, and 4 head_dim T for each query head's scores and sums; as in `GPT.flops_per_token`, all T x T.
    """
    parameters = unit_parameters(config)
    attention = 4 * config.head_dim * _queries_per_key(config) * T
    return UnitCosts(2 * parameters.group + attention, 2 * parameters.channel)


def query_rows(groups: Tensor, config: GPTConfig) -> Tensor:
    """The rows of q_proj that belong to kv groups, also the columns of o_proj: (groups x ratio x head_dim,)."""
    return _expand(groups, config.head_dim * _queries_per_key(config))


def key_rows(groups: Tensor, config: GPTConfig) -> Tensor:
    """The rows of k_proj and v_proj that belong to kv groups: (groups x head_dim,)."""
    return _expand(groups, config.head_dim)


@torch.no_grad()
def keep_units(model: GPT, kept: Sequence[Kept], refitted: Mapping[str, Tensor] | None = None) -> GPT:
    """A new, physically smaller network with these units of each layer; shares no tensor with `model`.

    `refitted` are weights of o_proj and down_proj with the kept columns only, and biases, in place of the model's.

    Its function is that of `model` with the other units' weights at zero. Where a whole sub-layer goes, the bias of its
    output is carried to what stands before it (a sub-layer's bias, GPT-2's positions); only where nothing there has a
    bias, as in a Llama with biases in its first sub-layer alone, is it lost.
    Raises ValueError for indices that the model does not have, and for layers that are not plain matrices.
    """
    _check_kept(model, kept)
    ratio = _queries_per_key(model.config)
    config = dataclasses.replace(
        model.config,
        n_head=tuple(len(units.groups) * ratio for units in kept),
        n_kv_head=tuple(len(units.groups) for units in kept),
        mlp_dim=tuple(len(units.channels) for units in kept),
    )
    rows, columns = _rows_and_columns(config, kept)
    columns = {name: own for name, own in columns.items() if not refitted or name not in refitted}
    state = _carry_biases({**model.state_dict(), **(refitted or {})}, model, kept)
    smaller = _empty(config)
    selected = {
        name: _select(state[name], rows.get(name.rpartition(".")[0]), columns.get(name))
        for name in smaller.state_dict()
    }
    return _filled(smaller, selected, like=model)


@torch.no_grad()
def drop_layers(model: GPT, layers: Iterable[int], *, share: bool = False) -> GPT:
    """A new network without these blocks, the others in order and renumbered.

    It shares no tensor with `model`, or with `share` all of them, for a look at it that costs no memory.
    Raises ValueError for layers that the model does not have, and where none would stay.
    """
    dropped = set(layers)
    config = model.config
    unknown = sorted(i for i in dropped if not 0 <= i < config.n_layer)
    if unknown:
        raise ValueError(f"layer {unknown[0]} cannot be dropped: the model has layers 0 to {config.n_layer - 1}")
    stay = [i for i in range(config.n_layer) if i not in dropped]
    if not stay:
        raise ValueError(f"all {config.n_layer} layers would be dropped: keep at least one")
    _check_plain(model)
    sizes = [config.layer(i) for i in stay]
    smaller = dataclasses.replace(
        config,
        n_layer=len(stay),
        n_head=tuple(size.n_head for size in sizes),
        n_kv_head=tuple(size.n_kv_head for size in sizes),
        mlp_dim=tuple(size.mlp_dim for size in sizes),
    )
    whole, empty = model.state_dict(), _empty(smaller)
    state = {name: whole[_name_before(name, stay)] for name in empty.state_dict()}
    if not share:
        state = {name: tensor.clone() for name, tensor in state.items()}
    return _filled(empty, state, like=model)


def _queries_per_key(config: GPTConfig) -> int:
    """Query heads of a kv group, the same in all layers; 1 where no layer has attention."""
    sizes = (config.layer(i) for i in range(config.n_layer))
    return next((size.n_head // size.n_kv_head for size in sizes if size.n_kv_head), 1)


def _expand(units: Tensor, width: int) -> Tensor:
    """The rows of units that are `width` consecutive rows each."""
    return (units.unsqueeze(1) * width + torch.arange(width, device=units.device)).flatten()


def _rows_and_columns(config: GPTConfig, kept: Sequence[Kept]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rows that layers keep, by the layer's name (weight and bias alike), and the columns, by the weight's."""
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for i, (groups, channels) in enumerate(kept):
        queries, keys = query_rows(groups, config), key_rows(groups, config)
        rows |= {f"h.{i}.attn.q_proj": queries, f"h.{i}.attn.k_proj": keys, f"h.{i}.attn.v_proj": keys}
        rows |= {f"h.{i}.mlp.gate_proj": channels, f"h.{i}.mlp.up_proj": channels}
        columns |= {f"h.{i}.attn.o_proj.weight": queries, f"h.{i}.mlp.down_proj.weight": channels}
    return rows, columns


def _select(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """A copy of those rows and columns of a tensor, None for all."""
    if rows is not None:
        return tensor.index_select(0, rows.to(tensor.device))
    if columns is not None:
        return tensor.index_select(1, columns.to(tensor.device))
    return tensor.clone()


def _check_plain(model: GPT) -> None:
    """ValueError unless the model's tensors are those of its config, free to change: no adapter, mask, packed layer."""
    if model.masks:
        raise ValueError("the model is sparse: units are removed from dense models only, before anything is masked")
    if model.prompt is not None or set(model.state_dict()) != set(_empty(model.config).state_dict()):
        raise ValueError("units can be removed from plain matrices only: merge the adapter, or open the unpacked model")


def _name_before(name: str, stay: Sequence[int]) -> str:
    """What a tensor of block i was called when block i was block stay[i]."""
    parts = name.split(".", 2)
    return f"h.{stay[int(parts[1])]}.{parts[2]}" if parts[0] == "h" else name


def _check_kept(model: GPT, kept: Sequence[Kept]) -> None:
    _check_plain(model)
    if len(kept) != model.config.n_layer:
        raise ValueError(f"units to keep are given for {len(kept)} layers, the model has {model.config.n_layer}")
    for i, units in enumerate(kept):
        sizes = model.config.layer(i)
        _check_indices(units.groups, sizes.n_kv_head, f"layer {i}: kv groups")
        _check_indices(units.channels, sizes.mlp_dim, f"layer {i}: channels")


def _check_indices(found: Tensor, size: int, what: str) -> None:
    if len(found) and (found.min() < 0 or found.max() >= size or (found.diff() <= 0).any()):
        raise ValueError(f"{what} to keep are {found.tolist()}: give ascending numbers from 0 to {size - 1}")


def _carry_biases(state: dict[str, Tensor], model: GPT, kept: Sequence[Kept]) -> dict[str, Tensor]:
    """`state` with the output bias of each sub-layer that goes added to what is added just before it.

    Nothing reads the stream between the two, so the sum is the same.
    """
    before = "wpe.weight" if model.wpe is not None else None if model.config.tie_embeddings else "wte.weight"
    for i, units in enumerate(kept):
        for linear, left in (("attn.o_proj", units.groups), ("mlp.down_proj", units.channels)):
            bias = f"h.{i}.{linear}.bias"
            if len(left):
                before = bias if bias in state else None
            elif before is not None and bias in state:
                state[before] = state[before] + state[bias]
    return state


def _empty(config: GPTConfig) -> GPT:
    with torch.device("meta"):  # no memory, no random numbers
        return GPT(config)


def _filled(empty: GPT, state: dict[str, Tensor], like: GPT) -> GPT:
    """`empty` with these tensors as its own, in the mode of `like`."""
    empty.load_state_dict(state, assign=True)
    return empty.requires_grad_(True).train(like.training)
