"""The least-squares re-fit against torch.linalg.lstsq on explicit inputs."""

import pytest
import torch

from model.masks import Mask
from model.pruning.refit import damped, refit_columns, refit_row_blocks, refit_scattered, refit_with_bias
from model.pruning.sparsegpt import sparsegpt
from model.pruning.statistics import Site


def data(tokens=200, d=20, out=7, seed=0):
    """Correlated inputs X (tokens, d) with means, a weight (out, d), and the second moment; fp64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d, generator=g, dtype=torch.float64)
    x = x @ torch.randn(d, d, generator=g, dtype=torch.float64) + torch.linspace(-2, 2, d, dtype=torch.float64)
    weight = torch.randn(out, d, generator=g, dtype=torch.float64)
    return x, weight, x.t() @ x / tokens


KEPT = torch.tensor([0, 3, 4, 9, 11, 17, 18])


def test_columns_without_damping_are_lstsq():
    x, weight, second = data()
    wanted = torch.linalg.lstsq(x[:, KEPT], x @ weight.t()).solution.t()
    torch.testing.assert_close(refit_columns(weight, second, KEPT, damping=0.0), wanted, rtol=1e-8, atol=1e-8)


def test_damping_is_ridge_towards_the_old_weights():
    """Extra rows sqrt(lambda) I in X, with sqrt(lambda) W as their outputs, are the same problem without damping."""
    x, weight, second = data()
    root = (0.05 * second.diagonal().mean() * len(x)).sqrt()
    rows = root * torch.eye(len(KEPT), dtype=torch.float64)
    wanted = torch.linalg.lstsq(
        torch.cat((x[:, KEPT], rows)), torch.cat((x @ weight.t(), root * weight[:, KEPT].t()))
    ).solution.t()
    torch.testing.assert_close(refit_columns(weight, second, KEPT, damping=0.05), wanted, rtol=1e-8, atol=1e-8)
    heavy = refit_columns(weight, second, KEPT, damping=1e9)
    torch.testing.assert_close(heavy, weight[:, KEPT], rtol=1e-6, atol=1e-6)


def test_the_fit_is_better_than_dropping_columns_and_fp32_suffices():
    x, weight, second = data()
    fitted = refit_columns(weight.float(), second.float(), KEPT)
    torch.testing.assert_close(fitted.double(), refit_columns(weight, second, KEPT), rtol=1e-3, atol=1e-3)

    def error(w):
        return (x @ weight.t() - x[:, KEPT] @ w.t()).square().mean()

    assert error(fitted.double()) < 0.85 * error(weight[:, KEPT])


def test_with_a_bias_it_is_lstsq_with_a_column_of_ones():
    x, weight, second = data()
    bias = torch.arange(7, dtype=torch.float64)
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    wanted = torch.linalg.lstsq(torch.cat((x[:, KEPT], ones), 1), x @ weight.t() + bias).solution.t()
    site = Site(second, x.mean(0), len(x))
    fitted, new_bias = refit_with_bias(weight, bias, site, KEPT, damping=0.0)
    torch.testing.assert_close(fitted, wanted[:, :-1], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(new_bias, wanted[:, -1], rtol=1e-7, atol=1e-7)
    _, mean_output = refit_with_bias(weight, bias, site, KEPT[:0])
    torch.testing.assert_close(mean_output, (x @ weight.t() + bias).mean(0))


@pytest.mark.parametrize(
    "kept", [torch.arange(20), torch.arange(20).flip(0), torch.arange(0)], ids=["all", "order", "0"]
)
def test_all_columns_kept_change_nothing_and_none_leave_nothing(kept):
    _, weight, second = data()
    assert torch.equal(refit_columns(weight, second, kept), weight[:, kept])


def test_singular_moments_are_refused_without_damping_and_solved_with_it():
    _, weight, second = data(tokens=10)
    with pytest.raises(ValueError, match="raise the damping"):
        refit_columns(weight, torch.zeros_like(second), KEPT, damping=0.0)
    torch.testing.assert_close(refit_columns(weight, torch.zeros_like(second), KEPT), weight[:, KEPT])
    assert refit_columns(weight.float(), second.float(), torch.arange(19)).isfinite().all()
    with pytest.raises(ValueError, match="damping is -1"):
        refit_columns(weight, second, KEPT, damping=-1)


@pytest.mark.parametrize("block", [(3, 4), (2, 5), (1, 1), (16, 3)])
def test_row_blocks_are_lstsq_of_each_row_on_its_kept_columns(block):
    x, weight, second = data()
    g = torch.Generator().manual_seed(1)
    grid = (-(-7 // block[0]), -(-20 // block[1]))
    bits = torch.rand(grid, generator=g) < 0.5
    bits[0] = True
    if grid[0] > 2:
        bits[1], bits[2] = False, bits[-1]
    mask = Mask((7, 20), block, bits)
    fitted, dense = refit_row_blocks(weight, second, mask, damping=0.0), mask.dense()
    for row in range(7):
        kept = dense[row].nonzero().squeeze(1)
        wanted = torch.zeros(20, dtype=torch.float64)
        if len(kept):
            wanted[kept] = torch.linalg.lstsq(x[:, kept], x @ weight[row]).solution
        torch.testing.assert_close(fitted[row], wanted, rtol=1e-7, atol=1e-7)
    assert torch.equal(fitted[: block[0]], weight[: block[0]])
    assert not fitted[~dense].any()


def test_scattered_zeros_are_lstsq_of_each_row_in_the_end():
    """As many steps of conjugate gradients as unknowns are the exact solution; a row that keeps nothing stays zero."""
    x, weight, second = data()
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[2] = False
    fitted = refit_scattered(weight, second, keep, weight * keep, damping=0.0, steps=40)
    for row, kept in enumerate(keep):
        wanted = torch.linalg.lstsq(x[:, kept], x @ weight[row]).solution
        torch.testing.assert_close(fitted[row, kept], wanted, rtol=1e-6, atol=1e-6)
    assert not fitted[~keep].any()


def test_each_step_of_a_scattered_refit_comes_nearer_and_the_start_is_sparsegpts():
    _, weight, second = data()
    start, keep = sparsegpt(weight.float(), second.float(), 0.5)

    def error(w):
        return float((((w - weight) @ damped(second, 0.01)) * (w - weight)).sum())

    found = [refit_scattered(weight.float(), second.float(), keep, start, steps=n) for n in (0, 1, 2, 4, 8, 16)]
    errors = [error(w.double()) for w in found]
    assert torch.equal(found[0], start)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.95 * errors[0]
    assert all(not w[~keep].any() for w in found)
