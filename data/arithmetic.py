"""Sums that can be checked: the embedded task for reinforcement learning. Standard library only, no network."""

from collections.abc import Iterator

from data.templates import Record

_SUMMANDS = (100, 10)  # a number of one or two digits, and a digit
_STEP = 383  # coprime to 1,000: neighbours in the file have nothing in common


def arithmetic_records() -> Iterator[Record]:
    """Every sum of a number below 100 and a digit, 1,000 of them, each once, in a fixed order without a pattern."""
    count = _SUMMANDS[0] * _SUMMANDS[1]
    for number in range(count):
        one, two = divmod(number * _STEP % count, _SUMMANDS[1])
        yield {"instruction": f"What is {one} + {two}?", "context": "", "response": str(one + two), "category": "sum"}
