"""Two processes under torchrun give the numbers of one, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.evaluate import evaluate
from evaluation.processes import ALONE, gather, map_batches, share
from evaluation.settings import EvaluateSettings
from tests.launching import launch_two
from tests.test_evaluation_instructions import RECORDS
from tests.test_evaluation_multiple_choice import ROWS, write
from tests.tiny_checkpoints import save_tiny

METRICS = ("perplexity", "accuracy", "bleu", "rouge", "f1")


class Part:
    """One of several processes, in this one: it hears what the others say from `heard`."""

    def __init__(self, rank: int, heard: list[bytes]) -> None:
        self.rank, self.world_size, self.heard = rank, len(heard), heard

    def gather_bytes(self, data: bytes) -> list[bytes]:
        self.heard[self.rank] = data
        return self.heard


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_item_is_done_once_and_all_hear_of_it_in_order(world_size: int) -> None:
    heard = [b""] * world_size
    parts = [Part(rank, heard) for rank in range(world_size)]
    found = [{number: item * 0.1 for number, item in share(range(4), part)} for part in parts]
    assert sorted(number for each in found for number in each) == list(range(4))
    for part, mine in zip(parts[:-1], found):
        heard[part.rank] = json.dumps(list(mine.items())).encode()
    assert gather(found[-1], parts[-1]) == [0.0, 0.1, 0.2, 0.1 * 3]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_the_longest_go_first_and_the_results_stay_in_order(batch_size: int) -> None:
    words, seen, told = ["a", "ccc", "bb", "dddd", "ee", "f"], [], []

    def shout(batch: list[str]) -> list[str]:
        seen.append(batch)
        return [word.upper() for word in batch]

    how: dict[str, Any] = {"batch_size": batch_size, "length": len, "progress": told.append, "processes": ALONE}
    assert map_batches(words, shout, **how) == ["A", "CCC", "BB", "DDDD", "EE", "F"]
    assert [word for batch in seen for word in batch] == ["dddd", "ccc", "bb", "ee", "a", "f"]
    assert max(map(len, seen)) == min(batch_size, 6) and told == [len(batch) for batch in seen]
    assert map_batches([], shout, **how) == []


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    models = [str(save_tiny(tmp_path / f"{name}.pt", seed, template="dolly")) for name, seed in (("a", 0), ("b", 1))]
    text = tmp_path / "text.txt"
    text.write_text("A text of some length, to be cut into windows. " * 12)
    words: dict[str, Any] = {
        "checkpoints": models,
        "input": [str(text)],
        "data_dir": str(write(tmp_path / "r.jsonl", RECORDS)),
        "multiple_choice": [str(write(tmp_path / "q.jsonl", ROWS))],
        "metrics": list(METRICS),
        "batch_size": 2,
        "max_new_tokens": 4,
        "device": "cpu",
    }
    flags = [
        part
        for name, value in words.items()
        for part in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]
    said = launch_two("evaluate.py", *flags, "--json", tmp_path / "two.json")
    two = json.loads((tmp_path / "two.json").read_text())
    settings = EvaluateSettings(**{name: tuple(v) if isinstance(v, list) else v for name, v in words.items()})
    one = json.loads(json.dumps(evaluate(settings)))
    for results in (one, two):
        for result in results["results"]:
            assert result.pop("seconds") > 0
    assert two == one and len(one["results"]) == 6
    assert said.count("***** Running evaluation *****") == 8, "one process alone speaks"
