"""One model that answers conversations, one at a time: its queue, its stops, and an end when nobody listens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from http import HTTPStatus

from data.chat import Message, Template, render_conversation, stop_ids
from data.prompt_template import PromptTemplate
from evaluation.chat import pieces
from evaluation.checkpoints import check_vocabulary
from evaluation.compare import Sampling
from formats.open_model import OpenModel
from model.generate import stream
from serve.api import ApiError

WAITING = 4  # requests that may wait for a model; the next is told to come back
LOOK_S = 0.2  # how often one that waits looks whether its client is still there


class Gone(Exception):
    """The client left."""


class Talker:
    """A model under its name. Raises ValueError where model and tokenizer do not fit."""

    def __init__(self, name: str, opened: OpenModel, template: Template) -> None:
        check_vocabulary(opened)
        self.name, self.opened, self.template = name, opened, template
        self.stop_ids = stop_ids(template, opened.tokenizer)
        self._end = template.end if isinstance(template, PromptTemplate) else ""
        self._answering, self._counting, self._waiting = threading.Lock(), threading.Lock(), 0

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to where the answer begins. Raises ApiError where the template or the context does not take them."""
        try:
            ids, _ = render_conversation(messages, self.template, self.opened.tokenizer, add_generation_prompt=True)
        except ValueError as error:
            raise ApiError(str(error), param="messages") from None
        limit = self.opened.model.context_length
        if len(ids) >= limit:
            raise ApiError(
                f"the conversation has {len(ids)} tokens, the model's context is {limit}: leave out its oldest part",
                param="messages",
                code="context_length_exceeded",
            )
        return ids

    def answer(self, prompt: list[int], sampling: Sampling, stops: Sequence[str], gone: Callable[[], bool]) -> Answer:
        """The answer, to be read piece by piece; not longer than the context has room for."""
        room = self.opened.model.context_length - len(prompt)
        return Answer(self, prompt, replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room)), stops, gone)

    @contextmanager
    def turn(self, gone: Callable[[], bool]) -> Iterator[None]:
        """The model to oneself. Raises ApiError where too many wait, Gone where the client left meanwhile."""
        with self._counting:
            if self._waiting >= WAITING:
                raise ApiError(
                    f"{self.name} is answering and {WAITING} requests wait: try again later",
                    HTTPStatus.TOO_MANY_REQUESTS,
                    kind="rate_limit_error",
                    code="queue_full",
                )
            self._waiting += 1
        try:
            while not self._answering.acquire(timeout=LOOK_S):
                if gone():
                    raise Gone
        finally:
            with self._counting:
                self._waiting -= 1
        try:
            yield
        finally:
            self._answering.release()


class Answer:
    """The pieces of one answer, once; its figures are complete after the last."""

    def __init__(
        self, talker: Talker, prompt: list[int], sampling: Sampling, stops: Sequence[str], gone: Callable[[], bool]
    ) -> None:
        self.talker, self.prompt, self.sampling, self.stops, self.gone = talker, prompt, sampling, tuple(stops), gone
        self.tokens = 0
        self.finish = "stop"

    def __iter__(self) -> Iterator[str]:
        """Text as it is written. Raises Gone as soon as the client has left, ApiError where too many wait."""
        talker = self.talker
        with talker.turn(self.gone):
            new = stream(talker.opened.model, self.prompt, **asdict(self.sampling), stop_ids=talker.stop_ids)
            with closing(new):  # type: ignore[type-var]  # a generator
                ends = Ending(self.stops, talker._end)
                yield from ends.cut(pieces(talker.opened.tokenizer, self._counted(new)))
        if not ends.stopped and self.tokens == self.sampling.max_new_tokens:
            self.finish = "length"

    def _counted(self, tokens: Iterable[int]) -> Iterator[int]:
        for token in tokens:
            if self.gone():
                raise Gone
            self.tokens += 1
            yield token

    def usage(self) -> dict[str, int]:
        """Tokens, as OpenAI counts them."""
        read, written = len(self.prompt), self.tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


class Ending:
    """Cuts a text where it is to end: before the first of `stops`, and without the template's `end` at its very end."""

    def __init__(self, stops: Sequence[str], end: str = "") -> None:
        self.stops, self.end = tuple(stops), end
        self.stopped = False

    def cut(self, texts: Iterable[str]) -> Iterator[str]:
        """The pieces; what may be the beginning of a stop waits until it is known."""
        held = ""
        for text in texts:
            held += text
            places = [at for stop in self.stops if (at := held.find(stop)) >= 0]
            if places:
                self.stopped = True
                held = held[: min(places)]
                break
            keep = self._doubtful(held)
            if len(held) > keep:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
        held = held if self.stopped else held.removesuffix(self.end)
        if held:
            yield held

    def _doubtful(self, text: str) -> int:
        """How many of the last characters may begin a stop, or be the end."""
        marks = (*self.stops, self.end)
        lengths = range(min(len(text), max(map(len, marks))), 0, -1)
        return next((n for n in lengths if any(mark.startswith(text[-n:]) for mark in marks)), 0)
