"""Optimizers: what decays, what Muon takes, and state under names that comes back to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from formats.checkpoint import load_checkpoint, save_checkpoint
from model.gpt import GPT
from tests.full_checkpoints import same
from tests.tiny_checkpoints import tiny_config, tiny_model
from training.optimizer import build_optimizers, load_optimizer_state, optimizer_state, set_learning_rate

Optimizers = dict[str, torch.optim.Optimizer]


def build(model: GPT, kind: str = "adamw", fused: bool = True, weight_decay: float = 0.1) -> Optimizers:
    return build_optimizers(model, kind, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, fused=fused)


def train(model: GPT, optimizers: Optimizers, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    set_learning_rate(optimizers, 1e-2)
    for _ in range(steps):
        ids = torch.randint(0, 257, (2, 17), generator=generator)
        model(ids[:, :-1], ids[:, 1:]).backward()
        for optimizer in optimizers.values():
            optimizer.step()
        model.zero_grad(set_to_none=True)


def names_of(model: GPT, optimizer: torch.optim.Optimizer, decayed: bool | None = None) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [g for g in optimizer.param_groups if decayed is None or (g["weight_decay"] > 0) == decayed]
    return {names[parameter] for group in groups for parameter in group["params"]}


def weights(model: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_decay_on_matrices_only_and_every_parameter_once(kind: str) -> None:
    model = tiny_model()
    optimizers = build(model, kind)
    decayed = set().union(*(names_of(model, optimizer, True) for optimizer in optimizers.values()))
    plain = set().union(*(names_of(model, optimizer, False) for optimizer in optimizers.values()))
    everything = dict(model.named_parameters())
    assert decayed == {name for name, parameter in everything.items() if parameter.ndim == 2}
    assert plain == {name for name, parameter in everything.items() if parameter.ndim == 1}
    assert {"wte.weight", "wpe.weight"} <= decayed and {"ln_f.weight", "h.0.attn.q_proj.bias"} <= plain
    sizes = [len(group["params"]) for optimizer in optimizers.values() for group in optimizer.param_groups]
    assert sum(sizes) == len(everything)


def test_without_gradient_only_the_matrices_shrink() -> None:
    model = tiny_model()
    before = weights(model)
    optimizers = build(model, weight_decay=0.5)
    set_learning_rate(optimizers, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers["adamw"].step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.95 if parameter.ndim == 2 else 1)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


def test_muon_takes_the_blocks_matrices_and_leaves_the_tables() -> None:
    model = tiny_model()
    optimizers = build(model, "muon")
    hidden = names_of(model, optimizers["muon"])
    assert hidden and all(name.startswith("h.") and name.endswith("weight") and "ln_" not in name for name in hidden)
    assert {"wte.weight", "wpe.weight", "ln_f.weight"} <= names_of(model, optimizers["adamw"])


def test_the_learning_rate_reaches_every_group() -> None:
    optimizers = build(tiny_model(), "muon")
    set_learning_rate(optimizers, 0.125)
    assert {group["lr"] for optimizer in optimizers.values() for group in optimizer.param_groups} == {0.125}


@pytest.mark.parametrize(("kind", "fused"), [("adamw", True), ("adamw", False), ("muon", True)])
def test_state_by_name_comes_back_exactly_and_goes_on_alike(kind: str, fused: bool, tmp_path: Path) -> None:
    model, twin = tiny_model(1), tiny_model(2)
    optimizers = build(model, kind, fused)
    train(model, optimizers, 3)
    saved = {"model": model.state_dict(), "config": {}, "optimizer": optimizer_state(model, optimizers)}
    assert set(saved["optimizer"]) == set(optimizers)
    save_checkpoint(tmp_path / "m.pt", saved)

    loaded = load_checkpoint(tmp_path / "m.pt")
    twin.load_state_dict(loaded["model"])
    other = build(twin, kind, fused)
    load_optimizer_state(twin, other, loaded["optimizer"])
    assert same(optimizer_state(twin, other), saved["optimizer"])
    train(model, optimizers, 3, seed=9)
    assert not same(weights(model), weights(twin)), "the steps do nothing"
    train(twin, other, 3, seed=9)
    assert same(weights(model), weights(twin))
    assert same(load_checkpoint(tmp_path / "m.pt", require_digest=True)["optimizer"], loaded["optimizer"])
    fresh = build(tiny_model(1), kind, fused)
    assert not any(optimizer.state for optimizer in fresh.values())


def test_the_order_of_parameters_does_not_matter() -> None:
    """By index, the state of a model whose parameters come in another order would be mixed up without an error."""
    model = tiny_model()
    optimizers = build(model)
    train(model, optimizers, 2)
    saved = optimizer_state(model, optimizers)
    backwards = {"adamw": dict(reversed(saved["adamw"].items()))}
    twin = tiny_model()
    other = build(twin)
    load_optimizer_state(twin, other, backwards)
    assert same(optimizer_state(twin, other), saved)


@pytest.mark.parametrize(("written", "read"), [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_is_an_error_with_both_names(written: str, read: str) -> None:
    model = tiny_model()
    optimizers = build(model, written)
    train(model, optimizers, 1)
    with pytest.raises(ValueError, match=r"the checkpoint holds the state of adamw.*this run uses adamw"):
        load_optimizer_state(model, build(model, read), optimizer_state(model, optimizers))


def test_frozen_afterwards_needs_less_and_unfrozen_afterwards_is_an_error() -> None:
    model = tiny_model()
    optimizers = build(model)
    train(model, optimizers, 2)
    whole = optimizer_state(model, optimizers)

    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith("h.0.")
    fewer = build(model)
    load_optimizer_state(model, fewer, whole)
    kept = optimizer_state(model, fewer)["adamw"]
    assert set(kept) == {name for name in whole["adamw"] if not name.startswith("h.0.")}
    assert same(kept, {name: whole["adamw"][name] for name in kept})

    for parameter in model.parameters():
        parameter.requires_grad = True
    with pytest.raises(ValueError, match=r"lacks the parameter h\.0\."):
        load_optimizer_state(model, build(model), {"adamw": kept})


def test_state_of_another_shape_is_an_error() -> None:
    model = tiny_model()
    optimizers = build(model)
    train(model, optimizers, 1)
    saved: dict[str, Any] = optimizer_state(model, optimizers)
    saved["adamw"]["ln_f.weight"] = {**saved["adamw"]["ln_f.weight"], "exp_avg": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"ln_f\.weight.*\(3,\).*\(32,\)"):
        load_optimizer_state(model, build(model), saved)


def test_nothing_to_train_is_an_error() -> None:
    model = GPT(tiny_config()).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        build(model)


def test_only_blocks_trainable_with_muon() -> None:
    """Then AdamW has the biases only, or nothing."""
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("h.") and parameter.ndim == 2
    assert set(build(model, "muon")) == {"muon"}
