"""Layers without their zeros give what the dense ones give, wherever they are used, and say where there is no gain."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.speed import sparse_step_times
from model.block_sparse import BlockLinear, LayoutLinear, gpu_layout
from model.generate import generate
from model.lora import LoraSettings, apply_lora
from model.masks import Mask, apply_masks_
from model.pack import for_generation
from tests.masked_models import random_mask
from tests.model_helpers import FAMILIES, GPT2, LLAMA, UNBALANCED, batch, build


def pruned(config, block=(8, 8), kept=0.5, only=("",)):
    """A model with masks on the layers whose names hold one of `only`."""
    model = build(config).eval()
    names = [name for name, _ in model.named_parameters() if name.endswith("_proj.weight")]
    chosen = [name for name in names if any(part in name for part in only)]
    shapes = {name: tuple(model.get_parameter(name).shape) for name in chosen}
    model.masks = {name: random_mask(shapes[name], block, kept, seed) for seed, name in enumerate(chosen)}
    apply_masks_(model, model.masks)
    return model


@given(
    out=st.integers(1, 50),
    into=st.integers(1, 50),
    block=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    kept=st.sampled_from([0.0, 0.3, 1.0]),
    rows=st.sampled_from([1, 2, 5, 8, 9]),
    bias=st.booleans(),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_a_layer_of_blocks_is_the_dense_layer(out, into, block, kept, rows, bias):
    torch.manual_seed(out * 51 + into)
    mask = random_mask((out, into), block, kept, seed=out)
    weight = torch.randn(out, into) * mask.dense()
    offset = torch.randn(out) if bias else None
    layer = BlockLinear(weight, offset, mask)
    assert torch.equal(layer.dense_weight(), weight)
    x = torch.randn(1, rows, into)
    expected = torch.nn.functional.linear(x, weight, offset)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)  # outside: from the dense weight


def test_a_layer_holds_its_kept_blocks_and_no_more():
    mask = random_mask((64, 64), (16, 16))
    layer = BlockLinear(torch.randn(64, 64) * mask.dense(), None, mask)
    held = sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers())
    assert held == mask.kept * (4 + 4 / 16 + 4 / 256) + 4 * 4 + 16 and not list(layer.parameters())
    with pytest.raises(ValueError, match="apply the masks first"):
        BlockLinear(torch.randn(64, 64), None, mask)


@FAMILIES
@pytest.mark.parametrize("uneven", [False, True])
@torch.inference_mode()
def test_a_model_without_its_zeros_writes_the_same_text(config, uneven):
    model = pruned(dataclasses.replace(config, **UNBALANCED) if uneven else config)
    sparse = for_generation(copy.deepcopy(model), "sparse")
    kinds = [type(module) for module in sparse.modules()]
    assert BlockLinear in kinds
    idx, _ = batch(config, B=2, T=12)
    torch.testing.assert_close(sparse(idx), model(idx), atol=1e-4, rtol=1e-4)
    how = {"max_new_tokens": 16, "temperature": 0.0}
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert generate(sparse, prompts, **how) == generate(model, prompts, **how)


@torch.inference_mode()
def test_a_joined_layer_has_the_masks_of_its_parts():
    """q alone is masked: k and v count as kept."""
    model = pruned(LLAMA, only=("q_proj", "up_proj"), kept=0.1)
    sparse = for_generation(copy.deepcopy(model), "sparse")
    attention = model.h[0].attn
    whole = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(sparse.h[0].qkv_proj.dense_weight(), whole)
    assert not isinstance(sparse.h[0].down_proj, BlockLinear), "that is dense"


@torch.inference_mode()
def test_what_gains_nothing_is_said():
    with pytest.raises(ValueError, match="this one is dense"):
        for_generation(build(LLAMA), "sparse")
    with pytest.raises(ValueError, match=r"h.0.o_proj \(unstructured\): a CPU multiplies blocks of at least 8 rows"):
        for_generation(pruned(LLAMA, (1, 1), only=("o_proj",)), "sparse")
    with pytest.raises(ValueError, match=r"\(8x8\): .*% zeros are too few, it takes 20%"):
        for_generation(pruned(LLAMA, kept=0.9, only=("o_proj",)), "sparse")
    with pytest.raises(ValueError, match="merge it first"):
        for_generation(apply_lora(pruned(LLAMA, only=("o_proj",)), LoraSettings(targets=("o_proj",))), "sparse")


def test_gpu_layouts():
    """As far as a CPU goes: its kernel of blocks multiplies, 2:4 is only laid out on a GPU."""
    mask = random_mask((64, 96), (16, 16))
    weight = (torch.randn(64, 96) * mask.dense()).bfloat16().float()
    blocks = gpu_layout(weight, mask)
    assert blocks.layout == torch.sparse_bsr and torch.equal(blocks.to_dense().float(), weight)
    x, bias = torch.randn(2, 3, 96), torch.randn(64)
    y = LayoutLinear(blocks.float(), bias)(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), atol=1e-4, rtol=1e-4)
    assert gpu_layout(weight[:, :90], random_mask((64, 90), (16, 16))) == gpu_layout(
        weight, random_mask((64, 96), (24, 24))
    )
    two = Mask.of(torch.tensor([True, False, False, True]).repeat(64, 32))
    with pytest.raises(RuntimeError, match="Only CUDA tensors"):
        gpu_layout(two.dense().float(), two)
    part = Mask.of(two.dense()[:33])
    assert gpu_layout(part.dense().float(), part) == "the 2:4 kernel takes multiples of 32 and 64"


def test_step_times_are_of_both_forms_and_leave_the_model_alone():
    model = pruned(GPT2)
    before = copy.deepcopy(model.state_dict())
    times = sparse_step_times(model, steps=3)
    assert times.dense > 0 and times.sparse > 0 and times.speedup == times.dense / times.sparse
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="40 steps do not fit into a context of 32"):
        sparse_step_times(model, steps=40)
