"""Two processes under torchrun equal one: in samples exactly, in losses to rounding, and in what they agree on.

One launch serves all tests, since most of its time is importing torch twice.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.checkpoint import load_checkpoint, save_checkpoint
from tests.full_checkpoints import same
from tests.launching import launch_two
from tests.masked_models import save_pruned, zeros
from tests.runs import log, losses, records, spied_batches, status, steps_on_disk, tune, weights
from tests.tiny import BYTES, record_set, text_set
from tests.tiny_checkpoints import tiny_model
from tests.two_processes import LORA, PROGRESSIVE, STEP, distillation


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes ran every case of tests/two_processes.py."""
    folder = tmp_path_factory.mktemp("two")
    text_set(folder / "text")
    record_set(folder / "records")
    for name, model in {"model": tiny_model(block_size=128, scale=1.0), "teacher": tiny_model(1, 128)}.items():
        payload = {"model": model.state_dict(), "config": model.config.to_dict(), "tokenizer": BYTES.spec()}
        save_checkpoint(folder / f"{name}.pt", payload)
    save_pruned(folder / "pruned.pt", block_size=128)
    launch_two("tests/two_processes.py", folder)
    return folder


def seen(folder: Path, case: str) -> list[dict[str, Any]]:
    """What each process saw."""
    return [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_equal_one(launched: Path, tmp_path: Path) -> None:
    settings = {**STEP, "eval_interval": 2}
    with spied_batches() as batches:
        one = tune(launched / "records", tmp_path, launched / "model.pt", **settings)
    both = seen(launched, "plain")
    assert [len(process["samples"]) for process in both] == [12, 12] and len(batches) == 24
    interleaved = [
        sample for pair in zip(*(process["samples"] for process in both)) for part in pair for sample in part
    ]
    assert interleaved == [sample for batch in batches for sample in batch.samples] == list(range(24))
    supervised = [process["supervised"] for process in both]
    assert supervised[0] != supervised[1], "equal counts would hide a mean of means"
    folder = launched / "plain"
    assert losses(folder) == pytest.approx(losses(tmp_path), rel=2e-6) and len(set(losses(folder))) == 6
    vals = [[record["val_loss"] for record in records(at) if "val_loss" in record] for at in (folder, tmp_path)]
    assert vals[0] == pytest.approx(vals[1], rel=2e-6) and len(vals[0]) == 3
    norms = [[record["grad_norm"] for record in records(at)] for at in (folder, tmp_path)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for name, tensor in weights(tmp_path, 5).items():
        torch.testing.assert_close(weights(folder, 5)[name], tensor, rtol=1e-3, atol=1e-4)
    assert both[0]["summary"]["val_loss"] == both[1]["summary"]["val_loss"] == pytest.approx(one["val_loss"], rel=2e-6)


@pytest.mark.parametrize(("name", "method"), [("lora", LORA), ("progressive", PROGRESSIVE)])
def test_two_processes_equal_one_where_a_part_trains(
    launched: Path, tmp_path: Path, name: str, method: dict[str, Any]
) -> None:
    tune(launched / "records", tmp_path, launched / "model.pt", **STEP, **method)
    folder = launched / name
    assert losses(folder) == pytest.approx(losses(tmp_path), rel=2e-6) and len(set(losses(folder))) == 6
    norms = [[record["grad_norm"] for record in records(at)] for at in (folder, tmp_path)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    one, two = weights(tmp_path, 5), weights(folder, 5)
    assert set(one) == set(two) and all("lora" in key for key in one) == (name == "lora")
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-4)
    unchanged = [key for key, tensor in load_checkpoint(launched / "model.pt")["model"].items()
                 if key in one and torch.equal(tensor, one[key])]  # fmt: skip
    assert not unchanged, "every layer has joined by the end"


def test_two_processes_keep_the_masks_as_one_does(launched: Path, tmp_path: Path) -> None:
    tune(launched / "records", tmp_path, launched / "pruned.pt", **{**STEP, "optimizer": "muon"})
    folder = launched / "masked"
    assert losses(folder) == pytest.approx(losses(tmp_path), rel=1e-4) and len(set(losses(folder))) == 6
    base, one, two = (
        load_checkpoint(path)
        for path in (launched / "pruned.pt", tmp_path / "model_00005.pt", folder / "model_00005.pt")
    )
    assert same(base["masks"], one["masks"]) and same(base["masks"], two["masks"])
    pruned = [zeros(payload["model"], base["masks"]) for payload in (base, one, two)]
    assert same(pruned[0], pruned[1]) and same(pruned[0], pruned[2])
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-2, atol=1e-3)


def test_two_processes_equal_one_under_a_teacher(launched: Path, tmp_path: Path) -> None:
    tune(launched / "records", tmp_path, launched / "model.pt", **{**STEP, **distillation(launched)})
    folder = launched / "distill"
    assert losses(folder) == pytest.approx(losses(tmp_path), rel=2e-6) and len(set(losses(folder))) == 6
    for name in ("distill/kl", "distill/cross_entropy", "distill/hidden", "grad_norm"):
        both = [[record[name] for record in records(at)] for at in (folder, tmp_path)]
        assert both[0] == pytest.approx(both[1], rel=1e-4), name
    for name, tensor in weights(tmp_path, 5).items():
        torch.testing.assert_close(weights(folder, 5)[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_checkpoint_is_one_file_with_a_random_state_for_each(launched: Path) -> None:
    payload = load_checkpoint(launched / "dropout" / "model_00005.pt", require_digest=True)
    assert len(payload["rng"]) == 2
    assert not same(payload["rng"][0]["torch"], payload["rng"][1]["torch"]), "both draw the same dropout"
    assert payload["train_loader_state"]["sample"] == 24
    assert set(payload["optimizer"]["adamw"]) == set(payload["model"])
    assert not list(launched.glob("*/.tmp-*"))


def test_one_process_goes_on_from_it_as_if_it_had_been_alone(launched: Path, tmp_path: Path) -> None:
    shutil.copytree(launched / "plain", tmp_path / "resumed")
    with spied_batches() as batches:
        more = {**STEP, "max_steps": 8, "auto_resume": True}
        tune(launched / "records", tmp_path / "resumed", launched / "model.pt", **more)
    assert [sample for batch in batches for sample in batch.samples] == list(range(24, 32)), "none twice, none left out"
    assert "2 processes wrote the checkpoint, 1 run now: dropout is re-seeded" in log(tmp_path / "resumed")
    tune(launched / "records", tmp_path / "alone", launched / "model.pt", **{**STEP, "max_steps": 8})
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "alone"), rel=5e-6)
    assert len(losses(tmp_path / "alone")) == 8 and losses(tmp_path / "resumed")[:6] == losses(launched / "plain")


def test_a_loss_not_finite_on_one_process_stops_both_before_the_step(launched: Path) -> None:
    both = seen(launched, "nan")
    for process in both:
        assert "Step 3: loss nan is not finite; no process took the step" in process["error"]
        assert "samples 12..15 of" in process["error"], "the samples of all processes"
        found = re.findall(r"rank (\d), micro-batch (\d): sample (\d+), window \d+ of train_\d+\.bin", process["error"])
        assert found == [("1", "1", "15")], "and whose it was, on both"
    assert steps_on_disk(launched / "nan") == [2] and status(launched / "nan") == "failed"
    assert [record["step"] for record in records(launched / "nan")] == [0, 1, 2]


def test_a_skipped_step_is_skipped_by_both(launched: Path) -> None:
    folder = launched / "skip"
    assert same(dict(weights(folder, 3)), dict(weights(folder, 2))), "a process took the step"
    assert not same(dict(weights(folder, 4)), dict(weights(folder, 3)))
    assert [record["step"] for record in records(folder) if record.get("skipped")] == [3]
    assert [process["summary"]["finished"] for process in seen(launched, "skip")] == [True, True]
    assert losses(folder)[:3] == losses(launched / "nan")


def test_a_failed_save_is_known_to_both_and_made_good_before_leaving(launched: Path) -> None:
    """If only rank 0 knew, it would wait alone in the next save until the time-out."""
    folder = launched / "full_disk"
    assert [process["summary"]["finished"] for process in seen(launched, "full_disk")] == [False, False]
    assert "Checkpoint not saved" in log(folder) and "disk full" in log(folder)
    assert "Stopped by another process after step 2; saving it" in log(folder)
    assert steps_on_disk(folder) == [2] and status(folder) == "stopped"
    assert load_checkpoint(folder / "model_00002.pt", require_digest=True)["train_loader_state"]["sample"] == 12


def test_a_spike_on_one_process_takes_both_back_and_past_it(launched: Path) -> None:
    both = seen(launched, "spike")
    assert [process["summary"]["finished"] for process in both] == [True, True]
    assert [record["step"] for record in records(launched / "spike")] == list(range(28))
    assert "Loss spike at step 25" in log(launched / "spike")
    assert "model_00020.pt, and on past samples 84..103, which are left out" in log(launched / "spike")
    taken = sorted(sample for process in both for samples in process["samples"] for sample in samples)
    assert taken == list(range(104, 104 + 4 * 7)), "since it went back, each sample once"


def test_saves_that_fail_without_end_are_known_to_both(launched: Path) -> None:
    first, second = (process["error"] for process in seen(launched, "broken_disk"))
    assert "model_00006.pt: input/output error" in first and "5 of 5 in a row" in first
    assert second == "rank 0 could not write the checkpoint, and says why"
    assert steps_on_disk(launched / "broken_disk") == [1] and status(launched / "broken_disk") == "failed"
