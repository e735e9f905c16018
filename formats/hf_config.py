"""A Hugging Face config.json as a GPTConfig (formats.hf_families has the way back).

Both ways of writing rotary positions are read: `rope_theta` with `rope_scaling` (transformers up to 4), and
`rope_parameters` (5). Keys that a file lacks have the values that transformers 5 gives them in that family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from formats.errors import FormatError
from formats.hf_families import ARCHITECTURES, ESPALIER
from model.config import ROPE_SCALINGS, GPTConfig, padded_vocab

_MAX_LAYERS = 10_000  # the deepest published ones have 126; a config must not make loops that do not end
# What transformers assumes: vocab_size, hidden_size, intermediate_size, layers, heads, key/value heads, positions.
_SIZES = {
    "llama": (32_000, 4096, 11_008, 32, 32, None, 2048),
    "mistral": (32_000, 4096, 14_336, 32, 32, 8, 131_072),
    "qwen2": (151_936, 4096, 22_016, 32, 32, 32, 32_768),
    "qwen3": (151_936, 4096, 22_016, 32, 32, 32, 32_768),
}
_REQUIRED: Any = object()


class _Keys:
    """Typed access to a config.json; a value of another type is a FormatError that names the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, name: str, default: Any, wanted: str, fits: Any) -> Any:
        """The value of a key that is there and not null, else `default`."""
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise FormatError(f"{self.where}: lacks {name}, expected {wanted}")
            return default
        if not fits(value):
            raise FormatError(f"{self.where}: {name} is {str(value)[:80]!r}, expected {wanted}")
        return value

    def count(self, name: str, default: Any, most: int = (1 << 31) - 1) -> Any:
        """A whole number of at least 1."""
        return self.get(name, default, f"a whole number from 1 to {most}", lambda v: type(v) is int and 1 <= v <= most)

    def number(self, name: str, default: Any) -> Any:
        """A finite number above 0."""
        value = self.get(name, default, "a number above 0", lambda v: type(v) in (int, float) and 0 < v < 1e300)
        return value if value is None else float(value)

    def flag(self, name: str, default: bool) -> bool:
        value: bool = self.get(name, default, "true or false", lambda v: isinstance(v, bool))
        return value

    def text(self, name: str, default: Any) -> Any:
        return self.get(name, default, "text", lambda v: isinstance(v, str))

    def refuse(self, name: str, value: Any, reason: str) -> None:
        raise FormatError(f"{self.where}: {name[:80]} is {str(value)[:80]!r}: {reason[:300]}")

    def only(self, name: str, default: Any, wanted: Any) -> None:
        """Refuses any value of a key but the one that the network here computes."""
        value = self.values.get(name, default)
        if value != wanted:
            self.refuse(name, value, f"only {wanted!r} is supported")


def to_gpt_config(hf: Mapping[str, Any], where: str) -> tuple[GPTConfig, list[str]]:
    """The network that a config.json describes, and a line for each thing that was adapted.

    FormatError, `where` first, for an unknown architecture, custom code, quantized weights, a key of another type, or
    a variant (activation, rope scaling, ...) that the network here does not compute.
    """
    keys = _Keys(hf, where)
    model_type = _model_type(keys)
    notes: list[str] = []
    try:
        if model_type == ESPALIER:
            return _read_espalier(keys), notes
        if model_type == "gpt2":
            return _read_gpt2(keys), notes
        return _read_llama_like(keys, model_type, notes), notes
    except FormatError:
        raise
    except (ValueError, TypeError) as error:  # GPTConfig's own checks
        raise FormatError(f"{where}: {error}") from None


def _model_type(keys: _Keys) -> str:
    """The family, after the refusal of what is never read."""
    if keys.values.get("auto_map"):
        raise FormatError(
            f"{keys.where}: has auto_map, so the model brings its own code, which is never run here: "
            f"give a model of one of {', '.join(ARCHITECTURES)} without it"
        )
    if keys.values.get("quantization_config"):
        raise FormatError(
            f"{keys.where}: has quantization_config: give the unquantized weights, or a GGUF file of the model"
        )
    model_type: str = keys.text("model_type", _REQUIRED)
    if model_type not in ARCHITECTURES:
        keys.refuse("model_type", model_type, f"known are {', '.join(ARCHITECTURES)}")
    named = keys.get("architectures", [], "a list of names", lambda v: isinstance(v, list))
    # A classifier has no head that predicts tokens; the bare model (GPT2Model) may lie beside its tied head.
    causal = ARCHITECTURES[model_type]
    known = {causal, causal.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")}
    if named and not known & {str(name) for name in named}:
        keys.refuse("architectures", named, f"for model_type {model_type!r} only {causal} is supported")
    return model_type


def _read_gpt2(keys: _Keys) -> GPTConfig:
    keys.only("activation_function", "gelu_new", "gelu_new")
    keys.only("scale_attn_weights", True, True)
    keys.only("scale_attn_by_inverse_layer_idx", False, False)
    keys.only("add_cross_attention", False, False)
    n_embd, n_head = keys.count("n_embd", 768), keys.count("n_head", 12)
    vocab_size = keys.count("vocab_size", 50_257)
    return GPTConfig(
        block_size=keys.count("n_positions", 1024),
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab(vocab_size),
        n_layer=keys.count("n_layer", 12, _MAX_LAYERS),
        n_head=n_head,
        n_kv_head=n_head,
        head_dim=_head_dim(keys, n_embd, n_head),
        n_embd=n_embd,
        mlp_dim=keys.count("n_inner", 4 * n_embd),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
    )


def _head_dim(keys: _Keys, n_embd: int, n_head: int) -> int:
    if n_embd % n_head:
        keys.refuse("the number of heads", n_head, f"it does not divide the width {n_embd}, and no head_dim is given")
    return n_embd // n_head


def _read_llama_like(keys: _Keys, model_type: str, notes: list[str]) -> GPTConfig:
    keys.only("hidden_act", "silu", "silu")
    vocab, width, mlp_dim, layers, heads, kv_heads, positions = _SIZES[model_type]
    vocab_size, n_embd = keys.count("vocab_size", vocab), keys.count("hidden_size", width)
    n_layer, n_head = keys.count("num_hidden_layers", layers, _MAX_LAYERS), keys.count("num_attention_heads", heads)
    if "num_key_value_heads" in keys.values or kv_heads is None:
        kv_heads = n_head  # what an explicit null means
    context = keys.count("max_position_embeddings", positions)
    theta, scaling = _rope(keys, context)
    bias = keys.flag("attention_bias", False) if model_type in ("llama", "qwen3") else False
    head_dim = keys.count("head_dim", 128 if model_type == "qwen3" and "head_dim" not in keys.values else None)
    return GPTConfig(
        block_size=_within_window(keys, model_type, context, n_layer, notes),
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab(vocab_size),
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=keys.count("num_key_value_heads", kv_heads),
        head_dim=_head_dim(keys, n_embd, n_head) if head_dim is None else head_dim,
        n_embd=n_embd,
        mlp_dim=keys.count("intermediate_size", mlp_dim),
        position="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        norm="rmsnorm",
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        mlp="swiglu",
        qkv_bias=bias or model_type == "qwen2",
        o_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False) if model_type == "llama" else False,
        norm_bias=False,
        qk_norm=model_type == "qwen3",
        tie_embeddings=keys.flag("tie_word_embeddings", False),
    )


def _rope(keys: _Keys, context: int) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling as GPTConfig has them."""
    is_object = ("an object", lambda value: isinstance(value, dict))
    given = keys.get("rope_scaling", None, *is_object) or keys.get("rope_parameters", {}, *is_object)
    rope = _Keys(given, f"{keys.where}: rope_parameters")
    for place in (keys, rope):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            place.refuse("partial_rotary_factor", place.values["partial_rotary_factor"], "only 1 is supported")
    theta = rope.number("rope_theta", keys.number("rope_theta", 10_000.0))
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind != "default" and kind not in ROPE_SCALINGS:
        rope.refuse("rope_type", kind, f"supported are default, {', '.join(ROPE_SCALINGS)}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    unknown = sorted(set(given) - known - ROPE_SCALINGS.get(kind, set()))
    if unknown:
        rope.refuse(unknown[0], given[unknown[0]], f"the rope_type {kind!r} has no such key")
    if kind == "default":
        return theta, None
    scaling: dict[str, Any] = {"rope_type": kind}
    for name in sorted(ROPE_SCALINGS[kind]):
        length = keys.count(name, context) if name == "original_max_position_embeddings" else None
        scaling[name] = rope.number(name, _REQUIRED) if length is None else rope.count(name, length)
    return theta, scaling


def _within_window(keys: _Keys, model_type: str, context: int, n_layer: int, notes: list[str]) -> int:
    """The context in which attention to the last `sliding_window` positions is attention to all."""
    window = None
    if model_type == "mistral":
        window = keys.count("sliding_window", None if "sliding_window" in keys.values else 4096)
    elif model_type.startswith("qwen") and keys.flag("use_sliding_window", False):
        slides_from = keys.get("max_window_layers", 28, "a whole number", lambda v: type(v) is int and v >= 0)
        if slides_from < n_layer or "layer_types" in keys.values:
            window = keys.count("sliding_window", 4096)
    layers = keys.get("layer_types", [], "a list of names", lambda v: isinstance(v, list))
    strange = [kind for kind in layers if kind != "full_attention" and (kind != "sliding_attention" or window is None)]
    if strange:
        keys.refuse(
            "layer_types", strange[0], "only full_attention, and sliding_attention with a window, are supported"
        )
    if window is None or window >= context or (layers and "sliding_attention" not in layers):
        return context
    notes.append(
        f"context {context} limited to {window}: the model attends to the last {window} tokens only, "
        "and inside that window it is the same without sliding"
    )
    return int(window)


def _read_espalier(keys: _Keys) -> GPTConfig:
    """The fields of GPTConfig, by its names, as `from_gpt_config` wrote them."""
    values = {name: value for name, value in keys.values.items() if name in GPTConfig.__dataclass_fields__}
    values["padded_vocab_size"] = padded_vocab(keys.count("vocab_size", _REQUIRED))
    keys.count("n_layer", _REQUIRED, _MAX_LAYERS)
    for name in ("norm_eps", "rope_theta", "dropout"):
        keys.get(name, None, "a number", lambda v: type(v) in (int, float))
    for name in ("qkv_bias", "o_bias", "mlp_bias", "norm_bias", "qk_norm", "tie_embeddings"):
        keys.flag(name, False)
    keys.get("rope_scaling", None, "an object", lambda v: isinstance(v, dict))
    return GPTConfig.from_dict(values)
