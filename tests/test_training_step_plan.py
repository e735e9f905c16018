"""From settings to steps: the batch split, the length of a run, and when what is due."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from training.run_settings import FinetuneSettings, RunSettings, TrainSettings
from training.settings import is_explicit, parse
from training.step_plan import StepPlan, plan_steps, resolved


def plan(windows: int = 1000, world: int = 1, **changes: Any) -> StepPlan:
    values = {"batch_size": 2, "block_size": 8, "total_batch_size": 32, "max_steps": 10, "max_lr": 1.0, **changes}
    return plan_steps(TrainSettings(**values), values["block_size"], windows, world)


# -- the batch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_gpt2_defaults_are_524288_tokens_and_end_at_step_19072(world: int) -> None:
    defaults = TrainSettings()
    made = plan_steps(defaults, defaults.block_size, windows_per_epoch=9_765_625, world_size=world)
    assert made.tokens_per_step == 524_288
    assert made.grad_accum == 32 // world
    assert made.is_last(19_072) and not made.is_last(19_071)
    assert made.warmup_steps == 715
    assert 10.0e9 > made.max_steps * made.tokens_per_step > 9.99e9
    assert made.log_every == 10


def test_finetuning_defaults_are_about_an_epoch_of_dolly() -> None:
    defaults = FinetuneSettings()
    made = plan_steps(defaults, defaults.block_size, windows_per_epoch=2_800_000 // 1024, world_size=1)
    assert (made.max_steps, made.warmup_steps, made.grad_accum) == (6, 1, 32)
    assert 0.9 < made.epochs < 1.2
    assert made.log_every == 1


@given(
    batch=strategies.integers(1, 9),
    block=strategies.integers(1, 9),
    world=strategies.integers(1, 5),
    total=strategies.integers(1, 4000),
)
@settings(max_examples=100, deadline=None)
def test_the_split_keeps_the_global_batch_or_says_why_not(batch: int, block: int, world: int, total: int) -> None:
    argv = ["--batch_size", str(batch), "--block_size", str(block), "--total_batch_size", str(total)]
    given_ = parse(TrainSettings, argv)
    try:
        made = plan_steps(given_, block, 100, world)
    except ValueError as error:
        assert total % (batch * block * world) != 0
        for number in (total, batch, block, world):
            assert str(number) in str(error)
        nearest = str(error).rsplit("nearest:", 1)[1].split(" or ")
        assert all(int(number) % (batch * block * world) == 0 for number in nearest)
        assert min(abs(int(number) - total) for number in nearest) < batch * block * world
    else:
        assert made.tokens_per_step == total == made.grad_accum * batch * block * world


def test_a_default_global_batch_gives_way() -> None:
    assert plan(total_batch_size=524288, batch_size=3, block_size=7).tokens_per_step == 524288 // 21 * 21
    assert plan(total_batch_size=524288, batch_size=10**6, block_size=8).grad_accum == 1


def test_accumulation_may_be_given_instead() -> None:
    made = plan(total_batch_size=524288, grad_accum_steps=3, world=2)
    assert (made.grad_accum, made.windows_per_step, made.tokens_per_step) == (3, 12, 96)


# -- conflicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["--epochs", "1"], ["--max_steps", "19073"]),
        (["--warmup_ratio", "0.1"], ["--warmup_steps", "715"]),
        (["--grad_accum_steps", "32"], ["--total_batch_size", "524288"]),
    ],
)
def test_two_explicit_settings_of_one_quantity_are_an_error(one: list[str], other: list[str]) -> None:
    """Even at the default's value: it is explicit, and nobody can tell which is meant."""
    plan_steps(parse(TrainSettings, one), 1024, 1000, 1)
    plan_steps(parse(TrainSettings, other), 1024, 1000, 1)
    with pytest.raises(ValueError, match=f"{one[0]} and {other[0]} are both set"):
        plan_steps(parse(TrainSettings, one + other), 1024, 1000, 1)


def test_a_null_partner_is_no_conflict() -> None:
    plan_steps(parse(TrainSettings, ["--epochs", "None", "--max_steps", "5"]), 1024, 1000, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"total_batch_size": 0},
        {"grad_accum_steps": 0, "total_batch_size": 524288},
        {"max_steps": 0},
        {"sample_tokens": 0},
        {"epochs": 0.0, "max_steps": 19073},
        {"epochs": -1.0, "max_steps": 19073},
        {"epochs": math.nan, "max_steps": 19073},
        {"epochs": math.inf, "max_steps": 19073},
        {"warmup_ratio": 1.5},
        {"warmup_ratio": -0.1},
        {"warmup_ratio": math.nan},
        {"eval_interval": -1},
        {"generate_interval": -2},
        {"checkpoint_interval": -1},
        {"log_interval": -1},
        {"log_interval": 0},
        {"eval_batch_size": 0},
        {"max_eval_samples": -1},
        {"keep_last_n_checkpoints": -1},
        {"max_grad_norm": -1.0},
        {"max_grad_norm": math.nan},
        {"weight_decay": -0.1},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": -1e-8},
    ],
)
def test_impossible_numbers_name_their_flag(changes: dict[str, Any]) -> None:
    plan()  # the rest is fine
    with pytest.raises(ValueError, match=f"--{next(iter(changes))} "):
        plan(**changes)


# -- length ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 250), (0.3, 75), (0.5, 125), (2.5, 625), (1e-6, 1), (3.0, 750)])
def test_fractions_of_an_epoch(epochs: float, steps: int) -> None:
    made = plan(windows=1000, epochs=epochs, max_steps=19073)  # 4 windows a step
    assert made.max_steps == steps
    assert made.schedule.max_steps == steps
    assert made.epochs == pytest.approx(steps * 4 / 1000)


def test_an_epoch_of_less_than_a_step() -> None:
    made = plan(windows=1, epochs=1.0, max_steps=19073, eval_interval="epoch")
    assert (made.max_steps, made.eval_every, made.steps_per_epoch) == (1, 1, 0.25)


def test_intervals_of_an_epoch() -> None:
    made = plan(windows=1000, eval_interval="epoch", generate_interval="epoch", checkpoint_interval="epoch")
    assert (made.eval_every, made.generate_every, made.checkpoint_every) == (250, 250, 250)
    assert plan(windows=999, checkpoint_interval="epoch").checkpoint_every == 250


def test_what_is_due_when() -> None:
    """6 steps, interval 2: after 2, 4 and 5, as the documented run's files."""
    made = plan(max_steps=6)
    assert [step for step in range(6) if made.due(2, step)] == [2, 4, 5]
    assert [step for step in range(6) if made.due(0, step)] == [5]
    assert [step for step in range(6) if made.due(1, step)] == [1, 2, 3, 4, 5]
    assert [step for step in range(6) if made.due(99, step)] == [5]


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (200, 1), (201, 10), (19073, 10)])
def test_short_runs_log_every_step(steps: int, every: int) -> None:
    assert plan(max_steps=steps).log_every == every
    assert plan(max_steps=steps, log_interval=7).log_every == 7


@pytest.mark.parametrize(
    ("cls", "steps", "warmup"),
    [(TrainSettings, 19073, 715), (TrainSettings, 100, 10), (TrainSettings, 3, 1), (FinetuneSettings, 6, 1)],
)
def test_a_default_warm_up_never_fills_a_short_run(cls: type[RunSettings], steps: int, warmup: int) -> None:
    argv = ["--max_steps", str(steps), "--block_size", "1024"]
    assert plan_steps(parse(cls, argv), 1024, 1000, 1).warmup_steps == warmup
    explicit = plan_steps(parse(cls, [*argv, "--warmup_steps", "715"]), 1024, 1000, 1)
    assert explicit.warmup_steps == 715, "an explicit setting beats a default"


@pytest.mark.parametrize(("ratio", "steps"), [(0.0, 0), (0.1, 1), (0.25, 2), (1.0, 10)])
def test_warm_up_as_a_ratio(ratio: float, steps: int) -> None:
    assert plan(warmup_ratio=ratio).warmup_steps == steps


# -- what is written beside the run ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--max_steps", "30"],
        ["--epochs", "0.5", "--warmup_ratio", "0.2"],
        ["--grad_accum_steps", "3"],
        ["--eval_interval", "epoch", "--log_interval", "3"],
        ["--batch_size", "3", "--block_size", "1000"],
    ],
)
def test_resolved_settings_alone_give_the_same_plan(argv: list[str]) -> None:
    """Everything in a run's config.yaml is explicit when it is read again; it must neither conflict nor change."""
    for cls in (TrainSettings, FinetuneSettings):
        given_ = parse(cls, argv)
        made = plan_steps(given_, given_.block_size, 5000, 1)
        final = resolved(given_, made)
        object.__setattr__(final, "explicit_names", frozenset(vars(final)))  # none of them a flag
        assert is_explicit(final, "max_steps")
        assert plan_steps(final, made.block_size, 5000, 1) == made
