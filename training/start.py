"""Where a run starts: a checkpoint of its own, a pretrained model, or random weights, with a reason at each step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data.chat import Template
from data.templates import template_from_spec
from formats.checkpoint import has_digest, is_full, load_checkpoint
from formats.open_model import load_payload
from model.tuning import METHODS
from training.distributed import Dist
from training.nodes import fetch_newest
from training.progress import Progress
from training.run_folder import RunFolder, Say
from training.run_settings import (
    METHOD_DEFAULTS,
    OBJECTIVE_DEFAULTS,
    PREFERENCE_LR,
    PRESET_DEFAULTS,
    FinetuneSettings,
    RunSettings,
)
from training.settings import is_explicit, own_name, takes, to_dict

R = TypeVar("R", bound=RunSettings)

# What a resumed run takes from its command line alone, never from the checkpoint's settings.
_NOT_INHERITED = {
    "log_dir",
    "auto_resume",
    "resume",
    "checkpoint_path",
    "device",
    "parallel",
    "cpu_offload",
    "dist_timeout",
    "plan",
    "wandb",
    "wandb_project",
    "tensorboard",
}
# Files that are run: they are named by who starts a run, not by the file that it goes on from.
_PROGRAMS = ("reward",)


@dataclass(frozen=True)
class Start:
    """The loaded file, if any, and whether the run goes on from its training state, in the very folder that it is in,
    so that the folder's records go on too.
    """

    path: Path | None = None
    payload: dict[str, Any] | None = None
    resumes: bool = False
    in_folder: bool = False


def start_everywhere(settings: RunSettings, here: Dist, folder: RunFolder, say: Say) -> Start:
    """Where the run starts, on every process. Rank 0 reads the file and sends what it holds: the others need none.

    Errors as `choose_start`, raised by all.
    """
    if (settings.resume or settings.auto_resume) and settings.checkpoint_path is None:
        fetch_newest(here, folder, say)

    def chosen() -> tuple[Any, ...]:
        start = choose_start(settings, folder, say)
        return start.path, start.payload, start.resumes, start.in_folder

    return Start(*here.from_main(chosen))


def choose_start(settings: RunSettings, folder: RunFolder, say: Say) -> Start:
    """The run's own checkpoint where asked for, else the pretrained model, else random weights.

    Raises ValueError or FileNotFoundError for a file that was named explicitly and is missing or damaged.
    """
    if settings.checkpoint_path is not None and not settings.resume:
        raise ValueError("--checkpoint_path names what --resume goes on from: add --resume")
    own = _own_checkpoint(settings, folder, say)
    if own is not None:
        _check_script(settings, own)
        _check_state(own)
        return own
    if isinstance(settings, FinetuneSettings):
        _check_sources_stay(settings, folder)
        return _pretrained(settings, say)
    return Start()


def _own_checkpoint(settings: RunSettings, folder: RunFolder, say: Say) -> Start | None:
    if settings.resume and settings.checkpoint_path is not None:
        path = Path(settings.checkpoint_path)
        payload = load_checkpoint(path)
        if is_full(payload):
            if not has_digest(path):
                raise ValueError(
                    f"{path}: carries no digest, so damage to it could go unnoticed: resume from a file that a run "
                    "wrote, or start a new run from its weights with finetune_dolly.py --pretrained_checkpoint"
                )
            return Start(path, payload, resumes=True, in_folder=path.parent.resolve() == folder.path.resolve())
        say(f"{path}: weights only, no training state: the run starts at step 0 from these weights")
        return Start(path, payload)
    if not (settings.resume or settings.auto_resume):
        return None
    found = folder.newest_good(say)
    if found is not None:
        return Start(*found, resumes=True, in_folder=True)
    if settings.resume:
        raise ValueError(
            f"--resume: no usable checkpoint in {folder.path}: name one with --checkpoint_path, or drop --resume"
        )
    say(f"--auto_resume: no usable checkpoint in {folder.path}: starting anew")
    return None


def _check_script(settings: RunSettings, own: Start) -> None:
    """ValueError where fine-tuning would go on from the state of a pretraining, or the other way round."""
    saved = (own.payload or {}).get("settings")
    if not own.resumes or not saved:
        return
    tuned = "finetune_method" in saved
    if tuned != isinstance(settings, FinetuneSettings):
        raise ValueError(
            f"{own.path}: is of a run of {'finetune_dolly.py' if tuned else 'train_gpt2.py'}: go on with that, or "
            "choose another --log_dir (and its weights with finetune_dolly.py --pretrained_checkpoint)"
        )


def _check_sources_stay(settings: FinetuneSettings, folder: RunFolder) -> None:
    """ValueError where a file that the run will need again lies where a new run moves an earlier one's files aside."""
    needs_base = METHODS[settings.finetune_method].adapts or settings.objective != "sft"
    for name, needed in (("pretrained_checkpoint", needs_base), ("teacher", settings.objective == "distill")):
        path = Path(getattr(settings, name) or "")
        if needed and path.is_file() and path.parent.resolve() == folder.path.resolve():
            raise ValueError(
                f"--{name} {path} lies in --log_dir, whose files a new run moves aside, and this run needs it to be "
                "resumed or opened: choose another --log_dir"
            )


def _pretrained(settings: FinetuneSettings, say: Say) -> Start:
    path = Path(settings.pretrained_checkpoint)
    try:
        payload = load_payload(settings.pretrained_checkpoint)
    except (ValueError, OSError) as error:
        if is_explicit(settings, "pretrained_checkpoint"):
            raise
        say(f"Default --pretrained_checkpoint not used: {error}")
        say("!" * 100)
        say("WARNING: no pretrained model: starting from RANDOM weights. This is training from scratch on little data.")
        say("         Pretrain first (train_gpt2.py), or name a model with --pretrained_checkpoint.")
        say("!" * 100)
        return Start()
    for note in payload.get("notes", ()):
        say(f"{path}: {note}")
    if path.suffix == ".pt" and not has_digest(path):
        say(f"{path}: carries no digest, so damage to it cannot be noticed")
    return Start(path, payload)


def model_template(start: Start) -> Template:
    """The prompt template of the model that the run starts from. ValueError where it has none."""
    template = template_from_spec((start.payload or {}).get("template"))
    if template is None:
        raise ValueError(f"--prompt_template model: {start.path or 'a random start'} holds no template: name one")
    return template


def with_preset_defaults(settings: R) -> R:
    """The settings with what preset or method change in the defaults; what is explicit stays, and is known as such."""
    explicit = frozenset(name for name in to_dict(settings) if is_explicit(settings, name))
    if isinstance(settings, FinetuneSettings):
        method, objective = settings.finetune_method, settings.objective
        defaults: Mapping[str, float] = METHOD_DEFAULTS.get(method, {})
        if objective in OBJECTIVE_DEFAULTS:
            defaults = {**defaults, "max_lr": PREFERENCE_LR[method], **OBJECTIVE_DEFAULTS[objective]}
    else:
        defaults = PRESET_DEFAULTS.get(settings.preset, {})
    changes = {name: value for name, value in defaults.items() if name not in explicit}
    return _replace(settings, changes, explicit)


def _check_state(start: Start) -> None:
    """ValueError that names the file to go on from, where what it says of its run cannot be true."""
    if start.resumes and start.payload is not None:
        try:
            Progress.from_dict(start.payload["progress"])
        except ValueError as error:
            raise ValueError(f"{start.path}: {error}") from None


def with_checkpoint_settings(settings: R, saved: dict[str, Any], say: Say) -> R:
    """On resume: what is not given explicitly comes from the checkpoint's run; each difference is printed."""
    explicit = frozenset(name for name in to_dict(settings) if is_explicit(settings, name))
    now, changes = to_dict(settings), {}
    # Two settings of one quantity: an explicit one of today silences the saved partner.
    partners = settings.STANDS_FOR | {other: given for given, other in settings.STANDS_FOR.items()}
    silenced = {partners[name] for name in explicit if name in partners}
    for name, value in ((own_name(saved_name, type(settings)), value) for saved_name, value in saved.items()):
        if name not in now or name in _NOT_INHERITED or name in silenced:
            continue
        _check_saved(settings, name, value, inherited=name not in explicit)
        if name not in explicit:
            changes[name] = tuple(value) if isinstance(value, list) else value
        elif now[name] != value:
            say(f"  {name}: {value} in the checkpoint, now {now[name]}")
    return _replace(settings, changes, explicit)


def _check_saved(settings: RunSettings, name: str, value: Any, inherited: bool) -> None:
    """ValueError for a value that a run could not have saved, and for a program: no file has another one run."""
    if not takes(type(settings), name, value):
        raise ValueError(f"the checkpoint's settings are damaged: {name} is {' '.join(repr(value).split())[:80]}")
    if inherited and name in _PROGRAMS and value != getattr(type(settings), name):
        raise ValueError(
            f"the checkpoint's run used --{name} {value}, which runs a program: give --{name} again if you trust it"
        )


def note_versions(saved: dict[str, Any], now: dict[str, Any], say: Say) -> None:
    """Say what differs between the machine that wrote a checkpoint and this one, and may change the last bits."""
    for name in ("torch", "threads"):
        if name in saved and str(saved[name]) != str(now[name]):
            was = str(saved[name])[:40]
            say(f"  {name}: {was} in the checkpoint, now {now[name]}: sums may differ in their last bits")


def _replace(settings: R, changes: dict[str, Any], explicit: frozenset[str]) -> R:
    replaced = dataclasses.replace(settings, **changes)
    object.__setattr__(replaced, "explicit_names", explicit)
    object.__setattr__(replaced, "flag_names", getattr(settings, "flag_names", frozenset()))
    return replaced
