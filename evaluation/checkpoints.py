"""What comparing and measuring share: which checkpoints are meant, their names, checks, numbers that JSON can hold."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Sequence
from pathlib import Path

from formats.open_model import OpenModel

_NUMBERED = re.compile(r"model_(\d{5,})\.pt")


def expand_checkpoints(refs: Sequence[str], every: int = 1) -> list[str]:
    """The models that `refs` name: a run's folder means all its numbered checkpoints, a pattern the files that fit it.

    Of numbered checkpoints (model_NNNNN.pt), however they were named, every `every`-th of each folder stays, counted
    back from its last; whatever else is named stays. Raises ValueError where nothing fits.
    """
    if every < 1:
        raise ValueError(f"--every {every}: expected at least 1")
    found = [name for ref in refs for name in _meant(ref)]
    if every == 1:
        return found
    of_folder: dict[Path, list[str]] = {}
    for name in found:
        if _step(name) >= 0:
            of_folder.setdefault(Path(name).parent, []).append(name)
    kept = {name for names in of_folder.values() for name in sorted(names, key=_step, reverse=True)[::every]}
    return [name for name in found if _step(name) < 0 or name in kept]


def _meant(ref: str) -> list[str]:
    """The names behind one: itself, a folder's numbered checkpoints by their steps, or the files of a pattern."""
    path = Path(ref)
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        numbered = [str(file) for file in path.iterdir() if _step(str(file)) >= 0]
        if not numbered:
            raise ValueError(
                f"{ref}: holds neither checkpoints (model_NNNNN.pt) nor a Hugging Face model (config.json)"
            )
        return sorted(numbered, key=_step)
    if not path.exists() and glob.has_magic(ref):
        fitting = sorted(glob.glob(ref), key=lambda name: (str(Path(name).parent), _step(name), name))
        if not fitting:
            raise ValueError(f"{ref}: no file fits this pattern")
        return fitting
    return [ref]


def _step(name: str) -> int:
    """The step in the name of a numbered checkpoint, -1 in that of another file."""
    match = _NUMBERED.fullmatch(Path(name).name)
    return int(match[1]) if match else -1


def size_on_disk(path: Path) -> int | None:
    """Bytes of a file, or of all files in a folder; None for what is not on this disk under that name."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return path.stat().st_size if path.is_file() else None


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
