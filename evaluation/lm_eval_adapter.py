"""The tasks of lm-eval (EleutherAI's evaluation harness) put to a model of ours.

lm-eval asks a model for three things: the likelihood of continuations, that of whole texts, and greedy answers. The
adapter gives them from our own network and tokenizer, texts read raw; fetching, prompts and metrics are lm-eval's.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from evaluation.checkpoints import finite_or_none, ignore
from evaluation.continuations import Continuation, encode_pair, score_continuations
from evaluation.processes import ALONE, Processes, gather, map_batches
from formats.open_model import OpenModel
from model.generate import generate

_TASK_NAME = re.compile(r"^task:\s*['\"]?([\w.-]+)", re.MULTILINE)
_LONGEST_ANSWER = 256  # tokens, where a task does not say; lm-eval's own default


def check_lm_eval() -> None:
    """Raises ValueError naming the package where lm-eval is not installed."""
    if "lm_eval" not in sys.modules and importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--lm_eval needs the package lm-eval: pip install lm-eval")


def run_task(
    opened: OpenModel,
    task: str,
    *,
    batch_size: int,
    max_samples: int | None = None,
    progress: Callable[[int], object] = ignore,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """{"samples", "version", "values": {metric: value}, "parts"} of a task, as lm-eval computes them.

    A task is a name of lm-eval's, or a YAML file that describes one; a group or a tag has the values of its tasks in
    "parts". `progress` is told how many requests each batch answered.
    Raises ValueError for a task that there is not or that cannot be loaded.
    """
    check_lm_eval()
    from lm_eval import simple_evaluate

    is_file = task.endswith((".yaml", ".yml"))
    name = _task_name(Path(task)) if is_file else task
    manager = _task_manager(Path(task).resolve().parent if is_file else None)
    if name not in manager.all_tasks:
        raise ValueError(f"--lm_eval {task}: lm-eval has no such task; see `lm-eval ls tasks`, or give a YAML file")
    model = language_model(opened, batch_size=batch_size, progress=progress, processes=processes)
    try:
        found = simple_evaluate(model, tasks=[name], limit=max_samples, log_samples=False, task_manager=manager)
    except Exception as error:  # of fetching data, of a task's own code
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        raise ValueError(f"--lm_eval {task}: lm-eval could not run it ({reason})") from error
    # Under torchrun lm-eval gives its results to the first process of each node alone.
    results = gather({processes.rank: None if found is None else _summary(name, found)}, processes)
    return next(result for result in results if result is not None)


def _summary(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What `run_task` returns of what lm-eval does."""
    return {
        "samples": sum(count["effective"] for count in found["n-samples"].values()),
        "version": found["versions"].get(name),
        "values": _values(found["results"].get(name, {})),
        "parts": {part: _values(values) for part, values in found["results"].items() if part != name},
    }


def language_model(
    opened: OpenModel,
    *,
    batch_size: int = 8,
    progress: Callable[[int], object] = ignore,
    processes: Processes = ALONE,
) -> Any:
    """The model as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)`."""
    check_lm_eval()
    from lm_eval.api.model import LM

    shared: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "processes": processes}

    class Espalier(LM):
        """All processes answer every request together: to lm-eval they are one."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """(sum of log-probabilities, whether greedy decoding would say it) of each (context, continuation)."""
            pairs = [encode_pair(opened.tokenizer, *request.args) for request in requests]
            scores = score_continuations(opened.model, pairs, **shared)
            return [(score.log_probability, score.is_greedy) for score in scores]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            """The log-probability of each text, every token of it scored once."""
            windows = [rolling_windows(opened, *request.args) for request in requests]
            scores = iter(score_continuations(opened.model, list(itertools.chain.from_iterable(windows)), **shared))
            return [sum(next(scores).log_probability for _ in parts) for parts in windows]

        def generate_until(self, requests: list[Any]) -> list[str]:
            """The continuation of each context up to the first of the texts that are to end it."""
            return _answers(opened, [request.args for request in requests], **shared)

    return Espalier()


def rolling_windows(opened: OpenModel, text: str) -> list[Continuation]:
    """A text in windows of the model's context, each token scored in one of them, the last window full to the left.

    The first token is scored after the begin token, or after the end of the text before where there is none.
    """
    tokenizer, limit = opened.tokenizer, opened.model.context_length
    ids = [tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id, *tokenizer.encode(text)]
    windows = []
    for start in range(1, len(ids), limit):
        stop = min(start + limit, len(ids))
        windows.append(Continuation(ids[max(0, stop - 1 - limit) : start], ids[start:stop]))
    return windows


def _answers(opened: OpenModel, requests: Sequence[tuple[str, dict[str, Any]]], **shared: Any) -> list[str]:
    """Neighbours with equal options are generated together."""
    found: list[str] = []
    for options, group in itertools.groupby(requests, key=lambda request: request[1]):
        work = partial(_answer, opened, options=options)
        found += map_batches([context for context, _ in group], work, length=len, **shared)
    return found


def _answer(opened: OpenModel, contexts: list[str], *, options: dict[str, Any]) -> list[str]:
    """The answers of one batch; an answer ends before any of the texts in `until`."""
    tokenizer = opened.tokenizer
    until = options.get("until") or []
    ends = [end for end in ([until] if isinstance(until, str) else until) if end]
    longest = int(options.get("max_gen_toks") or options.get("max_new_tokens") or _LONGEST_ANSWER)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    room = max(1, opened.model.context_length - longest)
    prompts = [[*begin, *tokenizer.encode(context)] or [tokenizer.eot_id] for context in contexts]
    # An end that is a single token ends a row at once; those that several tokens make are found in the text.
    single = [ids[0] for ids in map(tokenizer.encode, ends) if len(ids) == 1]
    answers = generate(
        opened.model,
        [prompt[-room:] for prompt in prompts],
        max_new_tokens=longest,
        temperature=float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0,
        stop_ids=[*opened.stop_ids, *single],
    )
    texts = [tokenizer.decode(ids) for ids in answers]
    return [text[: min((at for at in map(text.find, ends) if at >= 0), default=len(text))] for text in texts]


@cache
def _task_manager(folder: Path | None) -> Any:
    """lm-eval's tasks, or those of a folder alone: to index lm-eval's 26,000 files takes 20 seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager() if folder is None else TaskManager(include_path=str(folder), include_defaults=False)


def _task_name(file: Path) -> str:
    """The name in a task's YAML, which may hold tags that only lm-eval reads."""
    if not file.is_file():
        raise FileNotFoundError(f"--lm_eval {file}: no such file")
    name = _TASK_NAME.search(file.read_text("utf-8", errors="replace"))
    if name is None:
        raise ValueError(f"--lm_eval {file}: has no line `task: NAME`")
    return name[1]


def _values(values: dict[str, Any]) -> dict[str, float | None]:
    """The numbers by metric; lm-eval writes `acc,none` for a metric whose answers went through no filter."""
    return {
        name.removesuffix(",none"): finite_or_none(float(value))
        for name, value in values.items()
        if isinstance(value, (int, float)) and "," in name
    }
