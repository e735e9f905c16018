"""The one door that opens any model: a checkpoint of ours, a Hugging Face folder, a GGUF file, a name on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.chat import Template, stop_ids
from data.templates import template_from_spec
from data.tokenizer import Tokenizer, tokenizer_from_spec
from formats.adapter import base_candidates, base_entry, check_base, is_adapter, put_on
from formats.checkpoint import load_checkpoint, payload_masks, peek
from model.config import GPTConfig
from model.gpt import GPT
from model.tuning import trainable_report

KINDS = "a checkpoint (.pt), a Hugging Face folder, a GGUF file, or a Hub name (owner/name)"
PEFT_CONFIG = "adapter_config.json"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:[\w./-]+\.gguf)?")


@dataclass
class OpenModel:
    """A network with what is needed to talk to it."""

    model: GPT
    tokenizer: Tokenizer
    template: Template | None
    stop_ids: tuple[int, ...]  # an answer ends before any of these
    parameters: int
    path: Path
    step: int | None
    val_loss: float | None


def open_model(
    ref: str | Path, device: str | torch.device = "cpu", *, base_model: str | Path | None = None
) -> OpenModel:
    """Open any model in evaluation mode on `device`; `base_model` is where to look for an adapter's base.

    Raises FileNotFoundError or ValueError naming the file and what is wrong with it.
    """
    path = Path(ref)
    payload = load_payload(ref, base_model=base_model)
    model = build_model(payload, path, base_model=base_model)
    tokenizer = payload_tokenizer(payload, path)
    template = payload_template(payload, path)
    return OpenModel(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        template=template,
        stop_ids=stop_ids(template, tokenizer),
        parameters=trainable_report(model)[1],
        path=path,
        step=payload.get("step"),
        val_loss=payload.get("val_loss"),
    )


def load_payload(ref: str | Path, *, base_model: str | Path | None = None) -> dict[str, Any]:
    """What a checkpoint holds, from whatever `ref` names; from elsewhere than a .pt, `in_memory` is True.

    `base_model` is where to look for the base of an adapter in PEFT's format, which is not read without it. Such
    tensors are owned by the payload, and `build_model` takes them over; a checkpoint's are mapped from its file.
    Raises FileNotFoundError or ValueError naming the file and what is wrong with it.
    """
    path = _local(ref)
    if (path / PEFT_CONFIG).is_file():
        return _from_peft(path, base_model)
    if path.is_dir():
        from formats.hf_read import read_huggingface

        return {**read_huggingface(path), "in_memory": True}
    if is_gguf(path):
        from formats.gguf_read import read_gguf

        return {**read_gguf(path), "in_memory": True}
    return load_checkpoint(path)


def _from_peft(folder: Path, base_model: str | Path | None) -> dict[str, Any]:
    """An adapter in PEFT's format, completed by what its base knows: the digest, the tokenizer, the template."""
    from formats.peft import read_peft

    name = str(base_model) if base_model is not None else _peft_base(folder)
    base = load_payload(name)
    if is_adapter(base):
        raise ValueError(f"{name}: is an adapter itself, {folder} needs a whole model: name it with --base_model")
    payload = {**read_peft(folder, base["config"]), "base": base_entry(base, name, folder)}
    return {**payload, "tokenizer": base.get("tokenizer"), "template": base.get("template"), "in_memory": True}


def _peft_base(folder: Path) -> str:
    from formats.peft import peft_base

    name = peft_base(folder)
    if not name:
        raise ValueError(f"{folder}: names no base: add --base_model")
    return name


def read_config(ref: str | Path) -> GPTConfig:
    """The network of whatever model `ref` names, an adapter's base included, without reading weights or vocabulary.

    A published table may have rows that its tokenizer lacks; they are counted here and left out when the model is
    opened. A Hub name is fetched as a whole. Errors as `load_payload`.
    """
    path = _local(ref)
    if (path / PEFT_CONFIG).is_file():
        return read_config(_peft_base(path))
    if path.is_dir():
        from formats.hf_config import to_gpt_config
        from formats.hf_folder import read_object

        return to_gpt_config(read_object(path, "config.json") or {}, str(path / "config.json"))[0]
    if is_gguf(path):
        from formats.gguf_header import read_gguf_header
        from formats.gguf_read import read_config as read_gguf_config

        return read_gguf_config(read_gguf_header(path))[0]
    return _config_of(peek(path, "config"), path)


def load_any_tokenizer(ref: str | Path) -> Tokenizer:
    """The tokenizer of whatever model `ref` names, without reading its weights. Errors as `load_payload`."""
    return load_tokenizer_and_template(ref)[0]


def load_tokenizer_and_template(ref: str | Path) -> tuple[Tokenizer, Template | None]:
    """How the model that `ref` names is spoken to, without reading its weights. Errors as `load_payload`."""
    path = _local(ref)
    if (path / PEFT_CONFIG).is_file():
        return load_tokenizer_and_template(_peft_base(path))
    if path.is_dir():
        from formats.hf_read import read_hf_tokenizer

        return read_hf_tokenizer(path)
    if is_gguf(path):
        from formats.gguf_read import read_gguf_tokenizer

        return read_gguf_tokenizer(path)
    payload = load_checkpoint(path)
    return payload_tokenizer(payload, path), payload_template(payload, path)


def check_exists(ref: str | Path) -> None:
    """Raises FileNotFoundError, at once, where `ref` is neither on this disk nor the form of a Hub name."""
    if not Path(ref).exists() and not is_hub_name(str(ref)):
        raise FileNotFoundError(f"{ref}: no such checkpoint; expected {KINDS}")


def is_hub_name(ref: str) -> bool:
    """Whether `ref`, which is no path here, has the form owner/name and cannot be meant as a file of this disk."""
    if not _HUB_NAME.fullmatch(ref) or Path(ref).suffix in (".pt", ".json", ".safetensors"):
        return False
    return not Path(ref).parts[0].startswith(".") and not Path(ref).parent.is_dir()


def is_gguf(path: Path) -> bool:
    """Whether the file begins as a GGUF does, or is named as one."""
    if path.suffix == ".gguf":
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _local(ref: str | Path) -> Path:
    """The file or folder of `ref`, fetched from the Hub where it is a name there."""
    check_exists(ref)
    path = Path(ref)
    if not path.exists():
        from formats.hub import fetch_from_hub

        path = fetch_from_hub(str(ref))
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", PEFT_CONFIG)):
        raise ValueError(f"{path}: is a folder without config.json; expected {KINDS}")
    return path


def payload_tokenizer(payload: dict[str, Any], path: str | Path) -> Tokenizer:
    """The tokenizer that a payload holds. Raises ValueError where there is none."""
    spec = payload.get("tokenizer")
    if not isinstance(spec, dict):
        raise ValueError(f"{path}: holds no tokenizer, so its tokens cannot be read")
    try:
        return tokenizer_from_spec(spec)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def payload_template(payload: dict[str, Any], path: str | Path) -> Template | None:
    """The prompt template that a payload holds, None where it has none. Raises ValueError for what is no template."""
    try:
        return template_from_spec(payload.get("template"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def build_model(
    payload: dict[str, Any], path: str | Path, *, base_model: str | Path | None = None, **overrides: Any
) -> GPT:
    """The network of a loaded model on the CPU in fp32; `overrides` change its config (dropout, say).

    An adapter is put on its base, which is looked for where the adapter says, or at `base_model`.
    A pruned model has its masks: `model.masks`, empty for a dense one.
    Raises ValueError, with both sides, where names or shapes of the weights do not fit the config.
    """
    if is_adapter(payload):
        base = load_base(payload, Path(path), base_model)
        return put_on(build_model(base, path, **overrides), payload, Path(path))
    config = _config_of(payload["config"], path, **overrides)
    sizes = [config.layer(i) for i in range(config.n_layer)]
    layers = sum(bool(layer.n_head or layer.mlp_dim) for layer in sizes)
    if layers > len(payload["model"]):  # before as many are made as the config likes
        raise ValueError(f"{path}: has {len(payload['model'])} weights, its config asks for {layers} layers")
    with torch.device("meta"):  # no memory, no random numbers: every weight is replaced
        model = GPT(config)
    check_weights(model, payload["model"], path)
    # A checkpoint's tensors are mapped from its file, which may go away: they are copied, one at a time.
    copy = not payload.get("in_memory", False)
    weights = {name: tensor.to(torch.float32, copy=copy) for name, tensor in payload["model"].items()}
    model.load_state_dict(weights, assign=True)
    model.masks = payload_masks(payload, path)
    return model.requires_grad_(True)


def _config_of(values: object, path: str | Path, **overrides: Any) -> GPTConfig:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: its config is a {type(values).__name__}, expected a dict")
    try:
        return GPTConfig.from_dict({**values, **overrides})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its config does not describe a network: {error}") from None


def load_base(payload: dict[str, Any], path: Path, base_model: str | Path | None = None) -> dict[str, Any]:
    """What the base of an adapter at `path` holds, checked to be the one that it was trained on.

    Raises FileNotFoundError or ValueError naming the remedy.
    """
    names = base_candidates(payload, path) if base_model is None else [str(base_model)]
    name = next((name for name in names if Path(name).exists() or is_hub_name(name)), None)
    if name is None:
        where = " nor ".join(dict.fromkeys(names))
        raise FileNotFoundError(f"{path}: its base is not at {where}: name it with --base_model")
    base = load_payload(name)
    check_base(payload, path, base, name)
    return base


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
