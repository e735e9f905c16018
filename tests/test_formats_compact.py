"""Compact storage: smaller by the zeros, the same model to the bit, and damage or lies said."""

import dataclasses

import pytest
import torch

from formats.adapter import weights_digest
from formats.checkpoint import load_checkpoint, masks_entry, save_checkpoint
from formats.compact import to_compact
from formats.export import export_compact
from formats.open_model import open_model
from formats.settings import CompactSettings
from tests.adapters import make_adapter
from tests.masked_models import save_pruned
from tests.tiny_checkpoints import save_tiny


def compact(source, out, **more):
    said = []
    export_compact(CompactSettings(str(source), str(out), **more), said.append)
    return said


@pytest.mark.parametrize("tied", [True, False])
def test_the_round_trip_is_bit_identical(tmp_path, tied):
    model = save_pruned(tmp_path / "a.pt", tie_embeddings=tied)
    compact(tmp_path / "a.pt", tmp_path / "b.pt")
    before, after = load_checkpoint(tmp_path / "a.pt"), load_checkpoint(tmp_path / "b.pt")
    assert before["model"].keys() == after["model"].keys()
    for name, weight in before["model"].items():
        assert torch.equal(weight.view(torch.int32), after["model"][name].view(torch.int32)), name
    assert weights_digest(before["model"]) == weights_digest(after["model"])
    for key in ("config", "tokenizer", "template", "step", "val_loss"):
        assert before[key] == after[key]
    opened = open_model(tmp_path / "b.pt")
    assert opened.model.masks.keys() == model.masks.keys()
    for name, mask in model.masks.items():
        assert opened.model.masks[name].block == mask.block
        assert torch.equal(opened.model.masks[name].dense(), mask.dense())
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(opened.model(ids), open_model(tmp_path / "a.pt").model(ids))


def test_the_file_is_smaller_by_what_is_masked(tmp_path):
    model = save_pruned(
        tmp_path / "a.pt", n_embd=128, mlp_dim=256, blocks=dict.fromkeys(("up_proj", "down_proj"), (16, 16))
    )
    said = compact(tmp_path / "a.pt", tmp_path / "b.pt")
    gone = sum(mask.shape[0] * mask.shape[1] - mask.kept for mask in model.masks.values())
    sizes = [(tmp_path / name).stat().st_size for name in ("a.pt", "b.pt")]
    assert abs(sizes[0] - sizes[1] - 4 * gone) < 4096 and gone > 50_000
    assert "largest difference 0" in said[0] and said[1].startswith("Sparsity: 49") and "of its weights with" in said[2]


def test_the_arithmetic_of_smollm2_135m():
    """What half of its 16x16 blocks leaves, from shapes alone: the goal is 0.65 of the dense file."""
    embedding, layers, width, mlp = 49_152 * 576, 30, 576, 1536
    linear = layers * (2 * width * width + 2 * width * 192 + 3 * width * mlp)
    dense = embedding + linear + (2 * layers + 1) * width
    blocks = 4 * (dense - linear // 2) + linear // 256 // 8
    assert round(blocks / (4 * dense), 3) == 0.605
    assert round((blocks + linear // 8) / (4 * dense), 2) == 0.63  # a bit for each weight: unstructured, 2:4


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_the_bytes_a_number_rounds_matrices_and_keeps_zeros(tmp_path, dtype):
    model = save_pruned(tmp_path / "a.pt")
    compact(tmp_path / "a.pt", tmp_path / "b.pt", dtype=dtype)
    back = load_checkpoint(tmp_path / "b.pt")["model"]
    half = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, weight in model.state_dict().items():
        expected = weight.to(half).float() if weight.dim() > 1 else weight
        assert torch.equal(back[name], expected), name
    assert (tmp_path / "b.pt").stat().st_size < 0.6 * (tmp_path / "a.pt").stat().st_size


def test_an_adapter_works_on_the_compact_form_of_its_base(tmp_path):
    save_pruned(tmp_path / "a.pt")
    compact(tmp_path / "a.pt", tmp_path / "b.pt")
    make_adapter(tmp_path / "a.pt", tmp_path / "lora.pt")
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        both = [open_model(tmp_path / "lora.pt", base_model=tmp_path / name).model(ids) for name in ("a.pt", "b.pt")]
    assert torch.equal(*both)


def test_the_sign_of_a_pruned_zero_is_lost_and_does_not_make_another_base(tmp_path):
    model = save_pruned(tmp_path / "a.pt", blocks={"q_proj": (16, 16)})
    (name, mask), *_ = model.masks.items()
    model.get_parameter(name).data[~mask.dense()] = -0.0
    save_checkpoint(tmp_path / "a.pt", {**load_checkpoint(tmp_path / "a.pt"), "model": model.state_dict()})
    compact(tmp_path / "a.pt", tmp_path / "b.pt")
    before, after = (load_checkpoint(tmp_path / file)["model"] for file in ("a.pt", "b.pt"))
    assert before[name].signbit().any() and not after[name][~mask.dense()].signbit().any()
    assert weights_digest(before) == weights_digest(after)


def test_what_has_no_zeros_to_leave_out_is_refused(tmp_path):
    save_tiny(tmp_path / "dense.pt")
    with pytest.raises(ValueError, match=r"dense.pt: has no pruning masks"):
        compact(tmp_path / "dense.pt", tmp_path / "b.pt")
    save_pruned(tmp_path / "a.pt")
    make_adapter(tmp_path / "a.pt", tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"lora.pt: is an adapter: merge it"):
        compact(tmp_path / "lora.pt", tmp_path / "b.pt")
    with pytest.raises(ValueError, match="is there already"):
        compact(tmp_path / "a.pt", tmp_path / "dense.pt")
    assert not (tmp_path / "b.pt").exists()


def test_numbers_that_the_type_does_not_reach_are_refused(tmp_path):
    model = save_pruned(tmp_path / "a.pt")
    model.wte.weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"wte.weight holds numbers that f16 does not reach"):
        to_compact({"model": model.state_dict()}, model.masks, "f16")


NAME = "h.0.attn.q_proj.weight"


@pytest.mark.parametrize(
    "lie, says",
    [
        (lambda p: p["model"].update({NAME: p["model"][NAME][:-1]}), rf"{NAME} holds .* its mask keeps"),
        (lambda p: p["model"].update({NAME: p["model"][NAME].int()}), rf"{NAME} holds .* of torch.int32"),
        (lambda p: p["model"].pop(NAME), f"has a mask of {NAME}, but no such weight"),
        (lambda p: p["masks"].pop(NAME), rf"{NAME} has shape \(512,\), the network has"),
        (lambda p: p.update(compact={"dtype": "f8"}), "is stored compactly as .* this version reads f32, f16, bf16"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, lie, says):
    model = save_pruned(tmp_path / "a.pt", blocks={"q_proj": (16, 16), "k_proj": (16, 16)})
    mask = dataclasses.replace(model.masks[NAME], bits=torch.tensor([[True, False], [False, True]]))
    with torch.no_grad():
        weight = model.get_parameter(NAME)
        weight.masked_fill_(~mask.dense(), 0.0)
    masks = {**model.masks, NAME: mask}
    payload = to_compact({**load_checkpoint(tmp_path / "a.pt"), "model": model.state_dict()}, masks)
    payload["masks"] = masks_entry(masks)["masks"]
    payload.pop("in_memory", None)
    save_checkpoint(tmp_path / "b.pt", payload)
    open_model(tmp_path / "b.pt")
    lie(payload)
    save_checkpoint(tmp_path / "b.pt", payload)
    with pytest.raises(ValueError, match=says):
        open_model(tmp_path / "b.pt")


def test_one_flipped_bit_is_found(tmp_path):
    save_pruned(tmp_path / "a.pt")
    compact(tmp_path / "a.pt", tmp_path / "b.pt")
    content = bytearray((tmp_path / "b.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "b.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        open_model(tmp_path / "b.pt")


def test_every_weight_kept_and_none_kept(tmp_path):
    for kept in (0.0, 1.0):
        model = save_pruned(tmp_path / "a.pt", kept=kept)
        assert all(mask.sparsity == 1 - kept for mask in model.masks.values())
        compact(tmp_path / "a.pt", tmp_path / "b.pt", overwrite=True)
        back = load_checkpoint(tmp_path / "b.pt")["model"]
        assert all(torch.equal(back[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("size", [60_000, 2**31 - 1])
def test_a_small_file_cannot_claim_the_memory(tmp_path, size):
    save_pruned(tmp_path / "a.pt")
    payload = {key: value for key, value in load_checkpoint(tmp_path / "a.pt").items() if key != "masks"}
    name = "h.0.attn.q_proj.weight"
    payload["model"] = {**payload["model"], name: torch.zeros(0)}
    mask = {"shape": [size, size], "block": [size, size], "bits": torch.zeros(1, dtype=torch.uint8)}  # one block, gone
    save_checkpoint(tmp_path / "b.pt", {**payload, "masks": {name: mask}, "compact": {"dtype": "f32"}})
    with pytest.raises(ValueError, match=rf"b\.pt: its masks make {size * size:,} numbers of the"):
        load_checkpoint(tmp_path / "b.pt")
