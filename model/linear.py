"""A linear layer that is quick on a CPU: for the few rows of generation, and where oneDNN beats torch's own choice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.onednn import multiply, onednn_linear, takes, takes_few


class Linear(nn.Linear):
    """nn.Linear, but for the way in which `linear` multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)

    def few_rows(self, x: Tensor) -> Tensor:
        """x (R, in_features) -> (R, out_features) in a decoding step, see `is_decoding_step`."""
        if self.weight.dtype != torch.float32:
            return self.forward(x)
        y = _few_rows(x, self.weight)
        return y if self.bias is None else y + self.bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight (out, in).T + bias. A decoding step's few rows on a CPU go `_few_rows`'s way."""
    if not is_decoding_step(x) or weight.dtype != torch.float32:
        if takes(x, weight):
            return onednn_linear(x, weight, bias)
        return F.linear(x, weight, bias)
    y = _few_rows(x.reshape(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.size(0))
    return y if bias is None else y + bias


def is_decoding_step(x: Tensor) -> bool:
    """Whether x (..., in) is at most 32 rows of plain fp32 on a CPU, in inference mode.

    Asked 200 times a step, so by what is cheap to ask. Compilation first: torch.compile can not trace the question
    after it, and would cut its graph at every layer.
    """
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or not x.is_cpu:
        return False
    return x.dtype == torch.float32 and x.numel() <= 32 * x.size(-1) and not torch.is_autocast_enabled("cpu")


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x (R, in) @ weight (out, in).T as the transpose of weight @ x.T: the tall operand first.

    F.linear hands BLAS a matrix of R rows, which MKL neither splits over cores nor streams well. Read from memory on
    two cores at 37 GB/s, it takes 1 row (576 -> 49,152 in fp32) 7.6 ms as F.linear, 2.7 ms so; 4 rows 12.7 and 3.1 ms;
    8 rows 12.3 and 6.2 ms. A single row is a matrix times a vector, which MKL does on one core: a row beside it makes
    it a product of matrices. From 8 to 15 rows, four at a time are quicker than all at once (12 rows: 9.2, not 14.5).
    """
    if takes_few(x, weight):
        return multiply(x, weight, None)
    R = x.size(0)
    if R == 1:
        return torch.mm(weight, torch.cat((x, x)).t()).select(1, 0).unsqueeze(0)
    if 8 <= R < 16:
        fours = F.pad(x, (0, 0, 0, -R % 4)).split(4)
        return torch.cat([torch.mm(weight, four.t()) for four in fours], dim=1)[:, :R].t().contiguous()
    return torch.mm(weight, x.t()).t().contiguous()
