"""How likely a model finds given continuations of given texts: what multiple choice and lm-eval ask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from data.loader import IGNORED
from data.tokenizer import Tokenizer
from evaluation.checkpoints import ignore
from evaluation.processes import ALONE, Processes, map_batches
from evaluation.token_scores import evaluating, stack, token_scores
from model.cache import KVCache
from model.gpt import GPT


class Continuation(NamedTuple):
    """Ids that are read, at least one, and the ids that are scored after them, at least one."""

    context: list[int]
    ids: list[int]


class Likelihood(NamedTuple):
    """Of a continuation: the log-probability of its tokens, summed, in nats; whether each was the likeliest one."""

    log_probability: float
    is_greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Continuation:
    """Context and continuation as ids, encoded as one text and parted where the context's own ids end.

    So the word that spans the border has the ids that it has in running text. Spaces at the context's end go to the
    continuation, where the tokenizers of most models want them. A text begins as the model's texts do: with the begin
    token, or, where there is neither that nor a context, with the end of the text before it.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    first, whole = tokenizer.encode(kept), tokenizer.encode(kept + continuation)
    first, ids = whole[: len(first)], whole[len(first) :]
    if not ids:  # all of it went into the last word of the context
        first, ids = tokenizer.encode(kept), tokenizer.encode(continuation)
    return Continuation([*begin, *first] or [tokenizer.eot_id], ids)


def score_continuations(
    model: GPT,
    pairs: Sequence[Continuation],
    *,
    batch_size: int,
    progress: Callable[[int], object] = ignore,
    processes: Processes = ALONE,
) -> list[Likelihood]:
    """The likelihood of each continuation, in order; `progress` is told how many each batch scored.

    Of what exceeds the model's context the beginning is not read. Neighbours with one context share its reading. The
    batch size changes a result by rounding only. Raises ValueError for a continuation that is longer than the context,
    and for a model whose logits are not finite.
    """
    fitting = [_fit(pair, model.context_length) for pair in pairs]
    with evaluating(model):
        found = map_batches(
            fitting,
            lambda batch: _score(model, batch),
            batch_size=batch_size,
            length=lambda pair: len(pair.context),
            progress=progress,
            processes=processes,
        )
    scores = [Likelihood(*each) for each in found]
    if any(math.isnan(score.log_probability) for score in scores):
        raise ValueError("the model's logits are not finite: its weights have diverged, take an earlier checkpoint")
    return scores


def _fit(pair: Continuation, limit: int) -> Continuation:
    """The pair without as much of its beginning as the context has no room for; the last token is never read."""
    room = limit - len(pair.ids) + 1
    if room < 1:
        raise ValueError(f"a continuation of {len(pair.ids)} tokens does not fit the model's context of {limit}")
    return Continuation(pair.context[-room:], pair.ids)


def _score(model: GPT, pairs: list[Continuation]) -> list[Likelihood]:
    """A batch whose contexts are read once each, and then with them all continuations, padded on the right."""
    contexts = list(dict.fromkeys(tuple(pair.context) for pair in pairs))
    longest = max(map(len, contexts)) + max(len(pair.ids) for pair in pairs) - 1
    if len(contexts) == len(pairs) or longest > model.context_length:
        return _score_rows(model, pairs)
    device = model.wte.weight.device
    cache = KVCache(len(contexts), longest)
    heads = [context[:-1] for context in contexts]  # the last token is read with each continuation
    if any(heads):
        model.hidden(stack([(head, ()) for head in heads], device)[0], cache=cache)
        cache.set_lengths([len(head) for head in heads])
    cache.keep([contexts.index(tuple(pair.context)) for pair in pairs])
    rows = [([pair.context[-1], *pair.ids[:-1]], pair.ids) for pair in pairs]
    return _likelihoods(pairs, *token_scores(model, *stack(rows, device), cache))


def _score_rows(model: GPT, pairs: list[Continuation]) -> list[Likelihood]:
    """A batch of which each row is read whole."""
    rows = [([*pair.context, *pair.ids[:-1]], [IGNORED] * (len(pair.context) - 1) + pair.ids) for pair in pairs]
    return _likelihoods(pairs, *token_scores(model, *stack(rows, model.wte.weight.device)))


def _likelihoods(pairs: list[Continuation], losses: Tensor, hits: Tensor) -> list[Likelihood]:
    """From losses and hits (B, T), 0 where nothing is scored."""
    sums, counts = losses.double().sum(dim=1).tolist(), hits.sum(dim=1).tolist()
    return [Likelihood(-loss, hit == len(pair.ids)) for pair, loss, hit in zip(pairs, sums, counts)]
