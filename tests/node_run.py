"""What test_nodes.py launches on its machines: a tiny run that writes down which samples each process took, and when.

    torchrun ... tests/node_run.py {train,tune} SETTINGS

SETTINGS are JSON. Each process appends to seen-PID.jsonl in the working folder. `seconds` slows every micro-batch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data.loader import Batch, Loader
from tests.runs import changed_losses, train, tune


class Spy(Loader):
    """Notes each batch that is trained on."""

    seconds = 0.0

    def next_batch(self) -> Batch:
        batch = super().next_batch()
        self._note(samples=batch.samples)
        return batch

    def load_state(self, state: dict[str, Any]) -> None:
        self._note(back_to=state["sample"])  # the look at the first batch does not count
        super().load_state(state)

    def _note(self, **what: Any) -> None:
        line = {"pid": os.getpid(), "time": time.time(), "rank": self.rank, "world_size": self.world_size, **what}
        with open(f"seen-{os.getpid()}.jsonl", "ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")


def slower(seconds: float) -> Any:
    """Each micro-batch takes so much longer."""

    def wait(number: int, loss: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return loss

    return changed_losses(wait)


if __name__ == "__main__":
    work, settings = sys.argv[1], json.loads(sys.argv[2])
    with mock.patch("training.launch.Loader", Spy), slower(settings.pop("seconds", 0.0)):
        if work == "train":
            train(Path("text"), Path("logs"), **settings)
        else:
            tune(Path("records"), Path("logs"), Path("model.pt"), **settings)
