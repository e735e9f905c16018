"""What a network is: sizes and style, without the tensors. Importing this module does not import torch."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

POSITIONS = ("learned", "rope")
NORMS = ("layernorm", "rmsnorm")
MLPS = ("gelu", "swiglu")
PER_LAYER = ("n_head", "n_kv_head", "mlp_dim")
# The largest sizes that are believed: far above any published network's, and such that no product of two overflows.
LARGEST = {
    **dict.fromkeys(("block_size", "vocab_size", "padded_vocab_size"), 1 << 31),
    **dict.fromkeys(("n_head", "n_kv_head", "head_dim", "n_embd"), 1 << 20),
    "mlp_dim": 1 << 24,
    "n_layer": 10_000,
}
# The keys of `rope_scaling` by its "rope_type", under the names that published Llama configurations use.
ROPE_SCALINGS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


class LayerSizes(NamedTuple):
    """The sizes of one block. 0 heads: no attention and no norm before it. 0 mlp_dim: the same for the MLP."""

    n_head: int
    n_kv_head: int
    head_dim: int
    mlp_dim: int


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape and style of a GPT; the style defaults to GPT-2's.

    `n_head`, `n_kv_head` and `mlp_dim` are one number, or one per layer; 0 means that the sub-layer is absent.
    A list whose numbers are all equal becomes that number, so that equal networks have equal configs.
    """

    block_size: int  # the longest context, tokens
    vocab_size: int  # ids that exist: 0..vocab_size-1
    padded_vocab_size: int  # rows of the embedding; those from vocab_size on are never predicted
    n_layer: int
    n_head: int | tuple[int, ...]
    n_kv_head: int | tuple[int, ...]  # fewer than n_head: each key/value head serves n_head / n_kv_head queries
    head_dim: int
    n_embd: int
    mlp_dim: int | tuple[int, ...]
    position: str = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    mlp: str = "gelu"
    qkv_bias: bool = True
    o_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    qk_norm: bool = False  # RMSNorm over each head's query and key before they are turned (Qwen3)
    tie_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in PER_LAYER:
            object.__setattr__(self, name, _one_or_per_layer(name, getattr(self, name), self.n_layer))
        self._check_style()
        self._check_heads()
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling, self.position)
            object.__setattr__(self, "rope_scaling", dict(self.rope_scaling))

    def _check_numbers(self) -> None:
        for name in ("block_size", "vocab_size", "padded_vocab_size", "n_layer", "head_dim", "n_embd"):
            value = getattr(self, name)
            if not _is_size(value, LARGEST[name]) or value < 1:
                raise ValueError(f"{name} is {_shown(value)}: give a whole number from 1 to {LARGEST[name]:,}")
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size {self.padded_vocab_size} is smaller than vocab_size {self.vocab_size}: "
                f"give {padded_vocab(self.vocab_size)}"
            )
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {_shown(self.dropout)}: give a probability from 0 to below 1")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < 1e300:
                raise ValueError(f"{name} is {_shown(value)}: give a number above 0")

    def _check_style(self) -> None:
        for name, choices in (("position", POSITIONS), ("norm", NORMS), ("mlp", MLPS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"{name} is {_shown(value)}: choose one of {', '.join(choices)}")
        for name in ("qkv_bias", "o_bias", "mlp_bias", "norm_bias", "qk_norm", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {_shown(getattr(self, name))}: give true or false")
        if self.norm == "rmsnorm" and self.norm_bias:
            raise ValueError("norm 'rmsnorm' has no bias: set norm_bias to False")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary positions turn pairs, so give an even number")

    def _check_heads(self) -> None:
        ratios = set()
        for i in range(self.n_layer):
            n_head, n_kv_head = self.layer(i)[:2]
            if n_head == n_kv_head == 0:
                continue
            if n_kv_head == 0 or n_head == 0 or n_head % n_kv_head:
                raise ValueError(
                    f"layer {i} has n_head {n_head} and n_kv_head {n_kv_head}: n_head must be a multiple of n_kv_head "
                    "(both 0 for a layer without attention)"
                )
            ratios.add(n_head // n_kv_head)
        if len(ratios) > 1:
            raise ValueError(f"n_head / n_kv_head differs between layers ({sorted(ratios)}): make it the same in all")

    def layer(self, i: int) -> LayerSizes:
        """The sizes of block `i`, 0 <= i < n_layer."""
        n_head, n_kv_head, mlp_dim = (
            value[i] if isinstance(value, tuple) else value for value in (self.n_head, self.n_kv_head, self.mlp_dim)
        )
        return LayerSizes(n_head, n_kv_head, self.head_dim, mlp_dim)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, fit for JSON and YAML; `from_dict` reads it back."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPTConfig:
        """The config that `to_dict` wrote. ValueError names a key that is unknown or missing."""
        check_known(values, [field.name for field in dataclasses.fields(cls)], "model setting")
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"the model's config lacks {', '.join(missing)}")
        return cls(**values)


def padded_vocab(vocab_size: int) -> int:
    """The next multiple of 128 (50,257 -> 50,304): matmul kernels are fastest on such sizes."""
    return -(-vocab_size // 128) * 128


def check_known(names: Iterable[str], known: list[str], what: str) -> None:
    """ValueError for the first of `names` that is not in `known`, with the nearest that is."""
    for name in names:
        if not isinstance(name, str) or name not in known:
            near = difflib.get_close_matches(str(name)[:80], known, n=1, cutoff=0.0)
            raise ValueError(f"unknown {what} {_shown(name)}: did you mean {near[0]!r}?")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_size(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest


def _shown(value: object) -> str:
    """A value in a message: on one line, and short."""
    return " ".join(repr(value).split())[:80]


def _one_or_per_layer(name: str, value: Any, n_layer: int) -> int | tuple[int, ...]:
    """`value` as an int or a tuple of n_layer ints that are not all equal."""
    sizes = tuple(value) if isinstance(value, (list, tuple)) else (value,) * n_layer
    if not all(_is_size(size, LARGEST[name]) for size in sizes):
        asked = f"give one whole number, or one per layer, none below 0 or above {LARGEST[name]:,}"
        raise ValueError(f"{name} is {_shown(value)}: {asked}")
    if len(sizes) != n_layer:
        raise ValueError(f"{name} lists {len(sizes)} layers, but n_layer is {n_layer}: give one number for each")
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _check_rope_scaling(scaling: Mapping[str, Any], position: str) -> None:
    if position != "rope":
        raise ValueError("rope_scaling is set, but position is not 'rope': drop it")
    if not isinstance(scaling, Mapping) or not all(isinstance(key, str) for key in scaling):
        raise ValueError(f"rope_scaling is {_shown(scaling)}: give its keys and their values")
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        raise ValueError(f"rope_scaling has rope_type {_shown(kind)}: known are {', '.join(ROPE_SCALINGS)}")
    keys = set(scaling) - {"rope_type"}
    if keys != ROPE_SCALINGS[kind]:
        raise ValueError(f"rope_scaling {kind!r} takes {sorted(ROPE_SCALINGS[kind])}, found {_shown(sorted(keys))}")
    for key in keys:
        if not _is_number(scaling[key]) or not 0 < scaling[key] < 1e300:
            raise ValueError(f"rope_scaling has {key} {_shown(scaling[key])}: give a number above 0")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError("rope_scaling has high_freq_factor <= low_freq_factor: give a larger high_freq_factor")


def _gpt2(n_layer: int, n_head: int, n_embd: int, block_size: int = 1024) -> GPTConfig:
    return GPTConfig(
        block_size=block_size,
        vocab_size=50_257,
        padded_vocab_size=padded_vocab(50_257),
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_head,
        head_dim=n_embd // n_head,
        n_embd=n_embd,
        mlp_dim=4 * n_embd,
    )


def _llama(n_layer: int, n_head: int, n_kv_head: int, n_embd: int, mlp_dim: int, block_size: int = 1024) -> GPTConfig:
    return dataclasses.replace(
        _gpt2(n_layer, n_head, n_embd, block_size),
        n_kv_head=n_kv_head,
        mlp_dim=mlp_dim,
        position="rope",
        norm="rmsnorm",
        mlp="swiglu",
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        norm_bias=False,
    )


# GPT-2's four sizes; the Llama-style ones are as wide and deep, with mlp_dim chosen to have as many parameters.
PRESETS: dict[str, GPTConfig] = {
    "tiny": _gpt2(4, 4, 256, block_size=256),
    "124M": _gpt2(12, 12, 768),
    "350M": _gpt2(24, 16, 1024),
    "774M": _gpt2(36, 20, 1280),
    "1558M": _gpt2(48, 25, 1600),
    "llama-tiny": _llama(4, 4, 2, 256, 768, block_size=256),
    "llama-124M": _llama(12, 12, 4, 768, 2432),
    "llama-350M": _llama(24, 16, 4, 1024, 3200),
    "llama-774M": _llama(36, 20, 5, 1280, 4096),
    "llama-1558M": _llama(48, 25, 5, 1600, 5120),
}


def preset(name: str, **overrides: Any) -> GPTConfig:
    """The preset of that name with some fields replaced; a new vocab_size brings its own padded_vocab_size.

    ValueError for an unknown preset or field, with the nearest name.
    """
    check_known([name], list(PRESETS), "preset")
    check_known(overrides, [field.name for field in dataclasses.fields(GPTConfig)], "model setting")
    if "vocab_size" in overrides:
        overrides.setdefault("padded_vocab_size", padded_vocab(overrides["vocab_size"]))
    return dataclasses.replace(PRESETS[name], **overrides)
