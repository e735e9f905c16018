"""Recovery after pruning: the loop of `finetune_dolly.py` with the settings of the guide to it, on text or records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.cache import prepare_text_cache
from data.manifest import MANIFEST, resolve_data_dir
from data.sources import source_format
from data.tokenizer import Tokenizer
from formats.adapter import is_adapter, weights_digest
from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.open_model import build_model, check_exists, load_payload, read_config
from model.gpt import GPT
from model.lora import target_names
from model.masks import check_masks
from model.tuning import merge
from pruning.files import model_payload
from pruning.settings import OF_DISTILLATION, OF_LORA, PruneSettings, finetune_lr
from pruning.text import EMBEDDED, source_of
from report.files import write_json
from training.run_folder import RunFolder
from training.run_settings import FinetuneSettings
from training.settings import listed, to_dict

Say = Callable[[str], None]
_DOCUMENTS_PER_SAMPLE = 4  # of a Hub's set: enough that short ones fill the windows asked for
_RENAMED = {
    "finetune_method": "finetune_method",
    "finetune_epochs": "epochs",
    "finetune_samples": "max_samples",
    "finetune_batch_size": "batch_size",
    "finetune_grad_accum": "grad_accum_steps",
    "finetune_max_grad_norm": "max_grad_norm",
    "finetune_weight_decay": "weight_decay",
    "finetune_warmup_steps": "warmup_steps",
    "finetune_checkpoint_interval": "checkpoint_interval",
    "seed": "seed",
    "device": "device",
}


def check_recovery(settings: PruneSettings, model: GPT) -> None:
    """ValueError or OSError, before `model` is pruned, where teacher, data or LoRA's layers are not there."""
    if not settings.finetune:
        return
    if settings.objective == "distill" and settings.teacher is not None:
        check_exists(settings.teacher)
    ref = settings.finetune_data
    if ref is not None and not (resolve_data_dir(ref) / MANIFEST).is_file():
        source_of(ref)
    if settings.finetune_method == "lora":
        try:
            target_names(model, listed(settings.lora_target_modules))
        except ValueError as error:
            raise ValueError(f"--lora_target_modules: {error}") from None


def recover(settings: PruneSettings, start: Path, tokenizer: Tokenizer, say: Say) -> bool:
    """Trains the model in `start` and writes `settings.recovered_path`; False if it was stopped before its end.

    A recovery that was interrupted goes on from its last checkpoint; one that is done is not repeated.
    Raises ValueError or OSError for what a user can mend.
    """
    pruned = load_payload(start)
    made = _made(settings, weights_digest(pruned["model"]))
    if _done_before(settings.recovered_path, made):
        say(f"{settings.recovered_path}: was recovered by these settings already")
        return True
    tuning = finetune_settings(settings, start, pruned, tokenizer, say)
    claim(Path(tuning.log_dir), made)

    from training.launch import finetune

    summary = finetune(tuning)
    if not summary["finished"]:
        say("Recovery was stopped. The same command goes on with it.")
        return False
    payload = load_checkpoint(summary["checkpoint"])
    model = build_model(payload, summary["checkpoint"]).eval()
    if is_adapter(payload):
        merge(model)
        say(f"LoRA weights merged; the adapter alone: {summary['checkpoint']}")
    check_masks(model, model.masks)
    about = {key: payload.get(key) for key in ("tokenizer", "template", "step", "val_loss")}
    about |= {"pruning": pruned.get("pruning"), "recovery": {"made": made}}
    size = save_checkpoint(settings.recovered_path, model_payload(model, settings.compact, **about))
    say(f"Saved {settings.recovered_path} ({size / 1e6:.1f} MB)")
    return True


def finetune_settings(
    settings: PruneSettings, start: Path, pruned: dict[str, Any], tokenizer: Tokenizer, say: Say
) -> FinetuneSettings:
    """What the loop is told: 000's defaults, a straight line down to 0, the last weights. All of it is explicit."""
    values: dict[str, Any] = {ours: getattr(settings, name) for name, ours in _RENAMED.items()}
    context = read_config(start).block_size
    values |= {
        "pretrained_checkpoint": str(start),
        "log_dir": str(settings.folder / "recovery"),
        "data_dir": training_data(settings, tokenizer, say),
        "prompt_template": "model" if pruned.get("template") else "dolly",
        "objective": settings.objective,
        "max_lr": finetune_lr(settings),
        "lr_schedule": "linear",
        "min_lr_ratio": 0.0,
        "block_size": min(settings.finetune_seq_len, context),
        "eval_interval": "epoch",
        "max_eval_samples": settings.eval_samples,
        "generate_interval": 0,
        "keep_last_n_checkpoints": 2,
        "auto_resume": True,
    }
    if settings.finetune_method == "lora":
        values |= {name: getattr(settings, name) for name in OF_LORA}
    if settings.objective == "distill":
        values |= {name: getattr(settings, name) for name in OF_DISTILLATION}
        values["teacher"] = teacher(settings, pruned)
    tuning = FinetuneSettings(**values)
    object.__setattr__(tuning, "explicit_names", frozenset(values))
    return tuning


def teacher(settings: PruneSettings, pruned: dict[str, Any]) -> str:
    """--teacher, or the model that was pruned. ValueError where that is not known, or not there, or another by now."""
    if settings.teacher is not None:
        return settings.teacher
    if settings.method != "none":
        return settings.base_model
    base = (pruned.get("pruning") or {}).get("base", {})
    if base.get("name") is None:
        raise ValueError(
            f"--objective distill: {settings.base_model} does not say what it was pruned from: name that with --teacher"
        )
    name, digest = str(base["name"]), base.get("digest")
    if digest is not None and digest != weights_digest(build_model(load_payload(name), name).state_dict()):
        raise ValueError(
            f"{name}: is not the model that {settings.base_model} was pruned from any more: name one with --teacher"
        )
    return name


def training_data(settings: PruneSettings, tokenizer: Tokenizer, say: Say) -> str:
    """The folder of token shards, or the file of records, that --finetune_data means; text is prepared into a cache."""
    ref = settings.finetune_data
    if ref is None:
        say("Recovery reads the embedded text (documentation of Python); --finetune_data names another")
        ref = EMBEDDED
    if (resolve_data_dir(ref) / MANIFEST).is_file():
        return ref
    source, inputs = source_of(ref)
    if source in ("jsonl", "parquet") and source_format(source, inputs) != "text":
        return ref
    from_hub = not inputs and source != EMBEDDED
    documents = _DOCUMENTS_PER_SAMPLE * settings.finetune_samples if from_hub else None
    return str(prepare_text_cache(source, inputs, tokenizer, documents))


def _made(settings: PruneSettings, digest: str) -> dict[str, Any]:
    """What decides the recovered model, as plain values."""
    values = to_dict(settings)
    names = [*(name for name in _RENAMED if name != "device"), "finetune_seq_len", "finetune_data", "objective"]
    names += OF_LORA if settings.finetune_method == "lora" else ()
    names += OF_DISTILLATION if settings.objective == "distill" else ()
    return {**{name: values[name] for name in names}, "finetune_lr": finetune_lr(settings), "pruned": digest}


def _done_before(path: Path, made: dict[str, Any]) -> bool:
    """Whether the recovered model is there and is this one's; ValueError where it is another's."""
    if not path.exists():
        return False
    entry = load_checkpoint(path).get("recovery")
    if isinstance(entry, dict) and entry.get("made") == made:
        return True
    before = entry.get("made", {}) if isinstance(entry, dict) else {}
    differing = [f"{name} {before.get(name)} -> {value}" for name, value in made.items() if before.get(name) != value]
    why = f", recovered with other settings ({', '.join(differing[:3])})" if before else ""
    raise ValueError(f"{path}: is there already{why}: choose another --out or --save_ckpt_log_name")


def claim(folder: Path, made: dict[str, Any]) -> None:
    """The folder is this recovery's from now on. ValueError where it holds another's, which would be gone on with.

    A recovery that was broken off before its first checkpoint, by a mistaken flag say, leaves nothing to go on with.
    """
    note = folder / "recovery.json"
    if note.exists() and RunFolder(folder).checkpoints():
        before = json.loads(note.read_text("utf-8"))
        if before != made:
            name = next(name for name, value in made.items() if before.get(name) != value)
            raise ValueError(
                f"{folder}: holds a recovery with another {name} ({before.get(name)}, now {made[name]}): choose "
                "another --save_ckpt_log_name, or delete the folder"
            )
    write_json(note, made)
