"""What test_training_nodes.py launches under torchrun: two processes, each of which takes itself for a machine.

    torchrun --standalone --nproc_per_node 2 tests/two_machines.py FOLDER

Each works in a folder of its own, FOLDER/0 and FOLDER/1, and names all files relative to it: only the first has models.
What each saw of every case goes to FOLDER/CASE-RANK.json.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tests.runs import BARE, tune

RANK = int(os.environ.get("RANK", 0))
SETTINGS: dict[str, Any] = {**BARE, "total_batch_size": 512, "max_steps": 4, "lr_schedule": "constant"}
# One process alone cannot draw the dropout of two.
SETTINGS |= {"dropout": 0.0, "max_lr": 1e-2, "eval_interval": 2, "checkpoint_interval": 1}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"load_best_model_at_end": True},
    "lora": {"finetune_method": "lora", "lora_r": 4, "lora_dropout": 0.0},
    "adapter": {"finetune_method": "lora", "adapter": "lora/best.pt"},
    "distill": {"objective": "distill", "teacher": "teacher.pt"},
    "dpo": {"objective": "dpo", "data_dir": "pairs", "max_lr": 1e-3},
}


def run(name: str, **changes: Any) -> dict[str, Any]:
    """A fine-tuning in the folder `name`."""
    values = {**SETTINGS, **changes}
    data_dir = values.pop("data_dir", "records")
    return tune(Path(data_dir), Path(name), Path(values.pop("pretrained_checkpoint", "model.pt")), **values)


def twice(kind: str) -> Callable[[], dict[str, Any]]:
    """Four steps, and eight after a resume."""

    def work() -> dict[str, Any]:
        run(kind, **KINDS[kind])
        return run(kind, **{**KINDS[kind], "max_steps": 8, "auto_resume": True})

    return work


def moved() -> dict[str, Any]:
    """Rank 0 is on another machine than it was: that one has the run, this one an older state, or something else."""
    run("moved", **KINDS["full"])
    torch.distributed.barrier()
    if RANK == 0:
        shutil.copytree("moved", "../1/moved")
        Path("../1/moved/model_00009.pt").write_bytes(b"rotten")
        for step in (2, 3):
            Path(f"moved/model_{step:05d}.pt").unlink()
        Path("moved/metrics.jsonl").write_text("of another run\n")
    torch.distributed.barrier()
    return run("moved", **{**KINDS["full"], "max_steps": 8, "auto_resume": True})


def afresh() -> dict[str, Any]:
    """A new run, while the other machine has checkpoints from an earlier one."""
    if RANK == 1:
        Path("afresh").mkdir()
        Path("afresh/model_00100.pt").write_bytes(b"of last year")
    return run("afresh")


def records() -> dict[str, Any]:
    """Each machine prepares its own cache from its own file of records."""
    return run("cached", data_dir="chats.jsonl", prompt_template="dolly", max_steps=2)


def other_data() -> dict[str, Any]:
    return run("other_data", data_dir="other")


def no_data() -> dict[str, Any]:
    return run("no_data", data_dir="only_0")


def no_records() -> dict[str, Any]:
    return run("no_records", data_dir="only_0.jsonl", prompt_template="dolly")


def no_model() -> dict[str, Any]:
    return run("no_model", pretrained_checkpoint="nowhere.pt")


def no_checkpoint() -> dict[str, Any]:
    return run("no_checkpoint", resume=True)


def in_use() -> dict[str, Any]:
    """Another run holds the folder on rank 0's machine."""
    from training.run_folder import lock_file

    Path("in_use").mkdir()
    held = lock_file(Path("in_use/.lock")) if RANK == 0 else None
    try:
        return run("in_use")
    finally:
        if held is not None:
            held.close()


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    **{kind: twice(kind) for kind in KINDS},
    **{case.__name__: case for case in (moved, afresh, records)},
    **{case.__name__: case for case in (other_data, no_data, no_records, no_model, no_checkpoint, in_use)},
}

if __name__ == "__main__":
    where = Path(sys.argv[1]).resolve()
    os.chdir(where / str(RANK))
    os.environ["LOCAL_RANK"] = "0"
    with (
        mock.patch("training.launch.close_distributed", lambda here: None),  # one process group serves all runs
        mock.patch("training.distributed.PIECE", 20_011),  # bytes: tensors and files travel in several pieces
        mock.patch("training.nodes.PIECE", 20_011),
        mock.patch("socket.gethostname", lambda: f"host{RANK}"),
        mock.patch("data.manifest._REPOSITORY", Path.cwd()),  # where caches go
    ):
        for name, case in CASES.items():
            try:
                seen: dict[str, Any] = {"summary": case()}
            except (ValueError, OSError) as error:
                seen = {"error": str(error), "kind": type(error).__name__}
            (where / f"{name}-{RANK}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()
