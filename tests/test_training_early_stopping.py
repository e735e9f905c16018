"""Early stopping and the best weights at the end: what counts as better, and resumes that decide alike."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from formats.checkpoint import load_checkpoint
from tests.full_checkpoints import same
from tests.lives import Run, Strike, differences, finetuning, uninterrupted
from tests.runs import BARE, log, records, steps_on_disk, tune
from tests.tiny import BYTES, finetune_settings, record_set
from tests.tiny_checkpoints import save_tiny
from training.progress import Progress, Validation
from training.step_plan import plan_steps


def waits(losses: list[float], threshold: float) -> list[int]:
    """How many evaluations have passed without a better one, after each of these."""
    progress, seen = Progress(), []
    for step, loss in enumerate(losses):
        progress.step = step
        progress.see_validation(loss, threshold)
        seen.append(progress.waited)
    return seen


@pytest.mark.parametrize(
    ("losses", "threshold", "expected"),
    [
        ([3, 2, 1], 0.01, [0, 0, 0]),
        ([3, 3, 3, 2], 0.01, [0, 1, 2, 0]),
        ([3, 3.5, 2.995, 2.9], 0.01, [0, 1, 2, 0]),
        ([3, 2.75, 2.5], 0.25, [0, 1, 0]),  # more than the threshold below, and small steps add up
        ([3, 2.999], 0.0, [0, 0]),
        ([3, 3], 0.0, [0, 1]),
        ([math.nan, math.inf, 3, math.nan], 0.01, [1, 2, 0, 1]),
    ],
)
def test_what_renews_patience(losses: list[float], threshold: float, expected: list[int]) -> None:
    assert waits(losses, threshold) == expected


def test_patience_is_out_after_so_many_evaluations_and_never_when_off() -> None:
    progress = Progress(waited=3)
    assert [progress.out_of_patience(patience) for patience in (0, 1, 3, 4)] == [False, True, True, False]
    progress.finished_step = False  # its evaluation will be done over
    assert not progress.out_of_patience(3)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, (0, 0.01)),
        ({"early_stopping_patience": 5}, (5, 0.01)),
        ({"early_stopping_threshold": 0.1}, (3, 0.1)),
        ({"early_stopping_threshold": 0.0}, (3, 0.0)),
        ({"early_stopping_patience": 0, "early_stopping_threshold": 0.1}, (0, 0.1)),
        ({"early_stopping_patience": 2, "early_stopping_threshold": 0.5}, (2, 0.5)),
    ],
)
def test_each_flag_switches_it_on_and_brings_the_other(flags: dict[str, Any], expected: tuple[int, float]) -> None:
    plan = plan_steps(finetune_settings(Path(), Path(), Path(), **flags), 128, 40, 1)
    assert (plan.patience, plan.patience_threshold) == expected


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"early_stopping_patience": -1}, "--early_stopping_patience -1: expected at least 0"),
        ({"early_stopping_threshold": -0.1}, "--early_stopping_threshold -0.1: expected at least 0"),
        ({"early_stopping_threshold": math.nan}, "--early_stopping_threshold nan"),
        ({"early_stopping_patience": 3, "eval_interval": 0}, "set --eval_interval"),
    ],
)
def test_what_makes_no_sense_is_refused(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan_steps(finetune_settings(Path(), Path(), Path(), **flags), 128, 40, 1)


# No loss is 5 nats below the first: patience is out two evaluations after it, at step 3.
EARLY: dict[str, Any] = {"eval_interval": 1, "early_stopping_patience": 2, "early_stopping_threshold": 5.0}
EARLY |= {"max_steps": 8, "total_batch_size": 512, "load_best_model_at_end": True, "generate_interval": 0}


def early_run(folder: Path) -> Run:
    return finetuning(folder, **EARLY, keep_last_n_checkpoints=2)


def test_a_run_in_lives_stops_where_one_in_one_life_does(tmp_path: Path) -> None:
    run = early_run(tmp_path / "run")
    run.live(Strike("step 1@1", signal=signal.SIGTERM))
    run.live(Strike("step 3@3"))  # its last evaluation is not saved yet
    run.live(Strike("save*3", signal=signal.SIGKILL))  # nor now
    last = run.live()
    assert [life.code for life in run.lives] == [0, -signal.SIGKILL, -signal.SIGKILL, 0]
    assert last.summary["finished"] and last.summary["stopped_early"], last.describe()
    whole = uninterrupted(run)
    assert not differences(run.folder, whole.folder)
    assert [record["step"] for record in records(run.folder)] == [0, 1, 2, 3]
    assert run.status() == whole.status()
    assert same(load_checkpoint(run.folder / "final.pt"), load_checkpoint(run.folder / "best.pt"))


def test_a_stopped_run_does_nothing_more_unless_patience_is_raised(tmp_path: Path) -> None:
    run = early_run(tmp_path / "run")
    assert run.live().summary["step"] == 3
    text = "Stopped early after step 3: no validation loss more than 5 below "
    status = json.loads((run.folder / "status.json").read_text())
    assert status["state"] == "finished" and status["reason"].startswith(text)
    assert status["reason"].endswith("in 2 evaluations") and status["reason"] in log(run.folder)
    assert "Early stopping: evaluation 1 of 2 without a loss more than 5 below " in log(run.folder)
    assert steps_on_disk(run.folder)[-1] == 3
    again = run.live()
    assert again.steps == [] and again.summary["stopped_early"]
    assert "Nothing to do: Stopped early" in again.log.read_text()
    assert "More: --early_stopping_patience 3." in again.log.read_text()
    more = run.live(early_stopping_patience=3)
    assert more.steps == [4] and more.summary["stopped_early"]
    off = run.live(early_stopping_patience=0)
    assert off.steps == [5, 6, 7] and off.summary["finished"] and not off.summary["stopped_early"]
    assert [record["step"] for record in records(run.folder)] == list(range(8))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("early")
    record_set(folder / "records")
    save_tiny(folder / "base.pt", block_size=128)
    return folder


def test_final_is_the_best_not_the_last(place: Path, tmp_path: Path) -> None:
    settings = {**BARE, "eval_interval": 1, "max_steps": 6}
    seen = [Validation(loss, 8) for loss in (5.0, 4.0, 3.0, 4.0, 5.0, 6.0)]  # after each step
    with mock.patch("training.loop.Trainer.evaluate", side_effect=seen):
        summary = tune(place / "records", tmp_path, place / "base.pt", **settings, load_best_model_at_end=True)
    assert summary["best_step"] == 2 and summary["final"] == str(tmp_path / "final.pt")
    final = load_checkpoint(tmp_path / "final.pt", require_digest=True)
    assert (final["step"], final["val_loss"]) == (summary["best_step"], summary["best_val_loss"])
    assert f"Best weights, of step {summary['best_step']}: {tmp_path / 'final.pt'}" in log(tmp_path)
    without = tune(place / "records", tmp_path / "without", place / "base.pt", **settings)
    assert without["final"] is None and not (tmp_path / "without" / "final.pt").exists()


def test_a_best_that_could_not_be_written_is_not_passed_off_as_final(place: Path, tmp_path: Path) -> None:
    settings = {**BARE, "max_steps": 1, "load_best_model_at_end": True}
    tune(place / "records", tmp_path, place / "base.pt", **settings)
    (tmp_path / "best.pt").unlink()
    with pytest.raises(ValueError, match=r"best\.pt: does not hold the best weights, of step 0: no final\.pt"):
        tune(place / "records", tmp_path, place / "base.pt", **settings, auto_resume=True)


@pytest.mark.parametrize("flags", [{"load_best_model_at_end": True}, {"early_stopping_patience": 3}])
def test_both_need_a_validation_split(flags: dict[str, Any], tmp_path: Path, place: Path) -> None:
    record_set(tmp_path / "records", n_records=20)
    manifest = tmp_path / "records" / "dataset.json"
    meta = json.loads(manifest.read_text())
    del meta["splits"]["val"]
    manifest.write_text(json.dumps(meta))
    assert meta["vocab_size"] == BYTES.vocab_size
    with pytest.raises(ValueError, match="has no validation split"):
        tune(tmp_path / "records", tmp_path / "run", place / "base.pt", **flags)
