"""The same prompts put to several checkpoints: one dict that the terminal, a JSON file and a page show alike.

    {"format": 1, "title": str, "notes": [str],
     "settings": {"max_new_tokens": 128, ..., "prompt_template": "dolly", "batch_size": 1, "device": "cpu"},
     "checkpoints": [{"label", "path", "step", "val_loss", "parameters", "bytes", "tokenizer", "template",
                      "summary": {"tokens", "seconds", "tokens_per_s", "mean_tokens", "reference_perplexity"}}],
     "rows": [{"prompt", "context", "reference", "category", "input", "seed",
               "answers": [{"text", "tokens", "prompt_tokens", "seconds", "tokens_per_s", "finish",
                            "reference": {"loss", "perplexity", "tokens"} or None}]}]}

`input` is the prompt in its template, "" where it is read raw; `finish` is "end of text" or "length"; answers stand in
the order of the checkpoints. A prompt has a row for each seed; `seed` is None where there is only one. Seconds run from
the prompt to the answer's last token, in a batch beside the other rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.chat import Template, stop_ids
from data.prompt_template import PromptTemplate, Record
from data.templates import get_template, render_prompt, render_record
from data.text_stream import TextStream
from data.tokenizer import Tokenizer
from evaluation.checkpoints import check_vocabulary, finite_or_none, ignore, short_labels, size_on_disk
from evaluation.perplexity import ArrayTokens, PerplexityResult, perplexity, safe_exp
from formats.open_model import OpenModel, check_exists, load_tokenizer_and_template, open_model
from model.generate import generate
from model.pack import for_generation


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the names and meanings of `model.generate.generate`."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 1337


DEFAULTS = Sampling()


def compare(
    checkpoints: Sequence[str | Path],
    prompts: Sequence[Record],
    sampling: Sampling = DEFAULTS,
    *,
    seeds: int = 1,
    prompt_template: str = "auto",
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    base_model: str | None = None,
    weights: str = "float32",
    say: Callable[[str], None] = ignore,
    on_text: Callable[[int, str], None] = ignore,
    on_answer: Callable[[int, dict[str, Any]], None] = ignore,
) -> dict[str, Any]:
    """Lets every checkpoint answer every prompt, with the same input and seed; at most two models are in memory.

    `seeds`: so many answers to each prompt, with the seeds from `sampling.seed` on; streamed only if it is 1.
    `say` gets a line of progress per checkpoint; `on_text(row, piece)` each answer piece by piece as it is written,
    `on_answer(row, answer)` when it is whole.
    Raises ValueError or OSError for a checkpoint, template or setting that cannot be used.
    """
    if not checkpoints:
        raise ValueError("no checkpoint: give at least one with --checkpoints FILE.pt")
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT, or --prompts FILE (- for standard input)")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    _check_seeds(seeds, sampling)
    for ref in checkpoints[1:]:
        check_exists(ref)  # a mistyped name is told now, not after the first checkpoint's answers
    labels = short_labels(checkpoints)
    first = _open(checkpoints[0], device, base_model, weights)
    template, origin = _choose_template(prompt_template, first, checkpoints, labels)
    notes = [_input_note(template, origin, len(labels))]
    say(notes[0])
    heads, columns = [], []
    for number, (label, ref) in enumerate(zip(labels, checkpoints)):
        opened = _open(ref, device, base_model, weights) if number else first
        runs = _column(opened, prompts, template, sampling, seeds, batch_size, on_text, on_answer)
        heads.append(_head(label, ref, opened, runs, batch_size))
        answers = [answer for same_prompt in zip(*runs) for answer in same_prompt]
        columns.append(answers)
        notes += _truncation_note(label, opened, answers)
        say(f"{label}: {_count(len(answers), 'answer')}, {heads[-1]['summary']['tokens_per_s']:.0f} tokens/s")
    asked = [(record, sampling.seed + n if seeds > 1 else None) for record in prompts for n in range(seeds)]
    name = "none" if template is None else template.name
    names = " and ".join(labels) if len(labels) < 3 else f"{len(labels)} checkpoints"
    return {
        "format": 1,
        "title": f"{names}, {_count(len(prompts), 'prompt')}",
        "notes": notes,
        "settings": {
            **asdict(sampling),
            **({"seeds": seeds} if seeds > 1 else {}),
            "prompt_template": name,
            "batch_size": batch_size,
            "device": str(device),
        },
        "checkpoints": heads,
        "rows": [
            {**_row(record, template, first.tokenizer, row), "seed": seed}
            for (record, seed), row in zip(asked, zip(*columns))
        ],
    }


def _check_seeds(seeds: int, sampling: Sampling) -> None:
    if seeds < 1:
        raise ValueError(f"seeds {seeds}: expected at least 1")
    if seeds > 1 and (sampling.temperature == 0 or sampling.top_k == 1):
        greedy = "temperature 0" if sampling.temperature == 0 else "top_k 1"
        raise ValueError(f"seeds {seeds} with {greedy}: each gives the same answer; leave out one of the two")


def _open(ref: str | Path, device: str | torch.device, base_model: str | None, weights: str) -> OpenModel:
    opened = open_model(ref, device, base_model=base_model)
    for_generation(opened.model, weights)
    return opened


def _choose_template(
    name: str, first: OpenModel, checkpoints: Sequence[str | Path], labels: Sequence[str]
) -> tuple[Template | None, str]:
    """The template of all columns, and where it comes from if it was not asked for by name.

    Identical input is the honest comparison, so `auto` takes the first template among the checkpoints for all of them.
    Raises ValueError for an unknown name.
    """
    if name != "auto":
        return (None, "") if name == "none" else (get_template(name), "")
    for number, (ref, label) in enumerate(zip(checkpoints, labels)):
        template = load_tokenizer_and_template(ref)[1] if number else first.template
        if template is not None:
            return template, f"found in {label}"
    return None, "no checkpoint holds a template"


def reference_loss(opened: OpenModel, record: Record, template: Template | None) -> dict[str, Any] | None:
    """Loss and perplexity of the record's reference after its prompt, scored on the reference's tokens only.

    With a template this is the loss of training, end of text included. Without one, the reference continues the raw
    prompt, after a space if neither has one there. None without a reference.
    """
    if not record["response"]:
        return None
    if template is not None:
        ids, mask = render_record(record, template, opened.tokenizer)
    else:
        prompt = render_prompt(record, None, opened.tokenizer)
        apart = (record["context"] or record["instruction"])[-1].isspace() or record["response"][0].isspace()
        answer = opened.tokenizer.encode(("" if apart else " ") + record["response"])
        ids, mask = prompt + answer, [0] * len(prompt) + [1] * len(answer)
    result = _score(opened, np.array(ids), np.array(mask, np.uint8))
    return {"loss": result.loss, "perplexity": finite_or_none(result.perplexity), "tokens": result.tokens}


def _score(opened: OpenModel, ids: np.ndarray, mask: np.ndarray) -> PerplexityResult:
    block_size = opened.model.context_length
    return perplexity(opened.model, ArrayTokens(ids, mask), block_size=block_size, stride=max(1, block_size // 2))


def _column(
    opened: OpenModel,
    prompts: Sequence[Record],
    template: Template | None,
    sampling: Sampling,
    seeds: int,
    batch_size: int,
    on_text: Callable[[int, str], None],
    on_answer: Callable[[int, dict[str, Any]], None],
) -> list[list[dict[str, Any]]]:
    """One checkpoint's answers: a list a seed, in the order of the prompts."""
    runs: list[list[dict[str, Any]]] = []
    references: dict[int, dict[str, Any] | None] = {}  # no seed changes them
    for seed in range(sampling.seed, sampling.seed + seeds):
        runs.append([])
        with_seed = replace(sampling, seed=seed)
        for answer in _answers(
            opened, prompts, template, with_seed, batch_size, references, on_text if seeds == 1 else ignore
        ):
            if seeds == 1:
                on_answer(len(runs[-1]), answer)
            runs[-1].append(answer)
    return runs


def _answers(
    opened: OpenModel,
    prompts: Sequence[Record],
    template: Template | None,
    sampling: Sampling,
    batch_size: int,
    references: dict[int, dict[str, Any] | None],
    on_text: Callable[[int, str], None],
) -> Iterator[dict[str, Any]]:
    """One checkpoint's answers, in the order of the prompts; `references` holds the scores that are known."""
    check_vocabulary(opened)
    ids = [render_prompt(record, template, opened.tokenizer) for record in prompts]
    generate(opened.model, ids[:1], max_new_tokens=1)  # the first call pays for allocations; not the first answer
    for start in range(0, len(ids), batch_size):
        batch = ids[start : start + batch_size]
        for row, answer in enumerate(_answer(opened, batch, template, sampling, start, on_text), start):
            if row not in references:
                references[row] = reference_loss(opened, prompts[row], template)
            yield {**answer, "reference": references[row]}


def _answer(
    opened: OpenModel,
    batch: list[list[int]],
    template: Template | None,
    sampling: Sampling,
    first_row: int,
    on_text: Callable[[int, str], None],
) -> list[dict[str, Any]]:
    """The answers to one batch of prompts, with their figures."""
    watch = _Watch(opened.tokenizer, len(batch), first_row, on_text)
    stop = stop_ids(template, opened.tokenizer)
    answers = generate(opened.model, batch, **asdict(sampling), stop_ids=stop, on_token=watch)
    watch.close()
    end = template.end if isinstance(template, PromptTemplate) else ""
    return [
        {
            "text": opened.tokenizer.decode(ids).removesuffix(end),
            "tokens": len(ids),
            "prompt_tokens": len(prompt),
            "seconds": seconds,
            "tokens_per_s": len(ids) / seconds,
            "finish": "length" if len(ids) == sampling.max_new_tokens else "end of text",
        }
        for ids, prompt, seconds in zip(answers, batch, watch.seconds)
    ]


class _Watch:
    """Called with every new token: notes when each row got its last one, and turns tokens into text as they come."""

    def __init__(self, tokenizer: Tokenizer, rows: int, first_row: int, on_text: Callable[[int, str], None]) -> None:
        self.first_row = first_row
        self.on_text = on_text
        self.texts = [TextStream(tokenizer) for _ in range(rows)]
        self.seconds = [0.0] * rows
        self.began = time.perf_counter()

    def __call__(self, row: int, token: int) -> None:
        self.seconds[row] = time.perf_counter() - self.began
        self._give(row, self.texts[row].add(token))

    def close(self) -> None:
        """The rest of each row's text; rows without a token took the whole time to say nothing."""
        for row, text in enumerate(self.texts):
            self.seconds[row] = self.seconds[row] or time.perf_counter() - self.began
            self._give(row, text.rest())

    def _give(self, row: int, text: str) -> None:
        if text:
            self.on_text(self.first_row + row, text)


def _head(
    label: str, ref: str | Path, opened: OpenModel, runs: list[list[dict[str, Any]]], batch_size: int
) -> dict[str, Any]:
    """What stands at the head of a column. The rows of a batch run at the same time: its slowest one counts."""
    tokens = sum(a["tokens"] for run in runs for a in run)
    batches = [run[start : start + batch_size] for run in runs for start in range(0, len(run), batch_size)]
    seconds = sum(max(a["seconds"] for a in batch) for batch in batches)
    references = [a["reference"] for a in runs[0] if a["reference"]]
    scored = sum(r["tokens"] for r in references)
    mean = sum(r["loss"] * r["tokens"] for r in references) / scored if scored else None
    summary = {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "mean_tokens": tokens / sum(map(len, runs)),
        "reference_perplexity": None if mean is None else finite_or_none(safe_exp(mean)),
    }
    return {
        "label": label,
        "path": str(ref),
        "step": opened.step,
        "val_loss": opened.val_loss,
        "parameters": opened.parameters,
        "bytes": size_on_disk(opened.path),
        "tokenizer": opened.tokenizer.kind,
        "template": opened.template.name if opened.template else None,
        "summary": summary,
    }


def _truncation_note(label: str, opened: OpenModel, answers: list[dict[str, Any]]) -> list[str]:
    limit = opened.model.context_length
    cut = sum(answer["prompt_tokens"] + answer["tokens"] > limit for answer in answers)
    text = f"{label}: {_count(cut, 'answer')} went beyond the context of {limit} tokens: the model saw the end only."
    return [text] if cut else []


def prompt_fields(record: Record) -> dict[str, str]:
    """A record under the names of a comparison's row."""
    fields = {"prompt": "instruction", "context": "context", "reference": "response", "category": "category"}
    return {name: record[field] for name, field in fields.items()}


def _row(
    record: Record, template: Template | None, tokenizer: Tokenizer, answers: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    read = tokenizer.decode(render_prompt(record, template, tokenizer)) if template is not None else ""
    return {**prompt_fields(record), "input": read, "answers": list(answers)}


def _input_note(template: Template | None, origin: str, columns: int) -> str:
    text = "the raw prompt" if template is None else f"prompt template {template.name}"
    return f"Input{' of every checkpoint' if columns > 1 else ''}: {text}{f' ({origin})' if origin else ''}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
