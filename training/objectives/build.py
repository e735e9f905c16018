"""The objective of a run, from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.shards import TokenSet
from data.tokenizer import Tokenizer
from model.gpt import GPT
from training.distributed import Dist
from training.objectives.distill import Distillation, open_teacher
from training.objectives.dpo import DPO
from training.objectives.grpo import GRPO
from training.objectives.objective import Objective, Supervised
from training.objectives.reference import open_reference
from training.run_settings import FinetuneSettings, RunSettings
from training.settings import is_explicit
from training.start import Start
from training.stop import StopRequest

# The kinds of sets that an objective can use, and what makes one.
_KINDS = {
    "sft": (("text", "instruction"), "prepare records with an answer each (prepare_data.py --format instruction)"),
    "dpo": (("preference",), "prepare pairs of a chosen and a rejected answer (prepare_data.py --format preference)"),
    "distill": (("text", "instruction"), "prepare text or records (prepare_data.py)"),
    "grpo": (("prompts", "instruction"), "prepare prompts (prepare_data.py --format prompts) or records"),
}


def objective_name(settings: RunSettings) -> str:
    """sft, dpo, grpo or distill; pretraining is what sft is on text."""
    return settings.objective if isinstance(settings, FinetuneSettings) else "sft"


def check_data(settings: RunSettings, tokens: TokenSet) -> None:
    """Raises ValueError where the run's objective can not use the set."""
    name, kind = objective_name(settings), tokens.meta["kind"]
    kinds, remedy = _KINDS[name]
    if kind not in kinds:
        fits = [f"--objective {other}" for other, (theirs, _) in _KINDS.items() if kind in theirs]
        raise ValueError(
            f"{tokens.folder}: is a set of kind {kind}, --objective {name} needs {' or '.join(kinds)}: "
            f"use {' or '.join(fits)}, or {remedy}"
        )
    if name in ("dpo", "grpo") and is_explicit(settings, "packing") and settings.packing:
        raise ValueError(f"--packing: --objective {name} compares whole rows of one sequence each: leave it out")


def build_objective(
    settings: RunSettings,
    here: Dist,
    start: Start,
    model: GPT,
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
    folder: Path,
    stop: StopRequest,
) -> tuple[Objective, dict[str, Any]]:
    """What the run minimises, and the entries that its checkpoints need for it. ValueError for what can not be."""
    name = objective_name(settings)
    saved = start.payload.get("settings", {}).get("objective", "sft") if start.resumes and start.payload else name
    if saved != name:
        raise ValueError(
            f"{start.path} is of a run with --objective {saved}, the flags ask for {name}: leave the flag out to go "
            "on, or start a new run from its result with --pretrained_checkpoint"
        )
    if not isinstance(settings, FinetuneSettings) or name == "sft":
        return Supervised(model), {}
    if name == "distill":
        teacher, called, entries = open_teacher(settings, here, start, model, tokenizer, folder)
        return Distillation(settings, model, teacher, called), entries
    if name == "grpo" and settings.grpo_beta == 0:
        return GRPO(settings, model, None, tokenizer, stop_ids, stop), {}
    reference, entries = open_reference(settings, here, start, model, folder)
    if name == "dpo":
        return DPO(settings, model, reference, stop), entries
    return GRPO(settings, model, reference, tokenizer, stop_ids, stop), entries
