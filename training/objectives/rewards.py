"""What a completion is worth: the built-in reward for arithmetic, and functions from a file of the user's."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path

Reward = Callable[[str, str, str], float]  # prompt, completion, the record's own answer ("" if it has none)

FORM = 0.1  # for an answer that ends with a number, though the wrong one: it can be checked at least
_EXPRESSION = re.compile(r"(-?\d+)\s*([-+*×])\s*(-?\d+)")
_IN_WORDS = re.compile(r"(sum|difference|product)\s+(?:of|between)\s+(-?\d+)\s+and\s+(-?\d+)", re.IGNORECASE)
_LAST_NUMBER = re.compile(r"(?:^|[^\d.])(-?\d{1,30})\.?\s*$")
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
_NAMES = {"sum": "+", "difference": "-", "product": "*", "×": "*"}


class RewardError(ValueError):
    """A reward function failed, or gave what is no number."""


def arithmetic(prompt: str, completion: str, reference: str = "") -> float:
    """1 where the completion ends with the number that the prompt asks for, 0.1 where it ends with another, else 0.

    The prompt's last sum, difference or product of two whole numbers is meant: `17 + 25`, or `the sum of 17 and 25`.
    Raises ValueError for a prompt that asks for none.
    """
    if (found := _IN_WORDS.findall(prompt)) or (found := _EXPRESSION.findall(prompt)):
        one, two, three = found[-1]
        name, left, right = (one.lower(), two, three) if one.isalpha() else (two, one, three)
    else:
        raise ValueError("the prompt asks for no sum, difference or product of two whole numbers")
    wanted = _OPERATIONS[_NAMES.get(name, name)](int(left), int(right))
    answer = _LAST_NUMBER.search(completion)
    if answer is None:
        return 0.0
    return 1.0 if int(answer[1]) == wanted else FORM


def load_reward(name: str) -> Reward:
    """The reward that `--reward` names: `arithmetic`, or a function in a file, `path/to/file.py:function`.

    The file is run as the program that it is. Raises ValueError or FileNotFoundError, one line, where there is none.
    """
    if name == "arithmetic":
        return arithmetic
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ValueError(f"--reward {name}: expected arithmetic, or path/to/file.py:function")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--reward {name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location("reward_function", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's program raises
        raise ValueError(f"--reward {name}: {path} fails: {_told(error)}") from error
    reward: Reward | None = getattr(module, function, None)
    if not callable(reward):
        raise ValueError(f"--reward {name}: {path} has no function {function!r}")
    return reward


def rate(reward: Reward, name: str, prompt: str, completion: str, reference: str) -> float:
    """The number that `reward`, called `name`, gives. Raises RewardError where it fails or gives none."""
    try:
        value = reward(prompt, completion, reference)
    except Exception as error:  # whatever the user's program raises
        raise RewardError(f"--reward {name} fails on the prompt {prompt[-60:]!r}: {_told(error)}") from error
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(f"--reward {name} gave {value!r:.60} for the prompt {prompt[-60:]!r}, expected a number")
    return number


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
