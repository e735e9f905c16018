"""Settings from one dataclass a script: flags with underscores over a YAML file, errors that name the nearest name.

No torch here: `--help` answers before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

S = TypeVar("S")

# One table for flags and YAML keys: the names that other projects' scripts and configs use -> ours.
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
    "finetune_lr": "max_lr",
    "finetune_epochs": "epochs",
    "finetune_samples": "max_samples",
    "finetune_batch_size": "batch_size",
    "finetune_seq_len": "block_size",
    "finetune_grad_accum": "grad_accum_steps",
    "finetune_max_grad_norm": "max_grad_norm",
    "finetune_weight_decay": "weight_decay",
    "finetune_warmup_steps": "warmup_steps",
}


class _Loader(yaml.SafeLoader):
    """safe_load in which `1e-4` is a number (YAML 1.1 wants `1.0e-4`)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean X?` for the known name nearest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def field_names(cls: type) -> list[str]:
    """The settings of a dataclass, in the order in which they are declared."""
    return [field.name for field in dataclasses.fields(cls) if field.init]


def own_name(name: str, known: Sequence[str]) -> str:
    """Our name for a flag or key; an alias counts only where the settings lack that very name."""
    name = name.replace("-", "_")
    return name if name in known else ALIASES.get(name, name)


def load_yaml(path: str, cls: type) -> dict[str, Any]:
    """The settings in a YAML file, under our names. Raises ValueError for what `cls` does not know."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        raw = yaml.load(file.read_text("utf-8"), Loader=_Loader)  # a SafeLoader: builds plain values only
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ValueError(f"--config {path}: expected `name: value` lines, found a {type(raw).__name__}")
    known = field_names(cls)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = own_name(str(key), known)
        if name not in known:
            raise ValueError(f"--config {path}: unknown setting {key!r}.{nearest(name, known)}")
        if name in values:
            raise ValueError(f"--config {path}: {key!r} sets {name} a second time")
        values[name] = value
    return values


def _whole_number(cls: type, name: str, text: str) -> str:
    """`1e8` -> `100000000` where a setting is a whole number; anything else unchanged."""
    hint = typing.get_type_hints(cls).get(name)
    takes = {hint, *typing.get_args(hint)}
    if int in takes and float not in takes and re.fullmatch(r"[0-9]+(\.[0-9]+)?[eE]\+?[0-9]+", text):
        number = float(text)
        return str(int(number)) if number.is_integer() else text
    return text


def _as_flags(cls: type, values: dict[str, Any]) -> list[str]:
    """YAML values as command-line words, so that one parser checks the types of both."""
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool) and typing.get_type_hints(cls)[name] is bool:
            words.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, (list, tuple)):
            words += [f"--{name}", *(str(item) for item in value)]
        else:
            words += [f"--{name}", _whole_number(cls, name, str(value))]
    return words


def _normalize(cls: type, argv: Sequence[str]) -> tuple[list[str], set[str]]:
    """argv under our names, and which settings it sets. Raises ValueError for an unknown flag.

    The same flag twice: the last wins, as people expect of wrappers that append flags. Two names of one
    setting are an error.
    """
    known = field_names(cls)
    words: dict[str, list[str]] = {"": []}  # setting -> its flag and values
    spelled: dict[str, str] = {}
    current = ""
    for word in argv:
        if not re.match(r"--[A-Za-z]", word):
            words[current].append(_whole_number(cls, current, word))
            continue
        flag, equals, value = word[2:].partition("=")
        name = own_name(flag, known)
        current = name[3:] if name.startswith("no_") and name[3:] in known else name
        if current not in known:
            near = nearest("--" + name, ["--" + setting for setting in known])
            raise ValueError(f"unknown flag --{flag}.{near} (--help lists all)")
        if spelled.setdefault(current, flag) != flag:
            raise ValueError(f"--{spelled[current]} and --{flag} both set {current}: give one of them")
        words[current] = [f"--{name}", *([_whole_number(cls, current, value)] if equals else [])]
    return [word for group in words.values() for word in group], set(words) - {""}


def _take(argv: list[str], flag: str) -> str | None:
    """Remove `--flag VALUE` or `--flag=VALUE` from argv and return VALUE."""
    for index, word in enumerate(argv):
        if word == flag:
            if index + 1 == len(argv):
                raise ValueError(f"{flag} needs a file")
            value = argv[index + 1]
            del argv[index : index + 2]
            return value
        if word.startswith(flag + "="):
            del argv[index]
            return word[len(flag) + 1 :]
    return None


def parse(cls: type[S], argv: Sequence[str] | None = None, *, description: str = "") -> S:
    """Settings from `argv`: defaults, then `--config FILE`, then flags.

    What was set explicitly is kept as `settings.explicit_names`: an explicit setting beats a default.
    Raises ValueError for unknown names and SystemExit(2) for values of the wrong type (SystemExit(0) after --help).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    config = _take(words, "--config")
    print_config = "--print_config" in words
    words = [word for word in words if word != "--print_config"]
    asks_help = any(word in ("-h", "--help") for word in words)
    flags, explicit = (["--help"], set()) if asks_help else _normalize(cls, words)

    def read(args: list[str], default: S | None) -> S:
        more = {} if default is None else {"default": default}
        text = f"{description}\n\nAlso: --config FILE (YAML, flags win), --print_config (resolved settings as YAML)."
        return tyro.cli(cls, args=args, description=text, use_underscores=True, **more)  # type: ignore[call-overload]

    settings: S | None = None
    if config is not None:
        values = load_yaml(config, cls)
        try:
            settings = read(_as_flags(cls, values), None)
        except SystemExit:
            print(f"error: --config {config} holds a value of the wrong type (above)", file=sys.stderr)
            raise
        explicit |= set(values)
    settings = read(flags, settings)
    object.__setattr__(settings, "explicit_names", frozenset(explicit))
    if print_config:
        print(to_yaml(settings), end="")
        raise SystemExit(0)
    return settings


def is_explicit(settings: Any, name: str) -> bool:
    """Whether `name` was set: by flag or file when parsed, else by differing from its default."""
    names = getattr(settings, "explicit_names", None)
    if names is not None:
        return name in names
    (field,) = (field for field in dataclasses.fields(settings) if field.name == name)
    return bool(getattr(settings, name) != field.default)


def to_dict(settings: Any) -> dict[str, Any]:
    """Plain values (tuples as lists): what goes into config.yaml and into a checkpoint."""
    plain = dataclasses.asdict(settings)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def to_yaml(settings: Any) -> str:
    """The resolved settings as a file that --config takes."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True)


def run_script(main: Callable[[S], Any], cls: type[S], description: str, argv: Sequence[str] | None = None) -> None:
    """Parse, run, and turn a user's mistake into one line and exit code 2 (ESPALIER_DEBUG=1 shows the traceback)."""
    try:
        main(parse(cls, argv, description=description))
    except (ValueError, OSError) as error:
        if os.environ.get("ESPALIER_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
