"""Allocations: exact totals whatever the sizes, and the order that each way promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.pruning.allocation import Ranking, lowest_blocks, outlier_share, owl, uniform

QUICK = settings(max_examples=80, deadline=None, derandomize=True)
SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=8)
SHARES = st.floats(0.01, 0.99)


@QUICK
@given(sizes=SIZES, sparsity=SHARES)
def test_uniform_is_exact_in_total_and_within_one_weight_each(sizes, sparsity):
    counts = uniform(sizes, sparsity)
    assert sum(counts) == round(sparsity * sum(sizes))
    assert all(abs(count - sparsity * size) <= 1 for count, size in zip(counts, sizes))


@QUICK
@given(sizes=SIZES, sparsity=SHARES, data=st.data())
def test_owl_is_exact_and_keeps_more_where_outliers_are(sizes, sparsity, data):
    outliers = data.draw(st.lists(st.floats(0, 0.1), min_size=len(sizes), max_size=len(sizes)))
    counts = owl(sizes, outliers, sparsity)
    assert sum(counts) == round(sparsity * sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes))
    for i in range(len(sizes)):
        for j in range(len(sizes)):
            if outliers[i] < outliers[j]:
                assert counts[i] / sizes[i] >= counts[j] / sizes[j] - 1 / sizes[i] - 1 / sizes[j]


def test_owl_spreads_the_kept_shares_over_twice_its_lambda():
    """The paper's rule by hand: kept shares are outliers scaled to a range of 0.16, moved to the mean that is kept."""
    kept = [1 - count / 100_000 for count in owl([100_000] * 3, [0.01, 0.02, 0.05], 0.7)]
    wanted = torch.tensor([0.0, 0.04, 0.16])
    torch.testing.assert_close(torch.tensor(kept), wanted - wanted.mean() + 0.3, atol=2e-5, rtol=0)


def test_outliers_are_counted_against_the_mean_of_the_whole_layer():
    scores = [torch.ones(90), torch.full((10,), 11.0)]  # mean 2: above 10 are ten of a hundred
    assert outlier_share(scores) == 0.1
    assert outlier_share([scores[1]]) == 0.0


@QUICK
@given(seed=st.integers(0, 999), sparsity=st.floats(0.02, 0.7))
def test_a_ranking_finds_the_counts_of_one_global_sort(seed, sparsity):
    g = torch.Generator().manual_seed(seed)
    scores = [
        torch.rand(shape, generator=g) ** 4 * scale for shape, scale in (((8, 30), 1.0), ((50, 7), 0.01), ((9, 9), 5.0))
    ]
    ranking = Ranking(cap=1.0)
    for score in scores:
        ranking.add(score)
    counts = ranking.counts_for(sparsity)
    total = round(sparsity * sum(s.numel() for s in scores))
    assert sum(counts) == total
    threshold = torch.cat([s.flatten() for s in scores]).sort().values[total]
    for count, score in zip(counts, scores):
        # 128 buckets to the doubling: within the bucket of the threshold, weights count as equal.
        low, high = (int((score < threshold * factor).sum()) for factor in (1 - 2**-7, 1 + 2**-7))
        assert low <= count <= high


def test_a_cap_holds_and_others_make_up():
    ranking = Ranking(cap=0.6)
    for scale in (1e-6, 1.0):
        ranking.add(scale * torch.rand(10, 10, generator=torch.Generator().manual_seed(0)))
    assert ranking.counts_for(0.5) == [60, 40]
    with pytest.raises(ValueError, match=r"sparsity of 0\.7 is above the cap of 0\.6"):
        ranking.counts_for(0.7)


@QUICK
@given(seed=st.integers(0, 999), sparsity=st.floats(0.05, 0.7))
def test_lowest_blocks_go_up_to_the_share_and_the_cap(seed, sparsity):
    g = torch.Generator().manual_seed(seed)
    prices = [torch.rand(4, 6, generator=g), 0.1 * torch.rand(3, 5, generator=g)]
    sizes = [torch.full((4, 6), 16), torch.full((3, 5), 16)]
    sizes[1][:, -1] = 8  # partial blocks at an edge
    bits = lowest_blocks(prices, sizes, sparsity, cap=0.8)
    lost = [int(size[~kept].sum()) for size, kept in zip(sizes, bits)]
    whole = [int(size.sum()) for size in sizes]
    assert round(sparsity * sum(whole)) - 16 < sum(lost) <= round(sparsity * sum(whole))
    assert all(part <= 0.8 * size for part, size in zip(lost, whole))
    for kept, price in zip(bits, prices):
        if kept.any() and not kept.all():
            assert price[~kept].max() <= price[kept].min()


def test_blocks_that_are_zero_in_part_count_for_what_is_left_of_them():
    """Of the 64 weights of four blocks 42 are gone before any goes, so that a cap of 2/3 leaves room for none."""
    prices, sizes, left = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.full((1, 4), 16), torch.tensor([[0, 4, 2, 16]])
    assert lowest_blocks([prices], [sizes], 48 / 64, 1.0, [left])[0].tolist() == [[False, False, False, True]]
    assert lowest_blocks([prices], [sizes], 46 / 64, 1.0, [left])[0].tolist() == [[False, False, True, True]]
    assert lowest_blocks([prices], [sizes], 40 / 64, 1.0, [left])[0].tolist() == [[False, True, True, True]]
    whole = [torch.rand(4, 4), torch.full((4, 4), 16)]
    bits = lowest_blocks([prices, whole[0]], [sizes, whole[1]], 0.5, 2 / 3, [left, whole[1]])
    assert bits[0].all() and int((~bits[1]).sum()) == 7


@pytest.mark.parametrize("size", [256, 10])
def test_a_small_matrix_beside_a_large_one_is_no_reason_to_miss_room(size):
    """What a whole block leaves over is not the cap's doing, however small other matrices' blocks are."""
    prices = [torch.tensor([[5.0]]), torch.arange(4.0).view(2, 2)]
    bits = lowest_blocks(prices, [torch.tensor([[size]]), torch.full((2, 2), 256)], 0.4, cap=0.9)
    assert bits[0].all() and int((~bits[1]).sum()) in (1, 2)


def test_a_share_outside_its_bounds_is_refused():
    for bad in (0.0, 1.0, -0.5, 1.5):
        with pytest.raises(ValueError, match="give a share above 0 and below 1"):
            uniform([10], bad)
    with pytest.raises(ValueError, match=r"0\.95 .* whole blocks allow 0\.875: give a smaller --sparsity"):
        lowest_blocks([torch.rand(4, 4)], [torch.full((4, 4), 256)], 0.95, cap=0.9)
