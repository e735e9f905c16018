"""Direct preference optimisation (Rafailov et al. 2023): of two answers, the better one gains on the worse one.

How much the policy prefers an answer y to a prompt x, in comparison with the reference, is its implicit reward,

    r(x, y) = beta (log pi(y | x) - log pi_ref(y | x)),

with log-probabilities summed over the answer's tokens. The loss of a pair is -log sigmoid(r(chosen) - r(rejected)).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import Batch, Unit
from model.gpt import GPT
from training.objectives.objective import Sums
from training.objectives.reference import Reference
from training.run_settings import FinetuneSettings
from training.stop import StopRequest


@dataclass
class Pairs:
    """A micro-batch of pairs, two rows each, with the log-probability that the reference gives each row (2 B,)."""

    batch: Batch
    reference: Tensor

    @property
    def samples(self) -> list[int]:
        return self.batch.samples


class DPO:
    """Losses and metrics are means over pairs. Dropout is off, or the rewards would measure its noise as well."""

    unit: Unit = "pair"
    counts = "pairs"
    metrics: tuple[str, ...] = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    updates, dropout, new_tokens, comparable = 1, False, 0, True

    def __init__(self, settings: FinetuneSettings, model: GPT, reference: Reference, stop: StopRequest) -> None:
        if not settings.dpo_beta > 0:
            raise ValueError(f"--dpo_beta {settings.dpo_beta}: expected more than 0")
        if not 0 <= settings.label_smoothing < 0.5:
            raise ValueError(f"--label_smoothing {settings.label_smoothing}: expected at least 0 and less than 0.5")
        if settings.dpo_loss == "ipo" and settings.label_smoothing:
            raise ValueError("--label_smoothing has no meaning with --dpo_loss ipo: leave it out")
        self.model, self.reference, self.stop = model, reference, stop
        self.beside = reference.frozen
        self.beta, self.kind, self.smoothing = settings.dpo_beta, settings.dpo_loss, settings.label_smoothing

    def describe(self) -> str:
        """Which loss, and against what."""
        return f"dpo, {self.kind} loss, beta {self.beta:g}; reference: {self.reference.describe()}; dropout is off"

    def prepare(self, step: int, batches: list[Batch]) -> list[Pairs] | None:
        """What the reference says of each answer. It is not under autocast together with the training forward, whose
        autocast would take over the weights that this one cast, which have no gradient.
        """
        prepared = []
        for batch in batches:
            if self.stop.requested:
                return None
            prepared.append(self._with_reference(batch))
        return prepared

    def count(self, pairs: Pairs) -> int:
        """Pairs."""
        return len(pairs.samples)

    def loss(self, network: nn.Module, pairs: Pairs) -> tuple[Tensor, Sums]:
        """Summed over the pairs."""
        batch = pairs.batch
        policy = -network(batch.inputs, batch.targets, reduction="none").sum(1)  # (2 B,)
        rewards = self.beta * (policy - pairs.reference)  # (2 B,)
        chosen, rejected = rewards.view(-1, 2).unbind(1)  # (B,) each
        margins = chosen - rejected
        sums = {
            "rewards/chosen": chosen.sum().detach(),
            "rewards/rejected": rejected.sum().detach(),
            "rewards/margins": margins.sum().detach(),
            "rewards/accuracies": (margins > 0).float().sum(),
        }
        return self.losses(margins).sum(), sums

    def losses(self, margins: Tensor) -> Tensor:
        """The loss of each pair from its margin r(chosen) - r(rejected), (B,)."""
        if self.kind == "ipo":  # Azar et al. 2023, equation 17: the margin of log-probabilities is to be 1 / (2 beta)
            return (margins / self.beta - 1 / (2 * self.beta)) ** 2
        return -(1 - self.smoothing) * F.logsigmoid(margins) - self.smoothing * F.logsigmoid(-margins)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int, Sums]:
        """The same on pairs that are not trained on."""
        loss_sum, count, sums = 0.0, 0, dict.fromkeys(self.metrics, 0.0)
        for batch in batches:
            pairs = self._with_reference(batch)
            loss, metrics = self.loss(self.model, pairs)
            if not pairs.samples:  # blank: another process had a batch
                continue
            loss_sum, count = loss_sum + float(loss), count + self.count(pairs)
            sums = {name: sums[name] + float(metrics[name]) for name in self.metrics}
        return loss_sum, count, sums

    def _with_reference(self, batch: Batch) -> Pairs:
        batch = batch.to(self.model.device)
        return Pairs(batch, -self.reference.losses(batch.inputs, batch.targets).sum(1))
