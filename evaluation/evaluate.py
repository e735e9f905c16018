"""What `evaluate.py` does: each metric of each checkpoint on each text, as one dict.

{"format": 1, "metrics": ["perplexity"],
 "results": [{"checkpoint", "path", "step", "text", "scored", "tokens", "loss", "perplexity", "bytes",
              "bits_per_byte", "windows", "block_size", "stride", "protocol", "seconds"}]}
"""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.shards import TokenSet, open_dataset
from evaluation.checkpoints import check_vocabulary, finite_or_none, ignore, short_labels
from evaluation.perplexity import ArrayTokens, PerplexityResult, TokenStream, perplexity
from evaluation.settings import EvaluateSettings
from formats.open_model import OpenModel, open_model

METRICS = ("perplexity",)


@dataclass(frozen=True)
class Text:
    """Something to score: its name, and either its characters or its tokens."""

    name: str
    characters: str | None = None
    tokens: TokenSet | None = None


def evaluate(
    settings: EvaluateSettings, device: str | torch.device = "cpu", say: Callable[[str], None] = ignore
) -> dict[str, Any]:
    """Measures every checkpoint on every text; `say` gets the lines of each evaluation as it ends.

    Raises ValueError or OSError for what cannot be read or does not fit together.
    """
    _check(settings)
    texts = [_read_text(name) for name in settings.input]
    if settings.data_dir is not None:
        tokens = open_dataset(settings.data_dir, settings.split)
        texts.append(Text(f"{Path(settings.data_dir).name}/{settings.split}", tokens=tokens))
    results = []
    for label, ref in zip(short_labels(settings.checkpoints), settings.checkpoints):
        opened = open_model(ref, device, base_model=settings.base_model)
        check_vocabulary(opened)
        for text in texts:
            results.append(_evaluate_one(label, opened, text, settings, say))
    return {"format": 1, "metrics": asked_metrics(settings), "results": results}


def asked_metrics(settings: EvaluateSettings) -> list[str]:
    """The metrics by name; `--metrics a b` and `--metrics a,b` are the same."""
    return [metric for entry in settings.metrics for metric in entry.split(",") if metric]


def _check(settings: EvaluateSettings) -> None:
    if not settings.checkpoints:
        raise ValueError("no checkpoint: give at least one with --checkpoints FILE.pt")
    if not settings.input and settings.data_dir is None:
        raise ValueError("nothing to score: give --input FILE (a text) or --data_dir DIR (a prepared set)")
    for metric in asked_metrics(settings):
        if metric not in METRICS:
            close = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"--metrics {metric}: unknown, expected one of {', '.join(METRICS)}.{hint}")
    if settings.max_tokens is not None and settings.max_tokens < 2:
        raise ValueError(f"--max_tokens {settings.max_tokens}: expected at least 2, one to read and one to score")


def _read_text(name: str) -> Text:
    """A UTF-8 text file (`-`: standard input)."""
    path = Path(name)
    if name != "-" and path.is_dir():
        raise ValueError(f"{path}: is a folder; --input takes text files, --data_dir a prepared set")
    if name != "-" and not path.exists():
        raise FileNotFoundError(f"{path}: no such text file")
    data = sys.stdin.buffer.read() if name == "-" else path.read_bytes()
    where = "standard input" if name == "-" else str(path)
    try:
        characters = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{where}:{line}: is not UTF-8 (byte {data[error.start]:#04x}); save the text as UTF-8"
        ) from None
    if not characters.strip():
        raise ValueError(f"{where}: is empty, expected a text to score")
    return Text(where if name == "-" else path.name, characters=characters)


def _evaluate_one(
    label: str, opened: OpenModel, text: Text, settings: EvaluateSettings, say: Callable[[str], None]
) -> dict[str, Any]:
    """One checkpoint on one text."""
    stream = _tokens(opened, text)
    block_size = settings.block_size if settings.block_size is not None else opened.model.config.block_size
    stride = settings.stride if settings.stride is not None else max(1, block_size // 2)
    began = time.perf_counter()
    with _progress_bar(label, stream, settings.max_tokens) as bar:
        try:
            result = perplexity(
                opened.model,
                stream,
                block_size=block_size,
                stride=stride,
                batch_size=settings.batch_size,
                tokenizer=opened.tokenizer,
                max_tokens=settings.max_tokens,
                progress=bar.update,
            )
        except ValueError as error:
            raise ValueError(f"{opened.path} on {text.name}: {error}") from None
    scored = "answers only" if stream.has_mask else "all tokens"
    for line in log_block(label, text.name, scored, result):
        say(line)
    return {
        "checkpoint": label,
        "path": str(opened.path),
        "step": opened.step,
        "text": text.name,
        "scored": scored,
        "tokens": result.tokens,
        "loss": finite_or_none(result.loss),
        "perplexity": finite_or_none(result.perplexity),
        "bytes": result.bytes,
        "bits_per_byte": finite_or_none(result.bits_per_byte),
        "windows": result.windows,
        "block_size": block_size,
        "stride": stride,
        "protocol": f"{result.protocol}, {scored}",
        "seconds": time.perf_counter() - began,
    }


def log_block(label: str, text: str, scored: str, result: PerplexityResult) -> list[str]:
    """The lines of one evaluation; names and order are fixed, scripts read them."""
    return [
        "***** Running evaluation *****",
        f"  Checkpoint = {label}",
        f"  Text = {text} ({scored})",
        f"  Num examples = {result.windows}",
        f"  Protocol: {result.protocol}",
        f"Eval Loss: {result.loss:.4f}",
        f"Eval Perplexity: {result.perplexity:.4f}",
    ]


def _tokens(opened: OpenModel, text: Text) -> TokenStream:
    """The text as this checkpoint's tokens. Raises ValueError where a prepared set was made with another tokenizer."""
    if text.tokens is None:
        return ArrayTokens(opened.tokenizer.encode_numpy(text.characters or ""))
    theirs, ours = text.tokens.tokenizer_fingerprint, opened.tokenizer.fingerprint
    if theirs != ours:
        found = f"{text.tokens.meta['tokenizer']['kind']} tokenizer {theirs[:12]}"
        raise ValueError(
            f"{text.tokens.folder}: was prepared with the {found}, {opened.path} reads {opened.tokenizer.kind} "
            f"{ours[:12]}; prepare the text again with --tokenizer {opened.path}, or score it with --input"
        )
    return text.tokens


def _progress_bar(label: str, stream: TokenStream, max_tokens: int | None) -> Any:
    """A bar in scored tokens on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    total = stream.n_supervised if isinstance(stream, TokenSet) else stream.n_tokens
    if max_tokens is not None:
        total = min(total, max_tokens)
    return tqdm(total=total, desc=label, unit="token", unit_scale=True, leave=False, disable=None)
