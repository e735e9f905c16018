"""prune.py where an earlier run left its files: what it may go on from, and what it must measure or make anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pruning_runs import RECOVER, prune_command, working_folder
from tests.scripts import one_line_error

BLOCKS = ("--method", "sparsegpt", "--pattern", "block", "--block_size", 8)
BRIEFLY = (*RECOVER, "--finetune_data", "set", "--finetune_samples", 2)
STREAMS = ("--objective", "distill", "--distill_hidden", 0.1)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, texts and a set to recover on."""
    return working_folder(tmp_path, monkeypatch, documents=80)


def test_streams_in_another_order_are_not_compared(capsys: Any) -> None:
    assert prune_command(capsys, *BLOCKS, "--out", "a.pt")[0] == 0
    error = one_line_error(prune_command(capsys, *BLOCKS, "--out", "a.pt", *BRIEFLY, *STREAMS))
    assert "a.pt: is there already, made with other settings (reorder True -> False)" in error
    assert prune_command(capsys, "--method", "none", "--out", "b.pt", *BRIEFLY, base="a.pt")[0] == 0
    for base in ("a.pt", "b.pt"):  # as it was pruned, and what a recovery left of it
        outcome = prune_command(capsys, "--method", "none", "--out", f"of-{base}", *BRIEFLY, *STREAMS, base=base)
        assert f"--distill_hidden compares channel by channel, and pruning in blocks gave {base}" in one_line_error(
            outcome
        )
    more = ("--method", "magnitude", "--sparsity", 0.6, "--out", "d.pt", *BRIEFLY, *STREAMS)
    code, out, err = prune_command(capsys, *more, base="a.pt")
    assert code == 0 and "KL from a.pt" in out, f"the order of its teacher: {err}"


def test_streams_are_compared_where_blocks_were_pruned_in_their_order(capsys: Any) -> None:
    code, out, err = prune_command(capsys, *BLOCKS, "--out", "a.pt", *BRIEFLY, *STREAMS)
    assert code == 0 and "distill/hidden" in out, err
    stage = ("--method", "none", "--out", "b.pt", *BRIEFLY)
    assert prune_command(capsys, *stage, *STREAMS, base="a-recovered.pt")[0] == 0


def exchange_texts(here: Path) -> None:
    """Each of the two texts under the other's name."""
    book, other = here / "book.txt", here / "other.txt"
    was = book.read_bytes()
    book.write_bytes(other.read_bytes())
    other.write_bytes(was)


def test_other_words_under_the_old_name_are_another_text(here: Path, capsys: Any) -> None:
    magnitude = ("--method", "magnitude", "--out", "a.pt")
    wanda = ("--method", "wanda", "--out", "b.pt")
    first = prune_command(capsys, *magnitude)[1]
    assert prune_command(capsys, *wanda)[0] == 0
    exchange_texts(here)
    code, again, err = prune_command(capsys, *magnitude)
    assert code == 0 and "the run goes on from it" in again, err
    lines = [line for line in again.splitlines() if line.startswith("PPL")]
    assert lines != [line for line in first.splitlines() if line.startswith("PPL")]
    anew = prune_command(capsys, *magnitude[:2], "--out", "c.pt")[1]
    assert lines == [line for line in anew.splitlines() if line.startswith("PPL")]
    assert "b.pt: is there already, made with other settings (calibration_windows " in one_line_error(
        prune_command(capsys, *wanda)
    )


def test_the_rival_is_measured_on_the_same_text_as_the_pruned_model(here: Path, capsys: Any) -> None:
    words = ("--prune_mlp", "--test_after_prune", "--eval_text", "book.txt")
    assert prune_command(capsys, "--prune_mlp", "--out", "a.pt")[0] == 0
    for name in ("a", "b"):  # on the text of before and then another, and on that one from the start
        code, _, err = prune_command(capsys, *words, "--out", f"{name}.pt")
        assert code == 0, err
    again, anew = (json.loads((here / f"logs/{name}/report.json").read_text()) for name in ("a", "b"))
    assert again["rival"]["perplexity"] == pytest.approx(anew["rival"]["perplexity"], rel=1e-6)
    assert again["rival"] == {**anew["rival"], "perplexity": again["rival"]["perplexity"]}
