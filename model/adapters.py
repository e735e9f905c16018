"""Bottleneck adapters: small trained networks between frozen layers (Houlsby et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.gpt import GPT, Block

PLACEMENTS = ("block", "houlsby")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Sizes and places of the adapters; ValueError if out of range."""

    dim: int = 64  # width of the bottleneck
    dropout: float = 0.1  # on the bottleneck
    placement: str = "block"  # after each block; "houlsby": after attention and after the MLP, before the sum

    def __post_init__(self) -> None:
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim < 1:
            raise ValueError(f"adapter dim is {self.dim!r}: give a whole number of at least 1")
        number = isinstance(self.dropout, (int, float)) and not isinstance(self.dropout, bool)
        if not number or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"adapter dropout is {self.dropout!r}: give a probability from 0 to below 1")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"adapter placement is {self.placement!r}: choose one of {', '.join(PLACEMENTS)}")


class Bottleneck(nn.Module):
    """x + up(dropout(relu(down(x)))), in fp32 parameters. `up` starts at zero, so that at first nothing changes."""

    def __init__(self, width: int, settings: AdapterSettings, device: torch.device | None = None) -> None:
        super().__init__()
        self.enabled = True
        self.dropout = settings.dropout
        self.down = nn.Linear(width, settings.dim, device=device)
        self.up = nn.Linear(settings.dim, width, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> (..., width)."""
        if not self.enabled:
            return x
        inner = F.dropout(F.relu(_linear(self.down, x)), self.dropout, self.training)
        return x + _linear(self.up, inner)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """What a file must hold, by name within this module: all of it."""
        return dict(self.named_parameters())


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """In the type of x: parameters that train stay fp32 on a base in bf16."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def apply_adapters(model: GPT, settings: AdapterSettings) -> GPT:
    """Adds `adapter` to each block, or to its attention and MLP, in place, and freezes all else; returns the model.

    The block's own output passes through it by a hook, so that no code and no name of the base changes.
    """
    model.requires_grad_(False)
    device = model.wte.weight.device
    for module in list(_hosts(model, settings.placement)):
        if hasattr(module, "adapter"):
            raise ValueError("this model has adapters already: start from its base")
        module.add_module("adapter", Bottleneck(model.config.n_embd, settings, device))
        module.register_forward_hook(_through_adapter)
    return model


def _hosts(model: GPT, placement: str) -> Iterator[nn.Module]:
    """The modules whose output is adapted; a sub-layer of size 0 does not exist."""
    for block in model.h:
        if placement == "block":
            yield block
        else:
            assert isinstance(block, Block)
            yield from (module for module in (block.attn, block.mlp) if module is not None)


def _through_adapter(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    adapter = module.adapter
    assert isinstance(adapter, Bottleneck)
    return adapter(out)
