"""The model that a run started from, which preference and policy losses measure a change against."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.adapter import base_entry
from formats.checkpoint import masks_entry
from formats.open_model import build_model, load_base
from model.gpt import GPT
from model.tuning import METHODS, adapters_off
from training.distributed import Dist
from training.run_settings import FinetuneSettings
from training.settings import is_explicit
from training.start import Start


class Reference:
    """The trained model with its adapter switched off, for no memory; without an adapter, a frozen copy."""

    def __init__(self, model: GPT, frozen: GPT | None) -> None:
        self.model, self.frozen = model, frozen

    def losses(self, inputs: Tensor, targets: Tensor, **more: Any) -> Tensor:
        """The loss of each position (B, T), as `GPT.forward` gives it with reduction="none"."""
        off = adapters_off(self.model) if self.frozen is None else nullcontext()
        with torch.no_grad(), off:
            return (self.model if self.frozen is None else self.frozen)(inputs, targets, reduction="none", **more)

    def describe(self) -> str:
        """For the line on the objective."""
        return "the model without its adapter" if self.frozen is None else "a frozen copy of the start's weights"


def open_reference(
    settings: FinetuneSettings, here: Dist, start: Start, model: GPT, folder: Path
) -> tuple[Reference, dict[str, Any]]:
    """The reference of a run that trains `model`, and the entries by which a resumed run finds it again.

    Raises ValueError or FileNotFoundError where there is none, or another than the run began with.
    """
    if start.payload is None or start.path is None:
        raise ValueError(
            f"--objective {settings.objective} compares with the model that it starts from: name one with "
            "--pretrained_checkpoint"
        )
    if settings.adapter is not None:
        raise ValueError(
            f"--adapter {settings.adapter}: with --objective {settings.objective} the reference would be its base, "
            "not what it has learnt: merge it (export.py merge) and start from that"
        )
    if METHODS[settings.finetune_method].adapts:
        return Reference(model, None), {}
    if start.resumes:
        entry = start.payload["reference"]
        other = settings.pretrained_checkpoint if is_explicit(settings, "pretrained_checkpoint") else None
        path = start.path
        payload = here.from_main(lambda: load_base({"base": entry}, path, other))
        frozen = build_model(payload, entry["name"])
    else:
        entry = base_entry({"model": model.state_dict(), **masks_entry(model.masks)}, str(start.path), folder)
        frozen = copy.deepcopy(model)
    return Reference(model, frozen.eval().requires_grad_(False)), {"reference": entry}
