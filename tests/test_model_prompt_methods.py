"""Prefix tuning and P-tuning against the long way: keys before keys, and virtual tokens as tokens of the row."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from model.attention import AttentionInputs
from model.cache import KVCache
from model.generate import generate
from model.prompt_methods import PrefixSettings, PTuningSettings, apply_p_tuning, apply_prefix
from model.rope import apply_rope
from model.tuning import adapter_state
from tests.model_helpers import FAMILIES, GPT2, LLAMA, UNBALANCED, batch, build, loss_and_gradients
from tests.test_model_lora import train_a_little


@FAMILIES
def test_virtual_tokens_are_tokens_in_front_of_the_row(config):
    """The same embeddings at positions 0..P-1 of every row, as tokens of the base model itself."""
    model = train_a_little(apply_p_tuning(build(config), PTuningSettings(length=5, hidden=16))).eval()
    idx, targets = batch(config, T=20)
    ours = model(idx)
    base, tokens = build(config).eval(), model.prompt.folded()["embedding.weight"].detach()
    free = torch.arange(config.vocab_size, config.vocab_size + 5)  # rows of the padded vocabulary that no id names
    base.wte.weight.data[free] = tokens
    long = torch.cat((free.expand(2, -1), idx), dim=1)  # (2, 5 + 20)
    V = config.vocab_size
    torch.testing.assert_close(ours[..., :V], base(long)[:, 5:, :V], atol=1e-5, rtol=1e-4)
    _, gradients = loss_and_gradients(model, idx, targets)
    _, expected = loss_and_gradients(base, long, F.pad(targets, (5, 0), value=-100))
    model.prompt.fold()
    model.zero_grad()
    _, folded = loss_and_gradients(model, idx, targets)
    torch.testing.assert_close(folded["prompt.embedding.weight"], expected["wte.weight"][free], atol=1e-5, rtol=1e-4)
    assert set(gradients) > set(folded) and len(folded) == 1


@FAMILIES
def test_a_prefix_is_seen_by_every_query_and_has_no_position(config):
    model = train_a_little(apply_prefix(build(config), PrefixSettings(length=4, hidden=8)), size=0.3).eval()
    idx, _ = batch(config)
    seen = {}
    attn = model.h[1].attn
    attn.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    model(idx)
    keys, values = model.prompt.layers(model)[1]  # (1, n_kv_head, 4, head_dim)
    recorded = {}

    class Store:
        def append(self, layer, k, v):
            recorded.update(k=k, v=v)
            return k, v

    rope = model._rope_tables(idx, None)
    type(attn).forward(attn, seen["x"], AttentionInputs(rope=rope, cache=Store()))
    # By hand, in the text's own terms: scores of the prefix beside causal scores, one softmax over both.
    groups = config.n_head // config.n_kv_head
    k = torch.cat((keys.expand(2, -1, -1, -1), recorded["k"]), dim=2).repeat_interleave(groups, dim=1)
    v = torch.cat((values.expand(2, -1, -1, -1), recorded["v"]), dim=2).repeat_interleave(groups, dim=1)
    q = query(attn, seen["x"], rope)
    scores = q @ k.transpose(2, 3) / config.head_dim**0.5  # (B, n_head, T, 4 + T)
    T = idx.size(1)
    scores[..., 4:].masked_fill_(torch.ones(T, T).triu(1).bool(), float("-inf"))
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["out"], attn.o_proj(y), atol=1e-5, rtol=1e-4)


def query(attn, x, rope):
    q = attn.q_proj(x).view(*x.shape[:2], -1, attn.head_dim)
    if attn.q_norm is not None:
        q = attn.q_norm(q)
    return (q if rope is None else apply_rope(q, rope)).transpose(1, 2)


def test_virtual_tokens_take_context_and_a_prefix_does_not():
    prefixed = apply_prefix(build(GPT2), PrefixSettings(length=5))
    virtual = apply_p_tuning(build(GPT2), PTuningSettings(length=5))
    assert (prefixed.context_length, virtual.context_length) == (32, 27)
    prefixed(batch(GPT2, T=32)[0])
    virtual(batch(GPT2, T=27)[0])
    with pytest.raises(ValueError, match="28 tokens do not fit the model's context of 27"):
        virtual(batch(GPT2, T=28)[0])
    assert len(generate(virtual, [[1, 2, 3]], max_new_tokens=60)[0]) == 60
    with pytest.raises(ValueError, match="leave nothing of the model's context of 32"):
        apply_p_tuning(build(GPT2), PTuningSettings(length=32))


@pytest.mark.parametrize("apply", [apply_prefix, apply_p_tuning])
def test_generation_makes_the_prompt_once(apply):
    model = apply(build(LLAMA), PrefixSettings(length=3) if apply is apply_prefix else PTuningSettings(length=3)).eval()
    calls = []
    made = type(model.prompt).layers
    model.prompt.layers = lambda model: calls.append(1) or made(model.prompt, model)
    cache = KVCache(2, 10)
    for part in batch(LLAMA, T=6)[0].split(1, dim=1):
        model(part, cache=cache)
    assert len(calls) == 1


def test_layers_of_different_sizes_have_prefixes_of_their_own():
    model = apply_prefix(build(dataclasses.replace(LLAMA, **UNBALANCED)), PrefixSettings(length=3))
    shapes = {name: tuple(t.shape) for name, t in adapter_state(model, folded=True).items()}
    assert shapes == {"prompt.final.0": (2, 2, 3, 8), "prompt.final.2": (2, 1, 3, 8)}


def test_folding_leaves_the_function_and_less_to_store():
    for model in (
        train_a_little(apply_prefix(build(LLAMA), PrefixSettings(length=3))),
        train_a_little(apply_p_tuning(build(LLAMA), PTuningSettings(length=3, encoder="lstm", hidden=8))),
    ):
        idx, _ = batch(LLAMA)
        expected, before = model.eval()(idx), adapter_state(model)
        kept = {name: tensor.clone() for name, tensor in adapter_state(model, folded=True).items()}
        model.prompt.fold()
        after = adapter_state(model)
        assert torch.equal(model(idx), expected) and set(after) == set(kept)
        assert all(torch.equal(after[name], kept[name]) for name in kept)
        assert sum(t.numel() for t in after.values()) < sum(t.numel() for t in before.values())
        model.prompt.fold()  # nothing is left to fold
        assert torch.equal(model(idx), expected)


def test_the_defaults_are_the_documents():
    assert PrefixSettings().length == PTuningSettings().length == 20


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (PrefixSettings, "length", 0),
        (PrefixSettings, "hidden", -1),
        (PrefixSettings, "length", "20"),
        (PTuningSettings, "length", True),
        (PTuningSettings, "hidden", 0),
        (PTuningSettings, "encoder", "gru"),
    ],
)
def test_settings_out_of_range(kind, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        kind(**{name: value})
