"""Which tensors of a GGUF file hold which of ours, for reading and for writing alike."""

from __future__ import annotations

from formats.gguf_config import INTERLEAVED
from formats.stored import Part, Stored, linear, norm, same
from model.config import GPTConfig, LayerSizes


def stored_tensors(config: GPTConfig, architecture: str, vocab_rows: int | None = None) -> list[Stored]:
    """Every tensor that a file of this architecture holds for this network, in the order of the network.

    vocab_rows: how many rows the stored embedding and head have, where that is more than config.vocab_size.
    """
    table = (vocab_rows or config.vocab_size, config.n_embd)
    rows = Part("wte.weight", 0, config.vocab_size)
    tensors = [Stored("token_embd.weight", table, (rows,))]
    if config.position == "learned":
        tensors.append(same("position_embd.weight", "wpe.weight", (config.block_size, config.n_embd)))
    for i in range(config.n_layer):
        tensors += _block(config, config.layer(i), i, architecture)
    tensors += norm(config, "output_norm", "ln_f")
    if not config.tie_embeddings:
        tensors.append(Stored("output.weight", table, (rows._replace(name="lm_head.weight"),)))
    return tensors


def _block(config: GPTConfig, sizes: LayerSizes, i: int, architecture: str) -> list[Stored]:
    stored, ours, width = f"blk.{i}.", f"h.{i}.", sizes.n_head * sizes.head_dim
    tensors: list[Stored] = []
    if sizes.n_head:
        tensors += norm(config, stored + "attn_norm", ours + "ln_1")
        tensors += _gpt2_qkv(config, i) if architecture == "gpt2" else _qkv(config, sizes, i, architecture)
        tensors += linear(stored + "attn_output", ours + "attn.o_proj", config.n_embd, width, config.o_bias)
    if sizes.mlp_dim:
        tensors += norm(config, stored + "ffn_norm", ours + "ln_2")
        for kind in ("gate", "up") if config.mlp == "swiglu" else ("up",):
            name = f"{ours}mlp.{kind}_proj"
            tensors += linear(f"{stored}ffn_{kind}", name, sizes.mlp_dim, config.n_embd, config.mlp_bias)
        tensors += linear(stored + "ffn_down", ours + "mlp.down_proj", config.n_embd, sizes.mlp_dim, config.mlp_bias)
    return tensors


def _qkv(config: GPTConfig, sizes: LayerSizes, i: int, architecture: str) -> list[Stored]:
    tensors: list[Stored] = []
    for kind, heads in (("q", sizes.n_head), ("k", sizes.n_kv_head), ("v", sizes.n_kv_head)):
        stored, ours, rows = f"blk.{i}.attn_{kind}", f"h.{i}.attn.{kind}_proj", heads * sizes.head_dim
        turned = sizes.head_dim if kind != "v" and architecture in INTERLEAVED else 0
        tensors += [
            tensor._replace(head_dim=turned) for tensor in linear(stored, ours, rows, config.n_embd, config.qkv_bias)
        ]
        if config.qk_norm and kind != "v":
            tensors.append(same(f"{stored}_norm.weight", f"h.{i}.attn.{kind}_norm.weight", (sizes.head_dim,)))
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
