"""Batches in an order that depends on nothing but (seed, sample number): not on processes, restarts or prefetching.

Sample g of a run is window permute(g % n) of epoch g // n, with n windows in the set. A micro-batch takes the next B
samples for each of W ranks: rank r has [cursor + r B, cursor + (r + 1) B), and the cursor moves on by B W. The cursor
is all the state there is, so a run may go on with another number of processes and still see every sample once.
"""

import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from data.answer_windows import PairWindows, PromptWindows
from data.order import permute
from data.shards import TokenSet
from data.windows import IGNORED, Part, Prompt, RecordWindows, Rows, TextWindows

__all__ = ["IGNORED", "Batch", "Loader", "Unit", "eval_batches"]

Unit = Literal["window", "pair", "prompt"]


class Windows(Protocol):
    """The samples of a set: how many there are, and the arrays of some of them."""

    count: int
    packing: bool
    noun: str  # what a part of a window is, in the user's words
    truncated: int
    dropped: int
    fill: float

    def rows(self, windows: Sequence[int]) -> Rows: ...

    def parts(self, window: int) -> list[Part]: ...

    def describe(self) -> str: ...


@dataclass
class Batch:
    """A micro-batch. `targets` holds -100 where a slot is not trained on.

    `positions` and `doc_ids` are there for packed rows only: positions begin again at 0 with every record, doc_ids
    number the records of a row from 0, and padding has doc id -1. A batch of pairs has two rows a sample, the chosen
    answer's first. A batch of prompts has the `prompts`, and arrays (B, 0).
    """

    inputs: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64
    positions: torch.Tensor | None  # (B, T) int64
    doc_ids: torch.Tensor | None  # (B, T) int64
    samples: list[int]  # (B,) global sample numbers
    prompts: list[Prompt] | None = None

    @property
    def supervised(self) -> int:
        """How many slots are trained on. Ask before `to`: on a GPU the answer would wait for it."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        inputs, targets = self.inputs.to(device, non_blocking=True), self.targets.to(device, non_blocking=True)
        return Batch(inputs, targets, move(self.positions), move(self.doc_ids), self.samples, self.prompts)


def _make_batch(cut: Windows, windows: Sequence[int], samples: Sequence[int]) -> Batch:
    rows = cut.rows(windows)
    positions = None if rows.positions is None else torch.from_numpy(rows.positions)
    doc_ids = None if rows.doc_ids is None else torch.from_numpy(rows.doc_ids)
    inputs, targets = torch.from_numpy(rows.inputs), torch.from_numpy(rows.targets)
    return Batch(inputs, targets, positions, doc_ids, list(samples), rows.prompts)


@dataclass(frozen=True)
class _Plan:
    """What makes a batch from sample numbers. Kept apart from the Loader, so that its thread does not keep it alive."""

    cut: Windows
    seed: int
    shuffle: bool

    def windows(self, first: int, count: int) -> list[int]:
        """The windows of samples [first, first + count); a small set may begin several epochs within them."""
        windows: list[int] = []
        sample = first
        while sample < first + count:
            epoch, place = divmod(sample, self.cut.count)
            places = np.arange(place, min(self.cut.count, place + first + count - sample))
            order = permute(places, self.cut.count, self.seed, epoch) if self.shuffle else places
            windows.extend(order.tolist())
            sample += len(places)
        return windows

    def batch(self, first: int, count: int) -> Batch:
        return _make_batch(self.cut, self.windows(first, count), range(first, first + count))


class _Prefetcher:
    """A thread that makes batches ahead: from sample `first` on, `count` samples each, `stride` samples apart.

    It makes what is asked for and ends at None. SimpleQueue because its `put` may run while any lock is held: `stop` is
    called by the garbage collector, which may interrupt any thread anywhere.
    """

    DEPTH = 2  # batches asked for ahead of the one in use

    def __init__(self, plan: _Plan, first: int, count: int, stride: int) -> None:
        self._requests: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._next, self._stride = first, stride
        for _ in range(self.DEPTH):
            self._request()
        arguments = (plan, count, self._requests, self._ready)
        self.thread = threading.Thread(target=self._work, args=arguments, name="prefetch", daemon=True)
        self.thread.start()

    @staticmethod
    def _work(
        plan: _Plan,
        count: int,
        requests: "queue.SimpleQueue[int | None]",
        ready: "queue.SimpleQueue[Batch | BaseException]",
    ) -> None:
        while (first := requests.get()) is not None:
            try:
                ready.put(plan.batch(first, count))
            except BaseException as error:  # raised again by take(), in the thread that wants the batch
                ready.put(error)

    def _request(self) -> None:
        self._requests.put(self._next)
        self._next += self._stride

    @property
    def is_spent(self) -> bool:
        """Nothing more will come: the thread stayed behind in the process that this one was forked from."""
        return self._ready.empty() and not self.thread.is_alive()

    def take(self) -> Batch:
        self._request()
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """Let the thread end once it has made what was asked for: two batches at most."""
        self._requests.put(None)


class Loader:
    """This rank's micro-batches of a token set, for ever, epoch after epoch.

    Args:
        tokens: what `open_dataset` gave.
        batch_size: samples of a micro-batch on one rank. block_size: slots of a row, tokens of a prompt.
        seed: of the order of windows, and of the packing.
        rank, world_size: this process and how many there are; they decide who gets which samples, never their order.
        shuffle: False goes through the windows as they stand in the set.
        packing: several records a row (instruction sets only).
        max_samples: use the first records (windows, for text) of the set only.
        unit: what a sample is: a window, a pair of answers, or a prompt; see `cut_windows`.

    `truncated` records are cut at block_size, `dropped` ones have nothing supervised and are left out, `fill` is the
    share of slots in use. Raises ValueError on settings that cannot work. `close` ends the prefetching thread.
    """

    def __init__(
        self,
        tokens: TokenSet,
        *,
        batch_size: int,
        block_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        packing: bool = True,
        max_samples: int | None = None,
        unit: Unit = "window",
    ) -> None:
        _check_shares(batch_size, rank, world_size)
        sizes: dict[str, Any] = {"block_size": block_size, "max_samples": max_samples}
        cut = cut_windows(tokens, unit, packing=packing, seed=seed, **sizes)
        self.tokens, self.batch_size, self.rank, self.world_size = tokens, batch_size, rank, world_size
        self.n_windows, self.truncated, self.dropped, self.fill = cut.count, cut.truncated, cut.dropped, cut.fill
        self._plan = _Plan(cut, seed, shuffle)
        self._identity = {  # what must be the same for a cursor to mean the same samples
            "seed": seed,
            "windows": cut.count,
            "block_size": block_size,
            "data": tokens.fingerprint,
            "packing": cut.packing,
            "max_samples": max_samples,
        }
        self._sample = 0
        self._prefetcher: _Prefetcher | None = None
        self._finalizer: weakref.finalize | None = None

    @property
    def sample(self) -> int:
        """The cursor: how many samples all ranks together have consumed."""
        return self._sample

    @property
    def windows_per_epoch(self) -> int:
        """Samples of one epoch: every window once."""
        return self.n_windows

    def next_batch(self) -> Batch:
        """This rank's next micro-batch. What fails in the prefetching thread is raised here; a new call tries again."""
        if self._prefetcher is None or self._prefetcher.is_spent:
            self._start()
        assert self._prefetcher is not None
        try:
            batch = self._prefetcher.take()
        except BaseException:
            self.close()
            raise
        assert batch.samples[0] == self._sample + self.rank * self.batch_size, "the queue is out of step"
        self._sample += self.batch_size * self.world_size
        return batch

    def seek(self, sample: int) -> None:
        """Go on from this global sample, at once however far it is."""
        if type(sample) is not int or sample < 0:
            raise ValueError(
                f"a place in the data is a sample number from 0 up, not {' '.join(repr(sample).split())[:80]}"
            )
        self.close()
        self._sample = sample

    def state(self) -> dict[str, Any]:
        """The cursor of what was consumed, with what it belongs to: plain numbers and text."""
        return {"sample": self._sample, **self._identity}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, on any number of ranks. ValueError if it belongs to other data or settings."""
        missing = [name for name in ("sample", *self._identity) if name not in state]
        if missing:
            raise ValueError(f"the saved loader state has no {', '.join(missing)}; is it one of this program's?")
        strange = [name for name in self._identity if not isinstance(state[name], (int, float, str, type(None)))]
        if strange:
            raise ValueError(f"the saved loader state is damaged: {strange[0]} is a {type(state[strange[0]]).__name__}")
        changed = [
            f"{name} was {' '.join(str(state[name]).split())[:80]} and is {now} now"
            for name, now in self._identity.items()
            if state[name] != now
        ]
        if changed:
            raise ValueError(
                f"{self.tokens.folder}: cannot go on from the saved place in the data: {'; '.join(changed)}; "
                "use the settings and data that the run began with, or start a new run"
            )
        self.seek(state["sample"])

    def close(self) -> None:
        """End the prefetching thread and forget what it made ahead. The next `next_batch` starts another."""
        if self._finalizer is not None:
            self._finalizer()
        self._prefetcher = self._finalizer = None

    def locate(self, samples: Sequence[int]) -> str:
        """Which windows, records or pairs of the set the samples of these global numbers are, and in which shards."""
        windows = [window for sample in samples for window in self._plan.windows(sample, 1)]
        parts = [part for window in windows for part in self._plan.cut.parts(window)]
        numbers = dict.fromkeys(part.number for part in parts)  # each once, in order
        files = dict.fromkeys(name for part in parts for name in self.tokens.files(part.start, part.stop))
        named = f"{_counted('sample', samples)}, {_counted(self._plan.cut.noun, list(numbers))}"
        return f"{named} of {_listed(list(files))}"

    def describe(self) -> str:
        """One line on what is trained on."""
        return f"{self.tokens.folder} ({self.tokens.split}): {self._plan.cut.describe()}"

    def _start(self) -> None:
        self.close()
        first = self._sample + self.rank * self.batch_size
        self._prefetcher = _Prefetcher(self._plan, first, self.batch_size, self.batch_size * self.world_size)
        self._finalizer = weakref.finalize(self, self._prefetcher.stop)


def eval_batches(
    tokens: TokenSet,
    *,
    batch_size: int,
    block_size: int,
    max_windows: int | None,
    rank: int,
    world_size: int,
    packing: bool = True,
    unit: Unit = "window",
) -> Iterator[Batch]:
    """This rank's share of a fixed evaluation: all windows, or `max_windows` spread evenly over the set, in order.

    The ranks' windows together are the same for every world size. The last batch may be smaller, and ranks may have
    different numbers of batches. `samples` holds the numbers of the windows. Raises ValueError on impossible settings.
    """
    _check_shares(batch_size, rank, world_size)
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"windows to evaluate: {max_windows}, expected at least 1")
    cut = cut_windows(tokens, unit, block_size=block_size, packing=packing, max_samples=None, seed=0)
    chosen = cut.count if max_windows is None else min(max_windows, cut.count)

    def batches() -> Iterator[Batch]:
        for first in range(rank * batch_size, chosen, batch_size * world_size):
            places = range(first, min(first + batch_size, chosen))
            windows = [place * cut.count // chosen for place in places]
            yield _make_batch(cut, windows, windows)

    return batches()


def cut_windows(
    tokens: TokenSet, unit: Unit, *, block_size: int, packing: bool, max_samples: int | None, seed: int
) -> Windows:
    """The samples of a token set.

    A window is a record of a set that has such, or a part of the stream of text (where packing means nothing). Pairs
    and prompts are rows of one sequence each.
    """
    if block_size < 1:
        raise ValueError(f"--block_size is {block_size}, expected at least 1 token")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"--max_samples is {max_samples}, expected at least 1")
    if unit == "pair":
        return PairWindows(tokens, block_size, max_samples)
    if unit == "prompt":
        return PromptWindows(tokens, block_size, max_samples)
    if tokens.meta["kind"] != "text":
        return RecordWindows(tokens, block_size, packing, max_samples, seed)
    return TextWindows(tokens, block_size, max_samples)


def _counted(noun: str, numbers: Sequence[int]) -> str:
    return f"{noun}{'s' if len(numbers) > 1 else ''} {_listed(numbers)}"


def _listed(values: Sequence[object], most: int = 8) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more


def _check_shares(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"--batch_size is {batch_size}, expected at least 1 row")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} processes: expected 0 to {world_size - 1}")
