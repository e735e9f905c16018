"""Generation: cached like uncached, rows that ignore each other, the ways to choose, and the errors."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.cache import KVCache
from model.generate import Decoding, candidates, draw, generate, stream, window_start
from tests.model_helpers import FAMILIES, GPT2, LLAMA, UNBALANCED, build

# Of different lengths; the last two are longer than, and just at, the context of 32.
PROMPTS = [[1, 2, 3], [5], [7] * 9 + [1, 2], list(range(40)), list(range(32, 64))]


def many(model, **options):
    """Each prompt's continuation, well past the context; the model must not just repeat one token."""
    new = generate(model, PROMPTS, max_new_tokens=50, **options)
    assert all(len(ids) == 50 and len(set(ids)) > 5 for ids in new)
    return new


@pytest.mark.parametrize(
    "config",
    [
        GPT2,
        LLAMA,
        dataclasses.replace(LLAMA, n_kv_head=1),
        dataclasses.replace(LLAMA, n_kv_head=4, rope_scaling={"rope_type": "linear", "factor": 2.0}),
        dataclasses.replace(GPT2, **UNBALANCED),
        dataclasses.replace(GPT2, block_size=1),
        dataclasses.replace(LLAMA, block_size=7, tie_embeddings=False),
    ],
    ids=["gpt2", "llama", "one-kv-head", "as-many-kv-heads", "unbalanced", "context-1", "context-7"],
)
def test_cached_and_uncached_greedy_text_is_identical(config):
    model = build(config, spread=0.3)
    options = {"max_new_tokens": 50, "temperature": 0.0, "repetition_penalty": 1.3}
    new = generate(model, PROMPTS, **options)
    assert new == generate(model, PROMPTS, use_cache=False, **options)
    assert all(len(ids) == 50 and len(set(ids)) > 5 for ids in new)


@FAMILIES
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_does_not_depend_on_the_others(config, temperature):
    model = build(config, spread=0.3)
    options = {"temperature": temperature, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 4}
    together = many(model, **options)
    alone = [generate(model, [prompt], max_new_tokens=50, **options)[0] for prompt in PROMPTS]
    turned = generate(model, PROMPTS[::-1], max_new_tokens=50, **options)[::-1]
    assert together == alone == turned


def test_greedy_is_the_argmax_of_the_model():
    model = build(GPT2, spread=0.3)
    ids = [3, 1, 4]
    for token in generate(model, [ids], max_new_tokens=20, temperature=0.0)[0]:
        assert token == model.eval()(torch.tensor([ids]))[0, -1].argmax()
        ids = [*ids, token]


def test_the_seed_decides_what_is_drawn():
    model = build(GPT2, spread=0.3)
    first = many(model, seed=1)
    assert first == many(model, seed=1) != many(model, seed=2)
    assert first == many(model, seed=1, use_cache=False)


def test_rows_of_one_seed_draw_different_numbers():
    model = build(GPT2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # every token is equally likely after any prompt
    first, second, repeated = generate(model, [[1], [2], [1]], max_new_tokens=20)
    assert first != second and first == repeated


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9}, {"temperature": 1e-30}])
def test_limits_of_the_knobs_are_greedy(options):
    model = build(GPT2, spread=0.3)
    greedy = generate(model, PROMPTS, max_new_tokens=20, temperature=0.0)
    assert generate(model, PROMPTS, max_new_tokens=20, **options) == greedy


@FAMILIES
@pytest.mark.parametrize("options", [{"temperature": 50.0}, {"temperature": 0.0}, {"top_k": 10_000, "top_p": 0.999}])
def test_ids_beyond_the_vocabulary_are_never_chosen(config, options):
    model = build(dataclasses.replace(config, tie_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight[97:] = 1e3 * model.lm_head.weight[97:].sign()  # by far the largest logits, were they asked
    hidden, head = model.eval().hidden(torch.tensor([[1]]))
    assert (hidden @ head.t()).argmax() >= 97
    new = generate(model, PROMPTS, max_new_tokens=60, **options)
    assert max(max(ids) for ids in new) < 97


# Choosing


def rows_of_logits(seed, R=3, V=20):
    return 3 * torch.randn(R, V, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(0, 25),
    top_p=st.floats(0.0, 1.0),
    temperature=st.floats(1e-3, 100.0),
)
def test_candidates_are_the_smallest_set_that_reaches_top_p(seed, top_k, top_p, temperature):
    logits = rows_of_logits(seed)
    how = Decoding(max_new_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    probabilities, ids = candidates(logits, how)
    kept = min(top_k or 20, 20)
    for row, full in enumerate((logits.double() / temperature).softmax(dim=-1)):
        best = full.sort(descending=True)
        of_k = best.values[:kept] / best.values[:kept].sum()
        n = int((probabilities[row] > 0).sum())
        assert n >= 1
        chosen = (
            probabilities[row]
            if ids is None
            else torch.zeros(20, dtype=torch.float64).scatter(0, ids[row], probabilities[row])
        )
        assert set(chosen.nonzero().flatten().tolist()) == set(best.indices[:n].tolist())
        torch.testing.assert_close(chosen[best.indices[:n]], of_k[:n], rtol=1e-5, atol=1e-9)
        if top_p < 1.0:
            assert n == 1 or of_k[: n - 1].sum() < top_p + 1e-6
            assert of_k[:n].sum() >= top_p - 1e-6


def test_draw_follows_the_probabilities_and_never_takes_zero():
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.0]], dtype=torch.float64)  # top-p leaves sums below 1
    uniform = torch.cat([torch.linspace(0, 1 - 2**-24, 7001), torch.tensor([0.0, 1 - 2**-24])])
    drawn = draw((probabilities.expand(len(uniform), 5), None), uniform)
    counts = torch.bincount(drawn, minlength=5).tolist()
    assert counts[0] == counts[2] == counts[4] == 0
    assert counts[1] / len(uniform) == pytest.approx(5 / 7, abs=1e-3)
    named = draw((probabilities, torch.tensor([[9, 8, 7, 6, 5]])), torch.tensor([0.9]))
    assert named.tolist() == [6]


def test_samples_have_the_models_frequencies():
    model = build(GPT2, spread=0.3)
    wanted = (model.eval()(torch.tensor([[1, 2]]))[0, -1, :97] / 0.7).softmax(dim=-1)
    drawn = torch.tensor(
        [generate(model, [[1, 2]], max_new_tokens=1, temperature=0.7, seed=s)[0][0] for s in range(600)]
    )
    share = torch.bincount(drawn, minlength=97) / len(drawn)
    assert 0.05 < wanted.max() < 0.95
    assert (share - wanted).abs().max() < 0.06  # three standard deviations at p = 0.5, n = 600


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    model = build(GPT2, spread=0.3).eval()
    changed = 0
    for seed in range(20):
        prompt = torch.randint(97, (30,), generator=torch.Generator().manual_seed(seed)).tolist()
        logits = model(torch.tensor([prompt]))[0, -1, :97].detach()
        assert (logits[prompt] > 0).any() and (logits[prompt] < 0).any()
        for penalty in (0.3, 2.5):  # below 1, negative logits win; above 1, positive ones lose
            by_hand = logits.clone()
            for token in set(prompt):
                by_hand[token] = by_hand[token] / penalty if by_hand[token] > 0 else by_hand[token] * penalty
            options = {"max_new_tokens": 1, "temperature": 0.0, "repetition_penalty": penalty}
            assert generate(model, [prompt], **options) == [[int(by_hand.argmax())]]
            changed += int(by_hand.argmax() != logits.argmax())
    assert changed > 5


# Stopping, streaming, side effects


def test_stop_ids_end_their_row_only_and_are_not_returned():
    model = build(GPT2, spread=0.3)
    free = many(model, seed=3)
    stop = free[1][7]
    stopped = generate(model, PROMPTS, max_new_tokens=50, seed=3, stop_ids=(stop, 96))
    for whole, ids in zip(free, stopped):
        ends = [i for i, token in enumerate(whole) if token in (stop, 96)]
        assert ids == whole[: min(ends, default=50)]
    assert len(stopped[1]) <= 7 and len({len(ids) for ids in stopped}) > 1


def test_on_token_and_stream_give_tokens_as_they_come(monkeypatch):
    model = build(GPT2, spread=0.3)
    heard: list[tuple[int, int]] = []
    new = generate(model, PROMPTS[:2], max_new_tokens=5, on_token=lambda row, token: heard.append((row, token)))
    assert heard == [(row, new[row][i]) for i in range(5) for row in range(2)]
    passes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs))
    tokens = stream(model, PROMPTS[0], max_new_tokens=5)
    assert not passes
    assert next(tokens) == new[0][0] and len(passes) == 1
    assert list(tokens) == new[0][1:] and len(passes) == 5


def test_each_position_is_computed_once_until_the_window_moves(monkeypatch):
    model = build(GPT2)
    shapes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **kwargs: shapes.append(idx.shape) or forward(idx, **kwargs))
    generate(model, [[1] * 20, [2] * 30], max_new_tokens=15)
    # Row 2 reaches 33 tokens at the fourth choice; its window moves by 16, so 17 are left, 16 before the newest.
    # Row 1 reaches 33 at the fourteenth.
    steps = [(2, 30), *[(2, 1)] * 2, (1, 16), *[(2, 1)] * 10, (1, 16), *[(2, 1)] * 2]
    assert shapes == steps


def test_without_the_cache_the_whole_window_is_read_each_time(monkeypatch):
    model = build(GPT2)
    shapes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **kwargs: shapes.append(idx.shape) or forward(idx, **kwargs))
    generate(model, [[1] * 20, [2] * 30], max_new_tokens=5, use_cache=False)
    assert shapes == [(2, 30), (2, 31), (2, 32), (2, 23), (2, 24)]  # row 2 falls back to 17, row 1 is then longer


def test_generation_leaves_the_random_state_and_the_mode_alone():
    model = build(dataclasses.replace(GPT2, dropout=0.5), spread=0.3).train()
    state = torch.get_rng_state()
    assert generate(model, PROMPTS, max_new_tokens=4) == generate(model, PROMPTS, max_new_tokens=4)
    tokens = stream(model, [1], max_new_tokens=9)
    next(tokens)
    assert not model.training
    tokens.close()
    assert model.training and torch.equal(torch.get_rng_state(), state)
    loss = model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))
    loss.backward()  # nothing made under inference mode has stayed behind


def test_nothing_to_do():
    model = build(GPT2)
    assert generate(model, [], max_new_tokens=5) == []
    assert generate(model, [[1], [2]], max_new_tokens=0) == [[], []]


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1, 97]], {}, "prompt 1 holds id 97, but the model's ids end at 96"),
        ([[-1]], {}, "prompt 1 holds id -1"),
        ([[1]], {"temperature": -0.1}, "temperature is -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"top_p": 1.1}, "top_p is 1.1"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
    ],
)
def test_errors(prompts, options, words):
    model = build(GPT2)
    with pytest.raises(ValueError, match=words):
        generate(model, prompts, **{"max_new_tokens": 3, **options})
    if len(prompts) == 1:
        with pytest.raises(ValueError, match=words):  # at once, not at the first token
            stream(model, prompts[0], **{"max_new_tokens": 3, **options})


def test_a_diverged_model_is_named():
    model = build(GPT2)
    with torch.no_grad():
        model.ln_f.weight[0] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, [[1]], max_new_tokens=1)


@given(length=st.integers(1, 5000), block_size=st.integers(1, 300))
def test_the_window_fits_and_moves_rarely(length, block_size):
    start = window_start(length, block_size)
    assert 0 <= start < length and length - start <= block_size
    assert start == 0 if length <= block_size else length - start > block_size - max(1, block_size // 2)
    assert window_start(length + 1, block_size) in (start, start + max(1, block_size // 2))


def test_cache_longer_than_the_context_is_refused():
    with pytest.raises(AssertionError):
        build(GPT2)(torch.tensor([[1]]), cache=KVCache(1, 33))


def test_rows_of_one_prompt_differ_by_seeds_of_their_own():
    model = build(GPT2)
    seeds = [3, 4, 3, 11]
    rows = generate(model, [[1, 2]] * 4, max_new_tokens=12, seed=seeds)
    assert rows[0] == rows[2] != rows[1] and rows[3] not in rows[:2]
    for seed, row in zip(seeds, rows):
        assert generate(model, [[1, 2]], max_new_tokens=12, seed=seed) == [row]


def test_a_kept_stop_is_the_last_id_of_the_rows_that_met_it():
    model = build(GPT2)
    how = {"max_new_tokens": 12, "seed": [1, 2, 3], "stop_ids": range(0, 97, 6)}
    ended, kept = (generate(model, [[1, 2]] * 3, keep_stop=keep, **how) for keep in (False, True))
    assert any(len(row) < 12 for row in ended)
    for row, whole in zip(ended, kept):
        assert whole[: len(row)] == row and len(whole) == min(12, len(row) + 1)
        assert all(token % 6 == 0 for token in whole[len(row) :]) and not any(token % 6 == 0 for token in row)
