"""What a run knows about itself besides weights and optimizer; saved with each checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from formats.kinds import fits


@dataclass(frozen=True)
class Validation:
    """An evaluation over all processes: the mean loss, the number of windows, and means of the objective's metrics.

    The loss of supervised training is in nats per token; other objectives have losses, and metrics, of their own.
    """

    loss: float
    windows: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Progress:
    """Plain numbers only. Losses are sums in nats and counts of supervised tokens, so that means never drift."""

    step: int = -1  # index of the last completed update
    finished_step: bool = True  # its evaluation, samples and log line are done too
    val_loss: float | None = None
    val_loss_before: float | None = None  # of the weights the run started from
    best_val_loss: float | None = None
    best_step: int | None = None
    patience_loss: float | None = None  # the last validation loss that was lower by the threshold of early stopping
    waited: int = 0  # evaluations since then
    previous_train_loss: float | None = None  # mean between the two evaluations before the last
    since_eval_loss: float = 0.0
    since_eval_tokens: int = 0
    epoch_loss: float = 0.0
    epoch_tokens: int = 0
    tokens: int = 0  # token slots seen
    windows_per_step: int | None = None  # of the last step, over all processes
    skipped: int = 0  # steps not taken because something was not finite
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)  # of the last steps taken, for the spike guard
    rolled_back_to: int | None = None  # the step that it went back to last
    rollbacks: int = 0  # in a row to that step
    overfitting_warned: bool = False
    wandb_id: str | None = None
    last_record: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, loss_sum: float, supervised: int, tokens: int) -> None:
        """Count one step."""
        self.since_eval_loss += loss_sum
        self.since_eval_tokens += supervised
        self.epoch_loss += loss_sum
        self.epoch_tokens += supervised
        self.tokens += tokens

    def see_validation(self, val_loss: float, threshold: float = 0.0) -> tuple[bool, bool]:
        """Take in an evaluation; returns (is it the best so far, does the run over-fit).

        Over-fitting: the validation loss is above its best while the mean training loss went on falling since the
        evaluation before. Patience is renewed by a loss that is more than `threshold` below the one that renewed it
        last, so that many small steps down count as one when they add up.
        """
        if math.isfinite(val_loss) and (self.patience_loss is None or val_loss < self.patience_loss - threshold):
            self.patience_loss, self.waited = val_loss, 0
        else:
            self.waited += 1
        train_loss = self.since_eval_loss / self.since_eval_tokens if self.since_eval_tokens else None
        best = self.best_val_loss
        overfits = (
            best is not None
            and val_loss > best
            and train_loss is not None
            and self.previous_train_loss is not None
            and train_loss < self.previous_train_loss
        )
        if train_loss is not None:
            self.previous_train_loss = train_loss
        self.since_eval_loss, self.since_eval_tokens = 0.0, 0
        self.val_loss = val_loss
        improved = math.isfinite(val_loss) and (best is None or val_loss < best)
        if improved:
            self.best_val_loss, self.best_step = val_loss, self.step
        return improved, overfits

    def out_of_patience(self, patience: int) -> bool:
        """Whether early stopping ends the run after the last step; `patience` 0 = never."""
        return 0 < patience <= self.waited and self.finished_step

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """Raises ValueError for what an other version wrote and this one does not know."""
        try:
            progress = cls(**values)
        except TypeError as error:
            raise ValueError(f"the checkpoint's progress is not usable: {str(error)[:200]}") from None
        for name, hint in _hints().items():
            if not fits(getattr(progress, name), hint):
                shown = " ".join(repr(getattr(progress, name)).split())[:80]
                raise ValueError(f"the checkpoint's progress is damaged: {name} is {shown}")
        if progress.windows_per_step is not None and progress.windows_per_step < 1:
            raise ValueError("the checkpoint's progress is damaged: its steps have no windows")
        if (progress.best_step is None) is not (progress.best_val_loss is None):
            raise ValueError("the checkpoint's progress is damaged: the best step and its loss do not go together")
        if not all(isinstance(value, (int, float, type(None))) for value in progress.last_record.values()):
            raise ValueError("the checkpoint's progress is damaged: its last record holds something else than numbers")
        return progress


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Progress)
