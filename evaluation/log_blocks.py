"""The lines of one evaluation; their names and their order are fixed, scripts read them."""

from __future__ import annotations

from typing import Any

from evaluation.perplexity import PerplexityResult
from evaluation.text_metrics import ROUGE_TYPES

ACCURACIES = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")  # of multiple choice, here and in lm-eval
HEADING = "***** Running evaluation *****"
_SHOWN = {"bleu": "BLEU", "chrf": "chrF"} | {kind: f"ROUGE-{kind.removeprefix('rouge')}" for kind in ROUGE_TYPES}
_SHOWN |= {"exact_match": "Exact Match", "f1": "F1"}


def likelihood_block(label: str, text: str, scored: str, result: PerplexityResult) -> list[str]:
    """How likely a text is."""
    lines = [
        HEADING,
        f"  Checkpoint = {label}",
        f"  Text = {text} ({scored})",
        f"  Num examples = {result.windows}",
        f"  Protocol: {result.protocol}",
        f"Eval Loss: {result.loss:.4f}",
        f"Eval Perplexity: {result.perplexity:.4f}",
    ]
    return lines if result.accuracy is None else [*lines, f"Eval Accuracy: {result.accuracy:.4f}"]


def answers_block(label: str, text: str, found: dict[str, Any]) -> list[str]:
    """What a model's answers are worth; `found` is what `compare_answers` gives, with template and length."""
    template = "raw prompts" if found["template"] is None else f"template {found['template']}"
    return [
        HEADING,
        f"  Checkpoint = {label}",
        f"  Text = {text} (answers to {template})",
        f"  Num examples = {found['samples']}",
        f"  Protocol: greedy, at most {found['max_new_tokens']} tokens",
        *(f"  {name}: {signature}" for name, signature in found["signatures"].items()),
        *(f"Eval {shown}: {found[name]:.2f}" for name, shown in _SHOWN.items() if name in found),
    ]


def choices_block(label: str, text: str, found: dict[str, Any]) -> list[str]:
    """How often the right ending is the likeliest; `found` is what `multiple_choice` gives."""
    names = {"acc": "Eval Accuracy", "acc_norm": "Eval Accuracy (by length)"}
    errors = {name: found[f"{name}_stderr"] for name in names}
    return [
        HEADING,
        f"  Checkpoint = {label}",
        f"  Text = {text} (multiple choice)",
        f"  Num examples = {found['samples']}",
        "  Protocol: likelihood of each ending after its context and a space; by length: over its characters",
        *(
            f"{shown}: {found[name]:.4f}" + (f" +- {errors[name]:.4f}" if errors[name] is not None else "")
            for name, shown in names.items()
        ),
    ]


def task_block(label: str, task: str, found: dict[str, Any]) -> list[str]:
    """What lm-eval measured; `found` is what `run_task` gives."""
    values = dict(found["values"])
    values |= {f"{part} {name}": value for part, each in found["parts"].items() for name, value in each.items()}
    return [
        HEADING,
        f"  Checkpoint = {label}",
        f"  Text = {task} (lm-eval, version {found['version']})",
        f"  Num examples = {found['samples']}",
        *(f"Eval {name}: {value:.4f}" for name, value in values.items() if value is not None),
    ]
