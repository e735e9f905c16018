"""Which tensors of a Hugging Face folder hold which of ours, for reading and for writing alike."""

from __future__ import annotations

import re

from formats.hf_families import ESPALIER
from formats.stored import Part, Stored, linear, norm, same
from model.config import GPTConfig, LayerSizes


def stored_tensors(config: GPTConfig, model_type: str, vocab_rows: int | None = None) -> list[Stored]:
    """Every tensor that a folder of this family holds for this network, in the order of the network.

    vocab_rows: how many rows the stored embedding and head have, where that is more than config.vocab_size.
    """
    family = {"gpt2": _gpt2_block, ESPALIER: _espalier_block}.get(model_type, _llama_block)
    names = _TABLES.get(model_type, _LLAMA_TABLES)
    table = (vocab_rows or config.vocab_size, config.n_embd)
    rows = Part("wte.weight", 0, config.vocab_size)
    tensors = [Stored(names["wte"], table, (rows,))]
    if config.position == "learned":
        tensors.append(same("wpe.weight", "wpe.weight", (config.block_size, config.n_embd)))
    for i in range(config.n_layer):
        tensors += family(config, config.layer(i), i)
    tensors += norm(config, names["ln_f"], "ln_f")
    if not config.tie_embeddings:
        tensors.append(Stored("lm_head.weight", table, (rows._replace(name="lm_head.weight"),)))
    return tensors


_LLAMA_TABLES = {"wte": "embed_tokens.weight", "ln_f": "norm"}
_TABLES = {name: {"wte": "wte.weight", "ln_f": "ln_f"} for name in ("gpt2", ESPALIER)}
# Buffers that older versions of transformers saved; they are computed, not learned.
_BUFFERS = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|h\.\d+\.attn\.(bias|masked_bias)")


def prefix(model_type: str) -> str:
    """What stands before every name but lm_head in a folder of the whole model."""
    return {"gpt2": "transformer.", ESPALIER: ""}.get(model_type, "model.")


def without_prefix(name: str, model_type: str) -> str:
    """The name as `Stored.name` has it, whether the folder holds the whole model or its body only."""
    return name.removeprefix(prefix(model_type))


def is_buffer(name: str) -> bool:
    """Whether a stored tensor (named without prefix) is one that can be computed, so that nobody misses it."""
    return _BUFFERS.fullmatch(name) is not None


def _gpt2_block(config: GPTConfig, sizes: LayerSizes, i: int) -> list[Stored]:
    """q, k and v lie side by side in c_attn; Conv1D's weights are (in, out)."""

    def conv1d(stored: str, ours: tuple[str, ...], rows: int, columns: int) -> list[Stored]:
        parts = [(f"h.{i}.{name}", place * rows, (place + 1) * rows) for place, name in enumerate(ours)]
        weights = tuple(Part(f"{name}.weight", start, stop) for name, start, stop in parts)
        biases = tuple(Part(f"{name}.bias", start, stop) for name, start, stop in parts)
        width = rows * len(ours)
        return [
            Stored(f"h.{i}.{stored}.weight", (columns, width), weights, transposed=True),
            Stored(f"h.{i}.{stored}.bias", (width,), biases),
        ]

    C = config.n_embd
    return [
        *norm(config, f"h.{i}.ln_1", f"h.{i}.ln_1"),
        *conv1d("attn.c_attn", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), C, C),
        *conv1d("attn.c_proj", ("attn.o_proj",), C, C),
        *norm(config, f"h.{i}.ln_2", f"h.{i}.ln_2"),
        *conv1d("mlp.c_fc", ("mlp.up_proj",), sizes.mlp_dim, C),
        *conv1d("mlp.c_proj", ("mlp.down_proj",), C, sizes.mlp_dim),
    ]


def _llama_block(config: GPTConfig, sizes: LayerSizes, i: int) -> list[Stored]:
    names = {"ln_1": "input_layernorm", "attn": "self_attn", "ln_2": "post_attention_layernorm", "mlp": "mlp"}
    renamed = []
    for tensor in _espalier_block(config, sizes, i):
        part, _, rest = tensor.name.removeprefix(f"h.{i}.").partition(".")
        renamed.append(tensor._replace(name=f"layers.{i}.{names[part]}.{rest}"))
    return renamed


def _espalier_block(config: GPTConfig, sizes: LayerSizes, i: int) -> list[Stored]:
    """Our own names; a sub-layer of size 0 does not exist."""
    C, queries, keys = config.n_embd, sizes.n_head * sizes.head_dim, sizes.n_kv_head * sizes.head_dim
    linears: list[tuple[str, int, int, bool]] = []
    tensors: list[Stored] = []
    if sizes.n_head:
        tensors += norm(config, f"h.{i}.ln_1", f"h.{i}.ln_1")
        linears += [(f"attn.{p}_proj", rows, C, config.qkv_bias) for p, rows in zip("qkv", (queries, keys, keys))]
        linears.append(("attn.o_proj", C, queries, config.o_bias))
        if config.qk_norm:
            names = [f"h.{i}.attn.{p}_norm.weight" for p in "qk"]
            tensors += [same(name, name, (sizes.head_dim,)) for name in names]
    if sizes.mlp_dim:
        tensors += norm(config, f"h.{i}.ln_2", f"h.{i}.ln_2")
        inward = ("gate", "up") if config.mlp == "swiglu" else ("up",)
        linears += [(f"mlp.{p}_proj", sizes.mlp_dim, C, config.mlp_bias) for p in inward]
        linears.append(("mlp.down_proj", C, sizes.mlp_dim, config.mlp_bias))
    for name, rows, columns, bias in linears:
        tensors += linear(f"h.{i}.{name}", f"h.{i}.{name}", rows, columns, bias)
    return tensors
