"""What a run leaves to read: metrics.jsonl (the record), samples.jsonl, training.log."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from formats.checkpoint import MAY_PASS


class AppendFile:
    """A file that lines are appended to, each in one write.

    The kernel copies a write page by page and lets SIGKILL in between, so that a kill can tear the last line of a
    file, and only that one: the next to append takes it away first, and no reader takes it for a line. What a disk
    that is full, or fails otherwise for a while, refuses is kept and tried again with the next line: no run ends for
    want of a log line.
    """

    def __init__(self, path: Path, complain: Callable[[str], None]) -> None:
        self.path, self.complain = path, complain
        self._file: IO[bytes] | None = None
        self._waiting = b""
        self._complained = False

    def append(self, data: bytes) -> None:
        """Write `data` after what waits. Raises OSError for what no waiting will mend."""
        self._waiting += data
        try:
            if self._file is None:
                self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 -- closed with the run
                cut_torn_line(self._file)
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._complained = False
        except OSError as error:
            self._wait_for_better(error)

    def flush_to_disk(self) -> None:
        """So that what is written outlives a power cut."""
        if self._file is not None:
            self.append(b"")
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self._wait_for_better(error)

    def close(self) -> None:
        """A last try for what waits."""
        if self._file is not None:
            self.append(b"")
            self._file.close()
            self._file = None

    def _wait_for_better(self, error: OSError) -> None:
        if error.errno not in MAY_PASS:
            raise error
        if not self._complained:
            self._complained = True
            self.complain(f"{self.path}: {MAY_PASS[error.errno]}: its lines are kept and tried again with the next")


def cut_torn_line(file: IO[bytes], block: int = 1 << 16) -> None:
    """End `file` after its last newline, wherever that is; reads from the end, `block` bytes at a time."""
    end = whole = file.seek(0, os.SEEK_END)
    for whole, data in _blocks_from_the_end(file, block):
        newline = data.rfind(b"\n")
        if newline >= 0:
            whole += newline + 1
            break
    if whole < end:
        file.truncate(whole)


def lines_from_the_end(file: IO[bytes], block: int = 1 << 16) -> Iterator[tuple[int, bytes]]:
    """(place, line) of each line, the last one first, in a file that ends with a newline; `block` bytes at a time."""
    rest = b""
    for start, data in _blocks_from_the_end(file, block):
        rest = data + rest
        end = start + len(rest)
        first, *lines = rest.split(b"\n")[:-1]
        for line in reversed(lines):
            end -= len(line) + 1
            yield end, line
        rest = first + b"\n"
    if rest:
        yield 0, rest[:-1]


def _blocks_from_the_end(file: IO[bytes], block: int) -> Iterator[tuple[int, bytes]]:
    """(place, bytes) of a file in pieces of `block` bytes at most, the last piece first."""
    start = file.seek(0, os.SEEK_END)
    while start:
        size = min(block, start)
        start -= size
        file.seek(start)
        yield start, file.read(size)


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line holds, where it is an object with a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # the latter: brackets nested a thousand deep
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class Console:
    """The terminal of rank 0, mirrored to training.log, with a progress bar while training."""

    def __init__(self, active: bool) -> None:
        self.active = active
        self._log: AppendFile | None = None
        self._early: list[str] = []
        self._bar: Any = None

    def open_log(self, path: Path) -> None:
        """Mirror to `path` from now on, what was said before included; a log that is open stays."""
        if self.active and self._log is None:
            self._log = AppendFile(path, complain=lambda text: print(text, file=sys.stderr))
            for text in self._early:
                self._write(text)
            self._early.clear()

    def say(self, text: str = "") -> None:
        """Print on rank 0 and keep it in training.log."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()
        else:
            print(text, flush=True)
        self._write(text)

    def note(self, text: str) -> None:
        """Only training.log, for lines that the progress bar shows already."""
        if self.active:
            self._write(text)

    def _write(self, text: str) -> None:
        if self._log is None:
            self._early.append(text)
        else:
            self._log.append(f"{text}\n".encode("utf-8", "backslashreplace"))  # of a path that is no text, say

    def start_bar(self, total: int, done: int) -> None:
        """Show a bar with ETA where the terminal can; elsewhere lines tell the same."""
        if self.active and sys.stderr.isatty():
            from tqdm import tqdm

            if self._bar is not None:
                self._bar.close()
            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, smoothing=0.1)

    @property
    def has_bar(self) -> bool:
        return self._bar is not None

    def advance(self, shown: dict[str, str]) -> None:
        """One step further."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(1)

    def close(self) -> None:
        """Take the bar away and close the log."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._log is not None:
            self._log.close()
            self._log = None


class JsonLines(AppendFile):
    """A file of one JSON object a line."""

    def cut_after(self, step: int) -> None:
        """Keep the lines up to `step`, which stand in order, and cut off what comes after them, at once.

        Reads from the end as far as it cuts: a run of ten million steps resumes as fast as one of ten.
        """
        if not self.path.exists():
            return
        with open(self.path, "r+b") as file:
            cut_torn_line(file)
            end = file.seek(0, os.SEEK_END)
            for start, line in lines_from_the_end(file):
                record = _record(line)
                if record is not None and record["step"] <= step:
                    break
                end = start
            file.truncate(end)
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """All lines that are whole."""
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        return [record for record in map(_record, lines) if record is not None]

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; NaN and infinity become null, which JSON can hold."""
        plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        self.append(json.dumps(plain, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
