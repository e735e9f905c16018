"""The ways of fine-tuning, as one table: what each adds to the model, which parameters it trains, what a file holds."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from model.adapters import AdapterSettings, Bottleneck, apply_adapters
from model.config import check_known
from model.gpt import GPT
from model.lora import LoraLayer, LoraLinear, LoraSettings, apply_lora, lora_layers
from model.prompt_methods import PrefixSettings, Prompt, PTuningSettings, apply_p_tuning, apply_prefix
from model.quantize import KINDS, QuantizedLinear, quantize_blocks


@dataclass(frozen=True, kw_only=True)
class FullSettings:
    """Every parameter trains. Progressive unfreezing begins so as well: its schedule is the training loop's."""


@dataclass(frozen=True, kw_only=True)
class FreezeSettings:
    """The last `n_layer` blocks and the norm after them train."""

    n_layer: int = 2


@dataclass(frozen=True, kw_only=True)
class QLoraSettings:
    """LoRA on the blocks' layers kept in `quantization`."""

    lora: LoraSettings = field(default_factory=LoraSettings)
    quantization: str = "nf4"

    def __post_init__(self) -> None:
        if self.quantization not in KINDS:
            raise ValueError(f"quantization is {self.quantization!r}: choose one of {', '.join(KINDS)}")


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning: the class of its settings, and how the model is changed in place."""

    settings: type
    apply: Callable[[GPT, Any, bool], object]
    adapts: bool  # whether it adds parameters of its own, which are then all that a file needs to hold


def _qlora(model: GPT, settings: QLoraSettings, fresh: bool) -> None:
    quantize_blocks(model, settings.quantization)
    apply_lora(model, settings.lora, fresh=fresh)


METHODS: dict[str, Method] = {
    "full": Method(FullSettings, lambda model, s, fresh: model.requires_grad_(True), False),
    "progressive": Method(FullSettings, lambda model, s, fresh: model.requires_grad_(True), False),
    "freeze": Method(FreezeSettings, lambda model, s, fresh: unfreeze_last(model, s.n_layer), False),
    "lora": Method(LoraSettings, lambda model, s, fresh: apply_lora(model, s, fresh=fresh), True),
    "qlora": Method(QLoraSettings, _qlora, True),
    "adapter": Method(AdapterSettings, lambda model, s, fresh: apply_adapters(model, s), True),
    "prefix": Method(PrefixSettings, lambda model, s, fresh: apply_prefix(model, s), True),
    "p_tuning": Method(PTuningSettings, lambda model, s, fresh: apply_p_tuning(model, s), True),
}


def method_named(name: str) -> Method:
    """The method of that name; ValueError with the nearest if there is none."""
    check_known([name], list(METHODS), "finetune_method")
    return METHODS[name]


def apply_method(model: GPT, method: str, settings: object = None, *, fresh: bool = True) -> GPT:
    """Makes `model` ready to be tuned by `method`, in place, and returns it; `settings` None = the method's defaults.

    What trains afterwards is what has requires_grad; the masks of a pruned model stay its own. fresh=False:
    `load_adapter_state` follows, costly starting values may be left out. ValueError as the methods say.
    """
    entry = method_named(method)
    settings = entry.settings() if settings is None else settings
    assert isinstance(settings, entry.settings), f"{method} takes {entry.settings.__name__}, not {settings!r}"
    entry.apply(model, settings, fresh)
    return model


def settings_to_dict(settings: Any) -> dict[str, Any]:
    """A method's settings as plain numbers, strings and lists, fit for JSON; `settings_from_dict` reads them back."""
    values = dataclasses.asdict(settings)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def settings_from_dict(method: str, values: Mapping[str, Any]) -> Any:
    """The settings of `method` that `settings_to_dict` wrote. ValueError names what is unknown or out of range."""
    kind = method_named(method).settings
    check_known(values, [f.name for f in dataclasses.fields(kind)], f"{method} setting")
    if method == "qlora" and "lora" in values:
        values = {**values, "lora": settings_from_dict("lora", values["lora"])}
    return kind(**values)


class AdapterModule(Protocol):
    """What LoraLayer, Bottleneck and Prompt have in common."""

    enabled: bool

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The method's own tensors, by name within the module."""


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """Name and module of all that a method added."""
    for name, module in model.named_modules():
        if isinstance(module, (LoraLayer, Bottleneck, Prompt)):
            yield name, module


def adapter_state(model: nn.Module, *, folded: bool = False) -> dict[str, Tensor]:
    """The tensors of the adapter alone, by name in the model, detached but not copied; empty if there is none.

    folded: a prefix or virtual tokens without the network that makes them, which only training needs.
    """
    state = {}
    for name, module in adapter_modules(model):
        own = module.folded() if folded and isinstance(module, Prompt) else module.adapter_tensors()
        state.update({f"{name}.{key}": tensor.detach() for key, tensor in own.items()})
    return state


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies what `adapter_state` gave into a model that the same method was applied to.

    A folded state folds the model's prompt as well. ValueError names a tensor that is missing, unknown or of another
    shape; then nothing has been changed.
    """
    target = adapter_state(model)
    if set(state) != set(target) and set(state) == set(adapter_state(model, folded=True)):
        for _, module in adapter_modules(model):
            if isinstance(module, Prompt):
                module.fold()
        target = adapter_state(model)
    for name in sorted(set(target) ^ set(state)):
        fault = "lacks" if name in target else "holds, unknown to this model's method or settings,"
        raise ValueError(f"the adapter {fault} {name}: load it with the settings that it was trained with")
    for name, tensor in target.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"the adapter's {name} is {tuple(state[name].shape)}, the model's {tuple(tensor.shape)}: "
                "it was trained with other settings or on another base"
            )
    for name, tensor in target.items():
        tensor.copy_(state[name])


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state without the adapter: the base, or, while merged, a plain model's weights."""
    own = adapter_state(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in own}


def merge(model: nn.Module) -> None:
    """Puts LoRA into the weights; `base_state` then is a plain model's that does the same. ValueError if it can not be.

    All layers are merged, or none.
    """
    if any(isinstance(module, (Bottleneck, Prompt)) for _, module in adapter_modules(model)):
        raise ValueError("only LoRA can be merged: this adapter is not a change of weights, keep it beside its base")
    layers = lora_layers(model)
    if not layers:
        raise ValueError("there is no LoRA to merge")
    for layer in layers:
        if layer.merge_refusal is not None:
            raise ValueError(layer.merge_refusal)
    for layer in cast("list[LoraLinear]", layers):
        if layer.base_copy is None:
            layer.merge()


def unmerge(model: nn.Module) -> None:
    """Takes LoRA out of the weights again: the base comes back bit for bit."""
    for layer in lora_layers(model):
        if layer.base_copy is not None:
            cast(LoraLinear, layer).unmerge()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base: the reference of a preference loss, for no memory. ValueError while merged.

    A backward pass must end inside too, or where checkpointing recomputes, it would do so with the adapter.
    """
    modules = [module for _, module in adapter_modules(model)]
    if any(isinstance(module, LoraLayer) and module.base_copy is not None for module in modules):
        raise ValueError("the adapter is merged into the weights: unmerge it before it is switched off")
    before = [module.enabled for module in modules]
    try:
        for module in modules:
            module.enabled = False
        yield
    finally:
        for module, enabled in zip(modules, before):
            module.enabled = enabled


def freeze_all_but(model: nn.Module, names: Iterable[str]) -> None:
    """Only parameters of these names train, or those within modules of these names. ValueError for an unknown one."""
    parameters = dict(model.named_parameters())
    chosen: set[str] = set()
    for wanted in names:
        found = {name for name in parameters if f"{name}.".startswith(f"{wanted}.")}
        if not found:
            near = difflib.get_close_matches(wanted, parameters, n=1, cutoff=0.0)
            raise ValueError(f"no parameter is named {wanted!r}: did you mean {near[0]!r}?")
        chosen |= found
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)


def unfreeze_last(model: GPT, n_layer: int) -> None:
    """Only the last n_layer blocks and the final norm train; backward then stops below them. ValueError if too many."""
    total = model.config.n_layer
    if not isinstance(n_layer, int) or isinstance(n_layer, bool) or not 1 <= n_layer <= total:
        raise ValueError(f"layers to train are {n_layer!r}: give 1 to {total}, the layers of this model")
    last = [f"h.{i}" for i in range(total - n_layer, total) if any(True for _ in model.h[i].parameters())]
    freeze_all_but(model, ["ln_f", *last])


def trainable_report(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, and how many there are; a quantised weight counts as the numbers it stands for."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    quantized = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts) + quantized


def trainable_line(model: nn.Module) -> str:
    """`trainable_report` as one line, in PEFT's words."""
    trainable, total = trainable_report(model)
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
