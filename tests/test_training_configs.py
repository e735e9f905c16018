"""Every file in configs/ is one that its script takes, with the values that it is known for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from data.settings import PrepareSettings
from pruning.settings import PruneSettings
from pruning.settings import check as check_pruning
from training.run_settings import FinetuneSettings, TrainSettings
from training.search_settings import Choices, SearchSettings, Space, read_space
from training.settings import from_words, parse
from training.step_plan import check_settings, plan_steps

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SCRIPTS: dict[str, Any] = {"prepare_data.py": PrepareSettings, "train_gpt2.py": TrainSettings}
SCRIPTS |= {"finetune_dolly.py": FinetuneSettings, "prune.py": PruneSettings, "tune.py": SearchSettings}
EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RECOVERY = {"block_size": 512, "batch_size": 1, "max_grad_norm": 1.0, "lr_schedule": "linear", "min_lr_ratio": 0.0}
PRUNE = {"method": "structured", "pruning_ratio": 0.25, "prune_mlp": True, "finetune_method": "full"}
PRUNE |= {"save_model": True, "test_after_prune": True, "finetune": True, "finetune_seq_len": 512}

# Published advice, number by number.
KNOWN: dict[str, dict[str, Any]] = {
    "lora_unified": {
        "finetune_method": "lora", "lora_r": 16, "lora_alpha": 32.0, "lora_target_modules": EVERYTHING,
        "lora_dropout": 0.05, "epochs": 5.0, "batch_size": 4, "grad_accum_steps": 4, "max_lr": 2e-4,
        "warmup_ratio": 0.1, "dtype": "float16", "gradient_checkpointing": True, "log_interval": 10,
        "checkpoint_interval": 100, "eval_interval": 100, "keep_last_n_checkpoints": 3, "load_best_model_at_end": True,
        "lr_schedule": "cosine", "min_lr_ratio": 0.0, "weight_decay": 0.01, "block_size": 256, "beta2": 0.999,
    },
    "lora_columns": {
        "finetune_method": "lora", "lora_r": 32, "lora_alpha": 64.0, "lora_target_modules": EVERYTHING,
        "lora_dropout": 0.05, "epochs": 8.0, "batch_size": 4, "grad_accum_steps": 4, "max_lr": 1e-4,
        "warmup_ratio": 0.1, "dtype": "float16", "gradient_checkpointing": True, "block_size": 512,
        "lr_schedule": "cosine", "min_lr_ratio": 0.0, "load_best_model_at_end": True,
    },
    "recovery_standard": {
        **RECOVERY, "finetune_method": "full", "max_lr": 1e-5, "epochs": 2.0, "max_samples": 1000,
        "grad_accum_steps": 4, "weight_decay": 0.01, "warmup_steps": 50,
    },
    "recovery_aggressive": {
        **RECOVERY, "finetune_method": "full", "max_lr": 2e-5, "epochs": 3.0, "max_samples": 2000,
        "grad_accum_steps": 8, "weight_decay": 0.02, "warmup_steps": 100,
    },
    "recovery_lora": {
        **RECOVERY, "finetune_method": "lora", "max_lr": 2e-4, "epochs": 3.0, "max_samples": 1500,
        "grad_accum_steps": 8, "lora_r": 8, "lora_alpha": 16.0, "lora_dropout": 0.05, "warmup_steps": 0,
    },
    "recovery_quick": {
        **RECOVERY, "finetune_method": "full", "max_lr": 1e-5, "epochs": 1.0, "max_samples": 100,
        "grad_accum_steps": 2, "weight_decay": 0.01, "warmup_steps": 0,
    },
    "recovery_stage1": {
        **RECOVERY, "finetune_method": "full", "max_lr": 2e-5, "epochs": 2.0, "max_samples": 1000,
        "load_best_model_at_end": True,
    },
    "recovery_stage2": {
        **RECOVERY, "finetune_method": "full", "max_lr": 5e-6, "epochs": 2.0, "max_samples": 1000,
        "weight_decay": 0.02,
    },
    "lora_block": {
        "data_dir": "c4", "finetune_method": "lora", "lora_r": 8, "lora_alpha": 16.0, "lora_dropout": 0.05,
        "lora_target_modules": ("q_proj", "v_proj"), "epochs": 1.0, "block_size": 1024, "max_samples": 30000,
        "max_lr": 1e-4, "batch_size": 1, "grad_accum_steps": 1, "max_eval_samples": 128,
    },
    "prune_standard": {
        **PRUNE, "finetune_lr": 1e-5, "finetune_epochs": 2.0, "finetune_samples": 1000, "finetune_warmup_steps": 50,
        "finetune_grad_accum": 4, "finetune_weight_decay": 0.01, "finetune_max_grad_norm": 1.0,
    },
    "prune_aggressive": {
        **PRUNE, "pruning_ratio": 0.3, "finetune_lr": 2e-5, "finetune_epochs": 3.0, "finetune_samples": 2000,
        "finetune_grad_accum": 8, "finetune_warmup_steps": 100, "finetune_weight_decay": 0.02,
    },
    "prune_lora": {
        **PRUNE, "finetune_method": "lora", "finetune_lr": 2e-4, "finetune_epochs": 3.0, "finetune_samples": 1500,
        "finetune_grad_accum": 8, "lora_r": 8, "lora_alpha": 16.0, "lora_dropout": 0.05,
    },
    "prune_quick": {
        **PRUNE, "prune_mlp": False, "importance_samples": 20, "layer_start": 10, "layer_end": 15,
        "finetune_samples": 100, "finetune_epochs": 1.0, "finetune_batch_size": 1, "finetune_grad_accum": 2,
    },
}  # fmt: skip


def a_trial_of(space: Space) -> FinetuneSettings:
    """The first of each list, the lower end of each range."""
    drawn = {
        name: values.plain()[0] if isinstance(values, Choices) else values.low for name, values in space.ranges.items()
    }
    return from_words(FinetuneSettings, space.words(drawn))


def settings_of(path: Path) -> Any:
    cls: Any = TrainSettings if "pretrain" in path.stem else FinetuneSettings
    if path.stem.startswith("search_"):
        return a_trial_of(read_space(str(path)))
    cls = PruneSettings if path.stem.startswith("prune_") else cls
    return parse(cls, ["--config", str(path)])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_is_taken_and_its_settings_go_together(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(path)
    if isinstance(settings, PruneSettings):
        check_pruning(settings)
    else:
        check_settings(settings)
        plan_steps(settings, settings.block_size, windows_per_epoch=settings.max_samples or 1000, world_size=1)
    if path.stem.startswith("search_"):
        return
    with pytest.raises(SystemExit) as stop:
        parse(type(settings), ["--config", str(path), "--print_config"])
    assert stop.value.code == 0 and "_lr: " in capsys.readouterr().out


@pytest.mark.parametrize("name", KNOWN)
def test_a_file_says_what_it_is_known_for(name: str) -> None:
    settings = settings_of(ROOT / "configs" / f"{name}.yaml")
    assert {key: getattr(settings, key) for key in KNOWN[name]} == KNOWN[name]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_begins_with_what_it_is_and_commands_that_parse(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert lines[0].startswith("# ") and not lines[0].startswith("# python")
    commands = [shlex.split(line[2:]) for line in lines if re.match(r"# python \w+\.py", line)]
    assert any("--config" in words and f"configs/{path.name}" in words for words in commands)
    for _, script, *words in commands:
        if script == "export.py":
            continue
        parse(SCRIPTS[script], [str(ROOT / word) if word.startswith("configs/") else word for word in words])


def test_the_second_stage_starts_from_the_first() -> None:
    first, second = (settings_of(ROOT / "configs" / f"recovery_stage{n}.yaml") for n in (1, 2))
    assert isinstance(second, FinetuneSettings) and first.load_best_model_at_end
    assert second.pretrained_checkpoint == f"{first.log_dir}/final.pt"
