"""Adapters in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors, of LoRA and of prefixes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from formats import peft_lora, peft_prefix
from formats.adapter import adapter_entry, is_adapter
from formats.checkpoint import write_durably
from formats.errors import FormatError
from formats.peft_folder import CONFIG, WEIGHTS, read_config, read_tensors
from model.config import GPTConfig

Payload = Mapping[str, Any]
Tensors = dict[str, Tensor]


class Kind(NamedTuple):
    """What PEFT calls one kind of adapters, and how those are written, read and compared."""

    write: Callable[[Payload], tuple[dict[str, Any], Tensors]]  # -> entries of CONFIG, tensors by name
    read: Callable[[Path, Payload, Tensors, GPTConfig], tuple[Any, Tensors]]  # -> settings, state
    effect: Callable[[Payload], Tensors]  # what an adapter does, whatever the form in which it is kept


LORA = Kind(peft_lora.write, peft_lora.read, peft_lora.effect)
PREFIX = Kind(peft_prefix.write, peft_prefix.read, peft_prefix.effect)
# Our method -> its kind; PEFT's type -> our method, and its kind.
_OUT = {"lora": LORA, "qlora": LORA, "prefix": PREFIX}
_IN = {"LORA": ("lora", LORA), "PREFIX_TUNING": ("prefix", PREFIX)}


def write_peft(payload: Payload, folder: str | Path) -> dict[str, Any]:
    """Write an adapter as PEFT loads it, and read it back: {"largest_difference" of what it does, "path", "notes"}.

    PiSSA's start is written as part of the update (rank 2r), so that the adapter fits on the published base.
    Raises ValueError for what PEFT's format has no place for.
    """
    from safetensors.torch import save

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder: give another name or remove it")
    kind, base = _kind(payload), payload["base"]["name"]
    entries, tensors = kind.write(payload)
    about = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
    text = json.dumps({**entries, **about}, indent=2) + "\n"
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / WEIGHTS, lambda file: file.writelines([data]))
    write_durably(folder / CONFIG, lambda file: file.writelines([text.encode()]))
    ours, theirs = kind.effect(payload), kind.effect(read_peft(folder, payload["config"]))
    nothing = torch.zeros(())
    difference = max(float((ours[name] - theirs.get(name, nothing)).abs().max()) for name in ours)
    notes = [f"{CONFIG} names the base {base}: put there a name that PEFT finds"]
    return {"largest_difference": difference, "path": folder, "notes": notes}


def _kind(payload: Payload) -> Kind:
    if not is_adapter(payload):
        raise ValueError("the checkpoint is a whole model, not an adapter: export that with export.py hf")
    method = payload["adapter"]["method"]
    if method not in _OUT:
        raise ValueError(f"an adapter of {method} cannot be written for PEFT, LoRA and prefixes can")
    return _OUT[method]


def peft_base(folder: str | Path) -> str:
    """The name of the base that a folder of PEFT's gives, "" for none."""
    return str(read_config(Path(folder)).get("base_model_name_or_path") or "")


def read_peft(folder: str | Path, config: Payload) -> dict[str, Any]:
    """The payload of an adapter for a base of this config, without the base's digest. FormatError for what differs."""
    folder = Path(folder)
    written = read_config(folder)
    found = written.get("peft_type")
    if not isinstance(found, str) or found not in _IN:
        raise FormatError(f"{folder / CONFIG}: is of type {found!r:.80}, {' and '.join(_IN)} can be read")
    method, kind = _IN[written["peft_type"]]
    settings, state = kind.read(folder, written, read_tensors(folder), GPTConfig.from_dict(dict(config)))
    base = peft_base(folder)
    return {
        "format": 1,
        "model": state,
        "config": dict(config),
        "adapter": adapter_entry(method, settings),
        "base": {"digest": None, "path": base, "name": base},
        "source": {"kind": "peft", "path": str(folder)},
    }
