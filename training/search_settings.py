"""What a search can be told: `tune.py`'s flags, and the ranges in its file. No torch here."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from training.run_settings import METHOD_FLAGS, OBJECTIVE_FLAGS, FinetuneSettings
from training.settings import aliases_of, field_names, from_words, load_yaml, nearest, own_name, read_yaml

Value = str | int | float  # of a trial; a choice by its label

SECTION = "search"  # of the file
DEFAULT_LOG_DIR = "logs_search"
# The search sets these itself, or a trial could not do without them.
_OF_ONE_RUN = ("auto_resume", "resume", "checkpoint_path", "plan")
_NOT_SEARCHED = ("log_dir", *_OF_ONE_RUN, "wandb", "wandb_project", "tensorboard")
# Which settings have a meaning only beside certain values of these two; they are therefore drawn first.
_DECIDING = {"finetune_method": METHOD_FLAGS, "objective": OBJECTIVE_FLAGS}


@dataclass
class SearchSettings:
    """tune.py: many fine-tuning runs, each with settings drawn from ranges, for the lowest validation loss."""

    config: str | None = None
    """YAML file: settings of finetune_dolly.py, which stay, and a section `search:` with ranges for others."""
    trials: int = 50
    """Trials of the whole search, over all its workers and interruptions."""
    storage: str | None = None
    """Where trials are kept: sqlite:///FILE; several workers may share it. LOG_DIR/search.db where not given."""
    study: str = "search"
    """The search's name in the storage."""
    seed: int = 1337
    """Seed of what is drawn; with one worker the same trials come again. (A trial's own seed is a setting of its.)"""
    startup_trials: int = 5
    """The first trials are drawn at random and run to their end; later ones learn from them."""
    prune: bool = True
    """End a trial whose validation loss is above the median of the others at the same share of the run."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of all trials, not only best.pt of the best one."""


@dataclass(frozen=True)
class Choices:
    """One of a few values: the words that each label stands for, None for null."""

    words: dict[str, list[str] | None]

    def plain(self) -> list[str]:
        """For the study's record."""
        return list(self.words)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `whole`: integers."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def plain(self) -> dict[str, Any]:
        """For the study's record."""
        return asdict(self)


@dataclass(frozen=True)
class Space:
    """What a file says: ranges by the names of settings, and the words of the settings that stay."""

    ranges: dict[str, Choices | Range]
    fixed: dict[str, list[str] | None]
    log_dir: str

    def names(self, chosen: Mapping[str, Value]) -> Iterator[str]:
        """What to draw for a trial, in order, while `chosen` fills up: a rank only where the method has one."""
        for name in sorted(self.ranges, key=lambda name: name not in _DECIDING):
            if all(self._decided(by, chosen) in users for by, users in _users(name)):
                yield name

    def _decided(self, name: str, chosen: Mapping[str, Value]) -> Value:
        words = self.fixed.get(name)
        return chosen[name] if name in chosen else words[0] if words else getattr(FinetuneSettings, name)

    def words(self, chosen: Mapping[str, Value]) -> dict[str, list[str] | None]:
        """The words of a run's settings, those that stay and those that were drawn."""
        drawn = {name: self._drawn(name, value) for name, value in chosen.items()}
        return {**self.fixed, **drawn}

    def _drawn(self, name: str, value: Value) -> list[str] | None:
        values = self.ranges[name]
        return values.words[str(value)] if isinstance(values, Choices) else [repr(value)]

    def plain(self) -> dict[str, Any]:
        """What makes two searches the same, as JSON holds it."""
        return {"search": {name: values.plain() for name, values in self.ranges.items()}, "fixed": self.fixed}


def read_space(path: str) -> Space:
    """The ranges and the settings that stay, checked. Raises ValueError naming file, setting and remedy."""
    fixed = load_yaml(path, FinetuneSettings, beside=(SECTION,))
    log_dir = (fixed.pop("log_dir", None) or [DEFAULT_LOG_DIR])[0]
    for name in _OF_ONE_RUN:
        if name in fixed:
            raise ValueError(f"--config {path}: {name} is for a run, not for a search: leave it out")
    root = read_yaml(path)
    section = next((node for key, node in root.value if key.value == SECTION), None) if root is not None else None
    if not isinstance(section, yaml.MappingNode) or not section.value:
        raise ValueError(f"--config {path}: needs a section `{SECTION}:` with a range or a list of values for settings")
    try:
        from_words(FinetuneSettings, fixed)
        ranges: dict[str, Choices | Range] = {}
        for key, node in section.value:
            name = _setting(str(key.value))
            if name in ranges or name in fixed:
                raise ValueError(f"{key.value}: {name} is set a second time{'' if name in ranges else ' outside'}")
            ranges[name] = _values(name, node)
        space = Space(ranges, fixed, log_dir)
        _refuse_idle(space)
    except ValueError as error:
        raise ValueError(f"--config {path}: {SECTION}: {error}") from None
    return space


def _setting(key: str) -> str:
    name, known = own_name(key, FinetuneSettings), field_names(FinetuneSettings)
    if name not in known:
        raise ValueError(f"unknown setting {key!r}.{nearest(key, [*known, *aliases_of(FinetuneSettings)])}")
    if name in _NOT_SEARCHED:
        raise ValueError(f"{key} is the same for all trials, or belongs to the search: it cannot be searched")
    return name


def _values(name: str, node: yaml.Node) -> Choices | Range:
    """A list of values, or `low:` and `high:` with `log: true` or `step:`."""
    if isinstance(node, yaml.SequenceNode):
        return _choices(name, node)
    if isinstance(node, yaml.MappingNode):
        return _range(name, node)
    raise ValueError(f"{name}: expected a list of values, or low and high; a single value stands outside of {SECTION}:")


def _choices(name: str, node: yaml.SequenceNode) -> Choices:
    words: dict[str, list[str] | None] = {}
    for item in node.value:
        parts = item.value if isinstance(item, yaml.SequenceNode) else [item]
        if not all(isinstance(part, yaml.ScalarNode) for part in parts):
            raise ValueError(f"{name}: expected values, or lists of values for a setting that takes several")
        is_null = isinstance(item, yaml.ScalarNode) and item.tag == "tag:yaml.org,2002:null"
        label = "null" if is_null else " ".join(part.value for part in parts)
        if label in words:
            raise ValueError(f"{name}: {label} stands twice in its list")
        words[label] = None if is_null else [part.value for part in parts]
        from_words(FinetuneSettings, {name: words[label]})  # its type
    if not words:
        raise ValueError(f"{name}: its list of values is empty")
    return Choices(words)


def _range(name: str, node: yaml.MappingNode) -> Range:
    given = {str(key.value): value.value for key, value in node.value}
    for key in given:
        if key not in ("low", "high", "log", "step"):
            raise ValueError(f"{name}: unknown {key!r}.{nearest(key, ('low', 'high', 'log', 'step'))}")
    if not {"low", "high"} <= set(given):
        raise ValueError(f"{name}: a range needs low and high")
    takes = typing.get_type_hints(FinetuneSettings)[name]
    kinds = {takes, *typing.get_args(takes)}
    if not kinds & {int, float}:
        raise ValueError(f"{name}: is not a number: give a list of its values")
    low, high = (_number(name, key, given[key]) for key in ("low", "high"))
    step = _number(name, "step", given["step"]) if "step" in given else None
    if str(given.get("log", "false")).lower() not in ("true", "false"):
        raise ValueError(f"{name}: log: {given['log']}: expected true or false")
    log, whole = str(given.get("log", "false")).lower() == "true", float not in kinds
    if not low < high:
        raise ValueError(f"{name}: empty range: low {given['low']} is not below high {given['high']}")
    if log and (low <= 0 or step is not None):
        raise ValueError(f"{name}: a logarithmic range begins above 0 and has no step")
    if step is not None and not 0 < step <= high - low:
        raise ValueError(f"{name}: step {given['step']}: expected more than 0 and at most high - low")
    if whole and not all(value is None or value.is_integer() for value in (low, high, step)):
        raise ValueError(f"{name}: takes whole numbers only")
    for value in (low, high):
        from_words(FinetuneSettings, {name: [str(int(value)) if whole else repr(value)]})
    return Range(low, high, log, step, whole)


def _number(name: str, key: str, text: Any) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name}: {key}: {str(text)[:80]}: expected a number")
    return value


def _users(name: str) -> Iterator[tuple[str, list[str]]]:
    """(deciding setting, its values that give `name` a meaning), for each that has a say."""
    for by, table in _DECIDING.items():
        users = [value for value, flags in table.items() if name in flags]
        if users:
            yield by, users


def _refuse_idle(space: Space) -> None:
    """Raises ValueError for a range that no trial would use, such as a rank without LoRA."""
    for name in space.ranges:
        for by, users in _users(name):
            drawn = space.ranges.get(by)
            possible = set(drawn.words) if isinstance(drawn, Choices) else {str(space._decided(by, {}))}
            if not possible & set(users):
                raise ValueError(f"{name} does nothing with {by} {', '.join(sorted(possible))}: it is for {users[0]}")
