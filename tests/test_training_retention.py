"""What is kept: 10,000 random histories of a run's folder, of saves, crashes, damage, evaluations and resumes.

A checkpoint here is a line of text that says whether it is whole, in place of 0.2 s of torch.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from formats.checkpoint import TRAINING_KEYS, load_checkpoint, remove_temporaries, save_checkpoint
from tests.full_checkpoints import full_payload
from training.run_folder import RunFolder


def read(file: str | Path, *, require_digest: bool = False) -> dict[str, Any]:
    """Stands in for load_checkpoint."""
    with open(file) as stream:
        verdict, step = stream.read().split()
    if verdict != "whole":
        raise ValueError(f"{file}: is damaged")
    return {**{key: {} for key in TRAINING_KEYS}, "step": int(step)}


@pytest.fixture
def cheap() -> Iterator[None]:
    with (
        mock.patch("training.run_folder.load_checkpoint", read),
        mock.patch("training.run_folder.sync_folder", lambda folder: None),
    ):
        yield


class History:
    """A run and its folder, and beside it what is known to be whole."""

    def __init__(self, path: Path, chance: random.Random) -> None:
        self.path, self.chance = path, chance
        self.keep = chance.randrange(1, 5)
        self.interval = chance.choice([None, 2, 3])  # of the steps whose newest is spared, where any is
        self.step, self.best, self.resumed = 0, -1, -1
        self.whole: set[int] = set()
        self.begin()

    def begin(self) -> None:
        """A new process."""
        self.folder = RunFolder(self.path)
        remove_temporaries(self.path)
        if self.interval is not None:
            self.folder.spare = self.is_spare

    def is_spare(self, step: int) -> bool:
        return self.interval is not None and step % self.interval == 0

    def put(self, name: str, verdict: str, step: int) -> Path:
        """As a save does: under another name first."""
        temporary, file = self.path / f".tmp-{name}-1", self.path / name
        temporary.write_text(f"{verdict} {step}")
        os.replace(temporary, file)
        return file

    # -- what happens ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        self.step += self.chance.randrange(1, 4)
        file = self.put(f"model_{self.step:05d}.pt", "whole", self.step)
        self.whole.add(self.step)
        self.folder.vouch_for(file)
        self.prune()
        self.resumed = -1  # from here on the newer one does

    def crash_in_a_save(self) -> None:
        """In the middle of the file, or between its rename and the removal of older ones."""
        self.step += 1
        if self.chance.random() < 0.5:
            (self.path / f".tmp-model_{self.step:05d}.pt-1").write_text("half")
        else:
            self.put(f"model_{self.step:05d}.pt", "whole", self.step)
            self.whole.add(self.step)
        self.resume()

    def rot(self) -> None:
        steps = sorted(self.on_disk())
        if len(steps) > 1 or (steps and self.chance.random() < 0.2):
            step = self.chance.choice([steps[-1], self.chance.choice(steps)])
            self.put(f"model_{step:05d}.pt", "damaged", step)
            self.whole.discard(step)

    def find_the_best(self) -> None:
        self.best = self.step
        self.put("best.pt", "whole", self.step)

    def evaluate(self) -> None:
        self.step += 1

    def resume(self) -> None:
        self.begin()
        found = self.folder.newest_good(lambda _: None)
        assert (found is None) == (not self.whole)
        if found is not None:
            assert found[1]["step"] == max(self.whole)
            self.go_on_from(found[1]["step"], new_course=False)

    def resume_from_an_older_one(self) -> None:
        if self.whole:
            self.begin()
            self.go_on_from(self.chance.choice(sorted(self.whole)), new_course=True)

    def go_on_from(self, step: int, new_course: bool) -> None:
        self.folder.set_aside(step, lambda _: None, new_course=new_course)
        self.step = self.resumed = step
        self.whole = {each for each in self.whole if each <= step}
        if new_course and self.best > step:
            self.best = -1
        self.prune()

    def prune(self) -> None:
        kept = set(sorted(self.whole)[-self.keep :]) | set(sorted(filter(self.is_spare, self.whole))[-1:])
        before = self.on_disk()
        self.folder.prune(self.keep)
        left = self.on_disk()
        assert kept <= left, "a checkpoint that is needed is gone"
        assert self.whole & left == kept or len(before) <= self.keep, "one that nothing needs is there"
        assert len(left) + (self.best >= 0) <= self.keep + 2
        self.whole &= left

    # -- what holds at any time --------------------------------------------------------------------------------------

    def on_disk(self) -> set[int]:
        return {int(name[6:-3]) for name in os.listdir(self.path) if name.startswith("model_")}

    def check(self) -> None:
        assert self.whole <= self.on_disk()
        if self.best >= 0:
            assert read(self.path / "best.pt")["step"] == self.best
        assert self.resumed < 0 or self.resumed in self.on_disk(), "what the run went on from is gone"


EVENTS = [
    *[History.save] * 5, History.crash_in_a_save, History.rot, History.rot, History.find_the_best, History.evaluate,
    History.resume, History.resume_from_an_older_one,
]  # fmt: skip


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder that is on no disk, where the system has such: 5 times as fast."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def test_what_a_run_needs_outlives_10_000_histories(cheap: None, memory: Path) -> None:
    seen: Counter[str] = Counter()
    for seed in range(10_000):
        chance = random.Random(seed)
        folder = memory / "run"
        folder.mkdir()
        history = History(folder, chance)
        for _ in range(chance.randrange(4, 12)):
            event = chance.choice(EVENTS)
            event(history)
            history.check()
            seen[event.__name__] += 1
        found = history.folder.newest_good(lambda _: None)
        assert (found[1]["step"] if found else None) == max(history.whole, default=None), f"history {seed}"
        _remove(folder)
    assert min(seen.values()) > 4_000, seen


def _remove(folder: Path) -> None:
    for name in os.listdir(folder):
        if name.startswith("earlier-"):
            _remove(folder / name)
        else:
            os.unlink(folder / name)
    os.rmdir(folder)


# -- with real files -------------------------------------------------------------------------------------------------


def test_a_damaged_one_pushes_out_no_good_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3, 4):
        save_checkpoint(folder.checkpoint_path(step), full_payload(step))
    folder.checkpoint_path(3).write_bytes(b"rotten")
    folder.prune(2)
    assert [step for step, _ in folder.checkpoints()] == [4, 2]


def test_a_file_is_read_for_it_once_and_only_where_one_is_to_go(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(3):
        save_checkpoint(folder.checkpoint_path(step), full_payload(step))
    with mock.patch("training.run_folder.load_checkpoint", side_effect=load_checkpoint) as loads:
        folder.prune(3)
        assert loads.call_count == 0, "nothing is to go"
        for step in range(3, 6):
            save_checkpoint(folder.checkpoint_path(step), full_payload(step))
            folder.vouch_for(folder.checkpoint_path(step))
            folder.prune(3)
        assert [call.args[0].name for call in loads.call_args_list] == ["model_00002.pt", "model_00001.pt"]
    assert [step for step, _ in folder.checkpoints()] == [5, 4, 3]


def test_a_folder_in_place_of_a_file_is_left_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoint_path(1).mkdir(parents=True)
    for step in (2, 3, 4):
        save_checkpoint(folder.checkpoint_path(step), full_payload(step))
    folder.prune(2)
    assert [step for step, _ in folder.checkpoints()] == [4, 3, 1]
