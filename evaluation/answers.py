"""A model's own answers to a set of instructions, and what they are worth beside the references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from evaluation.checkpoints import ignore
from evaluation.instructions import Asked, Question
from evaluation.processes import ALONE, Processes, map_batches
from evaluation.text_metrics import score_answers
from formats.open_model import OpenModel
from model.generate import generate


def answer_all(
    opened: OpenModel,
    asked: Asked,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], object] = ignore,
    processes: Processes = ALONE,
) -> list[str]:
    """The greedy answer to each question, at most `max_new_tokens` long, in order.

    `progress` is told how many answers each batch gave. Rows of a batch do not see each other, so that its size
    changes an answer only where rounding decides between two tokens. Raises ValueError for a prompt with ids that the
    model does not know.
    """

    def answer(questions: list[Question]) -> list[str]:
        prompts = [question.prompt for question in questions]
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "stop_ids": asked.stop_ids}
        return [asked.answer(ids, opened.tokenizer) for ids in generate(opened.model, prompts, **options)]

    return map_batches(
        asked.questions,
        answer,
        batch_size=batch_size,
        length=lambda question: len(question.prompt),
        progress=progress,
        processes=processes,
    )


def compare_answers(
    questions: Sequence[Question], answers: Sequence[str], metrics: Sequence[str], keep: int
) -> dict[str, Any]:
    """{"samples", each metric's values, "signatures", "predictions": the first `keep` beside their references}."""
    references = [question.reference for question in questions]
    scores = score_answers(answers, references, metrics)
    predictions = [
        {
            "prompt": question.shown,
            "category": question.category,
            "reference": question.reference,
            "prediction": answer,
        }
        for question, answer in zip(questions[:keep], answers)
    ]
    return {"samples": len(answers), **scores.values, "signatures": scores.signatures, "predictions": predictions}


def compare_by_category(
    questions: Sequence[Question], answers: Sequence[str], metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The metrics over the answers of each category alone, in the order of their names; {} without categories.

    A category in Chinese counts by signs though the set does not, so that each has signatures of its own.
    """
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for question, answer in zip(questions, answers):
        ours, references = groups.setdefault(question.category, ([], []))
        ours.append(answer)
        references.append(question.reference)
    if set(groups) == {""}:
        return {}
    found = {}
    for category, pairs in sorted(groups.items()):
        scores = score_answers(*pairs, metrics)
        found[category] = {"samples": len(pairs[0]), **scores.values, "signatures": scores.signatures}
    return found
