"""What test_training_plan.py launches: runs in forks of a warm process, and the memory that each really took.

    python tests/measured_memory.py FOLDER CASES        # JSON: {name: changes to the settings} -> {name: bytes}

FOLDER holds `records` and `base.pt`. A small run comes first, so that what the libraries take once is not counted.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from formats.checkpoint import save_checkpoint
from tests.runs import BARE, tune
from tests.tiny import BYTES
from tests.tiny_checkpoints import tiny_model
from training import launch


def memory(name: str) -> int:
    """VmRSS (now) or VmHWM (at most, so far) of this process in bytes."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def run(folder: Path, base: str, name: str, **changes: Any) -> int:
    """The memory that two steps take at most, from when the network stands; the file it came from is not counted."""
    gc.collect()
    before = memory("VmRSS")
    check = launch._Run._check_forward

    def from_here(self: launch._Run, *args: Any) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        check(self, *args)

    settings = {**BARE, "max_steps": 2, "grad_accum_steps": 1, "dropout": 0.0, "max_eval_samples": 1, **changes}
    settings["total_batch_size"] = 524288
    with mock.patch.object(launch._Run, "_check_forward", from_here), contextlib.redirect_stdout(sys.stderr):
        tune(folder / "records", folder / name, folder / base, **settings)
    return memory("VmHWM") - before


def warm_up(folder: Path) -> None:
    run(folder, "small.pt", "warm", block_size=64)


def forked(folder: Path, name: str, changes: dict[str, Any]) -> int:
    """`run` in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        warm_up(folder)  # a fork has not touched the libraries' pages yet
        os.write(write, str(run(folder, "base.pt", name, **changes)).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as file:
        return int(file.read())


if __name__ == "__main__":
    where = Path(sys.argv[1])
    small = tiny_model(block_size=128)
    payload = {"model": small.state_dict(), "config": small.config.to_dict(), "tokenizer": BYTES.spec()}
    save_checkpoint(where / "small.pt", payload)
    warm_up(where)
    print(json.dumps({name: forked(where, name, changes) for name, changes in json.loads(sys.argv[2]).items()}))
