"""A small fuzzer: seeded mutations of good inputs, and what may come out of a reader that they are given to.

    found = fuzz(Reader("votes", seeds, mutated_value, read), count=1000, seed=0)

A reader may take an input or refuse it by an error of ours; all else is a failure: another error, more than a second
of this thread's time, more than a gigabyte on top of what the process has.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch

SECONDS = 1.0  # of this thread, for one input
PATIENCE = 30  # seconds until a reader that hangs is ended
MEMORY = 1 << 30  # bytes of addresses, beside those that the process has
LONGEST_MESSAGE = 1500
LARGEST = 1 << 20  # bytes of an input
os.environ["RUST_BACKTRACE"] = "0"  # to find the names in one takes the tokenizers library a second

Mutate = Callable[[Any, random.Random, Sequence[Any]], Any]


class Reader(NamedTuple):
    """Something that reads what strangers wrote. `share` is how many of 100,000 inputs it is given."""

    name: str
    seeds: Sequence[Any]
    mutate: Mutate
    read: Callable[[Any], object]
    share: int = 3000


class Failure(AssertionError):
    """An input that a reader neither took nor refused as it should."""


class Found(NamedTuple):
    """How many inputs were refused and taken, the longest time for one, and that of all (seconds of this thread)."""

    refused: int
    taken: int
    slowest: float
    total: float


class TooLong(BaseException):
    """Raised in a reader that hangs."""


def fuzz(reader: Reader, count: int, seed: int) -> Found:
    """Give a reader `count` mutated inputs. Raises Failure with the first that it fails on."""
    for good in reader.seeds:  # the seeds are good, and what readers import is there before memory is limited
        reader.read(copy.deepcopy(good))
    rng = random.Random(f"{reader.name} {seed}")
    refused, slowest, total = 0, 0.0, 0.0
    with limited_memory(), watched():
        for number in range(count):
            given = reader.mutate(copy.deepcopy(rng.choice(reader.seeds)), rng, reader.seeds)
            was_refused, took = give(reader, given, f"input {number} of seed {seed}")
            refused, slowest, total = refused + was_refused, max(slowest, took), total + took
    return Found(refused, count - refused, slowest, total)


def give(reader: Reader, given: Any, which: str = "") -> tuple[bool, float]:
    """Whether the reader refused the input, and the seconds that it took. Raises Failure."""
    where = f"{reader.name}, {which}"
    start, refused = time.thread_time(), False
    signal.alarm(PATIENCE)
    try:
        reader.read(copy.deepcopy(given))
    except (ValueError, OSError) as error:
        refused, told = True, str(error)
        # Those of the libraries below do not say which file; ours do.
        if isinstance(error, (UnicodeError, json.JSONDecodeError)):
            raise Failure(f"{where}: {type(error).__name__} leaves it: {told[:300]}: {shortened(given)}") from error
        if "\n" in told or len(told) > LONGEST_MESSAGE:
            raise Failure(
                f"{where}: a message of {len(told)} characters, {told[:300]!r}: {shortened(given)}"
            ) from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Failure(f"{where}: {type(error).__name__} leaves it: {str(error)[:300]}: {shortened(given)}") from error
    finally:
        signal.alarm(0)
    took = time.thread_time() - start
    if took > SECONDS:
        raise Failure(f"{where}: took {took:.1f} s: {shortened(given)}")
    return refused, took


def shortened(given: Any) -> str:
    text = repr(given)
    return text if len(text) < 4000 else f"{text[:2000]} ... {text[-1500:]}"


@contextmanager
def limited_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def watched() -> Iterator[None]:
    def too_long(_: int, __: FrameType | None) -> None:
        raise TooLong(f"no answer within {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, too_long)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- bytes

EXTREMES = (
    0,
    1,
    7,
    127,
    255,
    256,
    65_535,
    1 << 31,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
WORDS = (
    *(
        b"\0",
        b"\n",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"{",
        b"}",
        b"[",
        b"]" * 50,
        b'"',
        b"'",
        b"\\",
        b":",
    ),
    *(b"[" * 5000, b'{"a":' * 5000, b"null", b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 5000, b"true", b"--", b"="),
    *(
        b"&a [*a, *a]",
        b"*a",
        b"!!python/object/apply:os.system ['true']",
        b"<<: *a",
        b"? ",
        b"- ",
        b"%YAML",
        b"#",
        b"|",
    ),
    *(b"{{", b"}}", b"{%", b"%}", b"{% for a in range(99999) %}", b"{% endfor %}", b" * 99999999", b" ** ", b"|list"),
    *(b".__class__", b"\x1b[2J", b"\xe2\x80\xae", b"..", b"/", b"\\u0000", b"\\ud800", b"a" * 10_000),
)


def mutated_bytes(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One to four of: a bit or byte changed, a number made extreme, a piece gone, doubled, new or of another seed."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        if rng.random() < 0.5:  # headers lie in front
            at = min(at, int(rng.expovariate(1 / 64)))
        size = rng.choice((1, 1, 2, 4, 8, 16, 64, 500))
        kind = rng.randrange(9)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            width, order = rng.choice("HIQQ"), rng.choice("<<<>")
            out[at : at + struct.calcsize(width)] = struct.pack(order + width, _fitting(width, rng, len(data)))
        elif kind == 3:
            del out[at : at + size]
        elif kind == 4:
            out[at:at] = rng.randbytes(size)
        elif kind == 5:
            out[at:at] = out[at : at + size] * rng.choice((1, 1, 2, 50))
        elif kind == 6:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            out[at : at + rng.choice((0, size))] = other[start : start + size]
        elif kind == 7:
            out[at : at + rng.choice((0, 1, size))] = rng.choice(WORDS)
        else:
            del out[at:]
    return bytes(out[:LARGEST])


def _fitting(width: str, rng: random.Random, length: int) -> int:
    limit = 1 << (8 * struct.calcsize(width))
    return (rng.choice((*EXTREMES, length, length * 8)) + rng.choice((-1, 0, 0, 1))) % limit


def mutated_text(text: str, rng: random.Random, seeds: Sequence[str]) -> str:
    """As `mutated_bytes`, for readers of str; half of the time whole lines or words move."""
    if rng.random() < 0.5:
        parts = text.splitlines(keepends=True) if rng.random() < 0.5 else text.split(" ")
        joint = "" if parts and parts[0].endswith("\n") else " "
        return joint.join(_moved(parts, rng, rng.choice(seeds).split(" ")))
    raw = mutated_bytes(utf8(text), rng, [utf8(seed) for seed in seeds])
    return raw.decode("utf-8", rng.choice(("replace", "surrogateescape", "ignore")))


def utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _moved(parts: list[str], rng: random.Random, others: list[str]) -> list[str]:
    for _ in range(rng.randint(1, 3)):
        at, to = rng.randrange(len(parts) + 1), rng.randrange(len(parts) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            del parts[at : at + 1]
        elif kind == 1:
            parts[to:to] = parts[at : at + rng.choice((1, 2, 5))]
        elif kind == 2:
            parts[at : at + 1] = [rng.choice(others)]
        else:
            parts[at:at] = [rng.choice(WORDS).decode("utf-8", "replace")]
    return parts


# ---- plain values


def odd_value(rng: random.Random) -> Any:
    """What a program may not have thought of."""
    return rng.choice(
        (
            *(None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, float("nan"), float("inf"), 1e-320),
            *(1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**30, 10**400),
            *("", " ", "a", "0", "1", "true", "none", "\0", "\n", "\ud800", "\x1b[2J", "../..", "a" * 10_000, "é" * 50),
            *([], {}, [[]], [None], ["a"], [0] * 3000, {"": {}}, {"a": 1}, {"\0": "\0"}, nest(30), nest(400)),
        )
    )


def nest(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every part of a nest, its own () last."""
    if len(at) < 40:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in items:
            yield from places(part, (*at, key))
    yield at


def part_at(value: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        value = value[key]
    return value


def mutated_value(value: Any, rng: random.Random, seeds: Sequence[Any]) -> Any:
    """One to three parts of a nest of dicts and lists replaced, taken out, doubled, renamed, exchanged, wrapped."""
    box = [value]
    for _ in range(rng.randint(1, 3)):
        *inner, at = rng.choice(list(places(box, ()))[:-1] or [(0,)])
        holder = part_at(box, tuple(inner))
        _change(holder, at, rng, seeds, deep=bool(inner))
        if not box:
            box = [None]
    return box[0]


def _change(holder: Any, at: Any, rng: random.Random, seeds: Sequence[Any], deep: bool) -> None:
    kind, part = rng.randrange(8), holder[at]
    if kind == 0 and deep:
        del holder[at]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice((f"{at}x", "", str(at).upper(), "\ud800", "model", "a" * 3000))] = holder.pop(at)
    elif kind == 2 and isinstance(holder, list) and deep:
        holder[at:at] = [copy.deepcopy(part)] * rng.choice((1, 3, 300))
    elif kind == 3:
        other = rng.choice(seeds)
        holder[at] = copy.deepcopy(part_at(other, rng.choice(list(places(other)))))
    elif kind == 4:
        holder[at] = rng.choice(([part], {"a": part}, str(part)[:5000]))
    elif kind == 5 and isinstance(part, (int, float)) and not isinstance(part, bool):
        holder[at] = rng.choice((-part, part + 1, part * 2, part - 1, part // 2, part * 10**6, part == part))
    elif kind == 5 and isinstance(part, str):
        holder[at] = mutated_text(part, rng, [part])
    elif isinstance(part, torch.Tensor) and kind < 7:
        holder[at] = mutated_tensor(part, rng)
    else:
        holder[at] = odd_value(rng)


def mutated_tensor(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    flat = tensor.flatten()
    return rng.choice(
        (
            lambda: tensor.to(rng.choice((torch.int64, torch.uint8, torch.float64, torch.bool, torch.float16))),
            lambda: flat[: rng.randrange(flat.numel() + 1)].clone(),
            lambda: tensor.clone().fill_(rng.choice((0, 1))),
            lambda: flat.view(*[1] * rng.randint(0, 9), -1).clone(),
            lambda: torch.zeros([rng.choice((0, 1, 2, 300))] * rng.randint(0, 3), dtype=tensor.dtype),
            lambda: tensor.t().contiguous() if tensor.dim() == 2 else tensor,
            lambda: torch.ones(1).expand(rng.choice((10**6, 10**12)), 10),
        )
    )()


def as_json(value: Any, rng: random.Random) -> bytes:
    """A value written as JSON, at times with bytes changed in it."""
    text = plain_json(value)
    return mutated_bytes(text, rng, [text]) if rng.random() < 0.2 else text


def plain_json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()[:LARGEST]
    except (RecursionError, ValueError):
        return b"[" * 2000


def mutated_json(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Of a file that is one JSON value."""
    return as_json(mutated_value(json.loads(data), rng, [json.loads(seed) for seed in seeds]), rng)


def mutated_lines(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Of a file of JSON lines."""
    rows = [json.loads(line) for line in data.splitlines()]
    rows = mutated_value(rows, rng, [[json.loads(line) for line in seed.splitlines()] for seed in seeds])
    rows = rows if isinstance(rows, list) else [rows]
    out = b"\n".join(map(plain_json, rows[:1000])) + rng.choice((b"\n", b"", b"\r\n\r\n"))
    return mutated_bytes(out, rng, seeds) if rng.random() < 0.2 else out
