"""What test_training_processes.py launches under torchrun: runs on two processes, one after another.

    torchrun --standalone --nproc_per_node 2 tests/two_processes.py FOLDER

FOLDER holds the data sets and gets a folder of each run, and what each process saw in NAME-RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import errno

import torch

from tests.runs import BARE, changed_losses, magnified, poison, spied_batches, train, tune

RANK = int(os.environ.get("RANK", 0))
# One process takes 4 micro-batches of one window a step, two take 2 each.
STEP: dict[str, Any] = {"batch_size": 1, "total_batch_size": 512, "max_steps": 6, "dropout": 0.0, "max_lr": 1e-2}
STEP |= {**BARE, "lr_schedule": "constant"}  # so that a run of more steps begins like one of fewer


def plain(folder: Path) -> dict[str, Any]:
    """A fine-tuning whose micro-batches differ in supervised tokens, with evaluation and checkpoints."""
    return tune(folder / "records", folder / "plain", folder / "model.pt", **{**STEP, "eval_interval": 2})


# Dropout off, LoRA's too: each process would draw its own.
LORA: dict[str, Any] = {"finetune_method": "lora", "lora_r": 4, "lora_dropout": 0.0, "use_dora": True}
PROGRESSIVE: dict[str, Any] = {"finetune_method": "progressive", "unfreeze_stages": 2, "layer_lr_decay": 0.5}


def distillation(folder: Path) -> dict[str, Any]:
    """The settings of it."""
    return {"objective": "distill", "teacher": str(folder / "teacher.pt"), "distill_hard": 0.2, "distill_hidden": 0.5}


def lora(folder: Path) -> dict[str, Any]:
    """A fine-tuning of few parameters: the rest is not in the gradients that travel."""
    return tune(folder / "records", folder / "lora", folder / "model.pt", **{**STEP, **LORA})


def masked(folder: Path) -> dict[str, Any]:
    """A pruned model under Muon, whose every step refills what is pruned."""
    return tune(folder / "records", folder / "masked", folder / "pruned.pt", **{**STEP, "optimizer": "muon"})


def progressive(folder: Path) -> dict[str, Any]:
    """Half of the layers join in the middle of the run: from then on their gradients must travel too."""
    return tune(folder / "records", folder / "progressive", folder / "model.pt", **{**STEP, **PROGRESSIVE})


def distill(folder: Path) -> dict[str, Any]:
    """A fine-tuning towards a teacher's predictions and streams."""
    return tune(folder / "records", folder / "distill", folder / "model.pt", **{**STEP, **distillation(folder)})


def dropout(folder: Path) -> dict[str, Any]:
    """With dropout: each process has random states of its own."""
    return train(folder / "text", folder / "dropout", **{**STEP, "dropout": 0.1})


def nan(folder: Path) -> dict[str, Any]:
    """The second process alone meets a loss that is not finite, in step 3."""
    with changed_losses(poison(7) if RANK == 1 else poison()):
        return train(folder / "text", folder / "nan", **STEP)


def skip(folder: Path) -> dict[str, Any]:
    """The same, and the run goes on without that step."""
    more = {"nan_policy": "skip", "checkpoint_interval": 1, "keep_last_n_checkpoints": 0}
    with changed_losses(poison(7) if RANK == 1 else poison()):
        return train(folder / "text", folder / "skip", **{**STEP, **more})


def spike(folder: Path) -> dict[str, Any]:
    """In step 25 the loss of the second process's last window rises, which is not much of the whole: both go back."""
    with magnified(range(103, 104), 1000.0):
        more = {"spike_guard": 4.0, "checkpoint_interval": 10, "max_steps": 28, "max_lr": 1e-3}
        return train(folder / "text", folder / "spike", **{**STEP, **more})


def broken_disk(folder: Path) -> dict[str, Any]:
    """No save works after step 1, on rank 0, which alone writes: after five both leave."""
    save = torch.save

    def fail(payload: dict[str, Any], file: Any) -> None:
        if payload.get("step") != 1:
            raise OSError(errno.EIO, "Input/output error")
        save(payload, file)

    with mock.patch.object(torch, "save", fail):
        more = {"checkpoint_interval": 1, "max_steps": 12}
        return train(folder / "text", folder / "broken_disk", **{**STEP, **more})


def full_disk(folder: Path) -> dict[str, Any]:
    """The save of step 2 fails on rank 0. Amid step 3 the second process alone gets a signal: both must save step 2."""
    with failing_save(2), signalled(6):
        return train(folder / "text", folder / "full_disk", **{**STEP, "checkpoint_interval": 2})


@contextmanager
def failing_save(step: int) -> Iterator[None]:
    """torch.save finds the disk full the first time it is asked to write this step."""
    save, failed = torch.save, False

    def fail(payload: dict[str, Any], file: Any) -> None:
        nonlocal failed
        if payload.get("step") == step and "optimizer" in payload and not failed:
            failed = True
            raise OSError(errno.ENOSPC, "No space left on device")
        save(payload, file)

    with mock.patch.object(torch, "save", fail):
        yield


@contextmanager
def signalled(number: int) -> Iterator[None]:
    """The second process gets SIGTERM in its micro-batch of this number."""

    def act(count: int, loss: torch.Tensor) -> torch.Tensor:
        if count == number and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with changed_losses(act):
        yield


def observed(run: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What this process saw of the run: its samples, its supervised tokens, its summary or error."""
    with spied_batches() as batches:
        try:
            outcome: dict[str, Any] = {"summary": run(folder)}
        except (ValueError, OSError) as error:
            outcome = {"error": str(error)}
    samples = [batch.samples for batch in batches]
    return {**outcome, "samples": samples, "supervised": [batch.supervised for batch in batches]}


if __name__ == "__main__":
    where = Path(sys.argv[1])
    # One process group serves all runs: the store of torchrun does not take a second one.
    with mock.patch("training.launch.close_distributed", lambda here: None):
        for case in (plain, lora, masked, progressive, distill, dropout, nan, skip, full_disk, spike, broken_disk):
            seen = observed(case, where)
            (where / f"{case.__name__}-{RANK}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()
