"""A checkpoint payload as a Hugging Face folder that transformers loads with the same logits."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.chat import ChatTemplate, as_jinja, stop_ids
from data.templates import PromptTemplate, template_from_spec
from data.tokenizer import BpeTokenizer, Tokenizer, tokenizer_from_spec
from formats.checkpoint import TEMPORARY, sync_folder
from formats.errors import FormatError
from formats.hf_families import ESPALIER, family_of, from_gpt_config
from formats.hf_names import prefix, stored_tensors
from formats.hf_read import read_huggingface
from formats.open_model import check_weights
from formats.stored import Stored
from formats.tokenizer_json import to_tokenizer_json
from model.config import GPTConfig
from model.gpt import GPT

_SHARD_BYTES = 4_000_000_000
_ESPALIER_NOTE = (
    "no published architecture has these layers: this project opens the folder, transformers does not; "
    "a Llama whose layers differ in size can also be written as GGUF, which llama.cpp reads"
)
# transformers 5 splits text so for every folder of Qwen2, whatever its tokenizer.json says.
_QWEN2_SPLIT = r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
_QWEN2_NOTE = (
    "transformers 5 takes any tokenizer of a Qwen2 model for Qwen's, which this one is not: "
    "load it with PreTrainedTokenizerFast.from_pretrained, not with AutoTokenizer"
)


def write_huggingface(payload: dict[str, Any], folder: str | Path, shard_bytes: int = _SHARD_BYTES) -> dict[str, Any]:
    """Write config, float32 weights, tokenizer and template; read them back; report what was found.

    The report: "path", "files", "notes", and "largest_difference" between a weight given and the one read back. The
    layout is that of the family which can express the network (GPT-2, Llama, Mistral, Qwen2, Qwen3), rows of padding
    left out; otherwise of model_type "espalier", and a note says who reads it. The folder appears whole or not at all.
    ValueError where `folder` is a file or not empty, or the payload is incomplete; OSError where it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder: give another name or remove it")
    if not isinstance(payload.get("tokenizer"), dict):
        raise ValueError("the checkpoint holds no tokenizer, without which nobody can use the exported model")
    tokenizer, template = tokenizer_from_spec(payload["tokenizer"]), template_from_spec(payload.get("template"))
    config = _exported_config(payload["config"], tokenizer)
    with torch.device("meta"):
        check_weights(GPT(GPTConfig.from_dict(payload["config"])), payload["model"], "the checkpoint")
    temporary = folder.parent / f"{TEMPORARY}{folder.name}-{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        _write_json(temporary / "config.json", _config_json(config, tokenizer))
        _write_json(temporary / "generation_config.json", _generation(tokenizer, template))
        (temporary / "tokenizer.json").write_text(to_tokenizer_json(tokenizer), "utf-8")
        _write_json(temporary / "tokenizer_config.json", _tokenizer_config(config, tokenizer, template))
        _write_weights(temporary, config, payload["model"], shard_bytes)
        difference = _compared(read_huggingface(temporary), config, tokenizer, payload["model"])
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        sync_folder(temporary)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    notes = _notes(config, tokenizer, GPTConfig.from_dict(payload["config"]).vocab_size)
    files = sorted(file.name for file in folder.iterdir())
    return {"path": str(folder), "files": files, "notes": notes, "largest_difference": difference}


def _exported_config(values: dict[str, Any], tokenizer: Tokenizer) -> GPTConfig:
    """The network's config with the ids that the tokenizer has; dropout is a setting of training, not of a model."""
    config = GPTConfig.from_dict(values)
    return dataclasses.replace(config, vocab_size=min(config.vocab_size, tokenizer.vocab_size), dropout=0.0)


def _notes(config: GPTConfig, tokenizer: Tokenizer, given_ids: int) -> list[str]:
    """What a user of the folder must know."""
    family = family_of(config)
    notes = [_ESPALIER_NOTE] if family == ESPALIER else []
    if family == "qwen2" and not (isinstance(tokenizer, BpeTokenizer) and _QWEN2_SPLIT in _split_of(tokenizer)):
        notes.append(_QWEN2_NOTE)
    if config.vocab_size < given_ids:
        notes.append(f"vocabulary of {given_ids:,} cut to the {config.vocab_size:,} ids that the tokenizer has")
    return notes


def _split_of(tokenizer: BpeTokenizer) -> str:
    """The patterns of the tokenizer's first step, which cuts text into words."""
    steps = json.loads(tokenizer.tokenizer_json).get("pre_tokenizer") or {}
    patterns = [step.get("pattern") or {} for step in steps.get("pretokenizers", [steps])]
    return " ".join(str(pattern.get("Regex")) for pattern in patterns)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _config_json(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    values = from_gpt_config(config)
    if values["model_type"] == ESPALIER:
        values["note"] = _ESPALIER_NOTE
    return {**values, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eot_id}


def _generation(tokenizer: Tokenizer, template: PromptTemplate | ChatTemplate | None) -> dict[str, Any]:
    """Where generation stops: at the end of text, which comes first, and at what ends an answer."""
    ends = dict.fromkeys([tokenizer.eot_id, *stop_ids(template, tokenizer)])
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(ends)}


def _tokenizer_config(
    config: GPTConfig, tokenizer: Tokenizer, template: PromptTemplate | ChatTemplate | None
) -> dict[str, Any]:
    end = next(name for name, token in tokenizer.special_tokens.items() if token == tokenizer.eot_id)
    begin = tokenizer.spec().get("bos") or ""
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False,
        "bos_token": begin or None,
        "eos_token": end,
    }
    if isinstance(template, ChatTemplate):
        values |= {"bos_token": template.bos_token or None, "eos_token": template.eos_token or end}
        values["chat_template"] = template.source
    elif template is not None:
        values["chat_template"] = as_jinja(template, end, begin)
    return values


def _write_weights(folder: Path, config: GPTConfig, weights: dict[str, Tensor], shard_bytes: int) -> None:
    """model.safetensors, or shards of at most `shard_bytes` (or one tensor) with their index."""
    from safetensors.torch import save_file

    model_type = family_of(config)
    shards: list[list[Stored]] = [[]]
    room = shard_bytes
    for stored in stored_tensors(config, model_type):
        room -= _bytes(stored)
        if room < 0 and shards[-1]:
            shards.append([])
            room = shard_bytes - _bytes(stored)
        shards[-1].append(stored)
    listed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {_full_name(stored, model_type): stored.assemble(weights).to(torch.float32) for stored in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        listed |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(_bytes(stored) for shard in shards for stored in shard)
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": listed})


def _bytes(stored: Stored) -> int:
    return 4 * torch.Size(stored.shape).numel()


def _full_name(stored: Stored, model_type: str) -> str:
    return stored.name if stored.name == "lm_head.weight" else prefix(model_type) + stored.name


def _compared(back: dict[str, Any], config: GPTConfig, tokenizer: Tokenizer, weights: dict[str, Tensor]) -> float:
    """The largest difference of any weight. FormatError where the folder would be another model or tokenizer."""
    read = GPTConfig.from_dict({**back["config"], "padded_vocab_size": config.padded_vocab_size})
    if read != config:
        raise FormatError(f"reading back gave another config: {read} instead of {config}")
    if _vocabulary(tokenizer_from_spec(back["tokenizer"])) != _vocabulary(tokenizer):
        raise FormatError("reading back gave another tokenizer than the checkpoint's")
    largest = 0.0
    for name, tensor in back["model"].items():
        rows = config.vocab_size if name in ("wte.weight", "lm_head.weight") else len(tensor)
        difference = (tensor[:rows] - weights[name][:rows].to(torch.float32)).abs().max().item()
        largest = max(largest, difference)
    return largest


def _vocabulary(tokenizer: Tokenizer) -> tuple[Any, ...]:
    """What makes two tokenizers one, whether a role was given or stands in the file."""
    plain = tokenizer
    if isinstance(tokenizer, BpeTokenizer):
        plain = BpeTokenizer(tokenizer.tokenizer_json, eot=tokenizer.spec()["eot"])
    return plain.fingerprint, tokenizer.eot_id, tokenizer.bos_id
