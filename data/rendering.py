"""Samples as documents of token ids and masks: through a template, and at most so long as asked.

A sample that is too long loses whole turns, the oldest first, then the beginning of its question. An answer is cut only
where it would be too long even with an empty question, and then loses the end of its turn: a model that learns from it
does not learn to stop there. What was cut is told, so that it can be counted.
"""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from data.chat import Message, Template, render_conversation
from data.records import Kind, Sample, Unusable, shared_answers
from data.tokenizer import Tokenizer

Document = tuple[list[int], list[int]]  # ids and mask, equally long
Conversations = list[list[Message]]  # one, or the two of a pair

TURNS_CUT = "lost their oldest turns"
PROMPT_CUT = "lost the beginning of their prompt"
ANSWER_CUT = "lost the end of their answer, and with it the end of the turn"


@dataclass(frozen=True)
class Renderer:
    """How the samples of a set become documents.

    kind: "instruction" gives one document a sample; "preference" two, the chosen and the rejected; "prompts" one, the
    prompt for an answer, in which nothing is supervised. system: for conversations that have no system message.
    train_on: "all" answers of a conversation, or the "last". max_length: of a document in tokens, None = any.
    """

    kind: Kind
    template: Template
    system: str | None = None
    train_on: str = "all"
    max_length: int | None = None

    def spec(self) -> dict[str, Any]:
        """What dataset.json says of it, besides the template."""
        return {"system": self.system, "train_on": self.train_on, "max_length": self.max_length}

    def documents(self, sample: Sample, tokenizer: Tokenizer) -> tuple[list[Document], list[str]]:
        """The documents of `sample`, and what was cut from it: some of the three texts above.

        Raises ValueError for what the template refuses, Unusable where nothing supervised fits into max_length.
        """
        whole = [self._with_system(messages) for messages in (sample.messages, sample.rejected) if messages]
        documents = self._render(whole, tokenizer)
        notes: list[str] = []
        if not self._fit(documents):
            documents, notes = self._shortened(sample.where, whole, tokenizer)
        if self.kind == "preference" and documents[0] == documents[1]:  # a template may trim, a limit may cut
            raise Unusable(sample.where, "whose two answers are equal")
        return documents, notes

    def _shortened(self, where: str, whole: Conversations, tokenizer: Tokenizer) -> tuple[list[Document], list[str]]:
        turns, conversations, documents = self._without_oldest_turns(whole, tokenizer)
        notes = [TURNS_CUT] if turns else []
        if not self._fit(documents):
            characters, documents = self._without_beginnings(conversations, tokenizer)
            notes += [PROMPT_CUT] if characters else []
        if not self._fit(documents):
            notes.append(ANSWER_CUT)
            documents = [(ids[: self.max_length], mask[: self.max_length]) for ids, mask in documents]
            if not all(1 in mask for _, mask in documents):
                raise Unusable(where, f"with nothing to learn within --max_length {self.max_length}")
        return documents, notes

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def _render(self, conversations: Conversations, tokenizer: Tokenizer) -> list[Document]:
        supervised = slice(-1, None) if self.train_on == "last" else slice(None)
        if self.kind == "preference":
            supervised = slice(shared_answers(*conversations), None)
        rendered = [
            render_conversation(messages, self.template, tokenizer, self.kind == "prompts", supervised)
            for messages in conversations
        ]
        return [(ids, [0] * len(ids)) for ids, _ in rendered] if self.kind == "prompts" else rendered

    def _fit(self, documents: list[Document]) -> bool:
        return self.max_length is None or all(len(ids) <= self.max_length for ids, _ in documents)

    def _without_oldest_turns(
        self, conversations: Conversations, tokenizer: Tokenizer
    ) -> tuple[int, Conversations, list[Document]]:
        """As few of the oldest turns left out as make the rest fit, never the last: how many, the rest, documents."""
        first = int(conversations[0][0]["role"] == "system")
        starts = _turn_starts(conversations)

        def rest(count: int) -> Conversations:
            return [messages[:first] + messages[starts[count] :] for messages in conversations]

        last = len(starts) - 1
        count = bisect_left(range(last), True, key=lambda count: self._fit(self._render(rest(count), tokenizer)))
        return count, rest(count), self._render(rest(count), tokenizer)

    def _without_beginnings(self, conversations: Conversations, tokenizer: Tokenizer) -> tuple[int, list[Document]]:
        """As few characters left out of the question's beginning as make the rest fit: how many, and the documents.

        Where no answer would fit even then, it is cut anyway, and the prompt is only made to take half of the room.
        """
        assert self.max_length is not None
        asked = next(message for message in conversations[0] if message["role"] == "user")
        most = len(asked["content"]) + len(asked.get("context", ""))

        def documents(count: int) -> list[Document]:
            return self._render(_without_characters(conversations, count), tokenizer)

        room = None if self._fit(documents(most)) else self.max_length // 2

        def fits(count: int) -> bool:
            found = documents(count)
            return self._fit(found) if room is None else all(1 in mask[: room + 1] for _, mask in found)

        count = bisect_left(range(most), True, key=fits)
        return count, documents(count)


def _turn_starts(conversations: Conversations) -> list[int]:
    """Where the turns begin that all conversations share: at each question that stands in all of them."""
    shared = takewhile(lambda messages: all(each == messages[0] for each in messages), zip(*conversations))
    return [at for at, messages in enumerate(shared) if messages[0]["role"] == "user"]


def _without_characters(conversations: Conversations, count: int) -> Conversations:
    """`count` characters fewer at the beginning of the first question, those of its context first."""
    return [
        [*messages[:at], _without(messages[at], count), *messages[at + 1 :]]
        for messages in conversations
        for at in [next(at for at, message in enumerate(messages) if message["role"] == "user")]
    ]


def _without(message: Message, count: int) -> Message:
    context = message.get("context", "")
    shorter = {**message, "content": message["content"][max(0, count - len(context)) :]}
    return {**shorter, "context": context[count:]} if context else shorter
