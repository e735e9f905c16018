"""Our training step beside nanoGPT's: same network, batch, machine, in turns; prints ratios of tokens/s and of memory.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python bench/train_step.py --nanogpt ../nanoGPT

Each side lives in a process of its own (peak memory is a property of a process) and takes a step when told to, so that
pairs of steps are interleaved and a slow spell of a shared machine hits both. Float32, AdamW, clipping at 1.0, no
dropout, random tokens. The peer runs as published: its model, its `configure_optimizers`, and the step of its train.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
CASES: dict[str, dict[str, int]] = {
    "124M-4x256": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab": 50304, "batch": 4, "block": 256},
    "124M-1x1024": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab": 50304, "batch": 1, "block": 1024},
    "small-12x256": {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab": 50304, "batch": 12, "block": 256},
    "124M-4x256-frozen9": {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "vocab": 50304,
        "batch": 4,
        "block": 256,
        "freeze": 9,
    },
}


def batches(case: dict[str, int]) -> Callable[[], tuple[Any, Any]]:
    """The same random tokens for both sides: (inputs, targets), each (B, T)."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def next_batch() -> tuple[Any, Any]:
        tokens = torch.randint(0, 50257, (case["batch"], case["block"] + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return next_batch


def our_step(case: dict[str, int]) -> Callable[[], float]:
    """A step made of the parts that the training loop uses."""
    sys.path.insert(0, str(ROOT))
    import torch

    from model.config import preset
    from model.gpt import GPT
    from training.optimizer import build_optimizers, set_learning_rate
    from training.runtime import choose_runtime

    choose_runtime(torch.device("cpu"), "auto", "auto", "high")
    sizes = {
        "n_layer": case["n_layer"],
        "n_head": case["n_head"],
        "n_kv_head": case["n_head"],
        "n_embd": case["n_embd"],
    }
    sizes |= {"mlp_dim": 4 * case["n_embd"], "head_dim": case["n_embd"] // case["n_head"], "block_size": case["block"]}
    torch.manual_seed(0)
    model = GPT(preset("124M", **sizes))
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[1]) if name.startswith("h.") else -1
        parameter.requires_grad_(layer >= case.get("freeze", 0) or not case.get("freeze") or name.startswith("ln_f"))
    optimizers = build_optimizers(model, "adamw", betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    set_learning_rate(optimizers, 6e-4)
    next_batch = batches(case)

    def step() -> float:
        inputs, targets = next_batch()
        loss = model(inputs, targets) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers["adamw"].step()
        model.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def peer_step(case: dict[str, int], folder: str) -> Callable[[], float]:
    """nanoGPT's own model and optimizer, and the step of its train.py without its float16 scaler (off in float32)."""
    sys.path.insert(0, folder)
    import importlib

    import torch

    module = importlib.import_module("model")
    torch.manual_seed(0)
    sizes = {
        "n_layer": case["n_layer"],
        "n_head": case["n_head"],
        "n_embd": case["n_embd"],
        "block_size": case["block"],
    }
    model = module.GPT(module.GPTConfig(**sizes, vocab_size=case["vocab"], dropout=0.0, bias=True))
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    next_batch = batches(case)

    def step() -> float:
        inputs, targets = next_batch()
        _, loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def work(side: str, case: dict[str, int], folder: str) -> None:
    """A worker: one step for each line read; answers with seconds, loss and peak memory."""
    out = sys.stdout
    sys.stdout = sys.stderr  # what the peer prints must not mix with the answers
    step = our_step(case) if side == "ours" else peer_step(case, folder)
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_mb": peak_rss_mb()}), file=out, flush=True)


def peak_rss_mb() -> float:
    """VmHWM of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6


class Worker:
    """One side in a process of its own."""

    def __init__(self, side: str, name: str, folder: str) -> None:
        command = [sys.executable, __file__, "--worker", side, "--case", name, "--nanogpt", folder]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, float]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert isinstance(stdin, IO) or stdin is not None
        assert stdout is not None
        stdin.write("step\n")
        stdin.flush()
        answer: dict[str, float] = json.loads(stdout.readline())
        return answer

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=60)


def compare(name: str, pairs: int, folder: str) -> dict[str, float]:
    """Ratios (ours over the peer's) from interleaved pairs after one warm-up step each."""
    case = CASES[name]
    ours, peer = Worker("ours", name, folder), Worker("peer", name, folder)
    first = ours.step()["loss"], peer.step()["loss"]
    rows = []
    for index in range(pairs):
        order = (ours, peer) if index % 2 == 0 else (peer, ours)
        done = {worker: worker.step() for worker in order}
        rows.append((done[ours], done[peer]))
        print(
            f"  pair {index + 1}: ours {rows[-1][0]['seconds']:.2f} s, peer {rows[-1][1]['seconds']:.2f} s", flush=True
        )
    ours.close()
    peer.close()
    ratios = [theirs["seconds"] / own["seconds"] for own, theirs in rows]
    tokens = case["batch"] * case["block"]
    return {
        "speed": statistics.median(ratios),
        "speed_low": min(ratios),
        "speed_high": max(ratios),
        "tokens_per_s": tokens / statistics.median(own["seconds"] for own, _ in rows),
        "peer_tokens_per_s": tokens / statistics.median(theirs["seconds"] for _, theirs in rows),
        "memory": rows[-1][0]["peak_mb"] / rows[-1][1]["peak_mb"],
        "peak_mb": rows[-1][0]["peak_mb"],
        "peer_peak_mb": rows[-1][1]["peak_mb"],
        "first_loss": first[0],
        "peer_first_loss": first[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", required=True, help="folder of nanoGPT's checkout (its model.py is imported)")
    parser.add_argument(
        "--case", nargs="*", default=list(CASES), choices=list(CASES), help="what to run (default: all)"
    )
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs of steps (default 5)")
    parser.add_argument("--worker", choices=["ours", "peer"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, CASES[arguments.case[0]], arguments.nanogpt)
        return
    for name in arguments.case:
        print(name, flush=True)
        r = compare(name, arguments.pairs, arguments.nanogpt)
        print(
            f"  speed {r['speed']:.2f}x (range {r['speed_low']:.2f} to {r['speed_high']:.2f}): "
            f"{r['tokens_per_s']:.0f} against {r['peer_tokens_per_s']:.0f} tokens/s; memory {r['memory']:.2f}x: "
            f"{r['peak_mb']:.0f} against {r['peer_peak_mb']:.0f} MB; first loss {r['first_loss']:.4f} and "
            f"{r['peer_first_loss']:.4f}"
        )


if __name__ == "__main__":
    main()
