"""fp32 products by oneDNN, on CPUs where torch's BLAS leaves half of every core idle.

torch gives fp32 products to MKL, which keeps to vectors of 256 bits on an AMD CPU that has them of 512. oneDNN, which
torch carries for lower precisions and for compiled graphs, uses all of them: 4,096 x 576 times 576 x 1,536 on a core of
Zen 5 runs at 97 GFLOP/s by MKL, at 218 so, gradients alike. The numbers are fp32 all the way, summed in another order.

What decides is the machine and the shapes, never a measurement, so that a resumed run multiplies as it did before.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST_ROWS = 16  # below it the two are even
_LEAST_DECODED = 5  # rows of a decoding step, which MKL gets in the better of its ways (model/linear.py)
_after_bags = False  # see takes_few


@functools.cache
def pays_here() -> bool:
    """Whether this is a CPU on which oneDNN's fp32 products are much the quicker ones: AMD, with AVX-512."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    return known and torch.backends.cpu.get_cpu_capability().startswith("AVX512") and "AuthenticAMD" in _vendor()


def _vendor() -> str:
    """The CPU's maker, as far as the system says it."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            return file.read(200)  # it is in the second line
    except OSError:
        return platform.processor()


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether x (..., in) times weight (out, in) is better done here: fp32 on such a CPU, enough rows."""
    return (
        not torch.compiler.is_compiling()
        and pays_here()
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= LEAST_ROWS * x.size(-1) > 0
        and _is_whole(weight)
        and not torch.is_autocast_enabled("cpu")
    )


def expect_bags() -> None:
    """From here on this process runs torch.embedding_bag between its products (model/block_sparse.py)."""
    global _after_bags
    _after_bags = True


def takes_few(x: Tensor, weight: Tensor) -> bool:
    """Whether a decoding step's x (R, in) times weight (out, in) is better done here.

    SmolLM2-135M's products on two cores of Zen 5, MKL's time over oneDNN's: 8 rows 1.4, 32 rows 1.8, 5 rows 1.2, 2 to 4
    rows 0.7 to 0.9, 1 row 0.93 of a whole step. But MKL loses half of its speed for as long as a worker thread last ran
    torch.embedding_bag: 5.4 ms for the head, not 2.7. Then one row that makes a longer one is better here too.
    """
    R = len(x)
    wanted = R >= _LEAST_DECODED or (R == 1 and _after_bags and weight.size(0) > weight.size(1))
    return wanted and pays_here() and _is_whole(weight)


def _is_whole(weight: Tensor) -> bool:
    """Not one that is shared out among processes."""
    return type(weight) in (Tensor, torch.nn.Parameter)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (R, in) @ weight (out, in).T + bias, without gradients."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return result


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, with its gradients, of tensors that `takes`: x (..., in), weight (out, in), bias (out,)."""
    rows: Tensor = _Linear.apply(x.reshape(-1, x.size(-1)), weight, bias)  # no view from inside: it may be written to
    return rows.view(*x.shape[:-1], weight.size(0))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (R, in) -> (R, out)."""
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad (R, out)."""
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            multiply(grad, weight.t(), None) if needs_x else None,
            multiply(grad.t(), x.t(), None) if needs_weight else None,
            grad.sum(dim=0) if needs_bias else None,
        )
