"""Scores against their definitions, written out in fp64 and in loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.pruning.scores import block_sums, fisher_squares, magnitude, ria, wanda


def matrix_and_inputs(out=12, into=20, tokens=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(into, into, generator=g)
    x = torch.randn(tokens, into, generator=g) @ mix + torch.randn(into, generator=g)
    return torch.randn(out, into, generator=g), x


def test_weight_scores_are_their_formulas():
    weight, x = matrix_and_inputs()
    norms = x.square().mean(dim=0).sqrt()
    second = x.t() @ x / len(x)
    output = torch.rand(12) + 0.1
    for r, c in ((0, 0), (3, 7), (11, 19)):
        w = float(weight[r, c].abs())
        assert float(magnitude(weight)[r, c]) == w
        assert float(wanda(weight, norms)[r, c]) == pytest.approx(w * float(norms[c]), rel=1e-5)
        share = w / float(weight[:, c].abs().sum()) + w / float(weight[r].abs().sum())
        assert float(ria(weight, norms)[r, c]) == pytest.approx(share * float(norms[c]) ** 0.5, rel=1e-5)
        cost = float(output[r]) * w**2 * float(second[c, c])
        assert float(fisher_squares(weight, second, output)[r, c]) == pytest.approx(cost, rel=1e-5)


def test_the_relative_importance_of_an_empty_row_or_column_is_zero_not_nan():
    weight, x = matrix_and_inputs()
    weight[2] = 0.0
    weight[:, 5] = 0.0
    scores = ria(weight, x.square().mean(dim=0).sqrt())
    assert scores.isfinite().all() and not scores[2].any() and not scores[:, 5].any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=st.tuples(st.integers(1, 20), st.integers(1, 20)), block=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_block_sums_take_partial_blocks_at_the_edges(shape, block):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = block_sums(scores, *block)
    assert sums.shape == (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    for i in range(sums.size(0)):
        for j in range(sums.size(1)):
            part = scores[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            assert float(sums[i, j]) == pytest.approx(float(part.sum()))
