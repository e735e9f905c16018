"""The network of a run: from random weights, from a file, with what the method of fine-tuning adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.shards import TokenSet
from formats.adapter import adapter_entry, base_entry, check_base, is_adapter, put_on
from formats.checkpoint import load_checkpoint
from formats.open_model import build_model
from model.adapters import AdapterSettings
from model.config import GPTConfig, preset
from model.gpt import GPT
from model.lora import LoraSettings, lr_multipliers
from model.prompt_methods import PrefixSettings, PTuningSettings
from model.tuning import METHODS, FreezeSettings, QLoraSettings, apply_method
from training.run_folder import Say
from training.run_settings import FinetuneSettings, RunSettings
from training.settings import is_explicit
from training.start import Start


@dataclass
class Network:
    """The model on the CPU, what its checkpoints say of it, and the multiples of the learning rate by parameter."""

    model: GPT
    about: dict[str, Any]  # entries `config`, and for an adapter `adapter` and `base`
    lr_scales: dict[str, float] = field(default_factory=dict)


def build_network(settings: RunSettings, start: Start, train_set: TokenSet, folder: Path, say: Say) -> Network:
    """The network that the run trains. Raises ValueError where file, data and settings do not fit together."""
    model = _from_file(settings, start, train_set) if start.payload is not None else _random(settings, train_set)
    about: dict[str, Any] = {"config": model.config.to_dict()}
    lr_scales: dict[str, float] = {}
    if isinstance(settings, FinetuneSettings):
        about |= _tune(model, settings, start, folder, say)
        lr_scales = learning_rate_scales(model, settings)
    model.gradient_checkpointing = settings.gradient_checkpointing
    return Network(model, about, lr_scales)


def _random(settings: RunSettings, train_set: TokenSet) -> GPT:
    torch.manual_seed(settings.seed)
    return GPT(_preset_config(settings, train_set))


def _from_file(settings: RunSettings, start: Start, train_set: TokenSet) -> GPT:
    """The model of the start's file; an adapter of a resumed run with its base."""
    assert start.payload is not None and start.path is not None
    payload, path = start.payload, start.path
    tuning = isinstance(settings, FinetuneSettings)
    if is_adapter(payload) and not (tuning and start.resumes):
        raise ValueError(
            f"{path}: is an adapter: train it on with --adapter, or merge it (export.py merge) and start from that"
        )
    base = None  # of an adapter: where it says itself, unless
    if isinstance(settings, FinetuneSettings) and is_explicit(settings, "pretrained_checkpoint"):
        base = settings.pretrained_checkpoint
    model = build_model(payload, path, base_model=base, dropout=settings.dropout)
    if model.config.vocab_size != train_set.vocab_size:
        raise ValueError(
            f"{path} has a vocabulary of {model.config.vocab_size}, the data set {settings.data_dir} "
            f"one of {train_set.vocab_size}: prepare the data again with --tokenizer {path}"
        )
    if start.resumes and not tuning:
        _check_same_shape(settings, model, train_set, path)
    return model


def _preset_config(settings: RunSettings, train_set: TokenSet) -> GPTConfig:
    return preset(
        settings.preset, vocab_size=train_set.vocab_size, block_size=settings.block_size, dropout=settings.dropout
    )


def _check_same_shape(settings: RunSettings, model: GPT, train_set: TokenSet, path: Path) -> None:
    """A resumed pretraining keeps its network: another --preset or --block_size is an error with both sides."""
    saved, asked = model.config.to_dict(), _preset_config(settings, train_set).to_dict()
    differing = [f"{key} {saved[key]} -> {asked[key]}" for key in saved if saved[key] != asked[key]]
    if differing:
        raise ValueError(
            f"{path} holds another network than --preset {settings.preset} asks for: "
            f"{', '.join(differing)}: resume with the settings it was trained with, or use another --log_dir"
        )


# -- methods of fine-tuning ----------------------------------------------------------------------------------------


def chosen_method(settings: FinetuneSettings) -> Any:
    """What `--finetune_method` takes from the flags, as the settings that its module checks."""
    lora = LoraSettings(
        rank=settings.lora_r,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        targets=tuple(name for entry in settings.lora_target_modules for name in entry.split(",") if name),
        rslora=settings.use_rslora,
        dora=settings.use_dora,
        start=settings.lora_init,
        lr_ratio=settings.lora_plus_ratio,
    )
    chosen: dict[str, Any] = {
        "freeze": lambda: FreezeSettings(n_layer=settings.train_layers),
        "lora": lambda: lora,
        "qlora": lambda: QLoraSettings(lora=lora, quantization=settings.quantization),
        "adapter": lambda: AdapterSettings(
            dim=settings.adapter_dim, dropout=settings.adapter_dropout, placement=settings.adapter_placement
        ),
        "prefix": lambda: PrefixSettings(length=settings.prefix_length, hidden=settings.prefix_hidden),
        "p_tuning": lambda: PTuningSettings(
            length=settings.prefix_length, encoder=settings.p_tuning_encoder, hidden=settings.prefix_hidden
        ),
    }
    method = settings.finetune_method
    return chosen[method]() if method in chosen else METHODS[method].settings()


def _tune(model: GPT, settings: FinetuneSettings, start: Start, folder: Path, say: Say) -> dict[str, Any]:
    """Makes the model ready for the run's method, in place; returns the entries of its checkpoints."""
    method, wanted = settings.finetune_method, chosen_method(settings)
    if start.resumes and start.payload is not None and is_adapter(start.payload):
        _check_same_method(start, method, wanted)
        return {key: start.payload[key] for key in ("adapter", "base")}
    if settings.adapter is not None:
        return _go_on_with_adapter(model, settings, start, folder, say)
    if METHODS[method].adapts and start.payload is None:
        raise ValueError(f"--finetune_method {method} needs a base: name one with --pretrained_checkpoint")
    torch.manual_seed(settings.seed)  # A, prefixes and encoders start at random
    apply_method(model, method, wanted)
    if not METHODS[method].adapts:
        return {}
    assert start.payload is not None
    base = base_entry(start.payload, settings.pretrained_checkpoint, folder)
    return {"adapter": adapter_entry(method, wanted), "base": base}


def _check_same_method(start: Start, method: str, wanted: Any) -> None:
    """A resumed run keeps the shape of its adapter."""
    assert start.payload is not None
    saved, asked = start.payload["adapter"], adapter_entry(method, wanted)
    if saved != asked:
        raise ValueError(
            f"{start.path} holds the adapter {saved['method']} {saved['settings']}, the flags ask for {method} "
            f"{asked['settings']}: resume with the settings it was trained with, or use another --log_dir"
        )


def _go_on_with_adapter(model: GPT, settings: FinetuneSettings, start: Start, folder: Path, say: Say) -> dict[str, Any]:
    """`--adapter`: a new run that starts from a trained adapter, with the method and sizes that it has."""
    path = Path(str(settings.adapter))
    payload = load_checkpoint(path)
    if not is_adapter(payload):
        raise ValueError(f"--adapter {path}: is a whole model, not an adapter: give it to --pretrained_checkpoint")
    if start.payload is None:
        raise ValueError(f"--adapter {path}: its base is needed too: name it with --pretrained_checkpoint")
    check_base(payload, path, start.payload, settings.pretrained_checkpoint)
    entry = payload["adapter"]
    if entry["method"] != settings.finetune_method:
        raise ValueError(f"--adapter {path}: was trained by {entry['method']}: add --finetune_method {entry['method']}")
    say(f"{path}: going on with its {entry['method']} {entry['settings']}")
    put_on(model, payload, path)
    return {"adapter": entry, "base": base_entry(start.payload, settings.pretrained_checkpoint, folder)}


def learning_rate_scales(model: GPT, settings: FinetuneSettings) -> dict[str, float]:
    """By parameter, what its learning rate is multiplied by; parameters that are not named have 1.

    LoRA+ raises the rate of each B. Progressive unfreezing lowers it by `layer_lr_decay` from each layer to the one
    below it (discriminative fine-tuning, Howard & Ruder 2018); embeddings come below the first layer.
    """
    if settings.finetune_method in ("lora", "qlora"):
        return lr_multipliers(model, LoraSettings(lr_ratio=settings.lora_plus_ratio))
    if settings.finetune_method != "progressive":
        return {}
    top = model.config.n_layer - 1
    scales = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        below = top - int(parts[1]) if parts[0] == "h" else top + 1 if parts[0] in ("wte", "wpe") else 0
        scales[name] = settings.layer_lr_decay**below
    return scales
