"""Beyond one machine: memory of each GPU, traffic of each step, and how often to save, worked out before renting any.

All of the P parameters train, with AdamW under mixed precision. Memory is that of `--plan` (training/plan.py), which
training/shares.py shares out: weights 4 P, their 16-bit copy 2 P, gradients 4 P, AdamW 8 P under ddp; zero1 and fsdp on
n GPUs; hsdp as fsdp with n = the GPUs of one machine: shards within it, copies between machines (a mesh of two axes).

    traffic of a step, sent and received by each GPU (ring algorithms): an all-reduce of b bytes moves 2 b (n - 1) / n,
    a reduce-scatter or an all-gather half of that. ddp reduces 4 P; zero1 scatters 4 P and gathers 4 P, as much; fsdp
    gathers 2 P for forward and again for backward of each micro-batch, and scatters 4 P once a step, or of more than a
    billion parameters with each micro-batch; hsdp does that within the machine and reduces its share of the gradients,
    4 P / 8, between machines

Failures come at random, each GPU's at a rate of 1 / mtbf. Saving every T seconds at a cost of d, the work lost and the
time spent saving are smallest near T = sqrt(2 d M), M = mtbf / n (Young 1974); Daly (2006) adds terms that matter when
d is not small beside M. `simulate` plays failures out, to check both. Nothing here was measured on a cluster.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from model.config import GPTConfig
from training.plan import plan_memory
from training.run_settings import TrainSettings
from training.shares import adds_up_whole

STRATEGIES = ("ddp", "zero1", "fsdp", "hsdp")


@dataclass(frozen=True)
class Cluster:
    """What the GPUs and the wires between them do. The defaults are an H100 node with NVLink inside, 400 Gb/s out."""

    gpus: int
    memory: float = 80e9  # bytes of a GPU
    flops: float = 989e12 * 0.4  # a second, of bf16, at a utilisation that small GPTs reach
    inside: float = 450e9  # bytes a second of a GPU to others of its machine, one direction
    outside: float = 50e9  # the same to other machines
    per_machine: int = 8
    disk: float = 2e9  # bytes a second of the store that checkpoints go to
    mtbf: float = 50_000 * 3600.0  # seconds between failures of one GPU and its share of the machine
    restart: float = 300.0  # seconds from a failure to the first step after it

    @property
    def mean_time_to_failure(self) -> float:
        """Seconds until any of the GPUs fails."""
        return self.mtbf / self.gpus


@dataclass(frozen=True)
class ScalePlan:
    """Of one strategy on a cluster; bytes, seconds."""

    strategy: str
    parameters: int
    memory: float  # on each GPU
    fits: bool  # in 90% of the GPU's
    inside: float  # bytes that a step moves through each GPU, within its machine
    outside: float  # and between machines
    compute_s: float
    traffic_s: float

    @property
    def efficiency(self) -> float:
        """Share of the step in which the GPUs compute, at best.

        Gradients travel during backward, two thirds of the computing; shards are fetched ahead during all of it.
        """
        hidden = self.compute_s * (1.0 if self.strategy in ("fsdp", "hsdp") else 2 / 3)
        return self.compute_s / (self.compute_s + max(0.0, self.traffic_s - hidden))


def plan_scale(
    config: GPTConfig,
    cluster: Cluster,
    strategy: str,
    *,
    batch_size: int,
    grad_accum: int,
    gradient_checkpointing: bool = False,
) -> ScalePlan:
    """One step of `grad_accum` micro-batches of `batch_size` rows on each GPU. ValueError for an unknown strategy."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    settings = TrainSettings(
        batch_size=batch_size,
        block_size=config.block_size,
        grad_accum_steps=grad_accum,
        dtype="bfloat16",
        gradient_checkpointing=gradient_checkpointing,
    )
    settings.parallel = "fsdp" if strategy == "hsdp" else strategy  # type: ignore[assignment]
    machine = min(cluster.gpus, cluster.per_machine)
    plan = plan_memory(settings, config, "cuda", machine if strategy == "hsdp" else cluster.gpus)
    P, memory = plan.parameters, plan.total
    tokens, per_token = batch_size * grad_accum * config.block_size, 8 * P if gradient_checkpointing else 6 * P
    sharded = 4 * P * grad_accum + 4 * P * (1 if adds_up_whole(P, offload=False) else grad_accum)
    inside, outside = {
        "fsdp": _ring(sharded, cluster.gpus, cluster),
        "hsdp": (sharded * (1 - 1 / machine), 8 * P / machine * (1 - machine / cluster.gpus)),
    }.get(strategy, _ring(8 * P, cluster.gpus, cluster))
    return ScalePlan(
        strategy=strategy,
        parameters=P,
        memory=memory,
        fits=memory < 0.9 * cluster.memory,
        inside=inside,
        outside=outside,
        compute_s=per_token * tokens / cluster.flops,
        traffic_s=inside / cluster.inside + outside / cluster.outside,
    )


def _ring(size: float, gpus: int, cluster: Cluster) -> tuple[float, float]:
    """(within machines, between them) of what a ring over all GPUs moves: its slowest wire sets the pace of all."""
    moved = size * (1 - 1 / gpus)
    return (moved, 0.0) if gpus <= cluster.per_machine else (0.0, moved)


def checkpoint_bytes(parameters: int) -> int:
    """A full checkpoint: fp32 weights and AdamW's two numbers for each."""
    return 12 * parameters


def young_interval(cost: float, mean_time: float) -> float:
    """Seconds of work between saves that take `cost` seconds: sqrt(2 d M) (Young 1974)."""
    return math.sqrt(2 * cost * mean_time)


def daly_interval(cost: float, mean_time: float) -> float:
    """The same with Daly's higher orders (2006, eq. 37); M itself where saving takes more than 2 M."""
    if cost >= 2 * mean_time:
        return mean_time
    x = cost / (2 * mean_time)
    return young_interval(cost, mean_time) * (1 + math.sqrt(x) / 3 + x / 9) - cost


def goodput(interval: float, cost: float, restart: float, mean_time: float) -> float:
    """Share of the time that is work which stays (Daly 2006, eq. 20): failures may also hit saves and restarts."""
    M = mean_time
    return interval / (M * math.exp(restart / M) * math.expm1((interval + cost) / M))


def simulate(
    interval: float, cost: float, restart: float, mean_time: float, work: float, seed: int = 0
) -> tuple[float, int]:
    """(share of the time that is work which stays, failures) of a run that has `work` seconds to do, played out.

    A save blocks for `cost`; a failure loses all since the last save that was complete, and costs a restart, which can
    fail too.
    """
    draws = random.Random(seed)
    clock, done, failures = 0.0, 0.0, 0
    failure = draws.expovariate(1 / mean_time)
    while done < work:
        piece = min(interval, work - done)
        end = clock + piece + cost
        if end <= failure:
            clock, done = end, done + piece
            continue
        while failure < end:  # lost; restarts until one is through
            failures += 1
            clock = end = failure + restart
            failure += draws.expovariate(1 / mean_time)
    return done / clock, failures
