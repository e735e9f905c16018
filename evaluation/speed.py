"""How fast a model generates on this machine: one decoding step of it against one of another form of it."""

from __future__ import annotations

import copy
import time
from statistics import median
from typing import NamedTuple

import torch

from model.cache import KVCache
from model.gpt import GPT
from model.pack import for_generation

_CONTEXT = 32  # tokens read before the steps that are timed


class StepTimes(NamedTuple):
    """Median seconds of a decoding step, one row."""

    dense: float
    sparse: float

    @property
    def speedup(self) -> float:
        """How many times as fast the sparse form is; below 1 it is slower."""
        return self.dense / self.sparse


def sparse_step_times(model: GPT, steps: int = 20) -> StepTimes:
    """What leaving out the zeros of a pruned model is worth here: its dense form against `weights="sparse"`.

    Steps alternate, so that a machine which slows down slows both. `model` stays as it is; two copies of it are made.
    Raises ValueError, with the reason, where its masks have no form that could be quicker on its device.
    """
    forms = [_Stepper(copy.deepcopy(model), weights, steps) for weights in ("float32", "sparse")]
    times = [[form.step() for form in forms] for _ in range(steps)]
    dense, sparse = (median(column) for column in zip(*times))
    return StepTimes(dense, sparse)


class _Stepper:
    """A model in the middle of a text."""

    @torch.inference_mode()
    def __init__(self, model: GPT, weights: str, steps: int) -> None:
        self.model = for_generation(model.eval(), weights)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=model.wte.weight.device)
        context = min(_CONTEXT, model.context_length - steps - 1)
        if context < 1:
            raise ValueError(f"{steps} steps do not fit into a context of {model.context_length} tokens: take fewer")
        self.cache = KVCache(1, context + steps + 1)
        model(self.token.expand(1, context), cache=self.cache, logits_for="last")
        self.step()  # what the first step alone allocates

    @torch.inference_mode()
    def step(self) -> float:
        """Seconds of one more token."""
        started = time.perf_counter()
        self.model(self.token, cache=self.cache)[0, -1, 0].item()  # a GPU is waited for
        return time.perf_counter() - started
