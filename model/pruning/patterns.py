"""Where zeros may stand: anywhere, n of each m neighbours, whole blocks. Each turns scores into the weights kept.

Every function takes `kept`, the weights that are there: what is already zero stays zero and counts as removed, so a
sparse model is pruned further and never refilled. Ties go to the left-most, so that masks are the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.masks import PATTERNS, UNSTRUCTURED, Mask
from model.pruning.scores import block_sums

BLOCK = "block"


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """(n, m) of "n:m", n zeros in each m neighbours; None for "unstructured" and "block". ValueError for all else."""
    if pattern in (UNSTRUCTURED, BLOCK):
        return None
    known = {f"{n}:{m}": (n, m) for n, m in PATTERNS}
    if pattern not in known:
        raise ValueError(f"pattern is {pattern!r}: choose one of {', '.join((UNSTRUCTURED, *known, BLOCK))}")
    return known[pattern]


def prune_rows(scores: Tensor, removed: int, kept: Tensor | None = None) -> Tensor:
    """The weights kept, bool (out, in), when `removed` of scores (out, in) go, equally many from each row.

    What a whole number in each row leaves over goes from the rows where it costs least.
    """
    out = scores.size(0)
    _check_count(removed, scores.numel())
    order = _with_zeros_first(scores, kept).sort(dim=1, stable=True)
    each, over = divmod(removed, out)
    keep = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order.indices[:, :each], False)
    if over:
        rows = order.values[:, each].sort(stable=True).indices[:over]
        keep[rows, order.indices[rows, each]] = False
    return keep if kept is None else keep & kept


def prune_matrix(scores: Tensor, removed: int, kept: Tensor | None = None) -> Tensor:
    """The weights kept, bool like scores of any shape, when the `removed` lowest go."""
    _check_count(removed, scores.numel())
    order = _with_zeros_first(scores, kept).flatten().sort(stable=True).indices
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[order[:removed]] = False
    keep = keep.view_as(scores)
    return keep if kept is None else keep & kept


def prune_n_of_m(scores: Tensor, n: int, m: int, kept: Tensor | None = None) -> Tensor:
    """The weights kept, bool (out, in), when the n lowest of each m neighbours in a row go.

    Raises ValueError where m does not divide the inputs: kernels for such patterns take no remainder.
    """
    out, into = scores.shape
    if into % m:
        raise ValueError(f"a matrix with {into} inputs has no pattern {n}:{m}: its inputs are no multiple of {m}")
    groups = _with_zeros_first(scores, kept).view(out, into // m, m)
    order = groups.sort(dim=2, stable=True).indices
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(2, order[..., :n], False).view(out, into)
    return keep if kept is None else keep & kept


def block_sizes(shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """How many weights each block of a matrix has, int64: fewer in the partial ones at the far edges."""
    return block_sums(torch.ones(shape), *block).long()


def kept_in_blocks(shape: tuple[int, int], block: tuple[int, int], kept: Tensor | None) -> Tensor:
    """How many weights of each block are there, int64: those of `kept`, bool (out, in), by default all."""
    return block_sizes(shape, block) if kept is None else block_sums(kept.float(), *block).long().cpu()


def block_mask(bits: Tensor, shape: tuple[int, int], block: tuple[int, int], kept: Tensor | None = None) -> Mask:
    """The mask that keeps the blocks of `bits`. With `kept`, what was zero before stays so, in part or in whole.

    Where `kept` cuts through blocks, the result is a mask of single weights.
    """
    mask = Mask(shape, block, bits)
    if kept is None:
        return mask
    both = mask.dense() & kept
    whole = block_sums(both.float(), *block).long() == block_sizes(shape, block).to(both.device)
    again = Mask(shape, block, whole)
    return again if torch.equal(again.dense(), both) else Mask.of(both)


def _with_zeros_first(scores: Tensor, kept: Tensor | None) -> Tensor:
    return scores if kept is None else scores.masked_fill(~kept, float("-inf"))


def _check_count(removed: int, total: int) -> None:
    assert 0 <= removed <= total, f"{removed} of {total} weights"
