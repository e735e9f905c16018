"""Sums that can be checked: the embedded task for reinforcement learning. Standard library only, no network."""

from collections.abc import Iterator

from data.templates import Record

_LARGEST = 99  # sums of numbers of one or two digits
_STEP = 3_803  # prime, coprime to 10,000: neighbours in the file have nothing in common


def arithmetic_records() -> Iterator[Record]:
    """Every sum of two numbers from 0 to 99, 10,000 of them, each once, in a fixed order without a pattern."""
    side = _LARGEST + 1
    for number in range(side**2):
        one, two = divmod(number * _STEP % side**2, side)
        question = f"What is {one} + {two}?"
        yield {"instruction": question, "context": "", "response": str(one + two), "category": "arithmetic"}
