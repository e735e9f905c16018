"""How the network of a run is spread over its processes: one object, which loop, saver and launch go through.

A strategy sees each micro-batch before its forward and after its backward, the gradients once a step, and what a
checkpoint holds. Nothing else in the project knows how many processes there are to a weight.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.loader import Batch
from model.gpt import GPT
from model.masks import apply_masks_, mask_gradients_, share_of_zeros, trained_masks
from training.distributed import Dist
from training.optimizer import Placement
from training.run_settings import RunSettings
from training.runtime import Runtime
from training.stop import StopRequest


class Parallel(Placement):
    """One process has it all. The base of the others, which change what is different with them.

    `network` is what a loss goes through. `gradient_scale` is what the loss of a micro-batch is multiplied by so that
    what `finish_gradients` leaves is the sum over all processes.
    """

    gradient_scale = 1.0
    copies = False  # whether what `whole` gives is there for nobody else

    def __init__(self, here: Dist, model: GPT) -> None:
        self.here, self.model = here, model
        self.network: nn.Module = model

    def compile(self) -> None:
        """Compile the network, in place: parameter names stay as they are. Before `wrap`."""
        self.model.compile()

    def wrap(self) -> None:
        """Make `network` of the model; once more each time that other parameters train than before."""

    def local(self, weight: Tensor) -> Tensor:
        """What this process has of a weight."""
        return weight

    def share_of_zeros(self, weight: Tensor) -> float:
        """Of the numbers of a whole weight. Every process calls it."""
        return share_of_zeros(weight)

    # -- a step ------------------------------------------------------------------------------------------------------

    def order(self, count: int) -> Sequence[int]:
        """The order in which the step's `count` micro-batches of this process are done, by number."""
        return range(count)

    def begin_micro_step(self, number: int, last: bool) -> None:
        """Before the forward of micro-batch `number`; `last` is the one with which gradients may travel."""

    def end_micro_step(self, number: int) -> None:
        """After its backward: what is in the gradients now is this micro-batch added to those before it."""

    def finish_gradients(self) -> None:
        """After the last micro-batch, before anything reads the gradients: they are those of all processes now."""

    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights: else they would count in the norm, and in Muon's update of the rest."""
        mask_gradients_(self.model, trained_masks(self.model, self.model.masks))

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` (0: leave them); returns the norm over all, as it was before."""
        parameters = list(self.model.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # A norm that is not finite counts as 0 here, which leaves the gradients as they are: they tell whose it is.
        known = norm.nan_to_num(nan=0.0, posinf=0.0)
        nn.utils.clip_grads_with_norm_(parameters, max_norm if max_norm > 0 else math.inf, known)
        return norm

    def apply_masks(self) -> None:
        """After the optimizers' step, the gradients still there: Muon makes every number of a matrix move."""
        apply_masks_(self.model, trained_masks(self.model, self.model.masks))

    # -- between steps -----------------------------------------------------------------------------------------------

    def in_step(self, batches: Iterator[Batch], stop: StopRequest) -> Iterator[Batch]:
        """The batches of an evaluation, until a stop is asked for."""
        return takewhile(lambda _: not stop.requested, batches)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, one process alone may use the model. Every process enters and leaves."""
        yield

    # -- a checkpoint ------------------------------------------------------------------------------------------------

    def whole(self, nest: dict[str, Any]) -> dict[str, Any]:
        """The nest of a checkpoint with all that is spread put together. Every process calls it, rank 0 has the result.

        What is not spread is not copied.
        """
        return nest

    def close(self) -> None:
        """After the run."""


class DataParallel(Parallel):
    """DDP: each process has all of the network, and gradients are averaged, once a step."""

    def __init__(self, here: Dist, model: GPT) -> None:
        super().__init__(here, model)
        self.gradient_scale = float(here.world_size)  # of the mean, to make it a sum

    def wrap(self) -> None:
        """DDP around the model, which expects gradients of all that trains now."""
        device = self.here.device
        ids = [device.index] if device.type == "cuda" else None
        # Buffers are masks and quantised weights, the same everywhere: not sent before each forward.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the flag's next name, which torch 2.10 does not know
            self.network = DistributedDataParallel(
                self.model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
            )

    def begin_micro_step(self, number: int, last: bool) -> None:
        """Gradients travel with the last micro-batch alone."""
        assert isinstance(self.network, DistributedDataParallel)
        self.network.require_backward_grad_sync = last


def check_parallel(settings: RunSettings, world_size: int) -> None:
    """Raises ValueError for what a strategy can not do."""
    if settings.cpu_offload and settings.parallel != "fsdp":
        raise ValueError(f"--cpu_offload: --parallel {settings.parallel} keeps weights where they compute; add fsdp")
    if not is_spread(settings, world_size):
        return
    if getattr(settings, "objective", "sft") == "grpo":
        raise ValueError(
            "--parallel fsdp: with --objective grpo each process generates at its own pace, and spread weights need "
            "all of them at each token: use --parallel zero1"
        )
    if getattr(settings, "finetune_method", "full") == "p_tuning":
        raise ValueError(
            "--parallel fsdp: with --finetune_method p_tuning keys and values leave the blocks where their weights "
            "are given up again: use --finetune_method prefix, or --parallel ddp"
        )
    if settings.optimizer == "muon":
        raise ValueError(
            "--parallel fsdp: Muon orthogonalises whole matrices, of which each process has some rows: use "
            "--parallel zero1, or --optimizer adamw"
        )


def is_spread(settings: RunSettings, world_size: int) -> bool:
    """Whether no process has the whole network. One process has it, unless its weights stay in host memory."""
    return settings.parallel == "fsdp" and (world_size > 1 or settings.cpu_offload)


def stop_of_all(settings: RunSettings, here: Dist, stop: StopRequest) -> StopRequest:
    """What an objective asks between forwards: where the network is spread, all processes leave at the same one."""
    if not is_spread(settings, here.world_size):
        return stop
    from training.fsdp import AgreedStop

    return AgreedStop(stop, here)


def choose_parallel(settings: RunSettings, here: Dist, model: GPT, beside: GPT | None, runtime: Runtime) -> Parallel:
    """The strategy of a run; `beside` is a frozen network that its objective compares with, if one does."""
    if is_spread(settings, here.world_size):
        from training.fsdp import FullySharded  # it takes 0.3 s to import, and knows this module

        return FullySharded(here, model, beside, runtime, settings.cpu_offload)
    if settings.exact:
        from training.exact import Exact, ExactShared

        shares = settings.parallel == "zero1" and here.world_size > 1
        return (ExactShared if shares else Exact)(here, model)
    if here.world_size == 1:
        return Parallel(here, model)
    if settings.parallel == "zero1":
        from training.zero import SharedOptimizer

        return SharedOptimizer(here, model)
    return DataParallel(here, model)
