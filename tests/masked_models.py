"""Tiny pruned models: masks at random, weights that obey them, and their checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from formats.checkpoint import load_checkpoint, masks_entry, save_checkpoint
from model.gpt import GPT
from model.masks import Mask, apply_masks_
from tests.tiny_checkpoints import save_tiny, tiny_model

BLOCKS = {"q_proj": (16, 16), "down_proj": (5, 7), "o_proj": (1, 1)}  # by the end of a layer's name


def random_mask(shape: tuple[int, int], block: tuple[int, int], kept: float = 0.5, seed: int = 0) -> Mask:
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    return Mask(shape, block, torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < kept)


def prune(model: GPT, blocks: dict[str, tuple[int, int]], kept: float = 0.5) -> GPT:
    """`model` with random masks on the layers that `blocks` names, in place."""
    for name, weight in model.named_parameters():
        layer = name.split(".")[-2]
        if name.endswith("_proj.weight") and layer in blocks:
            model.masks[name] = random_mask(tuple(weight.shape), blocks[layer], kept, seed=len(model.masks))
    apply_masks_(model, model.masks)
    return model


def save_pruned(path: Path, seed: int = 0, blocks: dict | None = None, kept: float = 0.5, **overrides) -> GPT:
    """A checkpoint of a `tiny_model` that is pruned; returns its model."""
    save_tiny(path, seed, **overrides)
    payload, model = load_checkpoint(path), prune(tiny_model(seed, **overrides), blocks or BLOCKS, kept)
    save_checkpoint(path, {**payload, "model": model.state_dict(), **masks_entry(model.masks)})
    return model


def zeros(weights: dict[str, torch.Tensor], names) -> dict[str, torch.Tensor]:
    """Where these weights are zero."""
    return {name: weights[name] == 0 for name in names}
