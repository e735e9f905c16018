"""A run's folder: one run at a time, nothing overwritten, and never without its newest good checkpoint."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies

from formats.checkpoint import load_checkpoint, save_checkpoint
from tests.full_checkpoints import full_payload
from training.run_folder import RunFolder


def small(step: int) -> dict[str, Any]:
    """The least that counts as a full checkpoint."""
    state: dict[str, Any] = {"optimizer": {}, "scaler": {}, "train_loader_state": {}, "rng": [], "progress": {}}
    return {"model": {"w": torch.full((2,), float(step))}, "config": {}, "step": step, **state}


# -- the lock --------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_until_the_first_is_over(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.open()
    with pytest.raises(ValueError, match=r"--log_dir .*run: another run is writing here"):
        second.open()
    first.close()
    second.open()
    second.close()


def test_a_run_that_is_dying_is_waited_for(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.open()
    threading.Timer(0.2, first.close).start()
    second.open()
    assert second.held and not first.held
    second.close()


def test_the_lock_holds_between_processes_and_dies_with_its_owner(tmp_path: Path) -> None:
    held, release = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.close(release[1])
            theirs = RunFolder(tmp_path)
            theirs.open()
            os.write(held[1], b"held")
            os.read(release[0], 1)
        finally:
            os._exit(9)  # dies without a word
    os.close(held[1])
    assert os.read(held[0], 4) == b"held"
    here = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="another run is writing here"):
        here.open()
    os.close(release[1])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    here.open()  # nothing to clean up after the dead one
    here.close()


def test_a_refused_run_touches_nothing(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    first.open()
    (tmp_path / ".tmp-model_00003.pt-77").write_bytes(b"being written")
    first.write_status("running")
    second = RunFolder(tmp_path)
    with pytest.raises(ValueError):
        second.open()
    second.close()
    assert (tmp_path / ".tmp-model_00003.pt-77").exists()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
    first.close()


def test_what_a_dead_run_left_half_written_goes(tmp_path: Path) -> None:
    (tmp_path / ".tmp-model_00003.pt-77").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    folder = RunFolder(tmp_path)
    folder.open()
    folder.close()
    assert sorted(os.listdir(tmp_path)) == [".lock", "notes.txt"]


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        RunFolder(tmp_path / "logs").open()


# -- status ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "ends_as"), [(["running"], "failed"), (["running", "stopped"], "stopped"), ([], None)]
)
def test_a_run_that_did_not_say_how_it_ended_has_failed(states: list[str], ends_as: str | None, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open()
    for state in states:
        folder.write_status(state, step=4)
    folder.close()
    if ends_as is None:
        assert not (tmp_path / "status.json").exists()
    else:
        assert json.loads((tmp_path / "status.json").read_text())["state"] == ends_as


# -- which checkpoint ------------------------------------------------------------------------------------------------


def test_names_are_the_step_in_five_digits_or_more(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.checkpoint_path(7).name == "model_00007.pt"
    assert folder.checkpoint_path(123456).name == "model_123456.pt"
    steps = [2, 99999, 100000, 19072]
    for step in steps:
        folder.checkpoint_path(step).touch()
    for stranger in (
        "model_1.pt",
        "model_00001.pt.bak",
        "xmodel_00001.pt",
        "model_00001.pth",
        "best.pt",
        ".tmp-model_00009.pt-1",
    ):
        (tmp_path / stranger).touch()
    assert [step for step, _ in folder.checkpoints()] == sorted(steps, reverse=True), "by number, not by spelling"
    assert RunFolder(tmp_path / "gone").checkpoints() == []


def test_each_bad_checkpoint_is_named_with_its_reason(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3, 4, 5, 6, 7):
        save_checkpoint(folder.checkpoint_path(step), full_payload(step))
    path = folder.checkpoint_path
    path(7).write_bytes(b"")
    path(6).write_bytes(path(6).read_bytes()[:-500])
    data = bytearray(path(5).read_bytes())
    data[1000] ^= 1
    path(5).write_bytes(data)
    torch.save(full_payload(4), path(4))
    path(3).unlink()
    path(3).mkdir()
    weights = {key: value for key, value in full_payload(2).items() if key in ("model", "config", "step")}
    save_checkpoint(path(2), weights)
    said: list[str] = []
    found = folder.newest_good(said.append)
    assert found is not None and found[0] == path(1) and found[1]["step"] == 1
    reasons = [
        "is empty",
        "ends without a digest",
        "is damaged",
        "ends without a digest",
        "is a folder",
        "weights only",
    ]
    assert len(said) == len(reasons)
    for step, line, reason in zip((7, 6, 5, 4, 3, 2), said, reasons):
        assert str(path(step)) in line and reason in line


def test_no_good_checkpoint_at_all(tmp_path: Path) -> None:
    said: list[str] = []
    assert RunFolder(tmp_path).newest_good(said.append) is None and said == []
    RunFolder(tmp_path).checkpoint_path(1).write_bytes(b"x")
    assert RunFolder(tmp_path).newest_good(said.append) is None and len(said) == 1


# -- what is kept ----------------------------------------------------------------------------------------------------

EVENTS = strategies.lists(
    strategies.sampled_from(["save", "save", "save", "best", "crash", "rot newest", "rot older", "resume"]), max_size=30
)


@given(events=EVENTS, keep=strategies.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_newest_good_and_best_outlive_every_history(
    events: list[str], keep: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A history of saves, kills in the middle of one, damage on the disk, and resumes from what is still good."""
    path = tmp_path_factory.mktemp("history")
    folder, step, best = RunFolder(path), 0, None
    good: set[int] = set()
    folder.open()
    for event in events:
        if event == "save":
            save_checkpoint(folder.checkpoint_path(step), small(step))
            folder.prune(keep)
            good.add(step)
            assert folder.checkpoint_path(step).exists(), "the checkpoint just written was pruned"
        elif event == "best":
            best = step
            save_checkpoint(path / "best.pt", {"model": {}, "config": {}, "step": step})
        elif event == "crash":
            (path / f".tmp-model_{step:05d}.pt-1").write_bytes(b"half")
            folder.close()
            folder = RunFolder(path)
            folder.open()
        elif event.startswith("rot"):
            found = folder.checkpoints()
            if len(found) > 1 or (found and event == "rot newest"):
                number, file = found[0 if event == "rot newest" else -1]
                file.write_bytes(b"rotten")
                good.discard(number)
        elif event == "resume":
            newest = folder.newest_good(lambda _: None)
            if newest is not None:
                step = newest[1]["step"]
                folder.set_aside(step, lambda _: None)
                good = {number for number in good if number <= step}
        step += 1
        left = {number for number, _ in folder.checkpoints()}
        newest = folder.newest_good(lambda _: None)
        assert (newest is None) == (not good & left)
        if newest is not None:
            assert newest[1]["step"] == max(good & left)
        if event == "save" and keep:
            assert len(left) <= keep
            assert max(good) in left
        assert keep or good <= left, "0 keeps all"
        assert best is None or load_checkpoint(path / "best.pt", require_digest=True)["step"] == best
    folder.close()
    assert not list(path.glob(".tmp-*"))


# -- nothing is overwritten ------------------------------------------------------------------------------------------


def fill(folder: RunFolder) -> None:
    for step in (2, 4, 5):
        save_checkpoint(folder.checkpoint_path(step), small(step))
    for name in ("metrics.jsonl", "samples.jsonl", "training.log", "config.yaml", "best.pt", "status.json"):
        (folder.path / name).write_text(name)
    (folder.path / "notes.txt").write_text("mine")


def test_a_new_run_moves_the_earlier_one_aside(tmp_path: Path) -> None:
    folder, said = RunFolder(tmp_path), list[str]()
    fill(folder)
    folder.set_aside(None, said.append)
    assert sorted(os.listdir(tmp_path)) == ["earlier-001", "notes.txt"]
    assert len(os.listdir(tmp_path / "earlier-001")) == 9
    assert len(said) == 1 and "earlier-001" in said[0] and "--auto_resume" in said[0]
    fill(folder)
    folder.set_aside(None, said.append)
    assert load_checkpoint(tmp_path / "earlier-002" / "model_00005.pt")["step"] == 5
    folder.set_aside(None, said.append)
    assert len(said) == 2, "nothing to move, nothing said"


def test_a_resumed_run_moves_only_later_checkpoints_aside(tmp_path: Path) -> None:
    folder, said = RunFolder(tmp_path), list[str]()
    fill(folder)
    folder.set_aside(4, said.append)
    assert [step for step, _ in folder.checkpoints()] == [4, 2]
    assert os.listdir(tmp_path / "earlier-001") == ["model_00005.pt"]
    assert (tmp_path / "metrics.jsonl").exists()
    folder.set_aside(4, said.append)
    assert len(said) == 1


def test_the_best_weights_of_a_course_that_is_left_go_with_it(tmp_path: Path) -> None:
    folder, said = RunFolder(tmp_path), list[str]()
    fill(folder)
    save_checkpoint(tmp_path / "best.pt", {"model": {}, "config": {}, "step": 5})
    folder.set_aside(4, said.append, new_course=True)
    assert sorted(os.listdir(tmp_path / "earlier-001")) == ["best.pt", "model_00005.pt"]
    save_checkpoint(tmp_path / "best.pt", {"model": {}, "config": {}, "step": 2})
    folder.set_aside(2, said.append, new_course=True)
    assert os.listdir(tmp_path / "earlier-002") == ["model_00004.pt"], "an earlier best stays"
