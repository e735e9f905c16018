"""One process with two threads beside two processes with one each, under --parallel ddp, zero1 and fsdp: tokens/s.

    python bench/parallel.py
    python bench/parallel.py --preset tiny --batch 8 --accumulate 4 --rounds 10
    python bench/parallel.py --gradient_checkpointing --ways one fsdp

All take a step of the same size in turns, each in processes of its own: micro-batches, the exchange of gradients,
clipping, AdamW, what an optimizer sends. Random tokens, float32, gloo. Peak memory is that of the first process, with
its libraries (0.3 GB).
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.side_by_side import Worker, answer_calls, interleave  # noqa: E402

WAYS = ("one", "ddp", "zero1", "fsdp")


def build(arguments: argparse.Namespace) -> Callable[[], dict[str, Any]]:
    """The function that takes one step in this process and returns its seconds."""
    import torch

    from model.config import preset
    from model.gpt import GPT
    from training.distributed import setup_distributed
    from training.optimizer import build_optimizers, set_learning_rate
    from training.parallel import choose_parallel
    from training.run_settings import TrainSettings
    from training.runtime import choose_runtime

    torch.set_num_threads(2 if arguments.side == "one" else 1)
    here = setup_distributed("cpu")
    torch.manual_seed(0)
    model = GPT(preset(arguments.preset, block_size=arguments.block)).train()
    model.gradient_checkpointing = arguments.gradient_checkpointing
    settings = TrainSettings(parallel="ddp" if arguments.side == "one" else arguments.side)
    runtime = choose_runtime(here.device, "float32", "off", "high")
    parallel = choose_parallel(settings, here, model, None, runtime)
    how: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
    optimizers = build_optimizers(model, "adamw", **how, placement=parallel)
    set_learning_rate(optimizers, 6e-4)
    parallel.wrap()
    accumulate = arguments.accumulate // here.world_size
    tokens = torch.randint(0, model.config.vocab_size, (accumulate, arguments.batch, arguments.block + 1))
    count = tokens[..., 1:].numel() * here.world_size

    def step() -> dict[str, Any]:
        here.barrier()
        started = time.perf_counter()
        for number in range(accumulate):
            parallel.begin_micro_step(number, last=number == accumulate - 1)
            inputs, targets = tokens[number, :, :-1].contiguous(), tokens[number, :, 1:].contiguous()
            (parallel.network(inputs, targets) * (parallel.gradient_scale / count)).backward()
            parallel.end_micro_step(number)
        parallel.finish_gradients()
        parallel.clip(1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        model.zero_grad(set_to_none=True)
        here.barrier()
        return {"seconds": time.perf_counter() - started, "tokens": count}

    return step


def two_processes(arguments: argparse.Namespace) -> None:
    """Answer calls with one more process, which takes each step too, and ends when this one has no more calls."""
    import torch
    import torch.distributed as dist

    if arguments.rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        other = subprocess.Popen([sys.executable, *sys.argv, "--rank", "1"], stdin=subprocess.DEVNULL, stdout=2)
    os.environ |= {"RANK": str(arguments.rank), "LOCAL_RANK": str(arguments.rank)}
    go_on = torch.ones(1)

    def led() -> Callable[[], dict[str, Any]]:
        step = build(arguments)

        def answer() -> dict[str, Any]:
            dist.broadcast(go_on, 0)
            return step()

        return answer

    if arguments.rank == 0:
        answer_calls(led)
        dist.broadcast(torch.zeros(1), 0)
        other.wait(timeout=60)
    else:
        step = build(arguments)
        while dist.broadcast(go_on, 0) is None and go_on:
            step()
    dist.destroy_process_group()


def main() -> None:
    """Both sides of the comparison: this process, and with --side one of those that take the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="124M", help="network (default 124M)")
    parser.add_argument("--batch", type=int, default=1, help="windows of a micro-batch (default 1)")
    parser.add_argument("--block", type=int, default=256, help="tokens of a window (default 256)")
    parser.add_argument(
        "--accumulate", type=int, default=4, help="micro-batches of a step, of all processes (default 4)"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute each block in backward")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each, in turns (default 5)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="what takes part; one comes first")
    parser.add_argument("--side", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side == "one":
        answer_calls(lambda: build(arguments))
        return
    if arguments.side is not None:
        two_processes(arguments)
        return
    workers = [Worker(__file__, [*sys.argv[1:], "--side", way]) for way in arguments.ways]
    answers = interleave(workers, arguments.rounds)
    size = f"{arguments.preset}, {arguments.accumulate} micro-batches of {arguments.batch} x {arguments.block} a step"
    print(f"{size}\n\n| way | tokens/s | of the first (range) | peak memory, MB |\n" + "| --- " * 4 + "|")
    for way, rounds in zip(arguments.ways, answers):
        ratios = [first["seconds"] / each["seconds"] for first, each in zip(answers[0], rounds)]
        speed = statistics.median(each["tokens"] / each["seconds"] for each in rounds)
        print(
            f"| {way} | {speed:,.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{max(each['peak_mb'] for each in rounds):,.0f} |"
        )


if __name__ == "__main__":
    main()
