"""Runs that are struck by signals, and exact comparison of what they leave.

    run = Run.pretraining(tmp_path)
    run.live(Strike("fsync model_00003.pt@3"))      # SIGKILL as the first checkpoint is about to be flushed
    run.live()                                      # --auto_resume, to the end
    assert not differences(run.folder, uninterrupted.folder)

Each life is a process of its own, forked from tests/life_server.py; tests/life_watch.py describes the events.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from formats.checkpoint import load_checkpoint
from tests.tiny import pair_set, record_set, sum_set, text_set

SERVER = Path(__file__).with_name("life_server.py")
CLOCKS = {"s_per_step", "tokens_per_s", "memory_mb"}  # what may differ between two runs that did the same
# Settings that say where and when a run is saved, not what it computes.
PER_LIFE = {"log_dir", "auto_resume", "resume", "checkpoint_path", "keep_last_n_checkpoints", "checkpoint_interval"}
PER_LIFE |= {"dist_timeout", "async_save"}
IO_KINDS = {"write", "fsync", "rename", "unlink", "aside"}


@dataclass(frozen=True)
class Strike:
    """A signal that a life sends itself just before the `nth` event (from 0) that matches the pattern `at`."""

    at: str
    nth: int = 0
    signal: int = signal.SIGKILL
    rank: int = 0


@dataclass(frozen=True)
class Life:
    """What one process did: its exit code (negative: the signal that ended it) and its events in order."""

    pid: int
    code: int
    hung: bool
    events: list[str]
    seconds: float
    log: Path

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def died_saving(self) -> bool:
        """Whether it ended between the begin and the end of writing a checkpoint, in whichever thread."""
        saves = [event.partition("@")[0] for event in self.events if event.startswith(("save ", "saved "))]
        last = {save.split()[1]: save.split()[0] for save in saves}  # of each file
        return "save" in last.values()

    @property
    def steps(self) -> list[int]:
        """The updates that it completed."""
        return [int(event.split("@")[1]) for event in self.events if event.startswith("step ")]

    @property
    def began_after(self) -> int | None:
        """The last completed update of what it started from; -1 = from the beginning; None = it did not get there."""
        begun = [event for event in self.events if event.startswith("begin ")]
        return int(begun[0].split("@")[1]) if begun else None

    @property
    def summary(self) -> dict[str, Any]:
        (text,) = [event for event in self.events if event.startswith("summary ")]
        return dict(json.loads(text.removeprefix("summary ")))

    @property
    def disk_strikes(self) -> list[Strike]:
        """SIGKILL at each write, flush, rename and removal of this life, in order."""
        seen: Counter[str] = Counter()
        strikes = []
        for event in self.events:
            if event.split()[0] in IO_KINDS:
                strikes.append(Strike(event, seen[event]))
                seen[event] += 1
        return strikes

    def describe(self) -> str:
        """For the message of a failed assertion."""
        last = self.events[-1] if self.events else "nothing"
        return f"exit code {self.code}, last event {last!r}\n{self.log.read_text()[-3000:]}"


class LifeServer:
    """The process that lives are forked from. It ends when its standard input does."""

    def __init__(self) -> None:
        self.scratch = tempfile.TemporaryDirectory(prefix="lives-")
        self.folder = Path(self.scratch.name)
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **one_thread},
        )
        self._numbers = itertools.count()
        threads = self._answer()["threads"]
        assert threads == 1, f"the server of lives has {threads} threads: forks of it may hang"
        atexit.register(self.close)

    def live(self, *, ranks: int, **request: Any) -> list[Life]:
        """One life of each process of a run, from its beginning to its end."""
        logs = [self.folder / f"life-{next(self._numbers):04d}.log" for _ in range(ranks)]
        for log in logs:
            log.touch()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**request, "ranks": ranks, "logs": list(map(str, logs))}) + "\n")
        self._process.stdin.flush()
        lives = [Life(**end, log=log) for end, log in zip(self._answer(), logs)]
        for life in lives:
            assert not life.hung, f"a life hung: {life.describe()}"
            assert life.code != 3, f"a life could not start: {life.describe()}"
        return lives

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server of lives died; its error is in the captured output"
        return json.loads(line)

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        self.scratch.cleanup()


@functools.cache
def server() -> LifeServer:
    """The one server of this test process, started at its first use."""
    return LifeServer()


@functools.cache
def text_data() -> Path:
    """26 windows of 128 tokens: 6.5 steps an epoch, so that 8 steps cross its end in the middle of a step."""
    return text_set(server().folder / "text", n_documents=57)


@functools.cache
def record_data() -> Path:
    """Records in 23 rows of 128 tokens, most of two records each."""
    return record_set(server().folder / "records", n_records=57)


@functools.cache
def pair_data() -> Path:
    """23 pairs, of which 4 make a step."""
    return pair_set(server().folder / "pairs", n_pairs=29)


@functools.cache
def sum_data() -> Path:
    """23 sums, of which 4 are the prompts of a step."""
    return sum_set(server().folder / "sums", n_records=29)


@functools.cache
def pretrained() -> Path:
    """A checkpoint to fine-tune from."""
    run = Run("pretrain", text_data(), server().folder / "pretrained", {"checkpoint_interval": 0})
    life = run.live()
    assert life.code == 0, life.describe()
    return run.checkpoint(7)


@dataclass
class Toll:
    """How hard a test was on a run: guards against kills that come too early or too late to mean anything."""

    kills: int = 0
    in_saves: int = 0  # while a checkpoint was being written
    redone: int = 0  # updates done more than once
    beginnings: int = 0  # different updates from which lives went on
    kinds: Counter[str] = field(default_factory=Counter)  # the event that was the last

    def __add__(self, other: Toll) -> Toll:
        return Toll(
            self.kills + other.kills,
            self.in_saves + other.in_saves,
            self.redone + other.redone,
            self.beginnings + other.beginnings,
            self.kinds + other.kinds,
        )

    def check(self, *, kills: int, in_saves: int, redone: int, beginnings: int, kinds: Set[str] = frozenset()) -> None:
        """Assert that it was at least so hard, and hit each of `kinds`."""
        print(f"  {self.kills} kills, {self.in_saves} inside a save, {self.redone} steps re-done, {dict(self.kinds)}")
        assert self.kills >= kills, f"only {self.kills} kills"
        assert self.in_saves >= in_saves, f"only {self.in_saves} of {self.kills} kills were inside a save"
        assert self.redone >= redone, f"only {self.redone} steps were done again: the kills came too early"
        assert self.beginnings >= beginnings, f"only {self.beginnings} beginnings: no progress between the kills"
        assert kinds <= set(self.kinds), f"never struck: {kinds - set(self.kinds)}"


@dataclass
class Run:
    """One folder and one set of settings, lived in as many lives as it takes."""

    kind: str  # "pretrain" or "finetune"
    data_dir: Path
    folder: Path
    changes: dict[str, Any] = field(default_factory=dict)  # to the tiny settings of tests/tiny.py
    lives: list[Life] = field(default_factory=list)

    def live(self, *strikes: Strike, **options: Any) -> Life:
        """Start, or go on by --auto_resume, until a strike ends it or it is done. Options: see `live_together`."""
        (life,) = self.live_together(*strikes, ranks=1, **options)
        return life

    def live_together(
        self,
        *strikes: Strike,
        ranks: int,
        after_s: float | None = None,  # SIGKILL comes after so many seconds
        sabotage: Sequence[str] = (),  # parts of resuming to break
        forwarded_s: float = 3.0,  # within which an equal signal counts as forwarded
        plots: bool = False,  # draw curves.png in earnest
        argv: Sequence[str] | None = None,  # a command line in place of the tiny settings
        **more: Any,  # changes to the settings, for this life only
    ) -> list[Life]:
        """The same as several processes under gloo; the life of each rank, of which the first is kept in `lives`."""
        lives = server().live(
            kind=self.kind,
            data_dir=str(self.data_dir),
            log_dir=str(self.folder),
            pretrained=str(pretrained()) if self.kind == "finetune" else None,
            argv=argv,
            changes={"auto_resume": True, **self.changes, **more},
            strikes=[strike.__dict__ for strike in strikes],
            ranks=ranks,
            after_s=after_s,
            sabotage=list(sabotage),
            forwarded_s=forwarded_s,
            plots=plots,
        )
        self.lives.append(lives[0])
        return lives

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"model_{step:05d}.pt"

    def steps_on_disk(self) -> list[int]:
        """The steps of the numbered checkpoints, in order."""
        matches = (re.match(r"^model_(\d+)\.pt$", file.name) for file in self.folder.glob("*"))
        return sorted(int(match[1]) for match in matches if match)

    @property
    def newest(self) -> int:
        """The step of the newest numbered checkpoint; -1 = none."""
        return max(self.steps_on_disk(), default=-1)

    def files(self) -> set[str]:
        """The names in the folder, without what was set aside."""
        return {file.name for file in self.folder.iterdir() if not file.name.startswith("earlier-")}

    def status(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "status.json").read_text()))

    @property
    def toll(self) -> Toll:
        """What its lives went through."""
        done = [step for life in self.lives for step in life.steps]
        killed = [life for life in self.lives if life.killed]
        began = [life.began_after for life in self.lives if life.began_after is not None]
        return Toll(
            kills=len(killed),
            in_saves=sum(life.died_saving for life in killed),
            redone=len(done) - len(set(done)),
            beginnings=len(set(began)),
            kinds=Counter(life.events[-1].split()[0] for life in killed if life.events),
        )


def pretraining(folder: Path, **changes: Any) -> Run:
    return Run("pretrain", text_data(), folder, changes)


def finetuning(folder: Path, **changes: Any) -> Run:
    data = {"dpo": pair_data, "grpo": sum_data}.get(changes.get("objective", "sft"), record_data)
    return Run("finetune", data(), folder, changes)


@functools.cache
def _uninterrupted(kind: str, changes: tuple[tuple[str, Any], ...]) -> Run:
    make = finetuning if kind == "finetune" else pretraining
    name = "-".join([kind, *(f"{key}={value}" for key, value in changes)])
    run = make(server().folder / f"whole-{name}"[:200], **dict(changes))
    life = run.live(keep_last_n_checkpoints=0)
    assert life.code == 0 and life.summary["finished"], life.describe()
    return run


def uninterrupted(run: Run) -> Run:
    """The same run in one life, with every checkpoint kept; made once for each set of settings."""
    return _uninterrupted(run.kind, tuple(sorted(run.changes.items())))


# -- comparison, to the last bit -------------------------------------------------------------------------------------


def differences(one: Path, other: Path) -> list[str]:
    """What two runs' folders differ in: newest checkpoint, best.pt, metrics and samples; clocks aside."""
    found = []
    newest = [max(folder.glob("model_*.pt"), default=folder / "none") for folder in (one, other)]
    if newest[0].name != newest[1].name:
        found.append(f"newest checkpoint: {newest[0].name}, {newest[1].name}")
    else:
        found += checkpoint_differences(*newest)
    if (one / "best.pt").exists() or (other / "best.pt").exists():
        found += checkpoint_differences(one / "best.pt", other / "best.pt")
    for name in ("metrics.jsonl", "samples.jsonl"):
        found += [f"{name}: {left} | {right}" for left, right in
                  itertools.zip_longest(records(one, name), records(other, name)) if left != right]  # fmt: skip
    return found


def checkpoint_differences(one: Path, other: Path) -> list[str]:
    """The entries in which two checkpoint files differ."""
    left, right = entries(one), entries(other)
    return [f"{one.name}: {key}" for key in sorted(set(left) | set(right)) if left.get(key) != right.get(key)]


def entries(path: Path) -> dict[str, Any]:
    """Every value of a checkpoint under its dotted name, floats and tensors by their bits."""
    now = path.stat()
    return _entries(path, now.st_ino, now.st_mtime_ns, now.st_size)


@functools.lru_cache(maxsize=100)  # references are compared with again and again
def _entries(path: Path, *version: int) -> dict[str, Any]:
    payload = load_checkpoint(path, require_digest=True)
    for name in PER_LIFE:
        payload["settings"].pop(name)
    for entry in ("base", "reference"):
        payload.get(entry, {}).pop("path", None)  # from the folder of the run to the model that it started from
    for name in CLOCKS:
        payload.get("progress", {}).get("last_record", {}).pop(name, None)
    return dict(_flatten(payload, ""))


def _flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        yield name, (str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _flatten(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        yield name, len(value)
        for number, part in enumerate(value):
            yield from _flatten(part, f"{name}.{number}")
    else:
        yield name, value.hex() if isinstance(value, float) else value


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's record without its clocks; a torn last line is an error."""
    path = folder / name
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in lines]
