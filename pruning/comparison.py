"""The model before and after, measured side by side: one dict that terminal, JSON file and page show alike.

{"format": 1, "kind": "pruning", "title": str, "notes": [str], "protocol": str, "settings": {...},
 "models": [{"label", "path", "parameters", "nonzero", "file_bytes", "compact_bytes",
             "peak_memory_mb", "tokens_per_s", "weights", "perplexity"}],
            dense, pruned, recovered; before, recovered by --method none; what was not measured is None
 "rival": {"note", "perplexity", "parameters", ...} or None,
 "layers": [{"layer", "attention": [kept, of], "mlp": [kept, of]}] or None,
 "answers": what evaluation.compare.compare gives}
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluation.compare import Sampling
from evaluation.compare import compare as compare_answers
from evaluation.prompts import prompt_record, read_prompts
from formats.checkpoint import payload_bytes
from formats.open_model import build_model, load_payload
from pruning.files import check_place, model_payload
from pruning.measure import sizes, speed_and_memory
from pruning.settings import PruneSettings
from report.files import write_json
from report.pruning import pruning_page, render_pruning
from training.distributed import choose_device
from training.run_settings import FinetuneSettings
from training.settings import to_dict

_ANSWERS = 3
_NOT_FASTER = 1.02  # times the dense speed; less is within what a machine varies by


def check_report_path(settings: PruneSettings, decisive: Sequence[str]) -> None:
    """ValueError where something else than a report of this run is in the way; `decisive` settings tell runs apart."""
    path = settings.report_path
    for file in (path, path.with_suffix(".html")):
        if file.is_dir():
            raise ValueError(f"--report {path}: {file} is a folder")
    if path.exists():
        _refuse_another_report(path, settings, decisive)
    elif path.with_suffix(".html").exists():
        raise ValueError(f"--report {path}: {path.with_suffix('.html')} is there already: choose another name")
    check_place(path, f"--report {path}")


def _refuse_another_report(path: Path, settings: PruneSettings, decisive: Sequence[str]) -> None:
    try:
        there = json.loads(path.read_text("utf-8"))
        before = dict(there["settings"]) if there["kind"] == "pruning" else None
    except (ValueError, KeyError, TypeError):
        before = None
    if before is None:
        raise ValueError(f"--report {path}: is there already and no report of prune.py: choose another name")
    now = to_dict(settings)
    for name in ("base_model", "out", "save_ckpt_log_name", *decisive):
        if before.get(name) != now[name]:
            raise ValueError(
                f"--report {path}: is the report of another run ({name} {before.get(name)}, now {now[name]}): choose "
                "another --report or --save_ckpt_log_name"
            )


def check_prompts(settings: PruneSettings) -> None:
    """ValueError or OSError where --prompts cannot be read; standard input, which is read once, is left for then."""
    if settings.prompts not in (None, "-"):
        read_prompts(str(settings.prompts))


def compare(settings: PruneSettings, result: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Measures the models of a finished run, prints the table, writes JSON and page; returns the dict."""
    device = choose_device(settings.device)
    columns = [("dense", result["base"], "before"), ("pruned", result["pruned"], "after")]
    if result["pruned"] is None:  # only recovered
        columns = [("before", result["base"], "after")]
    if result["recovered"] is not None:
        columns.append(("recovered", result["recovered"], "recovered"))
    models = [
        {"label": label, "path": str(ref), **_sizes(str(ref)), "perplexity": result["perplexity"][when]}
        for label, ref, when in columns
    ]
    for model in models[1:]:  # of the base, which may be a GGUF file or hold training state, the fp32 weights count
        model["file_bytes"] = Path(model["path"]).stat().st_size
    refs = [str(ref) for _, ref, _ in columns]
    if settings.speed_runs:
        for model, found in zip(models, speed_and_memory(refs, settings.speed_runs, str(device), say)):
            model |= found
    own = [prompt_record(prompt) for prompt in FinetuneSettings.sample_prompts]
    prompts = read_prompts(settings.prompts) if settings.prompts else own
    sampling = Sampling(max_new_tokens=64, temperature=0.7, seed=settings.seed)
    answers = compare_answers(refs, prompts[:_ANSWERS], sampling, device=device)
    rival = (result["pruning"] or {}).get("rival")
    report = {
        "format": 1, "kind": "pruning", "title": _title(settings), "protocol": result["protocol"],
        "notes": [*(result["pruning"] or {}).get("notes", []), *_notes(models, rival)],
        "settings": to_dict(settings), "models": models, "rival": rival, "layers": result["layers"],
        "answers": answers,
    }  # fmt: skip
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    say("\n" + render_pruning(report, width))
    path = write_json(settings.report_path, report)
    page = pruning_page(report, path.with_suffix(".html"))
    say(f"\nReport: {path}\nPage:   {page.resolve()}")
    return report


def _sizes(ref: str) -> dict[str, Any]:
    """Parameters, numbers that are not zero, and the bytes of the fp32 weights; speed and memory are not known yet."""
    model = build_model(load_payload(ref), ref)
    found = sizes(model)
    bytes_ = found.pop("tensor_bytes")
    compact = payload_bytes(model_payload(model, compact=True)) if model.masks else None
    unknown = {"tokens_per_s": None, "peak_memory_mb": None, "weights": None}
    return {**found, "file_bytes": bytes_, "compact_bytes": compact, **unknown}


def _title(settings: PruneSettings) -> str:
    name = Path(settings.base_model).name
    if settings.method == "none":
        return f"{name}, recovered"
    if settings.method in ("structured", "drop_layers"):
        return f"{name}, {settings.method} pruning of {100 * settings.pruning_ratio:g}%"
    pattern = f"{settings.block_size}x{settings.block_size} blocks" if settings.pattern == "block" else settings.pattern
    return f"{name}, {settings.method} pruning to {100 * settings.sparsity:g}% zeros, {pattern}"


def _notes(models: list[dict[str, Any]], rival: dict[str, Any] | None) -> list[str]:
    """What the numbers say, also where it is not what one hoped for."""
    notes = []
    dense, pruned = models[0], models[-1]  # the first may be pruned itself, where a run only recovers
    theirs, whole = "the dense model's", "the dense weights"
    if dense["label"] != "dense":
        theirs, whole = "that of the model before", "its weights with them"
    if dense["tokens_per_s"] and pruned["tokens_per_s"] and len(models) > 1:
        ratio = pruned["tokens_per_s"] / dense["tokens_per_s"]
        word = "faster" if ratio > _NOT_FASTER else "NOT faster"
        how = "; its zeros are left out, as sample.py --weights sparse does" if pruned["weights"] == "sparse" else ""
        notes.append(f"Generation is {word} than {theirs}: {ratio:.2f} times its tokens/s (medians, in turns{how})")
    if pruned["compact_bytes"] is not None:
        ratio = pruned["compact_bytes"] / dense["file_bytes"]
        notes.append(
            f"Without its zeros it takes {pruned['compact_bytes'] / 1e6:,.1f} MB, {ratio:.2f} of {whole} "
            "(--compact, or export.py compact)"
        )
    own = models[1]["perplexity"] if len(models) > 1 else None
    if rival is not None and rival["perplexity"] and own:
        word = "better" if own < rival["perplexity"] else "WORSE"
        notes.append(f"Before recovery it is {word} than the cheap rival: {rival['note']}")
    return notes
