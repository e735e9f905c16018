"""The shell scripts of the guide to LoRA on blocks: the settings that they come to, and one that runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.settings import EvaluateSettings
from tests.pruning_runs import SIZES, prune_command, save_model, write_texts
from tests.tiny import text_set
from training.run_settings import FinetuneSettings
from training.settings import parse

ROOT = Path(__file__).resolve().parent.parent


def spoken(script: str, folder: Path, *words: str, **environment: str) -> list[str]:
    """The words that a script would run Python with, script included."""
    (folder / "data").mkdir(exist_ok=True)
    echo = folder / "echo.sh"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "scripts" / script), *words],
        cwd=folder, env={**os.environ, "PYTHON": str(echo), **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_the_numbers_of_the_guide_are_the_defaults(tmp_path: Path) -> None:
    first, *words = spoken("run_lora_finetune_block.sh", tmp_path, DATA="set")
    settings = parse(FinetuneSettings, words)
    assert first.endswith("finetune_dolly.py") and settings.finetune_method == "lora" and settings.auto_resume
    assert (settings.max_samples, settings.block_size, settings.epochs, settings.max_lr) == (30000, 1024, 1.0, 1e-4)
    assert (settings.lora_r, settings.lora_alpha, settings.lora_target_modules) == (8, 16.0, ("q_proj", "v_proj"))


def test_others_can_be_given(tmp_path: Path) -> None:
    given = {"MODEL": "a b.pt", "MAX_TRAIN_SAMPLES": "1000", "BLOCK_SIZE": "2048", "NUM_EPOCHS": "2", "DATA": "x.jsonl"}
    _, *words = spoken("run_lora_finetune_block.sh", tmp_path, "--lora_r", "16", **given)
    settings = parse(FinetuneSettings, words)
    assert (settings.pretrained_checkpoint, settings.data_dir, settings.lora_r) == ("a b.pt", "x.jsonl", 16)
    assert (settings.max_samples, settings.block_size, settings.epochs) == (1000, 2048, 2.0)


def test_evaluation_measures_base_and_adapter_on_the_same_text(tmp_path: Path) -> None:
    first, *words = spoken("evaluate_lora_block.sh", tmp_path, INPUT="book.txt", OUTPUT_DIR="out")
    settings = parse(EvaluateSettings, words)
    assert first.endswith("evaluate.py") and settings.checkpoints == ("pruned.pt", "out/best.pt")
    assert (settings.input, settings.block_size, settings.stride) == (("book.txt",), 1024, 1024)
    _, *words = spoken("evaluate_lora_block.sh", tmp_path)
    assert parse(EvaluateSettings, words).data_dir == "c4"


@pytest.mark.slow
def test_both_run_on_a_model_pruned_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    text_set(tmp_path / "set", n_documents=80)
    save_model(tmp_path / "model.pt")
    prune_command(capsys, "--method", "wanda", "--pattern", "block", "--block_size", 8, "--out", "pruned.pt")
    how = {"PYTHON": sys.executable, "BLOCK_SIZE": str(SIZES["block_size"]), "MAX_TRAIN_SAMPLES": "20"}
    for script, more in (
        ("run_lora_finetune_block.sh", {"DATA": "set"}),
        ("evaluate_lora_block.sh", {"INPUT": "book.txt"}),
    ):
        environment = {**os.environ, **how, **more}
        command = [str(ROOT / "scripts" / script)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Eval Perplexity: ") == 2
