"""Settings from one dataclass a script: flags with underscores over a YAML file, errors that name the nearest name.

No torch here: `--help` answers before anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from formats.errors import printable
from formats.kinds import fits
from training.aliases import ALIASES, CHOICES, IMPLIED, SECTIONS
from training.peers import PeersLost
from training.stop import interruptible

S = TypeVar("S")

_LONGEST = 500  # characters of a message
_YAML_BYTES = 1 << 18  # parsing takes a second for each megabyte
_SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean X?` for the known name nearest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def field_names(cls: type) -> list[str]:
    """The settings of a dataclass, in the order in which they are declared."""
    return [field.name for field in dataclasses.fields(cls) if field.init]


def aliases_of(cls: type) -> dict[str, str]:
    """Other names of the settings: those that all scripts share, and the class's own `ALIASES`, which go first."""
    return ALIASES | getattr(cls, "ALIASES", {})


def own_name(name: str, cls: type) -> str:
    """Our name for a flag or key; an alias counts only where the settings lack that very name."""
    name = name.replace("-", "_")
    return name if name in field_names(cls) else aliases_of(cls).get(name, name)


def listed(entries: Iterable[str]) -> list[str]:
    """What a list's entries name: one each, or several with commas between, as other tools have it."""
    return [name for entry in entries for name in entry.split(",") if name]


def all_names(cls: type) -> list[str]:
    """Every name that the settings can be given under, ours first."""
    known = field_names(cls)
    return [
        *known,
        *(alias for alias, name in aliases_of(cls).items() if name in known),
        *(name for name in CHOICES if is_choice(name, known)),
    ]


def is_choice(name: str, known: Sequence[str]) -> bool:
    """Whether `name` is none of ours but one of CHOICES, and the settings have what it is about."""
    return name not in known and name in CHOICES and CHOICES[name].setting in known


def chosen(name: str, values: list[str]) -> str | None:
    """What the setting that a name of CHOICES is about becomes, None for nothing; a name alone means true."""
    choice, value = CHOICES[name], " ".join(values).lower() or "true"
    word = str(_SWITCH[value]).lower() if value in _SWITCH else value
    if word not in choice.values:
        raise ValueError(f"{name} {' '.join(values)}: {choice.why}")
    return choice.values[word]


def read_yaml(path: str) -> yaml.MappingNode | None:
    """The nodes of a settings file, None for an empty one. Raises ValueError for what is not lines of `name: value`."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--config {path}: no such file")
    if file.stat().st_size > _YAML_BYTES:
        raise ValueError(f"--config {path}: has {file.stat().st_size:,} bytes, expected at most {_YAML_BYTES:,}")
    try:
        root = yaml.compose(file.read_text("utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"--config {path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ValueError(f"--config {path}: expected `name: value` lines, found a list or a single value")
    for node in () if root is None else [root, *(value for _, value in root.value)]:
        if isinstance(node, yaml.MappingNode) and not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise ValueError(f"--config {path}: a name is a list or has lines below it, expected `name: value` lines")
    return root


def load_yaml(path: str, cls: type, beside: Sequence[str] = ()) -> dict[str, list[str] | None]:
    """The settings in a YAML file under our names: each one's words as they stand there, None for null.

    Words, not YAML's values, go to the parser of the flags: so `1e-4` is a number (YAML 1.1 wants `1.0e-4`), 1e3 a
    whole one, `compile: on` no bool, and a folder named 1e-4 keeps its name. Sections named in `beside` are for others
    to read. Raises ValueError for what `cls` does not know.
    """
    root = read_yaml(path)
    if root is None:
        return {}
    root.value = [(key, value) for key, value in root.value if key.value not in beside]
    known = field_names(cls)
    values: dict[str, list[str] | None] = {}
    try:
        for section, key, node in _entries(root):
            for name, words in _named(section, key, node, cls):
                if name in values:
                    raise ValueError(f"{key!r} sets {name} a second time")
                values[name] = words
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None
    sections = [key.value for key, value in root.value if isinstance(value, yaml.MappingNode)]
    implied = {name: value for section in sections for name, value in IMPLIED.get(section, {}).items() if name in known}
    return {**{name: [value] for name, value in implied.items()}, **values}


def from_words(cls: type[S], values: dict[str, list[str] | None]) -> S:
    """Settings from words under our names, as `load_yaml` gives them; they count as explicit, not as flags.

    Raises ValueError for a value that its setting does not take.
    """
    settings = _read(cls, [word for name in values for word in _words(cls, name, values[name])], "")
    object.__setattr__(settings, "explicit_names", frozenset(values))
    return settings


def _entries(root: yaml.MappingNode) -> Iterator[tuple[str, str, yaml.Node]]:
    """Section ("" outside of any), key and value of each line of a file."""
    for key, value in root.value:
        if isinstance(value, yaml.MappingNode) and key.value in SECTIONS:
            yield from ((key.value, str(inner.value), node) for inner, node in value.value)
        elif key.value in SECTIONS:
            raise ValueError(f"{key.value}: is a section: write its settings below it, indented")
        else:
            yield "", str(key.value), value


def _named(section: str, key: str, node: yaml.Node, cls: type) -> Iterator[tuple[str, list[str] | None]]:
    """The setting that a line of a file sets, if any, and its words, None for null."""
    own_keys, known = SECTIONS.get(section, {}), field_names(cls)
    name = own_name(own_keys.get(key, key), cls)
    if name not in known and not is_choice(name, known):
        where = f" in {section}:" if section else ""
        raise ValueError(f"unknown setting {key!r}{where}.{nearest(key, [*all_names(cls), *own_keys])}")
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise ValueError(f"{key}: expected a value or a list of values")
    words = [item.value for item in items]
    if name in known:
        is_null = isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"
        yield name, None if is_null else words
    elif (value := chosen(name, words)) is not None:
        yield CHOICES[name].setting, [value]


def _words(cls: type, name: str, values: list[str] | None) -> list[str]:
    """A setting as words for the parser: whole numbers may be written 1e8, switches with true or false after them."""
    hint = typing.get_type_hints(cls)[name]
    takes = {hint, *typing.get_args(hint)}
    if values is None:
        if type(None) not in takes:
            raise ValueError(f"--{name}: null is no value for it; leave it out to get the default")
        return [f"--{name}", "None"]
    if hint is bool and len(values) == 1:
        if values[0].lower() not in _SWITCH:
            raise ValueError(f"--{name} {values[0]}: expected true or false")
        return [f"--{name}" if _SWITCH[values[0].lower()] else f"--no_{name}"]
    if int in takes and float not in takes:
        values = [_whole_number(value) for value in values]
    return [f"--{name}", *values]


def _whole_number(text: str) -> str:
    """`1e8` -> `100000000`; anything else, 2.5e0 too, unchanged."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?[eE]\+?[0-9]{1,2}", text) and float(text).is_integer():
        return str(int(float(text)))
    return text


def _normalize(cls: type, argv: Sequence[str]) -> tuple[list[str], set[str]]:
    """argv under our names, and which settings it sets. Raises ValueError for an unknown flag.

    The same flag twice: the last wins, as people expect of wrappers that append flags. Two names of one
    setting are an error.
    """
    known = field_names(cls)
    loose: list[str] = []  # words before any flag
    given: dict[str, list[str]] = {}  # setting -> its values
    negated: set[str] = set()
    spelled: dict[str, str] = {}
    current = ""
    for word in argv:
        if not re.match(r"--[A-Za-z]", word):
            (given[current] if current else loose).append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        name = own_name(flag, cls)
        current = name[3:] if name not in known and name.startswith("no_") else name
        if current not in known and not is_choice(current, known):
            near = nearest("--" + name, ["--" + setting for setting in all_names(cls)])
            raise ValueError(f"unknown flag --{flag}.{near} (--help lists all)")
        spelling = flag.replace("-", "_").removeprefix("no_")
        if spelled.setdefault(current, spelling) != spelling:
            raise ValueError(f"--{spelled[current]} and --{flag} both set {current}: give one of them")
        given[current] = [value] if equals else []
        (negated.discard if name == current else negated.add)(current)
    for name in [name for name in given if is_choice(name, known)]:
        values, setting = given.pop(name), CHOICES[name].setting
        meant = chosen(name, ["false"] if name in negated else values)
        negated.discard(name)
        if meant is not None and spelled.setdefault(setting, name) != name:
            raise ValueError(f"--{spelled[setting]} and --{name} both set {setting}: give one of them")
        given |= {} if meant is None else {setting: [meant]}
    words = [_words(cls, name, values) for name, values in given.items() if name not in negated]
    words += [[f"--no_{name}", *given[name]] for name in negated]
    return [*loose, *(word for group in words for word in group)], set(given)


def _take(argv: list[str], flag: str) -> str | None:
    """Remove every `--flag VALUE` or `--flag=VALUE` from argv and return the last VALUE."""
    value, index = None, 0
    while index < len(argv):
        if argv[index] == flag:
            if index + 1 == len(argv):
                raise ValueError(f"{flag} needs a file")
            value = argv[index + 1]
            del argv[index : index + 2]
        elif argv[index].startswith(flag + "="):
            value = argv.pop(index)[len(flag) + 1 :]
        else:
            index += 1
    return value


def _name_positionals(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """`words` with a flag before each leading word: `DIR --records 2` -> `--data_dir DIR --records 2`."""
    loose = list(takewhile(lambda word: not word.startswith("-"), words))
    if len(loose) > len(names):
        raise ValueError(f"unexpected {loose[len(names)]!r}: expected {' '.join(names).upper()} and flags (--help)")
    flagged = [part for name, word in zip(names, loose) for part in (f"--{name}", word)]
    return [*flagged, *words[len(loose) :]]


def parse(cls: type[S], argv: Sequence[str] | None = None, *, description: str = "") -> S:
    """Settings from `argv`: defaults, then `--config FILE`, then flags.

    What was set explicitly is kept as `settings.explicit_names`: an explicit setting beats a default; what was set by
    a flag, not by the file alone, as `settings.flag_names`.
    Raises ValueError for unknown names and wrong values; SystemExit(0) after --help and --print_config.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    config = None if "config" in field_names(cls) else _take(words, "--config")  # a script may read its file itself
    print_config = "--print_config" in words
    words = [word for word in words if word != "--print_config"]
    asks_help = any(word in ("-h", "--help") for word in words)
    flags, explicit = (["--help"], set()) if asks_help else _normalize(cls, words)
    flag_names = frozenset(explicit)
    settings: S | None = None
    if config is not None and not asks_help:
        values = _without_rivals(cls, load_yaml(config, cls), explicit)
        try:
            settings = _read(cls, [word for name in values for word in _words(cls, name, values[name])], description)
        except ValueError as error:
            raise ValueError(f"--config {config}: {error}") from None
        explicit |= set(values)
    settings = _read(cls, flags, description, settings)
    object.__setattr__(settings, "explicit_names", frozenset(explicit))
    object.__setattr__(settings, "flag_names", flag_names)
    if print_config:
        print(to_yaml(settings), end="")
        raise SystemExit(0)
    return settings


def _without_rivals(cls: type, values: dict[str, Any], flags: set[str]) -> dict[str, Any]:
    """The file's values without those that a flag replaces under its other name: `--epochs` beats its max_steps."""
    pairs = getattr(cls, "STANDS_FOR", {}).items()
    beaten = {other for given, other in pairs if given in flags} | {given for given, other in pairs if other in flags}
    return {name: value for name, value in values.items() if name not in beaten}


def _read(cls: type[S], args: list[str], description: str, default: S | None = None) -> S:
    """Have tyro check types and build the settings; what it would print in a box becomes a ValueError of one line."""
    text = f"{description}\n\nAlso: --config FILE (YAML, flags win), --print_config (resolved settings as YAML)."
    more = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(cls, args=args, description=text, use_underscores=True, **more)  # type: ignore[call-overload]
    except SystemExit as stop:
        if not stop.code:  # --help, which goes to stdout
            raise
        raise ValueError(_first_sentence(said.getvalue())) from None


def _first_sentence(box: str) -> str:
    """What a box of tyro's says between its title and the next rule or blank line."""
    lines = [line.strip(" │|") for line in box.splitlines()]
    body = dropwhile(_is_rule, lines[1:])
    sentence = " ".join(takewhile(lambda line: not _is_rule(line), body)) or " ".join(box.split())
    sentence = sentence if len(sentence) <= _LONGEST else f"{sentence[:_LONGEST]} ..."
    return re.sub(r"^Error parsing \w*Settings: ", "", sentence)  # from __post_init__: it names its flag itself


def _is_rule(line: str) -> bool:
    return not line.strip("-─╭╮╰╯")


def is_explicit(settings: Any, name: str) -> bool:
    """Whether `name` was set: by flag or file when parsed, else by differing from its default."""
    names = getattr(settings, "explicit_names", None)
    if names is not None:
        return name in names
    (field,) = (field for field in dataclasses.fields(settings) if field.name == name)
    return bool(getattr(settings, name) != field.default)


def is_flag(settings: Any, name: str) -> bool:
    """Whether `name` was set by a flag. A file may be a run's config.yaml, which names every setting."""
    return name in getattr(settings, "flag_names", ())


def to_dict(settings: Any) -> dict[str, Any]:
    """Plain values (tuples as lists): what goes into config.yaml and into a checkpoint."""
    plain = dataclasses.asdict(settings)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def takes(cls: type, name: str, value: Any) -> bool:
    """Whether a setting may have this plain value, as `to_dict` gives it."""
    return fits(value, typing.get_type_hints(cls)[name])


def to_yaml(settings: Any) -> str:
    """The resolved settings as a file that --config takes: without those that another one stands in for."""
    plain = to_dict(settings)
    for given, other in getattr(settings, "STANDS_FOR", {}).items():
        if plain[given] is not None:
            del plain[other]
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def run_script(
    main: Callable[[S], Any],
    cls: type[S],
    description: str,
    argv: Sequence[str] | None = None,
    positionals: Sequence[str] = (),
) -> None:
    """Parse, run, and turn a user's mistake into one line and exit code 2 (ESPALIER_DEBUG=1 shows the traceback), the
    loss of another process into one line and exit code 1, Ctrl-C into one line and exit code 130.

    `positionals`: the settings that leading words without a flag set, in this order.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal lacks is shown as its escape, and ends no run
            stream.reconfigure(errors="backslashreplace")
    try:
        words = _name_positionals(sys.argv[1:] if argv is None else argv, positionals)
        with interruptible():
            main(parse(cls, words, description=description))
    except PeersLost as error:
        if os.environ.get("ESPALIER_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # what still waits for a process that is gone must not keep this one
    except (ValueError, OSError) as error:
        if os.environ.get("ESPALIER_DEBUG"):
            raise
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
