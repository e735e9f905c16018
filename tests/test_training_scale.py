"""Plans for clusters: their limits are what one knows, and the formulas of saving are what failures played out give."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from model.config import preset
from tests.test_house import ROOT
from training.scale import STRATEGIES, Cluster, daly_interval, goodput, plan_scale, simulate, young_interval

HOW = {"batch_size": 8, "grad_accum": 2}


def plans(gpus: int, name: str = "124M") -> dict[str, object]:
    return {strategy: plan_scale(preset(name), Cluster(gpus), strategy, **HOW) for strategy in STRATEGIES}


def test_one_gpu_moves_nothing_and_shards_nothing() -> None:
    alone = plans(1)
    assert all(plan.inside == plan.outside == 0 for plan in alone.values())
    assert alone["zero1"].memory == alone["ddp"].memory


def test_state_shrinks_by_what_is_sharded_and_traffic_stays_where_it_is() -> None:
    few, many = plans(8), plans(1024)
    P = few["ddp"].parameters
    assert few["ddp"].memory == many["ddp"].memory
    assert few["zero1"].memory - many["zero1"].memory == pytest.approx(8 * P * (1 / 8 - 1 / 1024))
    # 16 bytes a parameter, or 12 where the peak is at the end of forward, where a small network's gradients are whole.
    assert 12 * P - 4 <= (few["fsdp"].memory - many["fsdp"].memory) / (1 / 8 - 1 / 1024) <= 16 * P + 4
    large = {gpus: plans(gpus, "1558M")["fsdp"] for gpus in (8, 1024)}
    shrunk = 16 * large[8].parameters * (1 / 8 - 1 / 1024)
    assert large[8].memory - large[1024].memory == pytest.approx(shrunk)
    assert few["hsdp"].memory == many["hsdp"].memory == few["fsdp"].memory
    assert few["ddp"].inside == pytest.approx(8 * P * 7 / 8) and few["ddp"].outside == 0
    assert many["ddp"].outside == pytest.approx(8 * P * 1023 / 1024) and many["ddp"].inside == 0
    assert many["hsdp"].outside == pytest.approx(P * (1 - 8 / 1024))


def test_larger_networks_need_more_and_checkpointing_less() -> None:
    assert plans(8, "1558M")["fsdp"].memory > plans(8)["fsdp"].memory
    lean = plan_scale(preset("124M"), Cluster(8), "ddp", **HOW, gradient_checkpointing=True)
    assert lean.memory < plans(8)["ddp"].memory and lean.compute_s == pytest.approx(8 / 6 * plans(8)["ddp"].compute_s)
    with pytest.raises(ValueError, match="choose one of ddp, zero1, fsdp, hsdp"):
        plan_scale(preset("124M"), Cluster(8), "magic", **HOW)


@pytest.mark.parametrize(("mean_time", "cost"), [(1e4, 30.0), (1e4, 300.0), (1e6, 300.0)])
def test_goodput_is_that_of_failures_played_out_and_best_at_dalys_interval(mean_time: float, cost: float) -> None:
    best = daly_interval(cost, mean_time)
    assert best == pytest.approx(young_interval(cost, mean_time), rel=0.1)
    shares = {}
    for factor in (0.3, 1.0, 3.0):
        share, failures = simulate(best * factor, cost, 300.0, mean_time, work=2000 * mean_time)
        assert share == pytest.approx(goodput(best * factor, cost, 300.0, mean_time), rel=0.02)
        assert failures == pytest.approx(2000 * mean_time / share / mean_time, rel=0.1)
        shares[factor] = share
    assert shares[1.0] == max(shares.values())


def test_no_failures_cost_only_the_saves() -> None:
    share, failures = simulate(100.0, 10.0, 300.0, 1e15, work=1000.0)
    assert failures == 0 and share == pytest.approx(100 / 110)
    assert daly_interval(100.0, 10.0) == 10.0 and math.isfinite(daly_interval(1.0, 1.0))


def test_the_script_prints_both_tables() -> None:
    command = [sys.executable, "scripts/scale.py", "--preset", "7B", "--gpus", "16", "--batch_size", "1"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "6,738,415,616 parameters" in out and "| 16 | hsdp |" in out and "failures)" in out
