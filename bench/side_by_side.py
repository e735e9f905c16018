"""Two sides that take turns, each in a process of its own: peak memory is a property of a process, and interleaved
pairs let a slow spell of a shared machine hit both."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def answer_calls(build: Callable[[], Callable[[], dict[str, Any]]]) -> None:
    """In a worker: one step for each line read; what it returns goes back with the peak memory of this process."""
    out = sys.stdout
    sys.stdout = sys.stderr  # what a peer prints must not mix with the answers
    step = build()
    for _ in sys.stdin:
        print(json.dumps({**step(), "peak_mb": peak_rss_mb()}), file=out, flush=True)


def peak_rss_mb() -> float:
    """VmHWM of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6


class Worker:
    """One side: a Python script that ends in `answer_calls`."""

    def __init__(self, script: str, arguments: Sequence[str]) -> None:
        command = [sys.executable, script, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, Any]:
        """Have it take a step; its answer."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write("step\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with code {self.process.wait()}: {' '.join(self.process.args)}")  # type: ignore[arg-type]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=60)


def interleave(workers: Sequence[Worker], rounds: int) -> list[list[dict[str, Any]]]:
    """The answers of each worker, in turns and in alternating order, after one step each to warm up (left out)."""
    for worker in workers:
        worker.step()
    answers: list[list[dict[str, Any]]] = [[] for _ in workers]
    for index in range(rounds):
        order = list(range(len(workers)))
        for place in order if index % 2 == 0 else reversed(order):
            answers[place].append(workers[place].step())
    for worker in workers:
        worker.close()
    return answers
