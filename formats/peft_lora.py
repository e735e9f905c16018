"""LoRA in PEFT's format: the tensors of its modules from our layers, and ours from its.

PEFT keeps A (r, in) and B (out, r) of a module under `<module>.lora_A.weight`. GPT-2's q, k and v are one module there,
c_attn; ours are three layers, so that their As are stacked and their Bs stand on the diagonal of one B of rank 3r,
scaled as before. Coming in, each of the three takes the whole A and its rows of B.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.errors import FormatError
from formats.hf_families import ESPALIER, family_of
from formats.hf_names import prefix, stored_tensors
from formats.peft_folder import CONFIG, WEIGHTS, refuse_rest
from formats.stored import Part, Stored
from model.config import GPTConfig
from model.lora import LoraSettings
from model.tuning import settings_from_dict

_HEAD = "base_model.model."
# Ways of starting that change the base: an adapter saved so fits on another base than the published one.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "lora_bias": (False, None),
}
_SUFFIX = {"lora_A": ".weight", "lora_B": ".weight", "lora_magnitude_vector": ""}


# ---- out


def write(payload: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Entries of adapter_config.json, and the tensors by name. ValueError for what PEFT has no place for."""
    settings, config = _settings(payload), GPTConfig.from_dict(payload["config"])
    if settings.masked and payload["base"].get("masks"):
        raise ValueError(
            "this LoRA leaves at zero what its base has pruned, PEFT would add B A there too, which is another model: "
            "merge it (export.py merge) and export the result (export.py hf)"
        )
    modules = dict(_modules(payload["model"], settings, config))
    named = {
        f"{_HEAD}{module}.{kind}{_SUFFIX[kind]}": tensor
        for module, kinds in modules.items()
        for kind, tensor in kinds.items()
    }
    return _entries(modules, settings, config), named


def _settings(payload: Mapping[str, Any]) -> LoraSettings:
    entry = payload["adapter"]
    settings = settings_from_dict(entry["method"], entry["settings"])
    lora: LoraSettings = settings if entry["method"] == "lora" else settings.lora
    if lora.dora and lora.start == "pissa":
        raise ValueError("DoRA with PiSSA's start cannot be written for PEFT: merge it instead (export.py merge)")
    return lora


def _adaptable(config: GPTConfig) -> Iterator[Stored]:
    """The stored weights of the blocks' linear layers. ValueError where the base has no published layout."""
    family = family_of(config)
    if family == ESPALIER:
        raise ValueError("no published architecture has this base's layers, so PEFT cannot load an adapter for it")
    for stored in stored_tensors(config, family):
        if all(part.name.endswith("_proj.weight") for part in stored.parts):
            yield stored._replace(name=prefix(family) + stored.name.removesuffix(".weight"))


def _modules(
    state: Mapping[str, Tensor], settings: LoraSettings, config: GPTConfig
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """By name of PEFT's module: its A (r, in), B (out, r), and DoRA's lengths (out,)."""
    for stored in _adaptable(config):
        parts = [(part, part.name.removesuffix(".weight")) for part in stored.parts]
        adapted = [(part, layer) for part, layer in parts if f"{layer}.lora_A" in state]
        if not adapted:
            continue
        pairs = [(part, A, B) for part, layer in adapted for A, B in _pairs(state, layer)]
        A = torch.cat([A for _, A, _ in pairs])
        B = torch.zeros(max(part.stop for part in stored.parts), A.size(0))
        column = 0
        for part, own_A, own_B in pairs:
            B[part.start : part.stop, column : column + len(own_A)] = own_B
            column += len(own_A)
        module = {"lora_A": A, "lora_B": B}
        if settings.dora:
            if len(adapted) < len(parts):
                raise ValueError(f"DoRA on a part of {stored.name} cannot be written for PEFT: merge it instead")
            module["lora_magnitude_vector"] = torch.cat([state[f"{layer}.lora_magnitude"] for _, layer in adapted])
        yield stored.name, module


def _pairs(state: Mapping[str, Tensor], layer: str) -> Iterator[tuple[Tensor, Tensor]]:
    """A and B of a layer; and, after PiSSA's start, the start's, which is taken away."""
    yield state[f"{layer}.lora_A"], state[f"{layer}.lora_B"]
    if f"{layer}.lora_A_start" in state:
        yield state[f"{layer}.lora_A_start"], -state[f"{layer}.lora_B_start"]


def effect(payload: Mapping[str, Any]) -> dict[str, Tensor]:
    """The updates of the weights by layer, and DoRA's lengths."""
    settings, state = _settings(payload), payload["model"]
    layers = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    updates = {layer: settings.scale * sum(B @ A for A, B in _pairs(state, layer)) for layer in layers}
    return {**updates, **{name: tensor for name, tensor in state.items() if name.endswith("magnitude")}}


def _entries(modules: Mapping[str, Mapping[str, Tensor]], settings: LoraSettings, config: GPTConfig) -> dict[str, Any]:
    """Of adapter_config.json. A module of more than rank r keeps its scale by an alpha of its own."""
    ranks = {name: module["lora_A"].size(0) for name, module in modules.items()}
    alphas = {name: _scaled_alpha(settings, rank) for name, rank in ranks.items()}
    return {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != settings.rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != settings.alpha},
        "lora_dropout": settings.dropout,
        "target_modules": _targets(modules, [stored.name for stored in _adaptable(config)]),
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "fan_in_fan_out": family_of(config) == "gpt2",
        "bias": "none",
    }


def _targets(chosen: Iterable[str], every: Iterable[str]) -> list[str]:
    """The fewest last parts of the modules' names that mean them and no other: `q_proj`, `attn.c_proj`."""
    names = set(chosen)
    for parts in (1, 2):
        ends = {".".join(name.split(".")[-parts:]) for name in names}
        if names == {name for name in every if any(f".{name}".endswith(f".{end}") for end in ends)}:
            return sorted(ends)
    return sorted(names)


def _scaled_alpha(settings: LoraSettings, rank: int) -> float:
    """The alpha at which a module of `rank` has the scale of the settings'."""
    return settings.scale * (math.sqrt(rank) if settings.rslora else rank)


# ---- in


def read(
    folder: Path, written: Mapping[str, Any], tensors: dict[str, Tensor], config: GPTConfig
) -> tuple[LoraSettings, dict[str, Tensor]]:
    """Settings and state of the LoRA in `tensors`, which is emptied. FormatError for what differs."""
    rank, alpha = _check(written, folder)
    found: dict[str, dict[str, Any]] = {}
    for stored in _adaptable(config):
        found |= _split(stored, tensors, folder, written)
    refuse_rest(tensors, folder)
    if not found:
        raise FormatError(f"{folder / WEIGHTS}: holds no LoRA")
    said = LoraSettings(
        rank=rank,
        alpha=alpha,
        dropout=float(written.get("lora_dropout") or 0.0),
        targets=tuple(found),
        rslora=bool(written.get("use_rslora")),
        dora=bool(written.get("use_dora")),
        masked=False,  # PEFT adds B A everywhere, also where the base is pruned
    )
    highest = max(len(layer["lora_A"]) for layer in found.values())
    settings = dataclasses.replace(said, rank=highest, alpha=_scaled_alpha(said, highest))
    return settings, dict(_padded(found, settings, said, written))


def _check(written: Mapping[str, Any], folder: Path) -> tuple[int, float]:
    """Rank and alpha. FormatError for what is not plain LoRA."""
    where = folder / CONFIG
    for key, allowed in _PLAIN.items():
        if written.get(key, allowed[0]) not in allowed:
            raise FormatError(f"{where}: {key} is {written[key]!r:.80}, which is more than LoRA")
    start = written.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise FormatError(
            f"{where}: init_lora_weights {start!r:.80} changed the base's weights: save it converted to plain LoRA"
        )
    rank: Any = written.get("r")
    alpha: Any = written.get("lora_alpha")
    if type(rank) is not int or type(alpha) not in (int, float) or not 1 <= rank < 1 << 20 or not 0 < alpha < 1e30:
        raise FormatError(f"{where}: r is {rank!r:.80} and lora_alpha {alpha!r:.80}, expected numbers above 0")
    dropout = written.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise FormatError(f"{where}: lora_dropout is {dropout!r:.80}, expected a number from 0 to below 1")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(written.get(key) or {}, dict):
            raise FormatError(f"{where}: {key} is {written[key]!r:.80}, expected an object")
    return rank, float(alpha)


def _split(
    stored: Stored, tensors: dict[str, Tensor], folder: Path, written: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """What PEFT's module says of each of our layers in it; taken out of `tensors`."""
    A, B = (tensors.pop(f"{_HEAD}{stored.name}.{kind}.weight", None) for kind in ("lora_A", "lora_B"))
    magnitude = tensors.pop(f"{_HEAD}{stored.name}.lora_magnitude_vector", None)
    if A is None and B is None:
        return {}
    inputs, rows = stored.shape if stored.transposed else reversed(stored.shape)
    fits = A is not None and B is not None and A.dim() == B.dim() == 2
    if not fits or A.size(1) != inputs or B.size(0) != rows or A.size(0) != B.size(1):  # type: ignore[union-attr]
        raise FormatError(f"{folder / WEIGHTS}: {stored.name} has no A and B that fit a layer of {inputs} to {rows}")
    assert A is not None and B is not None
    if (magnitude is not None) != bool(written.get("use_dora")):
        raise FormatError(f"{folder / WEIGHTS}: {stored.name} and use_dora in {CONFIG} do not agree")
    return {part.name.removesuffix(".weight"): _part(part, A, B, magnitude, stored.name) for part in stored.parts}


def _part(part: Part, A: Tensor, B: Tensor, magnitude: Tensor | None, module: str) -> dict[str, Any]:
    layer: dict[str, Any] = {"lora_A": A, "lora_B": B[part.start : part.stop], "module": module}
    # Of a B on a diagonal, most is zero: only the ranks that this layer's rows use.
    used = layer["lora_B"].any(dim=0)
    if used.any() and not used.all():
        layer |= {"lora_A": A[used], "lora_B": layer["lora_B"][:, used]}
    layer["rank"] = A.size(0)
    return layer if magnitude is None else {**layer, "lora_magnitude": magnitude.flatten()[part.start : part.stop]}


def _padded(
    found: Mapping[str, Mapping[str, Any]], settings: LoraSettings, said: LoraSettings, written: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The state: one rank for all layers, the missing ranks zero; what differs in scale goes into B."""
    for layer, parts in found.items():
        rank = _pattern(written, "rank_pattern", parts["module"], said.rank)
        alpha = _pattern(written, "alpha_pattern", parts["module"], said.alpha)
        if rank != parts["rank"]:
            raise FormatError(f"{layer}: has rank {parts['rank']}, {CONFIG} says {rank}")
        own = dataclasses.replace(said, rank=parts["rank"], alpha=alpha)
        A = torch.zeros(settings.rank, parts["lora_A"].size(1))
        B = torch.zeros(parts["lora_B"].size(0), settings.rank)
        A[: len(parts["lora_A"])] = parts["lora_A"]
        B[:, : len(parts["lora_A"])] = parts["lora_B"] * (own.scale / settings.scale)
        yield f"{layer}.lora_A", A
        yield f"{layer}.lora_B", B
        if "lora_magnitude" in parts:
            yield f"{layer}.lora_magnitude", parts["lora_magnitude"].clone()


def _pattern(written: Mapping[str, Any], key: str, module: str, default: float) -> float:
    """A module's own rank or alpha: keys are ends of its name, as PEFT matches them where they are no expressions."""
    for end, value in (written.get(key) or {}).items():
        if f".{module}".endswith(f".{end}"):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
                raise FormatError(f"{CONFIG}: {key} of {end!r:.80} is {value!r:.80}, expected a number above 0")
            return value
    return default
