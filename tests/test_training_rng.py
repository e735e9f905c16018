"""Random states: every generator to the last bit, through files and through other processes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from formats.checkpoint import load_checkpoint, save_checkpoint
from tests.full_checkpoints import same
from training import rng


def draw() -> list[Any]:
    """A bit of everything, odd numbers of them, so that half-used buffers count too."""
    return [
        torch.rand(5).tolist(),
        torch.randn(3).tolist(),
        torch.randint(0, 9, (3,)).tolist(),
        np.random.rand(3).tolist(),
        float(np.random.randn()),  # leaves its second value in the generator
        random.random(),
        random.gauss(0, 1),  # so does this
        random.sample(range(100), 3),
    ]


def test_put_back_bit_for_bit() -> None:
    rng.seed_everything(5)
    draw()
    state = rng.rng_state()
    first, second = draw(), draw()
    assert first != second
    rng.set_rng_state(state)
    assert [draw(), draw()] == [first, second]


def test_through_a_checkpoint_that_weights_only_reads(tmp_path: Path) -> None:
    rng.seed_everything(6)
    draw()
    state = rng.rng_state()
    first = draw()
    save_checkpoint(tmp_path / "m.pt", {"model": {}, "config": {}, "rng": [state, state]})
    loaded = load_checkpoint(tmp_path / "m.pt", require_digest=True)["rng"]
    assert same(loaded, [state, state])
    rng.seed_everything(7)
    rng.set_rng_state(loaded[1])
    assert draw() == first


def test_through_json_to_another_process() -> None:
    rng.seed_everything(8)
    draw()
    state = rng.rng_state()
    data = rng.to_bytes(state)
    json.loads(data)
    again = rng.from_bytes(data)
    first = draw()
    rng.seed_everything(9)
    rng.set_rng_state(again)
    assert draw() == first
    assert torch.equal(again["torch"], state["torch"]) and again["numpy"] == state["numpy"]
    assert rng.to_bytes(again) == data


def test_a_state_is_a_copy() -> None:
    rng.seed_everything(10)
    state = rng.rng_state()
    kept = rng.to_bytes(state)
    draw()
    assert rng.to_bytes(state) == kept
    rng.set_rng_state(state)
    draw()
    assert rng.to_bytes(state) == kept, "putting it back must not tie the generator to it"


def test_a_state_holds_plain_values_only() -> None:
    def leaves(value: Any) -> list[Any]:
        if isinstance(value, (list, tuple)):
            return [leaf for item in value for leaf in leaves(item)]
        return leaves(list(value.values())) if isinstance(value, dict) else [value]

    kinds = {type(leaf) for leaf in leaves(rng.rng_state())}
    assert kinds <= {int, float, str, type(None), torch.Tensor}


def test_seeding_reaches_every_generator() -> None:
    rng.seed_everything(11)
    first = draw()
    rng.seed_everything(11)
    assert draw() == first
    rng.seed_everything(12)
    assert all(a != b for a, b in zip(draw(), first))
    rng.seed_everything(2**40 + 3)  # more than NumPy's seeds hold
    rng.seed_everything(-1)


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"torch": torch.zeros(3, dtype=torch.uint8)},
        {"torch": None},
        {"numpy": ["MT19937", [1, 2], 3, 0, 0.0]},
        {"numpy": [1]},
        {"numpy": ["MT19937", [-1] * 624, 3, 0, 0.0]},
        {"python": [3, [1, 2], None]},
        {"python": None},
    ],
)
def test_what_is_no_state_is_an_error(broken: dict[str, Any]) -> None:
    state = {**rng.rng_state(), **broken} if broken else {}
    with pytest.raises(ValueError, match="random state is not usable"):
        rng.set_rng_state(state)


def test_derived_seeds_differ_by_seed_step_and_rank() -> None:
    seeds = {rng.derived_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(8)}
    assert len(seeds) == 5 * 50 * 8
    assert rng.derived_seed(1337, 5, 1) == rng.derived_seed(1337, 5, 1)
    for seed in (-5, 2**63, 10**30):
        torch.manual_seed(rng.derived_seed(seed, 19072, 1023))
