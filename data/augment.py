"""More training records from those that are there: their questions said in another way, their answers as they are.

A share of the training records gets a second copy, whose question has some words replaced by synonyms of a thesaurus
(Wei and Zou 2019) or is put into another frame. Context, system message and answers stay, and so does every word of the
question that the answer says too: what is asked for must still be what is answered. The seed decides all of it.
"""

import random
import re
from collections.abc import Callable
from pathlib import Path

from data.chat import Message
from data.records import Sample
from data.settings import WORDNET

Synonyms = Callable[[str], list[str]]  # a word in small letters -> others for it, [] where none is known

_SHARE = 0.2  # of the words that have synonyms are replaced, one at least
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # scripts without spaces between words
_WORD = re.compile(f"[{_UNSPACED}]+|[^\\W\\d_{_UNSPACED}]+")
_LONGEST = 8  # characters of a word of such a script
_IS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_FRAMES = (
    "Please help with this: {}",
    "Here is a task for you. {}",
    "I would like you to do the following. {}",
    "Could you take care of this? {}",
    "{} Please answer as well as you can.",
    "{}\n\nThank you!",
)
_UNSPACED_FRAMES = ("请完成下面的任务。{}", "请帮忙处理：{}", "{}请尽量回答好。")


class Augmenter:
    """Makes a changed copy of a share `ratio` of the records. Raises ValueError for a thesaurus that cannot be used."""

    def __init__(self, ratio: float, thesaurus: str | None, seed: int) -> None:
        self.ratio, self.seed = ratio, seed
        self._synonyms = None if thesaurus is None else _wordnet() if thesaurus == WORDNET else _from_file(thesaurus)

    def copy(self, sample: Sample, index: int) -> Sample | None:
        """A changed copy of record number `index`, None for most of them. Depends on nothing but seed and index."""
        rng = random.Random(f"{self.seed}/{index}")
        if rng.random() >= self.ratio:
            return None
        question = next(message["content"] for message in sample.messages if message["role"] == "user")
        changed = question
        if self._synonyms is not None and rng.random() < 0.5:
            spoken = [*sample.messages, *(sample.rejected or [])]
            answers = " ".join(message["content"] for message in spoken if message["role"] == "assistant")
            changed = replace_words(question, self._synonyms, _words(answers), rng)
        if changed == question:
            changed = rng.choice(_UNSPACED_FRAMES if _IS_UNSPACED.search(question) else _FRAMES).replace("{}", question)
        rejected = None if sample.rejected is None else _asking(sample.rejected, changed)
        return Sample(sample.where, _asking(sample.messages, changed), rejected)


def replace_words(text: str, synonyms: Synonyms, kept: set[str], rng: random.Random) -> str:
    """`text` with a fifth of the words that have synonyms replaced; those in `kept` and in code stay."""
    code = [match.span() for match in _CODE.finditer(text)]
    found = []
    for match in _WORD.finditer(text):
        if not any(start <= match.start() < end for start, end in code):
            found += [place for place in _known(match, synonyms) if text[slice(*place)].casefold() not in kept]
    chosen = sorted(rng.sample(found, max(1, round(_SHARE * len(found))))) if found else []
    parts, done = [], 0
    for start, end in chosen:
        parts += [text[done:start], _in_case_of(text[start:end], rng.choice(synonyms(text[start:end].casefold())))]
        done = end
    return "".join([*parts, text[done:]])


# ---- words


def _known(match: re.Match[str], synonyms: Synonyms) -> list[tuple[int, int]]:
    """Where words with synonyms stand in a match of _WORD: all of it, or the longest ones in a run without spaces."""
    start, end = match.span()
    if not _IS_UNSPACED.match(match[0]):
        return [(start, end)] if synonyms(match[0].casefold()) else []
    places = []
    while start < end:
        lengths = range(min(_LONGEST, end - start), 0, -1)
        length = next((n for n in lengths if synonyms(match.string[start : start + n])), 0)
        places += [(start, start + length)] * (length > 0)
        start += length or 1
    return places


def _words(text: str) -> set[str]:
    """All words of a text in small letters; of a run without spaces every part that could be one."""
    words = set()
    for run in _WORD.findall(text.casefold()):
        is_unspaced = _IS_UNSPACED.match(run)
        words |= {run[a : a + n] for a in range(len(run)) for n in range(1, _LONGEST + 1)} if is_unspaced else {run}
    return words


def _in_case_of(word: str, other: str) -> str:
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other[:1].upper() + other[1:] if word[:1].isupper() else other


def _asking(messages: list[Message], question: str) -> list[Message]:
    """The conversation with another first question."""
    at = next(at for at, message in enumerate(messages) if message["role"] == "user")
    return [*messages[:at], {**messages[at], "content": question}, *messages[at + 1 :]]


# ---- where synonyms come from


def _from_file(path: str) -> Synonyms:
    """A file with a word and its synonyms a line, with commas between, as in Moby's thesaurus; # begins a comment."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise ValueError(f"--thesaurus {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--thesaurus {path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    table: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        word, *others = [part.strip() for part in line.split(",")]
        if not word or not all(others) or not others:
            raise ValueError(f"--thesaurus {path}:{number}: expected a word and its synonyms with commas between")
        table[word.casefold()] = others
    if not table:
        raise ValueError(f"--thesaurus {path}: holds no words")
    return lambda word: table.get(word, [])


def _wordnet() -> Synonyms:
    """Words of the same first sense in WordNet, through nltk where that and its corpus are installed."""
    try:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
    except (ImportError, LookupError) as error:
        raise ValueError(
            "--thesaurus wordnet: needs nltk and its corpus: pip install nltk; python -m nltk.downloader wordnet. "
            "Or name a file with a word and its synonyms a line"
        ) from error

    def synonyms(word: str) -> list[str]:
        names = {lemma.name().replace("_", " ") for sense in wordnet.synsets(word)[:1] for lemma in sense.lemmas()}
        return sorted(names - {word})

    return synonyms
