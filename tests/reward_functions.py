"""Rewards that tests name by path/to/file.py:function."""

from __future__ import annotations


def letters(prompt: str, completion: str, reference: str) -> float:
    """The share of letters in a completion: any model's completions differ in it."""
    return sum(character.isalpha() for character in completion) / max(1, len(completion))


def text(prompt: str, completion: str, reference: str) -> str:
    """What is no number."""
    return "good"


def nothing(prompt: str, completion: str, reference: str) -> float:
    """A number that is none."""
    return float("nan")


def failing(prompt: str, completion: str, reference: str) -> float:
    """A mistake in the user's program."""
    return {"a": 1.0}[reference + "!"]
