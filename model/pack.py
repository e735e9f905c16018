"""A model made ready for generation: blocks that only infer, in as few operations as they need, on request in int8."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import AttentionInputs, attend, norm_heads
from model.block_sparse import packed_masks, use_sparsity
from model.gpt import GPT, Block
from model.linear import Linear, is_decoding_step
from model.quantize import QuantizedLinear, quantize_blocks
from model.rope import apply_rope

WEIGHTS = ("float32", "int8", "sparse")


def for_generation(model: GPT, weights: str = "float32") -> GPT:
    """Changes `model` in place so that a decoding step is quick; it then only infers, and its state has other names.

    A step reads every matrix once, so int8 is quicker by its bytes; the embedding, of which a step reads a row, and the
    norms stay as they are. sparse leaves the zeros of a pruned model out, see block_sparse.py. ValueError for unknown
    `weights`, int8 where LoRA has changed the layers (merge it first), or sparse where there is nothing to be gained.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r}: choose one of {', '.join(WEIGHTS)}")
    masks = packed_masks(model) if weights == "sparse" else {}
    pack(model)
    if weights == "sparse":
        use_sparsity(model, masks)
    if weights == "int8":
        if not all(isinstance(block, PackedBlock) for block in model.h):
            raise ValueError("int8 weights need a model without an adapter: merge it first (export.py merge)")
        quantize_blocks(model, "int8")
        head = nn.Linear(model.config.n_embd, model.config.padded_vocab_size, bias=False, device="meta")
        head.weight = nn.Parameter(model.head_weight.detach(), requires_grad=False)
        model.head = QuantizedLinear(head, "int8")
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                layer.reads_codes = True
    if weights != "float32":
        _return_freed_memory()
    return model


def _return_freed_memory() -> None:
    """What the layers that were replaced took goes back to the system. glibc keeps it otherwise.

    SmolLM2-135M holds 450 MB in int8 after it and 757 without it, in 16x16 blocks at 50% 540 and 817.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def pack(model: GPT) -> GPT:
    """Replaces every block by a `PackedBlock`, in place, one after the other: memory holds one block twice at most.

    Blocks that something was added to (LoRA, adapters) or that are quantised stay as they are.
    """
    for layer, block in enumerate(model.h):
        if isinstance(block, Block) and _is_plain(block):
            model.h[layer] = PackedBlock(block)
    return model.requires_grad_(False)


class PackedBlock(nn.Module):
    """A block for generation: q, k and v are one matrix, gate and up another, and nothing is computed twice.

    A decoding step of SmolLM2-135M is some 5 ms of small operations beside its products (30 layers, 15 us an operation
    with its module's call): q and k are turned together, rows stay two-dimensional between the products, and whether
    they are few is asked once a block.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        attention, mlp = block.attn, block.mlp
        self.qkv_proj: nn.Module | None = None
        if attention is not None:
            self.layer, self.head_dim = attention.layer, attention.head_dim
            self.n_head, self.n_kv_head = attention.heads[:2]
            self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
            self.qkv_proj = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
            self.o_proj = attention.o_proj
        self.up_proj: nn.Module | None = None
        if mlp is not None:
            self.gated = mlp.gate_proj is not None
            self.up_proj = mlp.up_proj if mlp.gate_proj is None else _joined([mlp.gate_proj, mlp.up_proj])
            self.down_proj = mlp.down_proj

    def forward(self, x: Tensor, shared: AttentionInputs) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        few = is_decoding_step(x)
        rows = x.flatten(0, 1)  # (B T, C)
        if self.qkv_proj is not None:
            rows = rows + self._attention(rows, x.size(1), shared, few)
        if self.up_proj is not None:
            rows = rows + self._mlp(rows, few)
        return rows.view_as(x)

    def _attention(self, rows: Tensor, T: int, shared: AttentionInputs, few: bool) -> Tensor:
        """rows (B T, C) -> (B T, C)."""
        parts: dict[str, Any] = self._modules  # a child's own name costs a search through three dictionaries
        turning = self.n_head + self.n_kv_head
        qkv = _multiply(parts["qkv_proj"], _normalise(parts["ln_1"], rows), few)
        # (B, T, heads of all three, head_dim), from an int8 product's bf16 back to what the cache holds
        qkv = qkv.to(rows.dtype).view(-1, T, turning + self.n_kv_head, self.head_dim)
        turned, v = qkv.narrow(2, 0, turning), qkv.narrow(2, turning, self.n_kv_head)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = turned.split([self.n_head, self.n_kv_head], dim=2)
            turned = torch.cat((norm_heads(q, self.q_norm), norm_heads(k, self.k_norm)), dim=2)
        if shared.rope is not None:
            turned = apply_rope(turned, shared.rope)
        turned, v = turned.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        q, k = turned.narrow(1, 0, self.n_head), turned.narrow(1, self.n_head, self.n_kv_head)
        if shared.cache is not None:
            k, v = shared.cache.append(self.layer, k, v)  # (B, n_kv_head, S, head_dim)
        y = attend(q, k, v, shared.mask, 0.0)
        return _multiply(parts["o_proj"], y.transpose(1, 2).reshape(len(rows), -1), few)

    def _mlp(self, rows: Tensor, few: bool) -> Tensor:
        """rows (B T, C) -> (B T, C), or that in bf16 from an int8 product, which the sum then widens."""
        parts: dict[str, Any] = self._modules
        up = _multiply(parts["up_proj"], _normalise(parts["ln_2"], rows), few)
        if self.gated:
            gate, up = up.chunk(2, dim=-1)
            return _multiply(parts["down_proj"], F.silu(gate).mul_(up), few)
        return _multiply(parts["down_proj"], F.gelu(up, approximate="tanh"), few)


def _normalise(norm: Any, rows: Tensor) -> Tensor:
    """`norm` of rows (R, C), without its module's call where that is most of the time."""
    if type(norm) is not nn.RMSNorm:
        normed: Tensor = norm(rows)
        return normed
    return torch.rms_norm(rows, norm.normalized_shape, norm._parameters["weight"], norm.eps)


def _multiply(layer: Any, rows: Tensor, few: bool) -> Tensor:
    product: Tensor = layer.few_rows(rows) if few else layer.forward(rows)
    return product


@torch.no_grad()
def _joined(layers: Sequence[Linear]) -> Linear:
    """One layer whose rows are those of all."""
    joined = Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=False, device="meta")
    joined.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if layers[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return joined


def _is_plain(block: Block) -> bool:
    """Whether the block is as it was made: plain layers, and nothing that listens to what they give."""
    made = {"", "attn", "mlp"}
    for name, module in block.named_modules():
        plain = (
            type(module) is Linear or name.rpartition(".")[2].startswith(("ln_", "q_norm", "k_norm")) or name in made
        )
        if not plain or module._forward_hooks:
            return False
    return True
