"""Each way of spreading a network over two processes trains it as one process does; its checkpoints go anywhere.

One launch serves all tests, since most of its time is importing torch twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.checkpoint import load_checkpoint, save_checkpoint
from tests.full_checkpoints import same
from tests.launching import launch_two
from tests.masked_models import save_pruned, zeros
from tests.parallel_processes import CASES, TALES, held, run, spied_trainers
from tests.runs import log, losses, records, steps_on_disk, weights
from tests.tiny import BYTES, pair_set, record_set, text_set
from tests.tiny_checkpoints import tiny_model
from training.plan import plan_memory
from training.run_settings import FinetuneSettings

# Rows that two processes do not share evenly, and a head of its own.
ODD: dict[str, Any] = {"n_layer": 3, "n_embd": 31, "mlp_dim": 65, "tie_embeddings": False}
ODD |= {"mlp": "swiglu", "mlp_bias": False, "norm": "rmsnorm", "norm_bias": False, "position": "rope"}
Alone = Callable[[str], Path]
LAST = 4  # the index of the last step
EQUAL = [
    pytest.param(name, way, marks=[pytest.mark.slow] if case.slow else [])
    for name, case in CASES.items()
    for way in case.ways
    if name not in ("bf16", "grpo")  # rounding may choose another token there
]
# Where a gradient is about as small as AdamW's epsilon, its rounding decides on a whole step: so DDP is no nearer.
ROUGH = ("masked", "masked_zero1", "muon", "distill")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets and models."""
    folder = tmp_path_factory.mktemp("parallel")
    text_set(folder / "text")
    record_set(folder / "records")
    pair_set(folder / "pairs")
    for name, model in {"model": tiny_model(block_size=128, scale=1.0), "odd": tiny_model(3, 128, 1.0, **ODD)}.items():
        payload = {"model": model.state_dict(), "config": model.config.to_dict(), "tokenizer": BYTES.spec()}
        save_checkpoint(folder / f"{name}.pt", payload)
    save_pruned(folder / "pruned.pt", block_size=128)
    return folder


def launch(folder: Path, *names: str) -> Path:
    """Two processes run these of tests/parallel_processes.py."""
    launch_two("tests/parallel_processes.py", folder, *names)
    return folder


@pytest.fixture(scope="module")
def launched(start: Path) -> Path:
    """The folder of the runs that are quick."""
    return launch(start, *(name for name, case in CASES.items() if not case.slow), *TALES)


@pytest.fixture(scope="module")
def launched_slow(start: Path) -> Path:
    """The folder of the others."""
    return launch(start, *(name for name, case in CASES.items() if case.slow))


@pytest.fixture(scope="module")
def alone(start: Path) -> Callable[[str], Path]:
    """The folder of a case that this process ran by itself."""
    folders: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in folders:
            folders[name] = start / f"{name}-alone"
            run(start, name, folders[name], cpu_offload=False, compile="off")
        return folders[name]

    return of


@pytest.mark.parametrize(("name", "way"), EQUAL)
def test_two_processes_equal_one(request: Any, alone: Alone, name: str, way: str) -> None:
    folder = request.getfixturevalue("launched_slow" if CASES[name].slow else "launched")
    one, two = alone(name), folder / f"{name}-{way}"
    assert losses(two) == pytest.approx(losses(one), rel=5e-6) and len(set(losses(one))) == LAST + 1
    for key in ("grad_norm", "val_loss", "rewards/margins", "distill/hidden", "distill/kl"):
        both = [[record[key] for record in records(at) if key in record] for at in (two, one)]
        assert both[0] == pytest.approx(both[1], rel=1e-4, abs=1e-6), key
    ours, theirs = weights(one, LAST), weights(two, LAST)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        near = {"rtol": 1e-2, "atol": 2e-3} if name in ROUGH else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(theirs[key], tensor, **near)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("lora_plus", "grpo")]


@pytest.mark.parametrize("name", ["full", "progressive", "muon", *SLOW])
def test_zero1_is_ddp_to_the_bit(request: Any, name: str) -> None:
    launched = request.getfixturevalue("launched_slow" if CASES[name].slow else "launched")
    ddp, zero = (load_checkpoint(launched / f"{name}-{way}" / f"model_{LAST:05d}.pt") for way in ("ddp", "zero1"))
    for entry in ("model", "optimizer", "rng", "train_loader_state"):
        assert same(ddp[entry], zero[entry]), entry
    assert losses(launched / f"{name}-ddp") == losses(launched / f"{name}-zero1")


def test_a_checkpoint_goes_from_one_way_to_another_and_back_to_one_process(launched: Path, tmp_path: Path) -> None:
    """Steps of ddp, of fsdp and of zero1 on two processes, then of one process alone: as if nothing had happened."""
    shutil.copytree(launched / "relay", tmp_path / "relay")
    assert (
        "2 processes wrote the checkpoint" not in log(tmp_path / "relay") and steps_on_disk(tmp_path / "relay")[-1] == 6
    )
    run(launched, "odd", tmp_path / "relay", max_steps=9, auto_resume=True)
    run(launched, "odd", tmp_path / "alone", max_steps=9)
    relay, alone = (load_checkpoint(tmp_path / name / "model_00008.pt") for name in ("relay", "alone"))
    assert losses(tmp_path / "relay") == pytest.approx(losses(tmp_path / "alone"), rel=5e-6)
    assert len(set(losses(tmp_path / "alone"))) == 9
    assert relay["optimizer"]["adamw"].keys() == alone["optimizer"]["adamw"].keys() == alone["model"].keys()
    for name, state in alone["optimizer"]["adamw"].items():
        other = relay["optimizer"]["adamw"][name]
        assert state.keys() == other.keys() and state["step"] == other["step"] == 9
        torch.testing.assert_close(other["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(relay["model"][name], alone["model"][name], rtol=1e-3, atol=1e-4)


def test_each_process_has_half_of_what_is_shared_out(launched: Path) -> None:
    both = [json.loads((launched / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    numbers = sum(weight.numel() for weight in load_checkpoint(launched / "model.pt")["model"].values())
    for rank in both:
        assert rank["full-ddp"] == {"parameters": 4 * numbers, "optimizer": 8 * numbers}
        assert rank["full-zero1"]["parameters"] == 4 * numbers
        assert rank["full-zero1"]["optimizer"] == pytest.approx(4 * numbers, rel=0.1)
        assert rank["full-fsdp"] == {"parameters": 2 * numbers, "optimizer": 4 * numbers}
    assert sum(rank["full-zero1"]["optimizer"] for rank in both) == 8 * numbers
    for way in ("ddp", "zero1", "fsdp"):
        settings = FinetuneSettings(parallel=way, block_size=128, batch_size=1)  # type: ignore[arg-type]
        plan = plan_memory(settings, tiny_model(block_size=128).config, world_size=2)
        assert plan.optimizer == pytest.approx(both[0][f"full-{way}"]["optimizer"], rel=0.1), way
    odd = sum(weight.numel() for weight in load_checkpoint(launched / "odd.pt")["model"].values())
    assert sum(rank["odd-fsdp"]["parameters"] for rank in both) == 4 * odd
    assert both[0]["odd-fsdp"]["parameters"] > both[1]["odd-fsdp"]["parameters"], "31 rows are 16 and 15"


@pytest.mark.parametrize(("name", "way"), [("odd", "zero1"), ("odd", "fsdp"), ("dpo_lora", "fsdp")])
def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(
    launched: Path, alone: Alone, name: str, way: str
) -> None:
    folder = launched / f"stopped-{name}-{way}"
    for rank in (0, 1):
        shown = "model_00001.pt" if name == "dpo_lora" else "model_00002.pt"
        assert json.loads((folder / f"shown-{rank}.json").read_text()) == [shown]
    assert losses(folder) == pytest.approx(losses(alone(name)), rel=5e-6)
    for key, tensor in weights(alone(name), LAST).items():
        torch.testing.assert_close(weights(folder, LAST)[key], tensor, rtol=1e-3, atol=1e-4)


def test_a_step_that_is_not_finite_on_one_process_is_taken_by_none(launched: Path) -> None:
    folder = launched / "skip-fsdp"
    assert [record["step"] for record in records(folder) if record.get("skipped")] == [3]
    assert same(dict(weights(folder, 3)), dict(weights(folder, 2))), "a process took the step"
    assert not same(dict(weights(folder, 4)), dict(weights(folder, 3)))
    assert all(bool(tensor.isfinite().all()) for tensor in weights(folder, 4).values())


@pytest.mark.parametrize("way", ["zero1", "fsdp"])
def test_best_final_samples_and_kept_files_are_those_of_one_process(launched: Path, alone: Alone, way: str) -> None:
    one, two = alone("full"), launched / f"full-{way}"
    assert steps_on_disk(two) == steps_on_disk(one) == [2, 4]
    for name in ("best.pt", "final.pt"):
        ours, theirs = (load_checkpoint(folder / name, require_digest=True) for folder in (one, two))
        assert ours["step"] == theirs["step"] and "optimizer" not in theirs
        for key, tensor in ours["model"].items():
            torch.testing.assert_close(theirs["model"][key], tensor, rtol=1e-3, atol=1e-4)
    assert records(one, "samples.jsonl") == records(two, "samples.jsonl") and len(records(one, "samples.jsonl")) == 2


@pytest.mark.parametrize(("name", "way"), [("masked", "fsdp"), ("muon", "zero1")])
def test_what_is_pruned_stays_so(launched: Path, alone: Alone, name: str, way: str) -> None:
    base, after = (
        load_checkpoint(launched / "pruned.pt"),
        load_checkpoint(launched / f"{name}-{way}" / "model_00004.pt"),
    )
    assert same(base["masks"], after["masks"])
    assert same(*(zeros(payload["model"], base["masks"]) for payload in (base, after)))
    both = [log(folder).split("Sparsity: ")[1].splitlines()[0] for folder in (alone(name), launched / f"{name}-{way}")]
    assert both[0] == both[1], "of all rows, not of those of one process"


def test_bf16_trains_as_under_ddp(launched: Path) -> None:
    ddp, fsdp = launched / "bf16-ddp", launched / "bf16-fsdp"
    assert losses(fsdp) == pytest.approx(losses(ddp), rel=2e-3) and losses(fsdp)[-1] < losses(fsdp)[0] - 0.5
    assert all(tensor.dtype == torch.float32 for tensor in weights(fsdp, LAST).values())


def test_one_process_may_leave_its_weights_in_host_memory(launched: Path, alone: Alone, tmp_path: Path) -> None:
    with spied_trainers() as trainers:
        run(launched, "full", tmp_path, parallel="fsdp", cpu_offload=True)
    assert type(trainers[0].parallel).__name__ == "FullySharded" and not torch.distributed.is_initialized()
    assert losses(tmp_path) == pytest.approx(losses(alone("full")), rel=5e-6)
    assert held(trainers[0])["optimizer"] == 2 * held(trainers[0])["parameters"]


@pytest.mark.parametrize("way", ["ddp", "zero1", "fsdp"])
def test_with_one_process_nothing_is_spread(launched: Path, alone: Alone, tmp_path: Path, way: str) -> None:
    run(launched, "odd", tmp_path, parallel=way)
    assert same(dict(weights(tmp_path, LAST)), dict(weights(alone("odd"), LAST)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parallel": "ddp", "cpu_offload": True}, "--cpu_offload: --parallel ddp keeps weights where they compute"),
        ({"optimizer": "muon"}, "Muon orthogonalises whole matrices.*--parallel zero1"),
        ({"finetune_method": "p_tuning"}, "p_tuning keys and values leave the blocks"),
        ({"objective": "grpo", "reward": "length"}, "each process generates at its own pace"),
        ({"dtype": "float16"}, "float16 needs its loss scaled"),
    ],
)
def test_what_can_not_be_is_refused(launched: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run(launched, "full", tmp_path, **{"parallel": "fsdp", "cpu_offload": True, **changes})
