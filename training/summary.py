"""What a run says before its first step and after its last."""

from __future__ import annotations

import math

from data.loader import Loader
from model.gpt import GPT
from model.quantize import quantized_bytes
from model.tuning import trainable_line
from training.progress import Progress
from training.run_folder import Say
from training.run_settings import FinetuneSettings, RunSettings
from training.runtime import Runtime
from training.step_plan import StepPlan


def introduce(
    say: Say, settings: RunSettings, plan: StepPlan, loader: Loader, model: GPT, runtime: Runtime, *, has_val: bool
) -> None:
    """The summary at the start: what runs, on what, how long."""
    tuning = isinstance(settings, FinetuneSettings)
    say(f"{'Fine-tuning' if tuning else 'Pretraining'} configuration:")
    rows = {
        "Mode": _mode(settings),
        "Data": loader.describe(),
        "Learning rate": f"{settings.max_lr:g}",
        "Epochs": f"{plan.epochs:.3g}",
        "Samples": f"{plan.windows_per_epoch:,} windows an epoch",
        "Batch size": f"{plan.micro_batch} x {plan.world_size} processes"
        + (f" ({settings.parallel})" if plan.world_size > 1 else ""),
        "Gradient accumulation steps": plan.grad_accum,
        "Effective batch size": f"{plan.windows_per_step} windows = {plan.tokens_per_step:,} tokens",
        "Sequence length": plan.block_size,
        "Gradient clipping": settings.max_grad_norm or "off",
        "Weight decay": settings.weight_decay,
        "LR schedule": f"{settings.lr_schedule}, down to {settings.min_lr_ratio:g} of the peak",
        "Warm-up steps": plan.warmup_steps,
        "Optimizer": settings.optimizer,
        "Dropout": settings.dropout,
        "Device": runtime.device,
    }
    for name, value in rows.items():
        say(f"  {name}: {value}")
    for reason in runtime.reasons:
        say(f"    {reason}")
    say(trainable_line(model))
    held, dense = quantized_bytes(model)
    if held:
        say(f"Quantised base: {held / 1e6:,.1f} MB in place of {dense / 1e6:,.1f} MB in float32")
    for note in _notes(settings, plan, loader, has_val):
        say(note)
    say("***** Running training *****")
    say(f"  Num examples = {plan.windows_per_epoch}")
    say(f"  Num Epochs = {plan.epochs:.3g}")
    say(f"  Total optimization steps = {plan.max_steps}")


def _mode(settings: RunSettings) -> str:
    if not isinstance(settings, FinetuneSettings):
        return f"from scratch, preset {settings.preset}"
    return "full fine-tuning" if settings.finetune_method == "full" else settings.finetune_method


def _notes(settings: RunSettings, plan: StepPlan, loader: Loader, has_val: bool) -> list[str]:
    """What somebody might not expect."""
    notes = []
    if settings.epochs is not None:
        tokens = plan.max_steps * plan.tokens_per_step
        notes.append(f"--epochs {settings.epochs:g} = {plan.max_steps} steps = {tokens:,} tokens")
    if plan.tokens_per_step != settings.total_batch_size and settings.grad_accum_steps is None:
        notes.append(
            f"Note: a step has {plan.tokens_per_step:,} tokens, not total_batch_size {settings.total_batch_size:,}: "
            f"{plan.micro_batch} windows x {plan.block_size} tokens x {plan.world_size} processes do not divide that"
        )
    if plan.steps_per_epoch < 1:
        notes.append(
            f"Note: one step covers {1 / plan.steps_per_epoch:.1f} epochs of this data; lower --total_batch_size"
        )
    if isinstance(settings, FinetuneSettings) and not loader.tokens.has_mask:
        notes.append("Note: the data set has no loss mask, so every token is trained on, prompts too")
    if not has_val:
        notes.append(
            "Note: the data set has no validation split: nothing is evaluated (prepare_data.py --val_fraction 0.05)"
        )
    return notes


def nothing_to_do(plan: StepPlan, progress: Progress) -> str | None:
    """Why a resumed run is over already; None where it is not."""
    if progress.step >= plan.max_steps - 1 and progress.finished_step:
        return f"Nothing to do: step {progress.step} is the last of {plan.max_steps}. More: --max_steps N."
    if progress.out_of_patience(plan.patience):
        return f"Nothing to do: {why_early(plan, progress)}. More: --early_stopping_patience {progress.waited + 1}."
    return None


def why_early(plan: StepPlan, progress: Progress) -> str:
    """The reason of early stopping."""
    loss = "finite validation loss"
    if progress.patience_loss is not None:
        loss = f"validation loss more than {plan.patience_threshold:g} below {progress.patience_loss:.4f}"
    return f"Stopped early after step {progress.step}: no {loss} in {progress.waited} evaluations"


def outcome(progress: Progress, per_token: bool = True) -> str:
    """How the losses ended, in words; `per_token`: they are means over tokens, so that they have a perplexity."""
    loss = progress.last_record.get("loss")
    parts = [] if loss is None else [f"training loss {loss:.4f}"]
    if progress.val_loss is not None:
        perplexity = f" (perplexity {math.exp(min(progress.val_loss, 700)):.2f})" if per_token else ""
        parts.append(f"validation loss {progress.val_loss:.4f}{perplexity}")
    if progress.val_loss_before is not None:
        parts.append(f"before {progress.val_loss_before:.4f}")
    if progress.best_step is not None:
        parts.append(f"best {progress.best_val_loss:.4f} at step {progress.best_step}")
    return ", ".join(parts)
