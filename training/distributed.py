"""The processes of a run. torchrun tells each its rank; without it there is one process and nothing to agree on."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from training.meeting import own_store
from training.peers import PeersLost, die_with_launcher
from training.wire import pack, unpack

# A peer that died or hangs is noticed after this long (NCCL's own default is 10 minutes).
TIMEOUT = timedelta(minutes=5)
MIN_TIMEOUT_S = 5  # each beats once a second: some must be missed before one counts as gone
PIECE = 64 << 20  # bytes of a tensor that are sent at once

T = TypeVar("T")


@dataclass(frozen=True)
class Dist:
    """Who this process is among all. `control` is a gloo group on the CPU for flags and counts: a question whether to
    stop must not make the host wait for the GPU's queue.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The values added up over all processes, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def total(self, *columns: list[float]) -> list[float]:
        """The sum of each column over all processes, rounded once: the same however its numbers are spread over them.

        The columns of a process are equally long. A running sum of losses, fp32 numbers of 24 bits, is exact in the 53
        bits of a double only while the sum is below 2^29 times the smallest of them, and a metric need not be so even.
        """
        (longest,) = self.max(len(columns[0]))
        padded = torch.zeros(len(columns), int(longest), dtype=torch.float64)
        for row, column in zip(padded, columns):
            row[: len(column)] = torch.tensor(column, dtype=torch.float64)
        gathered = [padded]
        if self.world_size > 1:
            gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
            dist.all_gather(gathered, padded, group=self.control)
        return [_rounded_sum(column) for column in torch.cat(gathered, dim=1).tolist()]

    def max(self, *values: float) -> list[float]:
        """The largest of each value over all processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: tuple[float, ...], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op, group=self.control)
        return [float(value) for value in tensor]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Each process's bytes in order of rank, on every process. Plain bytes: nothing is pickled between ranks."""
        if self.world_size == 1:
            return [data]
        (longest,) = self.max(len(data))
        padded = torch.zeros(8 + int(longest), dtype=torch.uint8)
        padded[:8] = torch.tensor(list(len(data).to_bytes(8, "little")), dtype=torch.uint8)
        padded[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded, group=self.control)
        lengths = [int.from_bytes(bytes(each[:8].tolist()), "little") for each in gathered]
        return [bytes(each[8 : 8 + length].tolist()) for each, length in zip(gathered, lengths)]

    def gather(self, value: Any) -> list[Any]:
        """Each process's value, plain as JSON has them, in order of rank, on every process."""
        return [json.loads(each) for each in self.gather_bytes(json.dumps(value).encode())]

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on every process: for files that only rank 0 is sure to have.

        The result is a nest as `wire.pack` takes it. A ValueError or OSError of rank 0 is raised by every process with
        the same text.
        """
        return self.from_rank(0, work)

    def from_rank(self, source: int, work: Callable[[], T]) -> T:
        """The same, from another rank than 0."""
        if self.world_size == 1:
            return work()
        if self.rank != source:
            error, value = unpack(self._pass_bytes(b"", source), lambda buffer: self._broadcast(buffer, source))
            if error is not None:
                raise (OSError if error[0] else ValueError)(error[1])
            return cast("T", value)
        try:
            value = work()
            head, buffers = pack((None, value))
        except (ValueError, OSError) as error:
            self._pass_bytes(pack(((isinstance(error, OSError), str(error)), None))[0], source)
            raise
        self._pass_bytes(head, source)
        for buffer in buffers:
            self._broadcast(buffer, source)
        return value

    def everywhere(self, work: Callable[[], T], remedy: str) -> T:
        """What `work` gives on this process. A ValueError or OSError of any process is raised by all of them.

        Where rank 0 did not meet it, the message says which machine did, and `remedy`.
        """
        failure = None
        try:
            value = work()
        except (ValueError, OSError) as error:
            failure = error
        said = [] if failure is None else [f"{failure}", socket.gethostname()]
        for rank, each in enumerate(self.gather(said)):
            if each:
                text, host = each
                if failure is not None and rank == 0 and text == f"{failure}":
                    raise failure
                raise ValueError(text if rank == 0 else f"{text} (rank {rank} on {host}: {remedy})") from failure
        return value

    def _pass_bytes(self, data: bytes, source: int) -> bytes:
        """What `source` calls this with, on every process."""
        length = torch.tensor([len(data)])
        dist.broadcast(length, source, group=self.control)
        buffer = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == source:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self._broadcast(buffer, source)
        return buffer.numpy().tobytes()

    def _broadcast(self, buffer: torch.Tensor, source: int) -> None:
        """Fill uint8 (n,) with what it holds on `source`, a piece at a time: gloo copies what it sends."""
        for piece in buffer.split(PIECE):
            if len(piece):
                dist.broadcast(piece, source, group=self.control)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier(group=self.control)


def _rounded_sum(values: list[float]) -> float:
    """As if added without rounding, rounded at the end; with infinities, of which fsum refuses some, a running sum."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def setup_distributed(device: str = "auto", timeout_s: float = TIMEOUT.total_seconds()) -> Dist:
    """Join the process group that torchrun describes, if any; gloo on a CPU, NCCL on GPUs. The others are waited for at
    least five minutes, since some machines start late; `timeout_s` is that of later exchanges (see watch_peers.py).

    Raises ValueError for a device that is not here, PeersLost where the processes do not come together.
    """
    if not timeout_s >= MIN_TIMEOUT_S:
        raise ValueError(f"--dist_timeout {timeout_s:g}: expected at least {MIN_TIMEOUT_S} seconds")
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank)
    die_with_launcher()
    if world_size == 1:
        return Dist(device=chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    wait = max(TIMEOUT, timedelta(seconds=timeout_s))
    try:
        if not dist.is_initialized():
            backend, store = "nccl" if chosen.type == "cuda" else "gloo", own_store(rank, world_size, wait)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
        control = dist.new_group(backend="gloo", timeout=wait) if chosen.type == "cuda" else dist.group.WORLD
    except dist.DistError as error:
        raise PeersLost(
            f"rank {rank} of {world_size} did not find the others within {wait.total_seconds():.0f} s: "
            f"{' '.join(str(error).split())[:300]}. Are all started, with the same rendezvous?"
        ) from error
    return Dist(rank, local_rank, world_size, chosen, control)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for a name such as auto, cpu, cuda, cuda:1 or mps; `auto` takes the GPU of this local rank."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: no CUDA GPU is visible here; use --device cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: only {torch.cuda.device_count()} GPUs are visible")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {name}: no MPS device is available here; use --device cpu")
    return device


def close_distributed(here: Dist) -> None:
    """Leave the process group."""
    if here.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()
