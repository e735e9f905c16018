"""Distillation against the naive formula, and as whole runs: what they equal, learn, resume and refuse."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import Batch, eval_batches
from data.shards import open_dataset
from formats.checkpoint import load_checkpoint, save_checkpoint
from model import loss, onednn
from model.gpt import GPT
from model.loss import linear_distillation_sum
from tests.runs import BARE, changed_losses, log, losses, records, tune, weights
from tests.tiny import record_set, text_set
from tests.tiny_checkpoints import save_tiny, tiny_config, tiny_model
from training.objectives.distill import Distillation
from training.plan import plan_memory
from training.run_settings import FinetuneSettings

RUN: dict[str, Any] = {"objective": "distill", "max_steps": 6, "max_lr": 1e-2, **BARE}


# -- the loss --------------------------------------------------------------------------------------------------------


def naive(
    hidden: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, hard: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From all logits at once; `logits` (N, v) are the teacher's."""
    ours = (hidden @ weight[: logits.size(1)].t()).log_softmax(1)[targets != -100]
    theirs = logits.log_softmax(1)[targets != -100]
    kl = (theirs.exp() * (theirs - ours)).sum()
    ce = F.nll_loss(ours, targets[targets != -100], reduction="sum")
    return (1 - hard) * kl + hard * ce, kl, ce


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 30),
    padding=st.integers(0, 5),
    vocab_size=st.integers(2, 30),
    chunk=st.one_of(st.none(), st.integers(1, 40)),
    masked=st.sampled_from([0.0, 0.5, 0.9]),
    hard=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_loss_is_the_naive_one_in_value_and_gradients(
    N: int, padding: int, vocab_size: int, chunk: int | None, masked: float, hard: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, 5, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocab_size + padding, 5, generator=g, dtype=torch.float64).requires_grad_()
    # A teacher of another width and padding.
    their_hidden = torch.randn(N, 7, generator=g, dtype=torch.float64)
    their_weight = torch.randn(vocab_size + 2, 7, generator=g, dtype=torch.float64)
    targets = torch.randint(vocab_size, (N,), generator=g)
    targets[torch.rand(N, generator=g) < masked] = -100
    found = linear_distillation_sum(hidden, weight, their_hidden, their_weight, targets, vocab_size, hard, chunk)
    wanted = naive(hidden, weight, their_hidden @ their_weight[:vocab_size].t(), targets, hard)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    ours, theirs = (torch.autograd.grad(-3.0 * loss[0], (hidden, weight)) for loss in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert not ours[1][vocab_size:].any()
    with torch.no_grad():
        again = linear_distillation_sum(hidden, weight, their_hidden, their_weight, targets, vocab_size, hard, chunk)
    torch.testing.assert_close(again, found)


def test_the_divergence_from_itself_is_nothing_and_so_is_its_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 8, generator=g).requires_grad_(), torch.randn(24, 8, generator=g).requires_grad_()
    targets = torch.randint(20, (9,), generator=g)
    loss, kl, ce = linear_distillation_sum(hidden, weight, hidden, weight, targets, 20)
    assert float(loss.detach()) == float(kl) == 0.0 and float(ce) > 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("by_onednn", [False, True])
def test_no_array_is_as_large_as_all_logits(by_onednn: bool) -> None:
    """The largest arrays of forward and backward are the head and three pieces, not N x V."""
    hidden, weight = torch.randn(64, 4).requires_grad_(), torch.randn(1000, 4).requires_grad_()
    sizes: list[int] = []

    def spy(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*given: Any, **more: Any) -> torch.Tensor:
            tensor = make(*given, **more)
            sizes.append(tensor.numel())
            return tensor

        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "pays_here", lambda: by_onednn)
        patch.setattr(torch, "empty", spy(torch.empty))
        patch.setattr(loss, "linear", spy(loss.linear))
        args = (torch.randn(64, 4), torch.randn(1000, 4), torch.randint(1000, (64,)), 1000)
        linear_distillation_sum(hidden, weight, *args, chunk=8)[0].backward()
    assert max(sizes) == 8 * 1000 * (1 if by_onednn else 3)


# -- the objective ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text_set(folder / "text")
    record_set(folder / "records")
    save_tiny(folder / "student.pt", seed=0, block_size=128, scale=1.0)
    save_tiny(folder / "teacher.pt", seed=1, block_size=128, scale=8.0)
    return folder


def a_batch(folder: Path) -> Batch:
    tokens = open_dataset(folder, "train")
    return next(iter(eval_batches(tokens, batch_size=3, block_size=128, max_windows=3, rank=0, world_size=1)))


def all_streams(model: GPT, batch: Batch) -> list[torch.Tensor]:
    """Block by block, without hooks."""
    seen = []
    for block in model.h:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(batch.inputs, positions=batch.positions, doc_ids=batch.doc_ids)
    return seen


@pytest.mark.parametrize(("hard", "hidden"), [(0.0, 0.0), (0.4, 0.0), (0.0, 2.0)])
@pytest.mark.parametrize("name", ["text", "records"])
def test_loss_and_gradients_of_a_model_are_the_naive_ones(sets: Path, name: str, hard: float, hidden: float) -> None:
    student, teacher = (tiny_model(seed, block_size=128).requires_grad_(True) for seed in (0, 1))
    batch = a_batch(sets / name)
    how = FinetuneSettings(objective="distill", distill_hard=hard, distill_hidden=hidden)
    distill = Distillation(how, student, teacher, "teacher")
    loss, sums = distill.loss(student, batch)
    gradients = torch.autograd.grad(loss, list(student.parameters()))

    where: dict[str, Any] = {"positions": batch.positions, "doc_ids": batch.doc_ids}
    ours, theirs = (each(batch.inputs, **where)[..., :257].flatten(0, 1) for each in (student, teacher))
    eye = torch.eye(257)
    wanted, kl, ce = naive(ours, eye, theirs.detach(), batch.targets.flatten(), hard)
    if hidden:
        chosen = batch.targets != -100
        parts = zip(all_streams(copy.deepcopy(student), batch), all_streams(copy.deepcopy(teacher), batch))
        apart = sum(((a - b)[chosen].square().sum(1) / b[chosen].square().sum(1)).sum() for a, b in parts) / 2
        assert float(sums["distill/hidden"]) == pytest.approx(float(apart), rel=1e-5)
        assert float(loss) == pytest.approx(float(wanted) + hidden * float(apart), rel=1e-5)
        return
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert [float(sums[name]) for name in distill.metrics] == pytest.approx([float(kl), float(ce)], rel=1e-5)
    naives = torch.autograd.grad(wanted, list(student.parameters()))
    scale = max(float(gradient.abs().max()) for gradient in naives)
    torch.testing.assert_close(gradients, naives, rtol=1e-3, atol=1e-5 * scale)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert distill.evaluate([batch])[:2] == (pytest.approx(float(loss), rel=1e-6), batch.supervised)


@pytest.mark.parametrize("changes", [{}, {"finetune_method": "lora"}, {"distill_hidden": 1.0, "distill_hard": 0.2}])
def test_a_student_comes_nearer_to_its_teacher_which_stays_as_it_is(
    sets: Path, changes: dict[str, Any], tmp_path: Path
) -> None:
    before = (sets / "teacher.pt").read_bytes()
    how = {**RUN, "teacher": str(sets / "teacher.pt"), "max_steps": 12, "max_lr": 3e-2, "eval_interval": 6, **changes}
    tune(sets / "text", tmp_path, sets / "student.pt", **how)
    before_training, last = records(tmp_path)[0]["val_loss_before"], records(tmp_path)[-1]
    assert last["val_loss"] < (0.98 if "finetune_method" in changes else 0.85) * before_training
    assert (sets / "teacher.pt").read_bytes() == before
    text = log(tmp_path)
    assert f"Objective: distill, KL from {sets / 'teacher.pt'}, over the whole vocabulary" in text
    assert "Eval distill/cross_entropy:" in text and "Perplexity" not in text
    entry = load_checkpoint(tmp_path / "model_00011.pt")["teacher"]
    assert {"digest", "path", "name"} <= set(entry)


def test_a_run_that_was_interrupted_ends_with_the_same_bits(sets: Path, tmp_path: Path) -> None:
    how = {**RUN, "teacher": str(sets / "teacher.pt"), "distill_hidden": 0.5}
    tune(sets / "records", tmp_path / "whole", sets / "student.pt", **how)

    def stop(number: int, loss: torch.Tensor) -> torch.Tensor:
        if number == 7:  # two micro-batches a step
            signal.raise_signal(signal.SIGTERM)
        return loss

    with changed_losses(stop):
        assert not tune(sets / "records", tmp_path / "cut", sets / "student.pt", **how)["finished"]
    how.pop("teacher")  # the checkpoint knows it
    assert tune(sets / "records", tmp_path / "cut", sets / "student.pt", **how, auto_resume=True)["finished"]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole", 5).items():
        assert torch.equal(weights(tmp_path / "cut", 5)[name], tensor), name


def test_a_resumed_run_insists_on_its_teacher(sets: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.pt"
    teacher.write_bytes((sets / "teacher.pt").read_bytes())
    how = {**RUN, "teacher": str(teacher)}
    tune(sets / "text", tmp_path / "run", sets / "student.pt", **{**how, "max_steps": 2})
    payload = load_checkpoint(teacher)
    payload["model"]["ln_f.weight"] = payload["model"]["ln_f.weight"] * 1.01
    save_checkpoint(teacher, payload)
    with pytest.raises(ValueError, match=r"--teacher .*: is another model than the run began with"):
        tune(sets / "text", tmp_path / "run", sets / "student.pt", **how, auto_resume=True)


def test_the_plan_counts_the_teacher(sets: Path) -> None:
    """Also beside an adapter, whose own base would be a reference for nothing."""
    for method in ("full", "lora"):
        plain, taught = (
            plan_memory(FinetuneSettings(block_size=128, finetune_method=method, **how), tiny_config(128))
            for how in ({}, {"objective": "distill", "teacher": str(sets / "teacher.pt")})
        )
        assert taught.weights - plain.weights == 4 * tiny_model(block_size=128).num_params()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "--objective distill learns from a model: name it with --teacher"),
        ({"teacher": "missing.pt"}, "missing.pt: no such checkpoint"),
        ({"distill_hard": 1.5}, "--distill_hard 1.5: expected 0 to 1"),
        ({"distill_hidden": -1.0}, "--distill_hidden -1.0: expected at least 0"),
        ({"teacher": "deep", "distill_hidden": 1.0}, "has 2 layers of width 32, .* 3 layers of width 32"),
        ({"teacher": "words"}, "so both need the same tokenizer"),
        ({"objective": "sft"}, "--teacher .* does nothing with --objective sft"),
    ],
)
def test_what_can_not_be_is_refused_in_a_line(
    changes: dict[str, Any], message: str, sets: Path, tmp_path: Path
) -> None:
    if changes.get("teacher") == "deep":
        changes = {**changes, "teacher": str(save_tiny(tmp_path / "deep.pt", block_size=128, n_layer=3))}
    if changes.get("teacher") == "words":
        payload = load_checkpoint(sets / "teacher.pt")
        save_checkpoint(tmp_path / "words.pt", {**payload, "tokenizer": {"kind": "gpt2"}})
        changes = {**changes, "teacher": str(tmp_path / "words.pt")}
    how = {**RUN, "teacher": str(sets / "teacher.pt"), **changes}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        tune(sets / "text", tmp_path / "run", sets / "student.pt", **how)
    assert "\n" not in str(error.value)
