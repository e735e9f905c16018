"""How the network of a run is spread over its processes: one object, which loop, saver and launch go through.

A strategy sees each micro-batch before its forward and after its backward, the gradients once a step, and what a
checkpoint holds. Nothing else in the project knows how many processes there are to a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.gpt import GPT
from model.masks import apply_masks_, mask_gradients_, trained_masks
from training.distributed import Dist


class Parallel:
    """One process has it all. The base of the others, which change what is different with them.

    `network` is what a loss goes through. `gradient_scale` is what the loss of a micro-batch is multiplied by so that
    what `finish_gradients` leaves is the sum over all processes.
    """

    gradient_scale = 1.0

    def __init__(self, here: Dist, model: GPT) -> None:
        self.here, self.model = here, model
        self.network: nn.Module = model

    def compile(self) -> None:
        """Compile the network, in place: parameter names stay as they are. Before `wrap`."""
        self.model.compile()

    def wrap(self) -> None:
        """Make `network` of the model; once more each time that other parameters train than before."""

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

    # -- a checkpoint ------------------------------------------------------------------------------------------------

    def whole(self, nest: dict[str, Any]) -> dict[str, Any]:
        """The nest of a checkpoint with all that is spread put together. Every process calls it, rank 0 has the result.

        What is not spread is not copied.
        """
        return nest


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
        self.network = DistributedDataParallel(
            self.model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    def begin_micro_step(self, number: int, last: bool) -> None:
        """Gradients travel with the last micro-batch alone."""
        assert isinstance(self.network, DistributedDataParallel)
        self.network.require_backward_grad_sync = last


def choose_parallel(here: Dist, model: GPT) -> Parallel:
    """The strategy of a run."""
    return Parallel(here, model) if here.world_size == 1 else DataParallel(here, model)
