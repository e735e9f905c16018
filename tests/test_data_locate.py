"""Where samples come from, in words: what they name is what the batch holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.loader import IGNORED, Loader
from data.shards import open_dataset
from tests.tiny import pair_set, record_set, text_set

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "windows": (text_set, {}),
    "packed records": (record_set, {}),
    "records": (record_set, {"packing": False}),
    "pairs": (pair_set, {"unit": "pair"}),
    "prompts": (record_set, {"unit": "prompt"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_a_window_are_what_its_row_holds(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    tokens = open_dataset(make(tmp_path / "set"), "train")
    loader = Loader(tokens, batch_size=3, block_size=96, seed=1, **options)
    cut = loader._plan.cut
    for window in range(loader.n_windows):
        rows, parts = cut.rows([window]), cut.parts(window)
        if rows.prompts is not None:
            (prompt,), (part,) = rows.prompts, parts
            record, used = tokens.tokens(part.start, part.stop).tolist(), prompt.ids + prompt.reference
            assert any(record[at : at + len(used)] == used for at in range(len(record)))
            continue
        pieces = [tokens.tokens(part.start, part.stop)[:-1] for part in parts]
        if case == "pairs":  # a row for each side
            for row, piece in zip(rows.inputs, pieces):
                assert (row[: len(piece)] == piece).all()
        else:
            flat = np.concatenate(pieces)
            assert (rows.inputs[0, : len(flat)] == flat).all() and (rows.targets[0, len(flat) :] == IGNORED).all()


def test_the_sentence_names_samples_windows_and_shards(tmp_path: Path) -> None:
    tokens = open_dataset(text_set(tmp_path / "set"), "train")
    loader = Loader(tokens, batch_size=2, block_size=96, seed=1)
    batch = loader.next_batch()
    found = re.fullmatch(r"samples 0, 1, windows (\d+), (\d+) of (.*)", loader.locate(batch.samples))
    assert found is not None
    starts = [int(window) * 96 for window in found.groups()[:2]]
    for row, start in zip(batch.inputs.tolist(), starts):
        assert row == tokens.tokens(start, start + 96).tolist()
    files = [name for start in starts for name in tokens.files(start, start + 97)]
    assert found[3].split(", ") == list(dict.fromkeys(files)) and all(
        (tokens.folder / name).is_file() for name in files
    )
    assert len(tokens.files(0, tokens.n_tokens)) == len(tokens.meta["splits"]["train"]["shards"]) > 2


def test_records_have_their_number_in_the_set(tmp_path: Path) -> None:
    tokens = open_dataset(record_set(tmp_path / "set"), "train")
    whole = Loader(tokens, batch_size=1, block_size=512, seed=1, packing=False)
    assert whole.dropped == 0
    assert [whole._plan.cut.parts(window)[0].number for window in range(4)] == [0, 1, 2, 3]
    pairs = Loader(
        open_dataset(pair_set(tmp_path / "pairs"), "train"), batch_size=1, block_size=512, seed=1, unit="pair"
    )
    assert [part.number for part in pairs._plan.cut.parts(5)] == [5, 5]


def test_long_lists_are_cut(tmp_path: Path) -> None:
    tokens = open_dataset(text_set(tmp_path / "set"), "train")
    loader = Loader(tokens, batch_size=2, block_size=8, seed=1)
    assert loader.locate(range(20)).startswith("samples 0, 1, 2, 3, 4, 5, 6, 7 and 12 more, windows ")
