"""Orders for blocks: always permutations, never worse by their own measure, and good where the best one is known."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.pruning.matrices import layer_matrices
from model.pruning.orders import by_importance, find_orders, group_sums, improve, objective
from model.pruning.permute import permute_
from tests.model_helpers import GPT2, QWEN3, UNBALANCED, batch, build


def is_order(order):
    return torch.equal(order.sort().values, torch.arange(len(order)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(units=st.integers(1, 20), size=st.integers(1, 6), seed=st.integers(0, 999))
def test_swaps_never_make_an_order_worse(units, size, seed):
    g = torch.Generator().manual_seed(seed)
    mass = torch.rand(units, 9, generator=g) ** 4
    price = group_sums(mass, size).median()
    start = by_importance(mass)
    better = improve(mass, start, size, price, sweeps=3)
    assert is_order(start) and is_order(better)
    assert objective(mass, better, size, price) <= objective(mass, start, size, price) * (1 + 1e-5)
    few = improve(mass, start, size, price, sweeps=3, memory=1)
    assert torch.equal(few, better), "how much is done at once changes nothing"


def test_units_that_use_the_same_blocks_come_together():
    """Equally important units of two kinds, each at home in its own blocks: sorting cannot tell them apart."""
    kinds = torch.arange(16) % 2
    mass = torch.eye(2)[kinds].repeat_interleave(3, dim=1)
    order = improve(mass, by_importance(mass), 4, torch.tensor(1.0), sweeps=10)
    assert all(len(set(group.tolist())) == 1 for group in kinds[order].view(4, 4))


@pytest.mark.parametrize("config", [GPT2, dataclasses.replace(QWEN3, **UNBALANCED)], ids=["gpt2", "uneven qwen3"])
def test_a_network_s_orders_leave_less_in_the_blocks_that_go(config):
    """Random costs on top of what units cost on average: sorting helps, swaps help more, the function stays."""
    model = build(config)
    costs = []
    for layer in range(3):
        own = {name: module.weight.detach().square() for name, module in layer_matrices(model, layer)}
        costs.append({name: w * (torch.rand(len(w), 1) * torch.rand(w.size(1))) ** 4 for name, w in own.items()})
    squares = costs.__getitem__
    lost = []
    for sweeps in (0, 3):
        orders = find_orders(config, squares, 4, 0.5, sweeps=sweeps)
        assert is_order(orders.residual) and all(is_order(channels) for channels in orders.channels)
        assert all(is_order(head) for values in orders.values for head in values)
        lost.append(_lost(config, squares, orders))
    assert lost[1] < lost[0]
    idx = batch(config)[0]
    logits = model(idx).detach()
    permute_(model, orders)
    torch.testing.assert_close(model(idx).detach(), logits, atol=1e-4, rtol=0)


def _lost(config, squares, orders):
    """What the cheaper half of all 4 x 4 blocks costs, by index arithmetic on each matrix."""
    blocks = []
    for layer in range(3):
        for name, mass in squares(layer).items():
            rows = {"attn.v_proj": orders.value_rows(layer), "attn.o_proj": orders.residual}
            rows |= {"mlp.gate_proj": orders.channels[layer], "mlp.up_proj": orders.channels[layer]}
            rows |= {"mlp.down_proj": orders.residual}
            columns = {"attn.o_proj": orders.value_columns(layer, config), "mlp.down_proj": orders.channels[layer]}
            mass = mass[rows.get(name, torch.arange(len(mass)))][:, columns.get(name, orders.residual)]
            blocks.append(mass.unfold(0, 4, 4).unfold(1, 4, 4).sum(dim=(2, 3)).flatten())
    blocks = torch.cat(blocks).sort().values
    return float(blocks[: len(blocks) // 2].sum())
