"""SparseGPT's sweep against the paper's algorithm, one row and one column at a time, in fp64."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.pruning.patterns import prune_rows
from model.pruning.scores import wanda
from model.pruning.sparsegpt import GROUP, sparsegpt


def problem(out, into, seed, tokens=None):
    """A weight and the second moment of correlated inputs, some much larger than others; fp64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 3 * into, into, generator=g, dtype=torch.float64)
    x = x @ torch.randn(into, into, generator=g, dtype=torch.float64) * torch.rand(into, generator=g).double() ** 2
    return torch.randn(out, into, generator=g, dtype=torch.float64), x.t() @ x / len(x)


def reference(weight, second, choose, damping=0.01):
    """Algorithm 1 of the paper, without its Cholesky factor: after each column, the inverse of what is left of H.

    `choose(c, salience of the columns from c on)` names the columns' removed weights when it is due, else None.
    """
    weight = weight.clone()
    left = second + damping * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
    removed = torch.zeros_like(weight, dtype=torch.bool)
    for c in range(weight.size(1)):
        chosen = choose(c, functools.partial(salience, weight, left, c))
        if chosen is not None:
            removed[:, c : c + chosen.size(1)] |= chosen
        inverse = torch.linalg.inv(left)
        for r in range(weight.size(0)):
            if removed[r, c]:
                weight[r, c:] -= weight[r, c].clone() / inverse[0, 0] * inverse[0]
                weight[r, c] = 0.0
        left = left[1:, 1:]
    return weight, ~removed


def salience(weight, left, start, stop):
    """w^2 / [H_F^-1]_cc for the columns [start, stop), where F, for column c, is what is left from c on."""
    columns = []
    for c in range(start, stop):
        inner = left[c - start :, c - start :]
        columns.append(weight[:, c].square() / torch.linalg.inv(inner)[0, 0])
    return torch.stack(columns, dim=1)


def by_share(share, into):
    def choose(c, salience_to):
        if c % GROUP:
            return None
        scores = salience_to(min(c + GROUP, into))
        return scores <= scores.flatten().sort().values[int(scores.numel() * share)]

    return choose


def by_n_of_m(n, m):
    def choose(c, salience_to):
        if c % m:
            return None
        scores = salience_to(c + m)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(dim=1)[:, :n], True)

    return choose


# 150 and 136 columns: more than one group of 128, so that the lazy update to the right of a group is in it.
@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
def test_a_share_of_each_group_as_in_the_paper(share):
    weight, second = problem(6, 150, seed=1)
    fitted, keep = sparsegpt(weight, second, share)
    wanted, wanted_keep = reference(weight, second, by_share(share, 150))
    assert torch.equal(keep, wanted_keep)
    torch.testing.assert_close(fitted, wanted, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("n_of_m", [(2, 4), (4, 8)])
def test_n_of_m_as_in_the_paper(n_of_m):
    weight, second = problem(6, 136, seed=2)
    fitted, keep = sparsegpt(weight, second, n_of_m)
    wanted, wanted_keep = reference(weight, second, by_n_of_m(*n_of_m))
    assert torch.equal(keep, wanted_keep)
    torch.testing.assert_close(fitted, wanted, atol=1e-8, rtol=1e-8)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), share=st.sampled_from([0.25, 0.5]))
def test_zeros_are_exact_and_old_ones_are_never_filled(seed, share):
    weight, second = problem(8, 24, seed)
    kept = torch.rand(8, 24, generator=torch.Generator().manual_seed(seed)) > 0.4
    for pattern in (share, (2, 4)):
        fitted, keep = sparsegpt(weight * kept, second, pattern, kept)
        assert not (keep & ~kept).any()
        assert not fitted[~keep].any() and bool(fitted[keep].all())
        assert pattern == share or bool(((~keep).view(-1, 4).sum(dim=1) >= 2).all())


def test_the_refit_brings_the_output_nearer_than_the_same_zeros_without_it():
    weight, second = problem(16, 64, seed=3)
    keep = prune_rows(wanda(weight, second.diagonal().sqrt()), 16 * 32)
    fitted, same = sparsegpt(weight, second, keep)
    assert torch.equal(same, keep)

    def error(w):
        return float((((w - weight) @ second) * (w - weight)).sum())

    assert error(fitted) < 0.85 * error(weight * keep)


def test_inputs_that_are_never_active_lose_their_weights():
    weight, second = problem(4, 16, seed=4)
    second[3] = second[:, 3] = 0.0
    fitted, _ = sparsegpt(weight, second, 0.5)
    assert not fitted[:, 3].any() and fitted.isfinite().all()


def test_no_share_removes_nothing_and_a_remainder_is_refused():
    weight, second = problem(4, 18, seed=5)
    fitted, keep = sparsegpt(weight, second, 0.0)
    assert torch.equal(fitted, weight) and keep.all()
    with pytest.raises(ValueError, match="18 inputs has no pattern 2:4"):
        sparsegpt(weight, second, (2, 4))
