"""What `--plan` prints, and what is said when memory ran out: the plan's figures, and which switch would save what."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch

from formats.open_model import read_config
from model.config import GPTConfig, preset
from training.parallel import check_parallel
from training.plan import plan_memory
from training.run_settings import FinetuneSettings, RunSettings
from training.settings import is_explicit
from training.step_plan import check_settings

_FILL = 0.9  # of the memory that is free, which a batch may take


def show_plan(
    settings: RunSettings, device: torch.device, world_size: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Print the plan of a run, its share of the memory there is, and what would save how much; the figures in bytes.

    Raises ValueError or OSError as the run would.
    """
    check_settings(settings)
    check_parallel(settings, world_size)
    config = network_config(settings, say)
    plan = plan_memory(settings, config, device.type, world_size)
    free, size = memory_of(device)
    rows = {
        "weights": plan.weights,
        "gradients": plan.gradients,
        "optimizer state": plan.optimizer,
        "activations": plan.activations,
        "copy for saving": plan.saving,
        "logits and passing arrays": max(plan.logits, plan.passing),
        "freed, kept by the allocator": plan.allocator,
    }
    of = f"{settings.batch_size} x {min(settings.block_size, config.block_size)} tokens"
    say(f"Memory plan: {plan.parameters:,} parameters, {plan.trainable:,} train, micro-batches of {of}")
    if world_size > 1:
        say(f"  on each of {world_size} processes, --parallel {settings.parallel}")
    for name, value in rows.items():
        say(f"  {name + ':':30}{_shown(value):>12}")
    share = f"{100 * plan.total / size:.0f}% of the {_shown(size)} of {device}"
    say(f"  {'at the peak:':30}{_shown(plan.total):>12}, {share}")
    for flag, less in savings(settings, config, device.type, world_size):
        say(f"  {flag} saves {_shown(less)} ({100 * less / plan.total:.0f}%)")
    largest = largest_batch(settings, config, device.type, world_size, free)
    say(f"  Largest --batch_size for the {_shown(free)} free now: {largest or 'none'} (worked out, not tried)")
    return {**dataclasses.asdict(plan), "total": plan.total, "free": free, "memory": size, "largest_batch": largest}


def network_config(settings: RunSettings, say: Callable[[str], None]) -> GPTConfig:
    """The network that a run would begin with, read without its weights."""
    if settings.checkpoint_path is not None:
        return read_config(settings.checkpoint_path)
    if isinstance(settings, FinetuneSettings):
        try:
            return read_config(settings.pretrained_checkpoint)
        except OSError as error:
            if is_explicit(settings, "pretrained_checkpoint"):
                raise
            say(f"Default --pretrained_checkpoint not used: {error}; planned for --preset {settings.preset}")
    return preset(settings.preset, block_size=settings.block_size)


def savings(settings: RunSettings, config: GPTConfig, device: str, world_size: int) -> list[tuple[str, int]]:
    """Which switch would save how many bytes, the largest first."""
    switches: dict[str, dict[str, Any]] = {
        "--gradient_checkpointing": {"gradient_checkpointing": True},
        f"--batch_size {settings.batch_size // 2}": {"batch_size": settings.batch_size // 2},
        f"--block_size {settings.block_size // 2}": {"block_size": settings.block_size // 2},
    }
    if world_size > 1 and settings.parallel != "fsdp":
        switches["--parallel fsdp"] = {"parallel": "fsdp"}
    if world_size > 1 and settings.parallel == "ddp":
        switches["--parallel zero1"] = {"parallel": "zero1"}
    if settings.parallel == "fsdp" and device == "cuda" and not settings.cpu_offload:
        switches["--cpu_offload"] = {"cpu_offload": True}
    if isinstance(settings, FinetuneSettings):
        for method in ("lora", "qlora"):
            switches[f"--finetune_method {method}"] = {"finetune_method": method}
    now, found = plan_memory(settings, config, device, world_size).total, []
    for flag, change in switches.items():
        if 0 in change.values():  # half of one
            continue
        changed = dataclasses.replace(settings, **change)
        try:
            check_parallel(changed, world_size)
        except ValueError:  # a switch for other runs
            continue
        less = now - plan_memory(changed, config, device, world_size).total
        if less > 0.01 * now:
            found.append((flag, less))
    return sorted(found, key=lambda entry: -entry[1])


def largest_batch(settings: RunSettings, config: GPTConfig, device: str, world_size: int, free: int) -> int:
    """The largest power of two as --batch_size whose plan fits into 90% of `free` bytes; 0 where not even 1 does."""
    best, size = 0, 1
    while size <= 1 << 16:
        total = plan_memory(dataclasses.replace(settings, batch_size=size), config, device, world_size).total
        if total > _FILL * free:
            break
        best, size = size, 2 * size
    return best


def memory_of(device: torch.device) -> tuple[int, int]:
    """Bytes free now, and in all, of a GPU or of this machine."""
    if device.type == "cuda":
        free, size = torch.cuda.mem_get_info(device)
        return free, size
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")


class OutOfMemory(ValueError):
    """A run that took more memory than there is; the message names remedies."""


def out_of_memory(settings: RunSettings, device: torch.device, world_size: int, error: Exception) -> str:
    """What to say when memory ran out: what the plan says, and what each remedy saves."""
    text = f"out of memory: {' '.join(str(error).split())[:200]}."
    try:
        config = network_config(settings, lambda _: None)
        plan = plan_memory(settings, config, device.type, world_size)
        remedies = [
            f"{flag} ({_shown(less)} less)" for flag, less in savings(settings, config, device.type, world_size)
        ]
    except (ValueError, OSError):  # the plan must not hide the error that it explains
        return text + " Remedies: a smaller --batch_size, --gradient_checkpointing, a smaller --block_size"
    return f"{text} This run is planned to take {_shown(plan.total)} (--plan). Remedies: {', '.join(remedies)}"


def _shown(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
