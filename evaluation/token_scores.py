"""What a model makes of each token: its loss, and whether it was the likeliest at its place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from data.loader import IGNORED
from model.cache import KVCache
from model.gpt import GPT
from model.linear import linear

_CHUNK_BYTES = 64 << 20  # of logits that exist at a time, fp32


def token_scores(model: GPT, inputs: Tensor, targets: Tensor, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
    """Loss in nats, fp32 (B, T), and whether the target has the largest logit, bool (B, T); 0 where target is -100.

    `inputs` (B, T) continue what the cache holds.
    """

    def scores(hidden: Tensor, head: Tensor) -> Tensor:
        return _scores(hidden, head, targets, model.config.vocab_size)

    losses, hits = model(inputs, cache=cache, criterion=scores)  # (B, T) each
    return losses, hits.bool()


def _scores(hidden: Tensor, head: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Losses and hits (2, B, T), fp32, of hidden (B, T, C) by head (V, C), a piece at a time."""
    scored = targets.flatten() != IGNORED
    rows, wanted = hidden.flatten(0, 1)[scored], targets.flatten()[scored]  # (N, C), (N,)
    losses, hits = torch.zeros(2, *wanted.shape, device=hidden.device)
    step = max(1, _CHUNK_BYTES // (4 * len(head)))
    for start in range(0, len(wanted), step):
        here = slice(start, start + step)
        logits = linear(rows[here], head)[:, :vocab_size].float()  # (n, vocab_size)
        of_target = logits.gather(1, wanted[here, None])[:, 0]
        losses[here] = logits.logsumexp(1) - of_target
        hits[here] = logits.argmax(1) == wanted[here]
    found = losses.new_zeros(2, targets.numel())
    found[:, scored] = torch.stack([losses, hits])
    return found.view(2, *targets.shape)


Ids = Sequence[int] | np.ndarray


def stack(rows: Sequence[tuple[Ids, Ids]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets of different lengths as two (B, T) tensors, int64.

    Padding stands on the right, where causal attention hides it.
    """
    length = max(len(inputs) for inputs, _ in rows)
    inputs = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    for i, (row_inputs, row_targets) in enumerate(rows):
        inputs[i, : len(row_inputs)] = torch.as_tensor(row_inputs)
        targets[i, : len(row_targets)] = torch.as_tensor(row_targets)
    return inputs.to(device), targets.to(device)


@contextlib.contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Evaluation mode (no dropout) and no gradients; the mode before is put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
