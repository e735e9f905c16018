"""What a loss does not depend on is not computed: loss and gradients stay, whatever stands behind the last target."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.gpt import GPT
from model.ragged import needed
from tests.model_helpers import FAMILIES, LLAMA, UNBALANCED, batch, build, loss_and_gradients


def supervise(targets, share, seed=0):
    """Targets of which about `share` stay, at random places."""
    kept = torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed)) < share
    return targets.masked_fill(~kept, -100)


def documents(B, T, seed=0):
    """Records of random lengths in every row, with padding (-1) at its end, and their positions."""
    generator = torch.Generator().manual_seed(seed)
    ids, positions = torch.full((B, T), -1), torch.zeros(B, T, dtype=torch.long)
    for row in range(B):
        begin = 0
        while begin < T - 2:
            length = int(torch.randint(1, 6, (), generator=generator))
            end = min(T - 1, begin + length)
            ids[row, begin:end] = begin
            positions[row, begin:end] = torch.arange(end - begin)
            begin = end
    return ids, positions


@FAMILIES
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_every_position(config, share, packed, checkpointing, monkeypatch):
    model = build(dataclasses.replace(config, **UNBALANCED))
    model.gradient_checkpointing = checkpointing
    idx, targets = batch(config, B=3, T=12)
    targets = supervise(targets, share)
    how = {}
    if packed:
        how = dict(zip(("doc_ids", "positions"), documents(*idx.shape)))
        targets = targets.masked_fill(how["doc_ids"] < 0, -100)
    ours = loss_and_gradients(model, idx, targets, **how)
    monkeypatch.setattr(GPT, "_ragged", lambda *_: None)
    whole = loss_and_gradients(model, idx, targets, **how)
    torch.testing.assert_close(ours, whole, atol=2e-5, rtol=1e-4)


@FAMILIES
def test_each_positions_loss_comes_back_to_its_place(config, monkeypatch):
    model = build(config)
    idx, targets = batch(config, B=3, T=12)
    targets = supervise(targets, 0.3)
    ours = model(idx, targets, reduction="none", temperature=0.7)
    monkeypatch.setattr(GPT, "_ragged", lambda *_: None)
    torch.testing.assert_close(ours, model(idx, targets, reduction="none", temperature=0.7), atol=1e-5, rtol=1e-5)


def test_what_is_left_out_is_never_computed(monkeypatch):
    model = build(LLAMA)
    idx, whole = batch(LLAMA, B=2, T=12, masked=0.0)
    targets = whole.clone()
    targets[0, 5:] = -100
    seen = []
    model.h[0].register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape[:2])))
    model(idx, targets)
    model(idx, whole)
    assert seen == [(1, 17), (2, 12)]


def test_nothing_supervised_is_a_loss_of_nothing():
    model = build(LLAMA)
    idx, targets = batch(LLAMA, B=2, T=12)
    loss = model(idx, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_row_may_be_longer_than_the_context_as_long_as_its_sequences_are_not():
    model = build(dataclasses.replace(LLAMA, block_size=8))
    idx, targets = batch(LLAMA, B=3, T=8, masked=0.0)
    targets[:, 7] = -100
    assert torch.isfinite(model(idx, targets))  # 21 positions
    idx, targets = batch(LLAMA, B=1, T=9)
    targets[:, -1] = -100  # the ninth is not needed, and refused all the same
    with pytest.raises(ValueError, match="9 tokens do not fit"):
        model(idx, targets)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_needed_is_each_sequence_up_to_its_last_target(B, T, seed, packed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.where(torch.rand(B, T, generator=generator) < 0.4, 1, -100)
    doc_ids = torch.randint(0, 3, (B, T), generator=generator).sort(dim=1)[0] if packed else torch.zeros(B, T).long()
    wanted, lengths = [], []
    for row in range(B):
        for doc in doc_ids[row].unique_consecutive():
            places = (doc_ids[row] == doc).nonzero().flatten()
            last = max((place for place in places.tolist() if targets[row, place] >= 0), default=None)
            if last is not None:
                kept = [place for place in places.tolist() if place <= last]
                wanted += [row * T + place for place in kept]
                lengths.append(len(kept))
    found = needed(targets, doc_ids)
    if not wanted:
        assert found is None
    else:
        assert found.index.tolist() == wanted and found.lengths == lengths
        values = torch.arange(B * T).view(B, T)
        assert found.take(values).tolist() == [wanted]
        assert found.put_back(found.take(values)[0] + 1, values.shape).count_nonzero() == len(wanted)
