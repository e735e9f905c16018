"""DPO against its paper's formula, and as whole runs: what they equal, learn, log and refuse."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from data.loader import Batch, eval_batches
from data.shards import open_dataset
from formats.checkpoint import load_checkpoint, save_checkpoint
from model.gpt import GPT
from model.lora import LoraSettings
from model.tuning import apply_method
from tests.runs import BARE, log, losses, records, status, steps_on_disk, tune, weights
from tests.tiny import finetune_settings, pair_set, record_set
from tests.tiny_checkpoints import save_tiny, tiny_model
from training.objectives.dpo import DPO
from training.objectives.reference import Reference
from training.run_settings import FinetuneSettings
from training.stop import StopRequest

DPO_RUN: dict[str, Any] = {"objective": "dpo", "batch_size": 2, "total_batch_size": 512, **BARE}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_set(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("start") / "model.pt", block_size=128, scale=1.0)


def moved(model: GPT, seed: int = 3) -> GPT:
    """A policy that is not its reference any more."""
    policy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


def a_batch(pairs: Path, size: int = 3) -> Batch:
    tokens = open_dataset(pairs, "train")
    how: dict[str, Any] = {"block_size": 128, "max_windows": size, "rank": 0, "world_size": 1, "unit": "pair"}
    return next(iter(eval_batches(tokens, batch_size=size, **how)))


def objective(policy: GPT, reference: GPT | None, **settings: Any) -> DPO:
    return DPO(FinetuneSettings(objective="dpo", **settings), policy, Reference(policy, reference), StopRequest())


def naive(policy: GPT, reference: GPT, batch: Batch, beta: float, kind: str, smoothing: float) -> torch.Tensor:
    """The mean loss by the papers' formulas, from all logits."""

    def log_prob(model: GPT, row: int) -> torch.Tensor:
        targets = batch.targets[row]
        rows = model(batch.inputs[row : row + 1])[0].log_softmax(-1)
        places = (targets != -100).nonzero().flatten()
        return rows[places, targets[places]].sum()

    total = torch.zeros(())
    for pair in range(len(batch.inputs) // 2):
        better, worse = (log_prob(policy, 2 * pair + side) - log_prob(reference, 2 * pair + side) for side in (0, 1))
        if kind == "ipo":
            total = total + (better - worse - 1 / (2 * beta)) ** 2
        else:
            margin = beta * (better - worse)
            total = total - (1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    return total / (len(batch.inputs) // 2)


@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
def test_loss_and_gradients_are_the_papers(pairs: Path, kind: str, smoothing: float) -> None:
    reference = tiny_model(block_size=128)
    policy = moved(reference).requires_grad_(True)
    batch = a_batch(pairs)
    dpo = objective(policy, reference, dpo_beta=0.3, dpo_loss=kind, label_smoothing=smoothing)
    (prepared,) = dpo.prepare(0, [batch]) or ()
    loss, sums = dpo.loss(policy, prepared)
    ours = torch.autograd.grad(loss / 3, list(policy.parameters()))
    wanted = naive(policy, reference, batch, 0.3, kind, smoothing)
    assert float(loss) / 3 == pytest.approx(float(wanted), rel=1e-4)
    theirs = torch.autograd.grad(wanted, list(policy.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * max(float(g.abs().max()) for g in theirs))
    assert float(sums["rewards/margins"]) == pytest.approx(
        float(sums["rewards/chosen"]) - float(sums["rewards/rejected"]), rel=1e-4
    )
    assert 0 <= float(sums["rewards/accuracies"]) <= 3
    evaluated = dpo.evaluate([batch])
    assert evaluated[:2] == (pytest.approx(float(loss), rel=1e-6), 3)


def test_an_adapters_reference_is_the_base_however_far_it_has_gone(pairs: Path) -> None:
    base = tiny_model(block_size=128)
    model = apply_method(copy.deepcopy(base), "lora", LoraSettings(rank=4))
    batch = a_batch(pairs)
    dpo = objective(model, None)
    before, _ = dpo.loss(model, dpo.prepare(0, [batch])[0])  # type: ignore[index]
    assert float(before) == pytest.approx(3 * math.log(2), rel=1e-7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    (after,) = dpo.prepare(1, [batch]) or ()
    wanted = -base(batch.inputs, batch.targets, reduction="none").sum(1)
    torch.testing.assert_close(after.reference, wanted.detach())
    assert float(dpo.loss(model, after)[0]) != float(before)


def test_the_reference_takes_no_gradients_away_under_autocast(pairs: Path) -> None:
    """Autocast keeps its casts of weights: made without gradients by the reference, they must not serve the policy."""
    model = apply_method(tiny_model(block_size=128), "lora", LoraSettings(rank=4, targets=("all-linear",)))
    batch = a_batch(pairs)
    dpo = objective(model, None)

    def gradients(dtype: torch.dtype | None) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            (prepared,) = dpo.prepare(0, [batch]) or ()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss, _ = dpo.loss(model, prepared)
        found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        assert all(gradient is not None for gradient in found)
        return list(found)

    for low, exact in zip(gradients(torch.bfloat16), gradients(None)):
        assert float((low - exact).norm()) <= 0.1 * float(exact.norm())


@pytest.mark.parametrize("method", ["full", "freeze", "lora", "qlora", "adapter"])
def test_the_first_loss_is_log_2_and_pairs_are_learnt(method: str, pairs: Path, start: Path, tmp_path: Path) -> None:
    settings = {**DPO_RUN, "finetune_method": method, "max_steps": 12, "max_lr": 3e-2, "warmup_steps": 0}
    tune(pairs, tmp_path, start, **{**settings, "eval_interval": 6})
    found = losses(tmp_path)
    assert found[0] == float(torch.tensor(math.log(2)))
    assert found[-1] < (0.75 if method == "full" else 0.97) * found[0]  # few numbers learn less in 12 steps
    first, last = records(tmp_path)[0], records(tmp_path)[-1]
    assert first["rewards/margins"] == first["rewards/accuracies"] == 0.0 and first["pairs"] == 4
    assert last["rewards/accuracies"] >= 0.75 and last["rewards/margins"] > 0.03
    assert last["rewards/chosen"] - last["rewards/rejected"] == pytest.approx(last["rewards/margins"], rel=1e-5)
    assert last["val_rewards/accuracies"] >= 0.5 and last["val_loss"] < math.log(2)
    text = log(tmp_path)
    assert "Objective: dpo, sigmoid loss, beta 0.1" in text and "Eval rewards/margins:" in text
    assert "Perplexity" not in text and "| rewards/accuracies " in text


def test_the_split_of_the_batch_and_checkpointing_change_rounding_only(
    pairs: Path, start: Path, tmp_path: Path
) -> None:
    how = {**DPO_RUN, "max_steps": 3, "max_lr": 1e-3, "weight_decay": 0.0}
    for name, changes in {
        "whole": {"batch_size": 4},
        "split": {"batch_size": 1},
        "checkpointed": {"batch_size": 1, "gradient_checkpointing": True},
    }.items():
        tune(pairs, tmp_path / name, start, **{**how, **changes})
    assert losses(tmp_path / "checkpointed") == losses(tmp_path / "split")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "split"), rel=1e-5)
    for name, tensor in weights(tmp_path / "whole", 2).items():
        torch.testing.assert_close(weights(tmp_path / "split", 2)[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_insists_on_its_reference(pairs: Path, start: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.pt"
    base.write_bytes(start.read_bytes())
    tune(pairs, tmp_path / "run", base, **DPO_RUN, max_steps=2)
    payload = load_checkpoint(tmp_path / "run" / "model_00001.pt")
    assert set(payload["reference"]) == {"digest", "path", "name"}
    payload = load_checkpoint(base)
    payload["model"]["ln_f.weight"] = payload["model"]["ln_f.weight"] * 1.01
    save_checkpoint(base, payload)
    with pytest.raises(ValueError, match="digest"):
        tune(pairs, tmp_path / "run", base, **DPO_RUN, max_steps=4, auto_resume=True)
    tune(pairs, tmp_path / "run", start, **DPO_RUN, max_steps=4, auto_resume=True)  # the right one, elsewhere
    assert len(losses(tmp_path / "run")) == 4


def test_a_loss_that_is_not_finite_stops_the_run_with_the_last_step_saved(
    pairs: Path, start: Path, tmp_path: Path
) -> None:
    calls, original = 0, DPO.losses

    def poisoned(self: DPO, margins: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return original(self, margins) * (math.nan if calls == 6 else 1.0)

    with mock.patch.object(DPO, "losses", poisoned), pytest.raises(ValueError, match="Step 2: loss nan is not finite"):
        tune(pairs, tmp_path, start, **DPO_RUN, max_steps=4)
    assert steps_on_disk(tmp_path) == [1] and status(tmp_path) == "failed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": True}, "--packing: --objective dpo compares whole rows"),
        ({"dpo_beta": 0.0}, "--dpo_beta 0.0: expected more than 0"),
        ({"label_smoothing": 0.5}, "--label_smoothing 0.5: expected"),
        ({"label_smoothing": 0.1, "dpo_loss": "ipo"}, "no meaning with --dpo_loss ipo"),
        ({"grpo_group": 4}, "--grpo_group 4 does nothing with --objective dpo: it is for grpo"),
        ({"block_size": 8, "total_batch_size": 32}, "no answer of its .* pairs fits --block_size 8"),
        ({"objective": "sft"}, "is a set of kind preference, --objective sft needs text or instruction: use .*dpo"),
    ],
)
def test_what_can_not_be_is_refused_in_a_line(
    changes: dict[str, Any], message: str, pairs: Path, start: Path, tmp_path: Path
) -> None:
    settings = finetune_settings(pairs, tmp_path, start, **{**DPO_RUN, **changes})
    object.__setattr__(settings, "explicit_names", frozenset({*changes, "total_batch_size", "pretrained_checkpoint"}))
    with (
        mock.patch("tests.runs.finetune_settings", lambda *_, **__: settings),
        pytest.raises(ValueError, match=message) as error,
    ):
        tune(pairs, tmp_path, start)
    assert "\n" not in str(error.value)


def test_a_trained_adapter_is_to_be_merged_first(pairs: Path, start: Path, tmp_path: Path) -> None:
    settings = {**DPO_RUN, "finetune_method": "lora", "max_steps": 2}
    tune(pairs, tmp_path / "one", start, **settings)
    with pytest.raises(ValueError, match=r"--adapter .*: .*merge it \(export\.py merge\)"):
        tune(pairs, tmp_path / "two", start, **settings, adapter=str(tmp_path / "one" / "model_00001.pt"))


def test_pairs_are_needed_and_a_start(pairs: Path, start: Path, tmp_path: Path) -> None:
    instructions = record_set(tmp_path / "records")
    with pytest.raises(
        ValueError, match=r"kind instruction, --objective dpo needs preference: use .*--format preference"
    ):
        tune(instructions, tmp_path / "run", start, **DPO_RUN)
    settings = finetune_settings(pairs, tmp_path / "run", Path("missing.pt"), **DPO_RUN, preset="tiny")
    object.__setattr__(settings, "explicit_names", frozenset({"block_size"}))
    with (
        mock.patch("tests.runs.finetune_settings", lambda *_, **__: settings),
        pytest.raises(ValueError, match="--objective dpo compares with the model that it starts from"),
    ):
        tune(pairs, tmp_path / "run", start)


def test_a_run_keeps_its_objective(pairs: Path, start: Path, tmp_path: Path) -> None:
    tune(pairs, tmp_path, start, **DPO_RUN, max_steps=2)
    changes = {**DPO_RUN, "objective": "grpo", "max_steps": 4, "auto_resume": True}
    with pytest.raises(ValueError, match="kind preference, --objective grpo needs"):
        tune(pairs, tmp_path, start, **changes)
    sums = record_set(tmp_path / "sums")
    with pytest.raises(ValueError, match="of a run with --objective dpo, the flags ask for grpo"):
        tune(sums, tmp_path, start, **changes)
