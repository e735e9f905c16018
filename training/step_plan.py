"""From settings to steps: how the global batch is split, how long the run is, when what happens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from training.run_settings import METHOD_FLAGS, OBJECTIVE_FLAGS, FinetuneSettings, RunSettings
from training.schedule import Schedule
from training.settings import is_explicit, is_flag, to_dict

R = TypeVar("R", bound=RunSettings)


@dataclass(frozen=True)
class StepPlan:
    """All that the loop needs to know about steps. Intervals in steps; 0 = never (the last step counts besides)."""

    micro_batch: int  # windows of one micro-batch of one process
    grad_accum: int
    world_size: int
    block_size: int
    windows_per_epoch: int
    max_steps: int
    warmup_steps: int
    schedule: Schedule
    eval_every: int
    generate_every: int
    checkpoint_every: int
    log_every: int
    patience: int = 0  # evaluations without a better validation loss before the run ends; 0 = never
    patience_threshold: float = 0.0  # by how much it must be lower to be better

    @property
    def windows_per_step(self) -> int:
        return self.micro_batch * self.grad_accum * self.world_size

    @property
    def tokens_per_step(self) -> int:
        return self.windows_per_step * self.block_size

    @property
    def steps_per_epoch(self) -> float:
        return self.windows_per_epoch / self.windows_per_step

    @property
    def epochs(self) -> float:
        return self.max_steps / self.steps_per_epoch

    def is_last(self, step: int) -> bool:
        return step == self.max_steps - 1

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return self.due(self.checkpoint_every, step)

    def due(self, every: int, step: int) -> bool:
        """Whether an interval ends at this step."""
        return self.is_last(step) or (every > 0 and step > 0 and step % every == 0)


def plan_steps(
    settings: RunSettings, block_size: int, windows_per_epoch: int, world_size: int, kept: int | None = None
) -> StepPlan:
    """Settle the batch split and the length of the run. Raises ValueError where explicit settings conflict.

    kept: windows that a step of the run has had so far, and is to have on these processes too (see `kept_windows`).
    """
    check_settings(settings)
    if kept is None:
        grad_accum = _accumulation(settings, block_size, world_size)
    else:
        grad_accum = _shared_out(kept, settings.batch_size, world_size)
    if settings.exact:
        _check_halves(grad_accum * world_size, world_size, tokens=settings.batch_size * block_size)
    windows_per_step = settings.batch_size * grad_accum * world_size
    steps_per_epoch = windows_per_epoch / windows_per_step
    max_steps = settings.max_steps
    if settings.epochs is not None:
        if not 0 < settings.epochs < math.inf:
            raise ValueError(f"--epochs {settings.epochs}: expected more than 0")
        max_steps = max(1, round(settings.epochs * steps_per_epoch))
    warmup = _warmup(settings, max_steps)
    shape, ratio, decay = settings.lr_schedule, settings.min_lr_ratio, settings.decay_ratio
    schedule = Schedule(shape, settings.max_lr, ratio, warmup, max_steps, decay)

    def interval(name: str) -> int:
        value = getattr(settings, name)
        if value == "epoch":
            return max(1, round(steps_per_epoch))
        if value < 0:
            raise ValueError(f"--{name} {value}: expected at least 0, or `epoch`")
        return int(value)

    return StepPlan(
        micro_batch=settings.batch_size,
        grad_accum=grad_accum,
        world_size=world_size,
        block_size=block_size,
        windows_per_epoch=windows_per_epoch,
        max_steps=max_steps,
        warmup_steps=warmup,
        schedule=schedule,
        eval_every=interval("eval_interval"),
        generate_every=interval("generate_interval"),
        checkpoint_every=interval("checkpoint_interval"),
        log_every=settings.log_interval or (1 if max_steps <= 200 else 10),
        patience=_patience(settings),
        patience_threshold=0.01 if settings.early_stopping_threshold is None else settings.early_stopping_threshold,
    )


def _patience(settings: RunSettings) -> int:
    if settings.early_stopping_patience is not None:
        return settings.early_stopping_patience
    return 0 if settings.early_stopping_threshold is None else 3


def check_settings(settings: RunSettings) -> None:
    """Raises ValueError for settings that conflict, and for the first number that makes no sense."""
    _refuse_conflicts(settings)
    if isinstance(settings, FinetuneSettings):
        _refuse_idle_flags(settings)
    whole = ("batch_size", "block_size", "total_batch_size", "max_steps", "sample_tokens")
    for name in (*whole, "grad_accum_steps", "log_interval", "eval_batch_size", "max_samples"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    for name in ("max_eval_samples", "keep_last_n_checkpoints", "spike_guard", "max_grad_norm", "weight_decay", "eps"):
        if not getattr(settings, name) >= 0:  # NaN too
            raise ValueError(f"--{name} {getattr(settings, name)}: expected at least 0")
    for name in ("early_stopping_patience", "early_stopping_threshold"):
        value = getattr(settings, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name} {value}: expected at least 0")
    if _patience(settings) and settings.eval_interval == 0:
        raise ValueError("early stopping needs evaluations on the way: set --eval_interval")
    if settings.spike_guard and settings.checkpoint_interval == 0:
        raise ValueError("--spike_guard goes back to a checkpoint: set --checkpoint_interval")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"--{name} {getattr(settings, name)}: expected at least 0 and less than 1")


def refuse_without_validation(settings: RunSettings, folder: Path) -> None:
    """Raises ValueError for settings that look at validation losses, where the data set in `folder` gives none."""
    wish = "--load_best_model_at_end" if settings.load_best_model_at_end else "early stopping"
    if settings.load_best_model_at_end or _patience(settings):
        raise ValueError(f"{wish}: {folder} has no validation split (prepare_data.py --val_fraction 0.05)")


def _refuse_conflicts(settings: RunSettings) -> None:
    """Two explicit settings that say the same thing differently are an error: neither is obviously the one meant."""
    for one, other in settings.STANDS_FOR.items():
        if is_explicit(settings, one) and getattr(settings, one) is not None and is_explicit(settings, other):
            raise ValueError(f"--{one} and --{other} are both set: give one of them")
    if settings.exact and settings.compile == "on":
        raise ValueError("--exact: compiled code depends on the shapes that a process met before; no --compile on")
    if settings.exact and settings.parallel == "fsdp":
        raise ValueError("--exact: --parallel fsdp adds gradients in an order of its own: use ddp or zero1")


def _refuse_idle_flags(settings: FinetuneSettings) -> None:
    """A setting of another method or objective than the run's would do nothing: `--lora_r 16` without LoRA."""
    given, defaults = to_dict(settings), to_dict(FinetuneSettings())
    for choice, table in (("finetune_method", METHOD_FLAGS), ("objective", OBJECTIVE_FLAGS)):
        own = table[given[choice]]
        for name in (flag for flags in table.values() for flag in flags if flag not in own):
            changed = is_explicit(settings, name) and given[name] != defaults[name]
            if changed or is_flag(settings, name):
                users = " or ".join(user for user, flags in table.items() if name in flags)
                raise ValueError(
                    f"--{name} {given[name]} does nothing with --{choice} {given[choice]}: it is for {users}"
                )


def _accumulation(settings: RunSettings, block_size: int, world_size: int) -> int:
    """Micro-batches of a step, from the global batch in tokens unless given."""
    if settings.grad_accum_steps is not None:
        return settings.grad_accum_steps
    per_micro_step = settings.batch_size * block_size * world_size
    count, rest = divmod(settings.total_batch_size, per_micro_step)
    if is_explicit(settings, "total_batch_size") and (rest or count == 0):
        low, high = max(count, 1) * per_micro_step, (count + 1) * per_micro_step
        raise ValueError(
            f"--total_batch_size {settings.total_batch_size}: not a multiple of batch_size {settings.batch_size} x "
            f"block_size {block_size} x {world_size} processes = {per_micro_step}; nearest: {low} or {high}"
        )
    return max(1, count)


def fitted_block_size(
    settings: RunSettings, limit: int, context: int, new_tokens: int, say: Callable[[str], None]
) -> int:
    """Tokens of a window in a model with room for a text of `limit`; virtual tokens take the rest of its `context`.

    Raises ValueError for an explicit one that is too long, and where `new_tokens` to be generated leave no prompt.
    """
    block_size = settings.block_size
    if block_size > limit:
        if is_explicit(settings, "block_size"):
            beside = f", beside {context - limit} virtual tokens" if context > limit else ""
            raise ValueError(f"--block_size {block_size}: the model's context is {limit} tokens{beside}")
        say(f"block_size {limit}: the model's context")
        block_size = limit
    if new_tokens >= block_size:
        raise ValueError(
            f"--grpo_max_new_tokens {new_tokens}: leaves no room for a prompt in {block_size} tokens of context; "
            "give fewer"
        )
    return block_size


def kept_windows(settings: RunSettings, state: Mapping[str, Any] | None, world_size: int) -> int | None:
    """Windows of a step that a resumed run keeps, from its checkpoint; None: its flags are to say anew.

    A job that comes back on another number of processes repeats its flags, and those that speak of one process would
    then mean another global batch. So they count as given anew only where they differ from the checkpoint's. Another
    batch_size shares out the same windows, where it can.
    """
    windows = state["progress"].get("windows_per_step") if state is not None else None
    if state is None or windows is None:  # not in files of before it was kept
        return None
    names = ("batch_size", "grad_accum_steps", *(() if settings.grad_accum_steps else ("total_batch_size",)))
    anew = [name for name in names if state.get("settings", {}).get(name) != getattr(settings, name)]
    can_share = windows % (settings.batch_size * world_size) == 0
    return windows if not anew or (anew == ["batch_size"] and can_share) else None


def note_batch(plan: StepPlan, state: Mapping[str, Any] | None, say: Callable[[str], None]) -> None:
    """Say how a resumed run shares out its steps, where that is not as in the checkpoint."""
    if state is None or (windows := state["progress"].get("windows_per_step")) is None:
        return
    processes = len(state["rng"])
    if windows != plan.windows_per_step:
        say(f"  windows of a step: {windows} in the checkpoint, now {plan.windows_per_step}")
    elif processes != plan.world_size:
        say(
            f"  processes: {processes} in the checkpoint, now {plan.world_size}: a step keeps its {windows} windows, "
            f"{plan.grad_accum} micro-batches of {plan.micro_batch} in each"
        )


def _shared_out(windows: int, batch_size: int, world_size: int) -> int:
    """Micro-batches of a step of so many windows."""
    count, rest = divmod(windows, batch_size * world_size)
    if not rest:
        return count
    share, rest = divmod(windows, world_size)
    if rest:
        fits = max(fewer for fewer in range(1, world_size) if windows % fewer == 0)
        remedy = f"use {fits} processes"
    else:
        remedy = f"use --batch_size {max(size for size in range(1, batch_size) if share % size == 0)}"
    raise ValueError(
        f"the checkpoint's steps have {windows} windows, which {world_size} processes can not share as micro-batches "
        f"of --batch_size {batch_size}: {remedy}, or give another --total_batch_size"
    )


def _check_halves(micro_batches: int, world_size: int, tokens: int) -> None:
    """Raises ValueError for what can not be halved down to one; `tokens` are those of a micro-batch."""
    for count, what in ((world_size, "processes"), (micro_batches, "micro-batches a step over all processes")):
        low = 1 << (count.bit_length() - 1)
        if low != count:
            flag = f" (--total_batch_size {low * tokens} or {2 * low * tokens})" if "micro" in what else ""
            raise ValueError(f"--exact: {count} {what}, expected a power of two: {low} or {2 * low}{flag}")


def _warmup(settings: RunSettings, max_steps: int) -> int:
    if settings.warmup_ratio is not None:
        if not 0 <= settings.warmup_ratio <= 1:
            raise ValueError(f"--warmup_ratio {settings.warmup_ratio}: expected a share between 0 and 1")
        return round(settings.warmup_ratio * max_steps)
    if is_explicit(settings, "warmup_steps"):
        return settings.warmup_steps
    # A default of hundreds of steps would fill a short run with warm-up alone.
    return min(settings.warmup_steps, max(1, max_steps // 10))


def resolved(settings: R, plan: StepPlan) -> R:
    """The settings with the numbers that the plan settled: as config.yaml they alone give the same run again."""
    return dataclasses.replace(
        settings,
        block_size=plan.block_size,
        total_batch_size=plan.tokens_per_step,
        grad_accum_steps=None,
        max_steps=plan.max_steps,
        epochs=None,
        warmup_steps=plan.warmup_steps,
        warmup_ratio=None,
        log_interval=plan.log_every,
    )
