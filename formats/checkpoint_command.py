"""`python -m formats.checkpoint verify|show|diff FILE...`: what a checkpoint is, and whether it is whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.checkpoint import has_digest, is_full, load_checkpoint, payload_bytes, payload_masks
from formats.errors import printable

USAGE = """usage: python -m formats.checkpoint verify FILE...   is each file whole, by its digest?
       python -m formats.checkpoint show FILE...     what is in it
       python -m formats.checkpoint diff A B         where two differ, weight by weight"""

# What `show` leaves to its own lines, or what has none that a reader could use.
_SHOWN_APART = {"format", "model", "config", "settings", "masks", "tokenizer", "template", "versions", "rng"}


def main(arguments: Sequence[str]) -> int:
    """Runs one of the three. Returns 0; 1 where a file is bad or two differ; 2 for arguments that say nothing."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    commands: dict[str, Callable[..., bool]] = {"verify": verify, "show": show, "diff": diff}
    name, *files = arguments or [""]
    if name not in commands or not files or (name == "diff" and len(files) != 2):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        return 0 if commands[name](*files) else 1
    except (OSError, ValueError) as error:
        print(printable(str(error)), file=sys.stderr)
        return 2 if name == "diff" else 1


def verify(*files: str) -> bool:
    """A line for each file; whether all are whole."""
    whole = True
    for file in files:
        try:
            payload = load_checkpoint(file)
        except (OSError, ValueError) as error:
            print(printable(str(error)))
            whole = False
        else:
            digest = "digest matches" if has_digest(file) else "carries no digest: opened, not proved"
            print(f"{file}: {kind(payload)}, {Path(file).stat().st_size / 1e6:,.1f} MB, {digest}")
    return whole


def kind(payload: Mapping[str, Any]) -> str:
    """What a checkpoint is, in a few words."""
    what = "adapter" if payload.get("adapter") else "pruned model" if payload.get("masks") else "model"
    state = "with its training state" if is_full(dict(payload)) else "weights only"
    step = payload.get("step")
    return f"{what}, {state}" + ("" if step is None else f", step {step:,}")


def show(*files: str) -> bool:
    """What each file holds."""
    for number, file in enumerate(files):
        payload = load_checkpoint(file)
        print(("\n" if number else "") + f"{file}: {kind(payload)}")
        for name, value in facts(payload, file):
            print(f"  {name}: {value}")
    return True


def facts(payload: Mapping[str, Any], file: str) -> Iterator[tuple[str, str]]:
    """(name, text) of what a reader wants to know first."""
    weights = payload["model"]
    count = sum(tensor.numel() for tensor in weights.values())
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
    yield "weights", f"{len(weights)} tensors, {count:,} numbers, {', '.join(types)}"
    yield "network", _joined(payload["config"])
    for name in ("tokenizer", "template"):
        entry = payload.get(name)
        if isinstance(entry, dict):
            known = {key: entry[key] for key in ("kind", "name", "vocab_size", "fingerprint") if key in entry}
            yield name, _joined(known) or f"an entry of {len(entry)} values"
    masks = payload_masks(payload, file)
    if masks:
        total = sum(mask.shape[0] * mask.shape[1] for mask in masks.values())
        zeros = sum(mask.sparsity * mask.shape[0] * mask.shape[1] for mask in masks.values())
        patterns = sorted({mask.pattern for mask in masks.values()})
        yield "masks", f"{len(masks)} matrices, {zeros / total:.2%} zeros, {', '.join(patterns)}"
    for name, value in payload.items():
        if name not in _SHOWN_APART:
            yield name, _summary(value)
    for name in ("settings", "versions"):
        if payload.get(name):
            yield name, _joined(payload[name])


def _summary(value: Any) -> str:
    """A plain value as it is, a nest of tensors by its size."""
    size = payload_bytes(value)
    if size:
        return f"{size / 1e6:,.1f} MB of tensors"
    text = _joined(value) if isinstance(value, dict) else str(value)
    return text if len(text) <= 300 else text[:297] + "..."


def _joined(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def diff(first: str, second: str) -> bool:
    """Prints where two checkpoints differ; whether they do not."""
    a, b = load_checkpoint(first), load_checkpoint(second)
    lines = [line for entry in ("config", "settings") for line in _differing(entry, a.get(entry), b.get(entry))]
    for name in sorted({*a, *b} - {"model", "config", "settings"}):
        if (name in a) != (name in b):
            lines.append(f"{name}: only in {first if name in a else second}")
        elif not _equal(a[name], b[name]):
            both = not payload_bytes(a[name]) and not isinstance(a[name], (dict, list))
            lines.append(f"{name}: {a[name]} | {b[name]}" if both else f"{name}: differs")
    lines += list(_differing_weights(a["model"], b["model"], first, second))
    print("\n".join(lines) if lines else f"{first} and {second} hold the same")
    return not lines


def _differing(entry: str, a: Any, b: Any) -> Iterator[str]:
    a, b = a or {}, b or {}
    for name in [*a, *(name for name in b if name not in a)]:
        if a.get(name) != b.get(name):
            yield f"{entry}.{name}: {a.get(name)} | {b.get(name)}"


def _differing_weights(a: dict[str, Tensor], b: dict[str, Tensor], first: str, second: str) -> Iterator[str]:
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b:
            yield f"{name}: only in {first if name in a else second}"
        elif a[name].shape != b[name].shape:
            yield f"{name}: {tuple(a[name].shape)} | {tuple(b[name].shape)}"
        elif not torch.equal(a[name], b[name]):
            difference = (a[name].float() - b[name].float()).abs()
            changed = int((a[name] != b[name]).sum())
            yield f"{name}: largest difference {float(difference.max()):.3g}, {changed:,} of {difference.numel():,}"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
