"""A tokenizer and a template as the `tokenizer.*` metadata of a GGUF file."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

from data.chat import ChatTemplate, as_jinja
from data.templates import PromptTemplate
from data.tokenizer import BpeTokenizer, Tokenizer
from formats.gguf_pretokenizers import SPLITTINGS, name_of
from formats.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges_of,
)

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def vocabulary_metadata(
    tokenizer: Tokenizer, template: PromptTemplate | ChatTemplate | None
) -> tuple[dict[str, Any], list[str]]:
    """Keys and values of the metadata that make llama.cpp encode as `tokenizer` does, and notes on the rest.

    ValueError with the reason where llama.cpp has no such splitting into words, normalisation or model.
    """
    notes: list[str] = []
    fields = _of_json(tokenizer, notes) if isinstance(tokenizer, BpeTokenizer) else _of_bytes(tokenizer)
    eos = tokenizer.eot_id
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    fields |= {"eos_token_id": eos, "add_bos_token": tokenizer.bos_id is not None}
    if tokenizer.bos_id is not None:
        begin, fields["bos_token_id"] = names.get(tokenizer.bos_id, ""), tokenizer.bos_id
    else:  # llama.cpp wants one all the same; a chat template may write it
        begin, asked = "", template.bos_token if isinstance(template, ChatTemplate) else ""
        fields["bos_token_id"] = tokenizer.special_tokens.get(asked, eos)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    if isinstance(template, ChatTemplate):
        metadata["tokenizer.chat_template"] = template.source
        ends = [end for end in template.stop if end in tokenizer.special_tokens and end != names[eos]]
        if ends:
            metadata["tokenizer.ggml.eot_token_id"] = tokenizer.special_tokens[ends[0]]
        if len(ends) > 1:
            notes.append(f"GGUF names two ends of an answer at most; {', '.join(map(repr, ends[1:]))} left out")
    elif template is not None:
        metadata["tokenizer.chat_template"] = as_jinja(template, names[eos], begin)
    return metadata, notes


# ---- GPT-2's vocabulary and plain bytes


def _of_bytes(tokenizer: Tokenizer) -> dict[str, Any]:
    """A vocabulary whose ids are ranks: the bytes, then their merges, the first one first; and the end of text."""
    special = set(tokenizer.special_tokens.values())
    size = tokenizer.vocab_size
    ranks = {tokenizer.decode_bytes([token]): token for token in range(size) if token not in special}
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    spelled = {token: _spell(text) for text, token in ranks.items()}
    merges = [
        " ".join(map(_spell, _halves(text, ranks))) for text in sorted(ranks, key=ranks.__getitem__) if len(text) > 1
    ]
    end = names[tokenizer.eot_id]
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [spelled[token] if token in spelled else names[token] for token in range(size)],
        "token_type": [CONTROL if token in special else NORMAL for token in range(size)],
        # llama.cpp asks for merges, and gguf writes no empty list: one of the end of text with itself never applies.
        "merges": merges or [f"{end} {end}"],
    }


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge made this one: what is left when the earlier merges have been applied to its bytes."""
    parts = [bytes([value]) for value in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        place = pairs.index(min(pairs))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def _letters() -> str:
    """The printable stand-in of each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return "".join(chr(value if value in printable else next(others)) for value in range(256))


_LETTERS = _letters()


def _spell(text: bytes) -> str:
    return "".join(_LETTERS[value] for value in text)


# ---- any tokenizer.json


def _of_json(tokenizer: BpeTokenizer, notes: list[str]) -> dict[str, Any]:
    content = json.loads(tokenizer.tokenizer_json)
    model = content.get("model") or {}
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise ValueError(f"GGUF: a tokenizer of the kind {kind} cannot be written, only BPE")
    tokens, types = _tokens(content, tokenizer.vocab_size)
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    if any(token.get("lstrip") or token.get("rstrip") for token in content.get("added_tokens") or []):
        notes.append("GGUF cannot say that special tokens take in the spaces beside them")
    if model.get("byte_fallback"):
        return _sentencepiece(content, tokens, types, merges, notes)
    ignore_merges = bool(model.get("ignore_merges"))
    name = name_of(content.get("pre_tokenizer"), content.get("normalizer"), ignore_merges)
    if name is None:
        found = json.dumps({key: content.get(key) for key in ("normalizer", "pre_tokenizer")}, ensure_ascii=False)
        raise ValueError(
            f"GGUF: llama.cpp has no name for this splitting of text (known: {', '.join(SPLITTINGS)}): {found}"[:500]
        )
    if SPLITTINGS[name].normalizer is not None:
        notes.append("llama.cpp does not compose accents (NFC), so it may encode decomposed text otherwise")
    control = next(token for token, kind in zip(tokens, types) if kind == CONTROL)
    return {
        "model": "gpt2",
        "pre": name,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(merge) for merge in merges] or [f"{control} {control}"],
    }


def _tokens(content: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids that the vocabulary lacks are filled as llama.cpp's converter does."""
    model = content["model"]
    tokens, types = [f"[PAD{token}]" for token in range(size)], [UNUSED] * size
    for text, token in model["vocab"].items():
        is_byte = model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(text)
        tokens[token], types[token] = text, BYTE if is_byte else NORMAL
    for added in content.get("added_tokens") or []:
        token = added["id"]
        tokens[token], types[token] = added["content"], CONTROL if added["special"] else USER_DEFINED
    unknown = model.get("unk_token")
    if unknown in model["vocab"]:
        types[model["vocab"][unknown]] = UNKNOWN
    return tokens, types


def _sentencepiece(
    content: dict[str, Any], tokens: list[str], types: list[int], merges: list[list[str]], notes: list[str]
) -> dict[str, Any]:
    """Scores that give the same merges: minus the place of a token's first merge."""
    prefix = _space_prefix(content, notes)
    ids = {text: token for token, (text, kind) in enumerate(zip(tokens, types)) if kind != UNUSED}
    plain = {text for text, kind in zip(tokens, types) if kind == NORMAL}
    scores: dict[str, float] = {}
    for place, merge in enumerate(merges):
        scores.setdefault("".join(merge), -1.0 - place)
    never = -1.0 - len(merges)
    if merges_of(ids, {text: scores.get(text, never) for text in plain}) != merges:
        raise ValueError(
            "GGUF: llama.cpp joins the neighbours whose union has the best score, this tokenizer those whose merge "
            "comes first, and here the two differ: such a vocabulary cannot be written"
        )
    unknown = next((token for token, kind in enumerate(types) if kind == UNKNOWN), None)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "token_type": types,
        "scores": [scores.get(text, never) if text in plain else 0.0 for text in tokens],
        "add_space_prefix": prefix,
        **({} if unknown is None else {"unknown_token_id": unknown}),
    }


def _space_prefix(content: dict[str, Any], notes: list[str]) -> bool:
    """Whether a space is put in front of a text. ValueError for what is not SentencePiece's way with spaces."""
    normalizer, pre_tokenizer = content.get("normalizer"), content.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if pre_tokenizer is None and steps in ([escape], [{"type": "Prepend", "prepend": SPACE}, escape]):
        return len(steps) == 2
    found = pre_tokenizer or {}
    if not steps and (found.get("type"), found.get("replacement"), found.get("split")) == ("Metaspace", SPACE, False):
        if found.get("prepend_scheme") == "never":
            return False
        notes.append("llama.cpp puts a space also in front of text that begins with one")
        return True
    raise ValueError("GGUF: this tokenizer treats spaces in a way that llama.cpp's SentencePiece does not know")
