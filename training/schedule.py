"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `max_lr`, then one of four shapes down to `max_lr * min_ratio` at the last step.

    cosine: half a cosine (Loshchilov & Hutter 2017); linear: a straight line; wsd: the peak is held, then falls
    linearly over the last `decay_ratio` of all steps (Hu et al. 2024, arXiv:2404.06395); constant: the peak is held.
    """

    shape: str
    max_lr: float
    min_ratio: float
    warmup_steps: int
    max_steps: int
    decay_ratio: float = 0.2

    def __post_init__(self) -> None:
        if self.max_lr < 0 or not math.isfinite(self.max_lr):
            raise ValueError(f"--max_lr {self.max_lr}: expected a number of at least 0")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"--min_lr_ratio {self.min_ratio}: expected a share between 0 and 1")
        if not 0 <= self.decay_ratio <= 1:
            raise ValueError(f"--decay_ratio {self.decay_ratio}: expected a share between 0 and 1")
        if self.warmup_steps < 0:
            raise ValueError(f"--warmup_steps {self.warmup_steps}: expected at least 0")

    def __call__(self, step: int) -> float:
        """Learning rate of the 0-based step; the first warm-up step already moves (lr = max_lr / warmup_steps)."""
        if step < self.warmup_steps:
            return self.max_lr * (step + 1) / self.warmup_steps
        return self.max_lr * (self.min_ratio + (1 - self.min_ratio) * self._height(step))

    def _height(self, step: int) -> float:
        """From 1 at the end of the warm-up to 0 at the last step."""
        last = self.max_steps - 1
        start = self.warmup_steps
        if self.shape == "wsd":
            start = max(start, self.max_steps - round(self.decay_ratio * self.max_steps))
        if self.shape == "constant" or last <= start:
            return 1.0
        done = min(max((step - start) / (last - start), 0.0), 1.0)
        return 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done
