"""What every tokenizer does, and the simplest one: plain bytes."""

import hashlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Ids 0 .. vocab_size - 1, the special ones included; `eot_id` ends a document.

    kind: "gpt2", "byte" or "bpe" (any tokenizer.json). bos_id: what every text of the model begins with (Llama,
    Mistral), None where there is no such token.
    """

    kind: ClassVar[str]
    vocab_size: int
    eot_id: int
    bos_id: int | None = None
    special_tokens: dict[str, int]
    # Whether a text may be cut anywhere and its parts encoded apart: they decode to the same text. Not so where each
    # text gets a space in front.
    may_cut: bool = True

    @abstractmethod
    def encode_numpy(self, text: str) -> np.ndarray:
        """Ids of `text`, uint32, shape (n,). Never a special id. Lone surrogates count as U+FFFD."""

    @abstractmethod
    def _token_bytes(self) -> list[bytes | None]:
        """The bytes of each id, None where a vocabulary has a hole; length vocab_size."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; never a special id."""
        ids: list[int] = self.encode_numpy(text).tolist()
        return ids

    def encode_special(self, text: str) -> list[int]:
        """As `encode`, but the names of special tokens in `text` become their ids, as the model's own tokenizer does.

        For text that a template wrote; what users wrote goes through `encode`.
        """
        text = utf8(text)
        ids: list[int] = []
        done = 0
        for start, end, token in [*self.special_spans(text), (len(text), len(text), None)]:
            if start > done:
                ids += self.encode_section(text[done:start], first=done == 0)[0]
            if token is not None:
                ids.append(token)
            done = end
        return ids

    def special_spans(self, text: str) -> list[tuple[int, int, int]]:
        """Where names of special tokens stand in `text` (valid Unicode): start and end in characters, and the id."""
        return [(*match.span(), self.special_tokens[match[0]]) for match in self.special_names.finditer(text)]

    def encode_section(self, text: str, first: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of one section of a text (valid Unicode) that special tokens part, and the characters that each covers.

        Never a special id. first: the section begins the text; some vocabularies put a space in front of that alone.
        """
        ids = self.encode(text)
        character_of = [index for index, character in enumerate(text) for _ in character.encode()]
        ends = list(itertools.accumulate(len(self._bytes_of(token)) for token in ids))
        spans = zip([0, *ends], ends)
        return ids, [(character_of[start], character_of[end - 1] + 1) for start, end in spans]

    @cached_property
    def special_names(self) -> re.Pattern[str]:
        """Matches the names of special tokens, the longest first."""
        return re.compile("|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True))))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for (what streaming needs: a token may end inside a character).

        Raises ValueError for an id that the vocabulary lacks.
        """
        return b"".join([self._bytes_of(int(token)) for token in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def spec(self) -> dict[str, Any]:
        """What `tokenizer_from_spec` rebuilds this tokenizer from: plain JSON values."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every id with its bytes and the special ids: equal vocabularies agree, whatever their file."""
        lines = [f"{token} {'-' if text is None else text.hex()}\n" for token, text in enumerate(self._table)]
        lines.append(json.dumps(sorted(self.special_tokens.items())))
        if self._overridden:
            lines.append(json.dumps(self._overridden))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def _overridden(self) -> dict[str, str]:
        """The roles of tokens that a caller gave otherwise than the vocabulary's own file has them."""
        return {}

    @cached_property
    def _table(self) -> list[bytes | None]:
        return self._token_bytes()

    def _bytes_of(self, token: int) -> bytes:
        text = self._table[token] if 0 <= token < self.vocab_size else None
        if text is None:
            raise ValueError(f"token id {token} is not in the {self.kind} vocabulary of {self.vocab_size:,} ids")
        return text


class ByteTokenizer(Tokenizer):
    """One id a byte, and 256 for the end of text: any language, no vocabulary to learn."""

    kind = "byte"
    vocab_size = 257
    eot_id = 256

    def __init__(self) -> None:
        self.special_tokens = {END_OF_TEXT: self.eot_id}

    def encode_numpy(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text).encode(), dtype=np.uint8).astype(np.uint32)

    def _token_bytes(self) -> list[bytes | None]:
        return [*(bytes([value]) for value in range(256)), END_OF_TEXT.encode()]


def utf8(text: str) -> str:
    """`text` with lone surrogates (JSON can hold them) replaced, so that it has a UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
