"""Instructions to answer, with a reference each: records of a file, or the documents of a prepared set.

Both give a model the same two things: a stream whose answers are scored (loss, accuracy), and questions that it
answers itself. A file's records are rendered with the model's own template, and have categories; a prepared set is
what it was made with, and its references are what its mask supervises.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.chat import Template, render_conversation, stop_ids
from data.prompt_template import PromptTemplate, Record
from data.records import Sample, Unusable, format_of, sample_of
from data.shards import TokenSet
from data.sources import record_rows
from data.templates import render_prompt, template_from_spec
from data.tokenizer import Tokenizer
from data.tokenizer_base import utf8
from evaluation.perplexity import ArrayTokens, TokenStream
from formats.open_model import OpenModel


@dataclass(frozen=True)
class Question:
    """What a model is to answer: ids, and for people the same as text; the answer that is wanted."""

    prompt: list[int]
    shown: str
    reference: str
    category: str


@dataclass(frozen=True)
class Asked:
    """The questions of a set as one model reads them, and how its answers end."""

    questions: list[Question]
    template: Template | None
    stop_ids: tuple[int, ...]

    def answer(self, ids: Sequence[int], tokenizer: Tokenizer) -> str:
        """The text of an answer's ids, without what the template puts after each answer."""
        return _answer_text(ids, self.template, tokenizer)


class Instructions(Protocol):
    """Something with prompts and answers. `template` is that of records; a prepared set has its own."""

    name: str

    def stream(self, opened: OpenModel, template: Template | None) -> TokenStream:
        """The rendered records, a document each, answers supervised."""

    def limit(self, stream: TokenStream) -> int:
        """How many tokens of its stream are those of the records that were asked for."""

    def categories(self) -> list[str] | None:
        """The category of each document, "" for none; None where no document has one."""

    def asked(self, opened: OpenModel, template: Template | None) -> Asked:
        """The prompts up to where the last answer begins."""


# ---- a file


@dataclass(frozen=True)
class _Record:
    sample: Sample
    category: str


class RecordFile:
    """The records of a JSONL, JSON or Parquet file, the first `max_samples` that can be used.

    `left_out` counts by reason the others, which hold nothing to compare with (an empty answer).
    Raises ValueError or OSError naming file and line of what cannot be read.
    """

    def __init__(self, path: Path, max_samples: int | None) -> None:
        self.name, self.path = path.name, path
        self.records: list[_Record] = []
        self.left_out: Counter[str] = Counter()
        rows = record_rows("parquet" if path.suffix == ".parquet" else "jsonl", [str(path)])
        for where, row in rows:
            row = _with_usual_names(row)
            format = format_of(row, where)
            if format in ("text", "preference", "prompts"):
                raise ValueError(
                    f"{where}: is a record of {format}, expected an instruction or a conversation with its answer"
                )
            try:
                self.records.append(_Record(sample_of(row, format, where), _category(row, where)))
            except Unusable as error:
                self.left_out[error.why] += 1
            if len(self.records) == max_samples:
                break
        if not self.records:
            reasons = "; ".join(f"left out {count:,} {why}" for why, count in self.left_out.items())
            raise ValueError(f"{path}: holds no record to compare with{f' ({reasons})' if reasons else ''}")

    def limit(self, stream: TokenStream) -> int:
        """See `Instructions`."""
        return stream.n_tokens

    def categories(self) -> list[str] | None:
        """See `Instructions`."""
        found = [record.category for record in self.records]
        return found if any(found) else None

    def stream(self, opened: OpenModel, template: Template | None) -> ArrayTokens:
        """See `Instructions`."""
        ids: list[int] = []
        mask: list[int] = []
        starts = []
        for record in self.records:
            with _at(record.sample.where):
                new, marks = _rendered(record.sample, template, opened.tokenizer)
            starts.append(len(ids))
            ids += new
            mask += marks
        return ArrayTokens(np.array(ids, np.uint32), np.array(mask, np.uint8), starts)

    def asked(self, opened: OpenModel, template: Template | None) -> Asked:
        """See `Instructions`."""
        tokenizer = opened.tokenizer
        questions = []
        for record in self.records:
            *before, answer = record.sample.messages
            with _at(record.sample.where):
                if template is None:
                    prompt = render_prompt(_raw(record.sample), None, tokenizer)
                else:
                    prompt = render_conversation(before, template, tokenizer, add_generation_prompt=True)[0]
            shown = "\n\n".join(part for part in (before[-1]["content"], before[-1].get("context", "")) if part)
            questions.append(Question(prompt, utf8(shown), utf8(answer["content"]), record.category))
        return Asked(questions, template, stop_ids(template, tokenizer))


def _rendered(sample: Sample, template: Template | None, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids and mask of a conversation; without a template, the answer follows the raw prompt after a space."""
    if template is not None:
        return render_conversation(sample.messages, template, tokenizer)
    prompt = render_prompt(_raw(sample), None, tokenizer)
    answer = tokenizer.encode(" " + sample.messages[-1]["content"])
    return prompt + answer, [0] * len(prompt) + [1] * len(answer)


def _raw(sample: Sample) -> Record:
    """The one question of a record that is read without a template."""
    if len(sample.messages) != 2:
        raise ValueError(
            f"a conversation of {len(sample.messages)} messages needs a template, and the model holds none: "
            "name one with --prompt_template"
        )
    question = sample.messages[0]
    return {"instruction": question["content"], "context": question.get("context", "")}


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Errors in it name the record that they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _with_usual_names(row: Any) -> Any:
    """A record of `sample.py --prompts` under the names of instruction data."""
    if isinstance(row, dict) and "prompt" in row and "reference" in row:
        return {**row, "instruction": row["prompt"], "response": row["reference"]}
    return row


def _category(row: dict[str, object], where: str) -> str:
    category = row.get("category")
    if category is not None and not isinstance(category, str):
        raise ValueError(f"{where}: the field 'category' is {type(category).__name__}, expected text")
    return utf8(category or "").strip()


# ---- a prepared set


class PreparedSet:
    """The documents of a token set, the first `max_samples` of them. ValueError where it is text, which has none."""

    def __init__(self, tokens: TokenSet, max_samples: int | None) -> None:
        if max_samples is not None and tokens.meta["kind"] == "text":
            raise ValueError(f"{tokens.folder}: holds text, which --max_samples does not count: use --max_tokens")
        self.tokens, self.name = tokens, f"{tokens.folder.name}/{tokens.split}"
        per_sample = 2 if tokens.meta["kind"] == "preference" else 1
        self.count = min(per_sample * (max_samples or tokens.n_documents), tokens.n_documents)

    def limit(self, stream: TokenStream) -> int:
        """See `Instructions`."""
        return self.tokens.n_tokens if self.count == self.tokens.n_documents else int(self._starts[self.count])

    def categories(self) -> list[str] | None:
        """None: shards hold no categories."""
        return None

    def stream(self, opened: OpenModel, template: Template | None) -> TokenStream:
        """See `Instructions`. Raises ValueError where the set was made with another tokenizer than the model's."""
        theirs, ours = self.tokens.tokenizer_fingerprint, opened.tokenizer.fingerprint
        if theirs != ours:
            found = f"{self.tokens.meta['tokenizer']['kind']} tokenizer {theirs[:12]}"
            raise ValueError(
                f"{self.tokens.folder}: was prepared with the {found}, {opened.path} reads {opened.tokenizer.kind} "
                f"{ours[:12]}; prepare the text again with --tokenizer {opened.path}, or score it with --input"
            )
        return self.tokens

    def asked(self, opened: OpenModel, template: Template | None) -> Asked:
        """See `Instructions`; the prompt ends, and the reference begins, where the mask's last run of ones does."""
        self.stream(opened, template)
        own = template_from_spec(self.tokens.meta["template"])
        questions = []
        for start, stop in itertools.pairwise(self._starts[: self.count + 1].tolist()):
            ids, mask = self.tokens.tokens(start, stop), self.tokens.mask(start, stop)
            first, last = _last_run(mask)
            if 0 < first < last:
                reference = _answer_text(ids[first:last].tolist(), own, opened.tokenizer)
                prompt = ids[:first].tolist()
                if reference:
                    questions.append(Question(prompt, opened.tokenizer.decode(prompt), reference, ""))
        if not questions:
            raise ValueError(f"{self.tokens.folder}: none of its first {self.count:,} answers holds any text")
        return Asked(questions, own, stop_ids(own, opened.tokenizer))

    def check_answers(self) -> None:
        """Raises ValueError where the set holds no answers that others could be compared with."""
        kind = self.tokens.meta["kind"]
        if kind != "instruction":
            raise ValueError(
                f"{self.tokens.folder}: holds {kind}; answers are compared with those of an instruction set"
            )

    @cached_property
    def _starts(self) -> np.ndarray:
        return self.tokens.document_starts


def _last_run(mask: np.ndarray) -> tuple[int, int]:
    """Where the last run of ones begins and ends; (0, 0) without any."""
    ones = np.flatnonzero(mask)
    if not len(ones):
        return 0, 0
    last = int(ones[-1]) + 1
    zeros = np.flatnonzero(mask[:last] == 0)
    return (int(zeros[-1]) + 1 if len(zeros) else 0), last


def _answer_text(ids: Sequence[int], template: Template | None, tokenizer: Tokenizer) -> str:
    special = set(tokenizer.special_tokens.values())
    text = tokenizer.decode(token for token in ids if token not in special)
    end = template.end if isinstance(template, PromptTemplate) else ""
    return text.removesuffix(end).strip()
