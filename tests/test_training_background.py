"""Checkpoints written beside the next steps: the same files, of the step that they name; failures are said."""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import training.saver
from formats.checkpoint import load_checkpoint, save_checkpoint
from tests.full_checkpoints import same
from tests.lives import Run, Strike, differences, text_data, uninterrupted
from tests.runs import log, losses, status, steps_on_disk, train
from training.background import Background, HostCopies

PARTS = ("model", "optimizer", "rng", "train_loader_state", "val_loss")  # progress holds clocks
OFTEN: dict[str, Any] = {"checkpoint_interval": 2, "keep_last_n_checkpoints": 0}


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose loop waits for its checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(text, folder, async_save="off", **OFTEN)
    return folder


@contextmanager
def writes(change: Any) -> Iterator[None]:
    """`change(path, payload)` in place of writing a numbered checkpoint."""

    def write(path: Path, payload: dict[str, Any]) -> int:
        return int(change(path, payload)) if path.name.startswith("model_") else save_checkpoint(path, payload)

    with mock.patch.object(training.saver, "save_checkpoint", write):
        yield


def assert_same_checkpoints(ours: Path, theirs: Path) -> None:
    assert steps_on_disk(ours) == steps_on_disk(theirs)
    for step in steps_on_disk(ours):
        a, b = (load_checkpoint(folder / f"model_{step:05d}.pt", require_digest=True) for folder in (ours, theirs))
        assert all(same(a[part], b[part]) for part in PARTS), step


# -- the pieces ------------------------------------------------------------------------------------------------------


def test_a_job_runs_beside_and_its_error_comes_up_where_it_is_waited_for() -> None:
    background, may_end, done = Background(), threading.Event(), []
    background.wait()  # nothing to wait for
    background.start(lambda: (may_end.wait(30), done.append(1)))
    assert background.pending and not done
    may_end.set()
    background.wait()
    assert done == [1] and not background.pending

    def fail() -> None:
        raise OSError(errno.ENOSPC, "disk full")

    background.start(fail)
    time.sleep(0.05)
    assert background.pending
    with pytest.raises(OSError, match="disk full"):
        background.wait()
    background.wait()  # once


def test_copies_stay_as_they_were_and_use_their_arrays_again() -> None:
    source = {"a": torch.arange(4.0), "b": [{"c": torch.ones(2, 2, dtype=torch.bfloat16)}, 3], "d": (torch.zeros(()),)}
    copies = HostCopies()
    first = copies.of(source)
    assert same(first, source) and first["b"][0]["c"].dtype is torch.bfloat16 and isinstance(first["d"], tuple)
    source["a"] += 1
    assert first["a"].tolist() == [0, 1, 2, 3]
    second = copies.of(source)
    assert second["a"] is first["a"] and second["a"].tolist() == [1, 2, 3, 4]
    third = copies.of({"a": torch.arange(5.0)})
    assert third["a"].tolist() == [0, 1, 2, 3, 4] and list(copies._arrays) == [("a",)]


# -- runs ------------------------------------------------------------------------------------------------------------


def test_the_files_are_those_of_a_run_that_waits(text: Path, whole: Path, tmp_path: Path) -> None:
    train(text, tmp_path, async_save="on", **OFTEN)
    assert_same_checkpoints(tmp_path, whole)
    assert losses(tmp_path) == losses(whole)


def test_training_goes_on_meanwhile_and_the_file_holds_the_step_of_its_name(
    text: Path, whole: Path, tmp_path: Path
) -> None:
    begun: list[tuple[str, int]] = []
    steps: list[int] = []

    def slowly(path: Path, payload: dict[str, Any]) -> int:
        beside = threading.current_thread() is not threading.main_thread()
        before = len(steps)
        if beside:
            deadline = time.monotonic() + 30
            while len(steps) == before and time.monotonic() < deadline:  # until the loop has made another step
                time.sleep(0.005)
        begun.append((path.name, len(steps) - before))
        return save_checkpoint(path, payload)

    remember = training.saver.Saver.remember

    def counted(self: Any, *args: Any) -> None:
        steps.append(1)
        remember(self, *args)

    with writes(slowly), mock.patch.object(training.saver.Saver, "remember", counted):
        train(text, tmp_path, async_save="on", **OFTEN)
    assert [name for name, _ in begun] == [f"model_0000{step}.pt" for step in (2, 4, 6, 7)]
    assert [later > 0 for _, later in begun] == [True, True, True, False]  # the last one is waited for
    assert_same_checkpoints(tmp_path, whole)


def test_a_failure_is_said_and_tried_again(text: Path, tmp_path: Path) -> None:
    def full_disk(path: Path, payload: dict[str, Any]) -> int:
        if path.name == "model_00004.pt":
            raise OSError(errno.ENOSPC, f"{path}: disk full")
        return save_checkpoint(path, payload)

    with writes(full_disk):
        summary = train(text, tmp_path, async_save="on", **OFTEN)
    assert summary["finished"] and steps_on_disk(tmp_path) == [2, 6, 7]
    assert "Checkpoint not saved" in log(tmp_path) and "disk full" in log(tmp_path)


def test_a_stop_waits_for_the_write_and_does_it_over_where_it_failed(text: Path, whole: Path, tmp_path: Path) -> None:
    failed: list[Path] = []

    def interrupted(path: Path, payload: dict[str, Any]) -> int:
        if path.name == "model_00004.pt" and not failed:
            signal.raise_signal(signal.SIGTERM)
            failed.append(path)
            raise OSError(errno.ENOSPC, f"{path}: disk full")
        return save_checkpoint(path, payload)

    with writes(interrupted):
        summary = train(text, tmp_path, async_save="on", **OFTEN)
    assert not summary["finished"] and status(tmp_path) == "stopped" and failed
    assert steps_on_disk(tmp_path)[-1] >= 4, "the stop found its step unsaved"
    train(text, tmp_path, async_save="on", auto_resume=True, **OFTEN)
    assert losses(tmp_path) == losses(whole)
    ours, theirs = (load_checkpoint(folder / "model_00007.pt") for folder in (tmp_path, whole))
    assert all(same(ours[part], theirs[part]) for part in PARTS)


def test_a_run_that_fails_leaves_no_thread_behind(text: Path, tmp_path: Path) -> None:
    with (
        writes(lambda path, payload: (time.sleep(0.2), save_checkpoint(path, payload))[1]),
        mock.patch("training.loop.Trainer._unfreeze", side_effect=[None, None, None, RuntimeError("broken")]),
        pytest.raises(RuntimeError, match="broken"),
    ):
        train(text, tmp_path, async_save="on", checkpoint_interval=1, eval_interval=0, generate_interval=0)
    assert not [thread for thread in threading.enumerate() if thread.name == "background"]
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("at", ["write", "fsync", "rename"])
def test_killed_while_it_writes(at: str, tmp_path: Path) -> None:
    run = Run("pretrain", text_data(), tmp_path / "run", {"async_save": "on"})
    struck = run.live(Strike(f"{at} model_00003.pt@*"))
    assert struck.killed, struck.describe()
    end = run.live()
    assert end.code == 0, end.describe()
    assert not differences(run.folder, uninterrupted(run).folder)
