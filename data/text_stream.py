"""Text of ids that come one by one."""

from __future__ import annotations

import codecs

from data.tokenizer import Tokenizer


class TextStream:
    """Turns ids into text as they come. An id may end inside a character: its bytes wait for the next one's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """What can be shown now; "" in the middle of a character."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def rest(self) -> str:
        """What no further id completes, as U+FFFD."""
        return self._decoder.decode(b"", final=True)
