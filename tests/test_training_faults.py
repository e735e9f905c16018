"""Runs under faults: losses and gradients that are not finite, full disks. What must not happen, and what goes on."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import resource
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import formats.checkpoint
from formats.checkpoint import load_checkpoint
from tests.full_checkpoints import same
from tests.runs import (
    BARE,
    changed_losses,
    log,
    losses,
    poison,
    records,
    spied_batches,
    status,
    steps_on_disk,
    train,
    tune,
    weights,
)
from tests.tiny import record_set
from training.nonfinite import MAX_SKIPPED_IN_A_ROW, NonFiniteLoss

# A step has two micro-batches of two windows: micro-batches 10 and 11 are step 5, samples 20..23.


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without a fault."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(text, folder)
    return folder


class SpoiledGradient(torch.autograd.Function):
    """A finite loss whose gradient is not."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] * math.inf


# -- a loss that is not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["nan", "inf", "gradient"])
def test_it_stops_the_run_names_step_and_data_and_saves_the_step_before(
    fault: str, text: Path, whole: Path, tmp_path: Path
) -> None:
    def change(number: int, loss: torch.Tensor) -> torch.Tensor:
        if number != 11:
            return loss
        return SpoiledGradient.apply(loss) if fault == "gradient" else loss * float(fault)

    with changed_losses(change), pytest.raises(NonFiniteLoss) as caught:
        train(text, tmp_path)
    message = str(caught.value)
    assert "Step 5" in message and "samples 20..23" in message and str(text) in message and "\n" not in message
    assert ("gradient norm" in message) == (fault == "gradient")
    if fault == "gradient":
        assert re.search(
            r"The losses are finite, the gradients are not of wte\.weight, .*, .* and \d+ more\. Data", message
        )
    else:
        assert re.search(
            r"Not finite: rank 0, micro-batch 1: samples 22, 23, windows \d+, \d+ of train_0.*\.bin\. Data", message
        )
    assert "--nan_policy skip" in message
    assert steps_on_disk(tmp_path) == [3, 4] and status(tmp_path) == "failed"
    assert [record["step"] for record in records(tmp_path)] == [0, 1, 2, 3, 4]

    train(text, tmp_path, auto_resume=True)  # without the fault it goes on as if nothing had been
    assert losses(tmp_path) == losses(whole)
    ours, theirs = load_checkpoint(tmp_path / "model_00007.pt"), load_checkpoint(whole / "model_00007.pt")
    for part in ("model", "optimizer", "rng", "train_loader_state", "val_loss"):
        assert same(ours[part], theirs[part]), part
    assert ours["progress"]["skipped"] == 0 and status(tmp_path) == "finished"


def test_in_the_first_step_there_is_nothing_to_save(text: Path, tmp_path: Path) -> None:
    with changed_losses(poison(0)), pytest.raises(NonFiniteLoss, match=r"Step 0: loss nan .*samples 0\.\.3"):
        train(text, tmp_path)
    assert steps_on_disk(tmp_path) == [] and "nothing to save" in log(tmp_path)


def test_skip_takes_no_step_says_so_and_goes_on(text: Path, tmp_path: Path) -> None:
    with changed_losses(poison(10)):
        summary = train(text, tmp_path, nan_policy="skip", checkpoint_interval=1, keep_last_n_checkpoints=0)
    assert summary["finished"] and status(tmp_path) == "finished"
    before, at, after = (load_checkpoint(tmp_path / f"model_0000{step}.pt") for step in (4, 5, 6))
    assert same(at["model"], before["model"]) and same(at["optimizer"], before["optimizer"]), "step 5 was taken"
    assert not same(after["model"], at["model"])
    assert at["train_loader_state"]["sample"] == 24, "its data is not met again"
    line = records(tmp_path)[5]
    assert line["skipped"] is True and line["loss"] is None and line["step"] == 5
    assert [record.get("skipped", False) for record in records(tmp_path)].count(True) == 1
    assert at["progress"]["skipped"] == 1 and after["progress"]["skipped_in_a_row"] == 0
    assert "Step 5: loss nan is not finite; no process took the step." in log(tmp_path) and "Skipped." in log(tmp_path)
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path, 7).values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_skip_under_a_reduced_type_leaves_the_scaler_usable(dtype: str, text: Path, tmp_path: Path) -> None:
    with changed_losses(poison(4, 9)):
        summary = train(text, tmp_path, nan_policy="skip", dtype=dtype, **BARE)
    assert summary["finished"]
    assert [record["step"] for record in records(tmp_path) if record.get("skipped")] == [2, 4]


def test_an_overflow_under_fp16_is_the_scalers_business(text: Path, tmp_path: Path) -> None:
    """Finite loss, infinite gradient: the scaler skips the step and halves its scale; that is no fault of the run."""

    def change(number: int, loss: torch.Tensor) -> torch.Tensor:
        return SpoiledGradient.apply(loss) if number == 10 else loss

    with changed_losses(change):
        train(text, tmp_path, dtype="float16", checkpoint_interval=1, keep_last_n_checkpoints=0, generate_interval=0)
    before, at = load_checkpoint(tmp_path / "model_00004.pt"), load_checkpoint(tmp_path / "model_00005.pt")
    assert same(at["model"], before["model"]) and at["scaler"]["scale"] == before["scaler"]["scale"] / 2
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path, 7).values())


def test_skipping_without_end_is_a_stop(text: Path, tmp_path: Path) -> None:
    every = poison(*range(2, 999))
    with changed_losses(every), pytest.raises(NonFiniteLoss, match=f"Step {1 + MAX_SKIPPED_IN_A_ROW}:"):
        train(text, tmp_path, **{**BARE, "nan_policy": "skip", "max_steps": 30})
    newest = load_checkpoint(tmp_path / f"model_{steps_on_disk(tmp_path)[-1]:05d}.pt")
    assert all(torch.isfinite(tensor).all() for tensor in newest["model"].values())


def test_weights_that_are_not_finite_are_never_kept(text: Path, tmp_path: Path) -> None:
    """A step of infinite length leaves them so without any warning of the loss before it."""
    with pytest.raises(NonFiniteLoss, match=r"Step [01]:"):
        train(text, tmp_path, max_lr=1e39, warmup_steps=0, checkpoint_interval=1, eval_interval=0)
    assert steps_on_disk(tmp_path) == [] and not (tmp_path / "best.pt").exists()
    assert "the weights are not finite; no checkpoint of them is kept" in log(tmp_path)


def test_a_model_that_is_already_broken_is_refused_before_the_first_step(
    text: Path, whole: Path, tmp_path: Path
) -> None:
    payload = load_checkpoint(whole / "best.pt")
    payload["model"]["ln_f.weight"][3] = math.nan
    formats.checkpoint.save_checkpoint(tmp_path / "broken.pt", payload)
    with pytest.raises(ValueError, match="the first batch gives a loss of nan: the weights are damaged"):
        tune(record_set(tmp_path / "records"), tmp_path / "run", tmp_path / "broken.pt")
    assert status(tmp_path / "run") == "failed" and steps_on_disk(tmp_path / "run") == []


# -- a full disk -----------------------------------------------------------------------------------------------------


def full_for(steps: set[int]) -> Any:
    """A disk that has no room for the checkpoints of these steps."""
    save = torch.save

    def fail(payload: dict[str, Any], file: Any) -> None:
        if payload.get("step") in steps and "optimizer" in payload:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(payload, file)

    return mock.patch.object(torch, "save", fail)


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run_tries_again(text: Path, whole: Path, tmp_path: Path) -> None:
    with full_for({3}), spied_batches():
        summary = train(text, tmp_path)
    assert summary["finished"] and steps_on_disk(tmp_path) == [6, 7]
    (line,) = [line for line in log(tmp_path).splitlines() if "Checkpoint not saved" in line]
    for part in ("model_00003.pt", "disk full", "0.2 MB needed", "MB free", "trying again at the next interval"):
        assert part in line
    assert not list(tmp_path.glob(".tmp-*"))
    assert losses(tmp_path) == losses(whole) and same(dict(weights(tmp_path, 7)), dict(weights(whole, 7)))


def test_a_full_disk_never_prunes_the_last_good_checkpoint(text: Path, tmp_path: Path) -> None:
    with full_for({4, 5, 6}):
        train(text, tmp_path, checkpoint_interval=1, keep_last_n_checkpoints=1, generate_interval=0)
    assert steps_on_disk(tmp_path) == [7]
    with full_for({4, 5, 6, 7}), pytest.raises(OSError, match=r"model_00007\.pt: disk full"):
        train(text, tmp_path, checkpoint_interval=1, keep_last_n_checkpoints=1, generate_interval=0)
    assert steps_on_disk(tmp_path) == [3], "the last step could not be saved: an error, with step 3 whole"
    assert load_checkpoint(tmp_path / "model_00003.pt", require_digest=True)["step"] == 3
    assert status(tmp_path) == "failed"


def test_no_room_for_the_best_weights_is_said_and_no_more(text: Path, tmp_path: Path) -> None:
    save = formats.checkpoint.save_checkpoint

    def fail(path: Path, payload: dict[str, Any]) -> int:
        if Path(path).name == "best.pt":
            raise OSError(errno.ENOSPC, f"{path}: disk full")
        return save(path, payload)

    with mock.patch("training.saver.save_checkpoint", fail):
        assert train(text, tmp_path)["finished"]
    assert "Best weights not saved" in log(tmp_path) and steps_on_disk(tmp_path) == [3, 6, 7]


def test_a_run_on_a_disk_with_room_for_records_only_ends_with_all_its_lines(text: Path, tmp_path: Path) -> None:
    """A real limit of the kernel: no file of this process beyond 100 kB, so no checkpoint; the rest fits."""
    if (child := os.fork()) == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            train(text, tmp_path, generate_interval=0, max_steps=5)
            os._exit(1)
        except OSError as error:
            os._exit(7 if error.errno == errno.EFBIG else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert [record["step"] for record in records(tmp_path)] == [0, 1, 2, 3, 4]
    assert "model_00003.pt: over the file size limit" in log(tmp_path)
    assert not list(tmp_path.glob(".tmp-*")) and steps_on_disk(tmp_path) == []
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
