"""Writing finished files: whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_file(path: str | Path, data: bytes) -> Path:
    """Writes under a temporary name in the same folder and renames: a viewer never meets half a file.

    Folders are made as needed. Raises OSError where that is not possible.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    if os.path.lexists(temporary):  # of a process of this number that was killed
        temporary.unlink()
    try:
        with open(temporary, "xb") as file:  # x: made here, never what a link in a shared folder leads to
            file.write(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """A JSON file that people can read: indented, not escaped. NaN and infinity, which JSON cannot hold, are a bug."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return write_file(path, (text + "\n").encode("utf-8", errors="replace"))
