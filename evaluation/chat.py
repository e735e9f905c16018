"""A conversation with one model: its history, its template, its answers as they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from data.chat import Template, render_conversation, stop_ids
from data.prompt_template import PromptTemplate
from data.templates import get_template
from data.text_stream import TextStream
from data.tokenizer import Tokenizer
from evaluation.checkpoints import check_vocabulary
from evaluation.compare import Sampling
from formats.open_model import OpenModel
from model.generate import stream

HELP = "/reset begins anew, /system TEXT sets the system message, /exit (or end of input) ends; Ctrl-C stops an answer"


class Chat:
    """What was said so far, and the model that answers. Raises ValueError for a model that has no prompt template."""

    def __init__(self, opened: OpenModel, sampling: Sampling, prompt_template: str = "auto", system: str = "") -> None:
        check_vocabulary(opened)
        self.opened, self.sampling = opened, sampling
        self.template = _template(opened, prompt_template)
        self.stop_ids = stop_ids(self.template, opened.tokenizer)  # of the template in use, which may be a named one
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.forgotten = 0  # exchanges that no longer fit the context

    def messages(self) -> list[dict[str, str]]:
        """The conversation as the template takes it."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def reset(self, system: str | None = None) -> None:
        """Forget what was said; `system`, where given, becomes the system message."""
        self.turns = []
        self.forgotten = 0
        self.system = self.system if system is None else system

    def reply(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece. What was written counts as said, also where the reader breaks off."""
        self.turns.append({"role": "user", "content": text})
        ids = self._fitting_prompt()
        written: list[str] = []
        try:
            tokens = stream(self.opened.model, ids, **asdict(self.sampling), stop_ids=self.stop_ids)
            for piece in pieces(self.opened.tokenizer, tokens):
                written.append(piece)
                yield piece
        finally:
            end = self.template.end if isinstance(self.template, PromptTemplate) else ""
            self.turns.append({"role": "assistant", "content": "".join(written).removesuffix(end).strip()})

    def _fitting_prompt(self) -> list[int]:
        """Ids up to where the answer begins. The oldest exchanges go while it and an answer exceed the context."""
        room = self.opened.model.context_length - self.sampling.max_new_tokens
        while True:
            ids, _ = render_conversation(
                self.messages(), self.template, self.opened.tokenizer, add_generation_prompt=True
            )
            if len(ids) <= room or len(self.turns) < 3:
                return ids
            del self.turns[:2]
            self.forgotten += 1


def converse(chat: Chat, lines: Iterable[str], write: Callable[[str], None]) -> None:
    """Answers each line with `write`, until the lines end or say /exit."""
    write(f"{HELP}\n")
    for line in lines:
        text = line.strip()
        if not text:
            continue
        if text == "/exit":
            return
        if text == "/reset" or text.startswith("/system"):
            chat.reset(text.removeprefix("/system").strip() if text.startswith("/system") else None)
            write("(new conversation)\n")
            continue
        forgotten = chat.forgotten
        answer = chat.reply(text)
        try:
            for piece in answer:
                write(piece)
        except KeyboardInterrupt:
            answer.close()  # type: ignore[attr-defined]  # a generator: it notes what was said
            write(" (stopped)")
        write("\n")
        if chat.forgotten > forgotten:
            write(f"(the first {chat.forgotten} exchanges no longer fit the context)\n")


def pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come, never empty."""
    text = TextStream(tokenizer)
    yield from filter(None, map(text.add, tokens))
    yield from filter(None, [text.rest()])


def _template(opened: OpenModel, name: str) -> Template:
    if name not in ("auto", "none"):
        return get_template(name)
    if opened.template is None or name == "none":
        raise ValueError(
            f"{opened.path}: chatting needs a prompt template{', and it holds none' if name == 'auto' else ''}: "
            "name one with --prompt_template, or leave out --chat to have text continued"
        )
    return opened.template
