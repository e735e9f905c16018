"""Tensors from every process to rank 0, one at a time, as bytes over the CPU: nothing is pickled, and what a GPU holds
need not fit on one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from training.distributed import Dist


def gather_rows(here: Dist, rows: Tensor, shape: torch.Size) -> Tensor | None:
    """A tensor of `shape` of which each process has some rows, on rank 0 and in host memory; elsewhere None.

    The rows are cut as torch.chunk cuts them: ceil(n / processes) each, the last processes maybe fewer or none.
    """
    if not here.is_main:
        _send(here, rows)
        return None
    whole = torch.empty(shape, dtype=rows.dtype)
    whole[: len(rows)] = rows.detach()
    each = rows_each(here, shape)
    for rank in range(1, here.world_size):
        _receive(here, rank, whole[rank * each : (rank + 1) * each])
    return whole


def rows_each(here: Dist, shape: torch.Size) -> int:
    """How many rows of a tensor of `shape` each process has, but for the last ones."""
    return -(-shape[0] // here.world_size)


def gather_entries(here: Dist, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all processes by name, on rank 0; elsewhere those given. Those of others come to host memory."""
    index = {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in entries.items()}
    everyone = here.gather(index)
    if not here.is_main:
        for value in entries.values():
            _send(here, value)
        return entries
    found = dict(entries)
    for rank in range(1, here.world_size):
        for name, (dtype, shape) in everyone[rank].items():
            found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            _receive(here, rank, found[name])
    return found


def _send(here: Dist, tensor: Tensor) -> None:
    if tensor.numel():
        dist.send(_bytes(tensor.detach().cpu().contiguous()), 0, group=here.control)


def _receive(here: Dist, rank: int, into: Tensor) -> None:
    if into.numel():
        dist.recv(_bytes(into), rank, group=here.control)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
