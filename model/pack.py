"""A model made ready for generation: matrices that read the same input joined, and on request all of them in int8."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from model.gpt import GPT, Block
from model.linear import Linear
from model.quantize import QuantizedLinear, quantize_blocks

WEIGHTS = ("float32", "int8")


def for_generation(model: GPT, weights: str = "float32") -> GPT:
    """Changes `model` in place so that a decoding step is quick; it then only infers, and its state has other names.

    A step reads every matrix once, so int8 is quicker by its bytes; the embedding, of which a step reads a row, and the
    norms stay as they are. ValueError for unknown `weights`, or int8 where LoRA has changed the layers: merge it first.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r}: choose one of {', '.join(WEIGHTS)}")
    pack(model)
    if weights == "int8":
        if any(not _is_plain(layer) for block in model.h for layer in block.modules() if isinstance(layer, nn.Linear)):
            raise ValueError("int8 weights need a model without an adapter: merge it first (export.py merge)")
        quantize_blocks(model, "int8")
        head = nn.Linear(model.config.n_embd, model.config.padded_vocab_size, bias=False, device="meta")
        head.weight = nn.Parameter(model.head_weight.detach(), requires_grad=False)
        model.head = QuantizedLinear(head, "int8")
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                layer.reads_codes = True
    return model


def pack(model: GPT) -> GPT:
    """Joins q, k, v and gate, up of every block, in place: in a decoding step of SmolLM2-135M 10% of its time.

    One group of layers after the other, so that memory holds one joined matrix twice at most. Layers that something was
    added to (LoRA) or that are quantised stay as they are.
    """
    for block in model.h:
        assert isinstance(block, Block)
        attention, mlp = block.attn, block.mlp
        if attention is not None:
            attention.qkv_proj = _joined(attention, ("q_proj", "k_proj", "v_proj"))
        if mlp is not None and mlp.gate_proj is not None:
            mlp.gate_up_proj = _joined(mlp, ("gate_proj", "up_proj"))
    return model.requires_grad_(False)


@torch.no_grad()
def _joined(owner: nn.Module, names: Sequence[str]) -> Linear | None:
    """One layer whose rows are those of the named ones, which go away; None where they are not all plain."""
    found = [owner.get_submodule(name) for name in names]
    layers = [layer for layer in found if isinstance(layer, Linear)]
    if not all(map(_is_plain, found)):
        return None
    weights = [layer.weight for layer in layers]
    joined = Linear(weights[0].size(1), sum(map(len, weights)), bias=layers[0].bias is not None, device="meta")
    joined.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    if layers[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    for name in names:
        setattr(owner, name, None)
    return joined


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is Linear
