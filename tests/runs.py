"""Whole runs in this process, without the pictures at the end, and what they left; spies and poison for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from data.loader import Batch, Loader
from formats.checkpoint import load_checkpoint
from model.gpt import GPT
from tests.tiny import finetune_settings, train_settings
from training.launch import finetune, pretrain
from training.objectives.objective import Supervised

# No evaluation, samples or checkpoints but the last: for tests of the steps alone.
BARE: dict[str, Any] = {"eval_interval": 0, "generate_interval": 0, "checkpoint_interval": 0}


@contextmanager
def without_pictures() -> Iterator[None]:
    """Curves and page would be half of a tiny run's time."""
    with (
        mock.patch("report.curves.plot_curves", lambda folder: folder / "curves.png"),
        mock.patch("report.run.run_page", lambda folder: folder / "run.html"),
    ):
        yield


def train(data_dir: Path, log_dir: Path, **changes: Any) -> dict[str, Any]:
    """A tiny pretraining; its summary."""
    with without_pictures():
        return pretrain(train_settings(data_dir, log_dir, **changes))


def tune(data_dir: Path, log_dir: Path, pretrained: Path, **changes: Any) -> dict[str, Any]:
    """A tiny fine-tuning; its summary."""
    with without_pictures():
        return finetune(finetune_settings(data_dir, log_dir, pretrained, **changes))


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a record file."""
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder)]


def log(folder: Path) -> str:
    """What the terminal showed."""
    return (folder / "training.log").read_text("utf-8")


def status(folder: Path) -> str:
    return str(json.loads((folder / "status.json").read_text())["state"])


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Of a checkpoint, by name."""
    model: dict[str, torch.Tensor] = load_checkpoint(folder / f"model_{step:05d}.pt", require_digest=True)["model"]
    return model


def steps_on_disk(folder: Path) -> list[int]:
    return sorted(int(file.stem[6:]) for file in folder.glob("model_*.pt"))


@contextmanager
def spied_batches() -> Iterator[list[Batch]]:
    """Every batch that training takes, in order (the one checked forward before it is not among them)."""
    taken: list[Batch] = []

    class Spy(Loader):
        def next_batch(self) -> Batch:
            batch = super().next_batch()
            taken.append(batch)
            return batch

        def load_state(self, state: dict[str, Any]) -> None:
            taken.clear()
            super().load_state(state)

    with mock.patch("training.launch.Loader", Spy):
        yield taken


@contextmanager
def changed_losses(change: Callable[[int, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """`change(n, loss)` stands for the loss of the n-th training micro-batch, n from 0."""
    forward, count = GPT.forward, 0

    def patched(self: GPT, *args: Any, **more: Any) -> torch.Tensor:
        nonlocal count
        out = forward(self, *args, **more)
        if self.training and torch.is_grad_enabled():
            out = change(count, out)
            count += 1
        return out

    with mock.patch.object(GPT, "forward", patched):
        yield


def poison(*numbers: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """NaN for the micro-batches of these numbers."""
    return lambda number, loss: loss * float("nan") if number in numbers else loss


@contextmanager
def magnified(samples: range, factor: float, before: Callable[[int], None] = lambda first: None) -> Iterator[None]:
    """The loss of micro-batches that begin with one of these samples, multiplied; `before` hears each one's first."""
    loss = Supervised.loss

    def patched(self: Supervised, network: Any, batch: Batch) -> Any:
        before(batch.samples[0])
        value, sums = loss(self, network, batch)
        return value * (factor if batch.samples[0] in samples else 1.0), sums

    with mock.patch.object(Supervised, "loss", patched):
        yield
