"""Perplexity: every token scored once, by the protocol that it states, whatever the batch size."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import instruction_set, tiny_model

from data.loader import eval_batches
from data.tokenizer import ByteTokenizer
from evaluation.perplexity import ArrayTokens, mean_loss, perplexity, windows


def random_ids(n, seed=0, vocab_size=256):
    return np.random.default_rng(seed).integers(0, vocab_size, n).astype(np.uint32)


def log_probabilities(model, ids):
    """(T - 1,) log-probability of each token of ids (T,) but the first, from the model's plain logits."""
    with torch.no_grad():
        logits = model(torch.from_numpy(ids[None, :-1].astype(np.int64)))[0]
    return torch.log_softmax(logits.double(), -1)[range(len(ids) - 1), ids[1:].astype(int)].numpy()


# ---- windows


@given(st.integers(0, 60), st.integers(2, 12), st.data())
def test_windows_score_each_token_once_in_order(n, block_size, data):
    stride = data.draw(st.integers(1, block_size))
    found = list(windows([(100, 100 + n)], block_size, stride))
    scored = [token for window in found for token in range(window.scored, window.stop)]
    first_of_windows = {window.start for window in found} if stride == block_size else {100}
    # Without context left over, a window of one token at the end scores nothing and is left out.
    lone = {100 + n - 1} if stride == block_size and n % block_size == 1 else set()
    assert scored == [token for token in range(100, 100 + n) if token not in first_of_windows | lone]
    assert all(window.stop - window.start <= block_size for window in found)
    assert all(window.start < window.scored < window.stop for window in found)
    context = [window.scored - window.start for window in found[1:]]
    assert all(size == max(1, block_size - stride) for size in context)


def test_windows_as_the_picture_shows():
    assert list(windows([(0, 8)], 4, 2)) == [(0, 1, 4, 0), (2, 4, 6, 0), (4, 6, 8, 0)]
    assert list(windows([(0, 5)], 8, 4)) == [(0, 1, 5, 0)]
    assert list(windows([(0, 9)], 4, 4)) == [(0, 1, 4, 0), (4, 5, 8, 0)]
    assert list(windows([(0, 3), (3, 4), (4, 6)], 8, 4)) == [(0, 1, 3, 0), (4, 5, 6, 2)]


def published_loop(model, ids, length, stride):
    """The loop that most published numbers come from, restated: begin, end and target length of each window."""
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        target_length = end - previous_end
        scores = log_probabilities(model, ids[begin:end])[-target_length:] if end - begin > 1 else np.zeros(0)
        total -= scores.sum()
        count += len(scores)
        previous_end = end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize("stride", [1, 3, 8, 16])
@pytest.mark.parametrize("n", [2, 16, 17, 61])
def test_equals_the_published_sliding_window(n, stride):
    model, ids = tiny_model(block_size=32), random_ids(n)
    total, count = published_loop(model, ids, 16, stride)
    result = perplexity(model, ids, block_size=16, stride=stride)
    assert result.tokens == count
    assert result.loss_sum == pytest.approx(total, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_context_helps_or_hurts_but_shows():
    """Guard: with a model that ignored its context, the tests above would hold for any windows."""
    model, ids = tiny_model(), random_ids(200)
    losses = {perplexity(model, ids, block_size=16, stride=stride).loss for stride in (1, 8, 16)}
    assert max(losses) - min(losses) > 1e-3


# ---- sums


@pytest.mark.parametrize("style", [{}, {"position": "rope", "norm": "rmsnorm", "norm_bias": False, "mlp": "swiglu"}])
def test_the_batch_size_does_not_change_the_answer(tmp_path, style):
    model, ids = tiny_model(**style), random_ids(333)
    records = [(random_ids(n, n), np.arange(n) % 3 > 0) for n in (5, 40, 2, 17, 90)]
    masked = instruction_set(tmp_path / "set", records)
    for tokens in (ids, masked):
        found = [perplexity(model, tokens, block_size=32, stride=16, batch_size=size) for size in (1, 3, 64)]
        assert len({(result.tokens, result.windows) for result in found}) == 1
        assert [result.loss for result in found] == pytest.approx([found[0].loss] * 3, rel=2e-6)


def test_a_masked_set_scores_the_supervised_tokens_of_each_record_alone(tmp_path):
    model = tiny_model()
    generator = np.random.default_rng(1)
    records = [(random_ids(n, n), generator.integers(0, 2, n)) for n in (12, 30, 3, 25, 8)]
    records.append((random_ids(9), np.zeros(9)))  # nothing supervised: not a window
    expected = sum(-log_probabilities(model, ids)[np.asarray(mask[1:], bool)].sum() for ids, mask in records)
    tokens = instruction_set(tmp_path / "set", records, shard_size=20)  # records cross shard files
    result = perplexity(model, tokens, block_size=64, stride=32, batch_size=4)
    assert result.tokens == sum(int(np.sum(mask[1:])) for _, mask in records)
    assert result.windows == sum(bool(np.any(mask[1:])) for _, mask in records) < len(records)
    assert result.loss_sum == pytest.approx(expected, rel=1e-5)


def test_a_record_longer_than_the_window_slides(tmp_path):
    model, ids = tiny_model(), random_ids(100)
    mask = np.arange(100) >= 60
    tokens = instruction_set(tmp_path / "set", [(ids, mask)])
    whole = perplexity(model, ids, block_size=32, stride=16)
    part = perplexity(model, tokens, block_size=32, stride=16)
    assert part.tokens == 40 and part.windows < whole.windows
    array = perplexity(model, ArrayTokens(ids, mask.astype(np.uint8)), block_size=32, stride=16)
    assert array.loss_sum == pytest.approx(part.loss_sum, rel=1e-6)


def test_max_tokens_reads_only_the_beginning():
    model, ids = tiny_model(), random_ids(300)
    cut = perplexity(model, ids, block_size=32, stride=16, max_tokens=100)
    assert cut == perplexity(model, ids[:100], block_size=32, stride=16)
    assert perplexity(model, ids, block_size=32, stride=16, max_tokens=10**9).tokens == 299


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    """Zero weights give equal logits: loss ln 257 (not 384: padded ids are no outcome), 8.006 bits a byte."""
    model = tiny_model(scale=0.0)
    result = perplexity(model, random_ids(100), block_size=16, stride=8, tokenizer=ByteTokenizer())
    assert result.loss == pytest.approx(math.log(257), rel=1e-6)
    assert result.perplexity == pytest.approx(257, rel=1e-5)
    assert result.bytes == result.tokens == 99
    assert result.bits_per_byte == pytest.approx(math.log2(257), rel=1e-6)
    for word in ("99 tokens", "windows of 16", "stride 8", "no begin token"):
        assert word in result.protocol


def test_the_end_of_text_is_scored_but_is_no_byte():
    ids = np.array([65, 66, 256, 67, 68], np.uint32)
    result = perplexity(tiny_model(), ids, block_size=16, stride=8, tokenizer=ByteTokenizer())
    assert (result.tokens, result.bytes) == (4, 3)
    only_special = perplexity(tiny_model(), np.array([65, 256]), block_size=16, stride=8, tokenizer=ByteTokenizer())
    assert only_special.bits_per_byte is None  # no byte to divide by
    assert perplexity(tiny_model(), ids, block_size=16, stride=8).bytes is None


def test_memory_does_not_grow_with_the_text():
    """A stream of 20 million tokens is read a window at a time (the test stops it after the first 200 windows)."""
    reads = []

    class Endless:
        n_tokens, has_mask = 20_000_000, False
        document_starts = np.array([0, 20_000_000])

        def tokens(self, start, stop):
            reads.append((start, stop))
            if len(reads) > 200:
                raise KeyboardInterrupt
            return random_ids(stop - start).astype(np.int64)

        mask = tokens

    with pytest.raises(KeyboardInterrupt):
        perplexity(tiny_model(block_size=16), Endless(), block_size=16, stride=16, batch_size=4)
    assert reads[199] == (199 * 16, 200 * 16)
    assert max(stop - start for start, stop in reads) == 16


def test_a_window_is_no_longer_than_what_a_prompt_of_its_own_leaves_of_the_context():
    model = tiny_model(block_size=16)
    model.context_length = 12  # as p_tuning with four positions does
    ids = random_ids(40)
    assert perplexity(model, ids, block_size=12, stride=12).tokens == 36
    with pytest.raises(ValueError, match="block_size 16: expected 2 to 12, the model's context"):
        perplexity(model, ids, block_size=16, stride=16)


def test_the_mode_of_the_model_is_put_back_also_after_an_error():
    model = tiny_model(dropout=0.5)
    ids = random_ids(50)
    losses = []
    for training in (True, False):
        model.train(training)
        losses.append(perplexity(model, ids, block_size=16, stride=8).loss)
        assert model.training is training and model.h[0].training is training
    assert losses[0] == losses[1]  # no dropout while scoring
    with pytest.raises(ValueError, match="does not"):
        model.train()
        perplexity(model, np.full(8, 3), block_size=16, stride=8, tokenizer=Refusing())
    assert model.training


class Refusing(ByteTokenizer):
    def decode_bytes(self, ids):
        raise ValueError("this tokenizer does not")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"block_size": 65}, "block_size 65: expected 2 to 64"),
        ({"block_size": 1}, "block_size 1"),
        ({"stride": 0}, "stride 0"),
        ({"stride": 33}, "stride 33: expected 1 to 32"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, expected):
    with pytest.raises(ValueError, match=expected):
        perplexity(tiny_model(), random_ids(40), **{"block_size": 32, "stride": 16, **changes})


@pytest.mark.parametrize("n", [0, 1])
def test_too_little_to_score_is_refused(n):
    with pytest.raises(ValueError, match="nothing to score"):
        perplexity(tiny_model(), random_ids(n), block_size=16, stride=8)


# ---- mean_loss


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 7))
def test_mean_loss_sums_over_any_batches(tmp_path_factory, batch_size):
    folder = tmp_path_factory.mktemp("set")
    records = [(random_ids(n, n), np.arange(n) % 2) for n in (12, 30, 5, 25, 8, 33, 64)]
    tokens = instruction_set(folder / "set", records)
    model = tiny_model(dropout=0.3)
    model.train()
    sizes = {"batch_size": batch_size, "block_size": 64, "max_windows": None, "rank": 0, "world_size": 1}
    packed, alone = (mean_loss(model, eval_batches(tokens, packing=packing, **sizes)) for packing in (True, False))
    expected = perplexity(model, tokens, block_size=64, stride=64)
    assert packed[1] == alone[1] == expected.tokens
    assert packed[0] == pytest.approx(expected.loss_sum, rel=1e-5)  # packed records do not see each other
    assert alone[0] == pytest.approx(expected.loss_sum, rel=1e-5)
    assert model.training


def test_mean_loss_of_nothing_is_nothing():
    assert mean_loss(tiny_model(), []) == (0.0, 0)


def test_mean_loss_keeps_no_gradients():
    model, tokens = tiny_model(), torch.randint(0, 257, (2, 9))
    from data.loader import Batch

    loss_sum, count = mean_loss(model, [Batch(tokens[:, :-1], tokens[:, 1:], None, None, [0, 1])])
    assert isinstance(loss_sum, float) and count == 16
    assert all(parameter.grad is None for parameter in model.parameters())
