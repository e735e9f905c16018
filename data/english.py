"""Docstrings as sentences: the first sentence of a text, and what can be said of a thing with "It ...".

Docstrings are written as orders ("Return the sum"), as statements ("Returns the sum") or as names ("A sum of things").
`predicate` brings the three into one form, or gives up: a text left out costs nothing, a wrong sentence teaches.
"""

import re

# Orders that docstrings begin with. Words that are as often nouns at that place ("Hook", "Error", "List") are left out.
_VERBS = """
accept acquire activate add adjust allow append apply arrange ask assert attach bind block build byte-compile
calculate call cancel change check choose clean clear close collapse collect combine compare compile compress
compute configure connect construct convert copy create customize decide decode decompress define delete deserialize
destroy detach detect determine disable disassemble discard display divide draw drop dump emit enable encode ensure
enter escape evaluate execute expand extend extract fail feed fetch fill filter find finish flash flush force format
generate get give guess handle identify import indent indicate initialize insert install interpret invert invoke
iterate join kill load locate lock log look make mark merge modify move normalize obtain open output override parse
pause perform place pop prepare present print produce provide push put query quote raise read rebuild receive
reconfigure record redirect refresh register release reload remember remove rename render replace report represent
request reset resolve restore resume retrieve return reverse rewind rotate run save scan schedule scroll search seek
select send separate serialize serve set show shuffle shut signal skip sort spawn split start stop store strip
subtract suspend swap take tell terminate test toggle transform translate transmit traverse truncate try turn unbind
undo uninstall unlock unmap unpack unregister update use validate verify visit wait wake walk wrap write yield
"""
# Nouns and adjectives that docstrings begin with, article left out, by the article that "It is" wants before them.
_AFTER_THE = "base default main"
_AFTER_A = """
class context wrapper mix-in mixin simple handler helper generic concrete metaclass dictionary decorator subclass
specialized file-like set lightweight container message proxy factory hash mapping mutable parser process queue real
regular string thread tuple type variant version warning named read-only special file low-level high-level standard
text socket private command dialog widget function method module stream server client
"""
_AFTER_AN = "abstract exception interface object iterator asynchronous error immutable event encoder extended"
_ARTICLE_OF = {
    noun: article
    for article, nouns in (("the", _AFTER_THE), ("a", _AFTER_A), ("an", _AFTER_AN))
    for noun in nouns.split()
}
_PARTICIPLES = {"called", "raised", "used", "invoked", "equivalent"}
_DETERMINERS = {"the", "a", "an", "it", "its", "this", "that", "all", "any", "each", "them", "return"}
_FINITE = {"was", "is", "are", "were", "has", "have", "can", "cannot", "must", "will", "should", "may", "does", "do"}
_RELATIVE = {"that", "which", "who", "whose", "when", "where", "whether", "if", "as", "what", "how", "for", "to"}
_UNFIT = re.compile(
    r">>>|->|--|::|;|XXX|TODO|FIXME|deprecat|internal|obsolete|[^\x20-\x7e]|:param|\bself\b|\.\.\.", re.I
)
_SENTENCE_END = re.compile(r"(?<=[\w)\]'\"`])[.](?=\s+[A-Z(\"'`]|\s*$)")
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|resp|incl|approx)$", re.I)


def first_paragraph(text: str) -> str:
    """The text up to the first empty line, on one line."""
    return " ".join(text.strip().split("\n\n")[0].split())


def first_sentence(text: str, *, shortest: int = 20, longest: int = 160) -> str | None:
    """The first sentence, with full stop and without markup; None if it is not plain text of that many characters."""
    paragraph = without_markup(first_paragraph(text))
    sentence = paragraph
    for end in _SENTENCE_END.finditer(paragraph):
        if not _ABBREVIATION.search(paragraph[: end.start()]):
            sentence = paragraph[: end.start()]
            break
    sentence = sentence.rstrip(".").strip()
    is_plain = shortest <= len(sentence) <= longest and sentence[-1].isalnum() | (sentence[-1] in ")'\"")
    if not is_plain or _UNFIT.search(sentence) or not _is_balanced(sentence):
        return None
    return sentence[0].upper() + sentence[1:] + "."


def without_markup(text: str) -> str:
    """reStructuredText's ``code``, `names`, :roles:`names` and *emphasis* as plain words."""
    text = re.sub(r":[a-z]+:`~?([^`]+)`", r"\1", text)
    text = re.sub(r"``([^`]+)``|`([^`']+)`", lambda match: match[1] or match[2], text)
    return re.sub(r"(?<!\w)\*(\w[\w ]*)\*(?!\w)", r"\1", text)


def predicate(sentence: str) -> str | None:
    """What follows "It": "returns the sum" for "Return the sum.", "is a sum" for "A sum."; None where unsure."""
    words = sentence.rstrip(".").split()
    if len(words) < 4:
        return None
    if words[0].lower() == "this" and words[1].lower() in ("class", "function", "method", "module", "routine"):
        words = words[2:]
    first = words[0].lower().rstrip(",")
    if first.endswith("ly") and (verb := _third_person(words[1])):
        return _with_second_verb([first, verb, *words[2:]])
    if verb := _third_person(words[0]):
        return _with_second_verb([verb, *words[1:]])
    if first in _PARTICIPLES:
        return " ".join(["is", first, *words[1:]])
    if _is_clause(words):
        return None
    if first in ("a", "an", "the"):
        return " ".join(["is", first, *words[1:]])
    if first in _ARTICLE_OF:
        return " ".join(["is", _ARTICLE_OF[first], first, *words[1:]])
    return None


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _third_person(word: str) -> str | None:
    """`returns` for `Return` and `Returns`; None for what is no known verb."""
    return _FORMS.get(word.lower())


def _is_clause(words: list[str]) -> bool:
    """Whether these words are a whole sentence ("A boundary was found") and no name ("A boundary that was found")."""
    for word in words:
        if word in _FINITE:
            return True
        if word in _RELATIVE:
            return False
    return False


def _with_second_verb(words: list[str]) -> str:
    """`reads and return the line` -> `reads and returns the line`: the second order only where no noun can be meant."""
    for index in range(1, len(words) - 1):
        joined = words[index] in ("and", "or", "then") and words[index + 1] in _BASE
        if joined and (words[index + 1] == "return" or _DETERMINERS.intersection(words[index + 2 : index + 3])):
            words[index + 1] = _BASE[words[index + 1]]
    return " ".join(words)


def _conjugated(verb: str) -> str:
    if verb.endswith(("s", "x", "z", "ch", "sh", "o")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


_BASE = {verb: _conjugated(verb) for verb in _VERBS.split()}
_FORMS = _BASE | {form: form for form in _BASE.values()}


def _is_balanced(text: str) -> bool:
    pairs = all(text.count(left) == text.count(right) for left, right in ("()", "[]", "{}"))
    return pairs and text.count('"') % 2 == 0 and text.count("`") == 0
