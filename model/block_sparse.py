"""A pruned model's linear layers without their zeros, for generation: blocks on a CPU, blocks and 2:4 on a GPU.

A decoding step reads every weight once and waits for the memory to bring it, so weights that are not there are time
that is not spent. Time of one matrix (1536, 576) in fp32, half of its 16x16 blocks kept, on one core at 20 GB/s, over
that of the dense product (0.16 ms for 1 row, 0.20 for 4, 0.40 for 8):

    rows                                         1      2      4      8
    torch.sparse_bsr_tensor (MKL)              1.38                 1.75
    a batch of products with gathered inputs   0.80                 0.81
    sums of weighted columns (this module)     0.51   0.83   1.13   1.00

The last is an embedding bag: in a row block of 16, each column of a kept block is a row of 16 numbers in a table, and
the outputs are the sum of these rows, weighted by the inputs. It reads memory in order and is split over cores by row
blocks. For 1 row it takes 0.76 with blocks of 8, 0.39 of 32, 0.33 of 64; 0.81 with 80% of 16x16 kept, 0.90 with 90%.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.gpt import GPT
from model.linear import Linear, is_decoding_step, linear
from model.masks import Mask, Masks
from model.onednn import expect_bags

_FEW = 8  # rows of input up to which the blocks are read as they lie
_LEAST_ROWS = 8  # of a block: below, the sums are too short to be quicker than the dense product
_MOST_KEPT = 0.8  # of a matrix: above, its zeros do not pay for the indices
# The matrices of a packed block, see pack.py, and the layers whose rows they are.
PACKED = {
    "qkv_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "o_proj": ("attn.o_proj",),
    "up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}


class BlockLinear(nn.Module):
    """A frozen linear layer that holds the kept blocks of its weight alone. ValueError if a weight leaves the mask."""

    def __init__(self, weight: Tensor, bias: Tensor | None, mask: Mask) -> None:
        super().__init__()
        expect_bags()
        self.out_features, self.in_features = mask.shape
        self.rows, self.columns = mask.block
        if bool((weight.detach()[~mask.dense()] != 0).any()):
            raise ValueError("a weight is not zero where its mask says so: apply the masks first")
        padding = (0, -self.in_features % self.columns, 0, -self.out_features % self.rows)
        blocks = F.pad(weight.detach(), padding).view(mask.grid[0], self.rows, mask.grid[1], self.columns)
        table = blocks.permute(0, 2, 3, 1)[mask.bits].reshape(-1, self.rows)  # (kept blocks x columns, rows)
        counts = mask.bits.sum(dim=1) * self.columns
        stored = {
            "bits": mask.bits,
            "table": table,
            "inputs": mask.bits.nonzero()[:, 1].int(),  # (kept blocks,), of which inputs, `columns` at a time
            "starts": (counts.cumsum(0) - counts).int(),  # (row blocks,), in the table
            "order": torch.arange(len(table), dtype=torch.int32, device=weight.device),  # every row of it, once
        }
        for name, tensor in stored.items():
            self.register_buffer(name, tensor, persistent=False)
        self.bits, self.table, self.inputs, self.starts, self.order = stored.values()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if is_decoding_step(x):
            return self.few_rows(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return linear(x, self.dense_weight().to(x.dtype), self.bias)

    def few_rows(self, x: Tensor) -> Tensor:
        """x (R, in), a decoding step's rows -> (R, out)."""
        if x.size(0) > _FEW or not len(self.table):
            return linear(x, self.dense_weight(), self.bias)
        y = self._from_blocks(x)
        return y if self.bias is None else y + self.bias

    def _from_blocks(self, x: Tensor) -> Tensor:
        """x (R, in) -> (R, out), each row with a bag for each row block."""
        R = x.size(0)
        missing = -self.in_features % self.columns
        by_blocks = (F.pad(x, (0, missing)) if missing else x).reshape(R, -1, self.columns)
        inputs = by_blocks.index_select(1, self.inputs).flatten()  # (R x kept blocks x columns,)
        order, starts = self.order, self.starts
        if R > 1:
            shifts = len(order) * torch.arange(R, dtype=torch.int32).unsqueeze(1)
            order, starts = order.repeat(R), (starts + shifts).flatten()
        sums = torch.embedding_bag(self.table, order, starts, False, 0, False, inputs)[0]  # (R x row blocks, rows)
        return sums.view(R, -1)[:, : self.out_features]

    def dense_weight(self) -> Tensor:
        """The weight (out, in) with its zeros."""
        row_blocks, column_blocks = self.bits.shape
        whole = self.table.new_zeros(row_blocks, self.rows, column_blocks, self.columns)
        whole.permute(0, 2, 3, 1)[self.bits] = self.table.view(-1, self.columns, self.rows)
        return whole.view(row_blocks * self.rows, -1)[: self.out_features, : self.in_features]


class LayoutLinear(nn.Module):
    """A frozen linear layer whose weight is in a layout that torch's own sparse kernels multiply, in the weight's type.

    Written for GPUs, after the documentation of torch.sparse; the 2:4 kernels have not been run for this project.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the type of x."""
        return self.few_rows(x.reshape(-1, x.size(-1))).reshape(*x.shape[:-1], -1)

    def few_rows(self, x: Tensor) -> Tensor:
        """x (R, in) -> (R, out), in the type of x."""
        y = F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def packed_masks(model: GPT) -> Masks:
    """The model's masks, and those of the matrices that packing will make of its layers; to be asked before that.

    A part without a mask counts as kept. Parts in blocks of different sizes, or whose last block goes on in the next
    part, have none together. ValueError for a dense model.
    """
    if not model.masks:
        raise ValueError("sparse weights need a pruned model with masks, this one is dense: leave weights at float32")
    masks = dict(model.masks)
    for layer in range(model.config.n_layer):
        for packed, parts in PACKED.items():
            mask = _mask_of_parts(model, [f"h.{layer}.{part}" for part in parts])
            if mask is not None:
                masks[f"h.{layer}.{packed}.weight"] = mask
    return masks


def _mask_of_parts(model: GPT, names: Sequence[str]) -> Mask | None:
    layers = dict(model.named_modules())
    shapes = {name: tuple(layers[name].weight.shape) for name in names if isinstance(layers.get(name), nn.Linear)}
    found = [model.masks[f"{name}.weight"] for name in shapes if f"{name}.weight" in model.masks]
    if not found or len({mask.block for mask in found}) > 1:
        return None
    if any(out % found[0].block[0] for out, _ in list(shapes.values())[:-1]):
        return None
    bits = [_or_all(model.masks.get(f"{name}.weight"), shape, found[0].block).bits for name, shape in shapes.items()]
    rows = sum(out for out, _ in shapes.values())
    return Mask((rows, found[0].shape[1]), found[0].block, torch.cat(bits))


def _or_all(mask: Mask | None, shape: tuple[int, int], block: tuple[int, int]) -> Mask:
    if mask is not None:
        return mask
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    return Mask(shape, block, torch.ones(grid, dtype=torch.bool))


def use_sparsity(model: GPT, masks: Masks) -> int:
    """Replaces, in place, the layers of a packed model that are quicker without their zeros; returns how many.

    masks: of `packed_masks`. ValueError where nothing can be gained, with the reason.
    """
    replaced, reasons = 0, []
    for name, module in list(model.named_modules()):
        mask = masks.get(f"{name}.weight")
        if mask is None or not isinstance(module, Linear):
            continue
        made = _sparse(module, mask) if type(module) is Linear else "LoRA has changed it: merge it first"
        if isinstance(made, str):
            reasons.append(f"{name} ({mask.pattern}): {made}")
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
        replaced += 1
    if not replaced:
        why = reasons[0] if reasons else "no layer has a mask of its own"
        raise ValueError(f"sparse weights gain nothing here: {why}; leave weights at float32")
    return replaced


def _sparse(layer: Linear, mask: Mask) -> nn.Module | str:
    """The layer that stands for a dense one, or why none does."""
    if layer.weight.is_cuda:
        made = gpu_layout(layer.weight.detach(), mask)
        return made if isinstance(made, str) else LayoutLinear(made, layer.bias)
    if mask.block[0] < _LEAST_ROWS:
        return f"a CPU multiplies blocks of at least {_LEAST_ROWS} rows"
    if mask.sparsity < 1 - _MOST_KEPT:
        return f"{mask.sparsity:.0%} zeros are too few, it takes {1 - _MOST_KEPT:.0%}"
    return BlockLinear(layer.weight, layer.bias, mask)


def gpu_layout(weight: Tensor, mask: Mask) -> Tensor | str:
    """`weight` in bf16 in the layout of a GPU's sparse kernels, or why there is none for it.

    2:4 runs on compute capability 8.0 and above (to_sparse_semi_structured), on sizes that are multiples of 32 and 64.
    Square blocks run in Triton, from 16 on and as powers of two, on sizes that are multiples of them.
    """
    out, into = mask.shape
    half = weight.to(torch.bfloat16)
    if mask.pattern == "2:4":
        if out % 32 or into % 64:
            return "the 2:4 kernel takes multiples of 32 and 64"
        if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0):
            return "2:4 needs a GPU of compute capability 8.0"
        return torch.sparse.to_sparse_semi_structured(half)
    rows, columns = mask.block
    if rows != columns or rows < 16 or rows & (rows - 1) or out % rows or into % rows:
        return "a GPU multiplies square blocks of 16, 32, 64 ... that divide the matrix, and 2:4"
    return half.to_sparse_bsr((rows, columns))
