"""Tiny adapters whose tensors are all far from where they start, so that each matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from formats.adapter import adapter_entry, base_entry
from formats.checkpoint import save_checkpoint
from formats.open_model import build_model, load_payload
from model.lora import LoraSettings
from model.tuning import adapter_state, apply_method


def make_adapter(base: Path, path: Path, method: str = "lora", settings: Any = None, seed: int = 0) -> Path:
    """The file `path` of an adapter for the model `base`, with random tensors of a tenth."""
    payload = load_payload(base)
    settings = LoraSettings(rank=4, dropout=0.0) if settings is None and method == "lora" else settings
    torch.manual_seed(seed)
    model = apply_method(build_model(payload, base), method, settings)
    for tensor in adapter_state(model).values():
        tensor.add_(0.1 * torch.randn_like(tensor))
    about = {key: payload.get(key) for key in ("config", "tokenizer", "template")}
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {"adapter": adapter_entry(method, settings), "base": base_entry(payload, str(base), path.parent)}
    save_checkpoint(path, {"model": adapter_state(model), **about, **entries})
    return path
