"""What one sample is: a window of the text's stream, one record, or a row packed with records. NumPy only.

A window of T slots trains slot t to predict the token after it, so T slots take T + 1 tokens of text and a record of
L tokens takes L - 1 slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.packing import pack
from data.shards import TokenSet

IGNORED = -100  # the target of a slot that is not trained on
_BLOCK = 4 << 20  # mask values that are looked at at a time


class Prompt(NamedTuple):
    """A prompt to be answered, and the answer that its record has, if any: token ids."""

    ids: list[int]
    reference: list[int]


@dataclass
class Rows:
    """Arrays of a batch: (B, T) int64 each. `positions` and `doc_ids` (-1 = padding) only where rows are packed."""

    inputs: np.ndarray
    targets: np.ndarray
    positions: np.ndarray | None = None
    doc_ids: np.ndarray | None = None
    prompts: list[Prompt] | None = None


class Part(NamedTuple):
    """A piece of a window: which window, record or pair of the set it is, and where it stands in the stream."""

    number: int
    start: int
    stop: int


class TextWindows:
    """The stream cut every `block_size` tokens: each token but the first is the target of exactly one slot.

    Windows may cross documents. The last one is short and padded. `max_samples` keeps the first windows only.
    """

    packing = False
    noun = "window"

    def __init__(self, tokens: TokenSet, block_size: int, max_samples: int | None) -> None:
        if tokens.n_tokens < 2:
            raise ValueError(f"{tokens.folder}: split {tokens.split} has 1 token, expected 2 at least; use more text")
        self.tokens, self.block_size = tokens, block_size
        self.count = at_most(-(-(tokens.n_tokens - 1) // block_size), max_samples)
        self.truncated = self.dropped = 0
        self.fill = min(1.0, (tokens.n_tokens - 1) / (self.count * block_size))

    def rows(self, windows: Sequence[int]) -> Rows:
        """The windows of these numbers as arrays (B, block_size)."""
        rows = blank_rows(len(windows), self.block_size, self.tokens.meta["eot_id"])
        for row, window in enumerate(windows):
            start = window * self.block_size
            fill_row(rows, row, 0, self.tokens, start, min(start + self.block_size + 1, self.tokens.n_tokens))
        return rows

    def parts(self, window: int) -> list[Part]:
        """What a window is made of: itself."""
        start = window * self.block_size
        return [Part(window, start, min(start + self.block_size + 1, self.tokens.n_tokens))]

    def describe(self) -> str:
        return f"{self.tokens.n_tokens:,} tokens in {self.count:,} windows of {self.block_size:,}"


class RecordWindows:
    """Records, one a window or several packed into rows of `block_size` slots; no record spans two windows.

    A record that needs more slots is cut (`truncated` counts them); one that is left without a supervised token is left
    out (`dropped`). `max_samples` keeps the first records of the set only. `fill` is the share of slots in use.
    """

    noun = "record"

    def __init__(self, tokens: TokenSet, block_size: int, packing: bool, max_samples: int | None, seed: int) -> None:
        self.tokens, self.block_size, self.packing = tokens, block_size, packing
        bounds = tokens.document_starts[: at_most(tokens.n_documents, max_samples) + 1]  # (records + 1,)
        needed = np.diff(bounds) - 1
        slots = np.minimum(needed, block_size)
        kept = supervised_counts(tokens, bounds[:-1], slots) > 0
        if not kept.any():
            raise ValueError(
                f"{tokens.folder}: none of {len(kept):,} records of split {tokens.split} has a supervised token within "
                f"--block_size {block_size}; use a longer one"
            )
        self.truncated = int((needed > block_size)[kept].sum())
        self.dropped = int((~kept).sum())
        self._starts, self._slots = bounds[:-1][kept], slots[kept]
        if packing:
            self._records, self._row_starts = pack(self._slots, block_size, seed)
            self.count = len(self._row_starts) - 1
        else:
            self.count = len(self._starts)
        self.fill = float(self._slots.sum() / (self.count * block_size))

    def rows(self, windows: Sequence[int]) -> Rows:
        """The windows of these numbers as arrays (B, T): T = block_size if packed, else as the longest record needs."""
        if not self.packing:
            width = int(self._slots[list(windows)].max())
            width = min(-(-width // 8) * 8, self.block_size)  # few different widths: compiled kernels are used again
            rows = blank_rows(len(windows), width, self.tokens.meta["eot_id"])
            for row, record in enumerate(windows):
                self._fill_record(rows, row, 0, record)
            return rows
        rows = blank_rows(len(windows), self.block_size, self.tokens.meta["eot_id"])
        rows.positions = np.zeros_like(rows.inputs)
        rows.doc_ids = np.full_like(rows.inputs, -1)
        for row, window in enumerate(windows):
            begin = 0
            for number, record in enumerate(self._records[self._row_starts[window] : self._row_starts[window + 1]]):
                end = begin + self._fill_record(rows, row, begin, record)
                rows.positions[row, begin:end] = np.arange(end - begin)
                rows.doc_ids[row, begin:end] = number
                begin = end
        return rows

    def parts(self, window: int) -> list[Part]:
        """The records in a window, by their number in the set."""
        inside = self._records[self._row_starts[window] : self._row_starts[window + 1]] if self.packing else [window]
        spans = [(int(self._starts[record]), int(self._slots[record])) for record in inside]
        return [Part(document_at(self.tokens, start), start, start + slots + 1) for start, slots in spans]

    def describe(self) -> str:
        used = f"{len(self._starts):,} records"
        if self.packing:
            used += f" in {self.count:,} rows of {self.block_size:,} ({self.fill:.1%} full)"
        cut = f", {self.truncated:,} cut at {self.block_size:,} tokens" if self.truncated else ""
        return used + cut + (f", {self.dropped:,} left out (nothing supervised)" if self.dropped else "")

    def _fill_record(self, rows: Rows, row: int, begin: int, record: int) -> int:
        start = int(self._starts[record])
        return fill_row(rows, row, begin, self.tokens, start, start + int(self._slots[record]) + 1)


def document_at(tokens: TokenSet, place: int) -> int:
    """The number of the document that a place of the stream lies in."""
    return int(np.searchsorted(tokens.document_starts, place, side="right")) - 1


def supervised_counts(tokens: TokenSet, starts: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """How many supervised targets each record has when it begins at `starts` (n,) and is cut to `slots` (n,): (n,)."""
    if not tokens.has_mask:
        return slots
    counts = np.empty(len(starts), dtype=np.int64)
    first = 0
    while first < len(starts):  # a block of records at a time: constant memory
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + _BLOCK)))
        base = int(starts[first])
        mask = tokens.mask(base, int(starts[last - 1] + slots[last - 1]) + 1)
        running = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
        targets = starts[first:last] + 1 - base  # the first token of a record is no target
        counts[first:last] = running[targets + slots[first:last]] - running[targets]
        first = last
    return counts


def at_most(count: int, limit: int | None) -> int:
    """`count`, or the limit where there is one below it."""
    return count if limit is None else min(count, limit)


def blank_rows(n_rows: int, width: int, eot_id: int) -> Rows:
    """Rows of nothing but padding, arrays (n_rows, width)."""
    shape = (n_rows, width)
    return Rows(np.full(shape, eot_id, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64))


def fill_row(rows: Rows, row: int, begin: int, tokens: TokenSet, start: int, stop: int) -> int:
    """Write the slots that the tokens [start, stop) make into a row from slot `begin` on; returns how many they are."""
    ids = tokens.tokens(start, stop)
    end = begin + len(ids) - 1
    rows.inputs[row, begin:end] = ids[:-1]
    rows.targets[row, begin:end] = ids[1:]
    if tokens.has_mask:
        rows.targets[row, begin:end][tokens.mask(start + 1, stop) == 0] = IGNORED
    return end - begin
