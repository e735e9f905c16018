"""What a mask is: bits and blocks, their file form, and what is done to a model with them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.masks import Mask, apply_masks_, check_masks, mask_gradients_, sparsity_line, sparsity_report
from model.quantize import quantize_blocks
from tests.model_helpers import LLAMA, build

NAME = "h.1.attn.q_proj.weight"
SIZES = st.integers(1, 40)


@st.composite
def masks(draw):
    shape, block = (draw(SIZES), draw(SIZES)), (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return Mask(shape, block, torch.rand(grid, generator=generator) < draw(st.floats(0, 1)))


@given(masks())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_dense_form_and_file_form_are_the_mask(mask):
    dense = mask.dense()
    by_hand = [[bool(mask.bits[r // mask.block[0], c // mask.block[1]]) for c in range(mask.shape[1])]
               for r in range(mask.shape[0])]  # fmt: skip
    assert dense.tolist() == by_hand
    assert torch.equal(Mask.of(dense, mask.block).bits, mask.bits)
    spec = mask.spec()
    assert spec["bits"].numel() == -(-mask.bits.numel() // 8)
    again = Mask.from_spec(spec)
    assert (again.shape, again.block) == (mask.shape, mask.block) and torch.equal(again.bits, mask.bits)
    assert mask.kept == int(dense.sum()) and mask.sparsity == 1 - mask.kept / dense.numel()


def test_sparsity_counts_weights_not_blocks():
    mask = Mask((5, 8), (4, 8), torch.tensor([[True], [False]]))  # of two blocks, the second has one row of four
    assert mask.sparsity == pytest.approx(8 / 40)


def test_the_first_bit_is_the_lowest_of_its_byte():
    mask = Mask((1, 10), (1, 1), torch.tensor([[True, False, False, True, False, False, False, False, False, True]]))
    assert mask.spec()["bits"].tolist() == [0b1001, 0b10]


def test_pattern():
    two_of_four = torch.tensor([[True, True, False, False, False, True, False, True]])
    four_of_eight = torch.tensor([[True, True, True, False, False, False, True, False]])
    assert Mask.of(two_of_four).pattern == "2:4"
    assert Mask.of(four_of_eight).pattern == "4:8"
    assert Mask.of(two_of_four[:, 1:]).pattern == "unstructured"
    assert Mask.of(torch.ones(16, 32, dtype=torch.bool), (16, 8)).pattern == "16x8"


def test_a_mask_of_a_transposed_matrix():
    kept = torch.tensor([[True, False, False, True], [True, True, False, False]]).t().contiguous().t()
    mask = Mask.of(kept)
    assert mask.pattern == "2:4" and torch.equal(Mask.from_spec(mask.spec()).dense(), kept)


def test_a_matrix_that_does_not_follow_its_blocks_is_refused():
    kept = torch.ones(6, 6, dtype=torch.bool)
    kept[4, 5] = False
    with pytest.raises(ValueError, match="blocks of 3x3: that of row 4, column 5 is only in part kept"):
        Mask.of(kept, (3, 3))


GOOD = {"shape": [3, 5], "block": [2, 2], "bits": torch.tensor([0b111111], dtype=torch.uint8)}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"shape": [3]}, r"shape is \[3\]"),
        ({"shape": [3, 0]}, r"shape is \[3, 0\]"),
        ({"block": [2, True]}, "block is"),
        ({"block": "16"}, "block is '16'"),
        ({"bits": torch.zeros(2, dtype=torch.uint8)}, r"takes 1 bytes, found torch.uint8 of \(2,\)"),
        ({"bits": torch.zeros(1)}, "takes 1 bytes, found torch.float32"),
        ({"bits": [63]}, "takes 1 bytes, found list"),
        ({"bits": torch.tensor([0b1111111], dtype=torch.uint8)}, "bits set beyond its last block"),
        ({"more": 1}, "shape, block and bits"),
    ],
)
def test_a_spec_that_lies_is_refused(change, says):
    assert Mask.from_spec(GOOD).sparsity == 0
    with pytest.raises(ValueError, match=says):
        Mask.from_spec({**GOOD, **change})


def test_bits_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"a mask of 3x5 in blocks of 2x2 takes 2x3 bits, found 2x2 of torch.bool"):
        Mask((3, 5), (2, 2), torch.ones(2, 2, dtype=torch.bool))


def half(shape, block, seed=0):
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    return Mask(shape, block, torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < 0.5)


def test_applying_leaves_exactly_what_is_kept():
    model, dense = build(LLAMA), build(LLAMA)
    mask = half((32, 32), (12, 5))
    with pytest.raises(ValueError, match=f"{NAME} holds .* weights that its mask says are zero, the first in row 0"):
        check_masks(model, {NAME: mask})
    apply_masks_(model, {NAME: mask})
    check_masks(model, {NAME: mask})
    for name, weight in model.named_parameters():
        expected = dense.get_parameter(name) * (mask.dense() if name == NAME else 1)
        assert torch.equal(weight, expected), name
    (row,) = sparsity_report(model, {NAME: mask})
    assert row == (NAME, (32, 32), "12x5", pytest.approx(mask.sparsity))


def test_the_line_of_a_report_is_over_weights():
    model = build(LLAMA)
    shapes = {name: tuple(w.shape) for name, w in model.named_parameters() if name.endswith("_proj.weight")}
    none, two = torch.zeros(2, 2, dtype=torch.bool), torch.tensor([True, True, False, False]).repeat(48, 8)
    masks = {NAME: Mask(shapes[NAME], (16, 16), none), "h.2.mlp.up_proj.weight": Mask.of(two)}
    apply_masks_(model, masks)
    line = sparsity_line(sparsity_report(model, masks))
    assert line == "70.00% of 2,560 masked weights are zero (16x16 and 2:4); by layer, %: 1: 100, 2: 50"


def test_one_weight_that_strays_is_found():
    """A share of zeros would not notice: another weight became zero at the same time."""
    model, mask = build(LLAMA), half((32, 32), (8, 8))
    apply_masks_(model, {NAME: mask})
    stray, kept = (~mask.dense()).nonzero()[5].tolist(), mask.dense().nonzero()[0].tolist()
    weight = model.get_parameter(NAME).data
    weight[tuple(stray)], weight[tuple(kept)] = 1e-30, 0.0
    with pytest.raises(ValueError, match=rf"{NAME} holds 1 weights .* row {stray[0]}, column {stray[1]}"):
        check_masks(model, {NAME: mask})


def test_gradients_of_what_is_not_kept_are_zeroed():
    model, mask = build(LLAMA), half((32, 32), (8, 8))
    model.get_parameter(NAME).grad = torch.full((32, 32), torch.nan)
    mask_gradients_(model, {NAME: mask})
    assert torch.equal(model.get_parameter(NAME).grad == 0, ~mask.dense())
    assert model.get_parameter("h.0.attn.q_proj.weight").grad is None


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_zeros_outlast_quantisation(kind):
    """A block of 64 weights without any other has a scale slightly off zero: its codes must still read as zero."""
    model = build(LLAMA)
    masks = {
        name: half(tuple(w.shape), (16, 16)) for name, w in model.named_parameters() if name.endswith("_proj.weight")
    }
    apply_masks_(model, masks)
    quantize_blocks(model, kind)
    check_masks(model, masks)
    apply_masks_(model, masks)  # nothing to write to
    assert all(row.sparsity >= masks[row.weight].sparsity for row in sparsity_report(model, masks))


def test_a_mask_of_nothing_or_of_another_shape_is_refused():
    model = build(LLAMA)
    with pytest.raises(ValueError, match=r"a mask names h.9.attn.q_proj.weight, which is no weight of this model"):
        check_masks(model, {"h.9.attn.q_proj.weight": half((32, 32), (16, 16))})
    with pytest.raises(ValueError, match=f"{NAME} is 32x32, its mask 32x16"):
        apply_masks_(model, {NAME: half((32, 16), (16, 16))})
