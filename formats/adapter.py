"""Adapter files: what a method of fine-tuning added to a base model, and which base that was.

A checkpoint whose `model` holds the adapter's tensors alone (megabytes beside a base of gigabytes), with two entries
more: `adapter` = {"method", "settings"}, and `base` = {"digest", "path", "name"}. The digest is of the base's
weights, not of a file, so that the same model as a checkpoint, a Hugging Face folder or a GGUF file is the same base.
Of a pruned base it holds the digest of its `masks` too: LoRA computes W + M * (s B A) over them, so that the same
weights in a file without masks (a Hugging Face folder, say) are another base.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from formats.checkpoint import payload_masks
from formats.kinds import misfit
from model.gpt import GPT
from model.tuning import apply_method, load_adapter_state, method_named, settings_from_dict, settings_to_dict

_LARGEST_UNSEEN = 4096  # of a size that need not show in the tensors: the network that made a prefix is folded away


def is_adapter(payload: Mapping[str, Any]) -> bool:
    """Whether a loaded file needs a base to be a model."""
    return "adapter" in payload


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the fp32 weights by name: 0.4 s for 135M parameters."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        # + 0.0 makes -0.0 the 0.0 that it equals: compact storage does not keep the sign of what was pruned away.
        tensor = (weights[name].detach().to("cpu", torch.float32) + 0.0).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def masks_digest(payload: Mapping[str, Any]) -> str | None:
    """SHA-256 over a loaded model's masks by name, whatever blocks they are written in; None for a dense model."""
    masks = payload_masks(payload, "the base")
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(f"{name} {masks[name].shape}\n".encode())
        digest.update(masks[name].dense().contiguous().numpy().data)
    return digest.hexdigest() if masks else None


def base_entry(base: Mapping[str, Any], name: str, folder: Path) -> dict[str, str]:
    """The entry `base` for an adapter in `folder` of the loaded model `base`, which was opened as `name`."""
    local = Path(name).exists()
    path = os.path.relpath(name, folder) if local else name
    masks = masks_digest(base)
    return {
        "digest": weights_digest(base["model"]),
        **({"masks": masks} if masks is not None else {}),
        "path": path,
        "name": name,
    }


def adapter_entry(method: str, settings: Any) -> dict[str, Any]:
    """The entry `adapter`: plain values."""
    return {"method": method, "settings": settings_to_dict(settings)}


def base_candidates(payload: Mapping[str, Any], path: Path) -> list[str]:
    """Where the base of an adapter may be: beside it as it was when it was written, or by the name it was given."""
    base = payload.get("base")
    if not isinstance(base, dict) or not all(isinstance(base.get(key), str) for key in ("path", "name")):
        raise ValueError(f"{path}: is an adapter that does not name its base")
    if "digest" not in base or not all(isinstance(base.get(key), (str, type(None))) for key in ("digest", "masks")):
        raise ValueError(f"{path}: is an adapter whose base has a digest that is no text")
    return [str(path.parent / base["path"]), base["name"]]


def check_base(payload: Mapping[str, Any], path: Path, base: Mapping[str, Any], name: str) -> None:
    """Raises ValueError unless the loaded model `base`, opened as `name`, is the one that the adapter was made for.

    An adapter from elsewhere has no digest of its base: whether names and shapes fit is all that can be checked.
    """
    if is_adapter(base):
        raise ValueError(f"{name}: is an adapter itself, {path} needs a whole model: name it with --base_model")
    wanted, found = payload["base"]["digest"], weights_digest(base["model"])
    if wanted is not None and wanted != found:
        raise ValueError(
            f"{path}: was trained on a base whose weights have the digest {wanted[:12]}, those of {name} have "
            f"{found[:12]}: name the right one with --base_model (it was {payload['base']['name']})"
        )
    had, has = payload["base"].get("masks"), masks_digest(base)
    if wanted is not None and had != has:
        raise ValueError(
            f"{path}: was trained on a base {_under(had)}, {name} has its weights but is {_under(has)}: name the "
            f"right one with --base_model (it was {payload['base']['name']})"
        )


def _under(masks: str | None) -> str:
    return "without pruning masks" if masks is None else f"under pruning masks of the digest {masks[:12]}"


def put_on(model: GPT, payload: Mapping[str, Any], path: Path) -> GPT:
    """Applies the adapter's method to its base, in place, and loads its tensors. ValueError where they do not fit."""
    entry = payload["adapter"]
    if not isinstance(entry, dict) or not isinstance(entry.get("settings"), dict):
        raise ValueError(f"{path}: is an adapter that does not tell its method and settings")
    try:
        method, values = entry["method"], entry["settings"]
        _check_settings(method, values, payload["model"])
        settings = settings_from_dict(method, values)
        apply_method(model, entry["method"], settings, fresh=False)
        load_adapter_state(model, payload["model"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return model


def _check_settings(method: str, values: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """ValueError for a setting of another kind, or a size that would make far more than the file holds."""
    wrong = misfit(values, method_named(method).settings)
    if wrong is not None:
        raise ValueError(f"its {method} has {wrong} {values[wrong]!r:.80}")
    largest = max([_LARGEST_UNSEEN, *(size for tensor in tensors.values() for size in tensor.shape)])
    sizes = {**values, **values.get("lora", {})}
    for name, value in sizes.items():
        if type(value) is int and value > largest:
            raise ValueError(f"its {method} has {name} {value}, its tensors are no larger than {largest:,}")
