"""Long runs: what they hold on to does not grow, and going on costs the same wherever they stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from data.loader import _Plan
from formats.checkpoint import load_checkpoint, save_checkpoint
from tests.runs import BARE, losses, spied_batches, train
from tests.test_house import ROOT
from tests.tiny import text_set

STEPS = 20_000
WARM = 4  # of the looks that long_life.py takes, one each 500 steps


@pytest.mark.slow
def test_20_000_steps_hold_on_to_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tests/long_life.py", str(tmp_path), str(STEPS)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert len(seen["rss_mb"]) == STEPS // 500
    assert max(seen["files"]) < 32, seen["files"]
    assert max(seen["rss_mb"][WARM:]) - seen["rss_mb"][WARM] < 2.0, seen["rss_mb"]


@contextmanager
def counted_batches() -> Iterator[list[int]]:
    """The first sample of each batch that a loader makes, prefetched ones too."""
    made: list[int] = []
    batch = _Plan.batch

    def counting(self: _Plan, first: int, count: int) -> Any:
        made.append(first)
        return batch(self, first, count)

    with mock.patch.object(_Plan, "batch", counting):
        yield made


def test_going_on_costs_the_same_after_ten_steps_and_after_ten_million(tmp_path: Path) -> None:
    text = text_set(tmp_path / "text")
    settings = {**BARE, "lr_schedule": "constant", "log_interval": 1, "eval_interval": 0}
    train(text, tmp_path / "10", **settings, max_steps=11)
    payload = load_checkpoint(tmp_path / "10" / "model_00010.pt")
    far = 10_000_000
    for entry in (payload, payload["progress"], payload["progress"]["last_record"]):
        entry["step"] = far
    payload["train_loader_state"]["sample"] = 4 * (far + 1)
    save_checkpoint(tmp_path / str(far) / f"model_{far}.pt", payload)
    for step in (10, far):
        with counted_batches() as made, spied_batches() as taken:
            train(text, tmp_path / str(step), **settings, max_steps=step + 4, auto_resume=True)
        assert [batch.samples[0] for batch in taken] == list(range(4 * (step + 1), 4 * (step + 4), 2))
        assert set(made) <= set(range(4 * (step + 1), 4 * (step + 6), 2)), "none of what was done is made again"
        assert len(made) <= 12
    assert len(losses(tmp_path / str(far))) == 3
