"""prune.py --rounds: what each round takes, what it leaves to the next, where its files lie, what is said of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from formats.open_model import open_model
from model.pruning.matrices import matrices
from tests.pruning_runs import RECOVER, prune_command, working_folder
from tests.scripts import one_line_error

BRIEFLY = (*RECOVER, "--finetune_data", "set", "--finetune_samples", 2)  # one step: what a round takes counts here
ZEROS = ("--method", "magnitude", "--sparsity", 0.6, "--rounds", 2)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, texts and a set to recover on."""
    return working_folder(tmp_path, monkeypatch, documents=80)


def units_left(path: str) -> int:
    """The kv groups of all layers."""
    config = open_model(path).model.config
    return sum(config.layer(i).n_kv_head for i in range(config.n_layer))


def share_of_zeros(path: str) -> float:
    model = open_model(path).model
    weights = [module.weight for module in matrices(model, range(model.config.n_layer)).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def test_the_last_of_many_rounds_takes_the_little_that_is_left(capsys: Any) -> None:
    words = ("--method", "magnitude", "--sparsity", 0.5, "--rounds", 8, "--out", "a.pt")
    code, out, err = prune_command(capsys, *words, *BRIEFLY)
    assert code == 0, err
    assert "Round 8 of 8: sparsity 50.0%" in out
    assert share_of_zeros("logs/a/round-7/recovered.pt") > 0.499 and share_of_zeros("a-recovered.pt") == 0.5


def test_a_round_takes_what_the_units_of_those_before_left_of_its_part(here: Path, capsys: Any) -> None:
    """Of six kv groups half a group is each round's part, and half a group goes as one."""
    words = ("--pruning_ratio", 0.25, "--rounds", 3, "--out", "a.pt")
    code, out, err = prune_command(capsys, *words, *BRIEFLY)
    assert code == 0, err
    assert "Round 2 of 3: 0.0% of what is left" in out
    assert "Round 2 is left out: the rounds before it took its part already" in out
    assert units_left("logs/a/round-1/pruned.pt") == 5 and units_left("a.pt") == 4
    assert not (here / "logs/a/round-2").exists()
    code, again, err = prune_command(capsys, *words, *BRIEFLY)
    assert code == 0 and "a-recovered.pt: was recovered by these settings already" in again, err


def test_a_last_round_without_a_part_of_its_own_recovers(capsys: Any) -> None:
    """A sixth by and by: the first round's half of a group goes as one."""
    words = ("--pruning_ratio", 1 / 6, "--rounds", 2, "--out", "a.pt")
    code, out, err = prune_command(capsys, *words, *BRIEFLY)
    assert code == 0, err
    assert "nothing is left to prune: " in out and units_left("a-recovered.pt") == 5


def test_rounds_that_would_all_prune_nothing_are_told_so(here: Path, capsys: Any) -> None:
    words = ("--pruning_ratio", 0.001, "--rounds", 2, "--out", "a.pt")
    assert "removes nothing" in one_line_error(prune_command(capsys, *words, *BRIEFLY))
    prune_command(capsys, "--method", "wanda", "--sparsity", 0.6, "--out", "w.pt")
    outcome = prune_command(capsys, *ZEROS, "--out", "b.pt", *BRIEFLY, base="w.pt")
    assert "w.pt: 60.0% of the weights of the chosen layers are zero already" in one_line_error(outcome)
    assert "Round 2" not in outcome[1]
    assert not (here / "logs/b/round-1").exists()


def test_a_second_stage_learns_from_the_model_before_all_rounds(capsys: Any) -> None:
    code, _, err = prune_command(capsys, *ZEROS, "--out", "a.pt", *BRIEFLY)
    assert code == 0, err
    stage = ("--method", "none", "--objective", "distill", "--out", "b.pt")
    code, out, err = prune_command(capsys, *stage, *BRIEFLY, base="a-recovered.pt")
    assert code == 0, err
    assert "KL from model.pt" in out


def test_the_report_tells_of_all_rounds(here: Path, capsys: Any) -> None:
    words = ("--prune_mlp", "--pruning_ratio", 0.4, "--rounds", 2, "--out", "a.pt", "--test_after_prune")
    code, _, err = prune_command(capsys, *words, *BRIEFLY)
    assert code == 0, err
    report = json.loads((here / "logs/a/report.json").read_text())
    assert report["title"] == "model.pt, structured pruning of 40%"
    dense, pruned, _ = report["models"]
    total, first, second, *_ = report["notes"]
    gone = dense["parameters"] - pruned["parameters"]
    assert total == f"{gone:,} parameters removed in 2 rounds, 40.0% of the units in range"
    assert first.startswith("Round 1: ") and ", 20.0% of the units in range" in first
    assert second.startswith("Round 2: ") and ", 25.0% of the units in range" in second


def test_the_rounds_of_each_name_have_folders_of_their_own(here: Path, capsys: Any) -> None:
    for name, sparsity in (("n1/run", 0.6), ("n2/run", 0.7)):
        words = (*ZEROS, "--sparsity", sparsity, "--save_model", "--save_ckpt_log_name", name)
        code, _, err = prune_command(capsys, *words, *BRIEFLY)
        assert code == 0, err
        assert (here / f"logs/{name}/round-1/recovery").is_dir() and not (here / "logs/run").exists()
