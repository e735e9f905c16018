"""Shared set-up: one thread a process (bits depend on the thread count), the checkout on sys.path, no network."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two test workers share two cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of text. What makes it brings torch, which not every test needs."""
    from tests.tiny import text_set

    return text_set(tmp_path_factory.mktemp("data") / "text")
