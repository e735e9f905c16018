"""Removing units is zeroing them: in the logits, through the KV cache, through a file."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import ByteTokenizer
from formats.checkpoint import save_checkpoint
from formats.open_model import open_model
from model.config import GPTConfig
from model.generate import generate
from model.lora import LoraSettings, apply_lora
from model.masks import Mask
from model.pack import pack
from model.pruning.units import (
    Kept,
    all_units,
    drop_layers,
    keep_units,
    key_rows,
    query_rows,
    unit_flops,
    unit_parameters,
)
from tests.model_helpers import GPT2, LLAMA, QWEN3, UNBALANCED, build

IDX = torch.randint(97, (2, 14), generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "gpt2": GPT2,
    "gpt2-mlp-biases-only": dataclasses.replace(GPT2, o_bias=False, qkv_bias=False),
    "llama-all-kv": dataclasses.replace(LLAMA, n_kv_head=4),
    "llama-groups": LLAMA,
    "llama-one-kv": dataclasses.replace(LLAMA, n_kv_head=1),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True),
    "qwen3-free-head": dataclasses.replace(QWEN3, tie_embeddings=False, head_dim=6),
    "llama-biases-free-head": dataclasses.replace(
        LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True, tie_embeddings=False
    ),
    "pruned": dataclasses.replace(LLAMA, **UNBALANCED),
    "pruned-gpt2": dataclasses.replace(GPT2, n_head=(3, 0, 2), n_kv_head=(3, 0, 2), mlp_dim=(24, 40, 0)),
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def zeroed(model, kept):
    """The model, changed in place, with zeros in the columns of o and down that read units not in `kept`."""
    with torch.no_grad():
        for block, units in zip(model.h, kept):
            if block.attn is not None:
                gone = torch.ones(block.attn.o_proj.in_features, dtype=torch.bool)
                gone[query_rows(units.groups, model.config)] = False
                block.attn.o_proj.weight[:, gone] = 0
            if block.mlp is not None:
                gone = torch.ones(block.mlp.down_proj.in_features, dtype=torch.bool)
                gone[units.channels] = False
                block.mlp.down_proj.weight[:, gone] = 0
    return model


def some(config, seed=0, share=0.5):
    """A random choice of units in each layer, all of a sub-layer's at times lost."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda units: units[torch.rand(len(units), generator=g) < share]  # noqa: E731
    return [Kept(pick(units.groups), pick(units.channels)) for units in all_units(config)]


def assert_same_function(smaller, whole, tolerance=1e-5):
    with torch.no_grad():
        a, b = smaller.eval()(IDX), whole.eval()(IDX)
    assert (a - b)[..., :97].abs().max() < tolerance


@EVERY
@pytest.mark.parametrize("seed", range(3))
def test_removing_units_is_zeroing_them(config, seed):
    kept = some(config, seed)
    assert_same_function(keep_units(build(config), kept), zeroed(build(config), kept))


@EVERY
def test_a_sub_layer_without_units_is_absent_and_its_bias_stays(config):
    if config.mlp_bias and not config.o_bias:
        pytest.skip("no bias stands before the one that goes")
    none = torch.arange(0)
    kept = [
        Kept(none, units.channels) if i != 1 else Kept(units.groups, none) for i, units in enumerate(all_units(config))
    ]
    smaller = keep_units(build(config), kept)
    assert smaller.h[0].attn is None and smaller.h[1].mlp is None
    assert_same_function(smaller, zeroed(build(config), kept))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(CONFIGS)), st.integers(0, 10**6), st.sampled_from([0.1, 0.5, 0.9]))
def test_any_choice_of_units_keeps_function_and_config(name, seed, share):
    config = CONFIGS[name]
    kept = some(config, seed, share)
    smaller = keep_units(build(config), kept)
    assert_same_function(smaller, zeroed(build(config), kept))
    sizes = [smaller.config.layer(i) for i in range(config.n_layer)]
    assert [(s.n_kv_head, s.mlp_dim) for s in sizes] == [(len(k.groups), len(k.channels)) for k in kept]
    assert GPTConfig.from_dict(smaller.config.to_dict()) == smaller.config
    assert len({s.n_head // s.n_kv_head for s in sizes if s.n_kv_head}) <= 1
    assert smaller.config.head_dim == config.head_dim


@EVERY
def test_all_units_are_the_same_network_in_its_own_memory(config):
    model = build(config).train()
    same = keep_units(model, all_units(config))
    assert same.config == config and same.training
    pointers = {tensor.data_ptr() for tensor in model.state_dict().values()}
    for name, tensor in same.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]) and tensor.data_ptr() not in pointers
    assert all(p.requires_grad for p in same.parameters())


@EVERY
def test_units_hold_the_parameters_that_their_costs_say(config):
    kept = all_units(config)
    fewer = [Kept(units.groups[1:], units.channels[2:]) if len(units.groups) > 1 else units for units in kept]
    costs = unit_parameters(config)
    groups = sum(len(a.groups) - len(b.groups) for a, b in zip(kept, fewer))
    channels = sum(len(a.channels) - len(b.channels) for a, b in zip(kept, fewer))
    model = build(config)
    lost = model.num_params() - keep_units(model, fewer).num_params()
    assert lost == groups * costs.group + channels * costs.channel > 0 or config.n_kv_head == 1


def test_flops_of_units_are_what_a_networks_flops_lose():
    """A forward is a third of `flops_per_token`, which counts backward too."""
    model = build(LLAMA)
    kept = all_units(LLAMA)
    kept[1] = Kept(kept[1].groups[1:], kept[1].channels[5:])
    costs = unit_flops(LLAMA, T=10)
    lost = (model.flops_per_token(10) - keep_units(model, kept).flops_per_token(10)) / 3
    assert costs.group + 5 * costs.channel == lost


def test_rows_of_groups():
    config = dataclasses.replace(LLAMA, head_dim=2)  # 4 query heads on 2 kv heads
    assert query_rows(torch.tensor([1]), config).tolist() == [4, 5, 6, 7]
    assert key_rows(torch.tensor([0, 1]), config).tolist() == [0, 1, 2, 3]


@EVERY
def test_a_pruned_network_generates_through_its_cache_as_without(config):
    smaller = keep_units(build(config), some(config)).eval()
    prompts = IDX[:, :5].tolist()
    options = {"max_new_tokens": 8, "temperature": 0.0}
    assert generate(smaller, prompts, **options) == generate(smaller, prompts, use_cache=False, **options)


@EVERY
def test_a_pruned_network_saves_and_opens(config, tmp_path):
    config = dataclasses.replace(config, vocab_size=257, padded_vocab_size=264)
    smaller = keep_units(build(config), some(config)).eval()
    payload = {"model": smaller.state_dict(), "config": smaller.config.to_dict(), "tokenizer": ByteTokenizer().spec()}
    save_checkpoint(tmp_path / "pruned.pt", {**payload, "step": 0, "val_loss": None, "template": None})
    opened = open_model(tmp_path / "pruned.pt").model
    assert opened.config == smaller.config
    with torch.no_grad():
        assert torch.equal(opened(IDX), smaller(IDX))


@EVERY
def test_pruning_again_counts_units_as_they_are_now(config):
    once = some(config, seed=1, share=0.7)
    smaller = keep_units(build(config), once)
    again = some(smaller.config, seed=2, share=0.7)
    both = [Kept(a.groups[b.groups], a.channels[b.channels]) for a, b in zip(once, again)]
    assert_same_function(keep_units(smaller, again), zeroed(build(config), both))


@EVERY
def test_dropped_layers_are_passed_by(config):
    model, whole = build(config), build(config)
    smaller = drop_layers(model, [1])
    assert smaller.config.n_layer == 2 == len(smaller.h)
    assert [smaller.config.layer(i) for i in (0, 1)] == [config.layer(i) for i in (0, 2)]
    del whole.h[1]
    for layer, block in enumerate(whole.h):
        if block.attn is not None:
            block.attn.layer = layer
    assert_same_function(smaller, whole, tolerance=1e-9)
    assert {t.data_ptr() for t in smaller.state_dict().values()}.isdisjoint(
        {t.data_ptr() for t in model.state_dict().values()}
    )
    prompts, options = IDX[:, :5].tolist(), {"max_new_tokens": 8, "temperature": 0.0}
    assert generate(smaller, prompts, **options) == generate(smaller, prompts, use_cache=False, **options)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([Kept(torch.tensor([0, 2]), torch.tensor([0]))] * 3, "layer 0: kv groups to keep are .0, 2.: .* from 0 to 1"),
        ([Kept(torch.tensor([0]), torch.tensor([5, 3]))] * 3, "layer 0: channels .* ascending"),
        ([Kept(torch.tensor([0]), torch.tensor([-1, 3]))] * 3, "layer 0: channels"),
        ([Kept(torch.tensor([0]), torch.tensor([3, 3]))] * 3, "layer 0: channels"),
        ([Kept(torch.tensor([0]), torch.tensor([3]))] * 2, "given for 2 layers, the model has 3"),
    ],
)
def test_units_that_do_not_exist_are_refused(kept, message):
    with pytest.raises(ValueError, match=message):
        keep_units(build(LLAMA), kept)


@pytest.mark.parametrize(("layers", "message"), [([3], "layer 3 .* 0 to 2"), ([-1], "layer -1"), (range(3), "all 3")])
def test_layers_that_cannot_be_dropped_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        drop_layers(build(LLAMA), layers)


def test_layers_with_an_adapter_or_packed_are_refused():
    with_lora, packed = build(LLAMA), pack(build(LLAMA))
    apply_lora(with_lora, LoraSettings())
    for model in (with_lora, packed):
        with pytest.raises(ValueError, match="merge the adapter"):
            keep_units(model, all_units(LLAMA))
        with pytest.raises(ValueError, match="merge the adapter"):
            drop_layers(model, [0])


def test_masks_are_not_lost_in_silence():
    model = build(LLAMA)
    model.masks = {"h.0.attn.q_proj.weight": Mask((32, 32), (16, 16), torch.ones(2, 2, dtype=torch.bool))}
    for cut in (lambda: keep_units(model, all_units(LLAMA)), lambda: drop_layers(model, [0])):
        with pytest.raises(ValueError, match="the model is sparse"):
            cut()
