"""Gradients summed in an order that no number of processes changes, so that 1, 2 and 4 of them end with the same bits.

Floating-point addition commutes but does not associate: what must be fixed is which partial sums are added. Micro-batch
a of rank r is number g = a W + r of the step's n, as the loader hands them out. Recursive halving over these numbers,

    x[g] += x[g + n/2] for g < n/2,   x[g] += x[g + n/4] for g < n/4,   ...   x[0] += x[1],

adds numbers of one rank as long as they are W apart or more, a to a + A/2, a + A/4 and so on, and of ranks r and
r + W/2, r + W/4 and so on in its last log2 W levels. Whatever power of two W is, it is the same tree.

A rank that takes its micro-batches in the order of their reversed bits meets the two halves of each sum one after the
other, so a binary counter adds them up with log2 A gradients waiting (Higham 1993 calls the tree pairwise summation).
Between ranks it is the recursive doubling of all-reduce (Thakur, Rabenseifner and Gropp 2005): at each level partners
swap what they have, and both add the same two numbers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.gpt import GPT
from training.distributed import Dist
from training.parallel import Parallel
from training.zero import SharedOptimizer


def reversed_bits(count: int) -> list[int]:
    """0 to count - 1, a power of two, in the order of their reversed bits: 0 4 2 6 1 5 3 7."""
    order = [0]
    while len(order) < count:
        order = [2 * each for each in order] + [2 * each + 1 for each in order]
    return order


class BinaryCounter:
    """The sum of lists of tensors, added in pairs of equal size as a binary counter carries. It keeps the lists."""

    def __init__(self) -> None:
        self.waiting: list[list[Tensor]] = []  # sums of 2^k lists each, every k at most once, the largest first
        self.count = 0

    def add(self, tensors: list[Tensor]) -> None:
        """One list more, of tensors like those before."""
        self.count += 1
        carries = (self.count & -self.count).bit_length() - 1  # the zeros at the end of the new count
        for _ in range(carries):
            tensors = add_up(self.waiting.pop(), tensors)
        self.waiting.append(tensors)

    def total(self) -> list[Tensor]:
        """The sum of all, a power of two of them."""
        (tensors,) = self.waiting
        return tensors


def add_up(sums: list[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """sums + tensors, in place of the former."""
    for mine, other in zip(sums, tensors):
        mine.add_(other)
    return sums


class Exact(Parallel):
    """Each process has all of the network; gradients of micro-batches are kept apart, then added by the tree above.

    In place of one gradient there are log2 A waiting beside the one in the making, and two while ranks swap theirs.
    """

    def __init__(self, here: Dist, model: GPT) -> None:
        super().__init__(here, model)
        self.gradient_scale = 1.0
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it is first used
        # Else all new memory would be written once, to show kernels that read it before they write it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self._trained: list[nn.Parameter] = []
        self._sums = BinaryCounter()

    def wrap(self) -> None:
        """The model as it is: DDP would add gradients up within backward."""

    def order(self, count: int) -> Sequence[int]:
        """Reversed bits. A step begins: what a stop left of another is dropped."""
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._sums = BinaryCounter()
        return reversed_bits(count)

    def begin_micro_step(self, number: int, last: bool) -> None:
        """From here to the end of backward, kernels that give the same bits each time.

        A GPU's fastest index_add_ and attention do not. Not beyond: drawing from a distribution has none on a GPU.
        """
        torch.use_deterministic_algorithms(True)

    def end_micro_step(self, number: int) -> None:
        """The gradient of this micro-batch alone joins the sums."""
        torch.use_deterministic_algorithms(False)
        # A parameter that the micro-batch did not use: ranks must have the same tensors to swap.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trained]
        self._sums.add(gradients)
        for parameter in self._trained:
            parameter.grad = None

    def finish_gradients(self) -> None:
        """The last levels of the tree: ranks that are W/2, W/4, ... 1 apart."""
        sums, apart = self._sums.total(), self.here.world_size // 2
        while apart:
            theirs = [torch.empty_like(tensor) for tensor in sums]
            partner = self.here.rank ^ apart
            swaps = [dist.P2POp(dist.isend, tensor, partner) for tensor in sums]
            swaps += [dist.P2POp(dist.irecv, tensor, partner) for tensor in theirs]
            for swap in dist.batch_isend_irecv(swaps):
                swap.wait()
            sums = add_up(sums, theirs)
            apart //= 2
        for parameter, gradient in zip(self._trained, sums):
            parameter.grad = gradient
        self._sums = BinaryCounter()


class ExactShared(Exact, SharedOptimizer):
    """The same with zero1's optimizers: parameters are stepped each on its own, so that it matters not where."""
