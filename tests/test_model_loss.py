"""linear_cross_entropy_sum and _each against torch's cross entropy: values, gradients, and the work it must not do."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import model.loss
from model.loss import chunk_rows, linear_cross_entropy_each, linear_cross_entropy_sum


def inputs(N=13, C=8, V=24, vocab_size=19, masked=0.3, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(V, C, generator=g, dtype=dtype).requires_grad_()
    targets = torch.randint(vocab_size, (N,), generator=g)
    targets[torch.rand(N, generator=g) < masked] = -100
    return hidden, weight, targets


def reference(hidden, weight, targets, vocab_size):
    return F.cross_entropy(hidden @ weight[:vocab_size].t(), targets, reduction="sum")


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 40),
    padding=st.integers(0, 9),
    vocab_size=st.integers(2, 30),
    chunk=st.one_of(st.none(), st.integers(1, 50)),
    masked=st.sampled_from([0.0, 0.5, 0.9]),
    scale=st.sampled_from([1.0, -3.0, 1 / 7]),
    seed=st.integers(0, 99),
)
def test_equals_cross_entropy_in_double_precision(N, padding, vocab_size, chunk, masked, scale, seed):
    hidden, weight, targets = inputs(N, 5, vocab_size + padding, vocab_size, masked, torch.float64, seed)
    loss = linear_cross_entropy_sum(hidden, weight, targets, vocab_size, chunk)
    wanted = reference(hidden, weight, targets, vocab_size)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    ours, theirs = gradients(loss * scale, hidden, weight), gradients(wanted * scale, hidden, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_fp32_and_padded_ids_get_no_gradient():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy_sum(hidden, weight, targets, 19, chunk=4)
    assert loss.dtype == torch.float32 and loss.shape == ()
    grad_hidden, grad_weight = gradients(loss, hidden, weight)
    torch.testing.assert_close(
        (grad_hidden, grad_weight), gradients(reference(hidden, weight, targets, 19), hidden, weight)
    )
    assert grad_weight[:19].abs().amax(dim=1).min() > 0 and not grad_weight[19:].any()
    assert not grad_hidden[targets == -100].any()


def test_large_logits_stay_finite():
    hidden, weight, targets = inputs(masked=0.0)
    loss = linear_cross_entropy_sum(hidden * 1e4, weight, targets, 19)
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, reference(hidden * 1e4, weight, targets, 19))


def test_nothing_supervised_is_zero_with_zero_gradients():
    hidden, weight, targets = inputs(masked=1.0)
    assert (targets == -100).all()
    loss = linear_cross_entropy_sum(hidden, weight, targets, 19)
    assert loss.item() == 0.0
    grad_hidden, grad_weight = gradients(loss, hidden, weight)
    assert grad_hidden.shape == hidden.shape and grad_weight.shape == weight.shape
    assert not grad_hidden.any() and not grad_weight.any()


def test_accumulation_over_micro_batches():
    hidden, weight, targets = inputs(N=20)
    for part in (slice(0, 7), slice(7, 20)):
        linear_cross_entropy_sum(hidden[part], weight, targets[part], 19, chunk=3).backward()
    torch.testing.assert_close(
        (hidden.grad, weight.grad), gradients(reference(hidden, weight, targets, 19), hidden, weight)
    )


def spy(monkeypatch, name):
    """Counts the rows that the named helper works on, per call."""
    calls, original, place = [], getattr(model.loss, name), {"_log_softmax": 0, "_add_outer": 2}[name]

    def counted(*args):
        calls.append(len(args[place]))
        return original(*args)

    monkeypatch.setattr(model.loss, name, counted)
    return calls


def test_the_head_meets_supervised_rows_only_a_chunk_at_a_time(monkeypatch):
    hidden, weight, targets = inputs(N=30, masked=0.5)
    rows = spy(monkeypatch, "_log_softmax")
    linear_cross_entropy_sum(hidden, weight, targets, 19, chunk=4).backward()
    assert sum(rows) == (targets != -100).sum() < 30
    assert max(rows) == 4


def test_no_gradient_work_under_no_grad_or_without_need(monkeypatch):
    hidden, weight, targets = inputs()
    outer = spy(monkeypatch, "_add_outer")
    wanted = reference(hidden, weight, targets, 19)
    exp_calls = []
    monkeypatch.setattr(torch.Tensor, "exp_", lambda self: exp_calls.append(1))
    with torch.no_grad():
        loss = linear_cross_entropy_sum(hidden, weight, targets, 19)
    detached = linear_cross_entropy_sum(hidden.detach(), weight.detach(), targets, 19)
    assert not loss.requires_grad and not detached.requires_grad
    assert not outer and not exp_calls
    torch.testing.assert_close((loss, detached), (wanted.detach(), wanted.detach()))


def test_a_frozen_weight_costs_no_weight_gradient(monkeypatch):
    hidden, weight, targets = inputs()
    outer = spy(monkeypatch, "_add_outer")
    linear_cross_entropy_sum(hidden, weight.detach(), targets, 19).backward()
    assert not outer
    torch.testing.assert_close(hidden.grad, gradients(reference(hidden, weight, targets, 19), hidden)[0])


def test_a_frozen_network_below_trains_the_head_alone():
    hidden, weight, targets = inputs()
    linear_cross_entropy_sum(hidden.detach(), weight, targets, 19).backward()
    torch.testing.assert_close(weight.grad, gradients(reference(hidden, weight, targets, 19), weight)[0])


def test_a_second_backward_is_refused():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy_sum(hidden, weight, targets, 19)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_the_gradient_array_is_handed_over_not_copied(monkeypatch):
    hidden, weight, targets = inputs()
    made, original = [], model.loss._add_outer

    def remembered(*args):
        total = original(*args)
        made.append(total.data_ptr())
        return total

    monkeypatch.setattr(model.loss, "_add_outer", remembered)
    linear_cross_entropy_sum(hidden, weight, targets, 19, chunk=4).backward()
    assert len(made) > 1 and set(made) == {weight.grad.data_ptr()}


def test_autocast_bf16_keeps_the_loss_and_the_gradients_in_fp32():
    hidden, weight, targets = inputs(N=200, masked=0.2)
    wanted = gradients(reference(hidden, weight, targets, 19), hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy_sum(hidden, weight, targets, 19, chunk=64)
    ours = gradients(loss, hidden, weight)
    assert [t.dtype for t in (loss, *ours)] == [torch.float32] * 3
    assert loss.item() == pytest.approx(reference(hidden, weight, targets, 19).item(), rel=1e-2)
    for mine, exact in zip(ours, wanted):
        error = (mine - exact).norm() / exact.norm()
        assert 1e-5 < error < 2e-2  # bf16 has 8 bits; no error at all would mean that autocast was ignored


def test_a_bf16_model_gets_bf16_gradients():
    hidden, weight, targets = inputs(dtype=torch.bfloat16)
    loss = linear_cross_entropy_sum(hidden, weight, targets, 19)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_chunk_is_64_mb_of_logits_on_cpu_and_never_tiny():
    assert chunk_rows(50_304, "cpu") * 50_304 * 4 == pytest.approx(64 * 2**20, rel=0.01)
    assert chunk_rows(50_304, "cuda") > chunk_rows(50_304, "cpu")
    assert chunk_rows(10**6, "cpu") == 128


# ---- one loss a position


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 40),
    padding=st.integers(0, 9),
    chunk=st.one_of(st.none(), st.integers(1, 50)),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_each_position_counts_what_it_is_multiplied_by(N, padding, chunk, masked, seed):
    hidden, weight, targets = inputs(N, 5, 11 + padding, 11, masked, torch.float64, seed)
    counts = torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    losses = linear_cross_entropy_each(hidden, weight, targets, 11, chunk)
    wanted = F.cross_entropy(hidden @ weight[:11].t(), targets, reduction="none")
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=1e-12)
    # A curved function of the losses: what a position counts depends on all of them, as in a preference loss.
    ours, theirs = ((counts * each).sum().tanh() + (each**2).sum() for each in (losses, wanted))
    torch.testing.assert_close(gradients(ours, hidden, weight), gradients(theirs, hidden, weight))


def test_each_meets_supervised_rows_only_a_chunk_at_a_time_twice(monkeypatch):
    hidden, weight, targets = inputs(N=30, masked=0.5)
    rows = spy(monkeypatch, "_log_softmax")
    losses = linear_cross_entropy_each(hidden, weight, targets, 19, chunk=4)
    assert sum(rows) == (targets != -100).sum() < 30
    losses.sum().backward()
    assert sum(rows) == 2 * (targets != -100).sum() and max(rows) == 4


def test_each_honours_autocast_in_backward_too():
    hidden, weight, targets = inputs(N=200, masked=0.2)
    wanted = gradients(reference(hidden, weight, targets, 19), hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = linear_cross_entropy_each(hidden, weight, targets, 19, chunk=64)
        summed = linear_cross_entropy_sum(hidden, weight, targets, 19, chunk=64)
    assert losses.dtype == torch.float32 and losses.sum().item() == pytest.approx(summed.item(), rel=1e-6)
    for mine, other, exact in zip(gradients(losses.sum(), hidden, weight), gradients(summed, hidden, weight), wanted):
        torch.testing.assert_close(mine, other)
        assert 1e-5 < (mine - exact).norm() / exact.norm() < 2e-2


def test_each_leaves_a_frozen_weight_alone(monkeypatch):
    hidden, weight, targets = inputs()
    outer = spy(monkeypatch, "_add_outer")
    linear_cross_entropy_each(hidden, weight.detach(), targets, 19).sum().backward()
    assert not outer
    torch.testing.assert_close(hidden.grad, gradients(reference(hidden, weight, targets, 19), hidden)[0])
