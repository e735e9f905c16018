"""The head and its loss, forward and backward: plain cross entropy, ours, and torch's linear_cross_entropy, in turns.

    python bench/loss.py [--rounds 5] [--chunks 128 256 512]

Each way lives in its own process, so that its peak memory is its own; the parent lets them run one after the other,
round by round, so that all meet the same machine. Prints tokens/s against plain (median of the rounds' ratios; on a
shared machine, under 1.12x is noise) and the growth of resident memory during a step. Memory needs Linux.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SHAPES = ((1024, 50_304, 768), (4096, 50_304, 384))  # N, V, C: GPT-2 124M at 4 x 256 tokens; a small model at 16 x 256


def loss_function(way: str) -> Callable:
    """The summed loss as a function of hidden (N, C), weight (V, C) and targets (N,)."""
    import torch
    import torch.nn.functional as F

    from model.loss import linear_cross_entropy_sum

    if way == "plain":
        return lambda x, w, t: F.cross_entropy(F.linear(x, w), t, reduction="sum")
    if way == "torch":
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda x, w, t: F.linear_cross_entropy(x, w, t, reduction="sum", options=options)
    chunk = int(way.removeprefix("ours ")) if way != "ours" else None
    return lambda x, w, t: linear_cross_entropy_sum(x, w, t, w.size(0), chunk)


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak since the last reset) of this process, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def serve(pipe: Connection, way: str, shape: tuple[int, int, int], threads: int) -> None:
    """A worker: one step for each message received, answered by (seconds, MB of growth, loss)."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    N, V, C = shape
    function = loss_function(way)
    weight = (0.02 * torch.randn(V, C)).requires_grad_()
    while pipe.recv():
        hidden, targets = torch.randn(N, C, requires_grad=True), torch.randint(V, (N,))
        weight.grad = None
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before, start = memory_mb("VmRSS"), time.perf_counter()
        loss = function(hidden, weight, targets) / N
        loss.backward()
        pipe.send((time.perf_counter() - start, memory_mb("VmHWM") - before, loss.item()))


def compare(ways: list[str], shape: tuple[int, int, int], rounds: int, threads: int) -> None:
    context = get_context("spawn")
    workers = []
    for way in ways:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, way, shape, threads))
        process.start()
        workers.append((way, process, ours))
    results: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, _, pipe in workers:
            pipe.send(True)
            answer = pipe.recv()
            if turn:  # the first turn warms up
                results[way].append(answer)
    for _, process, pipe in workers:
        pipe.send(False)
        process.join()
    print(f"N {shape[0]}  V {shape[1]}  C {shape[2]}, {threads} threads, {rounds} rounds")
    print(f"{'way':10} {'tokens/s':>9} {'x plain':>8} {'all ratios':>30} {'growth MB':>10} {'loss':>9}")
    for way in ways:
        ratios = [plain[0] / mine[0] for plain, mine in zip(results[ways[0]], results[way])]
        seconds, growth, loss = (statistics.median(column) for column in zip(*results[way]))
        shown = " ".join(f"{ratio:.2f}" for ratio in ratios)
        speed = shape[0] / seconds
        print(f"{way:10} {speed:9.0f} {statistics.median(ratios):8.2f} {shown:>30} {growth:10.0f} {loss:9.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one of warm-up (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (default 2)")
    parser.add_argument("--chunks", type=int, nargs="*", default=[], help="also run ours with these chunks, rows")
    args = parser.parse_args()
    for shape in SHAPES:
        compare(["plain", "ours", "torch", *(f"ours {n}" for n in args.chunks)], shape, args.rounds, args.threads)


if __name__ == "__main__":
    main()
