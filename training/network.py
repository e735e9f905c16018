"""The network of a run: from random weights, from a file, with what the method of fine-tuning adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.shards import TokenSet
from formats.adapter import adapter_entry, base_entry, check_base, is_adapter, put_on
from formats.open_model import build_model, load_base, load_payload
from model.config import GPTConfig, preset
from model.gpt import GPT
from model.lora import LoraSettings, lr_multipliers
from model.tuning import METHODS, QLoraSettings, apply_method, settings_from_dict
from training.distributed import Dist
from training.run_folder import Say
from training.run_settings import METHOD_FLAGS, FinetuneSettings, RunSettings
from training.settings import is_explicit, listed
from training.start import Start


@dataclass
class Network:
    """The model on the CPU, what its checkpoints say of it, and the multiples of the learning rate by parameter."""

    model: GPT
    about: dict[str, Any]  # entries `config`, and for an adapter `adapter` and `base`
    lr_scales: dict[str, float] = field(default_factory=dict)


def build_network(
    settings: RunSettings, here: Dist, start: Start, train_set: TokenSet, folder: Path, say: Say
) -> Network:
    """The network that the run trains. Raises ValueError where file, data and settings do not fit together."""
    model = _from_file(settings, here, start, train_set) if start.payload is not None else _random(settings, train_set)
    about: dict[str, Any] = {"config": model.config.to_dict()}
    lr_scales: dict[str, float] = {}
    if isinstance(settings, FinetuneSettings):
        entries, chosen = _tune(model, settings, here, start, folder, say)
        about |= entries
        lr_scales = learning_rate_scales(model, settings.finetune_method, chosen, settings.layer_lr_decay)
    model.gradient_checkpointing = settings.gradient_checkpointing
    if start.payload is not None:
        start.payload.pop("model")  # else the fp32 weights of a base that is quantised would stay in memory
    return Network(model, about, lr_scales)


def _random(settings: RunSettings, train_set: TokenSet) -> GPT:
    torch.manual_seed(settings.seed)
    return GPT(_preset_config(settings, train_set))


def _from_file(settings: RunSettings, here: Dist, start: Start, train_set: TokenSet) -> GPT:
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
    if is_adapter(payload):
        whole = here.from_main(lambda: load_base(payload, path, base))
        model = put_on(build_model(whole, path, dropout=settings.dropout), payload, path)
    else:
        model = build_model(payload, path, dropout=settings.dropout)
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


# What the settings of the methods call the flags.
_FIELDS = {
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "targets",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "lora_init": "start",
    "lora_plus_ratio": "lr_ratio",
    "lora_mask": "masked",
    "quantization": "quantization",
    "adapter_dim": "dim",
    "adapter_dropout": "dropout",
    "adapter_placement": "placement",
    "prefix_length": "length",
    "prefix_hidden": "hidden",
    "prefix_takes_positions": "takes_positions",
    "p_tuning_encoder": "encoder",
    "train_layers": "n_layer",
}


def chosen_method(settings: FinetuneSettings) -> Any:
    """What `--finetune_method` takes from the flags, as the settings that its module checks."""
    method = settings.finetune_method
    values = {_FIELDS[flag]: getattr(settings, flag) for flag in METHOD_FLAGS[method] if flag in _FIELDS}
    if "targets" in values:
        values["targets"] = tuple(listed(values["targets"]))
    if method == "qlora":
        return QLoraSettings(quantization=values.pop("quantization"), lora=LoraSettings(**values))
    return METHODS[method].settings(**values)


def _tune(
    model: GPT, settings: FinetuneSettings, here: Dist, start: Start, folder: Path, say: Say
) -> tuple[dict[str, Any], Any]:
    """Makes the model ready for the run's method, in place; its entries of checkpoints, and the method's settings."""
    method = settings.finetune_method
    if start.resumes:
        _check_resumed_method(settings, start)
        if METHODS[method].adapts:  # the adapter was put on with its base
            assert start.payload is not None and start.path is not None
            wanted = _adapter_settings(settings, start.payload["adapter"], start.path)
            return {key: start.payload[key] for key in ("adapter", "base")}, wanted
    if settings.adapter is not None:
        return _go_on_with_adapter(model, settings, here, start, folder, say)
    if METHODS[method].adapts and start.payload is None:
        raise ValueError(f"--finetune_method {method} needs a base: name one with --pretrained_checkpoint")
    wanted = chosen_method(settings)
    torch.manual_seed(settings.seed)  # A, prefixes and encoders start at random
    apply_method(model, method, wanted)
    if not METHODS[method].adapts:
        return {}, wanted
    assert start.payload is not None
    base = base_entry(start.payload, settings.pretrained_checkpoint, folder)
    return {"adapter": adapter_entry(method, wanted), "base": base}, wanted


def _check_resumed_method(settings: FinetuneSettings, start: Start) -> None:
    """A resumed run keeps its method: what trains and what its optimizer holds follow from it."""
    assert start.payload is not None
    saved = start.payload.get("settings", {}).get("finetune_method", settings.finetune_method)
    if saved != settings.finetune_method:
        raise ValueError(
            f"{start.path} is of a run with --finetune_method {saved}, the flags ask for {settings.finetune_method}: "
            "leave the flag out to go on, or start a new run from its result with --pretrained_checkpoint"
        )


def _adapter_settings(settings: FinetuneSettings, entry: dict[str, Any], path: Path) -> Any:
    """The settings of the adapter in `path`; ValueError where a flag asks for another than it has."""
    method = settings.finetune_method
    if entry["method"] != method:
        raise ValueError(f"{path}: was trained by {entry['method']}: add --finetune_method {entry['method']}")
    saved, asked = settings_from_dict(method, entry["settings"]), chosen_method(settings)
    for flag in METHOD_FLAGS[method]:
        has, wants = (_field(method_settings, _FIELDS[flag]) for method_settings in (saved, asked))
        if is_explicit(settings, flag) and has != wants:
            raise ValueError(
                f"{path} holds a {method} with {flag} {has}, --{flag} asks for {wants}: leave the flag out to go on "
                "with what it has, or start anew from its base in another --log_dir"
            )
    return saved


def _field(method_settings: Any, name: str) -> Any:
    """A value of a method's settings, those of LoRA within QLoRA included."""
    inner = getattr(method_settings, "lora", None)
    return getattr(inner if hasattr(inner, name) else method_settings, name)


def _go_on_with_adapter(
    model: GPT, settings: FinetuneSettings, here: Dist, start: Start, folder: Path, say: Say
) -> tuple[dict[str, Any], Any]:
    """`--adapter`: a new run that starts from a trained adapter, with the method and sizes that it has."""
    path = Path(str(settings.adapter))
    payload = here.from_main(lambda: load_payload(path, base_model=settings.pretrained_checkpoint))
    if not is_adapter(payload):
        raise ValueError(f"--adapter {path}: is a whole model, not an adapter: give it to --pretrained_checkpoint")
    if start.payload is None:
        raise ValueError(f"--adapter {path}: its base is needed too: name it with --pretrained_checkpoint")
    check_base(payload, path, start.payload, settings.pretrained_checkpoint)
    entry = payload["adapter"]
    wanted = _adapter_settings(settings, entry, path)
    say(f"{path}: going on with its {entry['method']} {entry['settings']}")
    put_on(model, payload, path)
    return {"adapter": entry, "base": base_entry(start.payload, settings.pretrained_checkpoint, folder)}, wanted


def learning_rate_scales(model: GPT, method: str, chosen: Any, layer_lr_decay: float) -> dict[str, float]:
    """By parameter, what its learning rate is multiplied by; parameters that are not named have 1.

    LoRA+ raises the rate of each B. Progressive unfreezing lowers it by `layer_lr_decay` from each layer to the one
    below it (discriminative fine-tuning, Howard & Ruder 2018); embeddings come below the first layer.
    """
    if method in ("lora", "qlora"):
        return lr_multipliers(model, chosen.lora if method == "qlora" else chosen)
    if method != "progressive":
        return {}
    if not 0 < layer_lr_decay <= 1:
        raise ValueError(f"--layer_lr_decay {layer_lr_decay}: expected more than 0 and at most 1")
    top = model.config.n_layer - 1
    scales = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        below = top - int(parts[1]) if parts[0] == "h" else top + 1 if parts[0] in ("wte", "wpe") else 0
        scales[name] = layer_lr_decay**below
    return scales
