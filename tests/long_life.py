"""One long run in a process of its own; prints what it held on to, {"rss_mb": [...], "files": [...]}, each 500 steps.

python tests/long_life.py FOLDER STEPS
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tests.runs import train
from tests.tiny import text_set
from training.recorder import Recorder

EVERY = 500
SMALL: dict[str, Any] = {"block_size": 32, "batch_size": 1, "total_batch_size": 32, "max_lr": 1e-3}
OFTEN = {"eval_interval": 1000, "generate_interval": 1000, "checkpoint_interval": 500, "max_eval_samples": 4}


def live(folder: Path, steps: int) -> dict[str, list[float]]:
    """Train with evaluations, samples and checkpoints, written by a thread, and look at this process on the way."""
    seen: dict[str, list[float]] = {"rss_mb": [], "files": []}
    step_done = Recorder.step_done

    def look(self: Recorder, record: dict[str, Any], progress: Any) -> None:
        step_done(self, record, progress)
        if record["step"] % EVERY == EVERY // 2:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen["rss_mb"].append(round(pages * resource.getpagesize() / 1e6, 3))
            seen["files"].append(len(os.listdir("/proc/self/fd")))

    text_set(folder / "text", n_documents=200)
    with mock.patch.object(Recorder, "step_done", look):
        train(folder / "text", folder / "run", **SMALL, **OFTEN, max_steps=steps, async_save="on", spike_guard=20.0)
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout, out = open(os.devnull, "w"), sys.stdout  # noqa: SIM115
    print(json.dumps(live(Path(sys.argv[1]), int(sys.argv[2]))), file=out)
