"""The names that other projects' scripts and configs use, for flags and YAML keys alike. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

# Their name -> ours, with the same values.
ALIASES: dict[str, str] = {
    "model_name_or_path": "pretrained_checkpoint",
    "base_model": "pretrained_checkpoint",
    "dataset_name": "data_dir",
    "output_dir": "log_dir",
    "num_train_epochs": "epochs",
    "max_train_samples": "max_samples",
    "learning_rate": "max_lr",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "grad_accum_steps",
    "lr_scheduler_type": "lr_schedule",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps",
    "logging_steps": "log_interval",
    "save_steps": "checkpoint_interval",
    "eval_steps": "eval_interval",
    "save_total_limit": "keep_last_n_checkpoints",
    "max_length": "block_size",
    "max_seq_length": "block_size",
    "target_modules": "lora_target_modules",
    "finetune_lr": "max_lr",
    "finetune_epochs": "epochs",
    "finetune_samples": "max_samples",
    "finetune_batch_size": "batch_size",
    "finetune_seq_len": "block_size",
    "finetune_grad_accum": "grad_accum_steps",
    "finetune_max_grad_norm": "max_grad_norm",
    "finetune_weight_decay": "weight_decay",
    "finetune_warmup_steps": "warmup_steps",
    "on_nonfinite": "nan_policy",  # as checkpoints and config.yaml files of before have it
}


@dataclass(frozen=True)
class Choice:
    """A name whose values mean something else here: for each the value of `setting`, or None where it is so anyway."""

    setting: str
    values: dict[str, str | None]
    why: str  # no other value will do


CHOICES: dict[str, Choice] = {
    "fp16": Choice("dtype", {"true": "float16", "false": None}, "expected true or false"),
    "bf16": Choice("dtype", {"true": "bfloat16", "false": None}, "expected true or false"),
    "bias": Choice("lora_r", {"none": None}, "LoRA trains no biases here, so only `none` will do"),
    "task_type": Choice("lora_r", {"causal_lm": None}, "models here predict the next token, so only CAUSAL_LM will do"),
    "metric_for_best_model": Choice(
        "load_best_model_at_end",
        {"eval_loss": None, "loss": None},
        "the best weights are those with the lowest validation loss, so only eval_loss will do",
    ),
    "greater_is_better": Choice(
        "load_best_model_at_end", {"false": None}, "of two losses the lower is better, so only false will do"
    ),
}

# Sections of a YAML file, with the keys that have a name of their own there; all other names mean what they do outside.
SECTIONS: dict[str, dict[str, str]] = {
    "lora": {"r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
    "training": {},
    "model": {},
    "data": {},
}

# What a section says by being there, for settings that the file does not name itself: `training:` follows the habit of
# those who write it that a cosine ends at 0.
IMPLIED: dict[str, dict[str, str]] = {
    "lora": {"finetune_method": "lora"},
    "training": {"min_lr_ratio": "0"},
}
