"""Prefixes in PEFT's format: one tensor of keys and values, `prompt_embeddings` (P, layers x 2 x heads x head_dim).

PEFT puts them into the cache as if they had been read there: a text behind a prefix of P stands at positions P, P + 1,
..., in a network with rotary positions as in one with learned ones. So does ours where the prefix takes positions; by
default it takes none, and the text begins at 0. With rotary positions the two are one: of query and key only the
distance counts, so that keys turned by P positions meet queries P further on as unturned ones met them before. A
learned position is added to the text itself, and no change of the prefix makes up for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.errors import FormatError
from formats.hf_families import ESPALIER, family_of
from formats.peft_folder import CONFIG, WEIGHTS, refuse_rest
from model.config import GPTConfig
from model.gpt import GPT
from model.prompt_methods import Prefix, PrefixSettings
from model.rope import apply_rope, rope_frequencies, rope_tables
from model.tuning import adapter_state, apply_method, load_adapter_state, settings_from_dict

_NAME = "prompt_embeddings"


def write(payload: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Entries of adapter_config.json, and the tensors by name. ValueError for what PEFT has no place for."""
    config = GPTConfig.from_dict(payload["config"])
    layers, _, heads, head_dim = _sizes(config)
    tensors = effect(payload)
    entries = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": len(tensors[_NAME]),
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * head_dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,  # the network that made the prefix is folded away
    }
    return entries, tensors


def effect(payload: Mapping[str, Any]) -> dict[str, Tensor]:
    """The prefix as PEFT keeps it; ValueError where none of its does the same."""
    config = GPTConfig.from_dict(payload["config"])
    _sizes(config)
    settings: PrefixSettings = settings_from_dict("prefix", payload["adapter"]["settings"])
    layers = torch.stack(_layers(payload, config, settings))  # (layers, 2, heads, P, head_dim)
    if not settings.takes_positions:
        keys, values = layers.unbind(1)
        layers = torch.stack((_turned(keys, settings.length, config), values), dim=1)
    return {_NAME: layers.permute(3, 0, 1, 2, 4).reshape(settings.length, -1)}


def read(
    folder: Path, written: Mapping[str, Any], tensors: dict[str, Tensor], config: GPTConfig
) -> tuple[PrefixSettings, dict[str, Tensor]]:
    """Settings and state of the prefix in `tensors`, which is emptied. FormatError for what differs."""
    if written.get("modules_to_save"):
        raise FormatError(f"{folder / CONFIG}: modules_to_save is {written['modules_to_save']!r}: more than a prefix")
    sizes = _sizes(config)
    layers, two, heads, head_dim = sizes
    made = tensors.pop(_NAME, None)
    refuse_rest(tensors, folder)
    length = written.get("num_virtual_tokens")
    if made is None or made.dim() != 2 or made.size(1) != layers * two * heads * head_dim or made.size(0) != length:
        found = None if made is None else tuple(made.shape)
        raise FormatError(
            f"{folder / WEIGHTS}: {_NAME} is {found}, expected num_virtual_tokens ({length!r}) rows of "
            f"{layers} layers x 2 x {heads} heads x {head_dim}"
        )
    each = made.view(length, *sizes).permute(1, 2, 3, 0, 4)  # (layers, 2, heads, P, head_dim)
    state = {f"prompt.final.{i}": layer.contiguous() for i, layer in enumerate(each)}
    return PrefixSettings(length=length, hidden=0, takes_positions=True), state


def _sizes(config: GPTConfig) -> tuple[int, int, int, int]:
    """Layers, 2 for keys and values, key/value heads, head_dim. ValueError where layers differ."""
    if family_of(config) == ESPALIER:
        raise ValueError("no published architecture has this base's layers, so PEFT cannot load an adapter for it")
    sizes = config.layer(0)
    return config.n_layer, 2, sizes.n_kv_head, sizes.head_dim


@torch.no_grad()
def _layers(payload: Mapping[str, Any], config: GPTConfig, settings: PrefixSettings) -> list[Tensor]:
    """Keys and values of each layer, (2, heads, P, head_dim), made by the prefix's network where it has one."""
    with torch.device("meta"):
        model = apply_method(GPT(config), "prefix", settings)
    assert isinstance(model.prompt, Prefix)
    model.prompt.to_empty(device="cpu")
    load_adapter_state(model, payload["model"])
    made = adapter_state(model, folded=True)
    return [made[f"prompt.final.{i}"] for i in range(config.n_layer)]


def _turned(keys: Tensor, length: int, config: GPTConfig) -> Tensor:
    """Keys (..., head_dim), turned by `length` positions."""
    if config.position != "rope":
        raise ValueError(
            f"PEFT's text begins at position {length}, behind the prefix; this one was trained with texts from 0 on, "
            "and learned positions cannot be shifted: train it with --prefix_takes_positions"
        )
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, keys.device)
    return apply_rope(keys, rope_tables(torch.tensor([length]), frequencies))
