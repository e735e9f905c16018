"""Whole runs in one process: accumulation, number types, memory savers, over-fitting, and what a run leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from formats.checkpoint import is_full, load_checkpoint
from formats.open_model import open_model
from tests.full_checkpoints import same
from tests.runs import (
    BARE,
    log,
    losses,
    records,
    spied_batches,
    status,
    steps_on_disk,
    train,
    tune,
    weights,
    without_pictures,
)
from tests.tiny import record_set, tiny_preset, train_settings
from training.run_settings import TrainSettings
from training.settings import field_names, parse


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_set(tmp_path_factory.mktemp("data") / "records")


@pytest.fixture(scope="module")
def pretrained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all defaults of the tiny settings."""
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    train(text, folder)
    return folder


# -- one step, however it is split -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "packed", "unpacked"])
def test_accumulation_1_equals_4_in_loss_and_in_sample_order(
    kind: str, text: Path, instructions: Path, pretrained: Path, tmp_path: Path
) -> None:
    """With dropout off. Micro-batches differ in their supervised tokens, so a mean of means would show."""
    seen = {}
    for accumulation in (1, 4):
        folder = tmp_path / str(accumulation)
        changes: dict[str, Any] = {
            "batch_size": 4 // accumulation,
            "total_batch_size": 512,
            "max_steps": 8,
            "max_lr": 1e-2,
            "dropout": 0.0,
            **BARE,
        }
        with spied_batches() as batches:
            if kind == "text":
                train(text, folder, **changes)
            else:
                start = pretrained / "model_00007.pt"
                tune(instructions, folder, start, packing=kind == "packed", **changes)
        assert len(batches) == 8 * accumulation
        rows = [
            (row.tolist(), target.tolist()) for batch in batches for row, target in zip(batch.inputs, batch.targets)
        ]
        seen[accumulation] = ([sample for batch in batches for sample in batch.samples], rows)
        counts = [batch.supervised for batch in batches]
        assert len(set(counts)) > 1 or accumulation == 1
    assert seen[1][0] == seen[4][0] == list(range(32))
    if kind != "unpacked":  # there a row is as wide as its batch needs
        assert seen[1][1] == seen[4][1]
    one, four = losses(tmp_path / "1"), losses(tmp_path / "4")
    assert one == pytest.approx(four, rel=2e-6) and len(set(one)) == 8 and one[0] > one[-1]
    final, other = weights(tmp_path / "1", 7), weights(tmp_path / "4", 7)
    for name in final:
        torch.testing.assert_close(final[name], other[name], rtol=1e-3, atol=1e-4)


def test_recomputing_the_blocks_changes_no_bit(text: Path, pretrained: Path, tmp_path: Path) -> None:
    """With dropout: the second forward pass must draw the same masks."""
    train(text, tmp_path, gradient_checkpointing=True)
    assert losses(tmp_path) == losses(pretrained)
    assert same(dict(weights(tmp_path, 7)), dict(weights(pretrained, 7)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_number_types_learn_the_same_while_weights_stay_fp32(
    dtype: str, text: Path, pretrained: Path, tmp_path: Path
) -> None:
    train(text, tmp_path, dtype=dtype, dropout=0.0)
    exact, reduced = losses(pretrained), losses(tmp_path)
    assert reduced == pytest.approx(exact, rel=1e-2) and reduced != exact
    payload = load_checkpoint(tmp_path / "model_00007.pt")
    assert {tensor.dtype for tensor in payload["model"].values()} == {torch.float32}
    assert bool(payload["scaler"]) == (dtype == "float16"), "the loss is scaled for fp16 only"
    assert f"dtype {dtype}: as asked" in log(tmp_path)


def test_muon_learns_and_goes_on_from_its_checkpoint(text: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(text, whole, optimizer="muon", **BARE)
    train(text, parts, optimizer="muon", **{**BARE, "checkpoint_interval": 3})
    (parts / "model_00006.pt").unlink()
    (parts / "model_00007.pt").unlink()
    train(text, parts, optimizer="muon", auto_resume=True, **BARE)
    assert "Resuming from" in log(parts) and "step 3" in log(parts)
    assert losses(parts) == losses(whole) and losses(whole)[-1] < losses(whole)[0] - 0.5
    assert same(dict(weights(parts, 7)), dict(weights(whole, 7)))


def test_another_optimizer_on_resume_is_an_error(text: Path, pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds the state of adamw, this run uses adamw\+muon: pass the same --optim"):
        train(text, tmp_path, optimizer="muon", resume=True, checkpoint_path=str(pretrained / "model_00003.pt"))


# -- learning --------------------------------------------------------------------------------------------------------


def test_overfitting_is_warned_of(tmp_path: Path, pretrained: Path) -> None:
    few = record_set(tmp_path / "few", n_records=6, seed=3)
    changes = {"max_steps": 60, "max_lr": 3e-2, "dropout": 0.0, "eval_interval": 5, "generate_interval": 0}
    summary = tune(few, tmp_path / "run", pretrained / "model_00007.pt", **changes)
    assert "Warning: Overfitting detected" in log(tmp_path / "run")
    evaluations = [record for record in records(tmp_path / "run") if "val_loss" in record]
    assert summary["loss"] < 0.5 * evaluations[0]["loss"], "it did learn its few records by heart"
    assert summary["best_val_loss"] == min(record["val_loss"] for record in evaluations) < summary["val_loss"]
    best = load_checkpoint(tmp_path / "run" / "best.pt", require_digest=True)
    assert (best["step"], best["val_loss"]) == (summary["best_step"], summary["best_val_loss"])
    assert not is_full(best)
    assert "Overfitting" not in log(pretrained)


def test_the_validation_loss_is_that_of_the_weights_saved(text: Path, pretrained: Path) -> None:
    """Computed here by hand, over every window of the split."""
    from data.shards import open_dataset

    opened = open_model(pretrained / "model_00007.pt")
    stream = open_dataset(text, "val").tokens(0, open_dataset(text, "val").n_tokens)
    total = 0.0
    for start in range(0, len(stream) - 1, 128):
        piece = torch.from_numpy(np.asarray(stream[start : start + 129], dtype=np.int64))[None]
        logits = opened.model(piece[:, :-1])[..., :257]
        total += float(torch.nn.functional.cross_entropy(logits[0].double(), piece[0, 1:], reduction="sum").detach())
    assert opened.val_loss == pytest.approx(total / (len(stream) - 1), rel=1e-5)
    assert records(pretrained)[-1]["val_loss"] == opened.val_loss


# -- what a run leaves -----------------------------------------------------------------------------------------------


def test_files_of_a_finished_run(text: Path, tmp_path: Path) -> None:
    from training.launch import pretrain

    summary = pretrain(train_settings(text, tmp_path))  # with its picture
    assert {file.name for file in tmp_path.iterdir()} == {
        "model_00003.pt", "model_00006.pt", "model_00007.pt", "best.pt",
        "metrics.jsonl", "samples.jsonl", "training.log", "config.yaml", "status.json", "curves.png", "run.html",
        ".lock",
    }  # fmt: skip
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert b"a run</h1>" in (tmp_path / "run.html").read_bytes()
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "finished", "step": 7}
    assert summary["finished"] and summary["step"] == 7 and summary["checkpoint"] == str(tmp_path / "model_00007.pt")


def test_metrics_have_a_line_for_every_step_of_a_short_run(pretrained: Path) -> None:
    lines = records(pretrained)
    assert [line["step"] for line in lines] == list(range(8))
    for line in lines:
        numbers = ("loss", "lr", "grad_norm", "tokens_per_s", "s_per_step", "memory_mb", "epoch")
        assert all(isinstance(line[name], float) and math.isfinite(line[name]) for name in numbers)
        assert line["tokens"] == (line["step"] + 1) * 512
        assert ("val_loss" in line) == (line["step"] in (2, 4, 6, 7))
    assert "val_loss_before" in lines[0] and lines[0]["val_loss_before"] > lines[-1]["val_loss"]
    assert [line["lr"] for line in lines[:3]] == [5e-3, 1e-2, 1e-2] and lines[-1]["lr"] == pytest.approx(1e-3)
    samples = records(pretrained, "samples.jsonl")
    assert [(s["step"], s["prompt"]) for s in samples] == [(4, "the quick"), (7, "the quick")]


def test_the_log_has_the_lines_that_others_look_for(pretrained: Path) -> None:
    text = log(pretrained)
    for part in (
        "Pretraining configuration:",
        "Learning rate: 0.01",
        "Effective batch size: 4 windows = 512 tokens",
        "trainable params: 12,672 || all params: 12,672 || trainable%: 100.0000",
        "***** Running training *****",
        "Total optimization steps = 8",
        "Checked one batch forward: loss ",
        "***** Running evaluation *****",
        "Eval Loss: ",
        "Eval Perplexity: ",
        "Progress: 10% | mean loss: ",
        "Epoch 1 done, mean loss: ",
        "Finished 8 steps",
    ):
        assert part in text, part
    assert text.count("Step ") >= 8


def test_a_checkpoint_holds_plain_values_only(pretrained: Path) -> None:
    """A NumPy scalar among them would be refused by weights_only on the day of the resume."""

    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict):
            assert all(type(key) in (str, int) for key in value)
            return [leaf for item in value.values() for leaf in leaves(item)]
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else [value]

    payload = torch.load(pretrained / "model_00007.pt", weights_only=True)
    kinds = {type(leaf) for leaf in leaves(payload)}
    assert kinds <= {torch.Tensor, int, float, str, bool, type(None)}
    assert type(payload["val_loss"]) is float and type(payload["step"]) is int
    assert {
        "model",
        "optimizer",
        "step",
        "val_loss",
        "train_loader_state",
        "rng",
        "config",
        "tokenizer",
        "settings",
    } <= set(payload)
    assert set(payload["optimizer"]["adamw"]) == set(payload["model"]), "state by name"
    assert len(payload["rng"]) == 1
    assert not is_full(load_checkpoint(pretrained / "best.pt"))


def test_config_yaml_alone_repeats_the_run(text: Path, tmp_path: Path) -> None:
    """Also where --epochs, --warmup_ratio and accumulation were given: they must not conflict with their partners."""
    first, second = tmp_path / "first", tmp_path / "second"
    changes = {"epochs": 0.7, "max_steps": 19073, "warmup_ratio": 0.3, "warmup_steps": 715, "grad_accum_steps": 2}
    train(text, first, total_batch_size=524288, **changes, **BARE)
    tiny_preset()
    again = parse(TrainSettings, ["--config", str(first / "config.yaml"), "--log_dir", str(second)])
    values = yaml.safe_load((first / "config.yaml").read_text())
    assert set(values) == set(field_names(TrainSettings))
    assert values["max_steps"] == again.max_steps == 5 and values["warmup_steps"] == 2

    from training.launch import pretrain

    with without_pictures():
        pretrain(again)
    assert losses(second) == losses(first) and len(losses(first)) == 5
    assert same(dict(weights(second, 4)), dict(weights(first, 4)))


def test_a_second_run_in_the_same_folder_overwrites_nothing(text: Path, tmp_path: Path) -> None:
    train(text, tmp_path, **BARE)
    before = (tmp_path / "model_00007.pt").read_bytes()
    train(text, tmp_path, seed=5, **BARE)
    assert (tmp_path / "earlier-001" / "model_00007.pt").read_bytes() == before
    assert (tmp_path / "model_00007.pt").read_bytes() != before
    assert "held an earlier run: moved to" in log(tmp_path) and len(records(tmp_path)) == 8


def test_a_finished_run_resumed_has_nothing_to_do_and_more_steps_go_on(text: Path, tmp_path: Path) -> None:
    train(text, tmp_path, **BARE)
    before = (tmp_path / "model_00007.pt").read_bytes()
    summary = train(text, tmp_path, auto_resume=True, **BARE)
    assert summary["finished"] and "Nothing to do" in log(tmp_path) and status(tmp_path) == "finished"
    assert (tmp_path / "model_00007.pt").read_bytes() == before and len(records(tmp_path)) == 8
    train(text, tmp_path, auto_resume=True, **{**BARE, "max_steps": 10})
    assert "max_steps: 8 in the checkpoint, now 10" in log(tmp_path)
    assert [record["step"] for record in records(tmp_path)] == list(range(10)) and steps_on_disk(tmp_path) == [7, 9]


def test_a_changed_learning_rate_and_batch_are_differences_not_errors(text: Path, tmp_path: Path) -> None:
    train(text, tmp_path, **{**BARE, "max_steps": 4})
    changes = {"max_lr": 2e-3, "batch_size": 3, "max_steps": 6, "total_batch_size": 524288, "dropout": 0.2}
    train(text, tmp_path, auto_resume=True, **{**BARE, **changes})
    for line in ("max_lr: 0.01 in the checkpoint, now 0.002", "batch_size: 2 in the", "dropout: 0.1 in the"):
        assert line in log(tmp_path)
    assert "a step has 384 tokens, not total_batch_size 512: 3 windows x 128 tokens x 1 processes" in log(tmp_path)
    assert [record["tokens"] for record in records(tmp_path)] == [512, 1024, 1536, 2048, 2432, 2816]
    assert load_checkpoint(tmp_path / "model_00005.pt")["config"]["dropout"] == 0.2


# -- parts of the data -----------------------------------------------------------------------------------------------


def test_max_samples_uses_the_first_ones_only(instructions: Path, pretrained: Path, tmp_path: Path) -> None:
    with spied_batches() as batches:
        tune(instructions, tmp_path, pretrained / "model_00007.pt", max_samples=4, packing=False, **BARE)
    rows = {tuple(row[row != 256].tolist()) for batch in batches for row in batch.inputs}
    assert len(rows) == 4
    assert "4 records" in log(tmp_path)


def test_a_fraction_of_an_epoch_says_its_steps_and_tokens(instructions: Path, pretrained: Path, tmp_path: Path) -> None:
    changes = {"epochs": 0.3, "packing": False, **BARE}
    summary = tune(instructions, tmp_path, pretrained / "model_00007.pt", **changes)
    assert summary["max_steps"] == 7  # 48 records, 2 a step
    assert "--epochs 0.3 = 7 steps = 1,792 tokens" in log(tmp_path)


def test_a_global_batch_of_several_epochs_is_remarked_on(instructions: Path, pretrained: Path, tmp_path: Path) -> None:
    tune(
        instructions, tmp_path, pretrained / "model_00007.pt", max_samples=2, max_steps=1, total_batch_size=1024, **BARE
    )
    assert "one step covers" in log(tmp_path) and "--total_batch_size" in log(tmp_path)


def test_without_a_validation_split_nothing_is_evaluated(tmp_path: Path, text: Path) -> None:
    import shutil

    from data.manifest import read_manifest

    folder = tmp_path / "data"
    shutil.copytree(text, folder)
    meta = read_manifest(folder)
    del meta["splits"]["val"]
    (folder / "dataset.json").write_text(json.dumps(meta))
    summary = train(folder, tmp_path / "run", max_steps=3)
    assert summary["val_loss"] is None and summary["finished"]
    assert "no validation split" in log(tmp_path / "run") and not (tmp_path / "run" / "best.pt").exists()
    assert load_checkpoint(tmp_path / "run" / "model_00002.pt")["val_loss"] is None


def test_a_data_set_without_a_mask_is_trained_on_whole_and_says_so(
    text: Path, pretrained: Path, tmp_path: Path
) -> None:
    summary = tune(text, tmp_path, pretrained / "model_00007.pt", **BARE)
    assert summary["finished"]
    assert "every token" in log(tmp_path)
