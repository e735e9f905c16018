"""Samples whose answers are compared: pairs of answers to one prompt, and prompts that are yet to be answered."""

from collections.abc import Sequence

import numpy as np

from data.shards import TokenSet
from data.windows import Part, Prompt, Rows, at_most, blank_rows, document_at, fill_row

_BLOCK = 4 << 20  # mask values that are looked at at a time


class PairWindows:
    """Pairs of a better and a worse answer: a window is a pair, two rows of one sequence each, the chosen one first.

    A pair with a side of more than `block_size` slots loses the beginning of its prompt, both sides the same part, so
    that they still answer one prompt (`truncated`). An answer is never cut: pairs without room for a token of the
    prompt are left out (`dropped`). `max_samples` keeps the first pairs of the set only.
    """

    packing = False
    noun = "pair"

    def __init__(self, tokens: TokenSet, block_size: int, max_samples: int | None) -> None:
        where = f"{tokens.folder}: split {tokens.split}"
        assert tokens.n_documents % 2 == 0, "the manifest's check lets no half pair through"
        pairs = at_most(tokens.n_documents // 2, max_samples)
        bounds = tokens.document_starts[: 2 * pairs + 1]
        starts, lengths = bounds[:-1].reshape(-1, 2), np.diff(bounds).reshape(-1, 2)  # (pairs, 2) each
        prompts = prompt_lengths(tokens, bounds).reshape(-1, 2)
        _refuse_equal(tokens, starts, lengths)
        cut = np.maximum(0, lengths.max(axis=1) - 1 - block_size)  # (pairs,)
        kept = (prompts.min(axis=1) > cut) & (prompts < lengths).all(axis=1)
        if not kept.any():
            raise ValueError(
                f"{where}: no answer of its {pairs:,} pairs fits --block_size {block_size} beside a prompt"
            )
        self.tokens, self.block_size = tokens, block_size
        self._starts = (starts + cut[:, None])[kept]
        self._slots = (lengths - cut[:, None])[kept] - 1
        self.count = len(self._starts)
        self.truncated, self.dropped = int((cut > 0)[kept].sum()), int((~kept).sum())
        self.fill = float(self._slots.sum() / (2 * self.count * block_size))

    def rows(self, windows: Sequence[int]) -> Rows:
        """The pairs of these numbers as arrays (2 B, T), T as the longest of them needs."""
        slots, starts = self._slots[list(windows)].reshape(-1), self._starts[list(windows)].reshape(-1)  # (2 B,)
        width = min(-(-int(slots.max()) // 8) * 8, self.block_size)  # few different widths, as for records
        rows = blank_rows(len(slots), width, self.tokens.meta["eot_id"])
        for row, (start, size) in enumerate(zip(starts.tolist(), slots.tolist())):
            fill_row(rows, row, 0, self.tokens, start, start + size + 1)
        return rows

    def parts(self, window: int) -> list[Part]:
        """Both sides of a pair, by the pair's number in the set."""
        spans = zip(self._starts[window].tolist(), self._slots[window].tolist())
        return [Part(document_at(self.tokens, start) // 2, start, start + slots + 1) for start, slots in spans]

    def describe(self) -> str:
        cut = f", {self.truncated:,} with the beginning of the prompt cut at {self.block_size:,} tokens"
        left = f", {self.dropped:,} left out (an answer empty or too long for --block_size {self.block_size})"
        return f"{self.count:,} pairs" + (cut if self.truncated else "") + (left if self.dropped else "")


class PromptWindows:
    """Prompts of at most `block_size` tokens: what comes before the first supervised token, which begins the reference.

    Longer ones lose their beginning (`truncated`); records without a prompt are left out (`dropped`).
    """

    packing = False
    noun = "record"

    def __init__(self, tokens: TokenSet, block_size: int, max_samples: int | None) -> None:
        bounds = tokens.document_starts[: at_most(tokens.n_documents, max_samples) + 1]
        sizes = prompt_lengths(tokens, bounds)  # (records,)
        kept = sizes > 0
        if not kept.any():
            raise ValueError(f"{tokens.folder}: split {tokens.split} holds no prompt; write the set again")
        self.tokens, self.block_size = tokens, block_size
        self._starts, self._sizes, self._stops = bounds[:-1][kept], sizes[kept], bounds[1:][kept]
        self.count = len(self._starts)
        self.truncated, self.dropped = int((self._sizes > block_size).sum()), int((~kept).sum())
        self.fill = float(np.minimum(self._sizes, block_size).mean() / block_size)

    def rows(self, windows: Sequence[int]) -> Rows:
        """The prompts of these numbers, beside empty arrays (B, 0)."""
        rows = blank_rows(len(windows), 0, self.tokens.meta["eot_id"])
        rows.prompts = [self._prompt(window) for window in windows]
        return rows

    def _prompt(self, window: int) -> Prompt:
        start, middle = int(self._starts[window]), int(self._starts[window] + self._sizes[window])
        ids = self.tokens.tokens(max(start, middle - self.block_size), middle).tolist()
        stop = int(self._stops[window])
        mask = self.tokens.mask(middle, stop)
        answer = int(np.argmin(mask)) if len(mask) and not mask.all() else len(mask)  # the first run of supervised ones
        return Prompt(ids, self.tokens.tokens(middle, middle + answer).tolist())

    def parts(self, window: int) -> list[Part]:
        """The record that the prompt is of, by its number in the set."""
        start, stop = int(self._starts[window]), int(self._stops[window])
        return [Part(document_at(self.tokens, start), start, stop)]

    def describe(self) -> str:
        cut = f", {self.truncated:,} with the beginning cut at {self.block_size:,} tokens" if self.truncated else ""
        return f"{self.count:,} prompts{cut}" + (f", {self.dropped:,} empty ones left out" if self.dropped else "")


def prompt_lengths(tokens: TokenSet, bounds: np.ndarray) -> np.ndarray:
    """How many tokens of each document come before its first supervised one; all, if there is none. bounds (n + 1,)."""
    lengths = np.diff(bounds)
    first = 0
    while first < len(lengths):  # a block of documents at a time: constant memory
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + _BLOCK)) - 1)
        base = int(bounds[first])
        supervised = np.flatnonzero(tokens.mask(base, int(bounds[last]))) + base
        nearest = np.append(supervised, tokens.n_tokens)[np.searchsorted(supervised, bounds[first:last])]
        lengths[first:last] = np.minimum(lengths[first:last], nearest - bounds[first:last])
        first = last
    return lengths


def _refuse_equal(tokens: TokenSet, starts: np.ndarray, lengths: np.ndarray) -> None:
    for pair in np.flatnonzero(lengths[:, 0] == lengths[:, 1]).tolist():
        chosen, rejected = (tokens.tokens(start, start + int(lengths[pair, 0])) for start in starts[pair].tolist())
        if (chosen == rejected).all():
            raise ValueError(
                f"{tokens.folder}: pair {pair} of split {tokens.split} has the same answer on both sides, so that "
                "neither is better; leave it out and write the set again with prepare_data.py"
            )
