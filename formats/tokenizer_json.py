"""Any of our tokenizers as a tokenizer.json, which transformers and others read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from data.tokenizer import END_OF_TEXT, BpeTokenizer, Tokenizer

if TYPE_CHECKING:
    import tokenizers


def to_tokenizer_json(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer.json that gives the same ids, and the token in front where every text begins with one.

    A BpeTokenizer's own text comes back unchanged, unless its post-processor puts something else in front.
    """
    from tokenizers import Tokenizer as Backend

    if not isinstance(tokenizer, BpeTokenizer):
        text: str = _built(tokenizer).to_str()
        return text
    backend = Backend.from_str(tokenizer.tokenizer_json)
    wanted = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if backend.encode("").ids == wanted:
        return tokenizer.tokenizer_json
    values = json.loads(tokenizer.tokenizer_json)
    values["post_processor"] = _in_front(tokenizer) if wanted else None
    return json.dumps(values, ensure_ascii=False)


def _in_front(tokenizer: BpeTokenizer) -> dict[str, object]:
    """The post-processor that puts the begin-of-text token before a text."""
    name = tokenizer.spec()["bos"]
    token = {"SpecialToken": {"id": name, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [token, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}},
    }


def _built(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """GPT-2's BPE, or plain bytes as a BPE without merges; the ids below the end of text are ranks in both."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    characters = _byte_characters()
    ranks = {tokenizer.decode_bytes([token]): token for token in range(tokenizer.eot_id)}
    vocabulary = {"".join(characters[value] for value in piece): token for piece, token in ranks.items()}
    pairs = [_merged_from(piece, ranks) for piece in ranks if len(piece) > 1]
    merges = [("".join(characters[v] for v in left), "".join(characters[v] for v in right)) for left, right in pairs]
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    is_gpt2 = tokenizer.kind == "gpt2"
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_gpt2)  # its split into words
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return backend


def _merged_from(piece: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge makes `piece`: where BPE stands before its last step."""
    parts = [piece[place : place + 1] for place in range(len(piece))]
    while len(parts) > 2:
        candidates = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        place = candidates.index(min(candidates))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def _byte_characters() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary: itself where it is printable in Latin-1."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(character): character for character in alphabet if ord(character) < 256}
    others = [value for value in range(256) if value not in printable]  # they stand in order, from U+0100 on
    return printable | dict(zip(others, alphabet[len(printable) :]))
