"""What prune.py writes: weights-only checkpoints, with masks, and where asked without zeros."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from formats.checkpoint import load_checkpoint, masks_entry, payload_masks
from formats.compact import to_compact
from model.gpt import GPT
from model.tuning import base_state
from pruning.settings import PruneSettings


def model_payload(model: GPT, compact: bool, **about: Any) -> dict[str, Any]:
    """A model (with merged LoRA, if any) and its masks as a checkpoint's content, with the entries `about`.

    `compact` leaves the zeros of a sparse model out; a dense one is stored as it is.
    """
    masks = {name: mask.to("cpu") for name, mask in model.masks.items()}
    weights = {name: tensor.cpu() for name, tensor in base_state(model).items()}
    payload = {"model": weights, "config": model.config.to_dict(), **masks_entry(masks), **about}
    return to_compact(payload, masks) if compact and masks else payload


def holds_weights(path: Path, model: GPT) -> bool:
    """Whether the file is a checkpoint of these very weights and masks; ValueError where it is no checkpoint."""
    payload, wanted = load_checkpoint(path), base_state(model)
    weights = payload.get("model", {})
    same = weights.keys() == wanted.keys() and payload_masks(payload, path).keys() == model.masks.keys()
    return same and all(torch.equal(weights[name], tensor.cpu()) for name, tensor in wanted.items())


def check_place(path: Path, flag: str) -> None:
    """ValueError, which begins with `flag`, where no file can be made at `path`, whose folders are made as needed."""
    folder = next(folder for folder in path.parents if os.path.lexists(folder) or folder == folder.parent)
    if not folder.is_dir():
        raise ValueError(f"{flag}: {folder} is no folder, choose another")
    try:
        with tempfile.TemporaryFile(dir=folder):  # what access() says of /proc or a full disk is not the whole truth
            pass
    except OSError as error:
        raise ValueError(f"{flag}: no file can be made in {folder} ({error.strerror}): choose another") from None


def refuse_what_is_there(settings: PruneSettings) -> None:
    """ValueError, before any work, where something is in the way that prune.py did not write, or nothing can be."""
    for path, entry in ((settings.pruned_path, "pruning"), (settings.recovered_path, "recovery")):
        wanted = settings.finetune if entry == "recovery" else settings.method != "none"
        if not wanted or not path.exists():
            continue
        there = load_checkpoint(path) if path.is_file() else {}
        if not there.get(entry):
            raise ValueError(f"{path}: is there already: choose another --out or --save_ckpt_log_name")
        if settings.compact and there.get("masks") and not there.get("in_memory"):  # which a compact file's weights are
            raise ValueError(
                f"{path}: is there already, with its zeros: leave --compact out; export.py compact {path} OUT.pt "
                "stores it without"
            )
    check_place(settings.folder / "training.log", "--save_ckpt_log_name")
    if settings.out is not None:
        check_place(settings.pruned_path, f"--out {settings.out}")
