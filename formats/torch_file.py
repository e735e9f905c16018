"""What torch.save wrote, read without believing it: its names are looked at before torch makes anything of them.

`weights_only=True` runs no code of a file's, but it does call what it knows with what the file says: 40 bytes of
pickle ask it for a bytearray of a terabyte. So the pickle is gone through first, and refused for any name that tensors
and plain values do not need; and what comes out is refused where it would grow when it is used: a tensor that repeats
a few numbers for ever, a list that holds itself.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import zipfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORED = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
# All that torch.save writes for a dense tensor, a parameter, and what state_dict() returns.
_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in _STORED),
}
_CALLING = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")  # of later or older pickles
_OLD_PICKLES = 5  # that a file from before torch 1.6 begins with: magic number, version, system, content, keys
_DEEPEST = 64  # dicts and lists within each other
_LARGEST = 1 << 28  # values and characters, written out; 1,024 processes' random states are 1.3 million
_SHARED = 4  # times that a stored number may stand in tensors: tied weights do so twice


def read_torch_file(path: Path) -> Any:
    """What a file holds: tensors (mapped from it where it is an archive), numbers, text, lists and dicts.

    Raises ValueError, one line that leaves it to the caller to name the file; OSError where it cannot be read.
    """
    if not path.is_file():
        raise ValueError("is not a regular file")
    try:
        is_archive = zipfile.is_zipfile(path)  # files from before torch 1.6 are none, and cannot be mapped
        _check_archive(path) if is_archive else _check_old(path)
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except (OSError, _Refused):
        raise
    except Exception as error:  # torch raises many kinds here: UnpicklingError, RuntimeError, KeyError, EOFError ...
        text = " ".join(str(error).split())[:160]
        raise ValueError(f"cannot be read as tensors and plain values ({type(error).__name__}: {text})") from None
    tensors: list[Tensor] = []
    if _size(value, {}, tensors, 0) > _LARGEST:
        raise _Refused(f"holds more than {_LARGEST:,} values and characters besides its tensors")
    _check_tensors(tensors)
    return value


class _Refused(ValueError):
    """What the checks here find, in the words that a user sees."""


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise _Refused("has two entries of one name in its archive")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _Refused("is a compressed archive, which torch.save does not write")
        pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise _Refused("is an archive of something else, expected the one data.pkl that torch.save writes")
        _check_names(io.BytesIO(archive.read(pickles[0])))


def _check_old(path: Path) -> None:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(_OLD_PICKLES):
            _check_names(content)


def _check_names(pickled: Any) -> None:
    """Refuses a pickle, read up to its end, that names anything but tensors and their kin."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL" and argument not in _NAMES:
            named = str(argument).replace(" ", ".")[:120]
            raise _Refused(f"holds {named}, expected only tensors and plain values; not read")
        if opcode.name in _CALLING:
            raise _Refused(f"holds a call ({opcode.name}), expected only tensors and plain values; not read")


def _size(value: Any, sizes: dict[int, int], tensors: list[Tensor], depth: int) -> int:
    """Values and characters of a nest, each counted as often as it stands there; its tensors go into `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
    if not isinstance(value, (dict, list, tuple)):
        return 1 + (len(value) if isinstance(value, str) else 0)
    if id(value) not in sizes:
        if depth > _DEEPEST:  # or it holds itself
            raise _Refused(f"holds lists in lists, more than {_DEEPEST} deep")
        parts: Iterable[Any] = chain.from_iterable(value.items()) if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_size(part, sizes, tensors, depth + 1) for part in parts)
    return sizes[id(value)]


def _check_tensors(tensors: list[Tensor]) -> None:
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise _Refused(f"holds a tensor of {tensor.layout} on {tensor.device}, expected dense ones")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise _Refused(f"holds a tensor of shape {tuple(tensor.shape)} in fewer bytes than that takes")
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > _SHARED * sum(stored.values()):
        raise _Refused("holds tensors that share their numbers many times over")
