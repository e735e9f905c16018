"""What the comparison of prune.py says in words: its title and its notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pruning_runs import RECOVER, prune_command, save_model, write_texts
from tests.scripts import one_line_error
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


def test_a_share_is_not_rounded_to_all_of_it(capsys: Any) -> None:
    words = ("--method", "magnitude", "--sparsity", 0.996, "--out", "a.pt")
    assert reported(capsys, *words)["title"] == "model.pt, magnitude pruning to 99.6% zeros, unstructured"
    Path("r.json").unlink()
    Path("r.html").unlink()
    words = ("--method", "drop_layers", "--pruning_ratio", 0.335, "--out", "b.pt")
    assert reported(capsys, *words)["title"] == "model.pt, drop_layers pruning of 33.5%"


def test_a_perplexity_flatters_where_the_same_text_is_read_and_only_there(here: Path, capsys: Any) -> None:
    text_set(here / "set", n_documents=80)
    note = "Note: the same text is read to prune or recover: this perplexity flatters"
    for number, (method, text, flatters) in enumerate(
        [("wanda", "book.txt", True), ("magnitude", "book.txt", False), ("wanda", "set", False)]
    ):
        words = ("--method", method, "--calibration", text, "--eval_text", text, "--out", f"{number}.pt")
        code, out, err = prune_command(capsys, *words)
        assert code == 0, err
        assert (note in out) == flatters, (method, text)


def test_half_zeros_over_half_zeros_says_what_can_be_done(capsys: Any) -> None:
    assert prune_command(capsys, "--method", "magnitude", "--out", "a.pt")[0] == 0
    words = ("--method", "magnitude", "--pattern", "2:4", "--out", "b.pt")
    assert "give a larger one and another --pattern" in one_line_error(prune_command(capsys, *words, base="a.pt"))
