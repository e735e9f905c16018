"""The matrices of a network that a pruner may make sparse: those of its blocks, not the embedding nor the head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from model.gpt import GPT
from model.linear import Linear
from model.pruning.statistics import SITE_OF


def layer_matrices(model: GPT, layer: int) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a block that are there, by their names in it: "attn.q_proj", ...

    Raises ValueError for one that is no plain matrix (quantised, or under an adapter).
    """
    for linear in SITE_OF:
        part, _, name = linear.partition(".")
        module = getattr(getattr(model.h[layer], part), name, None)  # None: a sub-layer or a gate that is absent
        if module is None:
            continue
        if type(module) not in (Linear, nn.Linear):
            raise ValueError(
                f"h.{layer}.{linear} is a {type(module).__name__}: prune the plain model, neither quantised nor adapted"
            )
        yield linear, module


def matrices(model: GPT, layers: Iterable[int]) -> dict[str, nn.Linear]:
    """The linear layers of several blocks, by their full names: "h.0.attn.q_proj", ..."""
    return {f"h.{i}.{linear}": module for i in layers for linear, module in layer_matrices(model, i)}
