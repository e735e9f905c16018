"""The part of a batch that its loss depends on, as one row of sequences of different lengths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """N positions of a batch (B, T), sequence after sequence; nothing attends from one to another."""

    index: Tensor  # (N,), places in the flattened batch
    lengths: list[int]  # of the sequences; their sum is N

    def take(self, values: Tensor) -> Tensor:
        """values (B, T) -> (1, N)."""
        return values.flatten()[self.index].unsqueeze(0)

    def put_back(self, values: Tensor, shape: torch.Size) -> Tensor:
        """values (N,) -> (B, T), 0 where nothing was taken from."""
        return values.new_zeros(shape).flatten().index_copy(0, self.index, values).view(shape)


def needed(targets: Tensor, doc_ids: Tensor | None) -> Ragged | None:
    """What the loss of targets (B, T) depends on; None if that is every position, or there is no loss.

    A sequence is a row, or a record in it where doc_ids (B, T) are given. Attention is causal, so nothing after its
    last supervised position counts: padding, a prompt whose answer was cut off. In batches of four records, padded to
    the longest, that is 4 slots of 10.
    """
    B, T = targets.shape
    supervised = targets >= 0
    if doc_ids is None and bool(supervised[:, -1].all()):
        return None
    places = torch.arange(B * T, device=targets.device)
    starts = places % T == 0
    if doc_ids is not None:
        starts |= torch.cat((doc_ids.new_ones(B, 1), doc_ids.diff(dim=1)), dim=1).flatten().bool()
    sequence = starts.cumsum(0) - 1  # (B T,), which one a position is of
    last = torch.full((int(sequence[-1]) + 1,), -1, device=places.device)
    last = last.scatter_reduce(0, sequence, torch.where(supervised.flatten(), places, -1), "amax")
    index = torch.nonzero(places <= last[sequence]).squeeze(1)
    lengths: list[int] = torch.unique_consecutive(sequence[index], return_counts=True)[1].tolist()
    return Ragged(index, lengths) if lengths else None
