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

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from data.loader import IGNORED, Batch
from data.tokenizer import Tokenizer
from evaluation.processes import ALONE, Processes, gather, share
from evaluation.token_scores import evaluating, stack, token_scores
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
    """Token ids (n,) in memory; with a 0/1 mask (n,), only the tokens marked 1 are scored.

    They are one document, or those that begin at `starts`.
    """

    def __init__(self, ids: np.ndarray, mask: np.ndarray | None = None, starts: Sequence[int] = (0,)) -> None:
        assert mask is None or mask.shape == ids.shape
        self.ids = ids
        self.marks = mask
        self.n_tokens = len(ids)
        self.has_mask = mask is not None
        self.document_starts = np.array([*starts, len(ids)])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The ids [start, stop), int64."""
        return self.ids[start:stop].astype(np.int64)

    def mask(self, start: int, stop: int) -> np.ndarray:
        """Which of [start, stop) are scored, uint8."""
        return np.ones(stop - start, np.uint8) if self.marks is None else self.marks[start:stop]


class Window(NamedTuple):
    """Tokens [start, stop) of the stream are read, those from `scored` on are scored; all are of one document."""

    start: int
    scored: int
    stop: int
    document: int = 0


class Score(NamedTuple):
    """Sums over the scored tokens of a window."""

    document: int
    loss_sum: float  # nats
    tokens: int
    bytes: int  # UTF-8 bytes of them, special tokens not counted; 0 without a tokenizer
    hits: int  # how many were the likeliest token at their place; 0 where that was not asked


@dataclass(frozen=True)
class PerplexityResult:
    """Sums over the scored tokens, and the protocol that they were made by."""

    loss_sum: float  # nats
    tokens: int  # scored
    bytes: int | None  # UTF-8 bytes of the scored tokens, special ones not counted; None without a tokenizer
    windows: int
    block_size: int
    stride: int
    hits: int | None = None  # how many scored tokens were the likeliest at their place; None where that was not asked
    how: str = "no begin token"  # what else belongs to the protocol

    @property
    def loss(self) -> float:
        """Nats per scored token."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return safe_exp(self.loss)

    @property
    def accuracy(self) -> float | None:
        """The share of scored tokens that were the likeliest at their place. None where that was not asked."""
        return None if self.hits is None else self.hits / self.tokens

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte: the same text under different tokenizers compares by this. None where no byte counts."""
        return self.loss_sum / math.log(2) / self.bytes if self.bytes else None

    @property
    def protocol(self) -> str:
        """How the number was made, in one line."""
        return (
            f"{self.tokens:,} tokens scored in {self.windows:,} windows of {self.block_size}, stride {self.stride}, "
            f"{self.how}"
        )


def safe_exp(loss: float) -> float:
    """exp(loss), infinite in place of an OverflowError."""
    return math.exp(loss) if loss < 709 else math.inf if loss == loss else math.nan


def windows(documents: Iterable[tuple[int, int]], block_size: int, stride: int) -> Iterator[Window]:
    """The windows over each document [start, stop), in order; a document of fewer than two tokens has none."""
    for number, (first, last) in enumerate(documents):
        begin, done = first, first + 1  # nothing precedes a document's first token
        while done < last:
            stop = min(begin + block_size, last)
            scored = max(done, begin + 1)  # with stride == block_size a window's first token has no context
            if scored < stop:
                yield Window(begin, scored, stop, number)
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
    """Scores a stream of tokens, an array (n,) or a TokenSet, on the model's device.

    `tokenizer` adds bits per byte; `max_tokens` reads only so many from the start; `progress` is told the number of
    tokens that each batch has scored. The batch size changes the result by rounding only.
    Raises ValueError for sizes that do not fit and where no token can be scored.
    """
    stream = ArrayTokens(tokens) if isinstance(tokens, np.ndarray) else tokens
    scores = score_windows(
        model,
        stream,
        block_size=block_size,
        stride=stride,
        batch_size=batch_size,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        progress=progress,
    )
    return total(scores, block_size=block_size, stride=stride, with_bytes=tokenizer is not None)


def score_windows(
    model: GPT,
    stream: TokenStream,
    *,
    block_size: int,
    stride: int,
    batch_size: int = 8,
    tokenizer: Tokenizer | None = None,
    max_tokens: int | None = None,
    with_hits: bool = False,
    progress: Callable[[int], object] | None = None,
    processes: Processes = ALONE,
) -> list[Score]:
    """The score of each window that scores anything, in order. Arguments and errors as for `perplexity`.

    `with_hits` counts the tokens that were the likeliest at their place. `processes` share the batches, and each gets
    all scores. A window takes a hundred bytes, the tokens none.
    """
    _check_sizes(model, block_size, stride, batch_size)
    limit = stream.n_tokens if max_tokens is None else min(max_tokens, stream.n_tokens)
    pieces = (_read(stream, window) for window in windows(_documents(stream, limit), block_size, stride))
    rows = (row for row in pieces if (row.targets != IGNORED).any())  # a record's window may supervise nothing
    batches = iter(lambda: list(itertools.islice(rows, batch_size)), [])
    found: dict[int, list[Score]] = {}
    with evaluating(model):
        for number, batch in share(batches, processes):
            found[number] = _score_batch(model, batch, tokenizer, with_hits)
            if progress is not None:
                progress(sum(score.tokens for score in found[number]))
    scores = [Score(*each) for batch in gather(found, processes) for each in batch]
    if not scores:
        what = "supervised token" if stream.has_mask else "token with another before it"
        raise ValueError(f"the first {limit:,} tokens hold no {what}: there is nothing to score")
    return scores


def total(scores: Sequence[Score], *, with_bytes: bool = True, with_hits: bool = False, **how: Any) -> PerplexityResult:
    """The sums over these windows, at least one; `how` are the fields of the result that tell how they were made."""
    return PerplexityResult(
        loss_sum=math.fsum(score.loss_sum for score in scores),
        tokens=sum(score.tokens for score in scores),
        bytes=sum(score.bytes for score in scores) if with_bytes else None,
        windows=len(scores),
        hits=sum(score.hits for score in scores) if with_hits else None,
        **how,
    )


def mean_loss(model: GPT, batches: Iterable[Batch]) -> tuple[float, int]:
    """(summed loss in nats, supervised tokens) over the batches: the mean is their quotient, also over processes.

    In evaluation mode, without gradients, on the model's device.
    """
    loss_sum, tokens = 0.0, 0
    with evaluating(model):
        for batch in batches:
            here = batch.to(model.device)
            loss_sum += float(model(here.inputs, here.targets, positions=here.positions, doc_ids=here.doc_ids))
            tokens += batch.supervised
    return loss_sum, tokens


def count_bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> int:
    """UTF-8 bytes of the text that `ids` stand for; special tokens are no text."""
    special = set(tokenizer.special_tokens.values())
    return len(tokenizer.decode_bytes(token for token in ids if token not in special))


def _check_sizes(model: GPT, block_size: int, stride: int, batch_size: int) -> None:
    limit = model.context_length
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


class _Row(NamedTuple):
    """A window of T + 1 tokens as the model reads it: int64 (T,) each; -100 where nothing is scored."""

    document: int
    inputs: np.ndarray
    targets: np.ndarray


def _read(stream: TokenStream, window: Window) -> _Row:
    ids = stream.tokens(window.start, window.stop)  # (T + 1,)
    targets = ids[1:].copy()
    targets[: window.scored - window.start - 1] = IGNORED
    if stream.has_mask:
        targets[stream.mask(window.start, window.stop)[1:] == 0] = IGNORED
    return _Row(window.document, ids[:-1], targets)


def _score_batch(model: GPT, rows: list[_Row], tokenizer: Tokenizer | None, with_hits: bool) -> list[Score]:
    """The sums of each row, losses in fp64."""
    inputs, targets = stack([(row.inputs, row.targets) for row in rows], model.wte.weight.device)  # (B, T) each
    if with_hits:
        losses, hits = token_scores(model, inputs, targets)
    else:
        losses, hits = model(inputs, targets, reduction="none"), torch.zeros_like(targets)
    scores = []
    for row, loss, hit in zip(rows, losses.double().sum(dim=1).tolist(), hits.sum(dim=1).tolist()):
        scored = row.targets[row.targets != IGNORED].tolist()
        n_bytes = 0 if tokenizer is None else count_bytes(tokenizer, scored)
        scores.append(Score(row.document, loss, len(scored), n_bytes, hit))
    return scores
