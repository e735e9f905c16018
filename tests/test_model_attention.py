"""Rotary positions, grouped heads, packed rows and the key/value cache."""

import dataclasses

import pytest
import torch

from model.attention import AttentionInputs, attend, document_mask
from model.cache import KVCache
from model.rope import apply_rope, rope_frequencies, rope_tables
from tests.model_helpers import FAMILIES, GPT2, LLAMA, QWEN3, ROPE_LLAMA3, UNBALANCED, batch, build, loss_and_gradients


def test_llama3_scaling_leaves_fast_pairs_slows_slow_ones_and_blends_between():
    scaling = {**ROPE_LLAMA3, "original_max_position_embeddings": 64}
    plain = rope_frequencies(16, 10_000.0, None, torch.device("cpu"))
    slower = plain / rope_frequencies(16, 10_000.0, scaling, torch.device("cpu"))
    # Pair i makes 64 * 10 ** (-i / 2) / 2 pi turns: 10.2, 3.2, 1.02, 0.3 ...; fast from 4, slow up to 1.
    assert slower[0] == 1.0 and 1.0 < slower[1] < slower[2] < 8.0
    torch.testing.assert_close(slower[3:], torch.full((5,), 8.0))


def test_rope_angles_are_fp32_in_a_bf16_model():
    frequencies = rope_frequencies(8, 10_000.0, None, torch.device("cpu"))
    cos, _ = rope_tables(torch.tensor([256, 257]), frequencies)
    assert cos.dtype == torch.float32 and cos[0, 0, 0] != cos[1, 0, 0]
    x = torch.randn(1, 2, 1, 8).bfloat16()
    turned = apply_rope(x, rope_tables(torch.tensor([256, 257]), frequencies))
    exact = apply_rope(x.float(), rope_tables(torch.tensor([256, 257]), frequencies))
    assert torch.equal(turned, exact.bfloat16()) and not torch.equal(turned.float(), exact)
    model = build(LLAMA).bfloat16()
    idx, targets = batch(LLAMA)
    loss, gradients = loss_and_gradients(model, idx, targets)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert all(torch.isfinite(g).all() and g.dtype == torch.bfloat16 for g in gradients.values())


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_heads_equal_repeated_ones(n_kv_head, masked):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 8, generator=g).requires_grad_() for h in (4, n_kv_head, n_kv_head))
    mask = document_mask(torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [-1] * 2])) if masked else None
    upstream = torch.randn(2, 4, 9, 8, generator=g)
    grouped = attend(q, k, v, mask, 0.0)
    ours = torch.autograd.grad(grouped, (q, k, v), upstream)
    wide = [t.repeat_interleave(4 // n_kv_head, dim=1) for t in (k, v)]
    allowed = torch.ones(9, 9).tril().bool() if mask is None else mask
    scores = (q @ wide[0].transpose(2, 3) / 8**0.5).masked_fill(~allowed, float("-inf"))
    by_hand = scores.softmax(dim=-1) @ wide[1]
    torch.testing.assert_close(grouped, by_hand)
    torch.testing.assert_close(ours, torch.autograd.grad(by_hand, (q, k, v), upstream))


def test_heads_are_repeated_where_no_fused_kernel_takes_groups(monkeypatch):
    """What a GPU would get, run on the CPU."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 8, generator=g) for h in (4, 2, 2))
    wanted = attend(q, k, v, None, 0.0)
    monkeypatch.setattr("model.attention._takes_groups", lambda q, mask: False)
    torch.testing.assert_close(attend(q, k, v, None, 0.0), wanted)


# Packed rows


@FAMILIES
def test_packed_records_do_not_see_each_other(config):
    model = build(config)
    lengths = [5, 1, 9, 12]
    records = [batch(config, B=1, T=n, seed=n) for n in lengths]
    pad = 32 - sum(lengths)
    idx = torch.cat([r[0] for r in records] + [torch.zeros(1, pad, dtype=torch.int64)], dim=1)
    targets = torch.cat([r[1] for r in records] + [torch.full((1, pad), -100)], dim=1)
    doc_ids = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * pad])
    positions = torch.tensor([[p for n in lengths for p in range(n)] + [0] * pad])
    packed, ours = loss_and_gradients(model, idx, targets, positions=positions, doc_ids=doc_ids)
    model.zero_grad()
    alone = sum(model(*record) for record in records)
    alone.backward()
    torch.testing.assert_close(packed, alone.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=2e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    crossed, _ = loss_and_gradients(model, idx, targets, positions=positions)
    assert abs(crossed - packed) > 1e-2, "without doc_ids the records see each other"


def test_a_row_of_padding_gives_no_nan():
    model = build(GPT2)
    idx, targets = batch(GPT2)
    doc_ids = torch.zeros(2, 20, dtype=torch.int64)
    doc_ids[1] = -1
    targets[1] = -100
    loss, gradients = loss_and_gradients(model, idx, targets, doc_ids=doc_ids)
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients.values())
    torch.testing.assert_close(loss, model(idx[:1], targets[:1]).detach())


# The cache under forward; generation has its own tests


@FAMILIES
def test_cached_forward_in_uneven_steps_equals_one_pass(config):
    model = build(config).eval()
    idx, _ = batch(config, B=3, T=24)
    whole = model(idx)
    cache, pieces = KVCache(3, 24), []
    for start, stop in ((0, 7), (7, 8), (8, 20), (20, 24)):
        pieces.append(model(idx[:, start:stop], cache=cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)
    assert cache.lengths == [24, 24, 24]


@FAMILIES
def test_cached_rows_of_different_lengths(config):
    model = build(config).eval()
    idx, _ = batch(config, B=3, T=24)
    lengths = [5, 16, 11]
    cache = KVCache(3, 24)
    model(idx[:, :16], cache=cache)
    cache.set_lengths(lengths)
    new = torch.stack([idx[row, n : n + 4] for row, n in enumerate(lengths)])
    logits = model(new, cache=cache)
    whole = model(idx)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(logits[row], whole[row, n : n + 4], atol=1e-4, rtol=1e-4)
    cache.keep([2, 0])
    assert cache.lengths == [15, 9]
    logits = model(idx[[2, 0], [15, 9]].unsqueeze(1), cache=cache)
    torch.testing.assert_close(logits[:, 0], whole[[2, 0], [15, 9]], atol=1e-4, rtol=1e-4)


def test_cache_holds_each_layers_own_heads_and_refuses_more_than_its_room():
    model = build(dataclasses.replace(LLAMA, **UNBALANCED))
    cache = KVCache(2, 6)
    model(batch(LLAMA, T=5)[0], cache=cache)
    assert {layer: tuple(k.shape) for layer, (k, _) in cache.layers.items()} == {0: (2, 2, 6, 8), 2: (2, 1, 6, 8)}
    with pytest.raises(ValueError, match="room for 6 positions, asked for 7"):
        model(batch(LLAMA, T=2)[0], cache=cache)


def test_query_and_key_norms_act_on_each_head_before_it_is_turned():
    model = build(QWEN3)
    attention = model.h[0].attn
    x = torch.randn(1, 5, QWEN3.n_embd)
    rope = model._rope_tables(torch.zeros(1, 5, dtype=torch.long), None)
    before = attention(x, AttentionInputs(rope=rope))
    with torch.no_grad():  # a query's own length is lost in its norm, so any positive factor changes nothing
        attention.q_proj.weight.mul_(3.0)
        attention.k_proj.weight.mul_(0.5)
    torch.testing.assert_close(attention(x, AttentionInputs(rope=rope)), before, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        attention.k_norm.weight.mul_(2.0)
    assert not torch.allclose(attention(x, AttentionInputs(rope=rope)), before, atol=1e-3)
