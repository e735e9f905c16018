"""Whether plain values that a file holds are of the kinds that type hints tell."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value, as JSON has them, is of the kind of a type hint: whole numbers pass for floats, lists for
    tuples, dicts for dataclasses whose fields they fit."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return type(value) is str and value in parts
    if typing.get_origin(hint) in (tuple, list):
        return isinstance(value, (list, tuple)) and all(fits(part, parts[0]) for part in value)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict) and misfit(value, typing.cast(type, hint)) is None
    if parts:
        return any(fits(value, part) for part in parts)
    return type(value) in ((int, float) if hint is float else (hint,))


def misfit(values: dict[str, Any], cls: type) -> str | None:
    """The first of a dataclass's fields that has a value of another kind; None where all fit."""
    hints = typing.get_type_hints(cls)
    return next((name for name in values if name in hints and not fits(values[name], hints[name])), None)
