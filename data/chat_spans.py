"""Where in a rendered conversation the assistant's words stand, whatever program the template is.

Every answer is put between two characters that nobody uses, and the template rendered: if taking them out gives what
it renders anyway, they tell where the answers are. A template that has {% generation %} blocks says it itself, by the
same two characters. Where neither works, the text before and after an answer is rendered and compared, or at least
the prompt for it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

Message = dict[str, str]
Span = tuple[int, int]  # first character, and the one after the last
Text = Callable[..., str]  # (messages, add_generation_prompt, **variables) -> text
# What a span is: the content alone, all that the assistant wrote, or that and what the template adds behind it.
Extent = Literal["content", "exact", "turn"]
_Found = tuple[str, list[Span]]  # a rendered text, and the answers in it

_GENERATION = re.compile(r"\{%-?\s*generation\b")
_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # Unicode's private use areas


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation.

    text: as the template writes it, but where a message holds the name of a special token, the name's first character
    is a stand-in, so that it is none. spans: of the answers; their ends are found by `answers`.
    """

    text: str
    spans: list[Span]
    originals: dict[int, str]  # code point of a stand-in -> the character
    extent: Extent

    def restored(self, start: int, end: int) -> str:
        """A part of the text with the characters that stand-ins stand for; as long as the part is."""
        part = self.text[start:end]
        return part.translate(self.originals) if self.originals else part

    def answers(self, special: list[Span], stops: Sequence[str]) -> list[Span]:
        """The spans of what the assistant wrote, each to the end of the first special token or stop text behind it."""
        if self.extent == "exact":
            return self.spans
        ends = [
            *special,
            *(match.span() for stop in stops if stop for match in re.finditer(re.escape(stop), self.text)),
        ]
        answers = []
        for (start, end), limit in zip(self.spans, [*(start for start, _ in self.spans[1:]), len(self.text)]):
            if self.extent == "content":
                found = min((span for span in ends if span[0] >= end and span[1] <= limit), default=(end, end))
            else:
                rest = start + len(self.text[start:end].rstrip())
                found = max((span for span in ends if span[0] >= start and span[1] <= end), default=(rest, rest))
            answers.append((start, found[1]))
        return answers


class _Marks(NamedTuple):
    """Characters that occur nowhere in a conversation and its template."""

    begin: str
    end: str
    stand_ins: dict[str, str]  # first character of a special token's name -> its stand-in


def rendered(
    text: Text,
    messages: list[Message],
    names: re.Pattern[str],
    add_generation_prompt: bool,
    template_name: str,
    source: str,
) -> Rendering:
    """`messages` as `text` renders them, with the spans of the assistant's answers.

    names: matches the names of special tokens. Raises ValueError where the answers cannot be told apart.
    """
    plain = text(messages, add_generation_prompt)
    marks = _choose_marks(messages, names, plain + source)
    originals = {ord(stand_in): character for character, stand_in in marks.stand_ins.items()}
    safe = [_without_names(message, names, marks.stand_ins) for message in messages]
    for extent, attempt in _attempts(text, safe, add_generation_prompt, marks, bool(_GENERATION.search(source))):
        try:
            found = attempt()
        except ValueError:  # the template refuses the marks, or a part of the conversation
            continue
        if found is not None and found[0].translate(originals) == plain:
            return Rendering(*found, originals, extent)
    raise ValueError(
        f"chat template {template_name}: where the assistant's words stand in its text cannot be told, because it "
        "changes them or renders earlier turns anew; put {% generation %} and {% endgeneration %} around them in it"
    )


def _attempts(
    text: Text, messages: list[Message], prompt: bool, marks: _Marks, has_generation: bool
) -> list[tuple[Extent, Callable[[], _Found | None]]]:
    """The ways to find the answers, the surest first: what their spans will be, and a function that finds them."""

    def by_blocks() -> _Found | None:
        return _taken_out(text(messages, prompt, generation_begin=marks.begin, generation_end=marks.end), marks)

    def by_marks(change: Callable[[str], str]) -> _Found | None:
        return _taken_out(text([_marked(message, marks, change) for message in messages], prompt), marks)

    if has_generation:
        return [("exact", by_blocks)]
    # Many templates strip what they are given, and would not with a mark in front.
    tries: list[tuple[Extent, Callable[[], _Found | None]]] = [
        ("content", lambda: by_marks(str)),
        ("content", lambda: by_marks(str.strip)),
        ("turn", lambda: _by_prefixes(text, messages, prompt)),
        ("content", lambda: _by_prompts(text, messages, prompt)),
    ]
    return tries


def _marked(message: Message, marks: _Marks, change: Callable[[str], str]) -> Message:
    if message["role"] != "assistant":
        return message
    return {**message, "content": marks.begin + change(message["content"]) + marks.end}


def _taken_out(marked: str, marks: _Marks) -> _Found | None:
    """The text without the marks, and what stood between them. None where they do not come in pairs."""
    first, *parts = marked.split(marks.begin)
    text, spans = first, []
    for part in parts:
        inside, *after = part.split(marks.end)
        if len(after) != 1:
            return None
        spans.append((len(text), len(text) + len(inside)))
        text += inside + after[0]
    return (text, spans) if marks.end not in text else None


def _by_prefixes(text: Text, messages: list[Message], prompt: bool) -> _Found | None:
    """What an answer adds to the text of the messages before it and the prompt. None where text is not only added."""
    whole, spans = text(messages, prompt), []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = text(messages[:number], True), text(messages[: number + 1], False)
            if not (after.startswith(before) and whole.startswith(after)):
                return None
            spans.append((len(before), len(after)))
    return whole, spans


def _by_prompts(text: Text, messages: list[Message], prompt: bool) -> _Found | None:
    """Where the prompts for the answers end, if the whole text begins with each of them: there the answers begin.

    For templates that shorten earlier answers, such as those of reasoning models. Nothing that is said holds a special
    token, so the first one behind ends the turn.
    """
    whole = text(messages, prompt)
    before = [text(messages[:at], True) for at, message in enumerate(messages) if message["role"] == "assistant"]
    return (whole, [(len(each), len(each)) for each in before]) if all(map(whole.startswith, before)) else None


def _choose_marks(messages: list[Message], names: re.Pattern[str], template_text: str) -> _Marks:
    said = [value for message in messages for value in message.values()]
    firsts = sorted({match[0][0] for value in said for match in names.finditer(value)})
    # A name that is inside another comes to light when the outer one is broken, so all first characters stand ready.
    if firsts:
        firsts = sorted({character for value in said for character in value if names.pattern.find(character) >= 0})
    used = set(template_text).union(names.pattern, *said)
    free = (chr(code) for code in chain(*_PRIVATE) if chr(code) not in used)
    begin, end = next(free), next(free)
    return _Marks(begin, end, {character: next(free) for character in firsts})


def _without_names(message: Message, names: re.Pattern[str], stand_ins: dict[str, str]) -> Message:
    """The message with every name of a special token broken."""
    if not stand_ins:
        return message

    def broken(value: str) -> str:
        while names.search(value):
            value = names.sub(lambda match: stand_ins[match[0][0]] + match[0][1:], value)
        return value

    return {key: value if key == "role" else broken(value) for key, value in message.items()}
