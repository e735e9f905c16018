"""Muon for CPUs: torch.optim.Muon with its Newton-Schulz iteration in float32.

torch's own runs it in bfloat16, which a GPU multiplies fast, and a CPU without hardware for it 150 times slower than
float32 (1024 x 1024): a step of the tiny preset took 4.3 s with it, five times the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Float32Muon(torch.optim.Muon):
    """The same update and the same state as torch.optim.Muon with `match_rms_adamw` (Jordan 2024; arXiv:2502.16982)."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Orthogonalise the momentum of each matrix and take a step along it."""
        assert closure is None, "the loop computes the loss itself"
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                update = orthogonalize(parameter.grad.lerp(mean, momentum), group["ns_coefficients"], group["ns_steps"])
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Bring the singular values of a matrix (M, N) near 1 by Newton-Schulz: x <- a x + (b A + c A A) x, A = x x^T."""
    a, b, c = coefficients
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix  # the smaller Gram matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.size(0) > matrix.size(1) else x
