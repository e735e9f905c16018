"""What the tests of prune.py share: a tiny Llama, texts, and the command in this process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from data.templates import TEMPLATES
from data.tokenizer import ByteTokenizer
from formats.checkpoint import load_checkpoint, save_checkpoint
from model.config import PRESETS, GPTConfig
from model.gpt import GPT
from prune import main
from pruning.settings import PruneSettings
from tests.scripts import run_main
from tests.tiny import sentence, text_set

SIZES = {"vocab_size": 257, "padded_vocab_size": 384, "block_size": 64, "n_layer": 3}
SIZES |= {"n_head": 4, "n_kv_head": 2, "head_dim": 8, "n_embd": 32, "mlp_dim": 48}
LLAMA = dataclasses.replace(PRESETS["llama-tiny"], **SIZES)
GPT2 = dataclasses.replace(PRESETS["tiny"], **{**SIZES, "n_kv_head": 4})
# Small windows, so that little text is enough; no speed, which takes processes of its own.
SMALL = ("--importance_samples", 4, "--importance_seq_len", 32, "--gradient_samples", 2, "--eval_seq_len", 32)
SMALL = (*SMALL, "--eval_samples", 4, "--speed_runs", 0, "--device", "cpu")
RECOVER = ("--finetune", "--finetune_samples", 8, "--finetune_seq_len", 32, "--finetune_grad_accum", 2)


def save_model(path: Path, config: GPTConfig = LLAMA, seed: int = 0, **more: Any) -> Path:
    """A checkpoint of random weights, large enough that the predictions depend on the context."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    about = {"tokenizer": ByteTokenizer().spec(), "template": TEMPLATES["dolly"].spec(), **more}
    save_checkpoint(path, {"model": model.state_dict(), "config": config.to_dict(), **about})
    return path


def write_texts(folder: Path) -> None:
    """book.txt, 6,000 characters, and other.txt of other sentences; docs.jsonl with "text"."""
    rng = np.random.default_rng(0)
    for name in ("book", "other"):
        (folder / f"{name}.txt").write_text("".join(sentence(rng, 12) + ".\n" for _ in range(100)), "utf-8")
    lines = [f'{{"text": "{sentence(rng, 12)}"}}\n' for _ in range(50)]
    (folder / "docs.jsonl").write_text("".join(lines), "utf-8")


def working_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, config: GPTConfig = LLAMA, documents: int = 0
) -> Path:
    """`folder`, from now on the working directory, with model.pt, texts, and a set of so many documents."""
    monkeypatch.chdir(folder)
    write_texts(folder)
    if documents:
        text_set(folder / "set", n_documents=documents)
    return save_model(folder / "model.pt", config).parent


def prune_command(capsys: Any, *words: object, base: str = "model.pt", small: bool = True) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of prune.py with texts of `write_texts` in the working directory."""
    texts = ("--calibration", "book.txt", "--eval_text", "other.txt") if small else ()
    with mock.patch("report.curves.plot_curves", lambda folder: folder / "curves.png"):  # half of a tiny run's time
        return run_main(
            capsys, main, PruneSettings, "--base_model", base, *(SMALL if small else ()), *texts, *map(str, words)
        )


def weights_of(path: Path | str) -> dict[str, torch.Tensor]:
    """Of a checkpoint, by name."""
    model: dict[str, torch.Tensor] = load_checkpoint(path)["model"]
    return model
