"""Causal self-attention with grouped key/value heads, for training, packed rows and a key/value cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import KeyValues
from model.config import GPTConfig, LayerSizes
from model.linear import Linear
from model.rope import apply_rope


@dataclass
class AttentionInputs:
    """What all layers of one forward share, built once."""

    rope: tuple[Tensor, Tensor] | None = None  # cosine and sine tables
    mask: Tensor | None = None  # bool (B, 1, T, S), True = may attend; None = plain causal order
    lengths: list[int] | None = None  # of the sequences in a single row, each of which sees itself alone
    cache: KeyValues | None = None


class CausalSelfAttention(nn.Module):
    """Queries of each head attend to the keys of its group at the same and earlier positions."""

    def __init__(self, config: GPTConfig, sizes: LayerSizes, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = sizes.head_dim
        self.dropout = config.dropout
        query_dim, key_dim = sizes.n_head * sizes.head_dim, sizes.n_kv_head * sizes.head_dim
        self.q_proj = Linear(config.n_embd, query_dim, bias=config.qkv_bias)
        self.k_proj = Linear(config.n_embd, key_dim, bias=config.qkv_bias)
        self.v_proj = Linear(config.n_embd, key_dim, bias=config.qkv_bias)
        self.o_proj = Linear(query_dim, config.n_embd, bias=config.o_bias)
        self.heads = [sizes.n_head, sizes.n_kv_head, sizes.n_kv_head]
        # One gain for all heads of a layer, as in Qwen3.
        self.q_norm = nn.RMSNorm(sizes.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(sizes.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, shared: AttentionInputs) -> Tensor:
        """x (B, T, C) -> (B, T, C); with a cache, x holds the T newest positions only."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, n_head, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, n_kv_head, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = norm_heads(q, self.q_norm), norm_heads(k, self.k_norm)
        if shared.rope is not None:
            q, k = apply_rope(q, shared.rope), apply_rope(k, shared.rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        if shared.cache is not None:
            k, v = shared.cache.append(self.layer, k, v)  # (B, n_kv_head, S, head_dim)
        dropout = self.dropout if self.training else 0.0
        if shared.lengths is None:
            y = attend(q, k, v, shared.mask, dropout)
        else:
            y = attend_each(q, k, v, shared.lengths, dropout)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def norm_heads(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """`norm` over the last dimension of x (B, T, heads, head_dim), in x's dtype: autocast's, not the gain's."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """q (B, n_head, T, head_dim), k and v (B, n_kv_head, S, head_dim) -> (B, n_head, T, head_dim).

    Without a mask the last T of the S positions are the queries' own: T == S (causal) or T == 1 (sees all).
    """
    T, S = q.size(2), k.size(2)
    assert mask is not None or S == T or T == 1, "several new positions after old ones need a mask"
    if k.size(1) != q.size(1) and not _takes_groups(q, mask):
        groups = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and T > 1,
        enable_gqa=k.size(1) != q.size(1),
    )


def attend_each(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dropout: float) -> Tensor:
    """As `attend`, of sequences of these lengths one after the other in a single row (1, heads, sum of them, head_dim).

    A mask would have each query compared with the keys of all: in a row of 512 tokens with records of 200, 2.6 times
    as many.
    """
    parts = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2))
    return torch.cat([attend(*part, None, dropout) for part in parts], dim=2)


def _takes_groups(q: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused kernel reads grouped heads in place: always on CPU; on a GPU only flash attention does.

    Flash attention takes neither masks nor fp32. Elsewhere grouped heads would fall back to the unfused path, which
    stores all T x S scores; repeating k and v costs far less.
    """
    return q.device.type == "cpu" or (mask is None and q.dtype in (torch.bfloat16, torch.float16))


def document_mask(doc_ids: Tensor) -> Tensor:
    """Bool (B, 1, T, T) for rows that pack several records: causal, and only within a record.

    Padding carries one id of its own (-1) and so attends to padding only; no position is left without any key, which
    would make softmax yield NaN.
    """
    T = doc_ids.size(1)
    same = doc_ids.unsqueeze(2) == doc_ids.unsqueeze(1)  # (B, T, T)
    causal = torch.ones(T, T, dtype=torch.bool, device=doc_ids.device).tril()
    return (same & causal).unsqueeze(1)
