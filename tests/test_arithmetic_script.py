"""scripts/arithmetic.py: a few steps of it as a whole, and, marked slow, that the reward rises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(folder: Path, *words: str) -> str:
    command = [sys.executable, str(ROOT / "scripts" / "arithmetic.py"), "--data_dir", str(folder / "sums")]
    command += ["--logs", str(folder / "warm"), "--logs_finetune", str(folder / "grpo"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ, timeout=3600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_all_parts_run_after_each_other_and_go_on(tmp_path: Path) -> None:
    out = run(tmp_path, "--warm_steps", "2", "--max_steps", "2")
    assert "Mean reward: " in out and (tmp_path / "grpo" / "curves.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert [line["completions"] for line in lines] == [64, 64] and "val_reward/mean" in lines[-1]


@pytest.mark.slow
def test_the_reward_rises(tmp_path: Path) -> None:
    run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    found = [line["reward/mean"] for line in lines]
    assert sum(found[-50:]) / 50 > sum(found[:50]) / 50 + 0.05
    greedy = [line["val_reward/mean"] for line in lines if "val_reward/mean" in line]
    assert max(greedy) > greedy[0], "sums that were not trained on profit too"
