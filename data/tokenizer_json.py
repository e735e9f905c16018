"""Any tokenizer.json, through the `tokenizers` library."""

import json
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from data.tokenizer_base import END_OF_TEXT, Tokenizer, utf8

if TYPE_CHECKING:
    import tokenizers

# What models that did not come from here call the end of text, most specific first.
_USUAL_END_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
_RARE = "a \U0001f4a9\U00102345"  # characters that few vocabularies have
_LARGEST_VOCABULARY = 1 << 24  # the largest published ones have 262,144 ids; a damaged file must not cost gigabytes


class BpeTokenizer(Tokenizer):
    """A tokenizer.json, through the `tokenizers` library: one trained here, or that of a published model.

    eot: the special token that ends a document; None: the most specific of the usual names that the file has.
    bos: the token that begins every text; None: what the file's post-processor puts in front; "": none.
    Raises ValueError, `where` first, for a file that is damaged or lacks these tokens.
    """

    kind = "bpe"

    def __init__(
        self,
        tokenizer_json: str,
        where: str = "tokenizer.json",
        *,
        eot: str | None = None,
        bos: str | None = None,
    ) -> None:
        self.tokenizer_json = tokenizer_json
        self._tokenizer = _backend(tokenizer_json, where)
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a document is text
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > _LARGEST_VOCABULARY:
            raise ValueError(
                f"{where}: holds token id {self.vocab_size - 1}, expected ids below {_LARGEST_VOCABULARY:,}"
            )
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: number for number, token in sorted(added.items()) if token.special}
        self._read_components(json.loads(tokenizer_json), where)
        self._eot = self._usual["eot"] if eot is None else eot
        self._bos = self._usual["bos"] if bos is None else bos
        self.eot_id = self._id_of(self._eot, "end-of-text token", self.special_tokens, where)
        self.bos_id = self._id_of(self._bos, "token that begins a text", vocabulary, where) if self._bos else None
        self.may_cut = self._is_byte_level and not any(part.get("add_prefix_space") for part in self._pre_tokenizers)

    def _read_components(self, content: dict[str, Any], where: str) -> None:
        """What the library does not tell of the file. ValueError for forms that it takes and nobody writes."""
        self._pre_tokenizer, self._decoder = content.get("pre_tokenizer"), content.get("decoder")
        try:
            first = _first_token(content.get("post_processor"))
            for part in (*self._pre_tokenizers, *_parts(self._decoder, "decoders")):
                part.get("type")
            self._tokenizer.encode(_RARE)  # a token for unknown characters may itself be unknown
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{where}: not a tokenizer.json that can be used ({str(error)[:200]!r})") from None
        self._usual = {"eot": _usual_eot(self.special_tokens), "bos": first}

    def _id_of(self, name: str, role: str, ids: dict[str, int], where: str) -> int:
        if name not in ids:
            wanted = repr(name) if name else f"one special token of {', '.join(_USUAL_END_OF_TEXT)}"
            found = ", ".join(map(repr, self.special_tokens)) or "none"
            raise ValueError(f"{where}: has no {role}, expected {wanted}; its special tokens are {found}"[:500])
        return ids[name]

    def encode_numpy(self, text: str) -> np.ndarray:
        # encode_batch_fast of one text: no offsets are computed, 5.6 against 4.3 MB/s.
        (encoded,) = self._tokenizer.encode_batch_fast([utf8(text)], add_special_tokens=False)
        return np.array(encoded.ids, dtype=np.uint32)

    def special_spans(self, text: str) -> list[tuple[int, int, int]]:
        # The library finds them: a token may take in the spaces beside it, or be sought in the normalized text.
        encoded = self._with_specials.encode(text, add_special_tokens=False)
        special = set(self.special_tokens.values())
        return [(*span, token) for token, span in zip(encoded.ids, encoded.offsets) if token in special]

    def encode_section(self, text: str, first: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = (self._tokenizer if first else self._within).encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def decode(self, ids: Iterable[int]) -> str:
        if self._is_byte_level:
            return super().decode(ids)
        plain = [int(token) for token in ids]
        self.decode_bytes(plain)  # refuses unknown ids, which the library would drop
        text: str = self._tokenizer.decode(plain, skip_special_tokens=False)
        return text

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "json": self.tokenizer_json, "eot": self._eot, "bos": self._bos}

    @property
    def _overridden(self) -> dict[str, str]:
        given = {"bos": self._bos, "eot": self._eot}
        return {role: name for role, name in given.items() if name != self._usual[role]}

    @cached_property
    def _with_specials(self) -> "tokenizers.Tokenizer":
        """Takes names of special tokens for their ids."""
        return _backend(self.tokenizer_json, "the stored tokenizer")

    @cached_property
    def _within(self) -> "tokenizers.Tokenizer":
        """Encodes what does not begin a text: SentencePiece's way may put a space in front of the first section only.

        (The older form, a Prepend normalizer, puts one in front of every section and needs no other encoder.)
        """
        if not any(part.get("prepend_scheme") == "first" for part in self._pre_tokenizers):
            return self._tokenizer
        content = json.loads(self.tokenizer_json)
        for part in _parts(content["pre_tokenizer"], "pretokenizers"):
            if part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
        backend = _backend(json.dumps(content), "the stored tokenizer")
        backend.encode_special_tokens = True
        return backend

    @property
    def _pre_tokenizers(self) -> list[dict[str, Any]]:
        return _parts(self._pre_tokenizer, "pretokenizers")

    @property
    def _is_byte_level(self) -> bool:
        return any(part.get("type") == "ByteLevel" for part in _parts(self._decoder, "decoders"))

    def _token_bytes(self) -> list[bytes | None]:
        as_bytes = _byte_level_bytes if self._is_byte_level else _metaspace_bytes
        table: list[bytes | None] = [None] * self.vocab_size
        for text, token in self._tokenizer.get_vocab(with_added_tokens=False).items():
            table[token] = as_bytes(text)
        for token, added in self._tokenizer.get_added_tokens_decoder().items():
            table[token] = added.content.encode()
        return table


def _usual_eot(special_tokens: dict[str, int]) -> str:
    return next((name for name in _USUAL_END_OF_TEXT if name in special_tokens), "")


def _first_token(post_processor: dict[str, Any] | None) -> str:
    """The special token that a tokenizer.json's post-processor puts in front of a text; "" where it puts none."""
    for part in _parts(post_processor, "processors"):
        if part.get("type") == "TemplateProcessing":
            first: dict[str, Any] = next(iter(part["single"]), {})
            return str(first["SpecialToken"]["id"]) if "SpecialToken" in first else ""
        if part.get("type") in ("BertProcessing", "RobertaProcessing"):
            return str(part["cls"][0])
    return ""


def _parts(component: dict[str, Any] | None, plural: str) -> list[dict[str, Any]]:
    """The steps of a component of a tokenizer.json: itself, or those of a Sequence, which may hold further ones."""
    if not component:
        return []
    if component.get("type") != "Sequence":
        return [component]
    return [part for step in component[plural] for part in _parts(step, plural)]


def _backend(text: str, where: str) -> "tokenizers.Tokenizer":
    backend = _parse_tokenizer_json(text, where)
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None  # adds tokens, and may take the spaces out of a token's span
    return backend


def _parse_tokenizer_json(text: str, where: str) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(text)
        if backend.get_vocab_size(with_added_tokens=True) == 0:
            raise ValueError("an empty vocabulary")
        return backend
    except (KeyboardInterrupt, MemoryError):
        raise
    except (
        BaseException
    ) as error:  # the library raises bare Exception, and for some damage a Rust panic (BaseException)
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{where}: not a tokenizer.json that can be read ({reason})") from None


def _byte_level_characters() -> dict[str, int]:
    """The printable stand-in of each byte in a byte-level vocabulary -> the byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    characters = {chr(value): value for value in printable}
    characters.update({chr(256 + rank): value for rank, value in enumerate(others)})
    return characters


_BYTE_OF = _byte_level_characters()


def _byte_level_bytes(text: str) -> bytes:
    if all(character in _BYTE_OF for character in text):
        return bytes(_BYTE_OF[character] for character in text)
    return text.encode()


def _metaspace_bytes(text: str) -> bytes:
    """SentencePiece's way: U+2581 is a space, <0x0A> a byte."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            return text.encode()
    return text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
