"""Which weights of a pruned model may differ from zero, and how that is kept true."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.quantize import QuantizedLinear

PATTERNS = ((2, 4), (4, 8))  # n kept of each m neighbours in a row: what has kernels, and its wider form
UNSTRUCTURED = "unstructured"


@dataclass(frozen=True, eq=False)
class Mask:
    """The kept weights of a matrix (out, in), a bit for each block of it.

    Blocks start at the first row and column; those at the far edges are partial where the size is no multiple. (1, 1)
    is a bit a weight, for unstructured sparsity and n:m patterns. ValueError where shape, block and bits disagree.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    bits: Tensor  # bool (ceil(out / block rows), ceil(in / block columns)), True where the block is kept

    def __post_init__(self) -> None:
        for name in ("shape", "block"):
            object.__setattr__(self, name, _two_sizes(name, getattr(self, name)))
        if self.bits.dtype != torch.bool or tuple(self.bits.shape) != self.grid:
            raise ValueError(
                f"a mask of {_by(self.shape)} in blocks of {_by(self.block)} takes {_by(self.grid)} bits, "
                f"found {_by(tuple(self.bits.shape))} of {self.bits.dtype}"
            )

    @classmethod
    def of(cls, kept: Tensor, block: tuple[int, int] = (1, 1)) -> Mask:
        """The mask with `dense()` equal to `kept`, bool (out, in). ValueError if that differs within a block."""
        if kept.dtype != torch.bool or kept.dim() != 2:
            raise ValueError(f"a mask is made of a bool matrix, found {kept.dtype} of {tuple(kept.shape)}")
        rows, columns = _two_sizes("block", block)
        mask = cls((kept.size(0), kept.size(1)), (rows, columns), kept[::rows, ::columns].clone())
        differing = (mask.dense() != kept).nonzero()
        if len(differing):
            row, column = differing[0].tolist()
            raise ValueError(
                f"the kept weights do not follow blocks of {rows}x{columns}: "
                f"that of row {row}, column {column} is only in part kept"
            )
        return mask

    @property
    def grid(self) -> tuple[int, int]:
        """How many blocks stand below and beside each other, the partial ones included."""
        (out, into), (rows, columns) = self.shape, self.block
        return -(-out // rows), -(-into // columns)

    def dense(self) -> Tensor:
        """bool (out, in), True where the weight is kept."""
        if self.block == (1, 1):
            return self.bits
        (out, into), (rows, columns) = self.shape, map(min, self.block, self.shape)  # a block may be larger
        tall = self.bits.repeat_interleave(rows, dim=0)[:out]  # (out, block columns)
        return tall.repeat_interleave(columns, dim=1)[:, :into]

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with its bits on `device`."""
        return Mask(self.shape, self.block, self.bits.to(device))

    @property
    def kept(self) -> int:
        """How many weights are kept; a partial block counts for what it has."""
        sizes = [
            (size - step * torch.arange(n)).clamp(max=step).double()  # the last block has what is left
            for size, step, n in zip(self.shape, self.block, self.grid)
        ]
        return int(sizes[0] @ self.bits.double().cpu() @ sizes[1])

    @property
    def sparsity(self) -> float:
        """The share of the weights that is not kept."""
        return 1.0 - self.kept / (self.shape[0] * self.shape[1])

    @property
    def pattern(self) -> str:
        """`16x16`, `2:4`, `4:8` or `unstructured`."""
        if self.block != (1, 1):
            return _by(self.block)
        for n, m in PATTERNS:
            if self.shape[1] % m == 0 and bool((self.bits.reshape(-1, m).sum(dim=1) == n).all()):
                return f"{n}:{m}"
        return UNSTRUCTURED

    def spec(self) -> dict[str, Any]:
        """What a file holds: shape, block, and the bits row by row, eight to a byte, the first the lowest."""
        bits = self.bits.flatten().cpu()
        eights = nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8).to(torch.uint8)
        packed = (eights << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)
        return {"shape": list(self.shape), "block": list(self.block), "bits": packed}

    @classmethod
    def from_spec(cls, spec: Any) -> Mask:
        """The mask that `spec` wrote. ValueError if it is none, or contradicts itself."""
        if not isinstance(spec, Mapping) or set(spec) != {"shape", "block", "bits"}:
            raise ValueError("a mask is stored as shape, block and bits, and as nothing else")
        shape, block = _two_sizes("shape", spec["shape"]), _two_sizes("block", spec["block"])
        packed = spec["bits"]
        rows, columns = -(-shape[0] // block[0]), -(-shape[1] // block[1])
        size = -(-rows * columns // 8)
        if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.shape != (size,):
            found = f"{packed.dtype} of {tuple(packed.shape)}" if isinstance(packed, Tensor) else type(packed).__name__
            raise ValueError(f"a mask of {_by(shape)} in blocks of {_by(block)} takes {size:,} bytes, found {found}")
        bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()
        if bits[rows * columns :].any():  # one mask, one file: and a flipped bit there is damage like any other
            raise ValueError(f"a mask of {_by(shape)} in blocks of {_by(block)} has bits set beyond its last block")
        return cls(shape, block, bits[: rows * columns].view(rows, columns))


Masks = dict[str, Mask]  # by the name of the weight: "h.3.attn.q_proj.weight"


class SparsityRow(NamedTuple):
    """What a masked weight has become."""

    weight: str
    shape: tuple[int, int]
    pattern: str  # as `Mask.pattern`
    sparsity: float  # the share of its numbers that is zero


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Mapping[str, Mask]) -> None:
    """Zeroes in place what is not kept. ValueError for a mask that fits no weight of the model.

    A quantised weight can not be written to and need not be: its kinds read an exact zero back from the code of one.
    """
    for _, weight, mask in _masked_weights(model, masks):
        if isinstance(weight, nn.Parameter):
            weight.masked_fill_(_empty(mask, weight), 0.0)


@torch.no_grad()
def mask_gradients_(model: nn.Module, masks: Mapping[str, Mask]) -> None:
    """Zeroes in place the gradients of what is not kept, so that a norm over all gradients counts only what trains."""
    for _, weight, mask in _masked_weights(model, masks):
        if weight.grad is not None:
            weight.grad.masked_fill_(_empty(mask, weight), 0.0)


def trained_masks(model: nn.Module, masks: Mapping[str, Mask]) -> Masks:
    """Those of the weights that have a gradient, which an optimizer's step is about to change."""
    parameters = dict(model.named_parameters())
    return {name: m for name, m in masks.items() if name in parameters and parameters[name].grad is not None}


def check_masks(model: nn.Module, masks: Mapping[str, Mask]) -> None:
    """ValueError naming the first weight that is not zero somewhere its mask is: sets are compared, not shares."""
    for name, weight, mask in _masked_weights(model, masks):
        _check(name, weight, mask)


def check_weights(weights: Mapping[str, Tensor], masks: Mapping[str, Mask]) -> None:
    """`check_masks` of a model that is only its weights by name, as a file holds them."""
    for name, mask in masks.items():
        if name not in weights:
            raise ValueError(f"a mask names {name}, which is no weight of this model")
        _check(name, weights[name], mask)


def share_of_zeros(weight: Tensor) -> float:
    """Of the numbers of a weight."""
    return float((weight == 0).double().mean())


def sparsity_report(
    model: nn.Module, masks: Mapping[str, Mask], zeros: Callable[[Tensor], float] = share_of_zeros
) -> list[SparsityRow]:
    """A row for each masked weight, in the model's order, with the zeros that it holds.

    `zeros` is asked for each weight's share of them, where the weight is not all here.
    """
    return [
        SparsityRow(name, mask.shape, mask.pattern, zeros(weight))
        for name, weight, mask in _masked_weights(model, masks)
    ]


def sparsity_line(rows: Sequence[SparsityRow]) -> str:
    """What a report comes to: over all of its weights, and by layer."""
    sizes = [(row, row.shape[0] * row.shape[1]) for row in rows]
    layers: dict[str, list[float]] = {}  # by layer: zeros, weights
    for row, size in sizes:
        layer = row.weight.split(".")[1] if row.weight.startswith("h.") else row.weight
        zeros, total = layers.get(layer, [0.0, 0.0])
        layers[layer] = [zeros + row.sparsity * size, total + size]
    zeros, total = (sum(column) for column in zip(*layers.values()))
    patterns = " and ".join(sorted({row.pattern for row in rows}))
    by_layer = ", ".join(f"{layer}: {100 * part / size:.0f}" for layer, (part, size) in layers.items())
    return f"{100 * zeros / total:.2f}% of {total:,.0f} masked weights are zero ({patterns}); by layer, %: {by_layer}"


def _empty(mask: Mask, weight: Tensor) -> Tensor:
    """bool (out, in), on the weight's device, True where it must be zero."""
    return ~mask.to(weight.device).dense()


def _check(name: str, weight: Tensor, mask: Mask) -> None:
    if tuple(weight.shape) != mask.shape:
        raise ValueError(f"{name} is {_by(tuple(weight.shape))}, its mask {_by(mask.shape)}")
    strays = (weight.detach() != 0) & _empty(mask, weight)
    count = int(strays.sum())
    if count:
        row, column = strays.nonzero()[0].tolist()
        raise ValueError(
            f"{name} holds {count:,} weights that its mask says are zero, the first in row {row}, column {column}"
        )


def _masked_weights(model: nn.Module, masks: Mapping[str, Mask]) -> Iterator[tuple[str, Tensor, Mask]]:
    """Name, weight (read back where it is quantised) and mask, in the model's order."""
    left = dict(masks)
    for module_name, module in model.named_modules():
        name = f"{module_name}.weight"
        if name not in left:
            continue
        mask = left.pop(name)
        weight = module.dense_weight() if isinstance(module, QuantizedLinear) else module.weight
        if tuple(weight.shape) != mask.shape:
            raise ValueError(f"{name} is {_by(tuple(weight.shape))}, its mask {_by(mask.shape)}")
        yield name, weight, mask
    if left:
        raise ValueError(f"a mask names {next(iter(left))}, which is no weight of this model")


def _two_sizes(name: str, value: Any) -> tuple[int, int]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(sizes) != 2 or not all(type(size) is int and 1 <= size < 1 << 31 for size in sizes):
        raise ValueError(
            f"a mask's {name} is {' '.join(repr(value).split())[:80]}: give two whole numbers of at least 1"
        )
    return sizes[0], sizes[1]


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
