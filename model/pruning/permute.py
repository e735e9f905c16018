"""The same network with its hidden units in another order, so that what is worth little comes to stand together.

Three orders leave every output as it is, but for rounding: one of the residual stream's channels for the whole model,
one of the MLP's channels in each layer, one of the value dimensions in each key/value head. (Queries and keys stay:
rotary positions tie each dimension to its frequency.) The new order is that of the weights themselves, so nothing has
to be undone when the model is saved, exported or run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import GPTConfig
from model.gpt import GPT, Block
from model.pruning.statistics import Gradients, LayerStatistics, Site


@dataclass
class Orders:
    """Which old unit comes to each new place, int64."""

    residual: Tensor  # (C,)
    values: list[Tensor]  # a layer: (n_kv_head, head_dim), places within a head
    channels: list[Tensor]  # a layer: (mlp_dim,)

    def value_rows(self, layer: int) -> Tensor:
        """The rows of v_proj, (n_kv_head * head_dim,)."""
        return _flat(self.values[layer])

    def value_columns(self, layer: int, config: GPTConfig) -> Tensor:
        """The columns of o_proj, (n_head * head_dim,): every query head of a group reads its values in their order."""
        sizes = config.layer(layer)
        return _flat(self.values[layer].repeat_interleave(sizes.n_head // max(sizes.n_kv_head, 1), dim=0))


def natural_orders(config: GPTConfig) -> Orders:
    """The order that changes nothing."""
    layers = [config.layer(i) for i in range(config.n_layer)]
    return Orders(
        torch.arange(config.n_embd),
        [torch.arange(sizes.head_dim).repeat(sizes.n_kv_head, 1) for sizes in layers],
        [torch.arange(sizes.mlp_dim) for sizes in layers],
    )


@torch.no_grad()
def permute_(model: GPT, orders: Orders) -> None:
    """Brings the model's units into `orders`, in place; its function stays."""
    residual = orders.residual
    for table in (model.wte, model.wpe, model.lm_head):
        _take_(table, columns=residual)
    _take_(model.ln_f, rows=residual)
    for i, block in enumerate(model.h):
        assert isinstance(block, Block)
        _take_(block.ln_1, rows=residual)
        _take_(block.ln_2, rows=residual)
        if block.attn is not None:
            _take_(block.attn.q_proj, columns=residual)
            _take_(block.attn.k_proj, columns=residual)
            _take_(block.attn.v_proj, rows=orders.value_rows(i), columns=residual)
            _take_(block.attn.o_proj, rows=residual, columns=orders.value_columns(i, model.config))
        if block.mlp is not None:
            _take_(block.mlp.gate_proj, rows=orders.channels[i], columns=residual)
            _take_(block.mlp.up_proj, rows=orders.channels[i], columns=residual)
            _take_(block.mlp.down_proj, rows=residual, columns=orders.channels[i])


def permute_statistics(statistics: LayerStatistics, layer: int, orders: Orders, config: GPTConfig) -> LayerStatistics:
    """What `collect` would find in the permuted model, from what it found before."""
    return LayerStatistics(
        _site(statistics.attn_in, orders.residual),
        _site(statistics.attn_out, orders.value_columns(layer, config)),
        _site(statistics.mlp_in, orders.residual),
        _site(statistics.mlp_out, orders.channels[layer]),
        statistics.influence,
    )


def permute_gradients(found: Gradients, orders: Orders) -> Gradients:
    """The squared output gradients of the permuted model, from those before; gates are left out."""
    output = {}
    for name, squares in found.output.items():
        _, layer, linear = name.split(".", 2)
        rows = {
            "attn.v_proj": orders.value_rows(int(layer)),
            "attn.o_proj": orders.residual,
            "mlp.down_proj": orders.residual,
            "mlp.gate_proj": orders.channels[int(layer)],
            "mlp.up_proj": orders.channels[int(layer)],
        }.get(linear)
        output[name] = squares if rows is None else squares[rows.to(squares.device)]
    return Gradients(output)


def _take_(module: nn.Module | None, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Reorders a module's weight, and its bias by `rows`, in place; nothing where it is absent."""
    if module is None:
        return
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    if rows is not None:
        weight.copy_(weight[rows.to(weight.device)])
        if bias is not None:
            bias.copy_(bias[rows.to(bias.device)])
    if columns is not None:
        weight.copy_(weight[:, columns.to(weight.device)])


def _site(site: Site | None, order: Tensor) -> Site | None:
    if site is None:
        return None
    order = order.to(site.second.device)
    return Site(site.second[order][:, order], site.mean[order], site.tokens)


def _flat(places: Tensor) -> Tensor:
    """places (heads, head_dim) within heads, as places among all: (heads * head_dim,)."""
    heads, head_dim = places.shape
    return (places + head_dim * torch.arange(heads).unsqueeze(1)).flatten()
