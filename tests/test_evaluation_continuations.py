"""The likelihood of a continuation is the sum of its tokens' log-probabilities, however it is batched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import BpeTokenizer, ByteTokenizer, train_bpe
from data.tokenizer_base import END_OF_TEXT
from evaluation.continuations import Continuation, Likelihood, encode_pair, score_continuations
from evaluation.token_scores import token_scores
from model.gpt import GPT
from model.prompt_methods import PrefixSettings, PTuningSettings, apply_p_tuning, apply_prefix
from tests.model_helpers import FAMILIES, LLAMA, build
from tests.test_model_lora import train_a_little
from tests.tiny_checkpoints import tiny_model

LETTERS = train_bpe(["the cat sat on the mat, the dog sat on the cat"] * 4, 300)


def plain(model: GPT, context: list[int], ids: list[int]) -> Likelihood:
    """From the logits of one row."""
    row = [*context, *ids][-(model.config.block_size + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([row[:-1]]))[0, -len(ids) :, : model.config.vocab_size]
    chosen = torch.log_softmax(logits.double(), -1)[range(len(ids)), ids]
    return Likelihood(float(chosen.sum()), logits.argmax(-1).tolist() == ids)


def pairs_of(vocab_size: int, limit: int, seed: int = 0) -> list[Continuation]:
    """Contexts of all lengths, some shared by neighbours, some longer than the model's, with 1 to 9 tokens each."""
    draw = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(vocab_size, (length,), generator=draw).tolist()

    pairs = []
    for length in (1, 3, 3, limit // 2, limit - 4, limit + 7):
        context = ids(length)
        pairs += [Continuation(context, ids(1 + (length + number) % 9)) for number in range(3)]
    return pairs


@FAMILIES
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 18])
def test_equals_the_plain_logits_whatever_the_batch(config, batch_size) -> None:
    model = build(config).eval()
    pairs = pairs_of(config.vocab_size, config.block_size)
    found = score_continuations(model, pairs, batch_size=batch_size)
    wanted = [plain(model, *pair) for pair in pairs]
    assert [each.log_probability for each in found] == pytest.approx([each.log_probability for each in wanted], 1e-5)
    assert [each.is_greedy for each in found] == [each.is_greedy for each in wanted]


@pytest.mark.parametrize("method", ["prefix", "p_tuning"])
def test_a_trained_prompt_stands_before_a_shared_context_too(method: str) -> None:
    apply, how = {
        "prefix": (apply_prefix, PrefixSettings(length=4, hidden=8)),
        "p_tuning": (apply_p_tuning, PTuningSettings(length=4, hidden=8)),
    }[method]
    model = train_a_little(apply(build(LLAMA), how), size=0.3).eval()
    pairs = pairs_of(LLAMA.vocab_size, 20)
    shared, apart = (score_continuations(model, pairs, batch_size=size) for size in (6, 1))
    assert [each.log_probability for each in shared] == pytest.approx([each.log_probability for each in apart], 1e-5)


def test_what_the_model_would_say_itself_is_greedy() -> None:
    from model.generate import generate

    model = tiny_model()
    context = [1, 2, 3]
    (said,) = generate(model, [context], max_new_tokens=5, temperature=0.0)
    other = [*said[:-1], (said[-1] + 1) % 257]
    found = score_continuations(model, [Continuation(context, said), Continuation(context, other)], batch_size=2)
    assert [each.is_greedy for each in found] == [True, False]
    assert found[0].log_probability > found[1].log_probability


def test_a_shared_context_is_read_once() -> None:
    model, read = tiny_model(), []
    forward = model.hidden
    model.hidden = lambda idx, **more: (read.append(tuple(idx.shape)), forward(idx, **more))[1]  # type: ignore
    context = list(range(30))
    score_continuations(model, [Continuation(context, [1, 2]), Continuation(context, [3, 4, 5])], batch_size=2)
    assert read == [(1, 29), (2, 3)]


def test_the_ids_that_do_not_exist_have_no_probability() -> None:
    """Of a padded vocabulary: with zero weights each of the 257 ids, not of 384, is as likely."""
    model = tiny_model(scale=0.0)
    (found,) = score_continuations(model, [Continuation([1], [2, 3])], batch_size=1)
    assert found.log_probability == pytest.approx(-2 * torch.tensor(257.0).log().item(), rel=1e-6)


def test_losses_and_hits_stand_at_their_places() -> None:
    model = tiny_model()
    inputs = torch.arange(12).view(2, 6)
    targets = torch.full((2, 6), -100)
    targets[0, 4], targets[1, 1] = 7, 9
    with torch.no_grad():
        losses, hits = token_scores(model, inputs, targets)
        logits = model(inputs)[..., :257]
        best = logits.argmax(-1)
        assert torch.allclose(losses, model(inputs, targets, reduction="none"), rtol=1e-5)
        assert not hits[targets == -100].any()
        assert token_scores(model, inputs, best)[1].all()


def test_a_continuation_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens does not fit the model's context of 64"):
        score_continuations(tiny_model(), [Continuation([1], [2] * 65)], batch_size=1)
    with pytest.raises(ValueError, match="batch_size 0"):
        score_continuations(tiny_model(), [Continuation([1], [2])], batch_size=0)


def test_a_model_that_has_diverged_is_refused() -> None:
    model = tiny_model()
    model.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are not finite"):
        score_continuations(model, [Continuation([1], [2])], batch_size=1)


# ---- pairs of texts


@settings(derandomize=True, deadline=None)
@given(st.text("tehca s", max_size=8), st.text("tehca s", min_size=1, max_size=8))
def test_a_pair_is_the_whole_text_parted(context: str, continuation: str) -> None:
    pair = encode_pair(LETTERS, context, continuation)
    first = [] if pair.context == [LETTERS.eot_id] else pair.context
    assert LETTERS.decode(first + pair.ids) == context + continuation
    assert pair.ids and pair.context


def test_spaces_between_go_to_the_continuation() -> None:
    assert encode_pair(LETTERS, "the cat ", "sat") == encode_pair(LETTERS, "the cat", " sat")
    tokenizer = ByteTokenizer()
    assert encode_pair(tokenizer, "a ", "b") == Continuation([97], [32, 98])
    assert encode_pair(tokenizer, "", "b") == Continuation([256], [98])


def test_a_continuation_that_joins_the_last_word_still_has_tokens() -> None:
    whole, first = LETTERS.encode("the"), LETTERS.encode("t")
    assert len(whole) == len(first) == 1, "the vocabulary joins both"
    assert encode_pair(LETTERS, "t", "he") == Continuation(first, LETTERS.encode("he"))


def test_a_begin_token_comes_first() -> None:
    bos = BpeTokenizer(LETTERS.spec()["json"], bos=END_OF_TEXT)
    assert encode_pair(bos, "the", " cat").context == [bos.bos_id, *bos.encode("the")]
    assert encode_pair(bos, "", "the").context == [bos.bos_id]
