"""Masks in files: lies are said, adapters know theirs, and every way out of the project keeps the zeros."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from formats.checkpoint import load_checkpoint, masks_entry, save_checkpoint
from formats.export import export_gguf, export_huggingface, export_peft, import_model, merge_adapter
from formats.open_model import load_payload, open_model
from formats.settings import GgufSettings, HuggingFaceSettings, ImportSettings, MergeSettings, PeftSettings
from model.lora import LoraSettings
from model.masks import Mask
from model.tuning import QLoraSettings
from tests.adapters import make_adapter
from tests.full_checkpoints import same
from tests.masked_models import BLOCKS, save_pruned, zeros
from tests.tiny_checkpoints import save_tiny

NAME = "h.1.mlp.down_proj.weight"
IDS = torch.randint(257, (1, 24), generator=torch.Generator().manual_seed(0))
ALL = LoraSettings(rank=4, dropout=0.0, targets=("all-linear",))
LLAMA = {
    "position": "rope",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "n_head": 4,
    "n_kv_head": 2,
    "head_dim": 8,
    "qkv_bias": False,
    "o_bias": False,
    "mlp_bias": False,
    "norm_bias": False,
}
WIDE = {
    **BLOCKS,
    "k_proj": (8, 8),
    "gate_proj": (16, 16),
    "up_proj": (16, 1),
}  # k: a Llama's heads are reordered in GGUF
FAMILIES = pytest.mark.parametrize("family", [{}, LLAMA], ids=["gpt2", "llama"])


def say(line: str) -> None:
    """Nothing is looked at."""


def logits(ref: Path, **more) -> torch.Tensor:
    with torch.no_grad():
        return open_model(ref, **more).model(IDS)[..., :257]


# -- lies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie, says",
    [
        (lambda masks: masks[NAME]["bits"][:1].bitwise_not_(), f"{NAME} holds .* weights that its mask says are zero"),
        (lambda masks: masks[NAME].update(shape=[32, 60]), f"the mask of {NAME} cannot be used: .* takes .* bytes"),
        (lambda masks: masks[NAME].update(block=[0, 7]), f"the mask of {NAME} cannot be used: .* block is"),
        (lambda masks: masks[NAME].pop("bits"), f"the mask of {NAME} cannot be used: .*shape, block and bits"),
        (lambda masks: masks.update({"h.7.x": masks[NAME]}), "a mask names h.7.x, which is no weight of this model"),
        (lambda masks: masks.update({"wte.weight": masks[NAME]}), "wte.weight is 384x32, its mask 32x64"),
        (lambda masks: masks.update({3: None}), "its mask 3 is of no weight"),
    ],
)
def test_a_file_whose_masks_lie_is_neither_written_nor_read(tmp_path: Path, lie, says: str) -> None:
    save_pruned(tmp_path / "a.pt")
    payload = load_checkpoint(tmp_path / "a.pt")
    payload["masks"] = {name: dict(spec, bits=spec["bits"].clone()) for name, spec in payload["masks"].items()}
    lie(payload["masks"])
    with pytest.raises(ValueError, match=says):
        save_checkpoint(tmp_path / "b.pt", payload)
    assert not (tmp_path / "b.pt").exists()
    torch.save({"format": 1, **payload}, tmp_path / "b.pt")  # as somebody else would
    with pytest.raises(ValueError, match=rf"b.pt: .*{says}"):
        load_checkpoint(tmp_path / "b.pt")


def test_masks_that_are_no_dict_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "a.pt")
    torch.save({**load_checkpoint(tmp_path / "a.pt"), "masks": [1]}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b.pt: its masks are a list, expected a dict by name of weight"):
        open_model(tmp_path / "b.pt")


def test_a_weight_that_is_zero_without_its_mask_saying_so_is_fine(tmp_path: Path) -> None:
    model = save_pruned(tmp_path / "a.pt")
    kept = model.masks[NAME].dense().nonzero()[0]
    model.get_parameter(NAME).data[tuple(kept)] = 0.0
    payload = {**load_checkpoint(tmp_path / "a.pt"), "model": model.state_dict()}
    save_checkpoint(tmp_path / "a.pt", payload)
    assert open_model(tmp_path / "a.pt").model.masks[NAME].dense()[tuple(kept)]


def test_a_base_without_masks_is_dense_whatever_zeros_it_holds(tmp_path: Path) -> None:
    save_pruned(tmp_path / "a.pt")
    payload = load_checkpoint(tmp_path / "a.pt")
    payload.pop("masks")
    save_checkpoint(tmp_path / "b.pt", payload)
    assert open_model(tmp_path / "b.pt").model.masks == {}


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_an_adapter_does_not_fit_the_same_weights_under_other_masks(tmp_path: Path) -> None:
    model = save_pruned(tmp_path / "a.pt")
    payload = load_checkpoint(tmp_path / "a.pt")
    finer = {name: Mask.of(mask.dense()) for name, mask in model.masks.items()}  # the same set, written bit by bit
    fewer = {name: mask for name, mask in model.masks.items() if name != NAME}
    for file, masks in {"finer.pt": finer, "fewer.pt": fewer, "none.pt": {}}.items():
        rest = {key: value for key, value in payload.items() if key != "masks"}
        save_checkpoint(tmp_path / file, {**rest, **masks_entry(masks)})
    for source in ("a.pt", "none.pt"):
        make_adapter(tmp_path / source, tmp_path / f"lora-{source}")
    assert torch.equal(logits(tmp_path / "lora-a.pt"), logits(tmp_path / "lora-a.pt", base_model=tmp_path / "finer.pt"))
    for adapter, base, says in (
        ("lora-a.pt", "fewer.pt", "under pruning masks of the digest .*fewer.pt has its weights but is under pruning"),
        ("lora-a.pt", "none.pt", "under pruning masks .*none.pt has its weights but is without pruning masks"),
        ("lora-none.pt", "a.pt", "a base without pruning masks, .*a.pt has its weights but is under pruning masks"),
    ):
        with pytest.raises(ValueError, match=says):
            open_model(tmp_path / adapter, base_model=tmp_path / base)


@FAMILIES
def test_a_merged_model_has_its_bases_zeros_and_the_adapters_logits_wherever_it_goes(tmp_path: Path, family) -> None:
    save_pruned(tmp_path / "a.pt", blocks=WIDE, **family)
    make_adapter(tmp_path / "a.pt", tmp_path / "lora.pt", settings=ALL)
    merge_adapter(MergeSettings(str(tmp_path / "lora.pt"), str(tmp_path / "m.pt")), say)
    base, merged = load_checkpoint(tmp_path / "a.pt"), load_checkpoint(tmp_path / "m.pt")
    assert same(base["masks"], merged["masks"]) and len(base["masks"]) >= 10
    said: list[str] = []
    export_huggingface(HuggingFaceSettings(str(tmp_path / "m.pt"), str(tmp_path / "hf")), said.append)
    assert any("the pruning masks are not" in line for line in said)
    export_gguf(GgufSettings(str(tmp_path / "m.pt"), str(tmp_path / "m.gguf"), "f32"), say)
    import_model(ImportSettings(str(tmp_path / "m.pt"), str(tmp_path / "again.pt")), say)
    assert same(base["masks"], load_checkpoint(tmp_path / "again.pt")["masks"])
    expected = logits(tmp_path / "lora.pt")
    assert (expected - logits(tmp_path / "a.pt")).abs().max() > 0.1
    for ref in ("m.pt", "hf", "m.gguf", "again.pt"):
        found = load_payload(tmp_path / ref)["model"]
        assert same(zeros(base["model"], base["masks"]), zeros(found, base["masks"])), ref
        assert (logits(tmp_path / ref) - expected).abs().max() < 1e-4, ref


def test_an_update_without_its_mask_would_be_seen(tmp_path: Path) -> None:
    """What the test above holds apart: the dense update fills zeros and gives other logits."""
    save_pruned(tmp_path / "a.pt")
    make_adapter(tmp_path / "a.pt", tmp_path / "on.pt", settings=ALL)
    make_adapter(tmp_path / "a.pt", tmp_path / "off.pt", settings=LoraSettings(**{**vars(ALL), "masked": False}))
    assert (logits(tmp_path / "on.pt") - logits(tmp_path / "off.pt")).abs().max() > 1e-2


@pytest.mark.parametrize("method, settings", [("lora", ALL), ("qlora", QLoraSettings(lora=ALL))], ids=["lora", "qlora"])
def test_peft_has_no_masks_so_a_masked_update_is_refused(tmp_path: Path, method: str, settings) -> None:
    save_pruned(tmp_path / "a.pt")
    make_adapter(tmp_path / "a.pt", tmp_path / "lora.pt", method, settings)
    with pytest.raises(ValueError, match=r"PEFT would add B A there too, .* merge it"):
        export_peft(PeftSettings(str(tmp_path / "lora.pt"), str(tmp_path / "peft")), say)
    assert not (tmp_path / "peft").exists()


def test_an_update_from_peft_is_dense_over_a_mask_and_does_not_merge(tmp_path: Path) -> None:
    save_pruned(tmp_path / "a.pt", **LLAMA)
    free = LoraSettings(**{**vars(ALL), "masked": False})
    make_adapter(tmp_path / "a.pt", tmp_path / "off.pt", settings=free)
    export_peft(PeftSettings(str(tmp_path / "off.pt"), str(tmp_path / "peft")), say)
    back = logits(tmp_path / "peft", base_model=tmp_path / "a.pt")
    torch.testing.assert_close(back, logits(tmp_path / "off.pt"), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="merging would lose the mask"):
        merge_adapter(
            MergeSettings(str(tmp_path / "peft"), str(tmp_path / "m.pt"), base_model=str(tmp_path / "a.pt")), say
        )
