"""Writes a checkpoint of every kind in the format of today, as tests/fixtures/format-N holds them.

    python tests/checkpoint_fixtures.py tests/fixtures/format-1

To be run once, when formats/checkpoint.py's FORMAT rises, before anything reads the new format: what is committed is
never written again, for it stands for the files that people have. Five files and two data sets, 250 kB.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from formats.checkpoint import load_checkpoint, masks_entry, save_checkpoint
from formats.compact import to_compact
from model.config import PRESETS
from model.masks import Mask
from tests.runs import train, tune
from tests.tiny import record_set, text_set

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "head_dim": 4, "n_embd": 8, "mlp_dim": 16}
RUN: dict[str, Any] = {"block_size": 64, "batch_size": 2, "total_batch_size": 256, "max_steps": 4, "sample_tokens": 4}
RUN |= {"checkpoint_interval": 2, "eval_interval": 2, "generate_interval": 0, "dropout": 0.1, "max_lr": 1e-2}
RUN["nan_policy"] = "skip"
LORA = {"finetune_method": "lora", "lora_r": 2, "batch_size": 1, "total_batch_size": 64}


def know_the_preset() -> str:
    """Makes the fixtures' network known by a name, which a resumed pretraining asks for."""
    PRESETS["fixture"] = dataclasses.replace(PRESETS["tiny"], **SIZES)
    return "fixture"


def write(folder: Path) -> None:
    """full/model_00002.pt, weights.pt, adapter/model_00002.pt, masked.pt, compact.pt, and the data of the runs.

    Under relative paths alone: no file is to know where it was made.
    """
    folder.mkdir(parents=True)
    os.chdir(folder)
    here = Path()
    text = text_set(here / "sets" / "text", n_documents=20)
    records = record_set(here / "sets" / "records", n_records=12)
    train(text, here / "full", **RUN, preset=know_the_preset())
    shutil.copy("full/best.pt", "weights.pt")
    tune(records, here / "adapter", here / "weights.pt", **{**RUN, **LORA})
    for left in {*here.glob("full/*"), *here.glob("full/.lock"), *here.glob("adapter/*"), *here.glob("adapter/.lock")}:
        if left.name != "model_00002.pt":
            left.unlink()
    payload = load_checkpoint("weights.pt")
    masks = {name: _half(weight) for name, weight in payload["model"].items() if name.endswith("_proj.weight")}
    pruned = {**payload, "model": dict(payload["model"]), **masks_entry(masks)}
    for name, mask in masks.items():
        pruned["model"][name] = torch.where(mask.dense(), payload["model"][name], 0)
    save_checkpoint("masked.pt", pruned)
    save_checkpoint("compact.pt", to_compact(pruned, masks, "f16"))


def _half(weight: torch.Tensor) -> Mask:
    """Every other block of 4 x 4."""
    grid = -(-weight.shape[0] // 4), -(-weight.shape[1] // 4)
    return Mask(tuple(weight.shape), (4, 4), torch.arange(grid[0] * grid[1]).view(grid) % 2 == 0)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
