"""The one door that opens any model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.templates import PromptTemplate, template_from_spec
from data.tokenizer import Tokenizer, tokenizer_from_spec
from formats.checkpoint import load_checkpoint
from model.config import GPTConfig
from model.gpt import GPT


@dataclass
class OpenModel:
    """A network with what is needed to talk to it."""

    model: GPT
    tokenizer: Tokenizer
    template: PromptTemplate | None
    path: Path
    step: int | None
    val_loss: float | None


def open_model(ref: str | Path, device: str | torch.device = "cpu") -> OpenModel:
    """Open a checkpoint (full or weights-only) in evaluation mode on `device`.

    Raises FileNotFoundError or ValueError naming the file and what is wrong with it.
    """
    path = Path(ref)
    payload = load_checkpoint(path)
    model = build_model(payload, path)
    spec = payload.get("tokenizer")
    if not isinstance(spec, dict):
        raise ValueError(f"{path}: holds no tokenizer, so its tokens cannot be read")
    return OpenModel(
        model=model.to(device).eval(),
        tokenizer=tokenizer_from_spec(spec),
        template=template_from_spec(payload.get("template")),
        path=path,
        step=payload.get("step"),
        val_loss=payload.get("val_loss"),
    )


def build_model(payload: dict[str, Any], path: str | Path, **overrides: Any) -> GPT:
    """The network of a loaded checkpoint on the CPU; `overrides` change its config (dropout, say).

    Raises ValueError, with both sides, where names or shapes of the weights do not fit the config.
    """
    if not isinstance(payload["config"], dict):
        raise ValueError(f"{path}: its config is a {type(payload['config']).__name__}, expected a dict")
    try:
        config = GPTConfig.from_dict({**payload["config"], **overrides})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its config does not describe a network: {error}") from None
    with torch.device("meta"):  # no memory, no random numbers: every weight is replaced
        model = GPT(config)
    check_weights(model, payload["model"], path)
    # A checkpoint's tensors are mapped from its file, which may go away: they are copied, one at a time.
    copy = not payload.get("in_memory", False)
    weights = {name: tensor.to(torch.float32, copy=copy) for name, tensor in payload["model"].items()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(True)


def check_weights(model: GPT, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raises ValueError naming the first weight that is missing, unknown or of another shape."""
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise ValueError(f"{path}: lacks the weight {name} {tuple(tensor.shape)} that its config asks for")
        if weights[name].shape != tensor.shape:
            found, wanted = tuple(weights[name].shape), tuple(tensor.shape)
            raise ValueError(f"{path}: {name} has shape {found}, the network has {wanted}")
    unknown = [name for name in weights if name not in own]
    if unknown:
        raise ValueError(f"{path}: has the weight {unknown[0]}, which the network does not have")
