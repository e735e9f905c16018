"""The picture of a search: any mixture of trials is drawn, whole, in the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from report.search import search_picture

TRIALS: list[dict[str, Any]] = [
    {"number": 0, "state": "complete", "value": 4.0},
    {"number": 1, "state": "fail", "value": None},
    {"number": 2, "state": "complete", "value": 3.0},
    {"number": 3, "state": "pruned", "value": 7.0},
    {"number": 4, "state": "pruned", "value": None},
    {"number": 5, "state": "running", "value": None},
]


@pytest.mark.parametrize("importance", [{}, {"max_lr": 0.8, "lora_r": 0.2, "lora_target_modules": 0.0}])
@pytest.mark.parametrize("trials", [TRIALS, TRIALS[:1], TRIALS[1:2], TRIALS[2:4]])
def test_a_picture_of_whatever_there_is(
    trials: list[dict[str, Any]], importance: dict[str, float], tmp_path: Path
) -> None:
    one = search_picture(trials, importance, tmp_path / "one.png").read_bytes()
    assert one.startswith(b"\x89PNG") and one == search_picture(trials, importance, tmp_path / "two.png").read_bytes()


def test_what_happened_is_in_the_picture(tmp_path: Path) -> None:
    def drawn(trials: list[dict[str, Any]]) -> bytes:
        return search_picture(trials, {}, tmp_path / "p.png").read_bytes()

    pictures = [drawn(TRIALS[:count]) for count in (1, 2, 3, 4)]
    assert len(set(pictures)) == 4
