"""Masks and weights of Wanda and SparseGPT beside what their authors' own classes make of the same matrix and inputs.

    git clone https://github.com/locuslab/wanda ../wanda
    git clone https://github.com/IST-DASLab/sparsegpt ../sparsegpt
    python bench/masks.py --wanda ../wanda --sparsegpt ../sparsegpt

Wanda's repository scores and selects inside its loop over a model, so its class gives the norms of the inputs and
torch.topk the mask. Inputs are correlated and of very different sizes, as a network's are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from model.pruning.patterns import prune_n_of_m, prune_rows  # noqa: E402
from model.pruning.scores import wanda  # noqa: E402
from model.pruning.sparsegpt import sparsegpt  # noqa: E402

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536)]  # of SmolLM2-135M: (out, in)
TOKENS, BATCHES = 512, 8


def load(folder: str, module: str, name: str) -> Any:
    """A class of a clone's module."""
    sys.path.insert(0, folder)
    found = getattr(importlib.import_module(module), name)
    sys.path.remove(folder)
    return found


def problem(out: int, into: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """A weight (out, in) and batches of inputs (tokens, in)."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(into, into, generator=g) / into**0.5 * torch.rand(into, generator=g) ** 3
    return torch.randn(out, into, generator=g), [torch.randn(TOKENS, into, generator=g) @ mix for _ in range(BATCHES)]


def theirs(kind: Any, weight: Tensor, inputs: list[Tensor]) -> Any:
    """Their object for a layer, after it has seen the inputs."""
    layer = torch.nn.Linear(weight.size(1), weight.size(0), bias=False)
    layer.weight.data.copy_(weight)
    made = kind(layer)
    for batch in inputs:
        made.add_batch(batch.unsqueeze(0), layer(batch).detach())
    return made


def compare_wanda(
    kind: Any, weight: Tensor, inputs: list[Tensor], n_of_m: tuple[int, int] | None
) -> tuple[float, float]:
    """(share of equal mask bits, 0: Wanda changes no weight)."""
    scores = weight.abs() * theirs(kind, weight, inputs).scaler_row.sqrt()
    n, m = n_of_m or (weight.size(1) // 2, weight.size(1))
    lowest = scores.view(len(weight), -1, m).topk(n, dim=2, largest=False).indices
    kept = torch.ones_like(scores.view(len(weight), -1, m), dtype=torch.bool).scatter_(2, lowest, False).view_as(weight)
    ours = wanda(weight, torch.cat(inputs).square().mean(dim=0).sqrt())
    found = prune_n_of_m(ours, *n_of_m) if n_of_m else prune_rows(ours, weight.numel() // 2)
    return float((found == kept).double().mean()), 0.0


def compare_sparsegpt(
    kind: Any, weight: Tensor, inputs: list[Tensor], n_of_m: tuple[int, int] | None
) -> tuple[float, float]:
    """(share of equal mask bits, largest difference of a weight)."""
    made = theirs(kind, weight, inputs)
    with contextlib.redirect_stdout(io.StringIO()), mock.patch("torch.cuda.synchronize"):
        made.fasterprune(0.5, *(n_of_m or (0, 0)))
    x = torch.cat(inputs)
    ours, kept = sparsegpt(weight, x.t() @ x / len(x), n_of_m or 0.5)
    other = made.layer.weight.data
    return float((kept == (other != 0)).double().mean()), float((ours - other).abs().max())


def main() -> None:
    """A line for each shape, method and pattern."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wanda", required=True, help="clone of locuslab/wanda")
    parser.add_argument("--sparsegpt", required=True, help="clone of IST-DASLab/sparsegpt")
    arguments = parser.parse_args()
    methods = {
        "Wanda": (compare_wanda, load(arguments.wanda, "lib.layerwrapper", "WrappedGPT")),
        "SparseGPT": (compare_sparsegpt, load(arguments.sparsegpt, "sparsegpt", "SparseGPT")),
    }
    print("| method | pattern | matrix | equal mask bits | largest difference of a weight |\n" + "| --- " * 5 + "|")
    for name, (compare, kind) in methods.items():
        for n_of_m in (None, (2, 4), (4, 8)):
            for seed, shape in enumerate(SHAPES):
                equal, difference = compare(kind, *problem(*shape, seed), n_of_m)
                pattern = f"{n_of_m[0]}:{n_of_m[1]}" if n_of_m else "50%"
                print(f"| {name} | {pattern} | {shape[0]} x {shape[1]} | {equal:.6%} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
