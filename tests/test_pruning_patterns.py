"""Patterns as properties: how many go, from where, the lowest first, and what was zero stays so."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.pruning.patterns import block_mask, parse_pattern, prune_matrix, prune_n_of_m, prune_rows

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(0, 999)
SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 24))
SHARES = st.floats(0, 1)


def scores_of(shape, seed, ties=False):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(4, shape, generator=g).float() if ties else torch.rand(shape, generator=g)


def some_zeros(shape, seed, share=0.3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) >= share


@QUICK
@given(shape=SHAPES, seed=SEEDS, share=SHARES, ties=st.booleans())
def test_rows_lose_equally_many_and_each_its_lowest(shape, seed, share, ties):
    scores = scores_of(shape, seed, ties)
    removed = round(share * scores.numel())
    keep = prune_rows(scores, removed)
    lost = (~keep).sum(dim=1)
    assert int(lost.sum()) == removed and int(lost.max() - lost.min()) <= 1
    for row, kept in zip(scores, keep):
        if kept.any() and not kept.all():
            assert row[~kept].max() <= row[kept].min()


def test_what_rows_leave_over_goes_where_it_costs_least():
    scores = torch.tensor([[1.0, 8.0, 9.0], [1.0, 2.0, 9.0], [1.0, 5.0, 9.0]])
    assert prune_rows(scores, 4).tolist() == [[False, True, True], [False, False, True], [False, True, True]]


@QUICK
@given(shape=SHAPES, seed=SEEDS, share=SHARES, ties=st.booleans())
def test_a_matrix_loses_its_lowest(shape, seed, share, ties):
    scores = scores_of(shape, seed, ties)
    removed = round(share * scores.numel())
    keep = prune_matrix(scores, removed)
    assert int((~keep).sum()) == removed
    if 0 < removed < scores.numel():
        assert scores[~keep].max() <= scores[keep].min()


@QUICK
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 6),
    seed=SEEDS,
    ties=st.booleans(),
    n_m=st.sampled_from([(2, 4), (4, 8)]),
)
def test_n_of_each_m_neighbours_go(rows, groups, seed, ties, n_m):
    n, m = n_m
    scores = scores_of((rows, groups * m), seed, ties)
    keep = prune_n_of_m(scores, n, m)
    for group, kept in zip(scores.view(-1, m), keep.view(-1, m)):
        assert int((~kept).sum()) == n and group[~kept].max() <= group[kept].min()


@QUICK
@given(groups=st.integers(1, 5), seed=SEEDS, share=SHARES)
def test_what_was_zero_stays_zero_and_counts_as_removed(groups, seed, share):
    shape = (5, 4 * groups)
    scores, kept = scores_of(shape, seed), some_zeros(shape, seed)
    removed = round(share * scores.numel())
    zeros = int((~kept).sum())
    whole = prune_matrix(scores, removed, kept)
    assert not (whole & ~kept).any() and int((~whole).sum()) == max(removed, zeros)
    for keep, most in ((prune_rows(scores, removed, kept), -(-removed // 5)), (prune_n_of_m(scores, 2, 4, kept), 20)):
        assert not (keep & ~kept).any()
        assert ((~keep).sum(dim=1) <= torch.maximum((~kept).sum(dim=1), torch.tensor(most))).all()
    assert ((~prune_n_of_m(scores, 2, 4, kept)).view(-1, 4).sum(dim=1) >= 2).all()


@QUICK
@given(shape=SHAPES, block=st.tuples(st.integers(1, 5), st.integers(1, 5)), seed=SEEDS)
def test_blocks_are_masked_whole_and_edges_in_part(shape, block, seed):
    bits = some_zeros((-(-shape[0] // block[0]), -(-shape[1] // block[1])), seed, 0.5)
    mask = block_mask(bits, shape, block)
    dense = mask.dense()
    for r in range(shape[0]):
        for c in range(shape[1]):
            assert bool(dense[r, c]) == bool(bits[r // block[0], c // block[1]])
    assert block_mask(bits, shape, block, dense).block == block, "zeros in whole blocks stay a mask of blocks"
    kept = some_zeros(shape, seed + 7)
    assert torch.equal(block_mask(bits, shape, block, kept).dense(), dense & kept)


def test_only_known_patterns():
    assert parse_pattern("2:4") == (2, 4) and parse_pattern("4:8") == (4, 8)
    assert parse_pattern("unstructured") is None and parse_pattern("block") is None
    for bad in ("3:4", "2x4", ":", "", "16x16"):
        with pytest.raises(ValueError, match="choose one of unstructured, 2:4, 4:8, block"):
            parse_pattern(bad)
    with pytest.raises(ValueError, match="10 inputs has no pattern 2:4"):
        prune_n_of_m(torch.rand(3, 10), 2, 4)
