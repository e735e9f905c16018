"""The learning rate: a pure function of the step, with its ends where the settings put them."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies

from training.schedule import Schedule

SHAPES = ("cosine", "linear", "wsd", "constant")

schedules = strategies.builds(
    Schedule,
    shape=strategies.sampled_from(SHAPES),
    max_lr=strategies.just(0.0) | strategies.floats(1e-12, 10),
    min_ratio=strategies.floats(0, 1),
    warmup_steps=strategies.integers(0, 40),
    max_steps=strategies.integers(1, 100),
    decay_ratio=strategies.floats(0, 1),
)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_warm_up_peak_middle_and_end_by_hand(shape: str) -> None:
    schedule = Schedule(shape, 1.0, 0.1, warmup_steps=2, max_steps=9)
    assert [schedule(0), schedule(1), schedule(2)] == [0.5, 1.0, 1.0]
    # Step 2 is the peak, step 8 the end, so step 5 is half way.
    assert schedule(5) == pytest.approx(0.55)
    assert schedule(8) == pytest.approx(0.1)


def test_whole_curves_by_hand() -> None:
    cosine = Schedule("cosine", 1.0, 0.0, warmup_steps=0, max_steps=5)
    assert [cosine(step) for step in range(5)] == pytest.approx(
        [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0]
    )
    linear = Schedule("linear", 2.0, 0.5, warmup_steps=0, max_steps=5)
    assert [linear(step) for step in range(5)] == pytest.approx([2, 1.75, 1.5, 1.25, 1])
    wsd = Schedule("wsd", 1.0, 0.0, warmup_steps=2, max_steps=10, decay_ratio=0.3)
    assert [wsd(step) for step in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 0.5, 0])
    constant = Schedule("constant", 3.0, 0.1, warmup_steps=3, max_steps=5)
    assert [constant(step) for step in range(5)] == pytest.approx([1, 2, 3, 3, 3])


def test_gpt2_run_from_end_to_end() -> None:
    schedule = Schedule("cosine", 6e-4, 0.1, warmup_steps=715, max_steps=19073)
    assert schedule(0) == pytest.approx(6e-4 / 715)
    assert schedule(714) == schedule(715) == pytest.approx(6e-4)
    assert schedule(19072) == pytest.approx(6e-5)
    assert schedule(715 + (19072 - 715) // 2) == pytest.approx(3.3e-4, rel=1e-3)


@given(schedules)
@settings(max_examples=200, deadline=None)
def test_bounds_and_shape(schedule: Schedule) -> None:
    rates = [schedule(step) for step in range(schedule.max_steps)]
    peak = schedule.max_lr * (1 + 1e-12)
    assert all(0 <= rate <= peak for rate in rates)
    warm = min(schedule.warmup_steps, schedule.max_steps)
    assert all(a <= b for a, b in pairwise(rates[:warm])), "the warm-up climbs"
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(rates[warm:])), "after it nothing climbs"
    assert rates[0] > 0 or schedule.max_lr == 0, "the first step moves"
    floor = schedule.max_lr * schedule.min_ratio
    assert all(rate >= floor * (1 - 1e-9) for rate in rates[warm:])
    if (
        schedule.shape != "constant"
        and warm < schedule.max_steps - 1
        and schedule.decay_ratio * schedule.max_steps >= 2
    ):
        assert rates[-1] == pytest.approx(floor, abs=1e-9), "the last step is the end"


@given(schedules, strategies.randoms())
@settings(max_examples=50, deadline=None)
def test_a_step_knows_no_history(schedule: Schedule, shuffler: random.Random) -> None:
    steps = list(range(schedule.max_steps))
    in_order = {step: schedule(step) for step in steps}
    shuffler.shuffle(steps)
    fresh = Schedule(**vars(schedule))
    assert all(fresh(step) == in_order[step] for step in steps)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (5, 3), (1, 2), (0, 2)])
def test_runs_shorter_than_their_schedule(shape: str, warmup: int, steps: int) -> None:
    schedule = Schedule(shape, 1.0, 0.1, warmup, steps, decay_ratio=0.5)
    assert all(0 < schedule(step) <= 1 for step in range(steps))


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"max_lr": -1.0}, "--max_lr"),
        ({"max_lr": math.nan}, "--max_lr"),
        ({"max_lr": math.inf}, "--max_lr"),
        ({"min_ratio": 1.1}, "--min_lr_ratio"),
        ({"min_ratio": math.nan}, "--min_lr_ratio"),
        ({"decay_ratio": -0.1}, "--decay_ratio"),
        ({"warmup_steps": -1}, "--warmup_steps"),
    ],
)
def test_impossible_settings_name_their_flag(changes: dict[str, float], flag: str) -> None:
    good = {"shape": "cosine", "max_lr": 1.0, "min_ratio": 0.1, "warmup_steps": 1, "max_steps": 9}
    Schedule(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=flag):
        Schedule(**{**good, **changes})  # type: ignore[arg-type]
