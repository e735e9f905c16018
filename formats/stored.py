"""How a file of another project stores our tensors: one of theirs may hold several of ours, or one in another order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.config import GPTConfig


class Part(NamedTuple):
    """Where one of our tensors lies in a stored one: `start..stop` along its outputs, which are our rows."""

    name: str
    start: int
    stop: int


class Stored(NamedTuple):
    """A tensor of the file, by default (out, in) with its rows in our order.

    transposed: stored as (in, out), as GPT-2's Conv1D is. head_dim above 0: the rows of each head stand in the order of
    interleaved rotary positions, in which the pair (i, i + head_dim / 2) of ours lies side by side.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    transposed: bool = False
    head_dim: int = 0

    def copy_rows(self, first: int, rows: Tensor, weights: dict[str, Tensor]) -> None:
        """Copies a block of the stored tensor's rows, from row `first` on, to where it belongs in `weights`."""
        if self.head_dim:
            weights[self.parts[0].name][self._order()[first : first + len(rows)]] = rows
            return
        for name, start, stop in self.parts:
            if self.transposed:
                weights[name][:, first : first + len(rows)].copy_(rows[:, start:stop].t())
                continue
            upper, lower = min(stop, first + len(rows)), max(start, first)
            if lower < upper:  # rows of an embedding beyond the vocabulary belong to no part
                weights[name][lower - start : upper - start].copy_(rows[lower - first : upper - first])

    def assemble(self, weights: dict[str, Tensor]) -> Tensor:
        """The stored tensor made of ours: a view where it is one of ours as it lies, else a copy."""
        pieces = [weights[name][: stop - start] for name, start, stop in self.parts]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if self.head_dim:
            return whole[self._order()]
        return (whole.t() if self.transposed else whole).contiguous()

    def _order(self) -> Tensor:
        """For each row of the file, the row of ours (rows,)."""
        ours = torch.arange(self.shape[0]).view(-1, 2, self.head_dim // 2)  # (heads, half, pair)
        return ours.transpose(1, 2).flatten()  # (heads, pair, half): the halves of a pair side by side


def same(stored: str, ours: str, shape: tuple[int, ...]) -> Stored:
    """One of ours as it is."""
    return Stored(stored, shape, (Part(ours, 0, shape[0]),))


def norm(config: GPTConfig, stored: str, ours: str) -> list[Stored]:
    """A norm's gain, and its bias where the network has biases there."""
    kinds = ("weight", "bias") if config.norm_bias else ("weight",)
    return [same(f"{stored}.{kind}", f"{ours}.{kind}", (config.n_embd,)) for kind in kinds]


def linear(stored: str, ours: str, rows: int, columns: int, bias: bool) -> list[Stored]:
    """A linear layer's weight (rows, columns), and its bias if it has one."""
    weight = same(f"{stored}.weight", f"{ours}.weight", (rows, columns))
    return [weight, same(f"{stored}.bias", f"{ours}.bias", (rows,))] if bias else [weight]
