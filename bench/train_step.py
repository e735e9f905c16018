"""Our training step beside nanoGPT's: same network, batch, machine, in turns; prints ratios of tokens/s and of memory.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python bench/train_step.py --nanogpt ../nanoGPT

Each side lives in a process of its own (peak memory is a property of a process) and takes a step when told to, so that
pairs of steps are interleaved and a slow spell of a shared machine hits both. Float32, AdamW, clipping at 1.0, no
dropout, random tokens. The peer runs as published: its model, its `configure_optimizers`, and the step of its train.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.side_by_side import Worker, answer_calls, interleave  # noqa: E402

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


def timed(step: Callable[[], float]) -> dict[str, float]:
    """Seconds and loss of one step."""
    started = time.perf_counter()
    loss = step()
    return {"seconds": time.perf_counter() - started, "loss": loss}


def compare(name: str, pairs: int, folder: str) -> dict[str, float]:
    """Ratios (ours over the peer's) from interleaved pairs after one warm-up step each."""
    case = CASES[name]
    flags = ["--case", name, "--nanogpt", folder]
    ours, peer = (Worker(__file__, [*flags, "--worker", side]) for side in ("ours", "peer"))
    first = ours.step()["loss"], peer.step()["loss"]
    rows = list(zip(*interleave([ours, peer], pairs)))
    for index, (own, theirs) in enumerate(rows):
        print(f"  pair {index + 1}: ours {own['seconds']:.2f} s, peer {theirs['seconds']:.2f} s", flush=True)
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
        case = CASES[arguments.case[0]]
        build = (lambda: our_step(case)) if arguments.worker == "ours" else (lambda: peer_step(case, arguments.nanogpt))
        answer_calls(lambda: partial(timed, build()))
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
