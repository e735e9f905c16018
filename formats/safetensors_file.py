"""A reader of safetensors files that believes nothing: every number in the header is checked before it is used.

    file = [header length: 8 bytes, little-endian][header: JSON][data]
    header = {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {str: str}}

The safetensors library maps the file, and mapped pages count as resident memory; here a tensor comes in blocks, so that
a model of bfloat16 needs no more memory than its float32 weights. Reading a header needs no torch.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from formats.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

# Bytes of one element; the names are those of the format.
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # what weights may be stored as
_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_TENSORS = 1_000_000  # of a header of 100 MB that holds little else; Python objects take 10 times their text
_MAX_DIMENSIONS = 8
_BLOCK_BYTES = 1 << 20  # of 4 MiB, what malloc keeps between them was 15 MB; reading is no slower


class TensorEntry(NamedTuple):
    """Where a tensor lies: bytes start..stop of the file, row-major."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, in the file's order. FormatError for anything that does not add up.

    Checked: the header's length, its JSON, each dtype, shape and size, that every tensor lies inside the file, and that
    no two overlap.
    """
    if not path.is_file():
        raise FormatError(f"{path}: is not a regular file, expected a safetensors file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise FormatError(f"{path}: has {size} bytes, a safetensors file begins with 8 for the header's length")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_HEADER_BYTES, size - 8):
            raise FormatError(f"{path}: says that its header has {length:,} bytes, the file has {size:,}: cut short?")
        text = file.read(length)
    entries = {}
    for name, value in _parse(text, path).items():
        if name == "__metadata__":
            _check_metadata(value, path)
        else:
            entries[name] = _entry(value, 8 + length, size, f"{path}: tensor {name[:80]!r}")
    _check_overlap(entries, path)
    return entries


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    """The header's JSON object; depth is bounded by Python's parser, which raises RecursionError beyond 1,000."""
    if text.count(b"{") > _MAX_TENSORS or text.count(b",") > 16 * _MAX_TENSORS:
        raise FormatError(f"{path}: its header lists more than {_MAX_TENSORS:,} tensors")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FormatError(f"{path}: its header is no valid JSON ({reason})") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: its header is a JSON {type(header).__name__}, expected an object")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {name[:80]!r} stands twice")
        values[name] = value
    return values


def _check_metadata(value: Any, path: Path) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(f"{path}: its __metadata__ is not an object of strings")


def _entry(value: Any, data_start: int, size: int, where: str) -> TensorEntry:
    """One tensor's description, checked against the file's `size`."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: expected dtype, shape and data_offsets, found {str(value)[:80]}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FormatError(f"{where}: has dtype {str(dtype)[:40]!r}, known are {', '.join(ITEM_BYTES)}")
    if not _is_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise FormatError(f"{where}: has shape {str(shape)[:80]}, expected at most {_MAX_DIMENSIONS} whole numbers")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise FormatError(f"{where}: has data_offsets {str(offsets)[:80]}, expected two whole numbers")
    start, stop = offsets
    if not start <= stop <= size - data_start:
        raise FormatError(f"{where}: lies at bytes {start}..{stop} of {size - data_start} that follow the header")
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if needed != stop - start:
        raise FormatError(f"{where}: {dtype} {shape} needs {needed} bytes, its offsets span {stop - start}")
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + stop)


def _is_counts(value: Any) -> bool:
    """A list of whole numbers that fit 63 bits (JSON's true is no number)."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _check_overlap(entries: dict[str, TensorEntry], path: Path) -> None:
    occupied = sorted((entry.start, entry.stop, name) for name, entry in entries.items() if entry.stop > entry.start)
    for (_, stop, first), (start, _, second) in itertools.pairwise(occupied):
        if start < stop:
            raise FormatError(f"{path}: tensors {first[:80]!r} and {second[:80]!r} overlap")


def read_blocks(path: Path, name: str, entry: TensorEntry) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of one tensor: blocks of about 1 MiB along its first dimension, in the stored dtype.

    A block is valid until the next one is asked for: both lie in the same memory. FormatError for a dtype that weights
    cannot have, or a file that ended since its header was read.
    """
    import torch

    if entry.dtype not in FLOATS:
        raise FormatError(f"{path}: tensor {name[:80]!r} is stored as {entry.dtype}, weights are {', '.join(FLOATS)}")
    if entry.start == entry.stop:
        return
    rows, inner = (entry.shape[0], entry.shape[1:]) if entry.shape else (1, ())
    row_bytes = (entry.stop - entry.start) // rows
    step = max(1, min(rows, _BLOCK_BYTES // row_bytes))
    buffer = memoryview(bytearray(step * row_bytes))
    with open(path, "rb", buffering=0) as file:
        file.seek(entry.start)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            part = buffer[: count * row_bytes]
            if not _fill(file, part):
                raise FormatError(f"{path}: ended inside tensor {name[:80]!r}: it became shorter while it was read")
            block = torch.frombuffer(part, dtype=getattr(torch, FLOATS[entry.dtype]))
            yield first, block.view(count, *inner)


def _fill(file: Any, part: memoryview) -> bool:
    """Reads until `part` is full; False when the file ends before (one read may return less than was asked)."""
    while len(part):
        count = file.readinto(part)
        if not count:
            return False
        part = part[count:]
    return True
