"""The vocabulary of a GGUF file as a tokenizer.json, with its chat template.

Two kinds exist among the supported families: byte-level BPE ("gpt2": tokens and merges), and SentencePiece's BPE
("llama": tokens with scores, spaces as U+2581, unknown characters as bytes), whose merges follow from the scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from data.chat import ChatTemplate
from data.tokenizer import BpeTokenizer, Tokenizer
from formats.errors import FormatError
from formats.gguf_header import GgufHeader
from formats.gguf_pretokenizers import SPLITTINGS, splitting

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_LONGEST_TOKEN = 1024  # characters, of a SentencePiece vocabulary: each way to cut a token is looked at
# What llama.cpp assumes for SentencePiece vocabularies that do not say.
_LLAMA_IDS = {"bos": 1, "eos": 2, "unknown": 0}


class _Vocabulary(NamedTuple):
    """The checked arrays and numbers of `tokenizer.ggml.*`."""

    header: GgufHeader
    kind: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]

    def get(self, name: str) -> Any:
        return self.header.metadata.get(f"tokenizer.ggml.{name}")

    def fail(self, finding: str) -> FormatError:
        return FormatError(f"{self.header.path}: its vocabulary {finding}")

    def token_id(self, role: str) -> int | None:
        """The id of a role (bos, eos, eot, unknown); None where there is none."""
        value = self.get(f"{role}_token_id")
        if value is None:
            value = _LLAMA_IDS.get(role) if self.kind == "llama" else None
            return value if value is not None and value < len(self.tokens) else None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise self.fail(f"has {role}_token_id {str(value)[:80]}, expected an id below {len(self.tokens):,}")
        return value

    def content(self, role: str) -> str:
        """The token of a role; "" where there is none."""
        token = self.token_id(role)
        return "" if token is None else self.tokens[token]

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.fail(f"has {name} {str(value)[:80]}, expected true or false")
        return default if value is None else value

    def array(self, name: str, kinds: tuple[type, ...], length: int | None) -> tuple[Any, ...]:
        values = self.get(name)
        fits = isinstance(values, tuple) and all(type(value) in kinds for value in values)
        if not fits or (length is not None and len(values) != length):
            wanted = f"{length:,} values" if length is not None else "a list"
            raise self.fail(f"has no {name} of the right kind, expected {wanted}")
        return tuple(values)


def has_vocabulary(header: GgufHeader) -> bool:
    """Whether the file holds tokens at all."""
    return "tokenizer.ggml.tokens" in header.metadata


def read_vocabulary(header: GgufHeader) -> tuple[Tokenizer, ChatTemplate | None]:
    """The file's tokenizer, and its chat template if it has one.

    The end of text is the file's eos token; it and the end of turn (eot, eom) end an answer of the template.
    FormatError names a kind of vocabulary or a splitting into words that is not supported, and what is damaged.
    """
    vocabulary = _checked(header)
    tokenizer_json = json.dumps(to_tokenizer_json(vocabulary), ensure_ascii=False)
    eos, bos = vocabulary.content("eos"), vocabulary.content("bos")
    first = bos if _adds_bos(vocabulary) else ""
    try:
        tokenizer = BpeTokenizer(tokenizer_json, str(header.path), eot=eos or None, bos=first)
    except ValueError as error:
        raise FormatError(str(error)) from None
    source = header.metadata.get("tokenizer.chat_template")
    if not isinstance(source, str):
        return tokenizer, None
    ends = dict.fromkeys(vocabulary.content(role) for role in ("eos", "eot", "eom"))
    return tokenizer, ChatTemplate("chat_template", source, bos, eos, tuple(end for end in ends if end))


def _checked(header: GgufHeader) -> _Vocabulary:
    kind = header.metadata.get("tokenizer.ggml.model")
    draft = _Vocabulary(header, str(kind), (), ())
    if kind not in ("gpt2", "llama"):
        raise draft.fail(f"is of the kind {str(kind)[:80]!r}; read are gpt2 (byte-level BPE) and llama (SentencePiece)")
    tokens = draft.array("tokens", (str,), None)
    types: tuple[int, ...] = (NORMAL,) * len(tokens)
    if draft.get("token_type") is not None:
        types = draft.array("token_type", (int,), len(tokens))
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise draft.fail(f"has the token {twice[:80]!r} twice")
    return draft._replace(tokens=tokens, types=types)


def _adds_bos(vocabulary: _Vocabulary) -> bool:
    known = splitting(vocabulary.get("pre") or "default")
    return vocabulary.flag("add_bos_token", vocabulary.kind == "llama" or (known is not None and known.begins))


def to_tokenizer_json(vocabulary: _Vocabulary) -> dict[str, Any]:
    """The content of the tokenizer.json that encodes as llama.cpp does with this vocabulary."""
    parts = _byte_level(vocabulary) if vocabulary.kind == "gpt2" else _sentencepiece(vocabulary)
    special = {vocabulary.token_id(role) for role in ("bos", "eos", "eot", "eom")}
    added = []
    for token, (content, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types)):
        is_special = kind in (CONTROL, UNKNOWN) or token in special
        if is_special or kind == USER_DEFINED:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": token, "content": content, **flags, "special": is_special})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **parts,
        "post_processor": _begin(vocabulary.content("bos"), vocabulary) if _adds_bos(vocabulary) else None,
    }


def _begin(bos: str, vocabulary: _Vocabulary) -> dict[str, Any]:
    """The post-processor that puts one token in front of a text."""
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    token = {"id": bos, "ids": [vocabulary.token_id("bos")], "tokens": [bos]}
    text, other = ({"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB"))
    if not bos:
        raise vocabulary.fail("says that texts begin with a token, but not with which (bos_token_id)")
    pair = [first, text, {"SpecialToken": {"id": bos, "type_id": 1}}, other]
    return {"type": "TemplateProcessing", "single": [first, text], "pair": pair, "special_tokens": {bos: token}}


def _ids(vocabulary: _Vocabulary) -> dict[str, int]:
    """Token -> id, without what only fills the table."""
    return {
        content: token
        for token, (content, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types))
        if kind != UNUSED
    }


def _bpe(ids: Mapping[str, int], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    plain = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {"type": "BPE", **plain, **settings, "vocab": dict(ids), "merges": merges}


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    name = vocabulary.get("pre") or "default"  # llama.cpp's choice too
    known = splitting(name)
    if known is None:
        raise vocabulary.fail(f"splits words in the way {str(name)[:80]!r}; known are {', '.join(sorted(SPLITTINGS))}")
    control = {token for token, kind in zip(vocabulary.tokens, vocabulary.types) if kind == CONTROL}
    merges = []
    for merge in vocabulary.array("merges", (str,), None):
        left, _, right = merge.partition(" ")
        if not left or not right:
            raise vocabulary.fail(f"has the merge {merge[:80]!r}, expected two tokens")
        if left not in control:  # text never becomes a control token, so such a merge (a lone filler) never applies
            merges.append([left, right])
    return {
        "normalizer": known.normalizer,
        "pre_tokenizer": known.pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(_ids(vocabulary), merges, ignore_merges=known.ignore_merges),
    }


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    scores = vocabulary.array("scores", (float, int), len(vocabulary.tokens))
    plain = {
        content: float(score)
        for content, kind, score in zip(vocabulary.tokens, vocabulary.types, scores)
        if kind == NORMAL
    }
    if max(map(len, plain), default=0) > _LONGEST_TOKEN:
        raise vocabulary.fail(f"has a token of more than {_LONGEST_TOKEN} characters")
    prefix = vocabulary.flag("add_space_prefix", True)
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = vocabulary.content("unknown") or None
    ids = _ids(vocabulary)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}] * prefix + [escape]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(ids, merges_of(ids, plain), unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def merges_of(ids: Mapping[str, int], scores: Mapping[str, float]) -> list[list[str]]:
    """The merges that SentencePiece's BPE makes with these scores, the best first.

    It joins the two neighbours whose union has the highest score, whichever they are: each way to cut a token in two
    tokens is a merge. Among those of one score, the order is that of published conversions: the longer left part first.
    """
    ways = [
        (-score, -cut, cut - len(token), ids[token], token[:cut], token[cut:])
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [[left, right] for *_, left, right in sorted(ways)]
