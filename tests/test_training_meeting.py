"""Processes of one start find each other in a store that is full of what earlier starts left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from training.meeting import meet

WAIT = timedelta(seconds=20)


def start(store: dist.Store, delays: list[float]) -> list[str]:
    """What each rank calls the start, when it comes so many seconds after the first."""

    def come(rank: int) -> str:
        time.sleep(delays[rank])
        return meet(store, rank, len(delays), WAIT)

    with ThreadPoolExecutor(len(delays)) as pool:
        return list(pool.map(come, range(len(delays))))


def test_a_start_is_told_from_the_ones_before_it_whoever_is_early() -> None:
    store, seen = dist.HashStore(), set()
    for delays in ([0.0, 0.0, 0.0], [0.3, 0.0, 0.1], [0.0, 0.3, 0.0], [0.3, 0.0], [0.2, 0.0, 0.0, 0.1]):
        names = start(store, delays)
        assert len(set(names)) == 1, "two processes are in different starts"
        assert names[0] not in seen, "a process is in an earlier start"
        seen.add(names[0])


def test_a_start_that_broke_off_is_not_joined() -> None:
    """Its rank 0 waited for the others in vain."""
    store = dist.HashStore()
    with pytest.raises(dist.DistStoreError):
        meet(store, 0, 2, timedelta(milliseconds=50))
    assert len(set(start(store, [0.3, 0.0]))) == 1


def test_who_waits_in_vain_says_so() -> None:
    store = dist.HashStore()
    start(store, [0.0, 0.0])
    with pytest.raises(dist.DistStoreError, match="rank 0 did not come within 0 s"):
        meet(store, 1, 2, timedelta(seconds=0.3))


@pytest.mark.slow
def test_after_a_restart_by_torchrun_rank_0_may_come_late() -> None:
    """Without a prefix of their own the others meet the dead one's address, and one failure uses all restarts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "--max-restarts", "1", str(Path(__file__).with_name("late_rank_0.py"))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
