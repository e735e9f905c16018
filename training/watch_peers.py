"""A run among others: a process that is gone is named in one line, and no wait for it is without an end."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from training.distributed import Dist
from training.peers import ANSWER_S, Member, Peers, PeersLost, Store

T = TypeVar("T")


@contextmanager
def watched_peers(here: Dist, timeout_s: float, last_words: Callable[[str], str]) -> Iterator[None]:
    """While it lasts, this process beats and hears the others; see peers.py.

    Raises PeersLost in place of what an exchange raises that failed because another process is gone. Where the main
    thread does not come to raise anything, the process prints the same line on stderr and ends with exit code 1.
    last_words: adds to the reason what a user must know, and may note it down. Does nothing for one process.
    """
    if here.world_size == 1:
        yield
        return
    try:
        peers = _peers(here, timeout_s, last_words)
    except RuntimeError as error:
        if is_failed_exchange(error):
            raise PeersLost(last_words(f"a process was gone before they knew each other ({error})")) from error
        raise
    try:
        yield
    except RuntimeError as error:
        if not is_failed_exchange(error):
            peers.leave(error)
            raise
        lost = _undisturbed(peers.explain)
        peers.leave()  # as one who is not to blame
        _abort(here)
        raise lost from error
    except BaseException as error:
        peers.leave(error)
        raise
    else:
        peers.leave()


def is_failed_exchange(error: RuntimeError) -> bool:
    """Whether processes failed to exchange data. NCCL and the store have types for it, gloo names its source file."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _peers(here: Dist, timeout_s: float, last_words: Callable[[str], str]) -> Peers:
    """Every process makes itself known and learns of the others; from then on each exchange may take `timeout_s`."""
    members = [Member(**each) for each in here.gather(asdict(Member.this(here.rank)))]
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    run = here.from_main(lambda: os.urandom(8).hex())  # torchrun's store outlives a run

    def connect() -> Store:
        wait = timedelta(seconds=ANSWER_S)
        return dist.PrefixStore(run, dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=wait))

    def connect_in_time() -> Store:
        # The store of a process that is stopped accepts a connection, and TCPStore() waits for its answer for ever.
        return in_time(connect, ANSWER_S)

    agent = f"{address[0]}:{address[1]}" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
    peers = Peers(members, here.rank, connect_in_time, agent, timeout_s, last_words)
    peers.beat()
    here.barrier()
    for group in {here.control, dist.group.WORLD}:
        assert group is not None
        group.set_timeout(timedelta(seconds=timeout_s))
    peers.start()
    return peers


def in_time(work: Callable[[], T], seconds: float) -> T:
    """What `work` gives. Raises RuntimeError where it takes longer; it is left behind in its thread then."""
    results: queue.SimpleQueue[T | RuntimeError] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            results.put(work())
        except RuntimeError as error:
            results.put(error)

    threading.Thread(target=attempt, name="in time", daemon=True).start()
    try:
        result = results.get(timeout=seconds)
    except queue.Empty:
        raise RuntimeError(f"no answer in {seconds:g} s") from None
    if isinstance(result, RuntimeError):
        raise result
    return result


def _undisturbed(work: Callable[[], T]) -> T:
    """What `work` gives, whatever SIGTERM comes: torchrun sends one to all as soon as one process is gone."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        return work()
    finally:
        signal.signal(signal.SIGTERM, previous)


def _abort(here: Dist) -> None:
    """NCCL: end what waits on the GPU for a process that is gone, so that this one can leave."""
    if here.device.type == "cuda" and dist.group.WORLD is not None:
        with suppress(RuntimeError):
            torch.distributed.distributed_c10d._abort_process_group()
