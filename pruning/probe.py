"""The other side of `pruning.measure.Probe`: python -m pruning.probe MODEL DEVICE, then a command a line.

run: {"tokens", "seconds"} of one generation. end: {"peak_memory_mb", "weights"}, and the process ends.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from formats.open_model import OpenModel, open_model
from model.generate import generate
from model.gpt import GPT
from model.pack import for_generation
from training.distributed import choose_device
from training.runtime import peak_memory_mb, synchronize

PROMPT, NEW = 32, 64  # tokens, where the model's context has room for them


def quickest(model: GPT) -> str:
    """Makes the model ready for generation, without its zeros where they pay; returns how, as `sample.py --weights`."""
    try:
        for_generation(model, "sparse")
    except ValueError:  # a dense model, or zeros that nothing is gained from
        for_generation(model)
        return "float32"
    return "sparse"


def generation(opened: OpenModel) -> dict[str, Any]:
    """One greedy generation from random tokens, always the same."""
    limit = opened.model.context_length
    prompt, new = min(PROMPT, limit // 2), min(NEW, limit // 2)
    ids = torch.randint(opened.model.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0))
    device = opened.model.wte.weight.device
    synchronize(device)
    began = time.perf_counter()
    (answer,) = generate(opened.model, [ids.tolist()], max_new_tokens=new, temperature=0.0)
    synchronize(device)
    return {"tokens": len(answer), "seconds": time.perf_counter() - began}


def main(ref: str, device: str) -> None:
    """Open the model, answer commands until `end`."""
    opened = open_model(ref, choose_device(device))
    weights = quickest(opened.model)
    for line in sys.stdin:
        if line.strip() == "end":
            peak = peak_memory_mb(opened.model.wte.weight.device)
            print(json.dumps({"peak_memory_mb": peak, "weights": weights}), flush=True)
            return
        print(json.dumps(generation(opened)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
