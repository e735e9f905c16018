"""What the example scripts share."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from training.run_settings import RunSettings
from training.settings import parse

ROOT = Path(__file__).resolve().parent.parent
R = TypeVar("R", bound=RunSettings)


def configured(cls: type[R], config: str, max_steps: int | None, **places: str) -> R:
    """The settings of a file in configs/ with a script's folders, going on after an interruption."""
    flags = ["--config", str(ROOT / "configs" / config), "--auto_resume"]
    for name, value in places.items():
        flags += [f"--{name}", value]
    if max_steps is not None:
        flags += ["--max_steps", str(max_steps)]
    return parse(cls, flags)
