"""fsdp: weights, gradients and optimizer state spread over the processes (ZeRO stage 3), by torch's `fully_shard`.

Each process has some rows of every weight. A block's weights are put together for its forward, and again for its
backward, and given up in between; what belongs to no block (embeddings, head, last norm) stays from forward to
backward. All processes must therefore go through the network together, also where one of them has nothing to do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from data.loader import IGNORED, Batch
from model.gpt import GPT
from model.masks import trained_masks
from training.distributed import Dist
from training.gathering import gather_rows, rows_each
from training.parallel import Parallel
from training.runtime import Runtime
from training.shares import adds_up_whole
from training.stop import StopRequest


class FullySharded(Parallel):
    """Rows of each weight on each process, and of its gradient and its optimizer's state.

    `beside` is a frozen network that the objective compares with; it is spread too. `offload` keeps the rows in host
    memory, where the optimizer steps them.
    """

    copies = True

    def __init__(self, here: Dist, model: GPT, beside: GPT | None, runtime: Runtime, offload: bool) -> None:
        super().__init__(here, model)
        if runtime.dtype is torch.float16:
            raise ValueError(
                "--parallel fsdp: float16 needs its loss scaled, which each process would decide by its own rows: "
                "use --dtype bfloat16 or float32, or --parallel zero1"
            )
        if not hasattr(FSDPModule, "reset_iter_state"):
            raise ValueError(f"--parallel fsdp needs torch 2.13, this is {torch.__version__}: use --parallel zero1")
        self.runtime, self.offload = runtime, offload
        self.gradient_scale = float(here.world_size)  # gradients are averaged
        if here.device.type == "cuda":
            torch.cuda.set_device(here.device)
        self._alone = not dist.is_initialized()
        if self._alone:  # one process, for the sake of `offload`
            backend = "nccl" if here.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self._mesh = init_device_mesh(here.device.type, (here.world_size,))
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # none is changed in place
        self._was_used = False  # nothing can be forgotten before the first forward
        self._networks = [model] if beside is None else [model, beside]
        for network in self._networks:
            self._shard(network)

    def _shard(self, network: GPT) -> None:
        """Block by block, so that no more than one of them is whole on a GPU that has room for shards only.

        Under autocast the blocks' weights travel in its type. What belongs to no block stays in fp32, and with it the
        stream that the embeddings begin: DDP computes with the same numbers, but for the blocks' gains and biases.
        """
        cpu = self.here.device.type == "cpu"
        policy = CPUOffloadPolicy(pin_memory=not cpu) if self.offload else OffloadPolicy()
        plain = MixedPrecisionPolicy(cast_forward_inputs=False)
        precision = plain
        if self.runtime.mixed:
            precision = MixedPrecisionPolicy(self.runtime.dtype, torch.float32, cast_forward_inputs=False)
        for block in network.h:
            for norm in block.modules() if self.runtime.mixed else ():
                if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
                    norm.forward = MethodType(_norm, norm)  # type: ignore[method-assign]
            fully_shard(block, mesh=self._mesh, mp_policy=precision, offload_policy=policy)
        fully_shard(network, mesh=self._mesh, mp_policy=plain, offload_policy=policy)
        network.computes_on = self.here.device

    def compile(self) -> None:
        """Each block's forward: what puts its weights together stays outside."""
        for block in self.model.h:
            block.forward = torch.compile(block.forward)

    def wrap(self) -> None:
        """Tell each module which of its weights train now: it learns it when it puts them together."""
        for module in self._modules():
            module.unshard()
            module.reshard()
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        self._sends_once = adds_up_whole(trainable, self.offload)

    def _forget_forwards(self) -> None:
        """After forwards without a backward: give up what is whole, and the order in which a backward would fetch it.

        Else a process that generates alone would fetch the blocks of the next backward in an order of its own.
        """
        for network in self._networks:
            assert isinstance(network, FSDPModule)
            network.reset_iter_state()

    def _modules(self) -> list[FSDPModule]:
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    def local(self, weight: Tensor) -> Tensor:
        """This process's rows of a weight."""
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def share_of_zeros(self, weight: Tensor) -> float:
        """Of all processes' rows."""
        if not isinstance(weight, DTensor):  # quantised: each process has all of it
            return super().share_of_zeros(weight)
        (zeros,) = self.here.sum(float((self.local(weight) == 0).sum()))
        return zeros / weight.numel()

    # -- a step ------------------------------------------------------------------------------------------------------

    def order(self, count: int) -> Sequence[int]:
        """As it stands; what a reference has read for the step is over now."""
        if self._was_used:
            self._forget_forwards()
        return super().order(count)

    def begin_micro_step(self, number: int, last: bool) -> None:
        """Gradients are added up whole until the last micro-batch, then sent once; large ones are sent each time."""
        root, self._was_used = self.model, True
        assert isinstance(root, FSDPModule)
        root.set_requires_gradient_sync(last or not self._sends_once)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """The same on this process's rows."""
        for parameter, empty in self._masked():
            assert parameter.grad is not None
            self.local(parameter.grad).masked_fill_(empty, 0.0)

    @torch.no_grad()
    def apply_masks(self) -> None:
        """The same on this process's rows."""
        for parameter, empty in self._masked():
            self.local(parameter).masked_fill_(empty, 0.0)

    def _masked(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each pruned weight that trains, with bool (rows, in): which of its numbers here must be zero."""
        parameters = dict(self.model.named_parameters())
        for name, mask in trained_masks(self.model, self.model.masks).items():
            parameter = parameters[name]
            rows = self.local(parameter)
            first = self.here.rank * rows_each(self.here, parameter.shape)
            yield parameter, ~mask.dense()[first : first + len(rows)].to(rows.device)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """The norm is that of all rows of all processes."""
        gradients = [self.local(p.grad) for p in self.model.parameters() if p.grad is not None]
        own = float(nn.utils.get_total_norm(gradients))
        norm = math.sqrt(self.here.sum(own * own)[0])
        if math.isfinite(norm) and norm + 1e-6 > max_norm > 0:
            torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
        return torch.tensor(norm)

    # -- between steps -----------------------------------------------------------------------------------------------

    def in_step(self, batches: Iterator[Batch], stop: StopRequest) -> Iterator[Batch]:
        """As many batches on each process: where one has no more, blank ones, in which nothing counts."""
        while True:
            batch = next(batches, None)
            stopped, more = self.here.max(float(stop.requested), float(batch is not None))
            if stopped or not more:
                break
            self._was_used = True
            yield _blank() if batch is None else batch
            self._forget_forwards()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights are whole on every process meanwhile, in the type in which they compute."""
        root = self.model
        assert isinstance(root, FSDPModule)
        root.set_reshard_after_forward(False)
        for module in self._modules():
            module.unshard()
        try:
            # Compiled code of the blocks is for batches: each new length would be compiled.
            with self.runtime.autocast(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            root.set_reshard_after_forward(True)
            root.set_reshard_after_forward(False, recurse=False)
            self._forget_forwards()

    # -- a checkpoint ------------------------------------------------------------------------------------------------

    def place(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """This process's rows of a state that has a number for each of the parameter's; all of any other."""
        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return super().place(value, parameter)
        each = rows_each(self.here, parameter.shape)
        rows = value[self.here.rank * each : (self.here.rank + 1) * each]
        rows = rows.to(parameter.to_local().device, copy=True)
        return DTensor.from_local(
            rows, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )

    def whole(self, nest: dict[str, Any]) -> dict[str, Any]:
        """Tensor by tensor to rank 0, into host memory."""
        gathered: dict[str, Any] = self._whole(nest)
        return gathered

    def _whole(self, value: Any) -> Any:
        if isinstance(value, DTensor):
            return gather_rows(self.here, value.to_local(), value.shape)
        if isinstance(value, Tensor):
            return value.detach().cpu().clone() if self.here.is_main else None
        if isinstance(value, dict):
            return {key: self._whole(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._whole(inner) for inner in value)
        return value

    def close(self) -> None:
        """Leave the process group, where it is one of this process alone."""
        if self._alone and dist.is_initialized():
            dist.destroy_process_group()


def _norm(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    """The norm of an fp32 stream x (..., C) by gains that came in 16 bits: kernels want both in one type."""
    gain = norm.weight.to(x.dtype)
    if isinstance(norm, nn.RMSNorm):
        return F.rms_norm(x, norm.normalized_shape, gain, norm.eps)
    bias = None if norm.bias is None else norm.bias.to(x.dtype)
    return F.layer_norm(x, norm.normalized_shape, gain, bias, norm.eps)


def _blank() -> Batch:
    """Two rows, which are a pair too, of one token each; no sample, nothing supervised."""
    inputs = torch.zeros(2, 1, dtype=torch.int64)
    return Batch(inputs, torch.full_like(inputs, IGNORED), None, None, [])


class AgreedStop(StopRequest):
    """A stop that all processes see at the same question, which each of them must ask as often."""

    def __init__(self, stop: StopRequest, here: Dist) -> None:
        super().__init__()
        self._stop, self._here = stop, here

    @property
    def requested(self) -> bool:
        """Whether any process was asked to stop."""
        (wish,) = self._here.max(float(self._stop.requested))
        return wish > 0
