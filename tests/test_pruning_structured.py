"""Structured pruning: scores against explicit removal and re-fit, the budget, the re-fit, the report."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.pruning.refit import refit_columns, refit_with_bias
from model.pruning.statistics import LayerStatistics, Site, collect, gradients
from model.pruning.structured import Scores, StructuredSettings, choose_units, prune_structured, unit_scores
from model.pruning.units import UnitCosts, keep_units, query_rows, unit_flops, unit_parameters
from tests.model_helpers import GPT2, LLAMA, QWEN3, UNBALANCED, build

WINDOWS = torch.randint(97, (12, 24), generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "gpt2": GPT2,
    "llama-all-kv": dataclasses.replace(LLAMA, n_kv_head=4),
    "llama-groups": LLAMA,
    "llama-one-kv": dataclasses.replace(LLAMA, n_kv_head=1),
    "qwen3": QWEN3,
    "pruned": dataclasses.replace(LLAMA, **UNBALANCED),
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
HALF = StructuredSettings(ratio=0.4, prune_mlp=True, min_groups=0)


def measured(model):
    found = dict(collect(model, WINDOWS, frozen=True))
    return found.__getitem__, gradients(model, WINDOWS)


def prune(model, how):
    statistics, grads = measured(model)
    return prune_structured(model, statistics, grads, how)


# Scores


def inputs(tokens=300, d=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
    return x + torch.linspace(-1, 1, d, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
def test_obs_scores_are_the_weighted_errors_after_removal_and_an_exact_refit(bias):
    """The first units to go, by lstsq on explicit inputs without them, each output's error weighted by g."""
    config = dataclasses.replace(
        LLAMA, n_embd=6, head_dim=2, n_head=6, n_kv_head=3, mlp_dim=12, o_bias=bias, mlp_bias=bias
    )
    model = build(config).double()
    x = inputs()
    site = Site(x.t() @ x / len(x), x.mean(0), len(x))
    statistics = LayerStatistics(None, site, None, site, influence=0.5)
    grads = gradients(build(config), WINDOWS)
    grads.output = {name: g.double() for name, g in grads.output.items()}
    how = dataclasses.replace(HALF, damping=0.0)
    found = unit_scores(model, 1, statistics, grads, how)

    def error(linear, gone, fisher):
        stays = torch.tensor([c for c in range(12) if c not in gone])
        read = x[:, stays] if linear.bias is None else torch.cat((x[:, stays], torch.ones(len(x), 1)), 1)
        y = linear(x).detach()
        return float(((y - read @ torch.linalg.lstsq(read, y).solution).square().mean(0) * fisher).sum())

    block = model.h[1]
    groups = [error(block.attn.o_proj, range(4 * i, 4 * i + 4), grads.output["h.1.attn.o_proj"]) for i in range(3)]
    channels = [error(block.mlp.down_proj, [c], grads.output["h.1.mlp.down_proj"]) for c in range(12)]
    for costs, alone in ((found.groups, groups), (found.channels, channels)):
        assert float(costs.min()) == pytest.approx(min(alone), rel=1e-6) and costs.argmin() == alone.index(min(alone))
    both = error(block.mlp.down_proj, found.channels.argsort()[:2].tolist(), grads.output["h.1.mlp.down_proj"])
    assert float(found.channels.sort().values[:2].sum()) == pytest.approx(both, rel=1e-6)


def test_taylor_and_fisher_scores_are_sums_of_the_gates_of_a_units_columns():
    model = build(LLAMA)
    statistics, grads = measured(model)
    taylor, fisher = (
        unit_scores(model, 1, statistics(1), grads, dataclasses.replace(HALF, importance=name))
        for name in ("taylor", "fisher")
    )
    for group in range(2):
        own = grads.gate["h.1.attn_out"][:, query_rows(torch.tensor([group]), LLAMA)].sum(1).double()
        assert float(taylor.groups[group]) == pytest.approx(abs(float(own.sum())), rel=1e-4)
        assert float(fisher.groups[group]) == pytest.approx(float(own.square().sum()), rel=1e-4)
    gate = grads.gate["h.1.mlp_out"].double()
    torch.testing.assert_close(taylor.channels, gate.sum(0).abs())
    torch.testing.assert_close(fisher.channels, gate.square().sum(0))


def test_taylor_scores_predict_the_change_of_the_loss_by_a_small_gate():
    """Group 1 of layer 1 turned down by a thousandth: the loss changes by a thousandth of its score."""
    model = build(LLAMA).eval()
    statistics, grads = measured(model)
    score = unit_scores(model, 1, statistics(1), grads, dataclasses.replace(HALF, importance="taylor")).groups[1]
    targets = torch.nn.functional.pad(WINDOWS[:, 1:], (0, 1), value=-100)
    model.double()
    with torch.no_grad():
        before = model(WINDOWS, targets)
        model.h[1].attn.o_proj.weight[:, query_rows(torch.tensor([1]), LLAMA)] *= 1 - 1e-3
        after = model(WINDOWS, targets)
    assert abs(float(after - before)) == pytest.approx(1e-3 * float(score), rel=0.02)


def test_activation_scores_are_shares_of_the_layers_influence():
    model = build(LLAMA)
    statistics, _ = measured(model)
    found = unit_scores(model, 2, statistics(2), None, dataclasses.replace(HALF, importance="activation"))
    influence, norms = statistics(2).influence, statistics(2).mlp_out.norms
    wanted = (model.h[2].mlp.down_proj.weight.detach().abs() * norms).sum(0)
    torch.testing.assert_close(found.channels.float(), wanted / wanted.sum() * influence)
    assert float(found.groups.sum()) == pytest.approx(influence)


# The budget

FLAT = UnitCosts(group=10.0, channel=1.0)


def scores(config, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = [config.layer(i) for i in range(config.n_layer)]
    return {
        i: Scores(torch.rand(s.n_kv_head, generator=g) * 10, torch.rand(s.mlp_dim, generator=g))
        for i, s in enumerate(sizes)
    }


def removed(config, kept):
    sizes = [config.layer(i) for i in range(config.n_layer)]
    return [(s.n_kv_head - len(k.groups), s.mlp_dim - len(k.channels)) for s, k in zip(sizes, kept)]


def test_unbalanced_takes_the_lowest_scores_per_cost_over_all_layers():
    found = scores(LLAMA, seed=3)
    kept = choose_units(LLAMA, found, FLAT, dataclasses.replace(HALF, ratio=0.3))
    density = [(float(x) / 10, 10, i, 0, u) for i in found for u, x in enumerate(found[i].groups)]
    density += [(float(x), 1, i, 1, u) for i in found for u, x in enumerate(found[i].channels)]
    gone = {(i, kind, u) for _, _, i, kind, u in density}
    gone -= {(i, kind, int(u)) for i, units in enumerate(kept) for kind in (0, 1) for u in units[kind]}
    assert sum(cost for _, cost, *unit in density if tuple(unit) in gone) == round(0.3 * (60 + 3 * 48))
    lowest_kept = {
        kind: min(x for x, _, *unit in density if tuple(unit) not in gone and unit[1] == kind) for kind in (0, 1)
    }
    highest_gone = {
        kind: max(x for x, _, *unit in density if tuple(unit) in gone and unit[1] == kind) for kind in (0, 1)
    }
    assert all(highest_gone[kind] < lowest_kept[kind] for kind in (0, 1))


def test_a_group_that_no_longer_fits_leaves_its_place_to_channels():
    """Budget 36: three groups of 10 and, though a fourth group is worth less than any channel, six channels."""
    found = {i: Scores(torch.zeros(2), torch.ones(48)) for i in range(3)}
    gone = removed(LLAMA, choose_units(LLAMA, found, FLAT, dataclasses.replace(HALF, ratio=36 / 204)))
    assert sum(groups for groups, _ in gone) == 3 and sum(channels for _, channels in gone) == 6


def test_uniform_takes_the_same_share_of_every_layer():
    config = dataclasses.replace(LLAMA, n_head=6, n_kv_head=3)
    kept = choose_units(config, scores(config), FLAT, dataclasses.replace(HALF, ratio=0.25, allocation="uniform"))
    assert removed(config, kept) == [(1, 10)] * 3  # of 3 x 10 + 48 = 78 a quarter: 19.5, a group and 9.5 channels


def test_without_prune_mlp_the_ratio_is_of_the_groups_alone():
    config = dataclasses.replace(LLAMA, n_head=4, n_kv_head=4)
    how = dataclasses.replace(HALF, prune_mlp=False, ratio=0.25)
    for allocation in ("uniform", "unbalanced"):
        kept = removed(
            config, choose_units(config, scores(config), FLAT, dataclasses.replace(how, allocation=allocation))
        )
        assert sum(groups for groups, _ in kept) == 3 and not any(channels for _, channels in kept)
        assert allocation == "unbalanced" or [groups for groups, _ in kept] == [1, 1, 1]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.floats(0.02, 0.98),
    st.integers(0, 100),
    st.sampled_from(["uniform", "unbalanced"]),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from([0, 5, 48]),
    st.sampled_from([1, 7, 16]),
)
def test_any_budget_is_met_within_floors_and_multiples(
    ratio, seed, allocation, mlp, min_groups, min_channels, multiple
):
    how = StructuredSettings(
        ratio=ratio,
        prune_mlp=mlp,
        allocation=allocation,
        min_groups=min_groups,
        min_channels=min_channels,
        channel_multiple=multiple,
    )
    try:
        kept = choose_units(LLAMA, scores(LLAMA, seed), FLAT, how)
    except ValueError as error:
        assert "removes nothing" in str(error)
        return
    total, gone = 3 * (20 + 48 * mlp), removed(LLAMA, kept)
    for (_, channels), units in zip(gone, kept):
        assert len(units.groups) >= min_groups and len(units.channels) >= min_channels
        assert channels == 0 or len(units.channels) % multiple == 0
        assert all((units[kind].diff() > 0).all() for kind in (0, 1))
    cost = sum(10 * groups + channels for groups, channels in gone)
    if not min_groups and min_channels <= 5 and mlp and multiple == 1 and allocation == "unbalanced":
        assert abs(cost - ratio * total) <= 0.5 or cost >= total - 3 * min_channels


def test_costs_are_the_budget():
    """Where a group costs three times as much time, it is groups that go."""
    found = {i: Scores(s.groups / 10, s.channels) for i, s in scores(LLAMA).items()}
    by_parameters, by_time = (
        removed(LLAMA, choose_units(LLAMA, found, costs, HALF)) for costs in (FLAT, UnitCosts(30.0, 1.0))
    )
    assert sum(groups for groups, _ in by_time) > 0 and sum(c for _, c in by_time) < sum(c for _, c in by_parameters)


# The whole


@EVERY
@pytest.mark.parametrize("how", [HALF, dataclasses.replace(HALF, importance="fisher", allocation="uniform")])
def test_the_result_is_as_small_as_the_report_says(config, how):
    model = build(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smaller, report = prune(model, how)
    units, norms = unit_parameters(config), sum(p.numel() for p in model.parameters() if p.dim() == 1)
    total = sum(row.parameters_before for row in report.rows)
    assert total == sum(s.n_kv_head * units.group + s.mlp_dim * units.channel for s in map(config.layer, range(3)))
    lost = model.num_params() - smaller.num_params()
    assert report.removed_parameters <= lost <= report.removed_parameters + norms  # an absent sub-layer has no norm
    assert report.achieved == pytest.approx(report.removed_parameters / total)
    assert abs(report.achieved - report.asked) < 0.5 * units.group / total or how.allocation == "uniform"
    assert bool(report.notes) == (abs(report.achieved - report.asked) >= 0.005)
    sizes = [smaller.config.layer(i) for i in range(3)]
    assert [(row.groups, row.channels) for row in report.rows] == [(s.n_kv_head, s.mlp_dim) for s in sizes]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@EVERY
def test_the_refit_is_least_squares_on_the_kept_columns(config):
    model = build(config)
    statistics, grads = measured(model)
    how = dataclasses.replace(HALF, min_groups=1, min_channels=1)
    smaller, _ = prune_structured(model, statistics, grads, how)
    plain, _ = prune_structured(model, statistics, grads, dataclasses.replace(how, refit=False))
    seen = 0
    for i, (block, dense) in enumerate(zip(plain.h, model.h)):
        if block.mlp is None or block.mlp.down_proj.in_features == dense.mlp.down_proj.in_features:
            continue
        whole, part = dense.mlp.down_proj, block.mlp.down_proj.weight
        kept = (whole.weight.t().unsqueeze(0) == part.t().unsqueeze(1)).all(2).nonzero()[:, 1]
        site, found = statistics(i).mlp_out, smaller.h[i].mlp.down_proj
        if whole.bias is None:
            torch.testing.assert_close(found.weight, refit_columns(whole.weight, site.second, kept))
        else:
            weight, bias = refit_with_bias(whole.weight, whole.bias, site, kept)
            torch.testing.assert_close(found.weight, weight)
            torch.testing.assert_close(found.bias, bias)
        seen += 1
    assert seen


@EVERY
def test_the_refit_keeps_logits_nearer_to_the_dense_models(config):
    model = build(config).eval()
    statistics, grads = measured(model)

    def distance(refit):
        smaller, _ = prune_structured(model, statistics, grads, dataclasses.replace(HALF, refit=refit, ratio=0.25))
        with torch.no_grad():
            return float((smaller(WINDOWS) - model(WINDOWS))[..., :97].square().mean())

    assert distance(True) < distance(False)


def test_gpt2s_lost_sub_layer_leaves_its_mean_output_behind():
    """All of an MLP goes: the best constant in its place is its mean output, carried by the bias before it."""
    model = build(GPT2).eval()
    statistics, grads = measured(model)
    grads.output["h.1.mlp.down_proj"] *= 0  # worth nothing
    how = StructuredSettings(ratio=48 * 65 / (3 * 7312), prune_mlp=True)
    smaller, report = prune_structured(model, statistics, grads, how)
    down, site = model.h[1].mlp.down_proj, statistics(1).mlp_out
    assert report.rows[1].channels == 0 and smaller.h[1].mlp is None and report.rows[1].groups == 4
    wanted = model.h[1].attn.o_proj.bias + down(site.mean)
    torch.testing.assert_close(smaller.h[1].attn.o_proj.bias, wanted, rtol=1e-4, atol=1e-5)


def test_layers_outside_the_range_or_protected_keep_all():
    config = dataclasses.replace(LLAMA, n_layer=6)
    for bounds, allowed in (
        ({"layer_start": 1, "layer_end": 4}, {1, 2, 3}),
        ({"protect_first": 2, "protect_last": 1}, {2, 3, 4}),
        ({"layer_start": 1, "layer_end": 6, "protect_first": 2, "protect_last": 2}, {2, 3}),
    ):
        _, report = prune(build(config), dataclasses.replace(HALF, **bounds))
        changed = {row.layer for row in report.rows if row.parameters < row.parameters_before}
        assert changed == allowed
        total = sum(row.parameters_before for row in report.rows if row.layer in allowed)
        assert report.achieved == pytest.approx(report.removed_parameters / total)
        assert report.achieved == pytest.approx(0.4, abs=0.02)


def test_a_budget_of_flops_counts_the_context():
    model = build(LLAMA)
    statistics, grads = measured(model)
    costs = unit_flops(LLAMA, T=24)
    smaller, report = prune_structured(model, statistics, grads, HALF, costs)
    blocks = (model.flops_per_token(24) - 6 * model.head_weight.numel()) / 3
    norms = 2 * sum(p.numel() for p in model.parameters() if p.dim() == 1)
    lost = (model.flops_per_token(24) - smaller.flops_per_token(24)) / 3
    assert lost / (blocks - norms) == pytest.approx(report.achieved, abs=0.005)


def test_a_head_count_that_the_ratio_cannot_meet_is_said():
    config = dataclasses.replace(LLAMA, n_head=6, n_kv_head=3)
    how = StructuredSettings(ratio=0.25, allocation="uniform")
    _, report = prune(build(config), how)
    assert report.achieved == pytest.approx(1 / 3)
    assert report.notes == ["asked to remove 25.0%; whole units and the floors allow 33.3%"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"importance": "l2"}, "choose one of obs, fisher"),
        ({"allocation": "owl"}, "choose one of unbalanced, uniform"),
        ({"min_groups": -1}, "min_groups is -1"),
        ({"channel_multiple": 0}, "channel_multiple is 0"),
        ({"layer_start": 3}, "layers 3 to 3 .* with 3"),
        ({"layer_end": 4}, "layers 0 to 4 .* layer_end <= 3"),
        ({"layer_start": -1}, "layers -1 to 3"),
        ({"layer_start": 2, "layer_end": 1}, "layers 2 to 1"),
        ({"protect_first": 2, "protect_last": 1}, "all protected"),
        ({"ratio": 0.01, "prune_mlp": False}, "removes nothing"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        prune(build(LLAMA), dataclasses.replace(HALF, **wrong))


def test_importance_by_gradients_needs_them():
    model = build(LLAMA)
    statistics, _ = measured(model)
    with pytest.raises(ValueError, match="needs gradients"):
        prune_structured(model, statistics, None, HALF)
    prune_structured(model, statistics, None, dataclasses.replace(HALF, importance="activation"))


def test_kept_units_are_those_that_keep_units_takes():
    """Without a re-fit the result is `keep_units` of what was chosen, bit for bit."""
    model = build(QWEN3)
    statistics, grads = measured(model)
    how = dataclasses.replace(HALF, refit=False)
    smaller, _ = prune_structured(model, statistics, grads, how)
    found = {i: unit_scores(model, i, statistics(i), grads, how) for i in range(3)}
    wanted = keep_units(model, choose_units(QWEN3, found, unit_parameters(QWEN3), how))
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in smaller.state_dict().items())
