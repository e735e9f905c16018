"""Perplexity in a sliding window, and the summed loss that training validates with.

    window 1   [scored scored scored scored]
    window 2         [context context scored scored]        stride 2, block_size 4
    window 3               [context context scored scored]

A window is `block_size` tokens. The first is scored whole but for its first token, which nothing precedes; each later
one starts `stride` tokens further and scores only what no window before it held. A stride as long as the window leaves
no context over, and the first token of every window unscored. (The protocol of most published numbers; there is no
begin token.) In a set with a loss mask each record has windows of its own, and only supervised tokens are scored.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from data.loader import IGNORED, Batch
from data.tokenizer import Tokenizer
from model.gpt import GPT


class TokenStream(Protocol):
    """What can be scored: a TokenSet, or `ArrayTokens` around an array."""

    n_tokens: int
    has_mask: bool

    @property
    def document_starts(self) -> np.ndarray: ...

    def tokens(self, start: int, stop: int) -> np.ndarray: ...

    def mask(self, start: int, stop: int) -> np.ndarray: ...


class ArrayTokens:
    """Token ids (n,) in memory as one document; with a 0/1 mask (n,), only the tokens marked 1 are scored."""

    def __init__(self, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        assert mask is None or mask.shape == ids.shape
        self.ids = ids
        self.marks = mask
        self.n_tokens = len(ids)
        self.has_mask = mask is not None
        self.document_starts = np.array([0, len(ids)])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The ids [start, stop), int64."""
        return self.ids[start:stop].astype(np.int64)

    def mask(self, start: int, stop: int) -> np.ndarray:
        """Which of [start, stop) are scored, uint8."""
        return np.ones(stop - start, np.uint8) if self.marks is None else self.marks[start:stop]


class Window(NamedTuple):
    """Tokens [start, stop) of the stream are read, those from `scored` on are scored."""

    start: int
    scored: int
    stop: int


@dataclass(frozen=True)
class PerplexityResult:
    """Sums over the scored tokens, and the protocol that they were made by."""

    loss_sum: float  # nats
    tokens: int  # scored
    bytes: int | None  # UTF-8 bytes of the scored tokens, special ones not counted; None without a tokenizer
    windows: int
    block_size: int
    stride: int

    @property
    def loss(self) -> float:
        """Nats per scored token."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return safe_exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte: the same text under different tokenizers compares by this. None where no byte counts."""
        return self.loss_sum / math.log(2) / self.bytes if self.bytes else None

    @property
    def protocol(self) -> str:
        """How the number was made, in one line."""
        return (
            f"{self.tokens:,} tokens scored in {self.windows:,} windows of {self.block_size}, stride {self.stride}, "
            "no begin token"
        )


def safe_exp(loss: float) -> float:
    """exp(loss), infinite in place of an OverflowError."""
    return math.exp(loss) if loss < 709 else math.inf if loss == loss else math.nan


def windows(documents: Iterable[tuple[int, int]], block_size: int, stride: int) -> Iterator[Window]:
    """The windows over each document [start, stop), in order; a document of fewer than two tokens has none."""
    for first, last in documents:
        begin, done = first, first + 1  # nothing precedes a document's first token
        while done < last:
            stop = min(begin + block_size, last)
            scored = max(done, begin + 1)  # with stride == block_size a window's first token has no context
            if scored < stop:
                yield Window(begin, scored, stop)
            begin, done = begin + stride, stop


def perplexity(
    model: GPT,
    tokens: np.ndarray | TokenStream,
    *,
    block_size: int,
    stride: int,
    batch_size: int = 8,
    tokenizer: Tokenizer | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> PerplexityResult:
    """Scores a stream of tokens, an array (n,) or a TokenSet, on the model's device. Memory does not grow with n.

    `tokenizer` adds bits per byte; `max_tokens` reads only so many from the start; `progress` is told the number of
    tokens that each batch has scored. The batch size changes the result by rounding only.
    Raises ValueError for sizes that do not fit and where no token can be scored.
    """
    stream = ArrayTokens(tokens) if isinstance(tokens, np.ndarray) else tokens
    _check_sizes(model, block_size, stride, batch_size)
    limit = stream.n_tokens if max_tokens is None else min(max_tokens, stream.n_tokens)
    loss_sum, n_tokens, n_bytes, n_windows = 0.0, 0, 0, 0
    pieces = (_read(stream, window) for window in windows(_documents(stream, limit), block_size, stride))
    rows = (row for row in pieces if (row[1] != IGNORED).any())  # a record's window may supervise nothing
    with _evaluating(model):
        for batch in iter(lambda: list(itertools.islice(rows, batch_size)), []):
            inputs, targets = _stack(batch)  # (B, T) each
            device = model.wte.weight.device
            loss_sum += float(model(inputs.to(device), targets.to(device)))
            scored = targets[targets != IGNORED]
            n_tokens += len(scored)
            n_windows += len(batch)
            if tokenizer is not None:
                n_bytes += count_bytes(tokenizer, scored.tolist())
            if progress is not None:
                progress(len(scored))
    if n_tokens == 0:
        what = "supervised token" if stream.has_mask else "token with another before it"
        raise ValueError(f"the first {limit:,} tokens hold no {what}: there is nothing to score")
    return PerplexityResult(loss_sum, n_tokens, n_bytes if tokenizer else None, n_windows, block_size, stride)


def mean_loss(model: GPT, batches: Iterable[Batch]) -> tuple[float, int]:
    """(summed loss in nats, supervised tokens) over the batches: the mean is their quotient, also over processes.

    In evaluation mode, without gradients, on the model's device.
    """
    loss_sum, tokens = 0.0, 0
    with _evaluating(model):
        for batch in batches:
            here = batch.to(model.wte.weight.device)
            loss_sum += float(model(here.inputs, here.targets, positions=here.positions, doc_ids=here.doc_ids))
            tokens += batch.supervised
    return loss_sum, tokens


def count_bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> int:
    """UTF-8 bytes of the text that `ids` stand for; special tokens are no text."""
    special = set(tokenizer.special_tokens.values())
    return len(tokenizer.decode_bytes(token for token in ids if token not in special))


def _check_sizes(model: GPT, block_size: int, stride: int, batch_size: int) -> None:
    limit = model.config.block_size
    if not 2 <= block_size <= limit:
        raise ValueError(f"block_size {block_size}: expected 2 to {limit}, the model's context")
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride {stride}: expected 1 to {block_size}, the window's length (more would skip tokens)")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")


def _documents(stream: TokenStream, limit: int) -> Iterator[tuple[int, int]]:
    """What windows may not leave: the whole of a text, each record of an instruction set; cut off at `limit`."""
    if not stream.has_mask:
        yield 0, limit
        return
    for start, stop in itertools.pairwise(stream.document_starts.tolist()):
        if start < limit:
            yield start, min(stop, limit)


def _read(stream: TokenStream, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets) of a window of T + 1 tokens, int64 (T,) each; -100 where nothing is scored."""
    ids = stream.tokens(window.start, window.stop)  # (T + 1,)
    targets = ids[1:].copy()
    targets[: window.scored - window.start - 1] = IGNORED
    if stream.has_mask:
        targets[stream.mask(window.start, window.stop)[1:] == 0] = IGNORED
    return ids[:-1], targets


def _stack(rows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as two (B, T) tensors; padding stands on the right, where causal attention hides it."""
    length = max(len(inputs) for inputs, _ in rows)
    inputs = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    for i, (row_inputs, row_targets) in enumerate(rows):
        inputs[i, : len(row_inputs)] = torch.from_numpy(row_inputs)
        targets[i, : len(row_targets)] = torch.from_numpy(row_targets)
    return inputs, targets


@contextlib.contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """Evaluation mode (no dropout) and no gradients; the mode before is put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
