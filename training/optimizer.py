"""Optimizers and their state under parameter names.

The state is {optimizer name: {parameter name: state}}, never by index: freezing, unfreezing and another split between
Muon and AdamW must not shift it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from training.muon import Float32Muon

State = dict[str, dict[str, dict[str, Any]]]
# What torch's optimizers remember of a parameter.
_REMEMBERED = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "muon": {"momentum_buffer"}}


class Placement:
    """Where the state of optimizers lies: here, all of it, in whole tensors. Processes may share it otherwise."""

    def make(
        self, kind: type[torch.optim.Optimizer], groups: list[dict[str, Any]], **options: Any
    ) -> torch.optim.Optimizer:
        """An optimizer of class `kind` on these parameter groups."""
        return kind(groups, **options)

    def part(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """What holds this process's share of an optimizer's state."""
        return optimizer

    def place(self, value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """A copy of a whole tensor of the state, or of its share, beside its parameter (a mapped file stays so)."""
        return value.to(parameter.device, copy=True)


HERE = Placement()


def build_optimizers(
    model: nn.Module,
    kind: str,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    fused: bool,
    lr_scales: Mapping[str, float] | None = None,
    placement: Placement = HERE,
) -> dict[str, torch.optim.Optimizer]:
    """AdamW on everything, or Muon on the blocks' matrices and AdamW on the rest; learning rates are set each step.

    lr_scales: by parameter, what its rate is multiplied by; 1 for one that is not named.
    Weight decay acts on matrices only: biases and norm gains have too few numbers to over-fit and losing scale hurts.
    Muon (Jordan 2024) orthogonalises each update; `match_rms_adamw` (Liu et al. 2025, arXiv:2502.16982) scales it so
    that AdamW's learning rates and decay carry over.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not named:
        raise ValueError("no parameter is trainable: unfreeze some")
    hidden = {n: p for n, p in named.items() if kind == "muon" and n.startswith("h.") and p.ndim == 2}
    rest = {n: p for n, p in named.items() if n not in hidden}
    scales = dict(lr_scales or {})
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if rest:
        matrices = {name: p for name, p in rest.items() if p.ndim >= 2}
        vectors = {name: p for name, p in rest.items() if p.ndim < 2}
        groups = [*_groups(matrices, scales, weight_decay), *_groups(vectors, scales, 0.0)]
        # One fused kernel per step in place of a dozen per tensor: 3-4x on a CPU.
        optimizers["adamw"] = placement.make(torch.optim.AdamW, groups, lr=0.0, betas=betas, eps=eps, fused=fused)
    if hidden:
        on_cpu = all(parameter.device.type == "cpu" for parameter in hidden.values())
        groups = _groups(hidden, scales, weight_decay)
        options: dict[str, Any] = {"weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers["muon"] = placement.make(Float32Muon if on_cpu else torch.optim.Muon, groups, lr=0.0, **options)
    return optimizers


def _groups(named: Mapping[str, nn.Parameter], scales: dict[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups, one for each multiple of the learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        groups.setdefault(scales.get(name, 1.0), []).append(parameter)
    return [{"params": params, "weight_decay": weight_decay, "lr_scale": scale} for scale, params in groups.items()]


def set_learning_rate(optimizers: dict[str, torch.optim.Optimizer], lr: float) -> None:
    """The learning rate of every group: `lr` times the group's own multiple."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


def optimizer_state(
    model: nn.Module, optimizers: dict[str, torch.optim.Optimizer], placement: Placement = HERE
) -> State:
    """The live state under parameter names (not copied): this process's share of it."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        kind: {names[parameter]: dict(state) for parameter, state in placement.part(optimizer).state.items()}
        for kind, optimizer in optimizers.items()
    }


def load_optimizer_state(
    model: nn.Module,
    optimizers: dict[str, torch.optim.Optimizer],
    saved: State,
    placement: Placement = HERE,
) -> None:
    """Copy a saved state, or this process's share of it, into fresh optimizers.

    Raises ValueError when it belongs to another optimizer or lacks a parameter that is trained here.
    """
    if set(saved) != set(optimizers):
        raise ValueError(
            f"the checkpoint holds the state of {'+'.join(sorted(saved)) or 'no optimizer'}, this run uses "
            f"{'+'.join(sorted(optimizers))}: pass the same --optimizer"
        )
    if not all(isinstance(states, dict) for states in saved.values()):
        raise ValueError("the checkpoint's optimizer state is not ordered by parameters")
    parameters = dict(model.named_parameters())
    for kind, optimizer in optimizers.items():
        own, part = _parameters(optimizer), placement.part(optimizer)
        held = _parameters(part)
        for name, parameter in parameters.items():
            if parameter not in own:
                continue
            if name not in saved[kind]:
                if not parameter.requires_grad:  # it has not trained yet: progressive unfreezing comes to it later
                    continue
                raise ValueError(f"the checkpoint's {kind} state lacks the parameter {name}")
            _check_state(saved[kind][name], parameter, kind, name)
            if parameter in held:
                part.state[parameter] = {
                    key: placement.place(value, parameter) if isinstance(value, torch.Tensor) else value
                    for key, value in saved[kind][name].items()
                }


def _check_state(state: object, parameter: nn.Parameter, kind: str, name: str) -> None:
    """ValueError unless `state` is what an optimizer of this kind remembers of the parameter."""
    where = f"the checkpoint's {kind} state of {name}"
    if not isinstance(state, dict) or set(state) != _REMEMBERED[kind]:
        raise ValueError(f"{where} lacks or adds something: {kind} remembers {', '.join(sorted(_REMEMBERED[kind]))}")
    for key, value in state.items():
        wanted = () if key == "step" else tuple(parameter.shape)
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            raise ValueError(f"{where}: {key} is no tensor of float32")
        if tuple(value.shape) != wanted:
            raise ValueError(f"{where}: {key} has shape {tuple(value.shape)}, not {wanted}")


def _parameters(optimizer: torch.optim.Optimizer) -> set[torch.Tensor]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}
