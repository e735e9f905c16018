"""Prompts from a file or standard input, as the records that templates render: instruction, context, response."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data.templates import Record, normalize_record

PROMPT_NAMES = ("prompt", "instruction", "problem")
REFERENCE_NAMES = ("reference", "response", "output", "solution")


def prompt_record(prompt: str) -> Record:
    """A prompt without context and reference."""
    return {"instruction": prompt, "context": "", "response": "", "category": ""}


def read_prompts(source: str) -> list[Record]:
    """The prompts of a file (`-`: standard input), blank lines skipped; `response` holds the reference, "" for none.

    A file named .jsonl, or one whose first line is a JSON object, is JSON lines: `prompt` (kept as it is), `context`
    and `reference`, or the names of instruction data. Any other file holds one prompt a line.
    Raises ValueError or OSError naming file and line.
    """
    where = "standard input" if source == "-" else source
    data = sys.stdin.buffer.read() if source == "-" else _read_file(Path(source))
    lines = [(number, line) for number, line in enumerate(_decode(data, where).split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{where}: holds no prompts; expected one a line, or JSON lines with a `prompt`")
    if source.endswith(".jsonl") or _is_object(lines[0][1]):
        return [_json_record(line, f"{where}:{number}") for number, line in lines]
    return [prompt_record(line.removesuffix("\r")) for _, line in lines]


def _read_file(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file of prompts")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file of prompts")
    return path.read_bytes()


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{where}:{line}: is not UTF-8 (byte {data[error.start]:#04x}); save it as UTF-8") from None


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):  # the latter: brackets nested a thousand deep
        return False


def _json_record(line: str, where: str) -> Record:
    """One JSON line as a record. The reference may be missing, the prompt may not."""
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected an object with a `prompt`, found a {type(raw).__name__}")
    name = next((name for name in PROMPT_NAMES if name in raw), None)
    if name is None or not isinstance(raw[name], str) or not raw[name].strip():
        found = ", ".join(map(repr, raw)) or "none"
        raise ValueError(
            f"{where}: expected a non-empty text in `prompt` (or `instruction`); its fields are {found}"[:300]
        )
    reference = next((raw[name] for name in REFERENCE_NAMES if raw.get(name) is not None), "")
    fields = {"instruction": raw[name], "context": raw.get("context", raw.get("input")), "response": reference}
    record = normalize_record({**fields, "category": raw.get("category")}, where)
    if name == "prompt":
        record["instruction"] = raw[name]  # raw text to be continued: its outer spaces and line ends count
    try:
        "".join(record.values()).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: holds half a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    return record
