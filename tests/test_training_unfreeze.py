"""Progressive unfreezing: which layers train at which step, at which rate; what has not trained yet has no state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from formats.checkpoint import load_checkpoint
from model.gpt import GPT
from tests.runs import BARE, log, tune
from tests.tiny import record_set
from tests.tiny_checkpoints import save_tiny, tiny_config, tiny_model
from training.network import learning_rate_scales
from training.optimizer import build_optimizers, set_learning_rate
from training.unfreeze import Unfreezing


def training_parts(model: GPT) -> set[str]:
    """`h.N` for each layer with parameters that train, and the names of the other parameters that do."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {".".join(name.split(".")[:2]) for name in names}


ALL = {"wte.weight", "wpe.weight", "h.0", "h.1", "h.2", "h.3", "ln_f.weight", "ln_f.bias"}
ABOVE_1 = {"h.1", "h.2", "h.3", "ln_f.weight", "ln_f.bias"}
ABOVE_2 = {"h.2", "h.3", "ln_f.weight", "ln_f.bias"}
TOP = {"h.3", "ln_f.weight", "ln_f.bias"}


@pytest.mark.parametrize(
    ("stages", "max_steps", "expected"),
    [
        (4, 8, [TOP] * 2 + [ABOVE_2] * 2 + [ABOVE_1] * 2 + [ALL] * 2),
        (2, 5, [ABOVE_2] * 3 + [ALL] * 2),
        (3, 6, [ABOVE_2] * 2 + [ABOVE_1] * 2 + [ALL] * 2),  # 4/3 layers are 2, 8/3 are 3
        (1, 3, [ALL] * 3),
        (9, 8, [TOP] * 2 + [ABOVE_2] * 2 + [ABOVE_1] * 2 + [ALL] * 2),  # no more stages than layers
        (4, 2, [ABOVE_2, ALL]),  # nor than steps
    ],
)
def test_what_trains_at_each_step(stages: int, max_steps: int, expected: list[set[str]]) -> None:
    model = tiny_model(n_layer=4)
    unfreezing = Unfreezing(model, stages, max_steps)
    seen, said = [], []
    for step in range(max_steps):
        said.append(unfreezing.begin(step))
        seen.append(training_parts(model))
    assert seen == expected
    changes = [step == 0 or expected[step] != expected[step - 1] for step in range(max_steps)]
    assert [text is not None for text in said] == changes
    for step in range(max_steps):  # a run that resumes there finds the same
        resumed = tiny_model(n_layer=4)
        Unfreezing(resumed, stages, max_steps).begin(step)
        assert training_parts(resumed) == expected[step]


def test_stages_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="--unfreeze_stages 0: expected at least 1"):
        Unfreezing(tiny_model(), 0, 8)


def test_each_layer_has_its_rate_in_the_optimizer() -> None:
    model = GPT(tiny_config(n_layer=3, tie_embeddings=False))
    scales = learning_rate_scales(model, "progressive", None, 0.5)
    optimizers = build_optimizers(
        model, "adamw", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, fused=False, lr_scales=scales
    )
    set_learning_rate(optimizers, 1e-3)
    rates = {p: group["lr"] for optimizer in optimizers.values() for group in optimizer.param_groups
             for p in group["params"]}  # fmt: skip
    expected = {"h.2": 1e-3, "h.1": 5e-4, "h.0": 2.5e-4, "wte": 1.25e-4, "wpe": 1.25e-4, "ln_f": 1e-3, "lm_head": 1e-3}
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[:2]) if name.startswith("h.") else name.split(".")[0]
        assert rates[parameter] == pytest.approx(expected[part]), name
    assert {group["weight_decay"] for group in optimizers["adamw"].param_groups} == {0.0, 0.1}


@pytest.mark.parametrize("method", ["full", "freeze", "adapter"])
def test_other_methods_have_one_rate(method: str) -> None:
    assert learning_rate_scales(tiny_model(), method, None, 0.5) == {}


def test_a_run_moves_a_layer_from_its_stage_on_and_holds_no_state_before(tmp_path: Path) -> None:
    record_set(tmp_path / "records")
    save_tiny(tmp_path / "base.pt", n_layer=3, block_size=128)
    settings = {**BARE, "finetune_method": "progressive", "unfreeze_stages": 3, "max_steps": 6, "dropout": 0.0}
    more = {"checkpoint_interval": 1, "keep_last_n_checkpoints": 0}
    tune(tmp_path / "records", tmp_path / "run", tmp_path / "base.pt", **{**settings, **more})
    moved = []
    base = load_checkpoint(tmp_path / "base.pt")["model"]
    for step in range(1, 6):
        payload = load_checkpoint(tmp_path / "run" / f"model_{step:05d}.pt")
        changed = {name for name in base if not torch.equal(payload["model"][name], base[name])}
        assert changed <= set(payload["optimizer"]["adamw"]), "it moved without a state"
        moved.append({".".join(name.split(".")[:2]) for name in payload["optimizer"]["adamw"]})
    top = {"h.2", "ln_f.weight", "ln_f.bias"}
    assert moved[0] == top and moved[1] == moved[2] == top | {"h.1"}
    assert moved[3] == moved[4] == top | {"h.1", "h.0", "wte.weight", "wpe.weight"}
    text = log(tmp_path / "run")
    for line in ("Step 0: the last 1 of 3 layers train", "Step 2: the last 2 of 3 layers train",
                 "Step 4: all layers and the embeddings train"):  # fmt: skip
        assert text.count(line) == 1
