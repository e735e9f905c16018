"""--exact: the same bits on 1, 2 and 4 processes, dropout and all, whatever number goes on from the one before."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.checkpoint import load_checkpoint
from model.config import PRESETS
from tests.lives import Run, Strike, differences, finetuning, pretrained, pretraining, records
from tests.runs import log
from training.distributed import Dist
from training.exact import BinaryCounter, Exact, reversed_bits
from training.plan import MemoryPlan, plan_memory
from training.rng import seed_micro_batch
from training.run_settings import TrainSettings
from training.step_plan import plan_steps

# -- the tree ---------------------------------------------------------------------------------------------------------


def halved(numbers: torch.Tensor) -> torch.Tensor:
    """Recursive halving as the module's text defines it: (n, ...) -> (...)."""
    while len(numbers) > 1:
        numbers = numbers[: len(numbers) // 2] + numbers[len(numbers) // 2 :]
    return numbers[0]


def on_processes(numbers: torch.Tensor, world_size: int) -> torch.Tensor:
    """The same sum as so many ranks make it: each by its counter, then between them."""
    shares = []
    for rank in range(world_size):
        mine = numbers[rank::world_size]  # micro-batch a of rank r is number a W + r
        counter = BinaryCounter()
        for done, number in enumerate(reversed_bits(len(mine)), start=1):
            counter.add([mine[number].clone()])
            assert len(counter.waiting) == done.bit_count(), "no more wait than there are ones in the count"
        shares.append(counter.total()[0])
    return halved(torch.stack(shares))


floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


@given(levels=st.integers(0, 6), split=st.integers(0, 6), data=st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_split_adds_by_the_same_tree(levels: int, split: int, data: st.DataObject) -> None:
    numbers = torch.tensor(data.draw(st.lists(floats, min_size=2**levels, max_size=2**levels)))
    one, many = on_processes(numbers, 1), on_processes(numbers, 2 ** min(split, levels))
    assert one.tolist() == many.tolist() == halved(numbers).tolist()


def test_another_order_would_show() -> None:
    numbers = torch.randn(16, 500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(on_processes(numbers, 4), halved(numbers))
    for world_size in (1, 2, 4):
        shares = torch.stack([numbers[rank::world_size].cumsum(0)[-1] for rank in range(world_size)])
        assert not torch.equal(halved(shares), halved(numbers)), "a running sum in each process"
    assert not torch.equal(halved(numbers[torch.randperm(16)]), halved(numbers))


def test_reversed_bits() -> None:
    assert reversed_bits(1) == [0] and reversed_bits(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert sorted(reversed_bits(256)) == list(range(256))


def test_what_a_stop_left_of_a_step_is_dropped() -> None:
    model: Any = torch.nn.Linear(2, 1)
    exact = Exact(Dist(), model)

    def step(count: int, stop_after: int) -> None:
        for number in exact.order(count)[:stop_after]:
            model(torch.tensor([[1.0, number]])).sum().backward()
            exact.end_micro_step(number)

    step(4, 3)
    step(4, 4)
    exact.finish_gradients()
    assert model.weight.grad.tolist() == [[4.0, 6.0]] and model.bias.grad.tolist() == [4.0]


# -- sums of losses ---------------------------------------------------------------------------------------------------


def test_totals_are_rounded_once() -> None:
    here = Dist()
    assert here.total([1e16, 1.0, 1.0, -1e16], [0.1] * 4) == [2.0, math.fsum([0.1] * 4)]
    assert here.total([], []) == [0.0, 0.0]
    broken = here.total([1.0, math.inf], [math.inf, -math.inf], [1.0, math.nan])
    assert broken[0] == math.inf and math.isnan(broken[1]) and math.isnan(broken[2])


def test_a_seed_belongs_to_a_micro_batch() -> None:
    drawn = []
    for seed, sample in ((1, 0), (1, 8), (1, 2**31), (2, 0), (1, 8)):
        seed_micro_batch(seed, sample)
        drawn.append(tuple(torch.rand(3).tolist()))
    assert drawn[1] == drawn[4] and len(set(drawn)) == 4


# -- what does not go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (3, {"grad_accum_steps": 2}, "--exact: 3 processes, expected a power of two: 2 or 4$"),
        (2, {"grad_accum_steps": 3}, r"6 micro-batches .*: 4 or 8 \(--total_batch_size 64 or 128\)"),
        (1, {"total_batch_size": 16 * 12}, r"12 micro-batches .*: 8 or 16 \(--total_batch_size 128 or 256\)"),
        (2, {"compile": "on"}, "--exact: compiled code .*no --compile on"),
        (2, {"parallel": "fsdp"}, "--exact: --parallel fsdp .* use ddp or zero1"),
    ],
)
def test_what_has_no_order_of_its_own_is_refused(world_size: int, changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"batch_size": 2, "block_size": 8, "exact": True, "max_steps": 5, **changes}
    with pytest.raises(ValueError, match=message):
        plan_steps(TrainSettings(**values), 8, 1000, world_size)


def test_the_plan_counts_the_sums_that_wait() -> None:
    def plan(exact: bool, micro_batches: int, world_size: int) -> MemoryPlan:
        how = TrainSettings(preset="tiny", batch_size=1, grad_accum_steps=micro_batches, exact=exact)
        return plan_memory(how, PRESETS["tiny"], world_size=world_size)

    for micro_batches, world_size, gradients in ((1, 1, 1), (2, 1, 2), (8, 1, 4), (1, 2, 2), (8, 2, 4)):
        exact, plain = (plan(way, micro_batches, world_size) for way in (True, False))
        assert exact.gradients == gradients * plain.gradients
        earlier = int(math.log2(micro_batches))
        assert exact.earlier_gradients == (earlier or 1) * plain.earlier_gradients


# -- whole runs -------------------------------------------------------------------------------------------------------

# 8 micro-batches a step, dropout 0.1 as the tiny settings have it, a gradient that is always clipped.
STEP: dict[str, Any] = {"exact": True, "batch_size": 1, "total_batch_size": 1024, "max_steps": 5, "max_grad_norm": 1e-3}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": (pretraining, {}),
    "packed-records": (finetuning, {}),
}
SLOW: dict[str, tuple[Any, dict[str, Any]]] = {
    "muon-llama-checkpointed": (
        pretraining,
        {"optimizer": "muon", "preset": "test-llama", "gradient_checkpointing": True},
    ),
    "zero1": (pretraining, {"parallel": "zero1"}),
    "bfloat16": (pretraining, {"dtype": "bfloat16"}),
    "float16-with-loss-scaler": (pretraining, {"dtype": "float16"}),
    "lora": (finetuning, {"finetune_method": "lora", "lora_r": 4}),
    "qlora": (finetuning, {"finetune_method": "qlora", "lora_target_modules": ("all-linear",)}),
    "adapter": (finetuning, {"finetune_method": "adapter", "adapter_dim": 8}),
    "p-tuning": (
        finetuning,
        {"finetune_method": "p_tuning", "prefix_length": 8, "block_size": 120, "total_batch_size": 960},
    ),
    "distill": (finetuning, {"objective": "distill", "distill_hard": 0.2, "distill_hidden": 0.5}),
    "progressive": (finetuning, {"finetune_method": "progressive", "unfreeze_stages": 2}),
    "dpo": (finetuning, {"objective": "dpo", "finetune_method": "lora", "max_lr": 1e-2}),
    "grpo": (
        finetuning,
        {
            "objective": "grpo",
            "reward": f"{Path(__file__).with_name('reward_functions.py')}:letters",
            "grpo_group": 3,
            "grpo_epochs": 2,
            "grpo_max_new_tokens": 8,
        },
    ),
}


def lived(make: Any, folder: Path, ranks: int, **changes: Any) -> Run:
    """A whole run on so many processes."""
    if changes.get("objective") == "distill":
        changes["teacher"] = str(pretrained())
    run: Run = make(folder, **{**STEP, **changes})
    lives = run.live_together(ranks=ranks)
    assert [life.code for life in lives] == [0] * ranks, lives[0].describe()
    return run


def unlike(one: Run, other: Run) -> list[str]:
    """Where two runs differ, but for the random states: each process has its own, and none is drawn from."""
    return [found for found in differences(one.folder, other.folder) if ": rng" not in found]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_one_two_and_four_processes_end_with_the_same_bits(case: str, tmp_path: Path) -> None:
    make, changes = (CASES | SLOW)[case]
    one, two, four = (lived(make, tmp_path / f"{ranks}", ranks, **changes) for ranks in (1, 2, 4))
    assert not unlike(one, two) and not unlike(one, four)
    lines = records(four.folder)
    assert len({line["loss"] for line in lines}) == 5 and any("val_loss" in line for line in lines)
    assert max(line["grad_norm"] for line in lines) > 1e-3, "nothing is clipped"
    assert (four.folder / "best.pt").exists()


def test_a_run_that_goes_on_with_other_processes_ends_with_the_same_bits(tmp_path: Path) -> None:
    """1, then 4, then 2; the last with its optimizer shared."""
    run = pretraining(tmp_path / "run", **STEP)
    for ranks, strike in ((1, "step 0@0"), (4, "step 2@2")):
        for life in run.live_together(Strike(strike, signal=signal.SIGTERM), ranks=ranks):
            assert life.code == 0, life.describe()
    for life in run.live_together(ranks=2, parallel="zero1"):
        assert life.code == 0, life.describe()
    assert [life.began_after for life in run.lives] == [-1, 0, 2]
    text = log(run.folder)
    assert "re-seeded" not in text and "another number of threads (1 in each process) does" in text
    whole = lived(pretraining, tmp_path / "whole", 1)
    found = [difference for difference in unlike(run, whole) if not difference.endswith("settings.parallel")]
    assert not found
    assert len(load_checkpoint(run.checkpoint(4))["rng"]) == 2


def test_without_it_the_bits_depend_on_the_processes(tmp_path: Path) -> None:
    """Else the tests above could not fail: sums of 8 in another order, which has no dropout to blame."""
    one, two = (lived(pretraining, tmp_path / f"{ranks}", ranks, exact=False, dropout=0.0) for ranks in (1, 2))
    found = unlike(one, two)
    for part in ("model.wte.weight", "optimizer.adamw.wte.weight.exp_avg", "metrics.jsonl"):
        assert any(part in difference for difference in found), part
