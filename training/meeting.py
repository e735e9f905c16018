"""A part of torchrun's store for the processes of one start alone.

torchrun (2.13) keeps one store over its restarts, and in it the addresses that dead processes left under the names that
their successors use. Who is early reads them, is refused a connection, fails, and has everything started again: two
machines whose imports took 10 to 15 seconds never met. So the processes agree on a new prefix first.
"""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_START = "espalier/start"  # what rank 0 calls the newest start
_POLL_S = (0.05, 1.0)  # first and longest wait between two looks


def own_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store that torchrun's environment names, under a prefix that no process of an earlier start knows.

    Raises torch.distributed.DistError where the others do not come within `timeout`.
    """
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    return dist.PrefixStore(meet(store, rank, world_size, timeout), store)


def meet(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name for this start, the same for all its processes, whatever earlier ones left in `store`.

    Rank 0 invents it and collects a number from each of the others; a process has arrived when it finds its own number
    in the collection. Under the name of an earlier start it finds none, or another's, and looks for a newer name.
    """
    mine = os.urandom(8).hex()
    if rank == 0:
        store.set(_START, mine)
        keys = [f"{mine}/{other}" for other in range(1, world_size)]
        store.wait(keys, timeout)
        store.set(f"{mine}/all", json.dumps([store.get(key).decode() for key in keys]))
        return mine
    store.wait([_START], timeout)
    until, pause = time.monotonic() + timeout.total_seconds(), _POLL_S[0]
    while time.monotonic() < until:
        start = store.get(_START).decode()
        store.set(f"{start}/{rank}", mine)
        if store.check([f"{start}/all"]) and mine in json.loads(store.get(f"{start}/all")):
            return start
        time.sleep(pause)
        pause = min(1.5 * pause, _POLL_S[1])
    raise dist.DistStoreError(f"rank 0 did not come within {timeout.total_seconds():.0f} s")
