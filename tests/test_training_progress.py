"""What a run remembers: best, over-fitting, means that never drift; as plain numbers."""

from __future__ import annotations

import json
import math
import random

import pytest

from training.progress import Progress


def run(losses: list[tuple[float, float]]) -> tuple[Progress, list[tuple[bool, bool]]]:
    """Evaluations of (mean training loss since the one before, validation loss)."""
    progress, seen = Progress(), []
    for step, (train_loss, val_loss) in enumerate(losses):
        progress.step = step
        progress.add(train_loss * 10, supervised=10, tokens=16)
        seen.append(progress.see_validation(val_loss))
    return progress, seen


def test_overfitting_is_a_validation_loss_above_its_best_while_training_falls() -> None:
    _, seen = run([(5, 5), (4, 4), (3, 4.1), (2, 4.2)])
    assert seen == [(True, False), (True, False), (False, True), (False, True)]


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ([(5, 5), (5.1, 5.1)], "both climb: the learning rate, not over-fitting"),
        ([(5, 5), (5, 5.1)], "training stands still"),
        ([(5, 5), (4, 5)], "as good as the best"),
        ([(5, 5), (4, 4)], "both fall"),
        ([(5, 5)], "nothing to compare with"),
        ([(5, math.nan), (4, 5)], "no best yet"),
    ],
)
def test_no_false_alarm(losses: list[tuple[float, float]], why: str) -> None:
    assert not any(overfits for _, overfits in run(losses)[1]), why


def test_alarm_against_the_best_not_the_one_before() -> None:
    """4.5 is better than 4.8 just before it, and yet above the best."""
    _, seen = run([(5, 4), (4.5, 4.8), (4, 4.5)])
    assert seen[2] == (False, True)


def test_best_is_the_lowest_finite_and_the_first_of_equals() -> None:
    progress, seen = run([(5, 3), (5, math.nan), (5, 2), (5, 2), (5, math.inf), (5, -math.inf)])
    assert [improved for improved, _ in seen] == [True, False, True, False, False, False]
    assert (progress.best_val_loss, progress.best_step) == (2, 2)
    assert progress.val_loss == -math.inf


def test_mean_is_over_tokens_not_steps() -> None:
    progress = Progress()
    progress.add(loss_sum=100.0, supervised=10, tokens=16)
    progress.add(loss_sum=10.0, supervised=90, tokens=16)
    progress.see_validation(1.0)
    assert progress.previous_train_loss == pytest.approx(1.1)
    assert progress.tokens == 32
    assert (progress.since_eval_loss, progress.since_eval_tokens) == (0, 0)
    assert (progress.epoch_loss, progress.epoch_tokens) == (110, 100), "an evaluation does not end the epoch"


def test_an_evaluation_without_a_step_before_it_keeps_the_training_loss() -> None:
    progress, _ = run([(5, 5)])
    assert progress.see_validation(4.0) == (True, False)
    assert progress.previous_train_loss == 5
    progress.add(40.0, 10, 16)
    assert progress.see_validation(4.5) == (False, True)


def test_through_json_and_interrupted_anywhere_it_decides_the_same() -> None:
    rng = random.Random(3)
    losses = [(rng.uniform(1, 5), rng.uniform(1, 5)) for _ in range(40)]
    whole, expected = run(losses)
    assert {overfits for _, overfits in expected} == {True, False}
    progress, seen = Progress(), []
    for step, (train_loss, val_loss) in enumerate(losses):
        progress.step = step
        progress.add(train_loss * 10, 10, 16)
        progress = Progress.from_dict(json.loads(json.dumps(progress.to_dict())))
        seen.append(progress.see_validation(val_loss))
        progress = Progress.from_dict(json.loads(json.dumps(progress.to_dict())))
    assert seen == expected and progress == whole


def test_what_another_version_wrote_is_an_error() -> None:
    with pytest.raises(ValueError, match="progress is not usable"):
        Progress.from_dict({**Progress().to_dict(), "unknown": 1})
    with pytest.raises(ValueError, match="progress is not usable"):
        Progress.from_dict(None)  # type: ignore[arg-type]


def test_a_copy_is_independent() -> None:
    progress = Progress(last_record={"step": 1})
    copy = Progress.from_dict(progress.to_dict())
    progress.last_record["step"] = 2
    assert copy.last_record == {"step": 1}
