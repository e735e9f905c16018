"""A run that was interrupted and went on equals one that was not, to the last bit, in everything that it leaves.

That is weights, optimizer, loss scaler, random states, data cursor, every line of metrics.jsonl but the clocks, and
samples.jsonl. Each life is a process of its own, so nothing in memory can help.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from formats.checkpoint import load_checkpoint
from tests.lives import (
    Run,
    Strike,
    checkpoint_differences,
    differences,
    finetuning,
    pretraining,
    records,
    uninterrupted,
)

LETTERS = f"{Path(__file__).with_name('reward_functions.py')}:letters"
# 6.5 steps an epoch in pretraining and 5.75 in fine-tuning: 8 steps cross an epoch's end in the middle of a step.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", {}),
    "pretrain-muon": ("pretrain", {"optimizer": "muon"}),
    "pretrain-without-accumulation": ("pretrain", {"grad_accum_steps": 1, "total_batch_size": 524288}),
    "pretrain-fp16-with-loss-scaler": ("pretrain", {"dtype": "float16"}),
    "pretrain-llama-checkpointed": ("pretrain", {"preset": "test-llama", "gradient_checkpointing": True}),
    "finetune": ("finetune", {}),
    "finetune-muon": ("finetune", {"optimizer": "muon"}),
    "finetune-lora": ("finetune", {"finetune_method": "lora", "lora_r": 4, "lora_plus_ratio": 4.0}),
    "finetune-qlora": ("finetune", {"finetune_method": "qlora", "lora_target_modules": ("all-linear",)}),
    "finetune-progressive": ("finetune", {"finetune_method": "progressive", "unfreeze_stages": 3}),
    "finetune-adapter": ("finetune", {"finetune_method": "adapter", "adapter_dim": 8}),
    "finetune-p-tuning": (
        "finetune",
        {"finetune_method": "p_tuning", "prefix_length": 8, "block_size": 120, "total_batch_size": 480},
    ),
    "dpo-lora": ("finetune", {"objective": "dpo", "finetune_method": "lora", "max_lr": 1e-2}),
    "dpo-full": ("finetune", {"objective": "dpo", "gradient_checkpointing": True}),
    "grpo-full": (
        "finetune",
        {"objective": "grpo", "reward": LETTERS, "grpo_group": 3, "grpo_epochs": 2, "grpo_max_new_tokens": 8},
    ),
    "finetune-unpacked": ("finetune", {"packing": False, "total_batch_size": 1024}),
}
STEPS = 8


def make_run(case: str, folder: Path, **more: Any) -> Run:
    kind, changes = CASES[case]
    if kind == "pretrain":
        return pretraining(folder, **{**changes, **more})
    return finetuning(folder, **{"max_steps": STEPS, "total_batch_size": 512, **changes, **more})


@pytest.mark.parametrize("case", CASES)
def test_a_run_in_four_lives_equals_a_run_in_one(case: str, tmp_path: Path) -> None:
    run = make_run(case, tmp_path / "run", keep_last_n_checkpoints=2)
    stopped = run.live(Strike("step 1@1", signal=signal.SIGTERM))  # saves step 1 as it was at its end
    killed = run.live(Strike("step 5@5"))  # goes back to the last checkpoint before
    late = run.live(Strike("micro 6:*", signal=signal.SIGINT))
    last = run.live()
    assert [life.code for life in run.lives] == [0, -signal.SIGKILL, 0, 0], last.describe()
    begun = [life.began_after for life in (stopped, killed, late, last)]
    assert begun == [-1, 1, 3 if run.kind == "pretrain" else 4, late.steps[-1]]
    assert run.toll.redone >= 1

    whole = uninterrupted(run)
    assert not differences(run.folder, whole.folder)
    assert [record["step"] for record in records(run.folder)] == list(range(STEPS))
    assert run.files() == whole.files() - {f"model_{step:05d}.pt" for step in whole.steps_on_disk()[:-2]}
    assert run.status() == whole.status()


@pytest.mark.parametrize("case", ["pretrain", "finetune"])
def test_the_comparison_runs_on_something_that_moves(case: str, tmp_path: Path) -> None:
    whole = uninterrupted(make_run(case, tmp_path / "unused", keep_last_n_checkpoints=2))
    final = load_checkpoint(whole.checkpoint(STEPS - 1))
    assert final["settings"]["dropout"] > 0
    loader = final["train_loader_state"]
    windows_per_step = loader["sample"] // STEPS
    assert loader["sample"] > loader["windows"] and loader["windows"] % windows_per_step, "no epoch ends within a step"
    losses = [record["loss"] for record in records(whole.folder)]
    assert len(set(losses)) == STEPS and records(whole.folder, "samples.jsonl")
    assert (whole.folder / "best.pt").exists()
    other_seed = make_run(case, tmp_path / "seed", keep_last_n_checkpoints=2, seed=2)
    assert other_seed.live().code == 0
    found = differences(other_seed.folder, whole.folder)
    for part in ("model.", "optimizer.", "rng.", "progress.", "metrics.jsonl"):
        assert any(part in difference for difference in found), part


@pytest.mark.parametrize(
    ("case", "broken", "seen_in"),
    [
        ("pretrain", "rng", ["rng.0.torch", "rng.0.numpy", "rng.0.python", "model.wte.weight", "metrics.jsonl"]),
        ("finetune", "rng", ["rng.0.torch", "model.wte.weight", "metrics.jsonl"]),
        ("pretrain", "loader", ["train_loader_state.sample", "model.wte.weight", "metrics.jsonl"]),
        ("finetune", "loader", ["train_loader_state.sample", "model.wte.weight", "metrics.jsonl"]),
        ("pretrain", "optimizer", ["optimizer.adamw.wte.weight.exp_avg", "model.wte.weight", "metrics.jsonl"]),
        ("pretrain-muon", "optimizer", ["optimizer.muon.h.0.attn.q_proj.weight.momentum_buffer", "metrics.jsonl"]),
        ("pretrain-fp16-with-loss-scaler", "scaler", ["scaler._growth_tracker"]),
        ("pretrain", "progress", ["progress.tokens", "progress.epoch_loss"]),
    ],
)
def test_the_comparison_notices_what_is_not_restored(
    case: str, broken: str, seen_in: list[str], tmp_path: Path
) -> None:
    run = make_run(case, tmp_path / "run", keep_last_n_checkpoints=2)
    run.live(Strike("micro 5:*", signal=signal.SIGTERM))
    last = run.live(sabotage=[broken])
    assert last.code == 0 and last.began_after == 4, last.describe()
    found = differences(run.folder, uninterrupted(run).folder)
    for part in seen_in:
        assert any(part in difference for difference in found), f"{part} does not differ"


def test_resuming_from_an_older_checkpoint_sets_the_later_ones_aside(tmp_path: Path) -> None:
    run = pretraining(tmp_path / "run")
    assert run.live().code == 0
    assert run.steps_on_disk() == [3, 6, 7]
    life = run.live(auto_resume=False, resume=True, checkpoint_path=str(run.checkpoint(3)))
    assert life.code == 0 and life.began_after == 3 and life.steps == [4, 5, 6, 7], life.describe()
    assert not differences(run.folder, uninterrupted(run).folder)
    aside = sorted(file.name for file in (run.folder / "earlier-001").iterdir())
    assert aside == ["best.pt", "model_00006.pt", "model_00007.pt"], "the best of step 7 belongs to the course it left"
    for step in (6, 7):
        assert not checkpoint_differences(run.folder / "earlier-001" / f"model_{step:05d}.pt", run.checkpoint(step))


def test_a_kill_after_going_back_to_an_older_checkpoint_does_not_bring_the_later_ones_back(tmp_path: Path) -> None:
    run = pretraining(tmp_path / "run")
    assert run.live().code == 0
    killed = run.live(Strike("step 4@4"), auto_resume=False, resume=True, checkpoint_path=str(run.checkpoint(3)))
    assert killed.killed and run.steps_on_disk() == [3]
    last = run.live()
    assert last.code == 0 and last.began_after == 3
    assert not differences(run.folder, uninterrupted(run).folder)


def test_resuming_into_another_folder_leaves_the_first_alone(tmp_path: Path) -> None:
    first, second = pretraining(tmp_path / "first"), pretraining(tmp_path / "second")
    first.live(Strike("micro 5:*", signal=signal.SIGTERM))
    before = {file: file.read_bytes() for file in first.folder.iterdir()}
    life = second.live(auto_resume=False, resume=True, checkpoint_path=str(first.checkpoint(4)))
    assert life.code == 0 and life.steps == [5, 6, 7], life.describe()
    assert {file: file.read_bytes() for file in first.folder.iterdir()} == before
    whole = uninterrupted(first)
    assert not checkpoint_differences(second.checkpoint(7), whole.checkpoint(7))
    assert records(second.folder) == records(whole.folder)[5:]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path: Path) -> None:
    run = pretraining(tmp_path / "run")
    run.live(Strike("micro 7:*"))
    assert run.steps_on_disk() == [3, 6]
    content = bytearray(run.checkpoint(6).read_bytes())
    content[len(content) // 2] ^= 1
    run.checkpoint(6).write_bytes(content)
    life = run.live()
    assert life.code == 0 and life.began_after == 3, life.describe()
    assert "model_00006.pt: is damaged" in life.log.read_text()
    assert not differences(run.folder, uninterrupted(run).folder)


def test_more_steps_go_on_after_a_finished_run(tmp_path: Path) -> None:
    # The schedule must not know its end: with `constant`, 4 + 4 steps are 8 steps, but for the evaluation at step 3.
    run = pretraining(tmp_path / "run", lr_schedule="constant")
    assert run.live(max_steps=4).summary["finished"]
    assert "Nothing to do" in run.live(max_steps=4).log.read_text()
    life = run.live()
    assert life.code == 0 and life.steps == [4, 5, 6, 7]
    left, right = (json.loads(json.dumps(records(folder))) for folder in (run.folder, uninterrupted(run).folder))
    assert "val_loss" in left[3] and "val_loss" not in right[3]
    left[3].pop("val_loss")
    assert left == right
    found = differences(run.folder, uninterrupted(run).folder)
    assert not [difference for difference in found if ": model." in difference or ": optimizer." in difference]
