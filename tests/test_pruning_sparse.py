"""The one door to sparse pruning: every method, pattern and allocation on both families, exact, and never refilled."""

import copy
import dataclasses

import pytest
import torch

from model.masks import apply_masks_, check_masks
from model.pruning.matrices import matrices
from model.pruning.sparse import SparseSettings, prune_sparse
from model.pruning.statistics import collect, gradients
from tests.model_helpers import GPT2, LLAMA, QWEN3, UNBALANCED, batch, build

UNEVEN = dataclasses.replace(QWEN3, **UNBALANCED)
CONFIGS = pytest.mark.parametrize("config", [GPT2, UNEVEN], ids=["gpt2", "uneven qwen3"])


def calibrated(config):
    """A model, windows, its statistics as a callable, its gradients."""
    model = build(config)
    windows = batch(config, B=6, T=32)[0]
    return model, windows, dict(collect(model, windows, frozen=True)).__getitem__, gradients(model, windows)


def zeros(model, masks):
    """The share of the weights under masks that is zero."""
    weights = [model.get_submodule(name.removesuffix(".weight")).weight for name in masks]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@CONFIGS
@pytest.mark.parametrize("allocation", ["uniform", "owl", "unbalanced"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt"])
def test_the_share_that_is_asked_for_is_the_share_of_zeros(config, method, allocation):
    model, _, statistics, found = calibrated(config)
    settings = SparseSettings(method=method, sparsity=0.4, allocation=allocation)
    masks, rows = prune_sparse(model, statistics, found, settings)
    assert set(masks) == {f"{name}.weight" for name in matrices(model, range(3))}
    check_masks(model, masks)
    total = sum(mask.bits.numel() for mask in masks.values())
    slack = len(masks) + 1 if method == "sparsegpt" else 1  # the weight at its threshold goes too
    assert abs(zeros(model, masks) * total - 0.4 * total) <= slack
    assert [row.weight for row in rows] == list(masks)
    if allocation == "uniform":
        assert all(row.sparsity == pytest.approx(0.4, abs=0.005) for row in rows)


@CONFIGS
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt"])
def test_two_of_four(config, method):
    model, _, statistics, _ = calibrated(config)
    masks, rows = prune_sparse(model, statistics, None, SparseSettings(method=method, pattern="2:4"))
    assert {row.pattern for row in rows} == {"2:4"}
    check_masks(model, masks)


@CONFIGS
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_blocks_by_the_sum_of_their_scores(config, method):
    """32, 40 and 48 channels in blocks of 12: partial blocks at the edges count for what they hold."""
    model, _, statistics, _ = calibrated(config)
    settings = SparseSettings(method=method, pattern="block", block_size=12, sparsity=0.5)
    masks, rows = prune_sparse(model, statistics, None, settings)
    assert {row.pattern for row in rows} == {"12x12"}
    check_masks(model, masks)
    for mask in masks.values():
        assert mask.sparsity <= 0.5 < mask.sparsity + 144 / (mask.shape[0] * mask.shape[1])


def test_wanda_is_the_paper_s_by_hand():
    """For each output, the half of the inputs with the smallest |w| ||x|| goes; ||x|| over all tokens of the layer."""
    model, windows, statistics, _ = calibrated(LLAMA)
    dense = copy.deepcopy(model)
    x = dense.h[0].ln_1(dense.wte(windows)).flatten(0, 1)
    metric = dense.h[0].attn.k_proj.weight.abs() * x.norm(dim=0)
    masks, _ = prune_sparse(model, statistics, None, SparseSettings(method="wanda", sparsity=0.5))
    for row, kept in zip(metric, masks["h.0.attn.k_proj.weight"].dense()):
        assert set((~kept).nonzero().flatten().tolist()) == set(row.argsort()[:16].tolist())


def test_windows_give_later_layers_the_statistics_of_the_pruned_ones():
    model, windows, statistics, _ = calibrated(LLAMA)
    once, again = copy.deepcopy(model), model
    settings = SparseSettings(method="wanda", sparsity=0.6)
    first, _ = prune_sparse(once, statistics, None, settings)
    second, _ = prune_sparse(again, windows, None, settings)
    assert torch.equal(first["h.0.mlp.up_proj.weight"].bits, second["h.0.mlp.up_proj.weight"].bits)
    # Layer 2's input, by hand: of the model whose layers 0 and 1 are pruned.
    x = again.h[2].ln_1(_stream(again, windows, 2)).flatten(0, 1)
    metric = copy.deepcopy(build(LLAMA)).h[2].attn.q_proj.weight.abs() * x.norm(dim=0)
    bits = second["h.2.attn.q_proj.weight"].dense()
    assert all(metric[r][~bits[r]].max() <= metric[r][bits[r]].min() for r in range(len(bits)))
    assert not torch.equal(first["h.2.attn.q_proj.weight"].bits, bits)


def _stream(model, windows, layer):
    from model.attention import AttentionInputs

    with torch.no_grad():
        x = model.wte(windows)
        for block in model.h[:layer]:
            x = block(x, AttentionInputs(model._rope_tables(windows, None)))
    return x


@pytest.mark.parametrize(
    "settings",
    [
        SparseSettings(method="wanda", sparsity=0.7),
        SparseSettings(method="sparsegpt", sparsity=0.7, allocation="unbalanced"),
        SparseSettings(method="sparsegpt", pattern="2:4"),
        SparseSettings(method="wanda", pattern="block", block_size=4, sparsity=0.7),
        SparseSettings(method="sparsegpt", pattern="block", block_size=4, sparsity=0.7),
    ],
    ids=lambda s: f"{s.method}-{s.pattern}",
)
@pytest.mark.parametrize("before", ["unstructured", "block"])
def test_a_sparse_model_is_pruned_further_and_never_refilled(settings, before):
    model, windows, _, _ = calibrated(LLAMA)
    old = SparseSettings(method="magnitude", pattern=before, block_size=4, sparsity=0.3)
    masks, _ = prune_sparse(model, None, None, old)
    statistics, found = dict(collect(model, windows, frozen=True)).__getitem__, gradients(model, windows)
    again, _ = prune_sparse(model, statistics, found, settings, masks)
    check_masks(model, again)
    for name, mask in again.items():
        assert not (mask.dense() & ~masks[name].dense()).any(), name
    assert zeros(model, again) == pytest.approx(max(settings.sparsity, 0.5), abs=0.16)


@pytest.mark.parametrize("allocation", ["uniform", "unbalanced"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_blocks_over_zeros_of_single_weights_reach_the_share_that_is_asked_for(method, allocation):
    """What a block has lost already is not lost again, and counts."""
    model, windows, _, _ = calibrated(LLAMA)
    masks, _ = prune_sparse(model, None, None, SparseSettings(method="magnitude", sparsity=0.5))
    statistics, found = dict(collect(model, windows, frozen=True)).__getitem__, gradients(model, windows)
    settings = SparseSettings(method=method, pattern="block", block_size=4, sparsity=0.6, allocation=allocation)
    again, _ = prune_sparse(model, statistics, found, settings, masks)
    check_masks(model, again)
    total = sum(mask.shape[0] * mask.shape[1] for mask in again.values())
    slack = 16 * (1 if (method, allocation) == ("sparsegpt", "unbalanced") else len(again))
    assert 0.6 * total - slack <= zeros(model, again) * total <= 0.6 * total + 0.5


@pytest.mark.parametrize("block_size", [4, 8])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_blocks_spare_a_matrix_whose_share_is_nothing_and_empty_one_whose_share_is_all(method, block_size):
    model, _, statistics, _ = calibrated(LLAMA)
    wide = SparseSettings(method=method, pattern="block", block_size=block_size, allocation="owl", sparsity=0.08)
    masks, _ = prune_sparse(copy.deepcopy(model), statistics, None, wide)
    assert any(mask.bits.all() for mask in masks.values()) and not all(mask.bits.all() for mask in masks.values())
    masks, _ = prune_sparse(model, statistics, None, dataclasses.replace(wide, sparsity=0.95))
    assert any(not mask.bits.any() for mask in masks.values())


@pytest.mark.parametrize("allocation", ["uniform", "unbalanced"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(("size", "sparsity"), [(1000, 0.5), (4, 1e-4)])
def test_blocks_of_which_none_can_go_are_refused(method, allocation, size, sparsity):
    model, _, statistics, found = calibrated(LLAMA)
    settings = SparseSettings(method=method, pattern="block", block_size=size, sparsity=sparsity, allocation=allocation)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"--block_size {size}: not one block .* give a smaller one"):
        prune_sparse(model, statistics, found, settings)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_layers_out_of_range_stay_and_keep_their_masks():
    model, _, statistics, _ = calibrated(LLAMA)
    masks, _ = prune_sparse(model, None, None, SparseSettings(method="magnitude", sparsity=0.2, layer_end=1))
    weights = copy.deepcopy(model.state_dict())
    settings = SparseSettings(method="wanda", sparsity=0.5, layer_start=1, layer_end=2)
    again, _ = prune_sparse(model, statistics, None, settings, masks)
    assert set(again) == {f"{name}.weight" for name in matrices(model, range(2))}
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, weights[name])}
    assert changed == {f"{name}.weight" for name in matrices(model, [1])}
    apply_masks_(model, again)
    assert all(torch.equal(weights[name], model.state_dict()[name]) for name in masks)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "taylor"}, "choose one of magnitude, wanda, ria, sparsegpt"),
        ({"allocation": "global"}, "choose one of uniform, owl, unbalanced"),
        ({"sparsity": 1.0}, "give a share above 0 and below 1"),
        ({"sparsity": 0}, "give a share above 0 and below 1"),
        ({"pattern": "1:4"}, "choose one of unstructured, 2:4, 4:8, block"),
        ({"pattern": "2:4", "sparsity": 0.6}, "leave --sparsity out"),
        ({"pattern": "2:4", "allocation": "owl"}, "leave --allocation out"),
        ({"pattern": "block", "block_size": 0}, "at least 1"),
        ({"pattern": "block", "method": "sparsegpt", "allocation": "owl"}, "unbalanced or uniform"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SparseSettings(**values)


def test_what_a_model_or_text_does_not_allow_is_refused():
    model, _, statistics, found = calibrated(LLAMA)
    for source, gradient, settings, message in (
        (None, None, SparseSettings(), "wanda needs calibration text"),
        (None, found, SparseSettings(method="magnitude", allocation="owl"), "owl needs calibration text"),
        (statistics, None, SparseSettings(allocation="unbalanced"), "need gradients"),
        (statistics, None, SparseSettings(layer_end=4), "not in a model of 3"),
        (statistics, None, SparseSettings(layer_start=2, layer_end=2), "layer_start < layer_end <= 3"),
    ):
        weights = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            prune_sparse(model, source, gradient, settings)
        assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
