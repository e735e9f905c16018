"""The header of a GGUF file: metadata and tensor table, read without believing a single number in it.

    header = read_gguf_header(path)
    header.metadata["general.architecture"]             # "llama"
    header.tensors["token_embd.weight"]                 # TensorInfo("Q8_0", (49152, 576), start, stop)

    file = ["GGUF"][version u32][tensors u64][keys u64][metadata][tensor table][padding][tensors, each aligned]

Every count and length is held against the bytes that are left before anything is allocated for it, so that time and
memory are bounded by the file's size; whatever is wrong becomes a FormatError. Needs neither torch nor NumPy.
The format: github.com/ggml-org/ggml, docs/gguf.md. Versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import FormatError

# Bytes of a header that are read at first (those of models up to about 50,000 tokens), and at most: the largest
# published vocabularies, 262,144 tokens with their merges, make headers of about 20 MB.
_FIRST_READ = 4 << 20
_LARGEST_HEADER = 64 << 20
_MAX_DIMS = 4
_MAX_NESTING = 2
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_SMALLEST_KEY = 8 + 1 + 4 + 1  # bytes: length, one letter, type, value
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # bytes: length, one letter, dimensions, one of them, type, offset

# ggml's tensor types: number -> (name, values in a block, bytes of a block).
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table. Shape as torch counts it: the dimension that lies closest together is the last."""

    type: str  # ggml's name: "F32", "Q4_K", ...
    shape: tuple[int, ...]
    start: int  # bytes from the file's beginning
    stop: int


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the tensors. Arrays of metadata are tuples; strings are str."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _OutOfBuffer(Exception):
    """More of the file has to be read before parsing can go on."""


def read_gguf_header(path: str | Path) -> GgufHeader:
    """The checked header of a GGUF file; its tensors lie inside the file, aligned, and share no byte.

    Raises FileNotFoundError, or FormatError naming the file and the finding.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        size = path.stat().st_size
        for length in (_FIRST_READ, _LARGEST_HEADER):
            file.seek(0)
            try:
                return _parse(_Cursor(path, file.read(min(length, size)), size))
            except _OutOfBuffer:
                continue
    raise FormatError(f"{path}: its header has more than {_LARGEST_HEADER >> 20} MiB, expected a model's")


class _Cursor:
    """Takes values from the start of a file, each only if it lies inside."""

    def __init__(self, path: Path, data: bytes, size: int) -> None:
        self.path = path
        self.data = data
        self.size = size  # bytes of the file, of which data is the beginning
        self.position = 0

    def fail(self, finding: str) -> FormatError:
        return FormatError(f"{self.path}: {finding}")

    def need(self, count: int, what: str) -> None:
        """Make sure that `count` more bytes exist."""
        end = self.position + count
        if end > self.size:
            raise self.fail(f"{what} at byte {self.position} needs {count:,} bytes, the file has {self.size:,} in all")
        if end > len(self.data):
            raise _OutOfBuffer

    def number(self, code: str, what: str) -> Any:
        self.need(struct.calcsize("<" + code), what)
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        self.need(length, what)
        raw = self.data[self.position : self.position + length]
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} at byte {self.position} is not UTF-8") from None
        self.position += length
        return text

    def strings(self, count: int, what: str) -> tuple[str, ...]:
        """As `string`, without a call for each: a vocabulary has 150,000."""
        self.need(8 * count, what)
        data, position, found = self.data, self.position, []
        unpack = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                (length,) = unpack(data, position)
                start = position + 8
                position = start + length
                if position > len(data):
                    break
                found.append(data[start:position].decode())
        except (struct.error, UnicodeDecodeError):
            pass  # the slow way says where
        if len(found) == count:
            self.position = position
            return tuple(found)
        return tuple([self.string(what) for _ in range(count)])

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what, depth + 1)
        if kind not in _SCALARS:
            raise self.fail(f"{what} has the unknown value type {kind}")
        value = self.number(_SCALARS[kind], what)
        return self.boolean(value, what) if kind == _BOOL else value

    def array(self, what: str, depth: int) -> tuple[Any, ...]:
        if depth > _MAX_NESTING:
            raise self.fail(f"{what} is an array nested deeper than {_MAX_NESTING}")
        kind, count = self.number("I", what), self.number("Q", what)
        if kind == _STRING:
            return self.strings(count, what)
        if kind == _ARRAY:
            self.need(12 * count, what)  # each has at least its type and its count
            return tuple([self.array(what, depth + 1) for _ in range(count)])
        if kind not in _SCALARS:
            raise self.fail(f"{what} is an array of the unknown value type {kind}")
        length = count * struct.calcsize("<" + _SCALARS[kind])
        self.need(length, what)
        values = struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, self.position)
        self.position += length
        return tuple([self.boolean(value, what) for value in values]) if kind == _BOOL else values

    def boolean(self, value: int, what: str) -> bool:
        if value > 1:
            raise self.fail(f"{what} is a truth value of {value}, expected 0 or 1")
        return bool(value)


def _parse(cursor: _Cursor) -> GgufHeader:
    tensor_count, key_count = _begin(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string("a metadata key")
        if not key or key in metadata:
            raise cursor.fail(f"the metadata key {key[:80]!r} is empty or there twice")
        what = f"the metadata {key[:80]!r}"
        metadata[key] = cursor.value(cursor.number("I", what), what)
    alignment = metadata.get("general.alignment", 32)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment not in (8 << i for i in range(17)):
        raise cursor.fail(f"general.alignment is {str(alignment)[:40]}, expected a power of two from 8 to 524288")
    raw: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name = cursor.string("a tensor's name")
        if not name or name in raw:
            raise cursor.fail(f"the tensor name {name[:80]!r} is empty or there twice")
        raw[name] = _tensor(cursor, name, alignment)
    first = -(-cursor.position // alignment) * alignment
    tensors = {
        name: TensorInfo(kind, shape, first + offset, first + offset + length)
        for name, (kind, shape, offset, length) in raw.items()
    }
    _check_places(cursor, tensors)
    return GgufHeader(cursor.path, metadata, tensors)


def _begin(cursor: _Cursor) -> tuple[int, int]:
    """Magic and version checked; the counts of tensors and of keys, no larger than the file could hold."""
    if cursor.data[:4] != b"GGUF":
        raise cursor.fail("is no GGUF file: it does not begin with 'GGUF'")
    cursor.position = 4
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        found = "big-endian" if swapped in (2, 3) else f"GGUF version {version}"
        raise cursor.fail(f"is {found}; read are the versions 2 and 3, little-endian")
    tensor_count, key_count = cursor.number("Q", "the count of tensors"), cursor.number("Q", "the count of keys")
    if tensor_count * _SMALLEST_TENSOR + key_count * _SMALLEST_KEY > cursor.size - cursor.position:
        raise cursor.fail(f"claims {tensor_count:,} tensors and {key_count:,} keys in {cursor.size:,} bytes")
    return tensor_count, key_count


def _tensor(cursor: _Cursor, name: str, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, offset and length in bytes of the tensor whose name was read."""
    what = f"the tensor {name[:80]!r}"
    count = cursor.number("I", what)
    if not 1 <= count <= _MAX_DIMS:
        raise cursor.fail(f"{what} has {count} dimensions, expected 1 to {_MAX_DIMS}")
    shape = tuple(cursor.number("Q", what) for _ in range(count))[::-1]
    kind, offset = cursor.number("I", what), cursor.number("Q", what)
    if kind not in TENSOR_TYPES:
        raise cursor.fail(f"{what} has the unknown type {kind}")
    type_name, block, block_bytes = TENSOR_TYPES[kind]
    if 0 in shape or shape[-1] % block:
        raise cursor.fail(f"{what} of type {type_name} has the shape {shape}: rows must be multiples of {block}")
    if offset % alignment:
        raise cursor.fail(f"{what} begins at offset {offset}, which is no multiple of {alignment}")
    return type_name, shape, offset, math.prod(shape) // block * block_bytes


def _check_places(cursor: _Cursor, tensors: dict[str, TensorInfo]) -> None:
    """Every tensor ends inside the file, and before the next begins."""
    before = None
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.stop > cursor.size:
            raise cursor.fail(f"the tensor {name[:80]!r} ends at byte {info.stop:,}, the file at {cursor.size:,}")
        if before is not None and info.start < tensors[before].stop:
            raise cursor.fail(f"the tensors {before[:80]!r} and {name[:80]!r} overlap at byte {info.start:,}")
        before = name
