"""What comparing and measuring share: names for checkpoints, checks of them, numbers that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from formats.open_model import OpenModel


def short_labels(refs: Sequence[str | Path]) -> list[str]:
    """The fewest last parts of the paths that tell them apart: `logs/model_00009`, `logs_finetune/model_00009`."""
    paths = [Path(ref) for ref in refs]
    parts = [(path.with_suffix("") if path.suffix == ".pt" else path).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(path[-count:]) for path in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({number})" for number, label in enumerate(labels, start=1)]  # the same file more than once


def check_vocabulary(opened: OpenModel) -> None:
    """Raises ValueError where the tokenizer has ids that the model does not know."""
    known, asked = opened.model.config.vocab_size, opened.tokenizer.vocab_size
    if asked > known:
        raise ValueError(f"{opened.path}: its tokenizer has ids up to {asked - 1}, its model only up to {known - 1}")


def finite_or_none(value: float | None) -> float | None:
    """The number, or None where it is infinite or not a number."""
    return value if value is not None and math.isfinite(value) else None


def ignore(*_: object) -> None:
    """A listener that hears nothing."""
