"""What each process has of a network's memory, by the way it is spread (--parallel). Bytes, on n processes:

ddp     all of it
zero1   all, but the optimizer's state / n
fsdp    1 / n of weights, gradients and optimizer state, but all of what is quantised; whole at a time: the weights of
        two of the widest blocks, and in fp32 of what is in no block; the gradients of a block, or of the latter.
        Gradients of micro-batches before stay whole where they are few (`adds_up_whole`), else they are shared out as
        well. With --cpu_offload the n-th parts are in host memory, and what is whole alone on the GPU
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from model.gpt import GPT

# Numbers up to which fsdp adds up whole gradients over a step's micro-batches and sends them once. They are 4 GB then;
# beyond, what is saved in traffic costs the memory that spreading was for.
WHOLE_GRADIENTS = 1_000_000_000


def adds_up_whole(trainable: int, offload: bool) -> bool:
    """Whether fsdp sends a step's gradients once, not with each micro-batch."""
    return trainable <= WHOLE_GRADIENTS and not offload


@dataclass(frozen=True)
class Share:
    """Of one of `processes`. `way` is fsdp only where something is spread; one process shares nothing out."""

    way: str = "ddp"
    processes: int = 1
    offload: bool = False  # the n-th parts are not on the device
    whole: int = 0  # bytes of weights that are whole at a time
    largest: int = 0  # numbers of which the gradients are

    @classmethod
    def of(cls, model: GPT, way: str, processes: int, offload: bool, size: int) -> Share:
        """The share of this network; `size`: bytes of a number of a block's weights where they are whole."""
        if way != "fsdp":
            return cls(way, processes)
        in_blocks = [_numbers(block) for block in model.h]
        outside = _numbers(model) - sum(in_blocks)
        return cls(
            way,
            processes,
            offload,
            whole=size * 2 * max(in_blocks) + 4 * outside,
            largest=max(outside, *in_blocks),
        )

    def weights(self, size: int) -> int:
        """Of `size` bytes of parameters."""
        return self.whole + self._part(size) if self.way == "fsdp" else size

    def optimizer(self, size: int) -> int:
        """Of `size` bytes of its state."""
        if self.way == "zero1":
            return -(-size // self.processes)
        return self._part(size) if self.way == "fsdp" else size

    def gradients(self, trainable: int) -> int:
        """Of these numbers, at the end of backward."""
        return self._part(4 * trainable) + 4 * min(self.largest, trainable) if self.way == "fsdp" else 4 * trainable

    def earlier(self, trainable: int) -> int:
        """Of these numbers, from micro-batches before."""
        shared_out = self.way == "fsdp" and not adds_up_whole(trainable, self.offload)
        return self._part(4 * trainable) if shared_out else 4 * trainable

    def _part(self, size: int) -> int:
        return 0 if self.offload else -(-size // self.processes)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
