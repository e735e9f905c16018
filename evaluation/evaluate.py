"""What `evaluate.py` does: each measure of each checkpoint on each text or set, as one dict.

    {"format": 1, "metrics": ["perplexity", ...],
     "results": [{"checkpoint", "path", "step", "text", ..., "seconds"}]}

A result holds what was measured there: of texts and sets what `_likelihood` gives, of instructions also what
`evaluation.answers.compare_answers` gives and "categories", of multiple choice what `multiple_choice` gives.
"""

from __future__ import annotations

import contextlib
import difflib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.chat import Template
from data.manifest import resolve_data_dir
from data.shards import TokenSet, open_dataset
from data.templates import get_template
from evaluation import text_metrics
from evaluation.answers import answer_all, compare_answers, compare_by_category
from evaluation.checkpoints import check_vocabulary, finite_or_none, ignore, short_labels
from evaluation.instructions import Instructions, PreparedSet, RecordFile
from evaluation.lm_eval_adapter import check_lm_eval, run_task
from evaluation.log_blocks import ACCURACIES, answers_block, choices_block, likelihood_block, task_block
from evaluation.multiple_choice import Choice, multiple_choice, read_choices
from evaluation.perplexity import PerplexityResult, Score, TokenStream, score_windows, total
from evaluation.processes import ALONE, Processes
from evaluation.settings import EvaluateSettings
from evaluation.texts import PlainText, read_text
from formats.open_model import OpenModel, check_exists, open_model

LIKELIHOOD = ("perplexity", "loss", "accuracy")
METRICS = (*LIKELIHOOD, *text_metrics.NAMES)

Measure = Callable[[str, OpenModel], dict[str, Any]]  # of a checkpoint by its label: the result but for its head


def evaluate(
    settings: EvaluateSettings,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = ignore,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Measures every checkpoint on everything that is asked; `say` gets the lines of each evaluation as it ends.

    `processes` share the work, and each returns all results. Raises ValueError or OSError for what cannot be read or
    does not fit together.
    """
    check(settings)
    work = _Work(settings, say, processes)
    measures = work.measures()  # all input is read before the first model
    results = []
    for label, ref in zip(short_labels(settings.checkpoints), settings.checkpoints):
        results += _measured(label, partial(open_model, ref, device, base_model=settings.base_model), measures)
    return {"format": 1, "metrics": asked_metrics(settings), "results": results}


def _measured(label: str, open_it: Callable[[], OpenModel], measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """All that is asked of one checkpoint, which is in memory no longer than this takes."""
    opened, results = open_it(), []
    check_vocabulary(opened)
    for measure in measures:
        began = time.perf_counter()
        found = measure(label, opened)
        head = {"checkpoint": label, "path": str(opened.path), "step": opened.step}
        results.append({**head, **found, "seconds": time.perf_counter() - began})
    return results


def asked_metrics(settings: EvaluateSettings) -> list[str]:
    """The metrics by name; `--metrics a b` and `--metrics a,b` are the same."""
    return [metric for entry in settings.metrics for metric in entry.split(",") if metric]


def check(settings: EvaluateSettings) -> None:
    """Raises ValueError or OSError for settings that cannot work, before anything is read."""
    metrics = asked_metrics(settings)
    answers = [metric for metric in metrics if metric in text_metrics.NAMES]
    if not settings.checkpoints:
        raise ValueError("no checkpoint: give at least one with --checkpoints FILE.pt")
    for ref in settings.checkpoints:
        check_exists(ref)
        if settings.json == "beside" and not Path(ref).exists():
            raise ValueError(f"--json beside: {ref} is no file or folder here; name a file with --json FILE")
    if not (settings.input or settings.data_dir or settings.multiple_choice or settings.lm_eval):
        raise ValueError(
            "nothing to score: give --input FILE (a text), --data_dir DIR (a prepared set or a JSONL), "
            "--multiple_choice FILE or --lm_eval TASK"
        )
    for metric in metrics:
        if metric not in METRICS:
            close = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"--metrics {metric}: unknown, expected one of {', '.join(METRICS)}.{hint}")
    if answers and settings.data_dir is None:
        raise ValueError(f"--metrics {answers[0]} compares answers with references: give --data_dir DIR or a JSONL")
    if settings.input and not set(metrics) & set(LIKELIHOOD):
        raise ValueError(f"--metrics {','.join(metrics)} measures nothing of --input: add perplexity, or leave it out")
    text_metrics.check_installed(answers)
    if settings.lm_eval:
        check_lm_eval()
    _check_numbers(settings)


def _check_numbers(settings: EvaluateSettings) -> None:
    if settings.max_tokens is not None and settings.max_tokens < 2:
        raise ValueError(f"--max_tokens {settings.max_tokens}: expected at least 2, one to read and one to score")
    for name in ("batch_size", "max_samples", "max_new_tokens"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    if settings.max_samples is not None and not (settings.data_dir or settings.multiple_choice or settings.lm_eval):
        raise ValueError(f"--max_samples {settings.max_samples}: counts records and questions; for a text --max_tokens")
    if settings.keep_predictions < 0:
        raise ValueError(f"--keep_predictions {settings.keep_predictions}: expected 0 or more")


def files_beside(results: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """The file beside each checkpoint and the results of that checkpoint alone: NAME.eval.json for NAME.pt."""
    files: dict[Path, dict[str, Any]] = {}
    for result in results["results"]:
        path = Path(result["path"])
        name = path.stem if path.is_file() else path.resolve().name
        place = path.parent / f"{name}.eval.json"
        files.setdefault(place, {**results, "results": []})["results"].append(result)
    return files


class _Work:
    """One measure a method; what they share is what was asked."""

    def __init__(self, settings: EvaluateSettings, say: Callable[[str], None], processes: Processes) -> None:
        self.settings, self.say, self.processes = settings, say, processes
        metrics = asked_metrics(settings)
        self.likelihood = [metric for metric in metrics if metric in LIKELIHOOD]
        self.answers = [metric for metric in metrics if metric in text_metrics.NAMES]
        name = settings.prompt_template
        self.template = None if name in ("auto", "none") else get_template(name)

    def measures(self) -> list[Measure]:
        """All that is asked of a checkpoint. Reads texts, sets and questions."""
        settings = self.settings
        found: list[Measure] = [partial(self.of_text, read_text(name)) for name in settings.input]
        if settings.data_dir is not None:
            found.append(partial(self.of_set, self._read_set(settings.data_dir)))
        for file in settings.multiple_choice:
            found.append(partial(self.of_choices, Path(file).name, read_choices(file, settings.max_samples)))
        found += [partial(self.of_task, task) for task in settings.lm_eval]
        return found

    def of_text(self, text: PlainText, label: str, opened: OpenModel) -> dict[str, Any]:
        """How likely a text is."""
        stream = text.stream(opened.tokenizer)
        block_size = self._window(text.window(opened.model.context_length))
        stride = self._stride(max(1, block_size // 2) if text.recipe is None else block_size)
        limit = text.limit(self._at_most(stream.n_tokens), block_size)
        begins = "no begin token" if opened.tokenizer.bos_id is None else "behind the begin token"
        how = begins if text.recipe is None else f"{begins}; {text.recipe.how}"
        return self._likelihood(label, opened, text.name, stream, limit, block_size, stride, how)[0]

    def of_set(self, instructions: Instructions, label: str, opened: OpenModel) -> dict[str, Any]:
        """How likely the reference answers of a set are, and what the model's own are worth beside them."""
        template = self._template(opened)
        found: dict[str, Any] = {"text": instructions.name}
        by_category: dict[str, dict[str, Any]] = {}
        if self.likelihood:
            stream = instructions.stream(opened, template)
            block_size = self._window(opened.model.context_length)
            stride = self._stride(max(1, block_size // 2))
            limit = self._at_most(instructions.limit(stream))
            how = "each record by itself" if stream.has_mask else "no begin token"
            found, scores = self._likelihood(label, opened, instructions.name, stream, limit, block_size, stride, how)
            by_category = self._by_category(scores, instructions.categories())
        if self.answers:
            answers = self._answers(label, opened, instructions, template)
            for category, values in answers.pop("categories").items():
                by_category[category] = by_category.get(category, {}) | values
            found |= answers
        return {**found, "categories": by_category}

    def of_choices(self, name: str, questions: list[Choice], label: str, opened: OpenModel) -> dict[str, Any]:
        """How often the right ending is the likeliest."""
        endings = sum(len(question.endings) for question in questions)
        with self._bar(label, endings, "ending") as bar, _naming(opened, name):
            options: dict[str, Any] = {"progress": bar.update, "processes": self.processes}
            found = multiple_choice(opened, questions, batch_size=self.settings.batch_size, **options)
        self._say(choices_block(label, name, found))
        return {"text": name, **found}

    def of_task(self, task: str, label: str, opened: OpenModel) -> dict[str, Any]:
        """What lm-eval measures; its accuracies under the names of our own."""
        options: dict[str, Any] = {"max_samples": self.settings.max_samples, "processes": self.processes}
        with self._bar(label, None, "request") as bar:
            found = run_task(opened, task, batch_size=self.settings.batch_size, progress=bar.update, **options)
        self._say(task_block(label, task, found))
        ours = {name: found["values"][name] for name in ACCURACIES if name in found["values"]}
        return {"text": f"lm-eval {Path(task).stem}", "samples": found["samples"], **ours, "lm_eval": found}

    # ---- the parts of them

    def _likelihood(
        self,
        label: str,
        opened: OpenModel,
        name: str,
        stream: TokenStream,
        limit: int,
        block_size: int,
        stride: int,
        how: str,
    ) -> tuple[dict[str, Any], list[Score]]:
        with_hits = "accuracy" in self.likelihood
        tokens = stream.n_supervised if isinstance(stream, TokenSet) else int(stream.mask(0, stream.n_tokens).sum())
        with self._bar(label, min(tokens, limit), "token") as bar, _naming(opened, name):
            scores = score_windows(
                opened.model,
                stream,
                block_size=block_size,
                stride=stride,
                batch_size=self.settings.batch_size,
                tokenizer=opened.tokenizer,
                max_tokens=limit,
                with_hits=with_hits,
                progress=bar.update,
                processes=self.processes,
            )
        result = total(scores, with_hits=with_hits, block_size=block_size, stride=stride, how=how)
        scored = "answers only" if stream.has_mask else "all tokens"
        self._say(likelihood_block(label, name, scored, result))
        sizes = {"windows": result.windows, "block_size": block_size, "stride": stride}
        values = {**_values(result), "bytes": result.bytes, "bits_per_byte": finite_or_none(result.bits_per_byte)}
        return {"text": name, "scored": scored, **values, **sizes, "protocol": f"{result.protocol}, {scored}"}, scores

    def _by_category(self, scores: list[Score], categories: list[str] | None) -> dict[str, dict[str, Any]]:
        """The sums of each category's records, in the order of their names."""
        if categories is None:
            return {}
        groups: dict[str, list[Score]] = {}
        for score in scores:
            groups.setdefault(categories[score.document], []).append(score)
        with_hits = "accuracy" in self.likelihood
        return {
            name: {
                "samples": len({score.document for score in groups[name]}),
                **_values(total(groups[name], with_hits=with_hits, block_size=0, stride=0)),
            }
            for name in sorted(groups)
        }

    def _answers(
        self, label: str, opened: OpenModel, instructions: Instructions, template: Template | None
    ) -> dict[str, Any]:
        with _naming(opened, instructions.name):
            asked = instructions.asked(opened, template)
            with self._bar(label, len(asked.questions), "answer") as bar:
                answers = answer_all(
                    opened,
                    asked,
                    max_new_tokens=self.settings.max_new_tokens,
                    batch_size=self.settings.batch_size,
                    progress=bar.update,
                    processes=self.processes,
                )
        found = compare_answers(asked.questions, answers, self.answers, self.settings.keep_predictions)
        found["template"] = None if asked.template is None else asked.template.name
        found["max_new_tokens"] = self.settings.max_new_tokens
        self._say(answers_block(label, instructions.name, found))
        return {**found, "categories": compare_by_category(asked.questions, answers, self.answers)}

    def _read_set(self, name: str) -> Instructions:
        """A folder of shards, or a file of records."""
        path = resolve_data_dir(name)
        if not path.is_file():
            if self.settings.prompt_template != "auto":
                raise ValueError(
                    f"--prompt_template {self.settings.prompt_template}: {path} keeps the template that it was "
                    "prepared with; give its records as a JSONL, or leave it out"
                )
            prepared = PreparedSet(open_dataset(path, self.settings.split), self.settings.max_samples)
            if self.answers:
                prepared.check_answers()
            return prepared
        records = RecordFile(path, self.settings.max_samples)
        for why, count in records.left_out.items():
            self._say([f"{path}: left out {count:,} record{'s' * (count > 1)} {why}"])
        return records

    def _template(self, opened: OpenModel) -> Template | None:
        return opened.template if self.settings.prompt_template == "auto" else self.template

    def _window(self, default: int) -> int:
        return default if self.settings.block_size is None else self.settings.block_size

    def _stride(self, default: int) -> int:
        return default if self.settings.stride is None else self.settings.stride

    def _at_most(self, n_tokens: int) -> int:
        return n_tokens if self.settings.max_tokens is None else min(n_tokens, self.settings.max_tokens)

    def _say(self, lines: list[str]) -> None:
        for line in lines if self.processes.rank == 0 else ():
            self.say(line)

    def _bar(self, label: str, total: int | None, unit: str) -> Any:
        """A bar on a terminal, of this process's share; nothing elsewhere."""
        from tqdm import tqdm

        share = None if total is None else -(-total // self.processes.world_size)
        quiet = True if self.processes.rank else None
        return tqdm(total=share, desc=label, unit=unit, unit_scale=True, leave=False, disable=quiet)


def _values(result: PerplexityResult) -> dict[str, Any]:
    """The values of a result by name; accuracy only where it was asked."""
    values = {"tokens": result.tokens, "loss": result.loss, "perplexity": result.perplexity}
    if result.accuracy is not None:
        values["accuracy"] = result.accuracy
    return {name: finite_or_none(value) for name, value in values.items()}


@contextlib.contextmanager
def _naming(opened: OpenModel, name: str) -> Iterator[None]:
    """Errors in it say which model and which text they are about; memory that is too small is one of them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{opened.path} on {name}: {error}") from None
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # as a CPU says
            raise
        reason = "out of memory: use a smaller --batch_size, then a smaller --seq_len or --max_new_tokens"
        raise ValueError(f"{opened.path} on {name}: {reason}") from None
