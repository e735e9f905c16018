"""`dataset.json`, the table of contents of a token set: written last, checked before anything else is read.

A folder is a token set when it holds this file. `staged_folder` makes a set appear whole or not at all.
"""

import json
import os
import re
import reprlib
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "dataset.json"
REMEDY = "write the set again with prepare_data.py"
DTYPE_LIMITS = {"uint16": 1 << 16, "uint32": 1 << 32}  # name in dataset.json -> first id that does not fit
_MANIFEST_BYTES = 64 << 20  # 10,000 shards take 4 MB; what is larger is no manifest
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")  # a plain name: nothing that leaves the folder
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OWN_FILES = re.compile(r"dataset\.json|tokenizer\.json|README\.md|[a-z]+_\d{6}\.(bin|mask|docs)")
_REPOSITORY = Path(__file__).resolve().parent.parent


def damaged(path: Path, problem: str) -> ValueError:
    """The one-line error for a file of a set that cannot be used: which file, what is wrong, what helps."""
    return ValueError(f"{path}: {problem}; {REMEDY}")


def resolve_data_dir(data_dir: str | os.PathLike[str]) -> Path:
    """The folder that `--data_dir` means: an existing path as it stands, else a bare name as one under data/."""
    path = Path(data_dir)
    is_bare_name = len(path.parts) == 1 and not path.is_absolute() and path.name not in ("", "..")
    if path.exists() or not is_bare_name:
        return path
    return _REPOSITORY / "data" / path


# ---- the file itself


def write_manifest(folder: Path, meta: dict[str, Any]) -> None:
    """Check `meta` and write it to `folder`/dataset.json, flushed to disk. ValueError names the wrong field."""
    path = folder / MANIFEST
    check_manifest(meta, path)
    with open(path, "x", encoding="utf-8") as file:
        json.dump(meta, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked content of `folder`/dataset.json. ValueError names the file, and the line or field that is wrong."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; make the set with prepare_data.py --data_dir {folder}")
    try:
        if not path.is_file():
            raise damaged(path, "is missing or no regular file, so the folder is no finished token set")
        if path.stat().st_size > _MANIFEST_BYTES:
            raise damaged(path, f"has {path.stat().st_size:,} bytes, expected at most {_MANIFEST_BYTES:,}")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise damaged(path, f"is not UTF-8 at byte {error.start}") from error
    try:
        meta = json.loads(text)
    except json.JSONDecodeError as error:
        raise damaged(path, f"line {error.lineno}, column {error.colno}: broken JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets nested 100,000 deep
        raise damaged(path, f"broken JSON ({type(error).__name__})") from error
    check_manifest(meta, path)
    return meta


def check_manifest(meta: Any, path: Path) -> None:
    """ValueError unless `meta` has every field of format 1 with sane values; `path` is what the message names."""
    if not isinstance(meta, dict):
        raise damaged(path, f"expected a JSON object, found {type(meta).__name__}")
    found = _field(meta, "format", int, path)
    if found != FORMAT:
        raise damaged(path, f"has format {reprlib.repr(found)}, this program reads format {FORMAT}")
    _one_of(meta, "kind", ("text", "instruction", "preference", "prompts"), path)
    _one_of(meta, "dtype", tuple(DTYPE_LIMITS), path)
    _within(meta, "vocab_size", 1, DTYPE_LIMITS[meta["dtype"]], path)
    _within(meta, "eot_id", 0, meta["vocab_size"] - 1, path)
    _field(meta, "seed", int, path)
    for name, kinds in (
        ("tokenizer", dict),
        ("tokenizer_fingerprint", str),
        ("template", (dict, type(None))),
        ("source", dict),
        ("splits", dict),
    ):
        _field(meta, name, kinds, path)
    fraction = _field(meta, "val_fraction", (int, float), path)
    if not 0 <= fraction < 1:
        raise damaged(path, f"val_fraction is {reprlib.repr(fraction)}, expected 0 <= val_fraction < 1")
    if not meta["splits"]:
        raise damaged(path, "splits is empty, expected at least one of train and val")
    for split, entry in meta["splits"].items():
        where = f"splits.{reprlib.repr(split)[1:-1]}"
        _check_split(entry, path, where)
        if meta["kind"] == "preference" and entry["documents"] % 2:
            raise damaged(path, f"{where}.documents is {entry['documents']:,}, expected an even number: they are pairs")


def _check_split(entry: Any, path: Path, where: str) -> None:
    if not isinstance(entry, dict):
        raise damaged(path, f"{where}: expected an object, found {type(entry).__name__}")
    for name in ("tokens", "documents"):
        _within(entry, name, 1, 1 << 62, path, where)
    _within(entry, "supervised", 0, entry["tokens"], path, where)
    shards = _field(entry, "shards", list, path, where)
    for number, shard in enumerate(shards):
        _check_shard(shard, path, f"{where}.shards[{number}]")
    if sum(shard["count"] for shard in shards) != entry["tokens"]:
        total = sum(shard["count"] for shard in shards)
        raise damaged(path, f"{where}: its shards hold {total:,} tokens, expected {entry['tokens']:,}")
    if len({shard.get("mask") is None for shard in shards}) > 1:
        raise damaged(path, f"{where}: some shards have a mask and some have none, expected all or none")


def _check_shard(shard: Any, path: Path, where: str) -> None:
    if not isinstance(shard, dict):
        raise damaged(path, f"{where}: expected an object, found {type(shard).__name__}")
    _within(shard, "count", 1, 1 << 62, path, where)
    _check_file_entry(shard, path, where)
    _check_file_entry(_field(shard, "docs", dict, path, where), path, f"{where}.docs")
    if shard.get("mask") is not None:
        _check_file_entry(_field(shard, "mask", dict, path, where), path, f"{where}.mask")


def _check_file_entry(entry: dict[str, Any], path: Path, where: str) -> None:
    name = _field(entry, "file", str, path, where)
    if not _FILE_NAME.fullmatch(name):
        raise damaged(path, f"{where}.file is {reprlib.repr(name)}, expected a plain file name inside the folder")
    if not _SHA256.fullmatch(_field(entry, "sha256", str, path, where)):
        raise damaged(path, f"{where}.sha256 is {reprlib.repr(entry['sha256'])}, expected 64 hexadecimal digits")


def _field(entry: dict[str, Any], name: str, kind: type | tuple[type, ...], path: Path, where: str = "") -> Any:
    """entry[name] if it is there and of `kind`; true and false do not pass for numbers."""
    label = f"{where}.{name}" if where else name
    if name not in entry:
        raise damaged(path, f"{label} is missing")
    value = entry[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join("null" if each is type(None) else each.__name__ for each in kinds)
        raise damaged(path, f"{label} is {reprlib.repr(value)}, expected {expected}")
    return value


def _within(entry: dict[str, Any], name: str, low: int, high: int, path: Path, where: str = "") -> None:
    value = _field(entry, name, int, path, where)
    if not low <= value <= high:
        label = f"{where}.{name}" if where else name
        raise damaged(path, f"{label} is {reprlib.repr(value)}, expected {low:,} to {high:,}")


def _one_of(entry: dict[str, Any], name: str, choices: tuple[str, ...], path: Path) -> None:
    if _field(entry, name, str, path) not in choices:
        raise damaged(path, f"{name} is {reprlib.repr(entry[name])}, expected one of {', '.join(choices)}")


# ---- all or nothing


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place when the block ends well and vanishes when it fails.

    A set that already stands at `target` is replaced in the last act, its README.md carried over. Folders left by
    runs that were killed are removed first. ValueError when `target` holds other files: they would be lost.
    """
    target = Path(os.path.realpath(target))  # where a link leads to, not the link, is what is replaced
    _refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_dead_runs(target)
    staging = target.with_name(f".tmp-{target.name}-{secrets.token_hex(4)}")
    lock = None
    try:  # here already: tempfile.mkdtemp would leave its folder behind when it is interrupted
        staging.mkdir(mode=0o700)
        lock = _lock(staging)  # the kernel lets go of it when this process dies, however it dies
        yield staging
        readme = target / "README.md"
        if readme.is_file() and not (staging / "README.md").exists():
            shutil.copyfile(readme, staging / "README.md")
        staging.chmod(0o755)  # a set is for others to read too
        _fsync_folder(staging)
        _swap_in(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # not there any more when all went well
        if lock is not None:
            os.close(lock)


def _swap_in(staging: Path, target: Path) -> None:
    _refuse_foreign(target)  # again: hours may have passed
    aside = staging.with_name(staging.name + "-old")
    try:
        if target.exists():
            os.rename(target, aside)
        os.rename(staging, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    _fsync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target}: is a file, expected a folder for the token set; choose another --data_dir")
    foreign = sorted(entry.name for entry in target.iterdir() if not _OWN_FILES.fullmatch(entry.name))
    if foreign:
        raise ValueError(
            f"{target}: holds {reprlib.repr(foreign[0])}, which is no part of a token set and would be lost; "
            "choose another --data_dir or move it away"
        )


def _clear_dead_runs(target: Path) -> None:
    """Remove what killed runs left beside `target`, and put back a set that one had moved aside."""
    ours = re.compile(rf"\.tmp-{re.escape(target.name)}-[a-z0-9_]{{8}}(-old)?")  # not those of a set named NAME-more
    for left in sorted(entry for entry in target.parent.iterdir() if ours.fullmatch(entry.name)):
        if left.name.endswith("-old") and not target.exists():
            os.rename(left, target)
            continue
        lock = _lock(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A file descriptor that holds an exclusive lock on `folder`, or None where another process holds it."""
    import fcntl  # not on Windows, where only writing a set would need it

    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
