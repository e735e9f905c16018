"""Second-order blocks: what each costs in its turn, exact shares, and nearer to the dense network than 001's way."""

import copy
import dataclasses

import pytest
import torch

from model.masks import Mask, check_masks
from model.pruning.blocks import BlockSettings, prune_blocks, removal_costs
from model.pruning.matrices import matrices
from model.pruning.refit import damped, refit_row_blocks
from model.pruning.sparse import SparseSettings, prune_sparse
from model.pruning.statistics import collect, gradients
from tests.model_helpers import GPT2, QWEN3, UNBALANCED, batch, build

UNEVEN = dataclasses.replace(QWEN3, **UNBALANCED)
CONFIGS = pytest.mark.parametrize("config", [GPT2, UNEVEN], ids=["gpt2", "uneven qwen3"])


def calibrated(config):
    model = build(config).requires_grad_(False)
    windows = batch(config, B=24, T=32)[0]
    return model, windows, dict(collect(model, windows, frozen=True)).__getitem__, gradients(model, windows).output


@pytest.mark.parametrize("size", [4, 5, 64])
@pytest.mark.parametrize("steps", [2, 5, 24])
def test_costs_add_up_to_what_the_least_squares_fit_loses(size, steps):
    """After each step of a row of blocks, against the exact fit; blocks of 4 and 5 leave partial ones at both edges."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(90, 18, generator=g, dtype=torch.float64) @ torch.randn(18, 18, generator=g, dtype=torch.float64)
    second, weight = x.t() @ x / 90, torch.randn(9, 18, generator=g, dtype=torch.float64)
    output, whole = torch.rand(9, generator=g, dtype=torch.float64), damped(second, 0.01)
    costs = removal_costs(weight, torch.linalg.inv(whole), output, size, steps)
    rows, columns = -(-9 // size), -(-18 // size)
    assert costs.shape == (rows, columns)
    turn = costs.argsort(dim=1, stable=True).argsort(dim=1)
    for gone in {columns * (i + 1) // steps for i in range(steps)}:
        fitted = refit_row_blocks(weight, second, Mask((9, 18), (size, size), turn >= gone))
        lost = output * (((fitted - weight) @ whole) * (fitted - weight)).sum(dim=1)
        wanted = torch.stack([part.sum() for part in lost.split(size)])
        paid = costs.masked_fill(turn >= gone, 0.0).sum(dim=1)
        # A cost lifted to the one before it makes the sum a little more than what is lost.
        assert (paid >= wanted - 1e-9).all() and (paid <= 1.3 * wanted + 1e-9).all()
        if gone == columns:
            everything = output * ((weight @ whole) * weight).sum(dim=1)
            torch.testing.assert_close(wanted, torch.stack([part.sum() for part in everything.split(size)]))


def test_the_first_to_go_is_the_cheapest_alone():
    model, _, statistics, output = calibrated(GPT2)
    weight, second = model.h[0].mlp.up_proj.weight, statistics(0).mlp_in.second
    costs = removal_costs(weight, torch.linalg.inv(damped(second, 0.01)), output["h.0.mlp.up_proj"], 4)
    for row in range(12):
        rises = []
        for column in range(8):
            bits = torch.ones(12, 8, dtype=torch.bool)
            bits[row, column] = False
            lost = refit_row_blocks(weight, second, Mask((48, 32), (4, 4), bits)) - weight
            rises.append(float(output["h.0.mlp.up_proj"] @ ((lost @ damped(second, 0.01)) * lost).sum(dim=1)))
        assert int(costs[row].argmin()) == rises.index(min(rises))
        assert float(costs[row].min()) == pytest.approx(min(rises), rel=1e-3)


@CONFIGS
@pytest.mark.parametrize("size", [4, 12])
@pytest.mark.parametrize("together", [True, False])
def test_the_share_of_zeros_is_exact_to_a_block(config, size, together):
    model, _, statistics, output = calibrated(config)
    settings = BlockSettings(size, 0.5, range(3), together=together)
    masks = prune_blocks(model, statistics, output, settings, {})
    assert set(masks) == {f"{name}.weight" for name in matrices(model, range(3))}
    assert {mask.block for mask in masks.values()} == {(size, size)}
    check_masks(model, masks)
    total, kept = (
        sum(f(mask) for mask in masks.values()) for f in (lambda m: m.shape[0] * m.shape[1], lambda m: m.kept)
    )
    slack = size**2 * (1 if together else len(masks))
    assert 0.5 * total <= kept < 0.5 * total + slack
    for mask in masks.values():
        assert mask.sparsity <= (0.9 if together else 0.5)


@CONFIGS
def test_second_order_blocks_stay_nearer_than_the_sums_of_scores(config):
    """001's way against both allocations. Random networks have no easy half: only the order is tested."""
    model, windows, statistics, output = calibrated(config)
    logits = model(windows)[..., :97]
    errors = []
    wanda = SparseSettings(method="wanda", pattern="block", block_size=4)
    for step in ("wanda", "uniform", "together"):
        pruned = copy.deepcopy(model)
        if step == "wanda":
            prune_sparse(pruned, statistics, None, wanda)
        else:
            settings = BlockSettings(4, 0.5, range(3), together=step != "uniform")
            prune_blocks(pruned, statistics, output, settings, {})
        errors.append(float((pruned(windows)[..., :97] - logits).square().mean()))
    assert errors[0] > max(errors[1:]), errors


def test_of_two_blocks_that_can_stand_in_for_each_other_one_stays():
    """Inputs 0-3 and 4-7 of the MLP are equal, so each costs nothing alone; the others are worth little more."""
    model, _, statistics, output = calibrated(dataclasses.replace(GPT2, mlp_dim=16))
    own = statistics(1)
    output["h.1.mlp.down_proj"].fill_(1.0)
    rest = 0.05 * torch.eye(16)
    rest[:8, :8] = torch.eye(4).repeat(2, 2)
    own.mlp_out.second.copy_(rest)
    model.h[1].mlp.down_proj.weight.fill_(1.0)
    model.h[1].mlp.down_proj.weight[:, :4] = 0.5  # the cheaper of the two, so that it goes first in every row
    settings = BlockSettings(4, 0.65, range(1, 2), together=False, reorder=False)
    masks = prune_blocks(model, statistics, output, settings, {})
    bits = masks["h.1.mlp.down_proj.weight"].bits
    assert not bits[:, 0].any() and bits[:, 1].all()
    taken_over = model.h[1].mlp.down_proj.weight[:, 4:8]
    torch.testing.assert_close(taken_over, torch.full((32, 4), 1.5), atol=0.02, rtol=0)


def test_windows_alone_are_enough_and_layers_out_of_range_only_change_places():
    model, windows, _, _ = calibrated(GPT2)
    logits = model(windows)[..., :97]
    settings = SparseSettings(method="sparsegpt", pattern="block", block_size=4, allocation="unbalanced", layer_end=1)
    before = copy.deepcopy(model.state_dict())
    masks, rows = prune_sparse(model, windows, windows, settings)
    assert {row.weight.split(".")[1] for row in rows} == {"0"} and {row.pattern for row in rows} == {"4x4"}
    check_masks(model, masks)
    for name, weight in model.state_dict().items():
        if ".1." in name:
            assert torch.equal(weight.flatten().sort().values, before[name].flatten().sort().values)
    assert float((model(windows)[..., :97] - logits).square().mean()) < float(logits.square().mean())


def test_units_stay_where_they_are_if_asked_to():
    model, _, statistics, _ = calibrated(GPT2)
    found = gradients(model, batch(GPT2, B=4, T=32)[0])
    table = model.wte.weight.clone()
    settings = SparseSettings(method="sparsegpt", pattern="block", block_size=4, reorder=False)
    fixed, free = copy.deepcopy(model), model
    prune_sparse(fixed, statistics, found, settings)
    prune_sparse(free, statistics, found, dataclasses.replace(settings, reorder=True))
    assert torch.equal(fixed.wte.weight, table) and not torch.equal(free.wte.weight, table)
