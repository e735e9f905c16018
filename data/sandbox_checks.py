"""What a stranger's template may make: every operation whose result can be large pays for it before it runs.

    with spending(Budget(1 << 23)):
        replaced("a" * 1000, "a", "b" * 1000)      # 1,000,000 of 8,388,608 units
        multiplied("a", 200_000_000)               # ValueError

One unit is a character that a template makes; a turn of a loop, a call, or an element of a list is 32 units, about
what it takes in memory. So the budget bounds memory, the clock bounds what takes long without making much.
"""

import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

STEP = 32
_SECONDS = 1.0
_DEPTH = 100  # of lists in lists; the deepest tool description in the wild has about ten
_BITS = 4096  # of an integer
_WIDTH = 4096  # that a format pads to
_STRIPPED = 256  # characters that strip may look for, each at every step
_REPR = 12  # characters that one may become: \U0001f600 in repr, a pair of \ud83d in JSON
_CONTAINERS = (list, tuple, dict, set, KeysView, ValuesView, ItemsView)
_DIRECTIVE = re.compile(r"%(?:%|(?:\(([^)]*)\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?)")


class Budget:
    """What is left to one rendering, in units, and until when."""

    def __init__(self, units: int) -> None:
        self.left = units
        self._until = time.monotonic() + _SECONDS
        self._until_cpu = time.thread_time() + _SECONDS

    def charge(self, units: int = STEP) -> None:
        """Take `units`. Raises ValueError when they are used up, or the time is."""
        self.left -= units
        if self.left < 0:
            raise ValueError("it makes too much text or takes too many steps")
        # The monotonic clock is eight times cheaper to read; the thread's own does not run while the machine sleeps.
        if time.monotonic() > self._until and time.thread_time() > self._until_cpu:
            raise ValueError(f"it takes longer than {_SECONDS:.0f} s")


_BUDGET: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """Within it, `charge` takes from `budget`."""
    token = _BUDGET.set(budget)
    try:
        yield
    finally:
        _BUDGET.reset(token)


def charge(units: int = STEP) -> None:
    """Take `units` from the rendering that is under way. Raises ValueError when they are used up, or the time is."""
    _BUDGET.get().charge(units)


def weigh(value: Any, limit: int) -> tuple[int, int]:
    """The units of all that `value` holds, a shared part counted wherever it stands, and how deep it is nested.

    Raises ValueError beyond `limit` units or 100 levels: `[x, x]` forty times over has 2^40 parts in 40 lists.
    """
    units, deepest, todo = 0, 0, [(value, 0)]
    while todo:
        each, depth = todo.pop()
        if isinstance(each, str):
            units += len(each)
        elif isinstance(each, _CONTAINERS):
            deepest = max(deepest, depth + 1)
            parts = [*each.keys(), *each.values()] if isinstance(each, dict) else each
            units += STEP * len(each)
            if units <= limit and depth < _DEPTH:
                todo += [(part, depth + 1) for part in parts]
        if units > limit or depth >= _DEPTH:
            raise ValueError("it makes lists that are too large or nested too deep")
        units += 1
    return units, deepest


# ---- the operations, each with its price


def text(value: Any) -> str:
    """str(value), its price first."""
    if isinstance(value, str):
        return value
    if isinstance(value, _CONTAINERS):
        charge(_REPR * weigh(value, _BUDGET.get().left)[0])
    return str(value)


def emitted(value: Any) -> str:
    """What a template writes."""
    written = text(value)
    charge(len(written) + 1)
    return written


def made(value: Any) -> Any:
    """`value`, which an operation made that takes no more than it returns."""
    charge(
        STEP + (len(value) if isinstance(value, str) else STEP * len(value) if isinstance(value, _CONTAINERS) else 0)
    )
    return value


def built(value: Any) -> Any:
    """`value`, a list, tuple or dict with all that it holds: hashing and comparing go through all of it."""
    charge(weigh(value, _BUDGET.get().left)[0])
    return value


def compared(value: Any) -> Any:
    """`value`, about to be compared: sixteen characters cost about as much as one that is made."""
    charge(len(value) // 16 + 1 if isinstance(value, str) else weigh(value, _BUDGET.get().left)[0])
    return value


def searched(value: Any) -> Any:
    """`value`, about to be searched by `in`."""
    if isinstance(value, (list, tuple, ValuesView)):
        return compared(value)
    charge(1 + len(value) // 16 if isinstance(value, (str, range)) else STEP)
    return value


def turns(iterable: Iterable[Any]) -> Iterator[Any]:
    """The elements of what a loop goes through; every turn is a step."""
    for element in iterable:
        charge()
        yield element


def joined(pieces: Iterable[Any], separator: Any = "") -> str:
    """The pieces as one string."""
    separator = text(separator)
    strings = []
    for piece in pieces:
        strings.append(text(piece))
        charge(len(strings[-1]) + len(separator) + STEP)
    return separator.join(strings)


def replaced(string: Any, old: Any, new: Any, count: int | None = None) -> str:
    """str.replace."""
    string, old, new = text(string), text(old), text(new)
    charge(len(string) + string.count(old) * len(new))
    result: str = string.replace(old, new, -1 if count is None else count)
    return result


def indented(indent: Callable[..., str], string: Any, width: int | str = 4, *args: Any, **kwargs: Any) -> str:
    """Jinja's filter `indent`."""
    string = text(string)
    charge(len(string) + (len(string.splitlines()) + 1) * (len(width) if isinstance(width, str) else max(width, 0)))
    return indent(string, width, *args, **kwargs)


def added(left: Any, right: Any) -> Any:
    """left + right."""
    if isinstance(left, str) and isinstance(right, str):
        charge(len(left) + len(right))
    elif isinstance(left, list) and isinstance(right, list):
        charge(STEP * (len(left) + len(right)))
    elif isinstance(left, tuple) and isinstance(right, tuple):
        charge(STEP * (len(left) + len(right)))
        return built(left + right)
    return left + right


def multiplied(left: Any, right: Any) -> Any:
    """left * right."""
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _BITS:
            raise ValueError(f"it makes an integer of more than {_BITS} bits")
    else:
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                charge(weigh(value, _BUDGET.get().left)[0] * max(times, 0))
    return left * right


def power(base: Any, exponent: Any) -> Any:
    """base ** exponent."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > _BITS:
        raise ValueError(f"it makes an integer of more than {_BITS} bits")
    return base**exponent


def percent(left: Any, right: Any) -> Any:
    """left % right: a remainder, or printf's way of formatting."""
    if not isinstance(left, str):
        return left % right
    charge(len(left))
    argument_units = _REPR * weigh(right, _BUDGET.get().left)[0]
    for key, *widths in _DIRECTIVE.findall(left):
        if "(" in key or any(width == "*" or len(width) > 4 or int(width or 0) > _WIDTH for width in widths):
            raise ValueError(f"it formats to a width that is not a number of at most {_WIDTH}")
        charge(argument_units + _WIDTH * any(widths))
    return left % right


def formatted(value: Any, specification: str) -> str:
    """format(value, specification)."""
    if any(len(digits) > 4 or int(digits) > _WIDTH for digits in re.findall(r"\d+", specification)):
        raise ValueError(f"it formats to a width that is not a number of at most {_WIDTH}")
    result = format(text(value) if isinstance(value, _CONTAINERS) else value, specification)
    charge(len(result) + STEP)
    return result


def integer(convert: Callable[..., int], value: Any, *args: Any, **kwargs: Any) -> int:
    """Jinja's filter `int`."""
    if isinstance(value, str) and len(value) > _BITS // 4:
        raise ValueError(f"it makes an integer of more than {_BITS // 4} digits")
    return convert(value, *args, **kwargs)


def as_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson` as chat templates know it: nothing is escaped for HTML."""
    units, depth = weigh(value, _BUDGET.get().left)
    step = len(indent) if isinstance(indent, str) else int(indent or 0)
    between = sum(len(part) for part in separators or ())
    charge(units * (_REPR if ensure_ascii else 2) + units // STEP * (depth * max(step, 0) + between))
    result = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return made(result)


def now(format: str) -> str:
    """The time as strftime writes it, for templates that tell the model what day it is."""
    charge(256 * len(format))  # Python lets a directive grow no further
    return datetime.now().strftime(format)


def as_text(function: Callable[..., Any], value: Any, *args: Any, **kwargs: Any) -> Any:
    """A filter that takes the text of what it is given."""
    if any(isinstance(arg, str) and len(arg) > _STRIPPED for arg in (*args, *kwargs.values())):
        raise ValueError(f"it strips more than {_STRIPPED} different characters")
    return made(function(text(value), *args, **kwargs))


def ordered(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A filter that compares or hashes the elements of its argument: sort, unique, min, max."""
    for value in args:
        charge(STEP * len(value) if isinstance(value, str) else 4 * weigh(value, _BUDGET.get().left)[0])
    return everything(function(*args, **kwargs))


def everything(result: Any) -> Any:
    """What a filter returned; where that is yet to be computed, all of it now, so that it is counted."""
    return made(list(turns(result)) if isinstance(result, Iterator) else result)


def call_method(string: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """string.name(*args, **kwargs)."""
    if name == "join":
        args = ([*turns(args[0])],)
        charge(sum(len(piece) + len(string) for piece in args[0] if isinstance(piece, str)))
    elif name in ("strip", "lstrip", "rstrip") and args and len(args[0] or "") > _STRIPPED:
        raise ValueError(f"it strips more than {_STRIPPED} different characters")
    elif name == "replace":
        charge(len(string) + string.count(args[0]) * len(args[1]))
    elif name in ("center", "ljust", "rjust", "zfill"):
        charge(len(string) + max(args[0], 0))
    elif name in ("split", "rsplit", "splitlines"):
        separator = args[0] if args else kwargs.get("sep")
        charge(STEP * string.count(separator) if isinstance(separator, str) else 8 * len(string))
    return made(getattr(string, name)(*args, **kwargs))
