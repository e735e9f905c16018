"""A loss or gradient that is not finite: whose it is, told to every process alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from data.loader import Loader
from training.distributed import Dist
from training.parallel import Parallel

MAX_SKIPPED_IN_A_ROW = 10
_NAMED = 3  # micro-batches and parameters that a message names; the rest are counted


class NonFiniteLoss(ValueError):
    """A loss or gradient that is not finite stopped the run."""


def culprits(parallel: Parallel, loader: Loader, losses: Mapping[int, float], samples: Sequence[Sequence[int]]) -> str:
    """One sentence on what made a step unusable. Every process calls it, with gradients as they were before clipping.

    losses: of this process, by the number of the micro-batch. samples: the global numbers of each micro-batch's. Where
    every loss is finite it names parameters instead: gradients are summed over processes before anybody looks at them,
    so that whose micro-batch began it is no longer known.
    """
    here = parallel.here
    broken = [number for number, loss in losses.items() if not math.isfinite(loss)]
    found = [f"rank {here.rank}, micro-batch {number}: {loader.locate(samples[number])}" for number in sorted(broken)]
    if everywhere := _of_all(here, found):
        return "Not finite: " + _some(everywhere, "; ")
    gradients = {name: parameter.grad for name, parameter in parallel.model.named_parameters()}
    parts = {name: parallel.local(gradient) for name, gradient in gradients.items() if gradient is not None}
    names = [name for name, part in parts.items() if not torch.isfinite(part).all()]
    return "The losses are finite, the gradients are not of " + _some(_of_all(here, names), ", ")


def _of_all(here: Dist, texts: Sequence[str]) -> list[str]:
    """The texts of all processes, in order of rank, each once."""
    return list(dict.fromkeys(text for each in here.gather(texts) for text in each))


def _some(texts: Sequence[str], between: str) -> str:
    more = f"{between}and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return between.join(texts[:_NAMED]) + more
