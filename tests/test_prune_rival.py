"""The cheap rival of a structured run: whole layers, of those that the run may take from, for as many parameters."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from formats.checkpoint import load_checkpoint
from formats.open_model import open_model
from tests.pruning_runs import LLAMA, prune_command, working_folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model of eight layers, and texts."""
    return working_folder(tmp_path, monkeypatch, dataclasses.replace(LLAMA, n_layer=8))


@pytest.mark.parametrize(
    "words",
    [
        ("--protect_first", 3, "--protect_last", 1),
        ("--budget", "flops", "--importance_seq_len", 64),
        ("--min_groups", 2),
        ("--layer_start", 2, "--layer_end", 7),
    ],
    ids=lambda words: words[0],
)
def test_it_gives_up_what_the_units_do_and_keeps_what_is_protected(words: tuple[object, ...], capsys: Any) -> None:
    code, out, err = prune_command(capsys, "--prune_mlp", "--pruning_ratio", 0.6, *words, "--out", "a.pt")
    assert code == 0, err
    removed = open_model("model.pt").parameters - open_model("a.pt").parameters
    found = re.search(r"The cheap rival, ([\d,]+) .* with \d whole layers \((.*)\); asked for ([\d,]+): PPL", out)
    assert found is not None and found[3] == f"{removed:,}"
    layer = 32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48 + 2 * 32  # matrices of attention and MLP, norms
    assert abs(int(found[1].replace(",", "")) - removed) <= layer
    may = {"--protect_first": range(3, 7), "--layer_start": range(2, 7)}.get(str(words[0]), range(8))
    assert set(map(int, found[2].split(", "))) <= set(may)


def test_where_less_than_half_a_layer_goes_there_is_none(capsys: Any) -> None:
    code, out, err = prune_command(capsys, "--protect_first", 7, "--pruning_ratio", 0.4, "--out", "a.pt")
    assert code == 0, err
    assert "No cheap rival: the least influential layer holds" in out
    assert load_checkpoint("a.pt")["pruning"]["rival"] is None
