"""Our checkpoint: one file that `torch.load(weights_only=True)` opens and that proves its own content.

A SHA-256 of all else stands in the comment of the zip archive that torch.save writes. torch.load does not look at it
(nor does it notice a flipped bit: it loads 97% of single-bit errors silently), so `load_checkpoint` does.

    file = [zip archive up to its comment length][length: 2 bytes]["espalier-sha256:" + 64 hex digits]
            `--------- the digest is over this ---------'
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from formats.compact import ENTRY, from_compact
from formats.torch_file import read_torch_file
from model.masks import Mask, Masks, check_weights

FORMAT = 1
TEMPORARY = ".tmp-"  # every unfinished file's name begins so; nothing reads such a file
_COMMENT = b"espalier-sha256:"
_TAIL = 2 + len(_COMMENT) + 64  # bytes: comment length, comment
_PLAIN_END = 22  # bytes: the end-of-archive record of a zip without a comment
_CHUNK = 1 << 22

# Errors after which trying again later may work, in words.
MAY_PASS = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota used up",
    errno.EFBIG: "over the file size limit",
    errno.EIO: "input/output error",
    errno.EROFS: "read-only file system",
    errno.ESTALE: "stale file handle",
}

_LONGEST_NAME = 200  # characters, of a weight; those of networks have 40

# Of what kind the entries are that a file may have, where they are there and not None.
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "val_loss": (int, float),
    "rng": list,
    **dict.fromkeys(("config", "settings", "versions", "tokenizer", "template", "adapter", "base", "reference"), dict),
    **dict.fromkeys(("optimizer", "scaler", "train_loader_state", "progress", "pruning", "recovery"), dict),
}
_DICTS_WITHIN = {"pruning": ("made", "base", "perplexity"), "recovery": ("made",)}

# What a weights-only file lacks.
TRAINING_KEYS = ("optimizer", "scaler", "train_loader_state", "rng", "progress")


class _DigestWriter:
    """Hashes what passes through, but for the last two bytes (the comment length, which is rewritten)."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.held = b""
        self.size = 0
        self.error: OSError | None = None  # torch.save makes a RuntimeError without errno of it

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self.file.write(view)
        except OSError as error:
            self.error = error
            raise
        self.size += len(view)
        if len(view) >= 2:
            self.digest.update(self.held)
            self.digest.update(view[:-2])
            self.held = bytes(view[-2:])
        else:
            held = self.held + bytes(view)
            self.digest.update(held[:-2])
            self.held = held[-2:]
        return len(view)

    def flush(self) -> None:
        self.file.flush()


def write_durably(path: Path, write: Callable[[IO[bytes]], None], check: Callable[[Path], None] | None = None) -> None:
    """Write a file so that a reader sees the old one or the whole new one, also after a crash at any instant.

    Temporary name in the same folder, flush to disk, optional re-read, rename, flush of the folder. On any error the
    temporary goes away and what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{path.name}-{os.getpid()}"
    try:
        if os.path.lexists(temporary):  # of a process of this number that was killed
            temporary.unlink()
        with open(temporary, "xb") as file:  # x: made here, never what a link in a shared folder leads to
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename or removal in it outlives a power cut (no-op where unsupported)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder: Path) -> None:
    """Delete what interrupted writes left behind. Only for the one run that holds the folder."""
    for file in folder.glob(TEMPORARY + "*"):
        if file.is_file():
            file.unlink(missing_ok=True)


def save_checkpoint(path: str | Path, payload: dict[str, Any]) -> int:
    """Write `payload` to `path` atomically and verified; returns its size in bytes.

    Raises OSError when the disk is full or the folder cannot be written; the previous file at `path` stays whole.
    ValueError where weights are not zero that the payload's masks say are: no file ever holds such a model.
    """
    path = Path(path)
    if ENTRY not in payload:
        check_weights(payload.get("model", {}), payload_masks(payload, path))
    size = 0
    writer: _DigestWriter | None = None

    def write(file: IO[bytes]) -> None:
        nonlocal size, writer
        writer = _DigestWriter(file)
        torch.save({"format": FORMAT, **payload}, cast("IO[bytes]", writer))
        file.seek(-2, os.SEEK_END)
        comment = _COMMENT + writer.digest.hexdigest().encode()
        file.write(struct.pack("<H", len(comment)) + comment)
        size = writer.size - 2 + _TAIL

    def check(temporary: Path) -> None:
        try:
            _verify_digest(temporary, shown=path)
        except ValueError as error:
            raise OSError(errno.EIO, f"{str(error).removeprefix(f'{path}: ')} (as read again after writing)") from None
        _read(temporary, shown=path)  # mapped, not read: it proves that weights_only=True takes every value

    try:
        write_durably(path, write, check)
    except (OSError, RuntimeError) as error:
        cause = writer.error if writer is not None and writer.error is not None else error
        raise _save_error(path, payload, cause) from None
    return size


def _save_error(path: Path, payload: dict[str, Any], error: Exception) -> OSError:
    """The error of a failed save in one line: the file, the reason, how much was needed and how much there is."""
    needed = payload_bytes(payload)
    try:
        free = shutil.disk_usage(path.parent).free
        room = f"{free / 1e6:.1f} MB free"
    except OSError:  # the folder itself is gone or out of reach
        free, room = needed, "free space unknown"
    if isinstance(error, OSError) and error.errno is not None:
        code, said = error.errno, error.strerror
    else:
        code, said = (errno.ENOSPC if free < needed else errno.EIO), " ".join(str(error).split())[:120]
    reason = MAY_PASS.get(code, said) if said == os.strerror(code) else said
    return OSError(code, f"{path}: {reason}: about {needed / 1e6:.1f} MB needed, {room}")


def payload_bytes(payload: Any) -> int:
    """Bytes of the tensors in a nest of dicts and lists: about the size of the file."""
    if isinstance(payload, torch.Tensor):
        return payload.numel() * payload.element_size()
    if isinstance(payload, dict):
        return sum(payload_bytes(value) for value in payload.values())
    if isinstance(payload, (list, tuple)):
        return sum(payload_bytes(value) for value in payload)
    return 0


def load_checkpoint(path: str | Path, *, require_digest: bool = False) -> dict[str, Any]:
    """The checked content of a checkpoint, tensors mapped from the file into CPU memory (copied when written to).

    A compact file's are made anew, with their zeros, and `in_memory` is True.
    Raises FileNotFoundError or ValueError naming the file and the reason. A plain archive without a digest (weights
    that somebody saved with torch.save) is taken unless `require_digest`; `has_digest(path)` tells.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a checkpoint file (.pt)")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not path.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"{path}: is not a regular file, expected a checkpoint (.pt)")
    if require_digest or not _is_plain_archive(path):
        _verify_digest(path, shown=path)
    payload = _read(path, shown=path)
    version = payload.get("format", FORMAT)
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(f"{path}: has format {version!r:.80}, this version reads up to {FORMAT}: update the project")
    for key in ("model", "config"):
        if not isinstance(payload.get(key), dict):
            raise ValueError(f"{path}: is not a checkpoint of this project: it holds no {key}")
    for name, value in payload["model"].items():
        if not isinstance(name, str) or len(name) > _LONGEST_NAME or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: its weight {name!r:.80} is no tensor under a name")
    _check_entries(payload, path)
    masks = payload_masks(payload, path)
    if ENTRY in payload:
        return from_compact(payload, masks, path)
    try:
        check_weights(payload["model"], masks)
    except ValueError as error:
        raise ValueError(f"{path}: its masks do not fit its weights: {error}") from None
    return payload


def _check_entries(payload: dict[str, Any], path: Path) -> None:
    """ValueError unless what stands beside the weights is of its kind: those who use it rely on that."""
    for name, kind in _ENTRIES.items():
        value = payload.get(name)
        if value is None:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{path}: its {name} is a {type(value).__name__}, expected another kind of value")
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            raise ValueError(f"{path}: its {name} has a key that is no text")
        if isinstance(value, list) and not all(isinstance(each, dict) for each in value):
            raise ValueError(f"{path}: its {name} holds something else than the states of processes")
    for name, within in _DICTS_WITHIN.items():
        for inner in within:
            if not isinstance((payload.get(name) or {}).get(inner, {}), dict):
                raise ValueError(f"{path}: its {name} has a {inner} that is no dict")


def stream_order(payload: Mapping[str, Any]) -> str | None:
    """What the order of a loaded model's residual channels is called where pruning in blocks changed it, else None."""
    return (payload.get("pruning") or {}).get("order")


def payload_masks(payload: Mapping[str, Any], path: str | Path) -> Masks:
    """The pruning masks of a loaded model by name of weight, none where it is dense. ValueError for what is no mask."""
    entry = payload.get("masks", {})
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: its masks are a {type(entry).__name__}, expected a dict by name of weight")
    masks = {}
    for name, spec in entry.items():
        if not isinstance(name, str) or len(name) > _LONGEST_NAME:
            raise ValueError(f"{path}: its mask {name!r:.80} is of no weight")
        try:
            masks[name] = Mask.from_spec(spec)
        except ValueError as error:
            raise ValueError(f"{path}: the mask of {name} cannot be used: {error}") from None
    return masks


def masks_entry(masks: Masks) -> dict[str, Any]:
    """What a payload says of these masks: its entry `masks`, or nothing for a dense model."""
    return {"masks": {name: mask.spec() for name, mask in masks.items()}} if masks else {}


def peek(path: str | Path, entry: str) -> Any:
    """One entry of a checkpoint whose digest is not checked, so that nothing but that entry is read from the disk.

    For a look at what a file is; what is worked with comes from `load_checkpoint`. Errors as there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    payload = _read(path, shown=path)
    if entry not in payload:
        raise ValueError(f"{path}: is not a checkpoint of this project: it holds no {entry}")
    return payload[entry]


def is_full(payload: dict[str, Any]) -> bool:
    """Whether a checkpoint holds the training state, so that a run can go on from it."""
    return all(payload.get(key) is not None for key in TRAINING_KEYS)


def has_digest(path: str | Path) -> bool:
    """Whether the file carries a digest (it may still be wrong: load_checkpoint checks)."""
    return not _is_plain_archive(Path(path))


def _is_plain_archive(path: Path) -> bool:
    """A whole zip file without a comment: its last 22 bytes are the end record and end in comment length 0."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) < _PLAIN_END:
            return False
        file.seek(-_PLAIN_END, os.SEEK_END)
        end = file.read()
    return end[:4] == b"PK\x05\x06" and end[-2:] == b"\x00\x00"


def _verify_digest(path: Path, shown: Path) -> None:
    """Raises ValueError, naming the file `shown`, unless the content matches the digest in the comment."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise ValueError(f"{shown}: is empty")
        if size <= _TAIL:
            raise ValueError(f"{shown}: is cut short: {size} bytes, expected a checkpoint")
        left = size - _TAIL
        while left:
            block = file.read(min(_CHUNK, left))
            if not block:
                raise ValueError(f"{shown}: became shorter while it was read")
            digest.update(block)
            left -= len(block)
        tail = file.read()
    expected = struct.pack("<H", _TAIL - 2) + _COMMENT + digest.hexdigest().encode()
    if tail[2 : 2 + len(_COMMENT)] != _COMMENT:
        raise ValueError(f"{shown}: ends without a digest: cut short, or not written by this project")
    if tail != expected:
        stated, found = tail[2 + len(_COMMENT) :], digest.hexdigest().encode()
        where = f"its content gives the digest {found[:12].decode()}, not the one it carries"
        raise ValueError(f"{shown}: is damaged: {where if stated != found else 'its last bytes are wrong'}")


def _read(path: Path, shown: Path) -> dict[str, Any]:
    """The content, tensors mapped from the file; any failure becomes a ValueError naming the file."""
    try:
        payload = read_torch_file(path)
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None
    if not isinstance(payload, dict):
        raise ValueError(f"{shown}: holds a {type(payload).__name__}, expected a checkpoint")
    return payload


if __name__ == "__main__":
    import sys

    from formats.checkpoint_command import main

    sys.exit(main(sys.argv[1:]))
