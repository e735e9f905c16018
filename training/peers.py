"""Which process of a run is gone: each beats through the store that torchrun provides, and hears the others.

A process that dies closes its connections: the others fail in their next exchange, with words that name no process.
One that hangs does nothing, and they wait. So each has a thread that writes a line a second into the store: that it
lives, and where its main thread is. The thread goes on through long work (an evaluation, a compilation), and stops
with its process, however that ends. No clocks are compared: a line that does not change is silence.

Rank 0 hears all, the others hear rank 0, those on their own machine, and what any of them found: three requests a
process and second, so that 1,024 processes on machines of 8 cost the store about 700 KB a second. No torch here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

BEAT_S = 1.0
ANSWER_S = 3.0  # the store's time to answer
SILENT_S = 3.5  # where an exchange failed, a process that missed three beats is why
LEAVE_S = 20.0  # for the others to notice by themselves, and save what they are at; torchrun kills after 30
LAST_WORDS_S = 5.0  # for log and status on a disk that may hang as well
AWAY_S = 8.0  # a round takes BEAT_S + 2 * ANSWER_S at most: after a longer one it was this process that stood still

ROOT = Path(__file__).resolve().parent.parent
_LIVES, _LEFT, _FAILED = "lives", "left", "failed"  # the first word of a process's line
_VERDICT = "verdict"  # the key of what one of them found


class PeersLost(RuntimeError):
    """Another process of the run is gone, and this one cannot go on. One line; scripts end with exit code 1."""


class Store(Protocol):
    """What is used of torch's TCPStore. Each raises RuntimeError where the store does not answer."""

    def set(self, key: str, value: str) -> None: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


@dataclass(frozen=True)
class Member:
    """One process, as the others name it; `born` (of /proc) tells it from a later one under its number."""

    rank: int
    host: str
    pid: int
    born: str

    @classmethod
    def this(cls, rank: int) -> Member:
        return cls(rank, socket.gethostname(), os.getpid(), _born(os.getpid()))

    @property
    def is_here(self) -> bool:
        """On this machine, where its death can be seen."""
        return bool(self.born) and self.host == socket.gethostname()

    @property
    def is_dead(self) -> bool:
        """Known to be; False for one on another machine."""
        return self.is_here and _born(self.pid) != self.born

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


def blame(member: Member) -> str:
    """A silent process, and what became of it as far as that is known here.

    One that hangs on this machine gets SIGKILL: SIGTERM means nothing to it when it is stopped, and torchrun would
    wait for it for 30 s.
    """
    if not member.is_here:
        return f"{member} is gone or hangs"
    if member.is_dead:
        return f"{member} is gone"
    with contextlib.suppress(OSError):
        os.kill(member.pid, signal.SIGKILL)
    return f"{member} hangs"


@dataclass(frozen=True)
class _Finding:
    """Why the run cannot go on: of `member`, where it is silent."""

    text: str
    member: Member | None = None

    def reason(self) -> str:
        return self.text if self.member is None else f"{blame(self.member)}{self.text}"


@dataclass
class _Heard:
    """The last line of a process, and since when it has been that (this process's clock)."""

    line: str
    since: float


class Peers:
    """Beats for this process and hears the others from `start` to `leave`.

    connect: a connection to the store, of its own each time, that waits ANSWER_S for an answer. Every process must
    have beaten once before any hears (`beat`, then a barrier).
    agent: the address of torchrun's agent that has the store; None where rank 0 has it.
    last_words: makes the line of the reason, and may note it down; it is called once, in whichever thread.
    """

    def __init__(
        self,
        members: Sequence[Member],
        rank: int,
        connect: Callable[[], Store],
        agent: str | None,
        timeout_s: float,
        last_words: Callable[[str], str],
    ) -> None:
        self.members, self.rank = members, rank
        self._agent = agent
        self.timeout_s, self.last_words = timeout_s, last_words
        self._connect = connect
        self._store: Store | None = None
        self._beats = 0
        self._heard: dict[int, _Heard] = {}
        self._answered = time.monotonic()
        self._ended, self._speaking = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._live, name="peers", daemon=True)

    def beat(self) -> None:
        """One beat now; the first makes this process known."""
        self._beats += 1
        self._write(f"{_LIVES} {time.strftime('%H:%M:%S')} {self._beats} {_place()}")

    def start(self) -> None:
        """Begin to hear."""
        self._thread.start()

    def leave(self, error: BaseException | None = None) -> None:
        """The last line: it left in order, or failed of its own, which the others then say."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(3 * ANSWER_S)
        with contextlib.suppress(RuntimeError):  # the store may be gone by now
            self._write(_LEFT if error is None else f"{_FAILED} {type(error).__name__}: {_one_line(error)}")

    def explain(self) -> PeersLost:
        """After a failed exchange: who is gone."""
        self._speaking.acquire()  # for good: the thread has no more to say
        try:
            silent, lines = self._look()
        except RuntimeError:
            return PeersLost(self.last_words(self._no_store("").reason()))
        failed = [rank for rank, line in lines.items() if line.startswith(_FAILED)]
        if silent:
            reason = "; ".join(f"{blame(self.members[rank])}, {_last(lines[rank])}" for rank in silent)
        elif failed:
            reason = "; ".join(self._failure(rank, lines[rank]) for rank in failed)
        else:
            reason = f"the processes did not meet, though none is dead ({self._places(lines)})"
        if self.rank == 0 and self._agent is None:
            self._leave_with_store(reason)
        return PeersLost(self.last_words(reason))

    def _leave_with_store(self, reason: str) -> None:
        """The store lives in this process. Others may be asking it, or wait in their exchange for this process alone,
        which they would take for the one that is gone: they are told.
        """
        with contextlib.suppress(RuntimeError):
            self._connect().set(_VERDICT, reason)
        time.sleep(2 * BEAT_S + (0.0 if all(member.is_here for member in self.members) else SILENT_S))

    def _look(self) -> tuple[list[int], dict[int, str]]:
        """Who is silent, and the last line of each. Takes SILENT_S, in which whoever lives beats, or until a process of
        this machine is seen to be dead that did not say that it leaves. Raises RuntimeError where the store is gone.
        """
        if self._agent is None and self.members[0].is_dead:
            raise RuntimeError("its process is dead")
        store, until = self._connect(), time.monotonic() + SILENT_S
        before = self._read(store, self._others)
        while time.monotonic() < until:
            dead = [rank for rank in self._others if self.members[rank].is_dead]
            lines = self._read(store, self._others) if dead else {}
            if died := [rank for rank in dead if lines[rank].startswith(_LIVES)]:
                return died, lines
            time.sleep(0.1)
        after = self._read(store, self._others)
        return [rank for rank, line in after.items() if line == before[rank] and line.startswith(_LIVES)], after

    # -- the thread --------------------------------------------------------------------------------------------------

    def _live(self) -> None:
        """Beat and hear until this process leaves, or must."""
        before = time.monotonic()
        while not self._ended.wait(BEAT_S):
            now = time.monotonic()
            if now - before > AWAY_S:  # stopped, or the machine slept: no ground to judge others
                self._answered = now
                for heard in self._heard.values():
                    heard.since = now
            before = now
            finding = self._round()
            if finding is not None and self._speaking.acquire(blocking=False):
                self._give_up(finding.reason())

    def _round(self) -> _Finding | None:
        """A beat, and what the store says; returns why the run cannot go on, if so."""
        ranks = [rank for rank in self._others if 0 in (self.rank, rank) or self.members[rank].is_here]
        try:
            self.beat()
            assert self._store is not None
            lines = self._read(self._store, ranks)
            (verdict,) = self._store.multi_get([_VERDICT])
        except RuntimeError:
            self._store = None
            silent_s = time.monotonic() - self._answered
            return self._no_store(f": silent for {silent_s:.0f} s") if silent_s > self.timeout_s else None
        self._answered = now = time.monotonic()
        if verdict:
            return _Finding(verdict.decode())
        for rank, line in lines.items():
            if rank not in self._heard or self._heard[rank].line != line:
                self._heard[rank] = _Heard(line, now)
        return self._judge(lines, now)

    def _judge(self, ranks: Iterable[int], now: float) -> _Finding | None:
        for rank in ranks:
            line, silent_s = self._heard[rank].line, now - self._heard[rank].since
            if line.startswith(_FAILED) and silent_s > LEAVE_S:
                return _Finding(self._failure(rank, line))
            limit_s = min(self.timeout_s, LEAVE_S) if self.members[rank].is_dead else self.timeout_s
            if line.startswith(_LIVES) and silent_s > limit_s:
                return _Finding(f": silent for {silent_s:.0f} s, {_last(line)}", self.members[rank])
        return None

    def _give_up(self, reason: str) -> None:
        """End this process, whose main thread waits for one that does not come."""
        last = threading.Timer(LAST_WORDS_S, os._exit, (1,))
        last.daemon = True
        last.start()
        print(f"error: {self.last_words(reason)}", file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):
            self._connect().set(_VERDICT, reason)
        if self.rank == 0:
            time.sleep(2 * BEAT_S)  # the store may live in this process: the others read it first
        os._exit(1)

    # -- the store ---------------------------------------------------------------------------------------------------

    @property
    def _others(self) -> list[int]:
        return [member.rank for member in self.members if member.rank != self.rank]

    def _write(self, line: str) -> None:
        if self._store is None:
            self._store = self._connect()
        self._store.set(str(self.rank), line)
        if self.rank == 0 and self._beats == 1:
            self._store.set(_VERDICT, "")

    def _read(self, store: Store, ranks: list[int]) -> dict[int, str]:
        values = store.multi_get([str(rank) for rank in ranks])
        return {rank: value.decode(errors="replace") for rank, value in zip(ranks, values)}

    def _no_store(self, text: str) -> _Finding:
        """Whoever keeps the store has not answered."""
        if self._agent is None:
            return _Finding(text, self.members[0])
        return _Finding(f"torchrun at {self._agent}, which started rank 0, is gone or hangs{text}")

    def _failure(self, rank: int, line: str) -> str:
        return f"{self.members[rank]} failed: {line.removeprefix(_FAILED).strip()}"

    def _places(self, lines: dict[int, str]) -> str:
        """Where each is, those who are alone in a place first: they are who the others wait for."""
        lines = {**lines, self.rank: f"{_LIVES} now 0 {_place()}"}
        at: dict[str, list[int]] = {}
        for rank in sorted(lines):
            at.setdefault(lines[rank].split(" ", 3)[-1], []).append(rank)
        groups = sorted(at.items(), key=lambda item: len(item[1]))
        return "; ".join(f"rank {', '.join(map(str, ranks))}: {place}" for place, ranks in groups)


def _last(line: str) -> str:
    _, clock, _, place = line.split(" ", 3)
    return f"last heard of at {clock} in {place}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _place() -> str:
    """Where in this repository the main thread is: `training/loop.py:212`."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        inside = path.is_relative_to(ROOT) and ".venv" not in path.parts
        if inside and path.name not in ("peers.py", "watch_peers.py", "distributed.py"):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "the start"


def _born(pid: int) -> str:
    """When a process started, in ticks since the boot; empty where that is not known or it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def die_with_launcher() -> None:
    """Have the kernel end this process when torchrun's agent dies: left behind it would hold GPUs and ports, and go on
    writing checkpoints beside the job that is started again. Linux only; does nothing without torchrun.

    An agent that died before this call is not seen here; its store is gone with it, and the process group not joined.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        parent, set_death_signal = os.getppid(), 1  # PR_SET_PDEATHSIG of linux/prctl.h; execve keeps it, fork does not
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)
