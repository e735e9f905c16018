"""Which tensors of a GGUF file hold which of ours, for reading and for writing alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from formats.gguf_config import INTERLEAVED
from model.config import GPTConfig, LayerSizes


class Part(NamedTuple):
    """Where one of our tensors lies in a stored one: rows `start..stop`."""

    name: str
    start: int
    stop: int


class Stored(NamedTuple):
    """A tensor of the file, (out, in) like ours.

    head_dim above 0: the rows of each head stand in the order of interleaved rotary positions, in which the pair
    (i, i + head_dim / 2) of ours lies side by side.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    head_dim: int = 0

    def copy_rows(self, first: int, rows: Tensor, weights: dict[str, Tensor]) -> None:
        """Copies a block of the stored tensor's rows, from row `first` on, to where it belongs in `weights`."""
        if self.head_dim:
            weights[self.parts[0].name][self._order()[first : first + len(rows)]] = rows
            return
        for name, start, stop in self.parts:  # rows of an embedding beyond the vocabulary belong to no part
            upper, lower = min(stop, first + len(rows)), max(start, first)
            if lower < upper:
                weights[name][lower - start : upper - start].copy_(rows[lower - first : upper - first])

    def assemble(self, weights: dict[str, Tensor]) -> Tensor:
        """The stored tensor made of ours: a view where it is one of ours as it lies, else a copy."""
        pieces = [weights[name][: stop - start] for name, start, stop in self.parts]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole[self._order()] if self.head_dim else whole

    def _order(self) -> Tensor:
        """For each row of the file, the row of ours (rows,)."""
        ours = torch.arange(self.shape[0]).view(-1, 2, self.head_dim // 2)  # (heads, half, pair)
        return ours.transpose(1, 2).flatten()  # (heads, pair, half): the halves of a pair side by side


def stored_tensors(config: GPTConfig, architecture: str, vocab_rows: int | None = None) -> list[Stored]:
    """Every tensor that a file of this architecture holds for this network, in the order of the network.

    vocab_rows: how many rows the stored embedding and head have, where that is more than config.vocab_size.
    """
    table = (vocab_rows or config.vocab_size, config.n_embd)
    rows = Part("wte.weight", 0, config.vocab_size)
    tensors = [Stored("token_embd.weight", table, (rows,))]
    if config.position == "learned":
        tensors.append(_same("position_embd.weight", "wpe.weight", (config.block_size, config.n_embd)))
    for i in range(config.n_layer):
        tensors += _block(config, config.layer(i), i, architecture)
    tensors += _norm(config, "output_norm", "ln_f")
    if not config.tie_embeddings:
        tensors.append(Stored("output.weight", table, (rows._replace(name="lm_head.weight"),)))
    return tensors


def _block(config: GPTConfig, sizes: LayerSizes, i: int, architecture: str) -> list[Stored]:
    stored, ours, width = f"blk.{i}.", f"h.{i}.", sizes.n_head * sizes.head_dim
    tensors: list[Stored] = []
    if sizes.n_head:
        tensors += _norm(config, stored + "attn_norm", ours + "ln_1")
        tensors += _gpt2_qkv(config, i) if architecture == "gpt2" else _qkv(config, sizes, i, architecture)
        tensors += _linear(stored + "attn_output", ours + "attn.o_proj", config.n_embd, width, config.o_bias)
    if sizes.mlp_dim:
        tensors += _norm(config, stored + "ffn_norm", ours + "ln_2")
        for kind in ("gate", "up") if config.mlp == "swiglu" else ("up",):
            name = f"{ours}mlp.{kind}_proj"
            tensors += _linear(f"{stored}ffn_{kind}", name, sizes.mlp_dim, config.n_embd, config.mlp_bias)
        tensors += _linear(stored + "ffn_down", ours + "mlp.down_proj", config.n_embd, sizes.mlp_dim, config.mlp_bias)
    return tensors


def _qkv(config: GPTConfig, sizes: LayerSizes, i: int, architecture: str) -> list[Stored]:
    tensors: list[Stored] = []
    for kind, heads in (("q", sizes.n_head), ("k", sizes.n_kv_head), ("v", sizes.n_kv_head)):
        stored, ours, rows = f"blk.{i}.attn_{kind}", f"h.{i}.attn.{kind}_proj", heads * sizes.head_dim
        turned = sizes.head_dim if kind != "v" and architecture in INTERLEAVED else 0
        tensors += [
            tensor._replace(head_dim=turned) for tensor in _linear(stored, ours, rows, config.n_embd, config.qkv_bias)
        ]
        if config.qk_norm and kind != "v":
            tensors.append(_same(f"{stored}_norm.weight", f"h.{i}.attn.{kind}_norm.weight", (sizes.head_dim,)))
    return tensors


def _gpt2_qkv(config: GPTConfig, i: int) -> list[Stored]:
    """q, k and v above one another in one tensor."""
    width, tensors = config.n_embd, []
    for kind, tail in (("weight", (width,)), ("bias", ())):
        parts = tuple(
            Part(f"h.{i}.attn.{name}_proj.{kind}", place * width, (place + 1) * width)
            for place, name in enumerate("qkv")
        )
        if kind == "weight" or config.qkv_bias:
            tensors.append(Stored(f"blk.{i}.attn_qkv.{kind}", (3 * width, *tail), parts))
    return tensors


def _same(stored: str, ours: str, shape: tuple[int, ...]) -> Stored:
    return Stored(stored, shape, (Part(ours, 0, shape[0]),))


def _norm(config: GPTConfig, stored: str, ours: str) -> list[Stored]:
    kinds = ("weight", "bias") if config.norm_bias else ("weight",)
    return [_same(f"{stored}.{kind}", f"{ours}.{kind}", (config.n_embd,)) for kind in kinds]


def _linear(stored: str, ours: str, rows: int, columns: int, bias: bool) -> list[Stored]:
    weight = _same(f"{stored}.weight", f"{ours}.weight", (rows, columns))
    return [weight, _same(f"{stored}.bias", f"{ours}.bias", (rows,))] if bias else [weight]
