"""What is pruned stays zero in every run: by every method and optimizer, resumed, in half precision, under DPO.

And the run is the right one: that of a model whose pruned weights do not exist.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from formats.adapter import is_adapter
from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.export import merge_adapter
from formats.open_model import build_model, open_model
from formats.settings import MergeSettings
from model.tuning import METHODS
from tests.full_checkpoints import same
from tests.masked_models import save_pruned, zeros
from tests.runs import BARE, log, records, spied_batches, tune
from tests.test_training_methods import METHOD_CHANGES
from tests.tiny import BYTES, pair_set, record_set
from training.optimizer import build_optimizers, set_learning_rate

# Four steps of two micro-batches at a rate, decay and clipping that all matter.
STEPS: dict[str, Any] = {**BARE, "max_steps": 4, "max_lr": 2e-2, "dropout": 0.0, "weight_decay": 0.1}
STEPS |= {"block_size": 96, "total_batch_size": 192, "max_grad_norm": 0.5}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with records, pairs, and a pruned base."""
    folder = tmp_path_factory.mktemp("masks")
    record_set(folder / "records")
    pair_set(folder / "pairs")
    save_pruned(folder / "base.pt", block_size=128, scale=3.0, n_layer=3)
    return folder


def names_of(folder: Path) -> list[str]:
    return list(load_checkpoint(folder / "base.pt")["masks"])


def still_pruned(place: Path, payload: dict[str, Any]) -> bool:
    """Whether a file's masks are the base's, and its zeros just those of its masks."""
    base = load_checkpoint(place / "base.pt")
    before, after = (zeros(each["model"], base["masks"]) for each in (base, payload))
    return same(payload["masks"], base["masks"]) and same(before, after)


# -- the right run -----------------------------------------------------------------------------------------------------


def by_hand(place: Path, folder: Path, batches: list[Any], optimizer: str) -> dict[str, torch.Tensor]:
    """The run in `folder` over again from its batches and rates, pruned gradients and weights set to zero in place."""
    payload = load_checkpoint(place / "base.pt")
    kept = {name: weight != 0 for name, weight in payload["model"].items() if name in payload["masks"]}
    model = build_model({key: value for key, value in payload.items() if key != "masks"}, place).train()
    how = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
    optimizers = build_optimizers(model, optimizer, **how)
    for record, two in zip(records(folder), zip(batches[::2], batches[1::2])):
        for batch in two:
            more = {"positions": batch.positions, "doc_ids": batch.doc_ids}
            (model(batch.inputs, batch.targets, **more) / sum(each.supervised for each in two)).backward()
        for name, mask in kept.items():
            model.get_parameter(name).grad *= mask
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        set_learning_rate(optimizers, record["lr"])
        for each in optimizers.values():
            each.step()
        for name, mask in kept.items():
            model.get_parameter(name).data *= mask
        model.zero_grad()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_masked_run_is_training_with_gradients_and_weights_zeroed_by_hand(
    place: Path, tmp_path: Path, optimizer: str
) -> None:
    with spied_batches() as batches:
        tune(place / "records", tmp_path, place / "base.pt", **STEPS, optimizer=optimizer)
    expected = by_hand(place, tmp_path, batches, optimizer)
    payload = load_checkpoint(tmp_path / "model_00003.pt")
    for name, tensor in payload["model"].items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
    assert still_pruned(place, payload)
    assert not same(payload["model"], load_checkpoint(place / "base.pt")["model"])
    # Were the pruned weights' gradients left in, they would be clipped for, and Muon would mix them into the others.
    with mock.patch("training.parallel.mask_gradients_", lambda model, masks: None):
        tune(place / "records", tmp_path / "wrong", place / "base.pt", **STEPS, optimizer=optimizer)
    wrong = load_checkpoint(tmp_path / "wrong" / "model_00003.pt")["model"]
    assert max(float((wrong[name] - expected[name]).abs().max()) for name in expected) > 1e-3


def test_a_step_that_refills_what_is_pruned_never_reaches_a_file(place: Path, tmp_path: Path) -> None:
    with (
        mock.patch("training.parallel.apply_masks_", lambda model, masks: None),
        pytest.raises(ValueError, match="weights that its mask says are zero"),
    ):
        tune(place / "records", tmp_path, place / "base.pt", **STEPS, optimizer="muon")
    assert not list(tmp_path.glob("*.pt"))


# -- every method ------------------------------------------------------------------------------------------------------

LORA: dict[str, Any] = {"lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ("all-linear",)}
RUNS: dict[str, dict[str, Any]] = {
    **{method: {"finetune_method": method, **METHOD_CHANGES[method]} for method in METHODS},
    "lora": {"finetune_method": "lora", **LORA},
    "rslora": {"finetune_method": "lora", **LORA, "use_rslora": True},
    "dora": {"finetune_method": "lora", **LORA, "use_dora": True},
    "pissa": {"finetune_method": "lora", **LORA, "lora_init": "pissa"},
    "qlora": {"finetune_method": "qlora", **LORA},
    "qlora-int8": {"finetune_method": "qlora", **LORA, "quantization": "int8"},
}


@pytest.mark.parametrize("run", RUNS)
def test_every_method_leaves_the_zeros_where_they_were(place: Path, tmp_path: Path, run: str) -> None:
    more = {"max_steps": 3, "eval_interval": 1, "load_best_model_at_end": True}
    tune(place / "records", tmp_path, place / "base.pt", **{**STEPS, **RUNS[run], **more})
    assert "Sparsity: 4" in log(tmp_path) or "Sparsity: 5" in log(tmp_path)
    full = load_checkpoint(tmp_path / "model_00002.pt")
    if not is_adapter(full):
        for file in ("model_00002.pt", "best.pt", "final.pt"):
            assert still_pruned(place, load_checkpoint(tmp_path / file)), file
        assert not same(full["model"], load_checkpoint(place / "base.pt")["model"])
        return
    opened = open_model(tmp_path / "final.pt").model
    assert list(opened.masks) == names_of(place)
    if RUNS[run]["finetune_method"] not in ("lora", "qlora"):
        assert still_pruned(place, {**load_checkpoint(place / "base.pt"), "model": opened.state_dict()})
        return
    said: list[str] = []
    merge_adapter(MergeSettings(str(tmp_path / "final.pt"), str(tmp_path / "merged.pt")), said.append)
    assert still_pruned(place, load_checkpoint(tmp_path / "merged.pt"))
    if run.startswith("qlora"):  # the comparison there is with the base as it was before four bits
        assert "merged into the unquantised one" in said[0]
        return
    merged, ids = open_model(tmp_path / "merged.pt").model, torch.tensor([BYTES.encode("the quick brown fox")])
    base = open_model(place / "base.pt").model
    with torch.no_grad():
        found, expected, before = (model(ids)[..., :257] for model in (merged, opened, base))
    assert (found - expected).abs().max() < 1e-4 < 1e-2 < (found - before).abs().max()


def test_pissa_starts_at_the_base_and_changes_no_weight_of_it(place: Path, tmp_path: Path) -> None:
    """Its first parts are of the masked weight, their product is dense; over the mask nothing of that arrives."""
    run = {**STEPS, **RUNS["pissa"], "max_steps": 1, "max_lr": 1e-30, "weight_decay": 0.0}
    tune(place / "records", tmp_path, place / "base.pt", **run)
    started, base = (open_model(path).model for path in (tmp_path / "model_00000.pt", place / "base.pt"))
    for name, weight in base.named_parameters():
        assert torch.equal(started.get_parameter(name), weight), name
    layer = started.h[0].attn.q_proj
    assert (layer.lora_B @ layer.lora_A)[~layer.mask].abs().max() > 0.01
    ids = torch.tensor([BYTES.encode("the quick brown fox")])
    with torch.no_grad():
        torch.testing.assert_close(started(ids), base(ids), rtol=0, atol=1e-5)


def test_lora_mask_off_is_the_dense_update_and_refuses_to_merge(place: Path, tmp_path: Path) -> None:
    """001's form: it trains as on a base without masks, to the bit."""
    payload = load_checkpoint(place / "base.pt")
    payload.pop("masks")
    save_checkpoint(tmp_path / "dense.pt", payload)
    run = {**STEPS, **RUNS["lora"]}
    for name, base, more in (
        ("off", place / "base.pt", {"lora_mask": False}),
        ("on", place / "base.pt", {}),
        ("dense", tmp_path / "dense.pt", {}),
    ):
        tune(place / "records", tmp_path / name, base, **run, **more)
    state = {name: load_checkpoint(tmp_path / name / "model_00003.pt") for name in ("off", "on", "dense")}
    assert same(state["off"]["model"], state["dense"]["model"]) and not same(
        state["off"]["model"], state["on"]["model"]
    )
    with pytest.raises(ValueError, match=r"trained with --lora_mask off .* merging would lose the mask"):
        merge_adapter(MergeSettings(str(tmp_path / "off" / "model_00003.pt"), str(tmp_path / "m.pt")), print)
    assert not (tmp_path / "m.pt").exists()
    opened = [open_model(tmp_path / name / "model_00003.pt").model for name in ("off", "dense")]
    ids = torch.tensor([BYTES.encode("the quick brown fox")])
    with torch.no_grad():
        assert torch.equal(*(model(ids) for model in opened))


# -- lives, processes, precisions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(place: Path, tmp_path: Path, method: str) -> None:
    run = {**STEPS, **RUNS[method], "max_steps": 6, "optimizer": "muon", "dropout": 0.1, "checkpoint_interval": 2}
    tune(place / "records", tmp_path / "whole", place / "base.pt", **run)
    middle = tmp_path / "whole" / "model_00002.pt"
    tune(place / "records", tmp_path / "later", place / "base.pt", **run, resume=True, checkpoint_path=str(middle))
    one, two = (load_checkpoint(tmp_path / name / "model_00005.pt") for name in ("whole", "later"))
    for part in ("model", "optimizer", "rng"):
        assert same(one[part], two[part]), part
    if method == "lora":
        return
    assert still_pruned(place, two)
    payload = load_checkpoint(middle)  # without its masks it is another run: the comparison can fail
    payload.pop("masks")
    save_checkpoint(tmp_path / "bare.pt", payload)
    bare = {"resume": True, "checkpoint_path": str(tmp_path / "bare.pt")}
    tune(place / "records", tmp_path / "other", place / "base.pt", **run, **bare)
    assert not same(load_checkpoint(tmp_path / "other" / "model_00005.pt")["model"], one["model"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_the_loss_scaler_refill_nothing(place: Path, tmp_path: Path, dtype: str) -> None:
    tune(place / "records", tmp_path, place / "base.pt", **STEPS, dtype=dtype, optimizer="muon")
    payload = load_checkpoint(tmp_path / "model_00003.pt")
    assert still_pruned(place, payload) and bool(payload["scaler"]) == (dtype == "float16")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_preferences_are_learnt_under_masks_against_a_masked_reference(
    place: Path, tmp_path: Path, method: str
) -> None:
    run = {**STEPS, **RUNS[method], "objective": "dpo", "block_size": 128, "total_batch_size": 512}
    run |= {"checkpoint_interval": 2}
    tune(place / "pairs", tmp_path / "whole", place / "base.pt", **run)
    middle = tmp_path / "whole" / "model_00002.pt"
    tune(place / "pairs", tmp_path / "later", place / "base.pt", **run, resume=True, checkpoint_path=str(middle))
    one, two = (load_checkpoint(tmp_path / name / "model_00003.pt") for name in ("whole", "later"))
    assert same(one["model"], two["model"])
    assert method == "lora" or still_pruned(place, two)


def test_a_compact_file_trains_like_the_checkpoint_it_was_made_of(place: Path, tmp_path: Path) -> None:
    from formats.export import export_compact
    from formats.settings import CompactSettings

    export_compact(CompactSettings(str(place / "base.pt"), str(tmp_path / "compact.pt")), lambda line: None)
    for name, base in (("one", place / "base.pt"), ("two", tmp_path / "compact.pt")):
        tune(place / "records", tmp_path / name, base, **STEPS)
    one, two = (load_checkpoint(tmp_path / name / "model_00003.pt") for name in ("one", "two"))
    assert same(one["model"], two["model"]) and same(one["masks"], two["masks"])
