"""Where text comes from: the embedded documentation, local files, or the Hugging Face Hub; read as a stream.

`documents` yields text, `record_rows` yields records as they stand; data/records.py reads them. Memory does not grow
with the input: a text file is read in pieces, JSON lines one by one, Parquet by row groups, the Hub by its streaming
interface. A complaint about a file is one line that names it and the line or row in it.
"""

import gzip
import itertools
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from data.records import FIELD_NAMES, fields_of, format_of
from data.settings import NEED_INPUT

logger = logging.getLogger(__name__)

Row = tuple[str, Any]  # where it stands ("file.jsonl:7"), and what stands there

_SMALLEST_PIECE, _LARGEST_PIECE = 1 << 10, 64 << 10  # bytes of a text file that go to one split together
_BUFFER = 1 << 20  # bytes read at a time
_LARGE_JSON = 1 << 30  # bytes; a JSON array is read whole, so above this it is worth a word
# Where GPT-2's splitter cuts whatever stands on either side, so that pieces give the token ids of the whole text.
_CLEAN_CUT = re.compile(rb"(?<=\S)\n(?=\S)|\n(?= \S)")
_ARTICLE = re.compile(r" ?= [^=].* = *\n?")  # a heading of the first level in WikiText
_SUFFIXES = {
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
    "text": (".txt", ".text", ".md", ".rst", ".raw", ".tokens"),
}


class Piece(NamedTuple):
    """Text of one document, or a part of it: `begins` and `ends` say whether the document does so with this piece."""

    text: str
    begins: bool = True
    ends: bool = True


class HubSet(NamedTuple):
    """A data set on the Hugging Face Hub; its split is `train`. format: of its records, None where they tell it."""

    path: str
    name: str | None
    format: str | None


HUB_SETS = {
    "dolly15k": HubSet("databricks/databricks-dolly-15k", None, "instruction"),
    "fineweb-edu": HubSet("HuggingFaceFW/fineweb-edu", "sample-10BT", "text"),
    "wikitext": HubSet("Salesforce/wikitext", "wikitext-103-raw-v1", "text"),
    "c4": HubSet("allenai/c4", "en", "text"),
}


def source_format(source: str, paths: Sequence[str] = (), format: str = "auto") -> str:
    """The format of a source's records, a key of KINDS; where nothing else tells it, the first record's fields do.

    Raises ValueError where that contradicts `format` or where the first record has no known fields. Records of every
    format can serve as prompts.
    """
    fixed = _fixed_format(source)
    if fixed is None and format == "auto":
        where, row = next(_rows(source, paths), (", ".join(paths) or source, None))
        if row is None:
            raise ValueError(f"{where}: holds no records")
        return format_of(row, where)
    if fixed is None or (format == "prompts" and fixed != "text"):
        return format
    if format not in ("auto", fixed):
        raise ValueError(f"--source {source} holds {fixed}, not --format {format}")
    return fixed


def documents(source: str, paths: Sequence[str] = (), *, val_fraction: float = 0.1) -> Iterator[Piece]:
    """The documents of a text source. A text file comes in pieces small enough for a split of `val_fraction`.

    Raises ValueError or OSError, one line, for what cannot be read.
    """
    if source == "pydocs":
        from data.pydocs import pydocs_documents

        yield from map(Piece, pydocs_documents())
    elif source == "wikitext":
        yield from map(Piece, _articles(_wikitext_lines(paths)))
    elif source == "text":
        for path in _files(paths, None):
            yield from _text_pieces(path, val_fraction)
    else:
        for where, row in _rows(source, paths):
            yield Piece(_text_of(where, row))


def record_rows(source: str, paths: Sequence[str] = ()) -> Iterator[Row]:
    """The records of a source as they stand, each with its place. Raises ValueError or OSError, one line."""
    if source == "pydocs-qa":
        from data.pydocs import pydocs_records

        yield from ((f"pydocs-qa record {number}", record) for number, record in enumerate(pydocs_records(), start=1))
    elif source == "arithmetic":
        from data.arithmetic import arithmetic_records

        yield from ((f"arithmetic record {number}", record) for number, record in enumerate(arithmetic_records(), 1))
    else:
        yield from _rows(source, paths)


def _fixed_format(source: str) -> str | None:
    if source in NEED_INPUT:
        return "text" if source == "text" else None
    if source in HUB_SETS:
        return HUB_SETS[source].format
    return {"pydocs": "text", "pydocs-qa": "instruction", "arithmetic": "instruction"}.get(source)


def _hub_set(source: str) -> HubSet:
    """A named set, or OWNER/NAME or OWNER/NAME:CONFIGURATION of the Hub."""
    path, _, name = source.partition(":")
    return HUB_SETS[source] if source in HUB_SETS else HubSet(path, name or None, None)


def _text_of(where: str, row: Any) -> str:
    if not isinstance(row, dict) or "text" not in row:
        raise ValueError(f"{where}: the record has no field 'text'; found {fields_of(row)}"[:400])
    if not isinstance(row["text"], str | None):
        raise ValueError(f"{where}: the field 'text' is {type(row['text']).__name__}, expected text")
    return row["text"] or ""


# ---- files


def _rows(source: str, paths: Sequence[str]) -> Iterator[Row]:
    """The records of JSON and Parquet files, or of the Hub where no files are given."""
    if not paths:
        yield from _hub_rows(_hub_set(source))
        return
    kinds = (source,) if source in ("jsonl", "parquet") else ("jsonl", "parquet")
    for path in _files(paths, [suffix for kind in kinds for suffix in _SUFFIXES[kind]]):
        is_parquet = source == "parquet" or (source != "jsonl" and _suffix(path) == ".parquet")
        yield from (_parquet_rows if is_parquet else _json_rows)(path)


def _files(paths: Sequence[str], suffixes: Sequence[str] | None) -> Iterator[Path]:
    """The files that `--input` names. Folders give their files in sorted order: those with a fitting suffix, or all."""
    for given in map(Path, paths):
        if given.is_dir():
            inside = sorted(path for path in given.rglob("*") if path.is_file() and not path.name.startswith("."))
            fitting = [path for path in inside if suffixes is None or _suffix(path) in suffixes]
            if not fitting:
                wanted = f" that end in {', '.join(suffixes)}" if suffixes else ""
                raise ValueError(f"--input {given}: the folder holds no files{wanted}")
            yield from fitting
        elif given.is_file():
            yield given
        else:
            raise ValueError(f"--input {given}: {'is no regular file' if given.exists() else 'no such file or folder'}")


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked if it is a .gz. Failures to read become one line that names the file."""
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else open(path, "rb", _BUFFER)) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # the last two: a .gz cut short, a .gz damaged
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:200]
        raise OSError(f"{path}: cannot be read ({reason})") from error


def _decoded(data: bytes, path: Path, *, offset: int, line: int) -> str:
    """`data` as text; it begins at byte `offset`, line `line` of the file. ValueError for what is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        place = f"byte {offset + error.start}, line {line} (found 0x{data[error.start]:02x})"
        raise ValueError(f"{path}: not UTF-8 at {place}; convert the file to UTF-8") from None


# ---- plain text


def _text_pieces(path: Path, val_fraction: float) -> Iterator[Piece]:
    """One file as pieces that end at line ends; about 2 / val_fraction of them, so that one file can be split."""
    size = os.path.getsize(path)
    target = _LARGEST_PIECE if path.suffix == ".gz" or not val_fraction else int(size * val_fraction / 2)
    target = min(max(target, _SMALLEST_PIECE), _LARGEST_PIECE)
    offset, line, begins = 0, 1, True
    with _opened(path) as file:
        buffer = file.read(2 * target)
        if buffer.startswith(b"\xef\xbb\xbf"):  # the byte order mark that some editors write
            buffer, offset = buffer[3:], 3
        while buffer:
            cut = _cut(buffer, target)
            rest = buffer[cut:] + file.read(cut)
            yield Piece(_decoded(buffer[:cut], path, offset=offset, line=line), begins, not rest)
            offset, line, begins = offset + cut, line + buffer.count(b"\n", 0, cut), False
            buffer = rest


def _cut(buffer: bytes, target: int) -> int:
    """Where to end a piece that begins at 0: at the last line end within `target` bytes, or between two characters."""
    if len(buffer) <= target:
        return len(buffer)
    clean = max(
        (match.end() for match in _CLEAN_CUT.finditer(buffer, 0, target + 2) if match.end() <= target), default=0
    )
    cut = clean or buffer.rfind(b"\n", 0, target) + 1 or buffer.rfind(b" ", 0, target)
    if cut > 0:
        return cut
    cut = target
    while cut > 1 and buffer[cut] & 0xC0 == 0x80:  # inside a character of several bytes
        cut -= 1
    return cut


def _wikitext_lines(paths: Sequence[str]) -> Iterator[str]:
    if not paths:
        for where, row in _hub_rows(HUB_SETS["wikitext"]):
            yield _text_of(where, row)
        return
    for path in _files(paths, [suffix for suffixes in _SUFFIXES.values() for suffix in suffixes]):
        if _suffix(path) in _SUFFIXES["text"]:
            yield from (text for _, _, text in _lines(path))
        else:
            reader = _parquet_rows if _suffix(path) == ".parquet" else _json_rows
            yield from (_text_of(where, row) for where, row in reader(path))


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText comes in lines; a document is an article, from one heading of the first level to the next."""
    article: list[str] = []
    for line in lines:
        if _ARTICLE.fullmatch(line) and article:
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


# ---- JSON and Parquet


def _lines(path: Path) -> Iterator[tuple[int, int, str]]:
    """(line number, byte offset, text) of each line, its line end included."""
    offset = 0
    with _opened(path) as file:
        for number, data in enumerate(file, start=1):
            start = 3 if number == 1 and data.startswith(b"\xef\xbb\xbf") else 0
            yield number, offset, _decoded(data[start:], path, offset=offset + start, line=number)
            offset += len(data)


def _json_rows(path: Path) -> Iterator[Row]:
    """JSON lines, or one JSON array."""
    with _opened(path) as file:
        is_array = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if is_array:
        yield from _array_rows(path)
        return
    for number, _, text in _lines(path):
        if text and not text.isspace():
            yield f"{path}:{number}", _parsed(text.rstrip(), path, number)


def _array_rows(path: Path) -> Iterator[Row]:
    size = os.path.getsize(path)
    if size > _LARGE_JSON:
        logger.warning(
            "%s: a JSON array, %.1f GB, is read whole into memory; JSON lines are streamed", path, size / 1e9
        )
    with _opened(path) as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    for number, row in enumerate(_parsed(_decoded(data, path, offset=0, line=1), path, 1), start=1):
        yield f"{path}: record {number}", row


def _parsed(text: str, path: Path, line: int) -> Any:
    """The JSON value of `text`, which begins at `line`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}: column {error.colno}"
        raise ValueError(f"{place}: broken JSON ({error.msg}); expected one object a line, or one array") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets nested 100,000 deep
        raise ValueError(f"{path}:{line}: JSON that cannot be read ({type(error).__name__})") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file, a small batch at a time; only the columns that some record format has."""
    import pyarrow
    import pyarrow.parquet

    try:
        with _opened(path) as _, pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            names = [name for name in file.schema_arrow.names if name in FIELD_NAMES]
            if not names:
                found = ", ".join(file.schema_arrow.names)
                wanted = "text, instruction and response, or messages"
                raise ValueError(f"{path}: has the columns {found}; expected {wanted}"[:400])
            number = itertools.count(1)
            for batch in file.iter_batches(batch_size=256, columns=names):
                for row in batch.to_pylist():
                    yield f"{path}: row {next(number)}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter: text of bytes that are none
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a Parquet file that can be read ({reason})") from None


# ---- the Hub


def _hub_rows(hub: HubSet) -> Iterator[Row]:
    """Rows of a Hub data set as they arrive."""
    for number, row in enumerate(_guarded(lambda: _hub_stream(hub), hub), start=1):
        yield f"{hub.path} row {number}", row


def _hub_stream(hub: HubSet) -> Iterator[Any]:
    from huggingface_hub import HfApi

    # One request without retries: where the Hub is out of reach, `datasets` would try for 23 seconds before it says so.
    HfApi().dataset_info(hub.path, timeout=10)
    from datasets import load_dataset

    yield from load_dataset(hub.path, hub.name, split="train", streaming=True)


def _guarded(open_stream: Callable[[], Iterator[Any]], hub: HubSet) -> Iterator[Any]:
    """The stream's rows; whatever error its libraries raise becomes one line with the two ways out."""
    try:
        yield from open_stream()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise OSError(
            f"{hub.path}: could not be read from the Hugging Face Hub ({reason}); "
            "give local files with --input, or point HF_ENDPOINT to a mirror that can be reached"
        ) from error
