"""What the training loop asks of an objective, and supervised training, the simplest one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from data.loader import Batch, Unit
from evaluation.perplexity import mean_loss
from model.gpt import GPT

Sums = dict[str, Tensor] | dict[str, float]  # of metrics, by name


class Objective(Protocol):
    """A step prepares its micro-batches, then makes `updates` passes over them: loss, backward, one optimizer step.

    The loss is a mean over what `count` counts in all micro-batches of all processes, so each process gives sums.
    Metrics are means of the same kind; their names hold a slash and are the same in every step and process.
    """

    unit: Unit  # what a sample of the loader is
    counts: str  # what the loss is a mean over, as the records call it
    metrics: tuple[str, ...]
    updates: int  # optimizer updates from the same micro-batches
    dropout: bool  # whether the network drops out while it trains
    beside: GPT | None  # a frozen network that it compares with
    new_tokens: int  # room that a sample leaves in the context for what is generated
    comparable: bool  # whether validation measures what training lowers: else a gap between them is no over-fitting

    def describe(self) -> str | None:
        """One line for the summary at the start, if there is something to say."""

    def prepare(self, step: int, batches: list[Batch]) -> Sequence[Any] | None:
        """What is known before the step's first update, in place of the batches; None when a stop was asked for.

        Raises RewardError, on one process alone maybe.
        """

    def count(self, batch: Any) -> int:
        """How much of what the loss is a mean over is in a prepared micro-batch."""

    def loss(self, network: nn.Module, batch: Any) -> tuple[Tensor, Sums]:
        """The summed loss of a prepared micro-batch through `network` (DDP or not), and the sums of the metrics."""

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int, Sums] | None:
        """(summed loss, count, sums of metrics) without training; None and errors as in `prepare`."""


class Supervised:
    """The negative log-likelihood of the supervised tokens."""

    unit: Unit = "window"
    counts = "supervised_tokens"
    metrics: tuple[str, ...] = ()
    updates, dropout, new_tokens, comparable = 1, True, 0, True
    beside: GPT | None = None

    def __init__(self, model: GPT) -> None:
        self.model = model

    def describe(self) -> None:
        """Nothing beyond what every summary says."""

    def prepare(self, step: int, batches: list[Batch]) -> list[Batch]:
        """The batches hold all that is needed."""
        return batches

    def count(self, batch: Batch) -> int:
        """Supervised tokens."""
        return batch.supervised

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Sums]:
        """Nats, summed over the supervised tokens."""
        batch = batch.to(self.model.device)
        return network(batch.inputs, batch.targets, positions=batch.positions, doc_ids=batch.doc_ids), {}

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int, Sums]:
        """The same without dropout."""
        return *mean_loss(self.model, batches), {}
