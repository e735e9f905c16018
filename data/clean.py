"""Cleaning of records and documents: broken Unicode, white space, what is too long or was there before.

    cleaner = Cleaner(settings)
    sample = cleaner.sample(sample)      # raises Unusable for a record that goes

Only what is certain is repaired, and code keeps its indentation. `changed` counts what was repaired; what goes, and
why, the caller counts by the reasons of Unusable. Duplicates are told by data/duplicates.py.
"""

import re
import unicodedata
from collections import Counter

from data.chat import Message
from data.duplicates import EXACT, Duplicates
from data.records import Sample, Unusable
from data.settings import PrepareSettings
from data.tokenizer_base import utf8

REPAIRED, TIDIED, STRIPPED = "had broken Unicode repaired", "had white space tidied", "had punctuation taken out"

# Windows-1252 as browsers read it: its five holes are the control characters of Latin-1.
_WINDOWS = {bytes([code]).decode("cp1252", "ignore") or chr(code): code for code in range(256)}
_HOLES = (0x81, 0x8D, 0x8F, 0x90, 0x9D)
_C1 = {code: bytes([code]).decode("cp1252") for code in range(0x80, 0xA0) if code not in _HOLES}
_CONTROLS = dict.fromkeys(code for code in (*range(32), 0x7F) if chr(code) not in "\t\n")
# Byte order mark, zero-width space and those holes; joiners mean something in some scripts.
_INVISIBLE = dict.fromkeys((0xFEFF, 0x200B, *_HOLES))
_CRLF = re.compile(r"\r\n?|[\u2028\u2029]")
_CONTINUES = "".join(re.escape(character) for character, byte in _WINDOWS.items() if 0x80 <= byte < 0xC0)
# UTF-8 read as Windows-1252, where no reading as text is possible: an a with circumflex before the sign of the euro,
# or a capital A with tilde or circumflex inside a word of small letters, before a character that is no letter.
_UNMISTAKABLE = re.compile(f"\u00e2\u20ac|[a-z][\u00c2\u00c3][{_CONTINUES}]")
_PUNCTUATION = re.compile(f"\u00e2\u20ac[{_CONTINUES}]")
_LINE_END_SPACE = re.compile(r"[^\S\n]+(?=\n|\Z)")
_BLANK_LINES = re.compile(r"\n{3,}")
_LEADING_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")
_NO_WORD = re.compile(r"[^\w\s]")


class Cleaner:
    """Cleans the records of one pass over a source; a new pass needs a new one, since it remembers what it saw."""

    def __init__(self, settings: PrepareSettings) -> None:
        self.changed: Counter[str] = Counter()  # what was done -> how many records or documents
        self._strips_punctuation = settings.strip_punctuation
        self._max_characters = settings.max_characters
        self._duplicates = Duplicates(settings.duplicate_similarity, settings.seed)

    def sample(self, sample: Sample) -> Sample:
        """The sample with every message cleaned. Raises Unusable where it is to go."""
        done: set[str] = set()
        messages = [self._message(message, done) for message in sample.messages]
        rejected = None if sample.rejected is None else [self._message(message, done) for message in sample.rejected]
        cleaned = Sample(sample.where, messages, rejected)
        spoken = [*messages, *(rejected or [])]
        if any(message["role"] != "tool" and not _said(message) for message in spoken):
            raise Unusable(sample.where, "with an empty message after cleaning")
        if len(cleaned.text) > self._max_characters:
            raise Unusable(sample.where, f"of more than {self._max_characters:,} characters")
        asked = "\n".join(_said(message) for message in spoken if message["role"] != "assistant")
        answered = "\n".join(_said(message) for message in spoken if message["role"] == "assistant")
        self._refuse_duplicate(sample.where, asked, answered)
        self.changed.update(done)
        return cleaned

    def document(self, text: str, is_whole: bool) -> str:
        """A document, or a part of one, with its Unicode repaired; its white space stays.

        Raises Unusable for a document that was there before; only whole ones are compared.
        """
        repaired = repair_unicode(text)
        if is_whole:
            self._refuse_duplicate("", repaired)
        self.changed.update([REPAIRED] * (repaired != text))
        return repaired

    def _refuse_duplicate(self, where: str, *parts: str) -> None:
        found = self._duplicates.seen(parts)
        if found is not None:
            alike = f"that are near duplicates ({self._duplicates.threshold:g} alike)"
            raise Unusable(where, "that are exact duplicates" if found == EXACT else alike)

    def _message(self, message: Message, done: set[str]) -> Message:
        fields = {name: self._text(text, done) for name, text in message.items() if name != "role"}
        return {"role": message["role"], **fields}

    def _text(self, text: str, done: set[str]) -> str:
        repaired = repair_unicode(text)
        tidied = tidy_space(repaired)
        stripped = strip_punctuation(tidied) if self._strips_punctuation else tidied
        steps = ((REPAIRED, text, repaired), (TIDIED, repaired, tidied), (STRIPPED, tidied, stripped))
        done.update(name for name, before, after in steps if before != after)
        return stripped


def repair_unicode(text: str) -> str:
    """`text` in NFC without control characters and other invisible ones.

    UTF-8 that was read as Windows-1252 is
    read again, line by line, where a line cannot have been meant as it stands.
    """
    text = utf8(text)
    if not text.isascii():
        text = "\n".join(map(_reread, text.split("\n"))).translate(_INVISIBLE)
    return unicodedata.normalize("NFC", _CRLF.sub("\n", text).translate(_CONTROLS))


def tidy_space(text: str) -> str:
    """No spaces at line ends, at most one blank line at a time, none around the text; indentation stays."""
    text = _BLANK_LINES.sub("\n\n", _LINE_END_SPACE.sub("", text.replace("\u00a0", " ")))
    return _LEADING_LINES.sub("", text).rstrip()


def strip_punctuation(text: str) -> str:
    """Words alone with one space between: whatever is no letter, digit, underscore or space is taken out."""
    return " ".join(_NO_WORD.sub("", text).split())


def _reread(line: str) -> str:
    """A line of text that is mojibake for certain, as it was meant; of another only dashes and quotes that are."""
    line = line.translate(_C1)
    while _UNMISTAKABLE.search(line):  # text is found that went through it twice
        try:
            line = _bytes_of(line).decode("utf-8").translate(_C1)
        except (KeyError, UnicodeDecodeError):  # some of the line is right as it stands
            return _PUNCTUATION.sub(lambda match: _bytes_of(match[0]).decode("utf-8"), line)
    return line


def _bytes_of(text: str) -> bytes:
    """What `text` was before it was read as Windows-1252. KeyError for a character that it lacks."""
    return bytes([_WINDOWS[character] for character in text])


def _said(message: Message) -> str:
    return "\n".join(part for part in (message["content"], message.get("context")) if part and not part.isspace())
