"""What a run will take in memory, worked out from sizes alone, before anything is loaded.

Counted in bytes, with N = rows x tokens of one micro-batch, C = n_embd, H and K = the query and key/value heads times
head_dim, M = mlp_dim, V = rows of the head; f = 4 in float32, 2 under autocast:

    weights      4 each; a quantised base as it is stored; under autocast f more for each matrix, its cast copy
    gradients    4 for each number that trains
    optimizer    AdamW 8, Muon 4, for each number that trains
    activations  what a block keeps for backward, if the stream before it has a gradient or something in it trains:
                 each norm keeps its input (4 N C; RMSNorm the normalised input too, where its gain trains), and its
                 output (f N C) is kept where a matrix behind it trains or has LoRA; attention keeps q, k, v, its
                 output and a log-sum a head (f N (2 H + 2 K) + 4 N heads), the MLP its up and gate (f N M each: the
                 activation is computed again). LoRA's dropout adds a mask of one byte, DoRA the output; an adapter
                 its input; a dropout of the network 4 N C twice. Records in one row take a mask of 4 T for each token
                 and layer, on a CPU only behind a prefix or virtual tokens: elsewhere each attends by itself, and where
                 o_proj trains or has LoRA its input is another f N H. Attention with dropout keeps three times all
                 T x T scores on a CPU. A block below everything that trains keeps nothing. With gradient checkpointing
                 a block keeps its input alone (4 N C) and, one block at a time, the rest
    logits       those of one piece of the loss (see model/loss.py), or, where that is more, what one block's backward
                 holds for a moment (3 N M, SwiGLU 5 N M; where oneDNN makes a weight's gradient, see model/onednn.py,
                 one more, and 8 MB for its kernels); the gradient of the stream (2 N C), and of the head where
                 another micro-batch's is there already
    Several processes share some of this out, see training/shares.py.

    saving       a copy of weights that are saved and optimizer, where a large checkpoint is written beside the steps
    allocator    on a CPU under glibc, whose freed memory is kept for speed (see training/heap.py): 0.2 of what all
                 blocks keep without gradient checkpointing, in holes that are not used again

The peak is weights, optimizer, saving and allocator and the larger of two moments: the end of forward (activations,
logits, gradients of micro-batches before) and the end of backward (all gradients, one block's passing arrays). Left out
are the libraries (0.3 GB on a CPU, more on a GPU), the data, and for GRPO the cache of generation. Compared with runs
on a CPU only; for a GPU it is an estimate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from formats.open_model import read_config
from model.adapters import Bottleneck
from model.config import GPTConfig
from model.gpt import GPT, Block
from model.lora import LoraLayer
from model.loss import chunk_rows
from model.onednn import pays_here
from model.tuning import METHODS, apply_method, trainable_report
from training.heap import heap_is_tuned, keeps_freed_memory
from training.network import chosen_method
from training.parallel import is_spread
from training.run_settings import FinetuneSettings, RunSettings
from training.saver import LARGE
from training.shares import Share

# Of what the blocks keep without gradient checkpointing: holes of the heap, in 20 runs of 10 kinds on two networks 0.02
# to 0.34, so that the total was within 11% in all, and within 7% in 17. Where the heap was not tuned when the process
# began they were 0.27 to 1.44. With ESPALIER_MALLOC=default MALLOC_MMAP_THRESHOLD_=65536 there are none, but steps take
# up to 1.4 times as long.
_HOLES, _HOLES_UNTUNED = 0.2, 0.65
_ONEDNN = 8_000_000  # bytes: its kernels, made as shapes come, and scratch memory


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    passing: int  # what one block's backward holds for a moment
    earlier_gradients: int  # at the end of forward: of micro-batches before, or of the head alone
    saving: int  # the copy that a checkpoint is written from
    allocator: int  # freed, but not given back
    trainable: int  # numbers
    parameters: int

    @property
    def total(self) -> int:
        """The peak."""
        forward_ends = self.activations + self.logits + self.earlier_gradients
        backward_ends = self.gradients + self.passing
        return self.weights + self.optimizer + self.saving + self.allocator + max(forward_ends, backward_ends)


def plan_memory(settings: RunSettings, config: GPTConfig, device: str = "cpu", world_size: int = 1) -> MemoryPlan:
    """The memory that a run of `settings` on a network of `config` takes on each of `world_size` devices.

    `device` is "cpu" or "cuda". ValueError where the method cannot be applied.
    """
    with torch.device("meta"):  # sizes without numbers
        model = GPT(dataclasses.replace(config, dropout=settings.dropout))
        if isinstance(settings, FinetuneSettings):
            apply_method(model, settings.finetune_method, chosen_method(settings), fresh=False)
    trainable, total = trainable_report(model)
    mixed = _is_mixed(settings, device)
    weights = _bytes(model.parameters())
    state = _optimizer_bytes(settings, model)
    way = settings.parallel if settings.parallel != "fsdp" or is_spread(settings, world_size) else "ddp"
    offload = settings.cpu_offload and device == "cuda"
    share = Share.of(model, way, world_size, offload, 2 if mixed else 4)
    # Spread blocks are whole in autocast's type alone.
    cast = [model.lm_head] if way == "fsdp" else model.modules()
    beside = _bytes(model.buffers())  # a quantised base, and casts
    beside += 2 * sum(module.weight.numel() for module in cast if isinstance(module, nn.Linear)) if mixed else 0
    kept = _Kept(settings, model, device, mixed)
    earlier = _earlier_gradients(settings, config, world_size)
    head = 4 * model.head_weight.numel() if model.head_weight.requires_grad else 0
    pieces = min(chunk_rows(config.padded_vocab_size, device), kept.tokens) * config.padded_vocab_size * 4
    own = _ONEDNN * kept.copies
    return MemoryPlan(
        weights=beside + share.weights(weights) + _reference(settings, share, weights + beside),
        # With --exact, sums of micro-batches wait beside the one in the making, and ranks swap the last of them.
        gradients=share.gradients(trainable) * (1 + max(earlier, int(world_size > 1)) if settings.exact else 1),
        optimizer=share.optimizer(state),
        activations=kept.activations(settings.gradient_checkpointing),
        logits=max(pieces, kept.passing()) + 8 * kept.tokens * config.n_embd + (head if earlier else 0) + own,
        passing=kept.passing() + kept.again(settings.gradient_checkpointing) + 8 * kept.tokens * config.n_embd + own,
        earlier_gradients=share.earlier(trainable) * earlier or head,
        saving=_saving(settings, 4 * (trainable if _adapts(settings) else total) + state, device),
        allocator=int(_holes(device) * kept.activations(False)),
        trainable=trainable,
        parameters=total,
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _adapts(settings: RunSettings) -> bool:
    return isinstance(settings, FinetuneSettings) and METHODS[settings.finetune_method].adapts


def _saving(settings: RunSettings, checkpoint: int, device: str) -> int:
    """Bytes of the copy in host memory; the last checkpoint of a run, and small ones, are written as they are."""
    every, steps = settings.checkpoint_interval, settings.max_steps
    between = every == "epoch" or 0 < int(every) < steps
    beside = settings.async_save == "on" or (settings.async_save == "auto" and checkpoint >= LARGE)
    return checkpoint if device == "cpu" and between and beside else 0


def _by_onednn(device: str, mixed: bool) -> bool:
    """Whether products are oneDNN's."""
    return device == "cpu" and not mixed and pays_here()


def _holes(device: str) -> float:
    """Of what the blocks keep, how much of the heap is lost in holes."""
    if device != "cpu" or not keeps_freed_memory():
        return 0.0
    return _HOLES if heap_is_tuned() else _HOLES_UNTUNED


class _Kept:
    """What forward keeps for backward."""

    def __init__(self, settings: RunSettings, model: GPT, device: str, mixed: bool) -> None:
        self.settings, self.model, self.device = settings, model, device
        self.rows = settings.batch_size * _rows_each(settings)
        self.length = min(settings.block_size, model.context_length)
        self.tokens = self.rows * self.length
        self.size = 2 if mixed else 4  # bytes of what matmuls take and give
        # oneDNN copies a layer's output gradient for that of its weight, where that trains.
        trains = any(p.requires_grad for block in model.h for p in block.parameters() if p.dim() == 2)
        self.copies = int(_by_onednn(device, mixed) and trains and not _adapts(settings))
        self.masked = isinstance(settings, FinetuneSettings)  # records, of which each row holds several

    @functools.cached_property
    def blocks(self) -> tuple[list[int], int, int]:
        """Bytes that each block keeps; that the inputs of those which keep something take; and of the last norm."""
        width = 4 * self.tokens * self.model.config.n_embd
        stream = self.model.wte.weight.requires_grad or self.model.prompt is not None
        blocks, inputs = [], 0
        for block in self.model.h:
            assert isinstance(block, Block)
            kept, leaves = self._block(block, stream)
            inputs += width if stream and kept else 0
            stream = leaves
            blocks.append(kept)
        return blocks, inputs, width * _norm_copies(self.model.ln_f, stream)

    def activations(self, checkpointing: bool) -> int:
        """Bytes of all blocks and of the last norm."""
        blocks, inputs, last = self.blocks
        if checkpointing:
            return inputs + max(blocks) + last
        return sum(blocks) + last + (4 * self.tokens * self.model.config.n_embd if self.settings.dropout else 0)

    def again(self, checkpointing: bool) -> int:
        """Bytes of the block that backward is computing again, the largest."""
        return max(self.blocks[0]) if checkpointing else 0

    def passing(self) -> int:
        """Bytes that one block's backward holds for a moment."""
        widest = max(self.model.config.layer(i).mlp_dim for i in range(self.model.config.n_layer))
        arrays = (5 if self.model.config.mlp == "swiglu" else 3) + self.copies  # (N, M)
        return arrays * self.size * self.tokens * widest

    def _block(self, block: Block, stream: bool) -> tuple[int, bool]:
        """Bytes that a block keeps, and whether the stream behind it has a gradient; `stream`: before it."""
        N, kept = self.tokens, 0
        if block.attn is not None:
            attn = block.attn
            linears = [attn.q_proj, attn.k_proj, attn.v_proj]
            kept += self._read(block.ln_1, linears, stream)
            if stream or self.model.prompt is not None or any(map(_trains, linears)):
                heads, groups, _ = attn.heads
                stream = True
                kept += N * (self.size * 2 * (heads + groups) * attn.head_dim + 4 * heads)
                kept += self._scores(heads)
                kept += self._joined(heads * attn.head_dim, attn.o_proj)
                kept += self._lora([attn.o_proj])
            stream = stream or _trains(attn.o_proj) or hasattr(attn, "adapter")
            kept += self._added(attn, stream)
        if block.mlp is not None:
            mlp = block.mlp
            linears = [linear for linear in (mlp.gate_proj, mlp.up_proj) if linear is not None]
            kept += self._read(block.ln_2, linears, stream)
            if stream or any(map(_trains, linears)):
                stream = True
                kept += self.size * N * sum(linear.out_features for linear in linears)
            stream = stream or _trains(mlp.down_proj) or hasattr(mlp, "adapter")
            kept += self._added(mlp, stream)
        if hasattr(block, "adapter"):
            kept += self._added(block, stream)
            stream = True
        return kept, stream

    def _read(self, norm: nn.Module | None, linears: list[Any], stream: bool) -> int:
        """A norm and the matrices behind it."""
        assert norm is not None
        width = self.tokens * self.model.config.n_embd
        return (
            4 * width * _norm_copies(norm, stream)
            + (self.size * width if any(map(_trains, linears)) else 0)
            + self._lora(linears)
        )

    def _lora(self, linears: list[Any]) -> int:
        """LoRA's dropout masks, its thin middle, and with DoRA the outputs."""
        kept = 0
        for layer in linears:
            if isinstance(layer, LoraLayer):
                kept += self.tokens * (layer.in_features if layer.dropout else 0)
                kept += self.size * self.tokens * layer.lora_A.size(0)
                kept += self.size * self.tokens * layer.out_features if layer.lora_magnitude is not None else 0
        return kept

    def _scores(self, heads: int) -> int:
        """The mask of rows that need one; and all scores three times where attention with dropout is not fused."""
        on_cpu = self.device == "cpu"
        mask = self.model.prompt is not None or (self.masked and not on_cpu)
        if self.settings.dropout > 0 and on_cpu:
            return 3 * 4 * self.tokens * self.length * heads
        return 4 * self.tokens * self.length if mask else 0

    def _joined(self, width: int, o_proj: Any) -> int:
        """What attention gives for each record apart, once more as one array, where o_proj keeps its input."""
        apart = self.masked and self.device == "cpu" and self.model.prompt is None
        return self.size * self.tokens * width if apart and _trains(o_proj) else 0

    def _added(self, module: nn.Module, stream: bool) -> int:
        """Behind attention, the MLP or a block: an adapter, and the network's dropout."""
        width = self.tokens * self.model.config.n_embd
        adapter = getattr(module, "adapter", None)
        kept = 4 * width if self.settings.dropout and stream and not isinstance(module, Block) else 0
        if isinstance(adapter, Bottleneck):
            kept += self.size * (width + 2 * self.tokens * adapter.down.out_features)
        return kept


def _trains(layer: Any) -> bool:
    """Whether a linear layer keeps its input: its weight or its LoRA trains."""
    weight = getattr(layer, "weight", None)
    return isinstance(layer, LoraLayer) or (weight is not None and weight.requires_grad)


def _norm_copies(norm: nn.Module, stream: bool) -> int:
    """How many arrays of the stream's size a norm keeps."""
    trains = any(parameter.requires_grad for parameter in norm.parameters())
    return int(stream or trains) + int(trains and isinstance(norm, nn.RMSNorm))


def _is_mixed(settings: RunSettings, device: str) -> bool:
    return settings.dtype in ("bfloat16", "float16") or (settings.dtype == "auto" and device == "cuda")


def _rows_each(settings: RunSettings) -> int:
    """Rows of one sample: a pair of answers has two, a prompt a group of them."""
    objective = getattr(settings, "objective", "sft")
    return {"dpo": 2, "grpo": getattr(settings, "grpo_group", 1)}.get(objective, 1)


def _reference(settings: RunSettings, share: Share, weights: int) -> int:
    """The frozen copy that DPO and GRPO compare with (an adapter switched off is one for nothing), or the teacher."""
    if isinstance(settings, FinetuneSettings) and settings.objective == "distill" and settings.teacher is not None:
        with torch.device("meta"):
            return share.weights(4 * GPT(read_config(settings.teacher)).num_params())
    if getattr(settings, "objective", "sft") == "sft" or _adapts(settings):
        return 0
    return share.weights(weights)


def _micro_batches(settings: RunSettings, config: GPTConfig, world_size: int) -> int:
    if settings.grad_accum_steps is not None:
        return settings.grad_accum_steps
    tokens = settings.batch_size * min(settings.block_size, config.block_size) * world_size
    return settings.total_batch_size // tokens


def _earlier_gradients(settings: RunSettings, config: GPTConfig, world_size: int) -> int:
    """How many gradients of micro-batches before are there when the last one begins."""
    count = max(1, _micro_batches(settings, config, world_size))
    return count.bit_length() - 1 if settings.exact else int(count > 1)


def _optimizer_bytes(settings: RunSettings, model: GPT) -> int:
    """AdamW keeps two numbers for each that trains, Muon one."""
    numbers = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            muon = settings.optimizer == "muon" and name.startswith("h.") and parameter.ndim == 2
            numbers += parameter.numel() * (1 if muon else 2)
    return 4 * numbers
