"""What the comparison of prune.py says in words: its title and its notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pruning_runs import RECOVER, prune_command, save_model, write_texts
from tests.tiny import text_set


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model and texts; nothing is timed."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    save_model(tmp_path / "model.pt")
    found = {"tokens_per_s": 1.0, "runs": [1.0], "peak_memory_mb": 1.0, "weights": "float32"}
    monkeypatch.setattr("pruning.comparison.speed_and_memory", lambda refs, *more: [dict(found) for _ in refs])
    return tmp_path


def reported(capsys: Any, *words: object, base: str = "model.pt") -> dict[str, Any]:
    """The report of a run that writes r.json."""
    code, _, err = prune_command(capsys, *words, "--speed_runs", 1, "--report", "r.json", base=base)
    assert code == 0, err
    report: dict[str, Any] = json.loads(Path("r.json").read_text("utf-8"))
    return report


def test_a_run_that_only_recovers_is_compared_with_what_it_began_with(here: Path, capsys: Any) -> None:
    text_set(here / "set", n_documents=80)
    assert prune_command(capsys, "--method", "magnitude", "--out", "a.pt")[0] == 0
    words = ("--method", "none", "--out", "b.pt", "--finetune_data", "set", *RECOVER)
    report = reported(capsys, *words, base="a.pt")
    assert [model["label"] for model in report["models"]] == ["before", "recovered"]
    speed, size = report["notes"]
    assert speed.startswith("Generation is NOT faster than that of the model before: 1.00 times its tokens/s")
    assert "of its weights with them" in size and "dense" not in speed + size
