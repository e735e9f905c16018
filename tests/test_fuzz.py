"""A hundred thousand mutated inputs over every reader: each is taken, or refused by an error of ours, within a second.

A failure shows reader, seed and input. It becomes a case of tests/fuzz_corpus.py when its reader is mended.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from tests.fuzz import Failure, Found, Reader, fuzz, give, limited_memory, mutated_value, watched
from tests.fuzz_corpus import CASES
from tests.fuzz_readers import readers

INPUTS = 100_000
FAST = 3_000  # of them in every run of the tests


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Reader]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on pickles of other protocols
        yield {reader.name: reader for reader in readers(tmp_path_factory.mktemp("fuzz") / "readers")}


def of_all(known: dict[str, Reader], inputs: int, seed: int) -> int:
    """Gives all readers together about so many inputs, each its share; how many it were."""
    shares = sum(reader.share for reader in known.values())
    assert shares >= INPUTS
    given = 0
    for reader in known.values():
        count = -(-reader.share * inputs // shares)
        found = fuzz(reader, count, seed)
        print(f"{reader.name:28} {line(found)}")
        given += count
    return given


def line(found: Found) -> str:
    counts = f"{found.refused + found.taken:6,} inputs, {found.refused:6,} refused"
    return f"{counts}, slowest {found.slowest:.3f} s, all {found.total:.1f} s"


def test_only_our_errors_leave_a_reader(known: dict[str, Reader]) -> None:
    assert of_all(known, FAST, seed=0) >= FAST


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_only_our_errors_leave_a_reader_at_length(known: dict[str, Reader], part: int) -> None:
    assert of_all(known, INPUTS // 4, seed=1 + part) >= INPUTS // 4


def test_what_once_failed_is_refused_or_taken(known: dict[str, Reader]) -> None:
    with limited_memory(), watched():
        for name, cases in CASES.items():
            for number, case in enumerate(cases):
                give(known[name], case, f"case {number}")


def test_mutations_are_taken_as_well_as_refused(known: dict[str, Reader]) -> None:
    """Mutations that are all refused at the first glance would test the first glance alone."""
    for name in ("checkpoint, entries", "GPTConfig", "records", "config.json", "GGUF, metadata", "chat template"):
        found = fuzz(known[name], 60, seed=9)
        assert found.refused and found.taken, f"{name}: {line(found)}"


# ---- the fuzzer itself


def failing(error: BaseException | None, work: int = 0) -> Reader:
    def read(value: object) -> None:
        if value == "good":
            return
        sum(range(work))
        if error is not None:
            raise error

    return Reader("sham", ["good"], lambda *_: "bad", read)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"), TypeError("x"), RecursionError(), MemoryError(), RuntimeError("x"), AssertionError(),
        SystemExit(2), OverflowError("x"), ValueError("two\nlines"), ValueError("long" * 1000),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "nameless"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_the_fuzzer_notices_errors_that_are_not_ours(error: BaseException) -> None:
    with pytest.raises(Failure, match="sham, input 0 of seed 0"):
        fuzz(failing(error), 1, seed=0)


def test_the_fuzzer_notices_what_takes_long_or_much() -> None:
    with pytest.raises(Failure, match="took"):
        fuzz(failing(None, work=300_000_000), 1, seed=0)
    greedy = failing(None)._replace(read=lambda value: value == "good" or bytearray(8 << 30))
    with pytest.raises(Failure, match="MemoryError"):
        fuzz(greedy, 1, seed=0)
    assert fuzz(failing(ValueError("refused")), 5, seed=0)[:2] == (5, 0)
    assert fuzz(failing(None), 5, seed=0)[:2] == (0, 5)


def test_one_seed_gives_the_same_inputs() -> None:
    seen: list[list[str]] = []
    for _ in range(2):
        seen.append([])
        note = seen[-1].append
        seeds = [{"a": [1, "b", None], "c": {"d": 2.5}}]
        fuzz(Reader("r", seeds, mutated_value, lambda value, note=note: note(repr(value))), 50, seed=3)
    assert seen[0] == seen[1] and len(set(seen[0])) > 30
