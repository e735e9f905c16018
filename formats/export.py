"""Models in and out of the project, each way ending with what was compared: the work of `export.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from formats.adapter import is_adapter
from formats.checkpoint import (
    TRAINING_KEYS,
    load_checkpoint,
    masks_entry,
    payload_bytes,
    payload_masks,
    save_checkpoint,
)
from formats.compact import to_compact
from formats.open_model import build_model, load_payload
from formats.settings import (
    CompactSettings,
    GgufSettings,
    HuggingFaceSettings,
    ImportSettings,
    MergeSettings,
    PeftSettings,
)
from model.config import GPTConfig
from model.masks import sparsity_line, sparsity_report
from model.tuning import base_state, merge

Say = Callable[[str], None]
_PROBE_LENGTH = 32  # tokens on which the two networks' logits are compared


def import_model(settings: ImportSettings, say: Say) -> None:
    """Write any model that opens as a weights-only checkpoint. Raises ValueError or OSError for what cannot be."""
    _need(settings.source, "SRC, the model to import")
    out = _output_file(settings.out, ".pt", settings.overwrite)
    payload = load_payload(settings.source)
    _say_notes(payload, say)
    payload.pop("in_memory", None)
    size = save_checkpoint(out, payload)
    difference = _largest_difference(payload["model"], load_checkpoint(out)["model"])
    say(f"Compared {len(payload['model'])} tensors with {out} read back: largest difference {difference:g}")
    say(f"{out}: {_describe(payload)}, {size / 1e6:,.1f} MB")


def _whole_model(checkpoint: str, then: str = "export") -> dict[str, Any]:
    payload = load_payload(checkpoint)
    if is_adapter(payload):
        raise ValueError(f"{checkpoint}: is an adapter: merge it (export.py merge) and {then} the result")
    return payload


def export_huggingface(settings: HuggingFaceSettings, say: Say) -> None:
    """Write a model as a folder that transformers loads. Raises ValueError or OSError for what cannot be."""
    from formats.hf_write import write_huggingface

    _need(settings.checkpoint, "CKPT, the model to export")
    _need(settings.out, "OUT_DIR, the folder to write")
    if not settings.max_shard_gb > 0:
        raise ValueError(f"--max_shard_gb {settings.max_shard_gb}: expected a size above 0")
    payload = _whole_model(settings.checkpoint)
    report = write_huggingface(payload, Path(settings.out), shard_bytes=int(settings.max_shard_gb * 1e9))
    _finish(payload, report, Path(settings.out), say)


def export_gguf(settings: GgufSettings, say: Say) -> None:
    """Write a model as a file that llama.cpp loads. Raises ValueError or OSError for what cannot be."""
    from formats.gguf_write import write_gguf

    _need(settings.checkpoint, "CKPT, the model to export")
    out = _output_file(settings.out, ".gguf", settings.overwrite)
    payload = _whole_model(settings.checkpoint)
    report = write_gguf(payload, out, settings.dtype)
    _finish(payload, report, out, say)


def export_peft(settings: PeftSettings, say: Say) -> None:
    """Write a LoRA adapter or a prefix as a folder that PEFT loads. Raises ValueError or OSError for what cannot be."""
    from formats.peft import write_peft

    _need(settings.adapter, "ADAPTER, the adapter to export")
    _need(settings.out, "OUT_DIR, the folder to write")
    report = write_peft(load_payload(settings.adapter), Path(settings.out))
    _say_notes(report, say)
    say(f"Compared what it does with {settings.out} read back: largest difference {report['largest_difference']:g}")


def export_compact(settings: CompactSettings, say: Say) -> None:
    """Write a pruned model without its zeros, weights only. Raises ValueError or OSError for what cannot be."""
    _need(settings.checkpoint, "CKPT, the pruned model")
    out = _output_file(settings.out, ".pt", settings.overwrite)
    payload = _whole_model(settings.checkpoint, then="compact")
    masks = payload_masks(payload, settings.checkpoint)
    if not masks:
        raise ValueError(f"{settings.checkpoint}: has no pruning masks, so there are no zeros to leave out")
    payload = {key: value for key, value in payload.items() if key not in (*TRAINING_KEYS, "in_memory")}
    size = save_checkpoint(out, to_compact(payload, masks, settings.dtype))
    back = load_checkpoint(out)
    difference = _largest_difference(payload["model"], back["model"])
    say(f"Compared {len(payload['model'])} tensors with {out} read back: largest difference {difference:g}")
    rows = sparsity_report(build_model(back, out), masks)
    say(f"Sparsity: {sparsity_line(rows)}")
    dense = payload_bytes(payload["model"])
    say(f"{out}: {size / 1e6:,.1f} MB, {size / dense:.3f} of the {dense / 1e6:,.1f} MB of its weights with their zeros")


@torch.inference_mode()
def merge_adapter(settings: MergeSettings, say: Say) -> None:
    """Write base and LoRA as one weights-only checkpoint. Raises ValueError or OSError for what cannot be."""
    _need(settings.adapter, "ADAPTER, the adapter to merge")
    out = _output_file(settings.out, ".pt", settings.overwrite)
    payload = load_payload(settings.adapter, base_model=settings.base_model)
    if not is_adapter(payload):
        raise ValueError(f"{settings.adapter}: is a whole model, there is nothing to merge")
    if payload["adapter"]["method"] == "qlora":  # into the base itself, not into what four bits keep of it
        lora = payload["adapter"]["settings"]["lora"]
        payload = {**payload, "adapter": {"method": "lora", "settings": lora}}
        say("Note: trained on a quantised base, merged into the unquantised one: outputs differ by the quantisation")
    model = build_model(payload, settings.adapter, base_model=settings.base_model).eval()
    ids = _probe(model.config)
    apart = model(ids)[..., : model.config.vocab_size]
    merge(model)
    about = {key: payload.get(key) for key in ("tokenizer", "template", "step", "val_loss")}
    weights = base_state(model)
    masks = masks_entry(model.masks)
    size = save_checkpoint(out, {"model": weights, "config": model.config.to_dict(), **masks, **about})
    merged = build_model(load_checkpoint(out), out).eval()(ids)[..., : model.config.vocab_size]
    difference = float((merged - apart).abs().max())
    say(f"Compared the logits of {ids.numel()} tokens, merged and apart: largest difference {difference:g}")
    say(f"{out}: {sum(tensor.numel() for tensor in weights.values()):,} parameters, {size / 1e6:,.1f} MB")


def _finish(payload: dict[str, Any], report: dict[str, Any], out: Path, say: Say) -> None:
    """Notes, and the comparison: of the weights by the writer, of the logits here, with the file opened anew."""
    _say_notes(report, say)
    if payload.get("masks"):
        say("Note: the zeros are in the file, the pruning masks are not: what trains it elsewhere may fill them")
    say(
        f"Compared {len(payload['model'])} tensors with {out} read back: "
        f"largest difference {report['largest_difference']:g}"
    )
    difference = logits_difference(payload, load_payload(out))
    say(f"Compared the logits of {_PROBE_LENGTH} tokens: largest difference {difference:g}")
    say(f"{out}: {_describe(payload)}")


@torch.inference_mode()
def logits_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference between the logits of two payloads' networks on a fixed row of random ids."""
    found = []
    ids = _probe(GPTConfig.from_dict(one["config"]))
    for payload in (one, other):
        model = build_model(payload, "the model").eval()
        found.append(model(ids)[..., : model.config.vocab_size])
    if found[0].shape != found[1].shape:
        raise ValueError(f"the file read back has a vocabulary of {found[1].size(-1)}, the model {found[0].size(-1)}")
    return float((found[0] - found[1]).abs().max())


def _probe(config: GPTConfig) -> torch.Tensor:
    """Random ids (1, T), always the same."""
    length = min(_PROBE_LENGTH, config.block_size)
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((float((one[name] - other[name]).abs().max()) for name in one if one[name].numel()), default=0.0)


def _describe(payload: dict[str, Any]) -> str:
    config = payload["config"]
    parameters = sum(tensor.numel() for tensor in payload["model"].values())
    template = payload.get("template")
    prompts = f"template {template['name']}" if template else "no prompt template"
    return f"{parameters:,} parameters, {config['n_layer']} layers, context {config['block_size']:,}, {prompts}"


def _say_notes(payload: dict[str, Any], say: Say) -> None:
    for note in payload.get("notes", ()):
        say(f"Note: {note}")


def _need(value: str, what: str) -> None:
    if not value:
        raise ValueError(f"{what}, is missing (--help shows the form)")


def _output_file(name: str, suffix: str, overwrite: bool) -> Path:
    _need(name, f"OUT{suffix}, the file to write")
    out = Path(name)
    if out.suffix != suffix:
        raise ValueError(f"{out}: expected a name that ends in {suffix}")
    if out.is_dir():
        raise ValueError(f"{out}: is a folder, expected a file to write")
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: is there already: choose another name, or add --overwrite")
    return out
