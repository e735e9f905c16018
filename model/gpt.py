"""One GPT for GPT-2 and the Llama family: what differs between them, and between layers, is in the config."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from model.attention import AttentionInputs, CausalSelfAttention, document_mask
from model.cache import KeyValues, KVCache
from model.config import GPTConfig
from model.linear import Linear, linear
from model.loss import linear_cross_entropy_each, linear_cross_entropy_sum
from model.masks import Masks
from model.ragged import Ragged, needed
from model.rope import rope_frequencies, rope_tables


def make_norm(config: GPTConfig) -> nn.Module:
    """The config's norm over n_embd; both kinds compute in fp32 inside."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.norm_bias)


class MLP(nn.Module):
    """down(gelu(up(x))) as in GPT-2, or down(silu(gate(x)) * up(x)) as in Llama (SwiGLU, Shazeer 2020)."""

    def __init__(self, config: GPTConfig, mlp_dim: int) -> None:
        super().__init__()
        self.gate_proj = Linear(config.n_embd, mlp_dim, bias=config.mlp_bias) if config.mlp == "swiglu" else None
        self.up_proj = Linear(config.n_embd, mlp_dim, bias=config.mlp_bias)
        self.down_proj = Linear(mlp_dim, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        up = self.up_proj(x)
        gate = None if self.gate_proj is None else self.gate_proj(x)  # (B, T, mlp_dim), as up
        if torch.is_grad_enabled() and up.requires_grad and not torch.compiler.is_compiling():
            # Backward computes the activation again instead of keeping it: a quarter of a GPT-2 block's memory for less
            # than 1% of the time. Recomputation stops at what down_proj stored, its input, so no matmul runs twice.
            return checkpoint(self._activate_and_project, up, gate, use_reentrant=False)
        return self._activate_and_project(up, gate)

    def _activate_and_project(self, up: Tensor, gate: Tensor | None) -> Tensor:
        return self.down_proj(F.gelu(up, approximate="tanh") if gate is None else F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then MLP, each behind a norm and added to the stream. A sub-layer of size 0 does not exist."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        sizes = config.layer(layer)
        self.dropout = config.dropout
        self.ln_1 = make_norm(config) if sizes.n_head else None
        self.attn = CausalSelfAttention(config, sizes, layer) if sizes.n_head else None
        self.ln_2 = make_norm(config) if sizes.mlp_dim else None
        self.mlp = MLP(config, sizes.mlp_dim) if sizes.mlp_dim else None

    def forward(self, x: Tensor, shared: AttentionInputs) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        if self.attn is not None and self.ln_1 is not None:
            x = x + F.dropout(self.attn(self.ln_1(x), shared), self.dropout, self.training)
        if self.mlp is not None and self.ln_2 is not None:
            x = x + F.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)
        return x


class _TiedTable(torch.autograd.Function):
    """Looks up rows of a table that is the head too, and gives both uses one gradient array.

    The head must use the second output, the table itself: its gradient then comes through here, and the gradient of the
    rows is added to it in place. Autograd left alone fills a second, mostly empty array and adds the two: 154 MB and 5%
    of the step for GPT-2 124M at 4 x 256 tokens.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(idx)
        return F.embedding(idx, table), table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_table: Tensor) -> tuple[Tensor, None]:
        (idx,) = ctx.saved_tensors
        return grad_table.index_add_(0, idx.flatten(), grad_rows.flatten(0, -2)), None


class GPT(nn.Module):
    """Token ids in; logits, or the summed loss, out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each block in backward: less memory, about 4/3 of the time
        self.prompt: nn.Module | None = None  # trained context in front of every text, see prompt_methods.py
        self.head: nn.Module | None = None  # in place of the head's matrix for logits, see quantize.py
        self.computes_on: torch.device | None = None  # where weights come for their turn, if they lie elsewhere
        self.masks: Masks = {}  # of a pruned model: what every change of its weights keeps at zero
        self.context_length = config.block_size  # of a text, in tokens; what the prompt takes of it is not in it
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """GPT-2's initialisation: N(0, 0.02), biases 0, norms 1; what is added to the stream is scaled down.

        There are two additions per layer; 1 / sqrt(2 n_layer) keeps the variance of their sum that of one.
        """
        residual = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = residual if name.endswith(("o_proj", "down_proj")) else 0.02
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                nn.init.ones_(module.weight)
            if isinstance(getattr(module, "bias", None), Tensor):
                nn.init.zeros_(module.bias)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.computes_on or self.wte.weight.device

    @property
    def head_weight(self) -> Tensor:
        """The (padded_vocab_size, n_embd) matrix that turns the last hidden state into logits."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
        logits_for: str | Tensor = "all",
        reduction: str = "sum",
        temperature: float = 1.0,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Logits (B, T, padded_vocab_size) of idx (B, T), -inf for ids that do not exist; or, given targets, the loss.

        targets (B, T), -100 where nothing is supervised: returns the SUM of the cross entropy, an fp32 scalar in nats.
        positions (B, T) or (T,): where each token stands, if not 0..T-1. doc_ids (B, T): the record of each token in a
        packed row, -1 for padding; attention stays inside a record. cache: idx continues what it holds.
        reduction: "none" returns the loss of each position (B, T) instead, 0 where nothing is supervised, of logits
        divided by `temperature`.
        logits_for: "all", "last", or one index per row (B,); the latter two return (B, 1, padded_vocab_size).
        criterion: makes what is returned of the stream after the last norm (B, T, C) and the head's matrix (V, C).
        """
        if targets is not None:
            assert cache is None and (reduction == "none" or temperature == 1.0), (reduction, temperature)
            return self._supervised(idx, targets, positions, doc_ids, reduction, temperature)
        hidden, head = self.hidden(idx, positions=positions, doc_ids=doc_ids, cache=cache)
        if criterion is not None:
            return criterion(hidden, head)
        if isinstance(logits_for, Tensor):
            hidden = hidden[torch.arange(len(idx), device=idx.device), logits_for].unsqueeze(1)
        elif logits_for == "last":
            hidden = hidden[:, -1:]
        else:
            assert logits_for == "all", f"logits_for is {logits_for!r}"
        logits = linear(hidden, head) if self.head is None else self.head(hidden)
        logits[..., self.config.vocab_size :] = float("-inf")
        return logits

    def _supervised(
        self,
        idx: Tensor,
        targets: Tensor,
        positions: Tensor | None,
        doc_ids: Tensor | None,
        reduction: str,
        temperature: float,
    ) -> Tensor:
        ragged = self._ragged(targets, doc_ids)
        wanted, lengths = targets, None
        if ragged is not None:
            if positions is None:
                positions = torch.arange(idx.size(1), device=idx.device)
            positions = ragged.take(positions.expand_as(idx))
            idx, wanted, doc_ids, lengths = ragged.take(idx), ragged.take(targets), None, ragged.lengths
        hidden, head = self.hidden(idx, positions=positions, doc_ids=doc_ids, lengths=lengths)
        rows, wanted = hidden.flatten(0, 1), wanted.flatten()
        if reduction == "sum":
            return _loss(rows, head, wanted, self.config.vocab_size)
        losses = _losses(rows if temperature == 1.0 else rows / temperature, head, wanted, self.config.vocab_size)
        return losses.view_as(targets) if ragged is None else ragged.put_back(losses, targets.shape)

    def _ragged(self, targets: Tensor, doc_ids: Tensor | None) -> Ragged | None:
        """Which positions the loss needs. All of them but on a CPU: a GPU and compiled code want one shape.

        A trained prompt has its own mask over the batch. A row that is too long is left to be refused.
        """
        if targets.size(1) > self.context_length:
            return None
        if targets.device.type != "cpu" or torch.compiler.is_compiling() or self.prompt is not None:
            return None
        return needed(targets, doc_ids)

    def hidden(
        self,
        idx: Tensor,
        *,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream after the last norm (B, T, C), and the head's matrix to apply to it. Arguments as in `forward`.

        lengths: idx (1, T) is that many sequences, one after the other, with their positions; none sees another.
        """
        length, limit = idx.size(1) if lengths is None else max(lengths), self.context_length
        if length > limit:
            raise ValueError(f"{length} tokens do not fit the model's context of {limit}: shorten them")
        mask = None if doc_ids is None else document_mask(doc_ids)
        if cache is not None:
            assert positions is None and doc_ids is None, "a cache knows its rows' positions and holds one record each"
            assert cache.max_length <= limit, f"a cache of {cache.max_length} for a context of {limit}"
            positions, mask = cache.begin(length, idx.device)
        store: KeyValues | None = cache
        if self.prompt is not None:
            positions, mask, store = self.prompt(self, idx, positions, mask, cache)
        x, head = self._embed(idx, positions)
        shared = AttentionInputs(self._rope_tables(idx, positions), mask, lengths, store)
        for block in self.h:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, shared, use_reentrant=False)
            else:
                x = block(x, shared)
        if cache is not None:
            cache.end(length)
        return self.ln_f(x), head

    def _embed(self, idx: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token (and learned position) embeddings (B, T, C), and the head's matrix."""
        head = self.head_weight
        # Only on CPU: there a second gradient array shows in the step's time, and index_add_ has a fixed order.
        if head is self.wte.weight and idx.device.type == "cpu" and not torch.compiler.is_compiling():
            x, head = _TiedTable.apply(head, idx)
        else:
            x = self.wte(idx)
        if self.wpe is not None:
            x = x + (self.wpe.weight[: idx.size(1)] if positions is None else self.wpe(positions))
        return F.dropout(x, self.config.dropout, self.training), head

    def _rope_tables(self, idx: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor] | None:
        config = self.config
        if config.position != "rope":
            return None
        if positions is None:
            positions = torch.arange(idx.size(1), device=idx.device)
        return rope_tables(
            positions, rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, idx.device)
        )

    def num_params(self, non_embedding: bool = False) -> int:
        """How many parameters, shared ones once; `non_embedding` leaves out wte, wpe and lm_head."""
        total = sum(p.numel() for p in self.parameters())
        if non_embedding:
            tables = (self.wte, self.wpe, self.lm_head)
            total -= sum(p.numel() for table in tables if table is not None for p in table.parameters())
        return total

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations of one token's forward and backward in a context of T: 6 N + 12 A T.

        N counts the weights that are multiplied: blocks and head, not the looked-up embeddings. A is the sum of
        n_head * head_dim over the layers; full T x T attention is counted, as is usual (PaLM, appendix B).
        """
        layers = [self.config.layer(i) for i in range(self.config.n_layer)]
        attention = sum(sizes.n_head * sizes.head_dim for sizes in layers)
        return 6 * (self.num_params(non_embedding=True) + self.head_weight.numel()) + 12 * attention * T


# The number of supervised positions is data: torch.compile would break its graph in the middle of the loss.
_loss = torch.compiler.disable(linear_cross_entropy_sum)
_losses = torch.compiler.disable(linear_cross_entropy_each)
