"""The pruned network beside the dense one, site by site: what it sees, and what it should answer.

A re-fit to the dense network's outputs from the pruned network's inputs lets each matrix make up for what was lost
before it: W' = W E[x_d x_p^T] E[x_p x_p^T]^-1, x_d and x_p one token's input in either network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.attention import AttentionInputs
from model.gpt import GPT, Block
from model.pruning.refit import cholesky, damped
from model.pruning.statistics import check_windows, evaluating, first_states

OUT_LINEAR = {"attn": "o_proj", "mlp": "down_proj"}


@dataclass
class Pair:
    """Moments of one site's input in both networks, as means over the tokens; fp32."""

    second: Tensor  # (d, d), mean of x_p x_p^T
    cross: Tensor  # (d, d), mean of x_d x_p^T
    behind: Tensor | None  # (C, d), mean of (h_d - h_p) x_p^T for the streams h that the site's output is added to


def retarget(weight: Tensor, pair: Pair, damping: float = 0.01) -> Tensor:
    """The weight (out, in) that, on the pruned network's inputs, comes nearest to the dense one's outputs.

    Where the output joins the stream, it also makes up for what the stream has lost. Nothing is sparse yet: fitting the
    result again on some of its columns is the same as fitting those columns to the dense outputs at once.
    """
    whole = damped(pair.second, damping)
    target = weight @ (pair.cross + (whole - pair.second))
    if pair.behind is not None:
        target += pair.behind
    return torch.cholesky_solve(target.t(), cholesky(whole)).t()


@torch.no_grad()
def follow(
    dense: GPT, model: GPT, windows: Tensor, *, batch_size: int = 8, weigh: bool = True
) -> Iterator[tuple[int, str, Pair]]:
    """Layer, site and moments, in the order of the computation, over windows (N, T) int64.

    Whoever changes the matrices that read the site (as `SITE_OF` has it) before asking for the next gets the later
    sites as the changed network makes them. `weigh`: before o_proj and down_proj a token counts by 1 / mean(h^2) of the
    dense stream it is added to, so that few tokens with massive activations do not outvote all others.
    """
    check_windows(model, windows)
    h_d, shared = first_states(dense, windows, batch_size)
    h_p, _ = first_states(model, windows, batch_size)
    for layer in range(model.config.n_layer):
        ours, theirs = model.h[layer], dense.h[layer]
        assert isinstance(ours, Block) and isinstance(theirs, Block)
        for part, norm in (("attn", "ln_1"), ("mlp", "ln_2")):
            if getattr(ours, part) is None:
                continue
            yield layer, f"{part}_in", _inputs(getattr(theirs, norm), getattr(ours, norm), h_d, h_p, batch_size)
            x_p = h_p.new_empty(*h_p.shape[:2], getattr(ours, part).get_submodule(OUT_LINEAR[part]).weight.size(1))
            sums = _PairSums()
            for rows in range(0, len(windows), batch_size):
                here = slice(rows, rows + batch_size)
                x_d, y_d = _before_out(theirs, part, norm, h_d[here], shared)
                x_p[here], _ = _before_out(ours, part, norm, h_p[here], shared)
                behind = h_d[here] - h_p[here]
                h_d[here] += y_d
                sums.add(x_d, x_p[here], behind, 1 / h_d[here].square().mean(dim=-1) if weigh else None)
            yield layer, f"{part}_out", sums.finish()
            out = getattr(ours, part).get_submodule(OUT_LINEAR[part])
            for rows in range(0, len(windows), batch_size):
                here = slice(rows, rows + batch_size)
                h_p[here] += out(x_p[here])


def _inputs(theirs: nn.Module, ours: nn.Module, h_d: Tensor, h_p: Tensor, batch_size: int) -> Pair:
    sums = _PairSums()
    for d, p in zip(h_d.split(batch_size), h_p.split(batch_size)):
        sums.add(theirs(d), ours(p), None, None)
    return sums.finish()


def _before_out(block: Block, part: str, norm: str, h: Tensor, shared: AttentionInputs) -> tuple[Tensor, Tensor]:
    """The input of o_proj or down_proj, and its output, for the stream h (B, T, C)."""
    module = getattr(block, part)
    caught: list[Tensor] = []
    handle = module.get_submodule(OUT_LINEAR[part]).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        with evaluating(block):
            x = getattr(block, norm)(h)
            y = module(x, shared) if part == "attn" else module(x)
    finally:
        handle.remove()
    return caught[0], y


class _PairSums:
    """Sums over batches of what a `Pair` holds."""

    def __init__(self) -> None:
        self.second: Tensor | None = None
        self.cross: Tensor | None = None
        self.behind: Tensor | None = None
        self.weight = 0.0

    def add(self, x_d: Tensor, x_p: Tensor, behind: Tensor | None, weights: Tensor | None) -> None:
        """x_d and x_p (B, T, d), behind (B, T, C), weights (B, T)."""
        x_d, x_p = x_d.flatten(0, 1), x_p.flatten(0, 1)
        scaled = x_p if weights is None else x_p * weights.flatten().unsqueeze(1)
        self.weight += len(x_p) if weights is None else float(weights.sum())
        if self.second is None or self.cross is None:
            self.second = x_p.new_zeros(x_p.size(1), x_p.size(1))
            self.cross = torch.zeros_like(self.second)
            self.behind = None if behind is None else x_p.new_zeros(behind.size(-1), x_p.size(1))
        self.second.addmm_(scaled.t(), x_p)
        self.cross.addmm_(x_d.t(), scaled)
        if behind is not None and self.behind is not None:
            self.behind.addmm_(behind.flatten(0, 1).t(), scaled)

    def finish(self) -> Pair:
        assert self.second is not None and self.cross is not None
        behind = None if self.behind is None else self.behind / self.weight
        return Pair(self.second / self.weight, self.cross / self.weight, behind)
