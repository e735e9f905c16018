"""The processes that share an evaluation: each takes some of the batches, all learn every result."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Processes(Protocol):
    """Who this process is among all; `training.distributed.Dist` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Each process's bytes in order of rank, on every process."""


class _Alone:
    """One process."""

    rank, world_size = 0, 1

    def gather_bytes(self, data: bytes) -> list[bytes]:
        return [data]


ALONE: Processes = _Alone()


def share(items: Iterable[T], processes: Processes) -> Iterator[tuple[int, T]]:
    """This process's items with their numbers: every world_size-th."""
    return ((number, item) for number, item in enumerate(items) if number % processes.world_size == processes.rank)


def gather(found: dict[int, Any], processes: Processes) -> list[Any]:
    """What all processes found, in the order of its numbers: JSON values, the same list on every process.

    Sums over it are made in one order, so that they are equal to the last bit however many processes there are.
    """
    if processes.world_size == 1:
        return [found[number] for number in sorted(found)]
    parts = processes.gather_bytes(json.dumps(list(found.items())).encode())
    everything = dict(pair for part in parts for pair in json.loads(part))
    return [everything[number] for number in sorted(everything)]


def map_batches(
    items: Sequence[T],
    work: Callable[[list[T]], list[R]],
    *,
    batch_size: int,
    length: Callable[[T], int],
    progress: Callable[[int], object],
    processes: Processes,
) -> list[R]:
    """What `work` makes of each item, JSON values in the order of the items; it gets `batch_size` of them at a time.

    Items of like length share a batch, so that little of it is padding, and the longest go first: memory runs out at
    once or never. Neighbours of one length stay neighbours. `progress` is told how many items each batch had.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    order = sorted(range(len(items)), key=lambda place: -length(items[place]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found: dict[int, list[R]] = {}
    for number, batch in share(batches, processes):
        found[number] = work([items[place] for place in batch])
        progress(len(batch))
    results = dict(zip(order, itertools.chain.from_iterable(gather(found, processes))))
    return [results[place] for place in range(len(items))]
