"""The language-model loss without its logits: the head and the cross entropy run piece by piece."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.linear import linear
from model.onednn import takes

IGNORE_INDEX = -100  # a target that carries no loss
_OUTER_ROWS = 8192  # of the head's gradient at a time, where it cannot be added in place


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int | None = None
) -> Tensor:
    """The summed cross entropy of `hidden @ weight.T` against `targets`, an fp32 scalar in nats.

    hidden (N, C), weight (V, C), targets (N,) int64 with -100 where nothing is supervised; ids from `vocab_size` to V
    are left out of the softmax. `chunk` is the number of rows whose logits exist at a time (None: by memory).

    All N x V logits of GPT-2 at 4 x 256 tokens are 206 MB, and plain cross entropy holds three such arrays (logits,
    their log-softmax, their gradient). Here one buffer of `chunk` rows serves all of it: the gradient of each piece is
    worked out while its logits are at hand, in the forward pass. Rows without a target never meet the head. Autocast is
    honoured: the matmuls run in its type, softmax and sums in fp32.
    """
    assert hidden.dim() == 2 and weight.dim() == 2 and targets.shape == hidden.shape[:1]
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropySum.apply(hidden, weight, targets, vocab_size, chunk)
    return _losses(hidden, weight, targets, vocab_size, chunk)[0].sum()


def linear_cross_entropy_each(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int | None = None
) -> Tensor:
    """The cross entropy of every position, fp32 (N,) in nats, 0 where nothing is supervised; arguments as for the sum.

    What each position's gradient counts is known in backward only, so there the logits of each piece are made a second
    time: as little memory as the sum takes, for a fourth matmul beside its three.
    """
    assert hidden.dim() == 2 and weight.dim() == 2 and targets.shape == hidden.shape[:1]
    return _LinearCrossEntropyEach.apply(hidden, weight, targets, vocab_size, chunk)


class _LinearCrossEntropySum(torch.autograd.Function):
    """Both gradients are ready after forward; backward only scales them, once, in place."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int | None
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        needs = {"need_hidden": need_hidden, "need_weight": need_weight}
        losses, *gradients = _losses(hidden, weight, targets, vocab_size, chunk, **needs)
        # Not save_for_backward: it would keep a second reference, and autograd then copies the gradient (154 MB for
        # GPT-2's head) where it could have taken it over.
        ctx.gradients = gradients
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss keeps its gradients for one backward pass; compute the loss again")
        grad_hidden, grad_weight = (None if g is None else g.mul_(grad_loss) for g in ctx.gradients)
        ctx.gradients = None
        return grad_hidden, grad_weight, None, None, None


class _LinearCrossEntropyEach(torch.autograd.Function):
    """Forward keeps its inputs, backward makes both gradients from them and from what each position counts."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int | None
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.vocab_size, ctx.chunk = vocab_size, chunk
        ctx.dtype = _matmul_dtype(hidden, weight)  # backward runs outside of autocast
        supervised = _losses(hidden, weight, targets, vocab_size, chunk)[0]
        losses = supervised.new_zeros(len(targets))
        return losses.masked_scatter_(targets != IGNORE_INDEX, supervised)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        needs = {"need_hidden": need_hidden, "need_weight": need_weight, "dtype": ctx.dtype, "counts": grad_losses}
        _, grad_hidden, grad_weight = _losses(hidden, weight, targets, ctx.vocab_size, ctx.chunk, **needs)
        return grad_hidden, grad_weight, None, None, None


def linear_distillation_sum(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    hard: float = 0.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a student's predictions lack of its teacher's, summed over the supervised positions; fp32 scalars in nats:

        loss = (1 - hard) KL(teacher || student) + hard CE(targets), and without gradients the KL and the CE themselves

    hidden (N, C) and weight (V, C) are the student's, teacher_hidden (N, D) and teacher_weight (W, D) get no gradient;
    targets and `vocab_size`, at most V and W, as for `linear_cross_entropy_sum`. The KL is over all ids that exist.

    As there, logits exist for `chunk` rows at a time, here of both models, and the gradient in the student's logits,
    p_student - (1 - hard) p_teacher - hard [target], is worked out while they are at hand.
    """
    assert hidden.dim() == 2 and weight.dim() == 2 and len(hidden) == len(teacher_hidden) == len(targets)
    assert vocab_size <= min(len(weight), len(teacher_weight)) and 0.0 <= hard <= 1.0
    given = (hidden, weight, teacher_hidden.detach(), teacher_weight.detach(), targets, vocab_size, hard, chunk)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearDistillationSum.apply(*given)
    return _distillation(*given)[0]


class _LinearDistillationSum(torch.autograd.Function):
    """As `_LinearCrossEntropySum`, with the two parts of the loss beside it."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        sums, *ctx.gradients = _distillation(*given, need_hidden=need_hidden, need_weight=need_weight)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss keeps its gradients for one backward pass; compute the loss again")
        grad_hidden, grad_weight = (None if g is None else g.mul_(grad_loss) for g in ctx.gradients)
        ctx.gradients = None
        return grad_hidden, grad_weight, *(None,) * 6


def _distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    hard: float,
    chunk: int | None,
    *,
    need_hidden: bool = False,
    need_weight: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, Tensor | None]:
    """The sums (loss, KL, CE); where needed, the loss's gradients in `hidden` (N, C) and `weight` (V, C)."""
    dtype = _matmul_dtype(hidden, weight)
    table = weight.detach()[:vocab_size].to(dtype)  # (v, C): ids that do not exist have no part in it
    teacher_table = teacher_weight[:vocab_size].to(dtype)  # (v, D)
    rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)  # (S,) the supervised positions
    step = min(chunk or chunk_rows(3 * vocab_size, hidden.device.type), max(1, len(rows)))
    exact = torch.promote_types(dtype, torch.float32)
    buffers = None if takes(hidden, table) else torch.empty(3, step, vocab_size, dtype=exact, device=hidden.device)
    kl = torch.zeros((), dtype=exact, device=hidden.device)
    ce = torch.zeros_like(kl)
    grad_hidden = torch.zeros_like(hidden) if need_hidden else None
    grad_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if need_weight else None
    with torch.no_grad():
        for start in range(0, len(rows), step):
            piece = rows[start : start + step]  # (n,)
            outs = (None,) * 3 if buffers is None else buffers[:, : len(piece)]
            x = hidden.detach()[piece].to(dtype)  # (n, C)
            ours = _log_softmax(x, table, vocab_size, outs[0])  # (n, v), as the next two
            theirs = _log_softmax(teacher_hidden[piece].to(dtype), teacher_table, vocab_size, outs[1])
            p = torch.exp(theirs, out=outs[2])
            # Summed as differences: each is small where the two agree, the entropies themselves are not.
            kl += theirs.sub_(ours).mul_(p).sum()
            wanted = targets[piece].unsqueeze(1)  # (n, 1)
            ce -= ours.gather(1, wanted).sum()
            if not (need_hidden or need_weight):
                continue
            delta = ours.exp_().sub_(p.mul_(1.0 - hard))
            if hard:
                delta.scatter_add_(1, wanted, torch.full_like(wanted, -hard, dtype=exact))
            delta = delta.to(dtype)
            if grad_hidden is not None:
                grad_hidden.index_copy_(0, piece, linear(delta, table.t()).to(hidden.dtype))
            if grad_weight is not None:
                _add_outer(grad_weight[:vocab_size], delta, x)
            del ours, delta  # before the next piece makes its own
    grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
    return ((1.0 - hard) * kl + hard * ce, kl, ce), grad_hidden, grad_weight


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    chunk: int | None,
    *,
    need_hidden: bool = False,
    need_weight: bool = False,
    dtype: torch.dtype | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The losses of the S supervised positions (S,); where needed, gradients in `hidden` (N, C) and `weight` (V, C).

    The gradients are those of the sum of the losses, or of the sum of `counts` (N,) times them.
    """
    device = hidden.device.type
    dtype = dtype or _matmul_dtype(hidden, weight)
    table = weight.detach().to(dtype)  # (V, C)
    rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)  # (S,) the supervised positions
    step = min(chunk or chunk_rows(weight.size(0), device), max(1, len(rows)))
    exact = torch.promote_types(dtype, torch.float32)
    # One buffer for all pieces: a fresh one of this size costs page faults each time. oneDNN makes its own.
    buffer = None if takes(hidden, table) else torch.empty(step, weight.size(0), dtype=exact, device=hidden.device)
    nll = torch.empty(len(rows), dtype=exact, device=hidden.device)
    grad_hidden = torch.zeros_like(hidden) if need_hidden else None
    grad_weight = None
    with torch.no_grad():
        for start in range(0, len(rows), step):
            piece = rows[start : start + step]  # (n,)
            x = hidden.detach()[piece].to(dtype)  # (n, C)
            wanted = targets[piece].unsqueeze(1)  # (n, 1)
            scores = _log_softmax(x, table, vocab_size, None if buffer is None else buffer[: len(piece)])  # (n, V)
            nll[start : start + step] = -scores.gather(1, wanted).squeeze(1)
            if not (need_hidden or need_weight):
                continue
            # The gradient in the logits: the probabilities, less 1 at the target.
            delta = scores.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=exact))
            if counts is not None:
                delta = delta.mul_(counts[piece].unsqueeze(1))
            delta = delta.to(dtype)
            if grad_hidden is not None:
                grad_hidden.index_copy_(0, piece, linear(delta, table.t()).to(hidden.dtype))
            if need_weight:
                grad_weight = _add_outer(grad_weight, delta, x)
            del scores, delta  # before the next piece makes its own
    if need_weight:
        grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
    return nll, grad_hidden, grad_weight


def _log_softmax(x: Tensor, table: Tensor, vocab_size: int, out: Tensor | None) -> Tensor:
    """The log-probabilities (n, V) of x (n, C), written into `out` where there is one; -inf from vocab_size on."""
    if out is None:
        out = linear(x, table)
    elif x.dtype == out.dtype:
        torch.mm(x, table.t(), out=out)
    else:
        out.copy_(x @ table.t())
    out[:, vocab_size:] = float("-inf")
    return torch.log_softmax(out, dim=1, out=out)


def _add_outer(total: Tensor | None, delta: Tensor, x: Tensor) -> Tensor:
    """total + delta.T @ x, (V, C), in place, at least fp32. The first piece makes the total: nothing is zero-filled."""
    if total is None:
        return linear(delta.t(), x.t()).to(torch.promote_types(delta.dtype, torch.float32))
    if not takes(delta.t(), x.t()):
        return total.addmm_(delta.t(), x) if delta.dtype == total.dtype else total.add_(delta.t() @ x)
    for part, columns in zip(total.split(_OUTER_ROWS), delta.split(_OUTER_ROWS, dim=1)):
        part.add_(linear(columns.t(), x.t()))
    return total


def chunk_rows(vocab_size: int, device: str) -> int:
    """How many rows of fp32 logits to hold at a time: 64 MB of them on CPU, 256 MB on a GPU, never under 128 rows.

    Each piece also reads and writes the whole gradient of the weight once, so pieces must not be small.
    """
    budget = (64 if device == "cpu" else 256) * 2**20
    return max(128, budget // (4 * vocab_size))
