"""The metadata of a GGUF file as a GPTConfig, and back. The names are llama.cpp's (its docs, and gguf's constants)."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from formats.errors import FormatError
from formats.gguf_header import GgufHeader
from model.config import GPTConfig, padded_vocab
from model.rope import rope_frequencies

ARCHITECTURES = ("deci", "gpt2", "llama", "qwen2", "qwen3")
# Where llama.cpp turns the pairs (2i, 2i+1) of a head instead of (i, i + head_dim / 2): rows of q and k stand so.
INTERLEAVED = ("deci", "llama")
UNUSED = 5  # the token type of ids that exist only to fill the table
_REQUIRED: Any = object()
# Keys that say what is computed and are understood here, and keys that do not matter. Any other one is refused unless
# it is 0, false or "none": experts, state spaces, scales of logits and the like would silently be left out.
_KNOWN = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}
# Llama 3.1 stretches 8 times, Llama 3.2 32 times; both with these, from a context of 8,192.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


class _Keys:
    """Typed access to an architecture's metadata; a value of another kind is a FormatError that names the key."""

    def __init__(self, header: GgufHeader, architecture: str) -> None:
        self.header, self.architecture = header, architecture

    def raw(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.header.metadata.get(f"{self.architecture}.{name}", default)
        if value is _REQUIRED:
            raise self.fail(name, "nothing", "a value")
        return value

    def fail(self, name: str, found: Any, wanted: str) -> FormatError:
        key = f"{self.architecture}.{name}"
        return FormatError(f"{self.header.path}: the metadata {key} is {str(found)[:80]}, expected {wanted}")

    def count(self, name: str, default: Any = _REQUIRED) -> int:
        value = self.raw(name, default)
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self.fail(name, value, "a whole number above 0")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """The shortest number that rounds to the file's float32: 1e-5 rather than 9.999999747378752e-06."""
        value = self.raw(name, default)
        if type(value) not in (int, float) or not 0 < value < 3e38:
            raise self.fail(name, value, "a number above 0")
        short = shortest_float32(value)
        if not short:
            raise self.fail(name, value, "a number that float32 tells from 0")
        return short

    def sizes(self, name: str, layers: int, default: Any = _REQUIRED) -> int | tuple[int, ...]:
        """One whole number, or one per layer."""
        value = self.raw(name, default)
        listed = value if isinstance(value, tuple) else (value,) * layers
        if len(listed) != layers or not all(type(size) is int and 0 <= size < 1 << 31 for size in listed):
            raise self.fail(name, value, f"a whole number, or one for each of the {layers} layers")
        return listed


def shortest_float32(value: float) -> float:
    """The shortest number that rounds to the same float32 as `value`."""
    (stored,) = struct.unpack("<f", struct.pack("<f", value))
    tries = (float(f"{stored:.{digits}g}") for digits in range(1, 10))  # nine digits are always enough
    return next(short for short in tries if struct.pack("<f", short) == struct.pack("<f", value))


def to_gpt_config(header: GgufHeader, rope_factors: Tensor | None) -> tuple[GPTConfig, list[str]]:
    """The network that a file's metadata and tensor table describe, and notes on what was adapted.

    rope_factors: the values of its tensor rope_freqs.weight (head_dim / 2,). FormatError says what is not supported.
    """
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise FormatError(f"{header.path}: is of the architecture {str(architecture)[:80]!r}; read are {known}")
    _check_keys(header, architecture)
    keys = _Keys(header, architecture)
    notes: list[str] = []
    layers = keys.count("block_count")
    if layers > len(header.tensors):
        raise keys.fail("block_count", layers, f"at most one for each of the file's {len(header.tensors)} tensors")
    heads = keys.sizes("attention.head_count", layers)
    n_embd = keys.count("embedding_length")
    vocab_size = vocabulary_size(header, notes)
    style = _gpt2_style(header, keys) if architecture == "gpt2" else _llama_style(header, keys)
    values: dict[str, Any] = {
        "block_size": _context(keys, notes),
        "vocab_size": vocab_size,
        "padded_vocab_size": padded_vocab(vocab_size),
        "n_layer": layers,
        "n_head": heads,
        "n_kv_head": keys.sizes("attention.head_count_kv", layers, heads),
        "head_dim": _head_dim(keys, n_embd, heads),
        "n_embd": n_embd,
        "mlp_dim": keys.sizes("feed_forward_length", layers),
        "tie_embeddings": "output.weight" not in header.tensors,
    }
    try:
        config = GPTConfig(**values, **style)
        if config.position == "rope":
            values["rope_scaling"] = _rope_scaling(keys, config, rope_factors)
        config = GPTConfig(**values, **style)
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{header.path}: its metadata describe no network: {error}") from None
    if has_bare_attention(config):
        raise FormatError(f"{header.path}: has a layer without an MLP, which llama.cpp passes over; it is not read")
    return config, notes


def vocabulary_size(header: GgufHeader, notes: list[str]) -> int:
    """How many ids the model knows: those of the vocabulary without what only fills the table at its end."""
    if "token_embd.weight" not in header.tensors:
        raise FormatError(f"{header.path}: lacks the tensor token_embd.weight")
    rows = header.tensors["token_embd.weight"].shape[0]
    tokens, types = (header.metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if not isinstance(tokens, tuple) or not tokens:
        return rows
    count = len(tokens)
    if isinstance(types, tuple) and len(types) == count:
        count = max((token for token in range(count) if types[token] != UNUSED), default=0) + 1
    if count > rows:
        raise FormatError(f"{header.path}: has {count:,} tokens, but token_embd.weight has {rows:,} rows")
    if count < rows:
        notes.append(f"{rows - count:,} rows of the embedding beyond the {count:,} tokens are left out")
    return count


def has_bare_attention(config: GPTConfig) -> bool:
    """Whether a layer lacks its MLP: llama.cpp then leaves out that layer's attention too."""
    return any(config.layer(i).mlp_dim == 0 for i in range(config.n_layer))


def _check_keys(header: GgufHeader, architecture: str) -> None:
    """FormatError for a variant that is not supported, and for one part of a model in several files."""
    for key, value in header.metadata.items():
        unknown = key.startswith(f"{architecture}.") and key.removeprefix(f"{architecture}.") not in _KNOWN
        if unknown and value not in (0, "none", ""):
            found = f"{key[:80]} = {str(value)[:80]}"
            raise FormatError(f"{header.path}: has {found}, a kind of {architecture} that is not supported")
    parts = header.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise FormatError(f"{header.path}: is one of {parts} files; join them with llama.cpp's gguf-split --merge")


def _context(keys: _Keys, notes: list[str]) -> int:
    context = keys.count("context_length")
    window = keys.raw("attention.sliding_window", 0)
    if type(window) is int and 0 < window < context:
        notes.append(f"context of {context:,} cut to its sliding window of {window:,}, within which nothing differs")
        return window
    return context


def _head_dim(keys: _Keys, n_embd: int, heads: int | tuple[int, ...]) -> int:
    most = max(heads) if isinstance(heads, tuple) else heads
    size = keys.count("attention.key_length", keys.raw("rope.dimension_count", n_embd // max(1, most)))
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.raw(name, size) != size:
            raise keys.fail(name, keys.raw(name), f"{size}, the size of a head's keys")
    return size


def _biases(header: GgufHeader, qkv: str) -> dict[str, bool]:
    names = {"qkv_bias": qkv, "o_bias": "attn_output", "mlp_bias": "ffn_up"}
    return {ours: any(name.endswith(f".{stored}.bias") for name in header.tensors) for ours, stored in names.items()}


def _gpt2_style(header: GgufHeader, keys: _Keys) -> dict[str, Any]:
    return {"norm_eps": keys.number("attention.layer_norm_epsilon"), **_biases(header, "attn_qkv")}


def _llama_style(header: GgufHeader, keys: _Keys) -> dict[str, Any]:
    return {
        "position": "rope",
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        "norm": "rmsnorm",
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "norm_bias": False,
        "mlp": "swiglu",
        "qk_norm": any(name.endswith(".attn_q_norm.weight") for name in header.tensors),
        **_biases(header, "attn_q"),
    }


# ---- rotary positions


def _rope_scaling(keys: _Keys, config: GPTConfig, factors: Tensor | None) -> dict[str, Any] | None:
    kind = keys.raw("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise keys.fail("rope.scaling.type", kind, "none or linear (or Llama 3's rope_freqs.weight)")
    stretch = keys.number("rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    if factors is not None:
        if stretch != 1.0:
            raise keys.fail("rope.scaling.type", kind, "none beside rope_freqs.weight")
        return _llama3_scaling(keys, config, factors)
    return None if stretch == 1.0 else {"rope_type": "linear", "factor": stretch}


def llama3_factors(config: GPTConfig, scaling: dict[str, Any]) -> Tensor:
    """What divides each pair's frequency (head_dim / 2,), float32: GGUF's form of Llama 3's scaling."""
    device = torch.device("cpu")
    plain = rope_frequencies(config.head_dim, config.rope_theta, None, device)
    return plain / rope_frequencies(config.head_dim, config.rope_theta, scaling, device)


def _llama3_scaling(keys: _Keys, config: GPTConfig, factors: Tensor) -> dict[str, Any] | None:
    """The parameters that give these factors. Rounding in the blend is magnified by the stretch: 2e-5 for 32."""
    if factors.shape != (config.head_dim // 2,):
        found = tuple(factors.shape)
        raise FormatError(
            f"{keys.header.path}: rope_freqs.weight has shape {found}, expected ({config.head_dim // 2},)"
        )
    if torch.equal(factors, torch.ones_like(factors)):
        return None
    stated = keys.raw("rope.scaling.original_context_length", 8192)
    stretches = [float(f"{float(factors.max()):.7g}"), 8.0, 32.0]
    contexts = [stated if type(stated) is int and 0 < stated < 1 << 31 else 8192, 8192, *(1 << i for i in range(4, 20))]
    for factor in stretches:
        for context in contexts:
            scaling = {
                "rope_type": "llama3",
                "factor": factor,
                **_LLAMA3,
                "original_max_position_embeddings": context,
            }
            if torch.allclose(llama3_factors(config, scaling), factors, rtol=2e-5, atol=0.0):
                return scaling
    raise FormatError(
        f"{keys.header.path}: rope_freqs.weight holds none of Llama 3's scalings; others are not supported"
    )


# ---- the way out


def architecture_for(config: GPTConfig) -> str:
    """The architecture under which llama.cpp computes this network. ValueError with the reason where there is none."""
    uneven = any(isinstance(size, tuple) for size in (config.n_head, config.n_kv_head, config.mlp_dim))
    if has_bare_attention(config):
        raise ValueError("GGUF: llama.cpp leaves out the attention of a layer without an MLP: export to Hugging Face")
    if config.position == "learned":
        return _gpt2(config, uneven)
    if (config.norm, config.mlp) != ("rmsnorm", "swiglu"):
        raise ValueError(f"GGUF: no architecture has rotary positions with {config.norm} and {config.mlp}")
    if config.qk_norm:
        if uneven or config.qkv_bias or config.o_bias or config.mlp_bias:
            raise ValueError("GGUF: norms of q and k exist only as qwen3, with equal layers and no bias")
        return "qwen3"
    if uneven:
        if config.o_bias or config.mlp_bias or config.qkv_bias:
            raise ValueError("GGUF: layers of different sizes exist only as deci, without biases")
        return "deci"
    wide = config.layer(0).n_head * config.head_dim == config.n_embd
    if config.qkv_bias and wide and config.rope_scaling is None and not (config.o_bias or config.mlp_bias):
        return "qwen2"
    return "llama"


def _gpt2(config: GPTConfig, uneven: bool) -> str:
    biases = (config.qkv_bias, config.o_bias, config.mlp_bias, config.norm_bias)
    if (config.norm, config.mlp) != ("layernorm", "gelu") or not all(biases) or config.qk_norm:
        raise ValueError("GGUF: learned positions exist only as gpt2: layernorm, gelu and every bias")
    if uneven or config.n_head != config.n_kv_head or config.layer(0).n_head * config.head_dim != config.n_embd:
        raise ValueError(
            "GGUF: gpt2 takes equal layers whose heads fill the width, each with its own keys and values; llama.cpp "
            "has per-layer sizes (deci) only for Llama-like networks: export to Hugging Face"
        )
    return "gpt2"


def metadata_for(config: GPTConfig, architecture: str) -> dict[str, Any]:
    """Keys (without the architecture in front) and values that describe the network; lists are one number per layer."""
    layers = [config.layer(i) for i in range(config.n_layer)]
    sizes = {
        "attention.head_count": [layer.n_head for layer in layers],
        "attention.head_count_kv": [layer.n_kv_head for layer in layers],
        "feed_forward_length": [layer.mlp_dim for layer in layers],
    }
    values: dict[str, Any] = {
        "block_count": config.n_layer,
        "context_length": config.block_size,
        "embedding_length": config.n_embd,
        **{key: listed if architecture == "deci" else listed[0] for key, listed in sizes.items()},
    }
    if architecture == "gpt2":
        return {**values, "attention.layer_norm_epsilon": config.norm_eps}
    values |= {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    }
    scaling = config.rope_scaling
    if scaling is not None and scaling["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    elif scaling is not None:
        if architecture not in INTERLEAVED:
            raise ValueError(f"GGUF: {architecture} takes no rope_freqs.weight, so Llama 3's scaling does not fit it")
        values["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    return values
