"""What test_training_parallel.py launches under torchrun: the same work under each way of spreading a network.

    torchrun --standalone --nproc_per_node 2 tests/parallel_processes.py FOLDER NAME…

FOLDER holds data sets and models, and gets a folder CASE-WAY of each run, and what each process held in held-RANK.json.
A NAME is one of CASES or of TALES.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tests.runs import BARE, changed_losses, poison, train, tune
from training.loop import Trainer

RANK = int(os.environ.get("RANK", 0))
# One process takes 4 micro-batches of one window a step, two take 2 each. No dropout: each process draws its own.
STEP: dict[str, Any] = {"batch_size": 1, "total_batch_size": 512, "max_steps": 5, "dropout": 0.0, "max_lr": 1e-2}
STEP |= {**BARE, "lr_schedule": "constant", "dist_timeout": 30}


@dataclass(frozen=True)
class Case:
    """A run: its data set, the model it starts from (None: random weights), its settings, and the ways to spread it."""

    data: str
    start: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    ways: tuple[str, ...] = ("fsdp",)
    slow: bool = False


# All that happens between steps: 12 windows of validation make an unequal number of batches of 5.
BUSY: dict[str, Any] = {"eval_interval": 2, "eval_batch_size": 5, "generate_interval": 3, "checkpoint_interval": 2}
BUSY |= {"packing": False, "load_best_model_at_end": True, "async_save": "on"}
# Of rank 1: of A's only row the second process has none.
LORA: dict[str, Any] = {"finetune_method": "lora", "lora_r": 1, "lora_dropout": 0.0, "use_dora": True}
PROGRESSIVE: dict[str, Any] = {"finetune_method": "progressive", "unfreeze_stages": 2, "layer_lr_decay": 0.5}
PAIRS: dict[str, Any] = {"objective": "dpo", "max_lr": 1e-3}
GRPO: dict[str, Any] = {"objective": "grpo", "grpo_group": 2, "grpo_max_new_tokens": 4, "max_lr": 1e-3}
GRPO |= {"reward": f"{Path(__file__).with_name('reward_functions.py')}:letters"}
DISTILL: dict[str, Any] = {"objective": "distill", "distill_hard": 0.2, "distill_hidden": 0.5}

CASES = {
    "full": Case("records", "model", BUSY, ("ddp", "zero1", "fsdp")),
    "pretrain": Case("text", None, {"gradient_checkpointing": True}),
    "odd": Case("text", "odd"),
    "lora": Case("records", "model", {**LORA, **BUSY}),
    "progressive": Case("records", "model", PROGRESSIVE, ("ddp", "zero1", "fsdp")),
    "masked": Case("records", "pruned"),
    "muon": Case("records", "pruned", {"optimizer": "muon"}, ("ddp", "zero1")),
    "dpo": Case("pairs", "model", {**PAIRS, "eval_interval": 2, "eval_batch_size": 1}),
    "dpo_lora": Case("pairs", "model", {**PAIRS, **LORA, "eval_interval": 2, "eval_batch_size": 1}),
    "offload": Case("records", "model", {"cpu_offload": True, "gradient_checkpointing": True}),
    "bf16": Case("records", "model", {"dtype": "bfloat16", "generate_interval": 3}, ("ddp", "fsdp")),
    "lora_plus": Case("records", "model", {**LORA, "lora_plus_ratio": 4.0}, ("ddp", "zero1"), slow=True),
    "masked_zero1": Case("records", "pruned", {}, ("zero1",), slow=True),
    "masked_lora": Case("records", "pruned", LORA, slow=True),
    "dpo_zero1": Case("pairs", "model", {**PAIRS, "eval_interval": 2}, ("zero1",), slow=True),
    "grpo": Case("records", "model", GRPO, ("ddp", "zero1"), slow=True),
    "distill": Case("records", "pruned", DISTILL, slow=True),
    "freeze": Case("records", "model", {"finetune_method": "freeze", "train_layers": 1}, slow=True),
    "qlora": Case("records", "model", {"finetune_method": "qlora", "lora_dropout": 0.0}, slow=True),
    "adapter": Case("records", "model", {"finetune_method": "adapter", "adapter_dropout": 0.0}, slow=True),
    "prefix": Case("records", "model", {"finetune_method": "prefix", "prefix_length": 4}, slow=True),
    "compiled": Case("text", "odd", {"compile": "on", "generate_interval": 3}, slow=True),
}


def run(folder: Path, name: str, to: Path, **changes: Any) -> dict[str, Any]:
    """One case, with its records and checkpoints in the folder `to`."""
    case = CASES[name]
    settings = {**STEP, **case.settings, **changes}
    if case.settings.get("objective") == "distill":
        settings["teacher"] = str(folder / "model.pt")
    if case.start is None:
        return train(folder / case.data, to, **settings)
    return tune(folder / case.data, to, folder / f"{case.start}.pt", **settings)


@contextmanager
def spied_trainers() -> Iterator[list[Trainer]]:
    """The trainers of the runs inside."""
    seen: list[Trainer] = []

    class Spy(Trainer):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            seen.append(self)

    with mock.patch("training.launch.Trainer", Spy):
        yield seen


def held(trainer: Trainer) -> dict[str, int]:
    """Bytes of parameters and of optimizer state that this process has."""
    parallel = trainer.parallel
    states = [parallel.part(optimizer).state for optimizer in trainer.optimizers.values()]
    numbers = [value for state in states for values in state.values() for value in values.values() if value.ndim]
    tensors = {"parameters": trainer.model.parameters(), "optimizer": numbers}
    return {
        name: sum(parallel.local(tensor).numel() * tensor.element_size() for tensor in each)
        for name, each in tensors.items()
    }


def relay(folder: Path) -> None:
    """Two processes carry a run on, from one way to another: ddp, then fsdp, then zero1."""
    for way, steps in (("ddp", 2), ("fsdp", 4), ("zero1", 7)):
        run(folder, "odd", folder / "relay", parallel=way, max_steps=steps, auto_resume=True, checkpoint_interval=1)


@contextmanager
def signalled(number: int) -> Iterator[None]:
    """The second process gets SIGTERM when it begins its micro-batch of this number, also of a loss without dropout."""
    take, count = Trainer._micro_step, 0

    def patched(self: Trainer, *args: Any, **more: Any) -> Any:
        nonlocal count
        if count == number and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        count += 1
        return take(self, *args, **more)

    with mock.patch.object(Trainer, "_micro_step", patched):
        yield


def stopped(folder: Path) -> None:
    """A signal reaches the second process alone, in a micro-batch of this number; then the run goes on.

    In the first of step 3; in the last of step 1, to be noticed while the reference reads the pairs of step 2.
    """
    for name, way, number in (("odd", "zero1", 6), ("odd", "fsdp", 6), ("dpo_lora", "fsdp", 3)):
        to = folder / f"stopped-{name}-{way}"
        with signalled(number):
            run(folder, name, to, parallel=way)
        shown = [path.name for path in to.glob("model_*.pt")]
        run(folder, name, to, parallel=way, auto_resume=True)
        (to / f"shown-{RANK}.json").write_text(json.dumps(shown))


def skip(folder: Path) -> None:
    """The second process alone meets a loss that is not finite, in step 3, which nobody takes."""
    with changed_losses(poison(7) if RANK == 1 else poison()):
        more = {"nan_policy": "skip", "checkpoint_interval": 1, "keep_last_n_checkpoints": 0}
        run(folder, "odd", folder / "skip-fsdp", parallel="fsdp", **more)


TALES = {"relay": relay, "stopped": stopped, "skip": skip}


def main(folder: Path, names: list[str]) -> None:
    """The cases and tales of these names, one after the other."""
    found: dict[str, dict[str, int]] = {}
    for name in names:
        for way in CASES[name].ways if name in CASES else ():
            with spied_trainers() as trainers:
                run(folder, name, folder / f"{name}-{way}", parallel=way)
            found[f"{name}-{way}"] = held(trainers[-1])
        if name in TALES:
            TALES[name](folder)
    (folder / f"held-{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    # One process group serves all runs: the store of torchrun does not take a second one.
    with mock.patch("training.launch.close_distributed", lambda here: None):
        main(Path(sys.argv[1]), sys.argv[2:])
    torch.distributed.destroy_process_group()
