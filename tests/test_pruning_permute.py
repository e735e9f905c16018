"""A permuted network is the same function, in every family, and its statistics are those of before, permuted."""

import copy
import dataclasses

import pytest
import torch

from model.pruning.permute import Orders, natural_orders, permute_, permute_gradients, permute_statistics
from model.pruning.statistics import SITES, collect, gradients
from tests.model_helpers import FAMILIES, GPT2, LLAMA, QWEN3, UNBALANCED, batch, build


def random_orders(config, seed=3):
    g = torch.Generator().manual_seed(seed)
    orders = natural_orders(config)
    return Orders(
        orders.residual[torch.randperm(config.n_embd, generator=g)],
        [
            torch.stack([torch.randperm(config.head_dim, generator=g) for _ in values]) if len(values) else values
            for values in orders.values
        ],
        [channels[torch.randperm(len(channels), generator=g)] for channels in orders.channels],
    )


def check_same_function(config):
    model = build(config)
    idx, _ = batch(config)
    before = model(idx).detach()
    weights = copy.deepcopy(model.state_dict())
    permute_(model, random_orders(config))
    torch.testing.assert_close(model(idx).detach(), before, atol=1e-4, rtol=0)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.flatten().sort().values, weights[name].flatten().sort().values), name
        if weight.dim() == 2 and not name.endswith("qk_norm.weight"):
            assert not torch.equal(weight, weights[name]), f"{name} was not touched"


@FAMILIES
def test_logits_stay(config):
    check_same_function(config)


@pytest.mark.parametrize("config", [GPT2, QWEN3], ids=["gpt2", "qwen3"])
def test_logits_stay_with_a_free_head_and_uneven_layers(config):
    ratio = 1 if config is GPT2 else 2
    uneven = {"n_head": (4, 0, 2), "n_kv_head": (4 // ratio, 0, 2 // ratio), "mlp_dim": (24, 40, 0)}
    check_same_function(dataclasses.replace(config, tie_embeddings=False, **uneven))


@pytest.mark.parametrize("n_kv_head", [1, 4])
def test_logits_stay_whatever_the_groups(n_kv_head):
    check_same_function(dataclasses.replace(LLAMA, n_kv_head=n_kv_head))


def test_the_natural_order_changes_nothing():
    model = build(QWEN3)
    weights = copy.deepcopy(model.state_dict())
    permute_(model, natural_orders(QWEN3))
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("config", [GPT2, dataclasses.replace(QWEN3, **UNBALANCED)], ids=["gpt2", "uneven qwen3"])
def test_statistics_and_gradients_follow(config):
    model = build(config)
    windows = batch(config, B=4, T=32)[0]
    orders = random_orders(config)
    before, squares = list(collect(model, windows, frozen=True)), gradients(model, windows)
    permute_(model, orders)
    after, squares_after = list(collect(model, windows, frozen=True)), gradients(model, windows)
    for (layer, old), (_, new) in zip(before, after):
        moved = permute_statistics(old, layer, orders, config)
        for site in SITES:
            left, right = getattr(moved, site), getattr(new, site)
            assert (left is None) == (right is None)
            if left is not None:
                torch.testing.assert_close(left.second, right.second, atol=1e-3, rtol=1e-4)
                torch.testing.assert_close(left.mean, right.mean, atol=1e-4, rtol=1e-4)
                assert left.tokens == right.tokens
    moved_squares = permute_gradients(squares, orders).output
    assert set(moved_squares) == set(squares_after.output)
    for name, square in squares_after.output.items():
        torch.testing.assert_close(moved_squares[name], square, rtol=1e-3, atol=1e-6)
