"""One file of a token set: an array behind a 64-byte header, little endian. Written, checked and mapped here.

The header holds magic (8 bytes), version (u32), dtype code (u32), count (u64) and room for more.
"""

import hashlib
import mmap
import os
import struct
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.manifest import MANIFEST, damaged

MAGIC = b"ESPALIER"
VERSION = 1
HEADER = struct.Struct("<8sIIQ40x")
U1, U2, U4, U8 = (np.dtype(name) for name in ("<u1", "<u2", "<u4", "<u8"))
DTYPES: dict[int, np.dtype] = {1: U1, 2: U2, 3: U4, 4: U8}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHUNK = 1 << 20  # bytes read at a time; a multiple of every item size
_SETTLED_NS = 2_000_000_000  # clocks of file systems are coarse: a younger file may change and keep its mtime


class ArrayWriter:
    """One file being written. Its header stays zero until `close`, so a file cut short has no magic."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype, self.count = path, dtype, 0
        self._file = open(path, "xb", buffering=_CHUNK)  # noqa: SIM115 - open for as long as the shard grows
        self._file.write(bytes(HEADER.size))

    def append(self, values: np.ndarray) -> None:
        """Write more values (n,), cast to the file's dtype."""
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self.count += len(values)

    def close(self) -> dict[str, str]:
        """Complete the header, flush to disk, and return the entry for dataset.json: the file's name and digest."""
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.count))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:  # what the disk gives back, not what was meant to be written
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return {"file": self.path.name, "sha256": digest.hexdigest()}


# ---- checking


@dataclass(frozen=True)
class Facts:
    """What one pass over a file finds."""

    sha256: str
    first: int  # 0 in an empty array
    largest: int  # -1 in an empty array
    total: int  # sum, of a mask
    ascending: bool  # strictly, of document starts


@dataclass(frozen=True)
class CheckedFile:
    """A file that passed its check: `stamp` (size, mtime_ns) tells later whether it is still the same one."""

    path: Path
    dtype: np.dtype
    count: int
    stamp: tuple[int, int]
    facts: Facts | None  # None where only header and size were looked at


_known: dict[tuple[str, int, int], Facts] = {}  # (path, size, mtime_ns) -> facts: opening a set twice reads it once


def check_file(path: Path, dtype: np.dtype, entry: dict[str, Any], count: int | None, full: bool) -> CheckedFile:
    """Check a file against its entry in dataset.json: presence, header, size, and if `full` its digest.

    `count` is the number of values that dataset.json tells, None where it does not. ValueError names the file.
    """
    try:
        if not path.exists():
            raise damaged(path, f"is missing, {MANIFEST} lists it")
        if not path.is_file():
            raise damaged(path, "is no regular file, expected a shard")
        if path.is_symlink() and path.resolve().parent != path.parent.resolve():
            raise damaged(path, f"is a link to {path.resolve()}, outside the folder; copy it there or link the folder")
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            stamp = (status.st_size, status.st_mtime_ns)
            found = _check_header(path, file.read(HEADER.size), status.st_size, dtype)
            if count is not None and found != count:
                raise damaged(path, f"its header counts {found:,} values, {MANIFEST} {count:,}")
            if not full:
                return CheckedFile(path, dtype, found, stamp, None)
            file.seek(0)
            facts = _facts(file, (os.path.abspath(path), *stamp), dtype)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror or error})") from error
    if facts.sha256 != entry["sha256"]:
        was, now = entry["sha256"][:12], facts.sha256[:12]
        raise damaged(path, f"has changed since it was written: its sha256 is {now}..., {MANIFEST} says {was}...")
    return CheckedFile(path, dtype, found, stamp, facts)


def _check_header(path: Path, header: bytes, size: int, dtype: np.dtype) -> int:
    """The count that a file's header gives, once header and file size agree with each other and with `dtype`."""
    if len(header) < HEADER.size:
        raise damaged(path, f"has {len(header)} bytes, expected a header of {HEADER.size}")
    magic, version, code, count = HEADER.unpack(header)
    if magic != MAGIC:
        raise damaged(path, f"begins with {magic!r}, expected {MAGIC!r}: no token shard, or one cut short")
    if version != VERSION:
        raise damaged(path, f"has version {version}, this program reads version {VERSION}")
    if DTYPES.get(code) != dtype:
        found = DTYPES[code].name if code in DTYPES else f"unknown dtype code {code}"
        raise damaged(path, f"holds {found}, expected {dtype.name}")
    expected = HEADER.size + count * dtype.itemsize
    if size != expected:
        raise damaged(path, f"has {size:,} bytes, expected {expected:,} for the {count:,} values of its header")
    return count


def _facts(file: BinaryIO, key: tuple[str, int, int], dtype: np.dtype) -> Facts:
    """The facts of a file, read through unless this process has done so since it last changed."""
    known = _known.get(key)
    if known is not None:
        return known
    facts = _read_through(file, dtype)
    if time.time_ns() - key[2] > _SETTLED_NS:
        _known[key] = facts
    return facts


def _read_through(file: BinaryIO, dtype: np.dtype) -> Facts:
    """Digest and facts in one pass, a megabyte at a time. hashlib and NumPy let go of the interpreter lock."""
    digest = hashlib.sha256(file.read(HEADER.size))
    first, largest, total, ascending = 0, -1, 0, True
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        values = np.frombuffer(chunk, dtype=dtype)
        if dtype == U1:
            total += int(values.sum(dtype=np.int64))
        elif dtype == U8:
            first = int(values[0]) if largest < 0 else first
            ascending = ascending and int(values[0]) > largest and bool((values[1:] > values[:-1]).all())
        largest = max(largest, int(values.max()))
    return Facts(digest.hexdigest(), first, largest, total, ascending)


# ---- reading


class MappedFiles:
    """Reads slices of many checked files through a few memory maps. Safe to use from several threads."""

    MAX_OPEN = 8  # maps of a split, each of which holds a file handle: a set may have 10,000 shards

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, mmap.mmap] = OrderedDict()  # the most recently used last
        self._lock = threading.Lock()

    def read(self, file: CheckedFile, start: int, stop: int) -> np.ndarray:
        """A copy of the values [start, stop) of a file. ValueError when it is no longer the file that was checked."""
        offset = HEADER.size + start * file.dtype.itemsize
        with self._lock:
            mapped = self._maps.pop(file.path, None) or self._map(file)
            self._maps[file.path] = mapped
            values = np.frombuffer(mapped, dtype=file.dtype, count=stop - start, offset=offset).copy()
            if hasattr(mmap, "MADV_DONTNEED"):
                # Pages that were read count as this process's memory, and the kernel maps up to 2 MB around each:
                # 500 reads of 2 KB made 200 MB. Letting go costs 5 us; the pages stay in the kernel's cache.
                mapped.madvise(mmap.MADV_DONTNEED)
        return values

    def _map(self, file: CheckedFile) -> mmap.mmap:
        while len(self._maps) >= self.MAX_OPEN:
            self._maps.popitem(last=False)
        try:
            with open(file.path, "rb") as opened:
                status = os.fstat(opened.fileno())
                if (status.st_size, status.st_mtime_ns) != file.stamp:
                    raise damaged(file.path, "has changed since this program opened it")
                return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise damaged(file.path, f"cannot be read any more ({error.strerror or error})") from error
