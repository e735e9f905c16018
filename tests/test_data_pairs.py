"""Pairs and prompts as samples: the same for any number of processes, cut in front, never in an answer."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.answer_windows
from data.answer_windows import PairWindows, PromptWindows
from data.loader import IGNORED, Loader, eval_batches
from tests.token_sets import open_set

VOCABULARY = 70_000


def pair_set(folder, pairs, shard_size=1000):
    """Pairs of (prompt, chosen, rejected) lengths; ids count up, but both sides begin alike."""
    documents, masks, next_id = [], [], 0
    for prompt, chosen, rejected in pairs:
        begin = np.arange(next_id, next_id + prompt)
        for answer in (chosen, rejected):
            next_id = max(next_id, int(begin[-1]) + 1 if prompt else 0)
            documents.append(np.concatenate([begin, np.arange(next_id, next_id + answer)]))
            masks.append(np.array([0] * prompt + [1] * answer, dtype=np.uint8))
            next_id += answer
    return open_set(folder, documents, masks=masks, shard_size=shard_size, vocab_size=VOCABULARY, kind="preference")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    pairs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    block_size=st.integers(3, 20),
    shard_size=st.sampled_from([5, 1000]),
)
def test_a_pair_is_two_rows_whose_prompt_is_cut_alike_and_whose_answers_are_whole(
    tmp_path_factory, pairs, block_size, shard_size
):
    tokens = pair_set(tmp_path_factory.mktemp("pairs") / "set", pairs, shard_size)
    fits = [max(chosen, rejected) <= block_size for _, chosen, rejected in pairs]
    if not any(fits):
        with pytest.raises(ValueError, match="no answer of its"):
            PairWindows(tokens, block_size, None)
        return
    cut = PairWindows(tokens, block_size, None)
    assert cut.count == sum(fits) and cut.dropped == len(pairs) - sum(fits)
    kept = [pair for pair, fit in zip(pairs, fits) if fit]
    assert cut.truncated == sum(prompt + max(both) - 1 > block_size for prompt, *both in kept)
    rows = cut.rows(range(cut.count))
    assert rows.inputs.shape == rows.targets.shape == (2 * cut.count, rows.inputs.shape[1])
    assert rows.inputs.shape[1] <= block_size
    for number, (prompt, *answers) in enumerate(kept):
        left = min(prompt, block_size + 1 - max(answers))
        both = rows.inputs[2 * number : 2 * number + 2]
        assert (both[0, :left] == both[1, :left]).all(), "the two sides answer different prompts"
        for side, answer in enumerate(answers):
            targets = rows.targets[2 * number + side]
            places = np.flatnonzero(targets != IGNORED)
            assert places.tolist() == list(range(left - 1, left - 1 + answer)), "an answer was cut"
            assert (targets[places[:-1]] == both[side, places[1:]]).all()


def test_prompt_lengths_do_not_depend_on_the_block_of_the_mask(tmp_path, monkeypatch):
    tokens = pair_set(tmp_path, [(4, 3, 2), (1, 1, 5), (7, 2, 2)])
    whole = data.answer_windows.prompt_lengths(tokens, tokens.document_starts)
    assert whole.tolist() == [4, 4, 1, 1, 7, 7]
    for block in (1, 8, 20):
        monkeypatch.setattr(data.answer_windows, "_BLOCK", block)
        assert data.answer_windows.prompt_lengths(tokens, tokens.document_starts).tolist() == whole.tolist()


@pytest.mark.parametrize("unit", ["pair", "prompt"])
def test_any_number_of_processes_sees_the_samples_of_one(tmp_path, unit):
    tokens = pair_set(tmp_path, [(2 + i % 3, 1 + i % 5, 2 + i % 7) for i in range(23)])
    options: dict[str, Any] = {"block_size": 16, "seed": 5, "unit": unit}

    def seen(batch):
        each = len(batch.inputs) // len(batch.samples)
        rows = [[token for token in row if token != VOCABULARY - 1] for row in batch.inputs.tolist()]
        sides = [rows[at * each : (at + 1) * each] for at in range(len(batch.samples))]
        return list(zip(batch.samples, sides, batch.prompts or sides))

    alone = Loader(tokens, batch_size=1, **options)
    expected = [each for _ in range(80) for each in seen(alone.next_batch())]
    assert len({str(each[1:]) for each in expected}) == tokens.n_documents // (2 if unit == "pair" else 1)
    chance = random.Random(3)
    for _ in range(20):
        state, got, batch_size = None, [], chance.randint(1, 3)
        for _ in range(2):
            world = chance.randint(1, 3)
            loaders = [Loader(tokens, batch_size=batch_size, rank=r, world_size=world, **options) for r in range(world)]
            for loader in loaders:
                if state is not None:
                    loader.load_state(state)
            for _ in range(chance.randint(1, 4)):
                got += [each for loader in loaders for each in seen(loader.next_batch())]
            state = loaders[0].state()
        assert got == expected[: len(got)]
    chosen = list(eval_batches(tokens, batch_size=4, block_size=16, max_windows=9, rank=0, world_size=1, unit=unit))
    assert sum(len(batch.samples) for batch in chosen) == 9


def test_prompts_are_what_comes_before_the_answer_and_lose_their_beginning(tmp_path):
    documents = [np.arange(10), np.arange(20, 25), np.arange(30, 33), np.arange(40, 42)]
    masks = [[0] * 6 + [1] * 3 + [0], [0] * 5, [1] * 3, [0, 1]]
    tokens = open_set(tmp_path, documents, masks=[np.array(m, np.uint8) for m in masks], kind="instruction")
    cut = PromptWindows(tokens, 4, None)
    assert (cut.count, cut.truncated, cut.dropped) == (3, 2, 1)
    rows = cut.rows([0, 1, 2])
    assert rows.inputs.shape == (3, 0)
    assert rows.prompts == [([2, 3, 4, 5], [6, 7, 8]), ([21, 22, 23, 24], []), ([40], [41])]
    assert PromptWindows(tokens, 9, 2).rows([0]).prompts == [([0, 1, 2, 3, 4, 5], [6, 7, 8])]


def test_pairs_that_are_none_are_refused_with_the_remedy(tmp_path):
    equal = [np.array([1, 2, 3])] * 2
    mask = [np.array([0, 1, 1], np.uint8)] * 2
    tokens = open_set(tmp_path / "equal", equal, masks=mask, kind="preference")
    with pytest.raises(ValueError, match=r"pair 0 of split train has the same answer on both sides.*leave it out"):
        PairWindows(tokens, 8, None)
    supervised = [np.ones(3, np.uint8)] * 2
    tokens = open_set(tmp_path / "bare", [np.arange(3), np.arange(1, 4)], masks=supervised, kind="preference")
    with pytest.raises(ValueError, match="no answer of its 1 pairs fits --block_size 8"):
        PairWindows(tokens, 8, None)
    with pytest.raises(ValueError, match="holds no prompt"):
        PromptWindows(tokens, 8, None)
