"""How byte-level vocabularies of GGUF files split text into words: what `tokenizer.ggml.pre` names.

A GGUF file only names its splitting; the patterns are those of the tokenizer.json of the models that the names come
from. Which names mean the same is llama.cpp's table (src/llama-vocab.cpp).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Splitting(NamedTuple):
    """What a name stands for, in the terms of a tokenizer.json."""

    pre_tokenizer: dict[str, Any]
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges say
    begins: bool = False  # texts begin with a token of their own unless the file says otherwise
    normalizer: dict[str, Any] | None = None


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(*patterns: str) -> dict[str, Any]:
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return _sequence(*steps, _byte_level(use_regex=False))


# Pieces that the published patterns share. L: letters, N: digits, M: combining marks, Lu ... Lo: kinds of letters.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_LLAMA3 = _split("|".join((_CONTRACTION, _WORDS, r"\p{N}{1,3}", _SIGNS, _LINES)))
_QWEN2 = _split("|".join((_CONTRACTION, _WORDS, r"\p{N}", _SIGNS, _LINES)))
_TEKKEN = _split("|".join((*_CAPITALS, r"\p{N}", _PATHS, _LINES)))
_GPT4O = _split("|".join((*(part + _CONTRACTION + "?" for part in _CAPITALS), r"\p{N}{1,3}", _PATHS, _LINES)))
_QWEN35_SIGNS = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
_QWEN35 = _split("|".join((_CONTRACTION, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", _QWEN35_SIGNS, _LINES)))

# llama.cpp treats "qwen2" and "deepseek-r1-qwen" alike; the tokenizer of the former composes accents first (NFC).
SPLITTINGS: dict[str, Splitting] = {
    "gpt-2": Splitting(_byte_level(use_regex=True)),
    "llama-bpe": Splitting(_LLAMA3, ignore_merges=True, begins=True),
    "smaug-bpe": Splitting(_LLAMA3),
    "qwen2": Splitting(_QWEN2, normalizer={"type": "NFC"}),
    "deepseek-r1-qwen": Splitting(_QWEN2),
    "smollm": Splitting(_sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))),
    "tekken": Splitting(_TEKKEN, ignore_merges=True, begins=True),
    "gpt-4o": Splitting(_GPT4O),
    "qwen35": Splitting(_QWEN35, normalizer={"type": "NFC"}),
    "default": Splitting(_split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
_SAME_AS = {
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "granite-docling", "mellum"), "gpt-2"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("dbrx",), "smaug-bpe"),
    **dict.fromkeys(("kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"), "deepseek-r1-qwen"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), "smollm"),
    **dict.fromkeys(("llama4", "kanana2", "talkie", "minimax-m2"), "gpt-4o"),
}


def splitting(name: str) -> Splitting | None:
    """What a `tokenizer.ggml.pre` stands for; None for one that is not known here."""
    return SPLITTINGS.get(_SAME_AS.get(name, name))


def name_of(pre_tokenizer: Any, normalizer: Any, ignore_merges: bool) -> str | None:
    """The name under which llama.cpp splits as this tokenizer.json does; None where it has none."""
    wanted = (_plain(pre_tokenizer), _plain(normalizer), ignore_merges)
    for name, known in SPLITTINGS.items():
        if wanted == (_plain(known.pre_tokenizer), _plain(known.normalizer), known.ignore_merges):
            return name
    return None


def _plain(component: Any) -> Any:
    """A component of a tokenizer.json without what changes no id: offsets, defaults, sequences of one or none."""
    if not isinstance(component, dict):
        return component
    for plural in ("pretokenizers", "normalizers"):
        if isinstance(component.get(plural), list):
            steps = [_plain(step) for step in component[plural]]
            return {**component, plural: steps} if len(steps) > 1 else steps[0] if steps else None
    kept = {
        key: value for key, value in component.items() if (key, value) != ("invert", False) and key != "trim_offsets"
    }
    return {"use_regex": True, **kept} if component.get("type") == "ByteLevel" else kept
