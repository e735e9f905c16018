"""The dense network beside the pruned one: moments by hand, and a re-fit that brings the outputs back."""

import copy
import dataclasses

import pytest
import torch

from model.masks import Mask
from model.pruning.matrices import layer_matrices
from model.pruning.paired import Pair, follow, retarget
from model.pruning.refit import refit_row_blocks
from model.pruning.statistics import SITE_OF, collect
from tests.model_helpers import GPT2, QWEN3, UNBALANCED, batch, build

CONFIGS = pytest.mark.parametrize(
    "config", [GPT2, dataclasses.replace(QWEN3, **UNBALANCED)], ids=["gpt2", "uneven qwen3"]
)


def test_the_target_is_the_dense_output_in_the_least_squares_sense():
    """Against lstsq in fp64 on inputs, dense outputs and streams, damping as rows of its own."""
    g = torch.Generator().manual_seed(0)
    x_d = torch.randn(200, 12, generator=g, dtype=torch.float64)
    x_p = x_d + 0.5 * torch.randn(200, 12, generator=g, dtype=torch.float64)
    behind = torch.randn(200, 7, generator=g, dtype=torch.float64)
    weight = torch.randn(7, 12, generator=g, dtype=torch.float64)
    second = x_p.t() @ x_p / 200
    for lost in (None, behind):
        pair = Pair(second, x_d.t() @ x_p / 200, None if lost is None else lost.t() @ x_p / 200)
        wanted = x_d @ weight.t() + (0 if lost is None else lost)
        ridge = (200 * 0.01 * second.diagonal().mean()).sqrt()
        a = torch.cat((x_p, ridge * torch.eye(12, dtype=torch.float64)))
        b = torch.cat((wanted, ridge * weight.t()))
        torch.testing.assert_close(retarget(weight, pair), torch.linalg.lstsq(a, b).solution.t())


def test_retargeting_then_fitting_some_columns_is_fitting_those_columns_to_the_target():
    g = torch.Generator().manual_seed(1)
    x_d = torch.randn(200, 12, generator=g, dtype=torch.float64)
    x_p = x_d + 0.5 * torch.randn(200, 12, generator=g, dtype=torch.float64)
    weight = torch.randn(4, 12, generator=g, dtype=torch.float64)
    second, kept = x_p.t() @ x_p / 200, torch.tensor([1, 2, 5, 7, 8, 11])
    pair = Pair(second, x_d.t() @ x_p / 200, None)
    bits = torch.zeros(1, 12, dtype=torch.bool).index_fill(1, kept, True)
    fitted = refit_row_blocks(retarget(weight, pair), second, Mask((4, 12), (4, 1), bits))
    ridge = (200 * 0.01 * second.diagonal().mean()).sqrt()
    a = torch.cat((x_p[:, kept], ridge * torch.eye(6, dtype=torch.float64)))
    b = torch.cat((x_d @ weight.t(), ridge * weight[:, kept].t()))
    torch.testing.assert_close(fitted[:, kept], torch.linalg.lstsq(a, b).solution.t())


@CONFIGS
def test_two_equal_networks_see_the_same_and_nothing_is_behind(config):
    model, windows = build(config), batch(config, B=5, T=32)[0]
    sites = dict(collect(model, windows, frozen=True))
    seen = 0
    for layer, site, pair in follow(model, copy.deepcopy(model), windows, batch_size=2, weigh=False):
        second = getattr(sites[layer], site).second
        torch.testing.assert_close(pair.second, second, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pair.cross, second, atol=1e-4, rtol=1e-4)
        assert (pair.behind is None) == site.endswith("_in")
        assert pair.behind is None or float(pair.behind.abs().max()) < 1e-5
        seen += 1
    assert seen == sum(2 * (b.attn is not None) + 2 * (b.mlp is not None) for b in model.h)


def test_what_is_changed_is_seen_at_the_next_site_and_a_token_counts_by_its_stream():
    dense, windows = build(GPT2), batch(GPT2, B=3, T=32)[0]
    model = copy.deepcopy(dense)
    with torch.no_grad():
        x = dense.wte(windows) + dense.wpe.weight[:32]
        for layer, site, pair in follow(dense, model, windows):
            if (layer, site) == (0, "attn_in"):
                model.h[0].attn.v_proj.weight.zero_()  # all values are now their bias
            if (layer, site) == (0, "attn_out"):
                bias = model.h[0].attn.v_proj.bias
                torch.testing.assert_close(pair.second, torch.outer(bias, bias), atol=1e-5, rtol=1e-4)
                values = _before_o(dense.h[0].attn, dense.h[0].ln_1(x))
                after = x + dense.h[0].attn.o_proj(values)
                weights = 1 / after.square().mean(dim=-1, keepdim=True)
                mean = (values * weights).sum(dim=(0, 1)) / weights.sum()
                torch.testing.assert_close(pair.cross, torch.outer(mean, bias), atol=1e-5, rtol=1e-4)
                break


def _before_o(attn, x):
    """The values that every head has gathered, (B, T, n_head * head_dim), for GPT-2's attention."""
    q, k, v = (p(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@CONFIGS
def test_a_refit_to_the_dense_network_beats_zeros_and_the_refit_of_each_matrix_alone(config):
    dense, windows = build(config).requires_grad_(False), batch(config, B=24, T=32)[0]
    logits = dense(windows)[..., :97]

    def error(model):
        return float((model(windows)[..., :97] - logits).square().mean())

    zeros, alone, paired = (copy.deepcopy(dense) for _ in range(3))
    statistics = dict(collect(dense, windows, frozen=True))
    masks = {}
    for layer, own in statistics.items():
        for linear, module in layer_matrices(dense, layer):
            out, into = module.weight.shape
            bits = torch.rand(out // 4, into // 4, generator=torch.Generator().manual_seed(out)) > 0.3
            mask = masks[layer, linear] = Mask((out, into), (4, 4), bits)
            zeros.h[layer].get_submodule(linear).weight.mul_(mask.dense())
            fitted = refit_row_blocks(module.weight, own.of(linear).second, mask)
            alone.h[layer].get_submodule(linear).weight.copy_(fitted)
    for layer, site, pair in follow(dense, paired, windows):
        for linear, module in layer_matrices(paired, layer):
            if SITE_OF[linear] == site:
                target = retarget(dense.h[layer].get_submodule(linear).weight, pair)
                module.weight.copy_(refit_row_blocks(target, pair.second, masks[layer, linear]))
    assert error(paired) < 0.9 * error(alone) and error(alone) < error(zeros)
