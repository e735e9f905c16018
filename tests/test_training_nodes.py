"""Machines without a shared disk: only rank 0's has the files of a run, every one has the data.

One launch serves all tests, since most of its time is importing torch twice.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.checkpoint import save_checkpoint
from tests.launching import launch_two
from tests.runs import log, losses, records, status, steps_on_disk, weights
from tests.tiny import BYTES, pair_set, record_set
from tests.tiny_checkpoints import tiny_model
from tests.two_machines import KINDS, run

REMEDY = "each machine needs the data of rank 0, byte for byte"
ONLY_DATA = {"records", "pairs", "other", "chats.jsonl", "data"}  # "data": the cache


def save_models(folder: Path) -> None:
    """What only rank 0's machine has."""
    for name, model in {"model": tiny_model(block_size=128, scale=1.0), "teacher": tiny_model(1, 128)}.items():
        payload = {"model": model.state_dict(), "config": model.config.to_dict(), "tokenizer": BYTES.spec()}
        save_checkpoint(folder / f"{name}.pt", payload)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two machines, 0 and 1, ran every case of tests/two_machines.py."""
    folder = tmp_path_factory.mktemp("machines")
    record_set(folder / "0" / "records")
    pair_set(folder / "0" / "pairs")
    record = {"instruction": "say it", "context": "", "response": "it", "category": "open_qa"}
    (folder / "0" / "chats.jsonl").write_text(
        "".join(json.dumps({**record, "response": "it" * n}) + "\n" for n in range(1, 40))
    )
    shutil.copytree(folder / "0", folder / "1")
    for number in (0, 1):
        record_set(folder / str(number) / "other", seed=number)
    shutil.copytree(folder / "0" / "records", folder / "0" / "only_0")
    shutil.copy(folder / "0" / "chats.jsonl", folder / "0" / "only_0.jsonl")
    save_models(folder / "0")
    launch_two("tests/two_machines.py", folder)
    return folder


def seen(folder: Path, case: str) -> list[dict[str, Any]]:
    """What each machine saw."""
    return [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_machine_without_files_trains_and_resumes_as_one_process_does(
    machines: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = seen(machines, kind)
    assert [process["summary"]["finished"] for process in both] == [True, True], both
    monkeypatch.chdir(machines / "0")
    run(str(tmp_path), **{**KINDS[kind], "max_steps": 8})
    folder = machines / "0" / kind
    assert [record["step"] for record in records(folder)] == list(range(8))
    assert losses(folder) == pytest.approx(losses(tmp_path), rel=2e-5) and len(set(losses(folder))) == 8
    assert "Resuming from" in log(folder) and "(step 3" in log(folder)
    for name, tensor in weights(tmp_path, 7).items():
        torch.testing.assert_close(weights(folder, 7)[name], tensor, rtol=1e-3, atol=2e-4)


def test_nothing_but_data_is_on_the_other_machine(machines: Path) -> None:
    there = {path.name for path in (machines / "1").iterdir()}
    assert there == ONLY_DATA | {"moved", "afresh", "in_use"}, "the last three were put there by the cases themselves"


def test_a_run_moves_to_the_machine_where_rank_0_is_now(machines: Path) -> None:
    both, folder = seen(machines, "moved"), machines / "0" / "moved"
    assert [process["summary"]["finished"] for process in both] == [True, True], both
    undisturbed = machines / "0" / "full"
    assert losses(folder) == losses(undisturbed) and [r["step"] for r in records(folder)] == list(range(8))
    for name, tensor in weights(undisturbed, 7).items():
        assert torch.equal(weights(folder, 7)[name], tensor), name
    assert (folder / "final.pt").exists(), "best.pt came along"
    text = log(folder)
    assert "Rank 1 on host1: Not used: moved/model_00009.pt: is cut short" in text
    assert "The newest checkpoint, of step 3, is that of rank 1 on host1" in text
    assert "of another run" in (folder / "earlier-001" / "metrics.jsonl").read_text()
    assert (folder / "earlier-001" / "model_00001.pt").exists()
    theirs = machines / "1" / "moved"
    assert steps_on_disk(theirs) == [1, 2, 3] and (theirs / "earlier-001" / "model_00009.pt").exists()


def test_a_new_run_sets_aside_what_an_earlier_one_left_on_any_machine(machines: Path) -> None:
    assert [process["summary"]["finished"] for process in seen(machines, "afresh")] == [True, True]
    there = machines / "1" / "afresh"
    assert (there / "earlier-001" / "model_00100.pt").read_bytes() == b"of last year" and not steps_on_disk(there)


def test_each_machine_prepares_its_own_cache_of_records(machines: Path) -> None:
    assert [process["summary"]["finished"] for process in seen(machines, "records")] == [True, True]
    caches = [{path.name for path in (machines / name / "data").glob("cache-chats-*")} for name in "01"]
    assert caches[0] == caches[1] and len(caches[0]) == 1


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other_data", ["other: is another set than that of rank 0 (another training split, validation split)"]),
        ("no_data", ["only_0: there is no such folder"]),
        ("no_records", ["only_0.jsonl: no such file of records"]),
    ],
)
def test_data_that_a_machine_lacks_are_one_error_on_all(machines: Path, case: str, words: list[str]) -> None:
    errors = [process["error"] for process in seen(machines, case)]
    assert errors[0] == errors[1] and "\n" not in errors[0]
    for word in [*words, "(rank 1 on host1: ", REMEDY]:
        assert word in errors[0]
    assert status(machines / "0" / "afresh") == "finished"


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("no_model", "nowhere.pt: no such checkpoint"),
        ("no_checkpoint", "--resume: no usable checkpoint in no_checkpoint"),
        ("in_use", "--log_dir in_use: another run is writing here"),
    ],
)
def test_an_error_of_rank_0_is_that_of_all(machines: Path, case: str, text: str) -> None:
    one, other = seen(machines, case)
    assert one["error"] == other["error"] and one["error"].startswith(text)
