"""Windows of text and rows of records: every token a target once an epoch, no record in two windows.

Token ids in these sets count up through the stream, so that a batch shows by its ids where it was cut from.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import IGNORED, Batch, Loader
from tests.token_sets import EOT, VOCABULARY, counting_records, counting_text, open_set

# ---- text


@settings(max_examples=40, deadline=None)
@given(
    n_tokens=st.integers(2, 250),
    block_size=st.integers(1, 50),
    shard_size=st.integers(5, 120),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_each_token_but_the_first_is_a_target_once_an_epoch(
    tmp_path_factory, n_tokens, block_size, shard_size, batch_size, seed
):
    tokens = counting_text(tmp_path_factory.mktemp("text"), n_tokens, shard_size)
    loader = Loader(tokens, batch_size=batch_size, block_size=block_size, seed=seed)
    assert loader.n_windows == loader.windows_per_epoch == -(-(n_tokens - 1) // block_size)
    seen: dict[int, list[int]] = {}  # epoch -> targets
    while len(seen) < 3:
        batch = loader.next_batch()
        assert batch.inputs.shape == batch.targets.shape == (batch_size, block_size)
        assert batch.positions is None and batch.doc_ids is None
        for row, sample in enumerate(batch.samples):
            used = batch.targets[row] != IGNORED
            assert (batch.inputs[row][used] + 1 == batch.targets[row][used]).all()
            assert (batch.inputs[row][~used] == EOT).all()
            seen.setdefault(sample // loader.n_windows, []).extend(batch.targets[row][used].tolist())
    loader.close()
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(1, n_tokens))


def test_a_mask_over_text_is_kept_out_of_the_targets(tmp_path):
    mask = np.arange(100) % 3 == 0
    loader = Loader(counting_text(tmp_path, 100, mask=mask), batch_size=4, block_size=30, seed=0, shuffle=False)
    batch = loader.next_batch()
    targets = batch.targets[batch.targets != IGNORED]
    assert targets.tolist() == [token for token in range(1, 100) if token % 3 == 0]
    assert batch.supervised == len(targets)
    assert batch.inputs[3, :9].tolist() == list(range(90, 99))  # masked tokens are still inputs


def test_unshuffled_windows_come_as_they_stand(tmp_path):
    loader = Loader(counting_text(tmp_path, 41), batch_size=3, block_size=10, seed=0, shuffle=False)
    firsts = [loader.next_batch().inputs[:, 0].tolist() for _ in range(3)]
    assert firsts == [[0, 10, 20], [30, 0, 10], [20, 30, 0]]


def test_each_seed_and_each_epoch_has_its_own_order(tmp_path):
    tokens = counting_text(tmp_path, 1001)
    orders = []
    for seed in (0, 1):
        loader = Loader(tokens, batch_size=100, block_size=10, seed=seed)
        orders += [tuple(loader.next_batch().inputs[:, 0].tolist()) for _ in range(2)]
        loader.close()
    assert len(set(orders)) == 4 and len({tuple(sorted(order)) for order in orders}) == 1


# ---- records


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    block_size=st.integers(1, 64),
    packing=st.booleans(),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_each_record_comes_once_an_epoch_whole_or_cut(tmp_path_factory, lengths, block_size, packing, batch_size, seed):
    masks = [(np.arange(length) >= length // 3).astype(np.uint8) for length in lengths]
    masks[0][:] = 0  # nothing to learn here
    starts = np.cumsum([0, *lengths])
    expected = {}  # first id -> (inputs, targets)
    truncated = 0
    for start, length, mask in zip(starts.tolist(), lengths, masks):
        slots = min(length - 1, block_size)
        ids = np.arange(start, start + slots)
        targets = np.where(mask[1 : slots + 1] == 1, ids + 1, IGNORED)
        if (targets != IGNORED).any():
            expected[start] = (ids.tolist(), targets.tolist())
            truncated += length - 1 > block_size
    tokens = counting_records(tmp_path_factory.mktemp("records"), lengths, shard_size=37, mask=masks)
    if not expected:
        with pytest.raises(ValueError, match="use a longer one"):
            Loader(tokens, batch_size=batch_size, block_size=block_size, seed=seed, packing=packing)
        return
    loader = Loader(tokens, batch_size=batch_size, block_size=block_size, seed=seed, packing=packing)
    assert (loader.truncated, loader.dropped) == (truncated, len(lengths) - len(expected))
    epochs: dict[int, list] = {0: [], 1: []}
    while loader.sample < 2 * loader.n_windows:
        batch = loader.next_batch()
        for row, sample in enumerate(batch.samples):
            epochs.setdefault(sample // loader.n_windows, []).extend(records_of(batch, row, packing, expected))
    loader.close()
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(expected.values())


def records_of(batch: Batch, row: int, packing: bool, expected: dict) -> list[tuple[list[int], list[int]]]:
    """The (inputs, targets) of each record in a row, once padding and positions have been checked."""
    inputs, targets = batch.inputs[row], batch.targets[row]
    if not packing:
        assert batch.positions is None and batch.doc_ids is None
        used = len(expected[int(inputs[0])][0])
        assert (inputs[used:] == EOT).all() and (targets[used:] == IGNORED).all()
        return [(inputs[:used].tolist(), targets[:used].tolist())]
    assert batch.positions is not None and batch.doc_ids is not None
    positions, doc_ids = batch.positions[row], batch.doc_ids[row]
    used = int((doc_ids >= 0).sum())
    assert (inputs[used:] == EOT).all() and (targets[used:] == IGNORED).all()
    assert (positions[used:] == 0).all() and (doc_ids[used:] == -1).all()
    found = []
    for number in range(int(doc_ids.max()) + 1):
        slots = torch.nonzero(doc_ids == number).flatten()
        assert slots.tolist() == list(range(int(slots[0]), int(slots[0]) + len(slots)))
        assert positions[slots].tolist() == list(range(len(slots)))
        found.append((inputs[slots].tolist(), targets[slots].tolist()))
    return found


def test_rows_that_are_not_packed_are_as_wide_as_their_longest_record_needs(tmp_path):
    tokens = counting_records(tmp_path, [5, 5, 12, 5, 30, 5])
    options: dict[str, Any] = {"batch_size": 2, "seed": 0, "shuffle": False, "packing": False}
    loader = Loader(tokens, block_size=64, **options)
    assert [loader.next_batch().inputs.shape[1] for _ in range(3)] == [8, 16, 32]  # multiples of 8
    loader = Loader(tokens, block_size=20, **options)
    assert [loader.next_batch().inputs.shape[1] for _ in range(3)] == [8, 16, 20]  # never beyond the context


def test_max_samples_takes_the_first_records_of_the_set(tmp_path):
    lengths = [10] * 20
    loader = Loader(
        counting_records(tmp_path / "i", lengths), batch_size=7, block_size=50, seed=0, packing=False, max_samples=7
    )
    assert sorted(loader.next_batch().inputs[:, 0].tolist()) == [0, 10, 20, 30, 40, 50, 60]
    text = Loader(counting_text(tmp_path / "t", 200), batch_size=4, block_size=10, seed=0, max_samples=4)
    assert sorted(text.next_batch().inputs[:, 0].tolist()) == [0, 10, 20, 30]


def test_records_without_a_mask_count_everywhere(tmp_path):
    tokens = open_set(tmp_path, [np.arange(5), np.arange(5, 9)], vocab_size=VOCABULARY, kind="instruction")
    loader = Loader(tokens, batch_size=1, block_size=8, seed=0)
    assert loader.next_batch().supervised == 4 + 3 and loader.dropped == 0
