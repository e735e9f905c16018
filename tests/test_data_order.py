"""The order of an epoch and the packing of records: pure functions, so their laws are tested directly."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import permute
from data.packing import pack


def test_every_small_permutation_is_a_bijection():
    for n in range(1, 301):
        assert sorted(permute(np.arange(n), n, seed=n, epoch=n % 7).tolist()) == list(range(n))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 2**61), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**70), start=st.floats(0, 1))
def test_large_permutations_stay_inside_and_never_meet(n, seed, epoch, start):
    first = int(start * max(0, n - 500))
    indices = np.arange(first, min(n, first + 500))
    values = permute(indices, n, seed, epoch)
    assert values.min() >= 0 and values.max() < n and len(np.unique(values)) == len(indices)
    assert permute(indices[-1:], n, seed, epoch).tolist() == values[-1:].tolist()  # each on its own


def test_the_order_is_pinned():
    """Runs resume by it: it must not change with NumPy or with this code."""
    assert permute(np.arange(10), 10, seed=1337, epoch=0).tolist() == [8, 9, 2, 4, 1, 5, 0, 7, 6, 3]
    assert permute(np.arange(5), 10**12, seed=1337, epoch=3).tolist() == [
        834526850535,
        190416815475,
        555380631064,
        804697193800,
        45985053232,
    ]


def test_orders_look_random():
    n = 10_000
    orders = [permute(np.arange(n), n, seed, epoch) for seed in range(4) for epoch in range(4)]
    for order in orders:
        assert abs(np.abs(order - np.arange(n)).mean() / (n / 3) - 1) < 0.03  # uniform pairs are n/3 apart
        assert (order == np.arange(n)).sum() <= 8  # fixed points: one is expected
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
        assert (np.diff(order) == 1).sum() <= 8  # neighbours kept: one is expected
    for other in orders[1:]:
        assert (orders[0] == other).sum() <= 8  # two orders agree in one place


def test_small_sets_meet_every_order_about_equally():
    counts: dict[tuple, int] = {}
    for seed in range(1200):
        order = tuple(permute(np.arange(4), 4, seed, epoch=0).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 50) ** 2 / 50 for count in counts.values()) < 50  # chi-square, 23 degrees: p = 0.001


# ---- packing


def dolly_like(n_records=15_000):
    """Log-normal lengths as of short instructions: median 114, mean 166, 5% above 466, from 20 to above 3,000."""
    rng = np.random.default_rng(0)
    return np.clip(rng.lognormal(4.75, 0.85, n_records).astype(np.int64), 20, 30_000)


@pytest.mark.parametrize("block_size", [256, 512, 1024, 2048])
def test_packed_rows_of_dolly_like_records_are_nearly_full(block_size):
    sizes = np.minimum(dolly_like() - 1, block_size)
    records, row_starts = pack(sizes, block_size, seed=0)
    assert sorted(records.tolist()) == list(range(len(sizes)))
    filled = np.add.reduceat(sizes[records], row_starts[:-1])
    assert filled.max() <= block_size
    assert 1 - sizes.sum() / (block_size * len(filled)) < 0.03  # 0.3% at most when this was written


@settings(max_examples=100, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_packing_is_best_fit_decreasing(data, capacity, seed):
    sizes = np.array(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60)))
    records, row_starts = pack(sizes, capacity, seed)
    assert sorted(records.tolist()) == list(range(len(sizes)))
    rows = [records[a:b] for a, b in itertools.pairwise(row_starts)]
    rooms: list[int] = []  # the definition, by looking at every row
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - size)
    assert sorted(capacity - int(sizes[row].sum()) for row in rows) == sorted(rooms)


def test_packing_depends_on_lengths_and_seed_alone():
    sizes = np.minimum(dolly_like(500), 256)
    first, again, other = (pack(sizes, 256, seed)[0].tolist() for seed in (1, 1, 2))
    assert first == again != other
