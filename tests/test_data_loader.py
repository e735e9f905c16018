"""The loader: an order that is a function of (seed, sample) alone, a cursor for state, a thread that reads ahead."""

import gc
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import IGNORED, Loader, eval_batches
from data.order import permute
from tests.token_sets import counting_records, counting_text

# ---- the cursor; what processes that come and go see is in test_training_elastic.py


def rows_of(batch):
    sums = torch.where(batch.targets == IGNORED, 0, batch.targets).sum(1)
    return list(zip(batch.samples, batch.inputs[:, 0].tolist(), sums.tolist()))


def test_the_state_is_what_was_consumed_not_what_was_prefetched(tmp_path):
    tokens = counting_text(tmp_path, 1000)
    options: dict[str, Any] = {"batch_size": 2, "block_size": 10, "seed": 0, "world_size": 2, "rank": 1}
    loader = Loader(tokens, **options)
    for _ in range(3):
        loader.next_batch()
    wait_until(lambda: prefetcher(loader)._ready.qsize() == 2)  # two more lie ready
    state = loader.state()
    assert state["sample"] == loader.sample == 12
    assert all(value is None or type(value) in (int, str, bool) for value in state.values())
    after = [loader.next_batch() for _ in range(4)]
    assert after[0].samples == [14, 15]
    loader.load_state(state)
    resumed = Loader(tokens, **options)
    resumed.load_state(state)
    for batch in after:
        for again in (loader.next_batch(), resumed.next_batch()):
            assert again.samples == batch.samples and torch.equal(again.inputs, batch.inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 5}, "block_size was 10 and is 5 now"),
        ({"seed": 1}, "seed was 0 and is 1 now"),
        ({"packing": False}, "packing was True and is False now"),
        ({"max_samples": 3}, "max_samples was None and is 3 now"),
    ],
)
def test_a_state_of_other_settings_is_refused_with_both_sides(tmp_path, change, message):
    tokens = counting_records(tmp_path, [7, 12, 3, 30, 9])
    options: dict[str, Any] = {"batch_size": 2, "block_size": 10, "seed": 0}
    state = Loader(tokens, **options).state()
    with pytest.raises(ValueError, match=message):
        Loader(tokens, **{**options, **change}).load_state(state)
    Loader(tokens, **{**options, "batch_size": 3, "world_size": 7, "rank": 6}).load_state(state)  # these may change


def test_a_state_of_other_data_is_refused(tmp_path):
    options: dict[str, Any] = {"batch_size": 2, "block_size": 10, "seed": 0}
    state = Loader(counting_text(tmp_path / "a", 100), **options).state()
    loader = Loader(counting_text(tmp_path / "b", 101), **options)
    with pytest.raises(ValueError, match=r"data was [0-9a-f]{64} and is [0-9a-f]{64} now"):
        loader.load_state(state)
    with pytest.raises(ValueError, match="has no sample, data"):
        loader.load_state({name: state[name] for name in state if name not in ("sample", "data")})
    for sample in (-1, "7", 1.5, None):
        with pytest.raises(ValueError, match="sample number from 0 up"):
            loader.load_state({**loader.state(), "sample": sample})


def test_seek_goes_anywhere_at_once(tmp_path):
    tokens = counting_text(tmp_path, 1001)
    loader = Loader(tokens, batch_size=2, block_size=10, seed=9)
    loader.next_batch()
    for sample in (0, 99, 100, 10**12 + 37, 10**30):
        loader.seek(sample)
        batch = loader.next_batch()
        assert batch.samples == [sample, sample + 1]
        for row, number in enumerate(batch.samples):
            window = int(permute(np.array([number % 100]), 100, 9, number // 100)[0])
            assert int(batch.inputs[row, 0]) == 10 * window


def test_a_set_smaller_than_a_batch_goes_on_in_the_next_epochs(tmp_path):
    loader = Loader(counting_text(tmp_path, 31), batch_size=10, block_size=10, seed=0)
    firsts = loader.next_batch().inputs[:, 0].tolist()
    assert [sorted(firsts[at : at + 3]) for at in (0, 3, 6)] == [[0, 10, 20]] * 3
    assert firsts[9] in (0, 10, 20)


# ---- prefetching


def prefetcher(loader):
    assert loader._prefetcher is not None
    return loader._prefetcher


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited for 20 seconds"
        time.sleep(0.002)


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for(tmp_path, monkeypatch):
    tokens = counting_text(tmp_path, 1000)
    loader = Loader(tokens, batch_size=2, block_size=10, seed=0, shuffle=False)
    loader.next_batch()
    loader.seek(6)
    with monkeypatch.context() as broken:
        broken.setattr(tokens, "tokens", lambda start, stop: (_ for _ in ()).throw(ValueError("the disk is gone")))
        with pytest.raises(ValueError, match="the disk is gone"):
            loader.next_batch()
        assert loader.sample == 6
    assert loader.next_batch().samples == [6, 7]  # mended: it goes on, nothing skipped


def test_the_thread_ends_with_close_and_with_the_loader(tmp_path):
    tokens = counting_text(tmp_path, 1000)
    loader = Loader(tokens, batch_size=2, block_size=10, seed=0)
    loader.next_batch()
    first = prefetcher(loader).thread
    loader.close()
    wait_until(lambda: not first.is_alive())
    assert loader.next_batch().samples == [2, 3]  # another thread, the same place
    second, alive = prefetcher(loader).thread, weakref.ref(loader)
    assert second.daemon
    del loader
    gc.collect()
    assert alive() is None
    wait_until(lambda: not second.is_alive())


def test_a_loader_whose_thread_is_gone_starts_another(tmp_path):
    """As in a process that was forked: what lay ready is used, the thread itself stayed behind."""
    loader = Loader(counting_text(tmp_path, 1000), batch_size=2, block_size=10, seed=0)
    loader.next_batch()
    prefetcher(loader).stop()
    wait_until(lambda: not prefetcher(loader).thread.is_alive())
    assert [loader.next_batch().samples[0] for _ in range(6)] == [2, 4, 6, 8, 10, 12]


def test_no_more_than_a_few_batches_are_made_ahead(tmp_path, monkeypatch):
    tokens = counting_text(tmp_path, 1000)
    reads = []
    original = tokens.tokens

    def counted(start, stop):
        reads.append(start)
        return original(start, stop)

    monkeypatch.setattr(tokens, "tokens", counted)
    loader = Loader(tokens, batch_size=1, block_size=10, seed=0)
    loader.next_batch()
    wait_until(lambda: prefetcher(loader)._ready.qsize() == 2)
    time.sleep(0.05)
    assert len(reads) == 3


# ---- evaluation


@settings(max_examples=60, deadline=None)
@given(
    batch_size=st.integers(1, 5),
    max_windows=st.one_of(st.none(), st.integers(1, 40)),
    world_size=st.integers(1, 5),
    kind=st.sampled_from(["text", "packed", "records"]),
)
def test_evaluation_sees_the_same_windows_on_any_number_of_processes(
    eval_sets, batch_size, max_windows, world_size, kind
):
    tokens = eval_sets[kind == "text"]

    def rows(rank: int, world_size: int, batch_size: int, limit: int | None) -> list:
        options: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "batch_size": batch_size,
            "packing": kind == "packed",
        }
        batches = list(eval_batches(tokens, block_size=16, max_windows=limit, **options))
        assert all(1 <= len(batch.samples) <= batch_size for batch in batches)
        return [row for batch in batches for row in rows_of(batch)]

    alone = rows(0, 1, 1, max_windows)
    shared = [row for rank in range(world_size) for row in rows(rank, world_size, batch_size, max_windows)]
    assert sorted(shared) == alone and len(alone) > 0
    windows, everything = [sample for sample, _, _ in alone], len(rows(0, 1, 1, None))
    assert len(windows) == len(set(windows)) == min(max_windows or everything, everything)
    gaps = np.diff([*windows, everything])
    assert windows[0] == 0 and gaps.max() - gaps.min() <= 1  # spread evenly


@pytest.fixture(scope="module")
def eval_sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    lengths = [7, 12, 3, 30, 9, 22, 5, 5, 16, 40, 8, 11, 6, 6, 6, 19]
    return counting_records(folder / "records", lengths), counting_text(folder / "text", 400)


# ---- settings, batches


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"block_size": 0}, "--block_size is 0"),
        ({"max_samples": 0}, "--max_samples is 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2 processes"),
        ({"rank": -1}, "rank -1"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, change, message):
    tokens = counting_text(tmp_path, 100)
    with pytest.raises(ValueError, match=message):
        Loader(tokens, **{"batch_size": 1, "block_size": 8, "seed": 0, **change})


def test_a_text_of_one_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 1 token, expected 2 at least"):
        Loader(counting_text(tmp_path, 1), batch_size=1, block_size=8, seed=0)


def test_batches_move_whole(tmp_path):
    loader = Loader(counting_records(tmp_path, [7, 12, 3]), batch_size=1, block_size=32, seed=0)
    batch = loader.next_batch()
    moved = batch.to("meta")
    assert moved.samples == batch.samples
    for name in ("inputs", "targets", "positions", "doc_ids"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(batch, name).dtype == torch.int64
    assert "3 records in 1 rows of 32" in loader.describe()
