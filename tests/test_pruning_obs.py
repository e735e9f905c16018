"""Costs of removal against explicit inputs: taking units away and fitting the rest by lstsq."""

import pytest
import torch

from model.pruning.obs import removal_costs


def data(tokens=400, d=24, out=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
    weight = torch.randn(out, d, generator=g, dtype=torch.float64)
    return x, weight, x.t() @ x / tokens, torch.rand(out, generator=g, dtype=torch.float64)


def error(x, weight, fisher, gone):
    """The weighted error when these columns are gone and the others are fitted to explicit inputs."""
    stays = [c for c in range(x.size(1)) if c not in gone]
    y = x @ weight.t()
    left = y - x[:, stays] @ torch.linalg.lstsq(x[:, stays], y).solution if stays else y
    return float((left.square().mean(0) * fisher).sum())


def columns(unit, width):
    return list(range(unit * width, unit * width + width))


@pytest.mark.parametrize("width", [1, 2, 6])
def test_each_cost_is_what_the_next_removal_adds(width):
    x, weight, second, fisher = data()
    costs = removal_costs(weight, second, fisher, width, damping=0.0, steps=99)
    gone, before, highest = [], 0.0, 0.0
    for unit in costs.argsort().tolist():
        left = [u for u in range(24 // width) if u * width not in gone]
        adds = {u: error(x, weight, fisher, gone + columns(u, width)) - before for u in left}
        assert adds[unit] == pytest.approx(min(adds.values()), rel=1e-6)  # the cheapest of those that are left
        highest = max(highest, adds[unit])
        assert float(costs[unit]) == pytest.approx(highest, rel=1e-5)
        gone, before = gone + columns(unit, width), before + adds[unit]


@pytest.mark.parametrize("width", [1, 2])
def test_units_that_go_together_share_their_joint_cost(width):
    x, weight, second, fisher = data()
    costs = removal_costs(weight, second, fisher, width, damping=0.0, steps=4)
    order, size = costs.argsort(), 24 // width // 4
    gone, before = [], 0.0
    for step in order.view(4, size).tolist():
        gone += [c for u in step for c in columns(u, width)]
        now = error(x, weight, fisher, gone)
        assert float(costs[step[0]]) >= (now - before) / size * (1 - 1e-6)
        assert costs[step].max() == costs[step].min()
        before = now
    assert float(costs[order[0]]) == pytest.approx(
        error(x, weight, fisher, [c for u in order[:size] for c in columns(int(u), width)]) / size
    )


def test_a_unit_that_repeats_another_is_free_until_that_one_is_gone():
    x, weight, _, fisher = data()
    x[:, 7] = x[:, 3] + 1e-3 * x[:, 7]
    costs = removal_costs(weight, x.t() @ x / len(x), fisher, damping=0.0, steps=24)
    first, second = sorted((float(costs[3]), float(costs[7])))
    assert first == float(costs.min()) and second > 1000 * first


@pytest.mark.parametrize(("units", "steps"), [(24, 64), (24, 5), (1, 64), (0, 64)])
def test_every_unit_gets_a_cost_and_an_order_also_in_fp32(units, steps):
    x, weight, second, fisher = data(d=max(units, 1))
    single = removal_costs(weight[:, :units].float(), second[:units, :units].float(), fisher.float(), steps=steps)
    double = removal_costs(weight[:, :units], second[:units, :units], fisher, steps=steps)
    assert len(single) == units and bool((single > 0).all()) and len(x)
    torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-6)


def test_inputs_that_are_never_active_cost_nothing_and_go_first():
    x, weight, _, fisher = data()
    x[:, [2, 9]] = 0
    costs = removal_costs(weight, x.t() @ x / len(x), fisher, steps=24)
    assert set(costs.argsort()[:2].tolist()) == {2, 9}
