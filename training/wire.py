"""Nests of plain values and tensors as JSON and raw bytes, so that they travel between processes without pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def pack(value: Any) -> tuple[bytes, list[Tensor]]:
    """The form of a nest as JSON, and the bytes of its tensors, uint8 (n,) each, in the order in which they stand.

    A nest is made of dicts, lists, tuples, str, int, float, bool, None, bytes, Path and dense tensors; the buffers
    share the memory of tensors that are contiguous on the CPU. Raises ValueError for anything else.
    """
    buffers: list[Tensor] = []
    form = _take_apart(value, buffers)
    return json.dumps(form).encode(), buffers


def unpack(head: bytes, fill: Callable[[Tensor], None]) -> Any:
    """The nest that `pack` described, on the CPU; `fill` puts the bytes into each buffer, in the order of `pack`."""
    return _put_together(json.loads(head), fill)


def _take_apart(value: Any, buffers: list[Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_take_apart(each, buffers) for each in value]
    # JSON's objects have text for keys and no other kinds, so one here means: not a JSON value.
    if isinstance(value, tuple):
        return {"tuple": [_take_apart(each, buffers) for each in value]}
    if isinstance(value, dict):
        return {"dict": [[_take_apart(key, buffers), _take_apart(each, buffers)] for key, each in value.items()]}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, bytes):
        buffers.append(torch.frombuffer(bytearray(value) or bytearray(1), dtype=torch.uint8)[: len(value)])
        return {"bytes": len(value)}
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized:
        buffers.append(value.detach().cpu().contiguous().flatten().view(torch.uint8))
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    raise ValueError(f"holds a {type(value).__name__}, which is not sent to other processes")


def _put_together(form: Any, fill: Callable[[Tensor], None]) -> Any:
    if isinstance(form, list):
        return [_put_together(each, fill) for each in form]
    if not isinstance(form, dict):
        return form
    ((kind, content),) = form.items()
    if kind == "tuple":
        return tuple(_put_together(each, fill) for each in content)
    if kind == "dict":
        # Key before value, as they were taken apart.
        return {_put_together(key, fill): _put_together(each, fill) for key, each in content}
    if kind == "path":
        return Path(content)
    if kind == "bytes":
        buffer = torch.empty(content, dtype=torch.uint8)
        fill(buffer)
        return buffer.numpy().tobytes()
    name, shape = content
    tensor = torch.empty(shape, dtype=getattr(torch, name))
    fill(tensor.flatten().view(torch.uint8))  # the same memory
    return tensor
