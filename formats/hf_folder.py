"""The files of a Hugging Face folder: which may be opened, their JSON, and the tensors that they hold."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from formats.errors import FormatError
from formats.safetensors_file import read_blocks, read_header
from formats.torch_file import read_torch_file

_JSON_BYTES = 64 << 20  # the largest published tokenizer.json has 35 MB
# One file, or an index of several; the first kind that is there is read.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_BLOCK_ELEMENTS = 1 << 20


class Found(NamedTuple):
    """A stored tensor, wherever it lies; `blocks()` yields (first row, rows), valid until the next is asked for."""

    where: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[tuple[int, Tensor]]]


def file_in(folder: Path, name: str) -> Path | None:
    """The path of a regular file of the folder; None where there is none of that name.

    FormatError for a name that is no plain file name (`..`, a separator), for anything but a regular file, and for a
    link that leads out of the folder. Only the Hub cache's own links, from snapshots/REV/ into the repository's blobs/,
    may do so.
    """
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise FormatError(f"{folder}: names the file {name[:80]!r}, expected one of the folder itself")
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        real, home = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
        raise FormatError(f"{path}: is a link that leads nowhere: download the model again") from None
    of_cache = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if not (real.is_relative_to(home) or of_cache):
        raise FormatError(f"{path}: is a link to {real}, outside the folder: copy the file into the folder")
    if not real.is_file():
        raise FormatError(f"{path}: is not a regular file")
    return path


def read_text(folder: Path, name: str) -> str | None:
    """A file's text, None where it is missing. FormatError beyond 64 MiB or for text that is not UTF-8."""
    path = file_in(folder, name)
    if path is None:
        return None
    if path.stat().st_size > _JSON_BYTES:
        raise FormatError(f"{path}: has {path.stat().st_size:,} bytes, expected at most {_JSON_BYTES:,}")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not UTF-8 at byte {error.start}") from None


def read_object(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON file's object, None where the file is missing. FormatError for any other content."""
    text = read_text(folder, name)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{folder / name}: is no valid JSON ({str(error)[:120]})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{folder / name}: holds a JSON {type(value).__name__}, expected an object")
    return value


def find_tensors(folder: Path) -> dict[str, Found]:
    """Every tensor of the folder's weights by its stored name; only headers are read.

    model.safetensors, or the shards that model.safetensors.index.json lists; pytorch_model.bin (also with an index)
    where there is neither. FormatError where a file is missing or damaged, or an index and its shards disagree.
    """
    for name in _WEIGHT_FILES:
        path = file_in(folder, name)
        if path is not None:
            return _tensors_of(path)
        index = read_object(folder, f"{name}.index.json")
        if index is not None:
            return _tensors_of_index(folder, f"{name}.index.json", index)
    raise FormatError(f"{folder}: holds no weights, expected {' or '.join(_WEIGHT_FILES)}, or an index of several")


def _tensors_of(path: Path) -> dict[str, Found]:
    if path.suffix == ".bin":
        return _tensors_of_bin(path)
    return {
        name: Found(str(path), entry.shape, functools.partial(read_blocks, path, name, entry))
        for name, entry in read_header(path).items()
    }


def _tensors_of_index(folder: Path, index_name: str, index: dict[str, Any]) -> dict[str, Found]:
    where = folder / index_name
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise FormatError(f"{where}: has no weight_map from names of tensors to names of files")
    found: dict[str, Found] = {}
    for shard in sorted(set(listed.values())):
        path = file_in(folder, shard)
        if path is None:
            raise FormatError(f"{where}: lists {shard[:80]!r}, which is missing: download the model again")
        if path.suffix != Path(index_name.removesuffix(".index.json")).suffix:
            raise FormatError(f"{where}: lists {shard[:80]!r}, which is of another kind")
        tensors = _tensors_of(path)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise FormatError(f"{path}: holds {twice[0][:80]!r}, which {found[twice[0]].where} holds too")
        found |= tensors
    for name, shard in listed.items():
        if name not in found or Path(found[name].where).name != shard:
            raise FormatError(f"{where}: says that {name[:80]!r} lies in {shard[:80]!r}, where it is not")
    return found


def _tensors_of_bin(path: Path) -> dict[str, Found]:
    """Tensors that torch.save wrote; whatever else a file holds is refused before torch reads it."""
    try:
        state = read_torch_file(path)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FormatError(f"{path}: holds something else than named tensors")
    return {
        str(name): Found(str(path), tuple(tensor.shape), functools.partial(_blocks_of, tensor, f"{path}: {name}"))
        for name, tensor in state.items()
    }


def _blocks_of(tensor: Tensor, where: str) -> Iterator[tuple[int, Tensor]]:
    if not tensor.is_floating_point():
        raise FormatError(f"{where} is stored as {tensor.dtype}, weights are floating-point numbers")
    rows = tensor.view(1) if tensor.dim() == 0 else tensor
    step = max(1, _BLOCK_ELEMENTS // max(1, rows[:1].numel()))
    for first in range(0, len(rows), step):
        yield first, rows[first : first + step]
