"""Text from a model: reading prompts with a key/value cache, then choosing one token after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.cache import KVCache
from model.gpt import GPT


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen; `generate` and `stream` take these as keyword arguments. ValueError if out of range."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 = greedy: the likeliest token, nothing is drawn
    top_k: int = 0  # only the k likeliest tokens; 0 = all
    top_p: float = 1.0  # of those, the likeliest that together reach this probability; at least one
    repetition_penalty: float = 1.0  # above 1: tokens already in the row become less likely (CTRL, Keskar et al. 2019)
    seed: int | Sequence[int] = 0  # one for all rows, or one each
    stop_ids: Sequence[int] = ()  # a row ends before any of these
    keep_stop: bool = False  # a row ends after the stop id, which is then its last
    use_cache: bool = True  # False: read the whole context again for each token; the same text, slower

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 0, "0 or more"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0.0 <= self.top_p <= 1.0, "a probability, 0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0.0, "a number above 0 (1 = off)"),
        ):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give {wanted}")


def generate(
    model: GPT, prompts: Sequence[Sequence[int]], *, on_token: Callable[[int, int], None] | None = None, **options: Any
) -> list[list[int]]:
    """The new ids of each prompt, without the stop id unless `keep_stop`; `options` are Decoding's fields.

    `on_token(row, id)` is called for each id as it is chosen. A row's ids depend on the seed and its own prompt only,
    not on the other rows (up to rounding): vary the seed to draw from the same prompt again. Beyond the model's context
    the oldest tokens are dropped, see `window_start`. ValueError for an empty prompt or an id that does not exist.
    """
    new: list[list[int]] = [[] for _ in prompts]
    for row, token in _pairs(model, _checked(model, prompts), Decoding(**options)):
        new[row].append(token)
        if on_token is not None:
            on_token(row, token)
    return new


def stream(model: GPT, prompt: Sequence[int], **options: Any) -> Iterator[int]:
    """The new ids of one prompt, each as soon as it is chosen; arguments and errors as in `generate`."""
    pairs = _pairs(model, _checked(model, [prompt]), Decoding(**options))
    return (token for _, token in pairs)


def window_start(length: int, block_size: int) -> int:
    """Where the context of a row of `length` tokens begins: its whole past while that fits in block_size.

    After that the window moves on by half a context at a time, not by one: each move changes every position, so the
    cache of that row has to be filled again. The rule knows nothing but the length, so text is the same with no cache.
    """
    stride = max(1, block_size // 2)
    return -(-max(0, length - block_size) // stride) * stride


@dataclass
class _Row:
    index: int  # which prompt
    ids: list[int]  # prompt and what was generated
    draws: torch.Generator
    start: int = field(default=-1)  # where the cached context begins in ids; -1 = nothing is cached


def _checked(model: GPT, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) == 0:
            raise ValueError(f"prompt {number} is empty: give at least one token, such as the end-of-text id")
        wrong = next((token for token in prompt if not 0 <= token < model.config.vocab_size), None)
        if wrong is not None:
            raise ValueError(
                f"prompt {number} holds id {wrong}, but the model's ids end at {model.config.vocab_size - 1}"
            )
    return [list(prompt) for prompt in prompts]


def _row_generator(seed: int, prompt: list[int]) -> torch.Generator:
    """A source of random numbers that belongs to (seed, prompt), on the CPU whatever the model's device."""
    digest = hashlib.blake2b(f"{seed}:{prompt}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _pairs(model: GPT, prompts: list[list[int]], how: Decoding) -> Iterator[tuple[int, int]]:
    """(row, id) in the order of choice. The model is in evaluation mode meanwhile (no dropout)."""
    seeds = [how.seed] * len(prompts) if isinstance(how.seed, int) else how.seed
    assert len(seeds) == len(prompts), f"{len(seeds)} seeds for {len(prompts)} prompts"
    rows = [_Row(i, prompt, _row_generator(seeds[i], prompt)) for i, prompt in enumerate(prompts)]
    reader = _Reader(model, how)
    was_training = model.training
    model.eval()
    try:
        for _ in range(how.max_new_tokens):
            if not rows:
                return
            alive = []
            for place, (row, token) in enumerate(zip(rows, reader.next_ids(rows))):
                if token not in how.stop_ids:
                    row.ids.append(token)
                    alive.append(place)
                if token not in how.stop_ids or how.keep_stop:
                    yield row.index, token
            if len(alive) < len(rows):
                rows = [rows[place] for place in alive]
                reader.keep(alive)
    finally:
        model.train(was_training)


class _Reader:
    """Runs the model over the rows' contexts.

    It calls `model.forward`, not the model itself, which `model.compile()` replaces: each new length would be compiled.
    """

    def __init__(self, model: GPT, how: Decoding) -> None:
        self.model, self.how = model, how
        self.block_size = model.context_length
        self.device = model.wte.weight.device
        self.cache: KVCache | None = None

    @torch.inference_mode()
    def next_ids(self, rows: list[_Row]) -> list[int]:
        """One token for each row."""
        logits = self._cached_logits(rows) if self.how.use_cache else self._read(rows)
        return choose(logits[:, 0, : self.model.config.vocab_size], rows, self.how)

    @torch.inference_mode()
    def keep(self, places: list[int]) -> None:
        """Only these of the rows go on."""
        if self.cache is not None and places:
            self.cache.keep(places)

    def _cached_logits(self, rows: list[_Row]) -> Tensor:
        """Logits (R, 1, V) after each row. Rows whose window moved, at first all, are read from its new start."""
        moved = [place for place, row in enumerate(rows) if row.start != window_start(len(row.ids), self.block_size)]
        for place in moved:
            rows[place].start = window_start(len(rows[place].ids), self.block_size)
        if len(moved) == len(rows):
            longest = max(len(row.ids) for row in rows) + self.how.max_new_tokens
            self.cache = KVCache(len(rows), min(self.block_size, longest))
            return self._read(rows, self.cache)
        assert self.cache is not None
        if moved:  # all but their last token, which joins the common step below
            self._refill(moved, [rows[place] for place in moved])
        last = torch.tensor([[row.ids[-1]] for row in rows], device=self.device)  # (R, 1)
        return self.model.forward(last, cache=self.cache)

    def _refill(self, places: list[int], rows: list[_Row]) -> None:
        """Reads these rows anew but for their last token. A window that has just moved is equally long in every row."""
        assert self.cache is not None
        contexts = torch.tensor([row.ids[row.start : -1] for row in rows], device=self.device)  # (R, T)
        fresh = KVCache(*contexts.shape)
        if fresh.max_length > 0:
            self.model.forward(contexts, cache=fresh, logits_for="last")
        self.cache.put(places, fresh)

    def _read(self, rows: list[_Row], cache: KVCache | None = None) -> Tensor:
        """Logits (R, 1, V) after each row, reading its whole window."""
        contexts = [row.ids[window_start(len(row.ids), self.block_size) :] for row in rows]
        lengths = [len(context) for context in contexts]
        last = torch.tensor(lengths, device=self.device) - 1
        logits = self.model.forward(self._padded(contexts), cache=cache, logits_for=last)
        if cache is not None:
            cache.set_lengths(lengths)
        return logits

    def _padded(self, contexts: list[list[int]]) -> Tensor:
        """(R, T), filled up on the right, where causal attention keeps the filling out of sight."""
        longest = max(len(context) for context in contexts)
        return torch.tensor([context + [0] * (longest - len(context)) for context in contexts], device=self.device)


def choose(logits: Tensor, rows: Sequence[_Row], how: Decoding) -> list[int]:
    """One id per row from logits (R, vocab_size). ValueError if they are not finite."""
    logits = logits.float()
    if not torch.isfinite(logits).all():
        raise ValueError("the model's logits are not finite: its weights have diverged, take an earlier checkpoint")
    if how.repetition_penalty != 1.0:
        logits = _penalise(logits, [row.ids for row in rows], how.repetition_penalty)
    if how.temperature == 0.0:
        return logits.argmax(dim=-1).tolist()
    uniform = torch.cat([torch.rand(1, generator=row.draws) for row in rows])
    return draw(candidates(logits, how), uniform.to(logits.device)).tolist()


def _penalise(logits: Tensor, seen: list[list[int]], penalty: float) -> Tensor:
    """CTRL's penalty: the logit of an id already in the row is divided by it if positive, multiplied if negative."""
    logits = logits.clone()
    for row, ids in zip(logits, seen):
        index = torch.tensor(sorted(set(ids)), device=logits.device)
        row[index] = torch.where(row[index] > 0, row[index] / penalty, row[index] * penalty)
    return logits


def candidates(logits: Tensor, how: Decoding) -> tuple[Tensor, Tensor | None]:
    """Probabilities (R, n) after temperature, top-k and top-p, in this order, and the ids that they belong to.

    They sum to less than 1 after top-p. Ids are None where the n columns are simply 0..n-1.
    """
    n = logits.size(-1)
    ids: Tensor | None = None
    if 0 < how.top_k < n:
        logits, ids = logits.topk(how.top_k, dim=-1)
    elif how.top_p < 1.0:
        logits, ids = logits.sort(dim=-1, descending=True)
    # Subtracting first keeps the division finite for any temperature.
    logits = (logits.double() - logits.amax(dim=-1, keepdim=True).double()) / how.temperature
    probabilities = logits.softmax(dim=-1)
    if how.top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities
        outside = before >= how.top_p
        outside[:, 0] = False
        probabilities = probabilities.masked_fill(outside, 0.0)
    return probabilities, ids


def draw(weighted: tuple[Tensor, Tensor | None], uniform: Tensor) -> Tensor:
    """The ids (R,) at which the cumulated probabilities pass the numbers `uniform` (R,) in [0, 1).

    One number per row and token: a row's draws then do not depend on the size of the batch or the vocabulary.
    """
    probabilities, ids = weighted
    cumulated = probabilities.cumsum(dim=-1)
    target = uniform.double().unsqueeze(1) * cumulated[:, -1:]
    # right=True: the first column whose sum is greater, so that one of probability 0 is never taken.
    place = torch.searchsorted(cumulated, target, right=True).clamp(max=cumulated.size(1) - 1)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)
