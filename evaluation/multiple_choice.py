"""Multiple choice by likelihood: the ending that the model finds likeliest is its answer.

    {"ctx": "A man is sitting on a roof. He", "endings": ["starts to sing.", ...], "label": 1}     HellaSwag
    {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}

Each ending follows its context after a space. `acc` takes the sum of its tokens' log-probabilities, `acc_norm` that sum
over its length in characters, as lm-eval does, so that a long ending is not unlikely for its length alone. HellaSwag's
own rows are read as there: the activity in front, [marks] taken out (Zellers et al. 2019).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.records import fields_of
from data.sources import record_rows
from evaluation.checkpoints import ignore
from evaluation.continuations import Continuation, encode_pair, score_continuations
from evaluation.processes import ALONE, Processes
from formats.open_model import OpenModel

_CONTEXTS = ("ctx", "question", "query", "context", "prompt", "question_stem")
_CHOICES = ("endings", "choices", "options")
_ANSWERS = ("label", "answer", "answerKey", "gold", "answer_idx")
_HELLASWAG = ("activity_label", "ctx_a", "ctx_b")
_MARKS = re.compile(r"\[.*?\]")


class Choice(NamedTuple):
    """A question: the text before its endings, the endings, and the number of the right one."""

    context: str
    endings: list[str]
    right: int


def read_choices(path: str | Path, max_samples: int | None = None) -> list[Choice]:
    """The questions of a JSONL (or JSON, Parquet) file, the first `max_samples`.

    Raises ValueError or OSError naming file and line, and the field that is missing or wrong.
    """
    rows = record_rows("parquet" if str(path).endswith(".parquet") else "jsonl", [str(path)])
    questions = []
    for where, row in rows:
        questions.append(_question(row, where))
        if len(questions) == max_samples:
            break
    if not questions:
        raise ValueError(f"{path}: holds no questions; expected JSON lines with ctx, endings and label")
    return questions


def multiple_choice(
    opened: OpenModel,
    questions: Sequence[Choice],
    *,
    batch_size: int = 8,
    progress: Callable[[int], object] = ignore,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """{"samples", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}, shares from 0 to 1 with their standard errors.

    `progress` is told how many endings each batch scored. Raises ValueError for an ending beyond the model's context.
    """
    pairs = [_pair(opened, question, ending) for question in questions for ending in question.endings]
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "processes": processes}
    scores = iter(score_continuations(opened.model, pairs, **options))
    right, right_by_length = [], []
    for question in questions:
        sums = [next(scores).log_probability for _ in question.endings]
        means = [value / len(ending) for value, ending in zip(sums, question.endings)]
        right.append(_first_largest(sums) == question.right)
        right_by_length.append(_first_largest(means) == question.right)
    acc, acc_norm = (_share(hits) for hits in (right, right_by_length))
    return {
        "samples": len(questions),
        "acc": acc[0],
        "acc_stderr": acc[1],
        "acc_norm": acc_norm[0],
        "acc_norm_stderr": acc_norm[1],
    }


def _pair(opened: OpenModel, question: Choice, ending: str) -> Continuation:
    return encode_pair(opened.tokenizer, question.context, " " + ending)


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _share(hits: Sequence[bool]) -> tuple[float, float | None]:
    """The mean of yes or no, and its standard error sqrt(p (1 - p) / (n - 1)); None for a single one."""
    mean = sum(hits) / len(hits)
    return mean, math.sqrt(mean * (1 - mean) / (len(hits) - 1)) if len(hits) > 1 else None


# ---- one line of a file


def _question(row: Any, where: str) -> Choice:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with ctx, endings and label, found {fields_of(row)}")
    endings, keys = _endings(row, where)
    if all(isinstance(row.get(name), str) for name in _HELLASWAG):
        context = _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        endings = [_clean(ending) for ending in endings]
    else:
        context = _context(row, where)
    for number, ending in enumerate(endings):
        if not ending.strip():
            raise ValueError(f"{where}: ending {number} is empty, expected text")
    return Choice(context, endings, _right(row, endings, keys, where))


def _clean(text: str) -> str:
    """WikiHow's marks: [title] parts sentences, [header] and the like go."""
    return _MARKS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _context(row: dict[str, Any], where: str) -> str:
    """The question, behind the passage that it is about where the row has both."""
    names = [name for name in _CONTEXTS if row.get(name) not in (None, "")]
    if not names:
        raise ValueError(f"{where}: has no {' or '.join(_CONTEXTS[:4])}; found {fields_of(row)}"[:400])
    chosen = ["context", "question"] if {"context", "question"} <= set(names) else names[:1]
    return "\n".join(_text(row[name], name, where) for name in chosen)


def _endings(row: dict[str, Any], where: str) -> tuple[list[str], list[str]]:
    """The endings, and the names that they go by: ARC's letters, or none."""
    name = next((name for name in _CHOICES if row.get(name) is not None), None)
    if name is None:
        raise ValueError(f"{where}: has no {' or '.join(_CHOICES)}; found {fields_of(row)}"[:400])
    value: Any = row[name]
    keys: list[str] = []
    if isinstance(value, dict):  # ARC: {"text": [...], "label": ["A", ...]}
        labels = value.get("label")
        keys = [str(key) for key in labels] if isinstance(labels, list) else []
        value = value.get("text")
    if not isinstance(value, list) or len(value) < 2:
        found = f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
        raise ValueError(f"{where}: the field {name!r} is {found}, expected a list of two endings or more")
    return [_text(ending, f"{name}[{number}]", where) for number, ending in enumerate(value)], keys


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = "empty" if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{where}: the field {name!r} is {found}, expected text")
    return value


def _right(row: dict[str, Any], endings: list[str], keys: list[str], where: str) -> int:
    """The number of the right ending from a number, a number as text, a letter, a key of ARC's, or its own text."""
    name = next((name for name in _ANSWERS if row.get(name) not in (None, "")), None)
    if name is None:
        raise ValueError(f"{where}: has no {' or '.join(_ANSWERS[:3])}; found {fields_of(row)}"[:400])
    answer = row[name]
    if isinstance(answer, str):
        letters = [chr(ord("A") + number) for number in range(len(endings))]
        for names in (keys, endings, letters):
            if answer in names:
                return names.index(answer)
        answer = int(answer) if re.fullmatch(r"[0-9]{1,3}", answer) else answer
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(endings):
        raise ValueError(f"{where}: the field {name!r} is {answer!r:.60}, expected 0 to {len(endings) - 1} or a letter")
    return answer
