"""Random states in a form that `weights_only=True` loads: lists of ints and byte tensors, no NumPy objects."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed torch (CPU and GPUs), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every generator in this process."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, next_gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), next_gauss],
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator back. Raises ValueError for a state that is not one."""
    try:
        torch.set_rng_state(state["torch"].clone())
        kind, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
        version, words, next_gauss = state["python"]
        random.setstate((version, tuple(words), next_gauss))
        if state.get("cuda") is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].clone())
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError) as error:
        raise ValueError(f"the checkpoint's random state is not usable: {error}") from None


def to_bytes(state: dict[str, Any]) -> bytes:
    """A state as JSON, to travel between processes without pickle."""
    tensors = {key: bytes(value.tolist()).hex() for key, value in state.items() if isinstance(value, torch.Tensor)}
    return json.dumps({**state, **tensors}).encode()


def from_bytes(data: bytes) -> dict[str, Any]:
    """The inverse of to_bytes."""
    state = json.loads(data)
    for key in ("torch", "cuda"):
        if state[key] is not None:
            state[key] = torch.tensor(list(bytes.fromhex(state[key])), dtype=torch.uint8)
    return dict(state)


def seed_micro_batch(seed: int, sample: int) -> None:
    """Seed torch (CPU and GPUs) for the micro-batch that begins with this global sample, whichever process has it."""
    torch.manual_seed(derived_seed(seed, sample, 0))


def derived_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a process that has no saved state of its own, because the number of processes changed."""
    return (seed * 1_000_003 + step * 8191 + rank * 131) % 2**63
