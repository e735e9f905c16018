"""How many weights each matrix loses, so that all together lose exactly the share that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

OUTLIER = 5.0  # times the mean score: OWL's M, the value its authors use for LLaMA
SPREAD = 0.08  # OWL's lambda: a layer's share lies within about this of the whole network's
BUCKETS = 2**15  # of a positive fp32 number's upper bits: 128 to the doubling


def uniform(sizes: Sequence[int], sparsity: float) -> list[int]:
    """The same share of each matrix of `sizes` weights, in whole weights."""
    return evenly(sizes, _total(sizes, sparsity))


def evenly(sizes: Sequence[int], total: int) -> list[int]:
    """`total` weights, in equal shares from matrices of `sizes` weights."""
    return _whole([total * size / sum(sizes) for size in sizes], total)


def outlier_share(scores: Sequence[Tensor]) -> float:
    """The share of a layer's Wanda scores, all its matrices together, that exceed five times their mean."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > OUTLIER * mean).sum()) for score in scores) / count


def owl(sizes: Sequence[int], outliers: Sequence[float], sparsity: float) -> list[int]:
    """OWL (Yin et al. 2024): the more outliers a layer has, the fewer of its weights go.

    sizes and outliers (`outlier_share`) are those of the layers; returns the weights that each loses. The kept shares
    grow with the outliers' over a range of 2 * 0.08, around the mean that gives the whole the share that was asked for.
    """
    low, high = min(outliers), max(outliers)
    scale = 2 * SPREAD / (high - low) if high > low else 0.0
    wished = [-scale * (outlier - low) for outlier in outliers]
    total = _total(sizes, sparsity)
    # The shift that makes the counts add up, by bisection: shares are cut off at 0 and 1.
    below, above = -1.0, 2.0
    for _ in range(60):
        shift = (below + above) / 2
        counts = [size * min(max(share + shift, 0.0), 1.0) for size, share in zip(sizes, wished)]
        below, above = (shift, above) if sum(counts) < total else (below, shift)
    return _whole(counts, total)


@dataclass
class Ranking:
    """One ranking of all weights of a network by what they cost, without keeping it: a histogram for each matrix.

    Scores must be comparable between matrices, such as changes of the loss. 128 buckets to the doubling place the
    threshold within 0.8%; what the last bucket leaves over is shared out, so that the total is exact.
    """

    cap: float  # the most that one matrix may lose
    sizes: list[int] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)  # (BUCKETS,) int64 each

    def add(self, scores: Tensor) -> None:
        """A further matrix, scores (out, in) >= 0."""
        buckets = scores.float().clamp_min(0).flatten().view(torch.int32) >> 16  # the order of floats is that of bits
        self.sizes.append(scores.numel())
        self.counts.append(torch.bincount(buckets, minlength=BUCKETS).cpu())

    def counts_for(self, sparsity: float) -> list[int]:
        """The weights that each matrix loses. ValueError where the cap leaves no room for the share asked for."""
        total = _total(self.sizes, sparsity)
        limits = torch.tensor([int(self.cap * size) for size in self.sizes])
        lost = torch.stack(self.counts).cumsum(dim=1).clamp_max(limits.unsqueeze(1))  # (matrices, BUCKETS)
        together = lost.sum(dim=0)
        if int(together[-1]) < total:
            raise ValueError(
                f"a sparsity of {sparsity} is above the cap of {self.cap} for each matrix: give a smaller --sparsity"
            )
        last = int(torch.searchsorted(together, total))  # the first bucket with which there are enough
        before = lost[:, last - 1] if last else torch.zeros_like(limits)
        step = (lost[:, last] - before).double()
        part = (total - int(before.sum())) / max(float(step.sum()), 1.0)
        return _whole((before + part * step).tolist(), total)


def lowest_blocks(
    prices: Sequence[Tensor], sizes: Sequence[Tensor], sparsity: float, cap: float, left: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The blocks kept, bool like each of `prices`, when those with the lowest price go under one global threshold.

    prices: a score per weight for each block, (block rows, block columns) a matrix; sizes: the weights in each block;
    left: those of them that are not zero yet, by default all. What is zero already counts as removed.
    No matrix loses more than `cap` of its weights. Blocks go until the next would exceed the share of all weights.
    Raises ValueError where the cap leaves no room.
    """
    left = sizes if left is None else left
    whole = sum(int(size.sum()) for size in sizes)
    room = max(0, _total([whole], sparsity) - whole + sum(int(own.sum()) for own in left))
    open_prices = [_capped(*matrix, cap) for matrix in zip(prices, sizes, left)]
    price = torch.cat([p.flatten() for p in open_prices])
    own = torch.cat([matrix.flatten() for matrix in left]).to(price.device)
    order = price.sort(stable=True).indices
    may = price[order].isfinite()
    gone = (own[order].cumsum(dim=0) <= room) & may
    missing = room - int(own[order][gone].sum())
    shut = own[order][~may]
    if torch.equal(gone, may) and bool(((shut > 0) & (shut <= missing)).any()):
        raise ValueError(
            f"a sparsity of {sparsity} cannot be reached: a cap of {cap} for each matrix and whole blocks allow "
            f"{sparsity - missing / whole:.3f}: give a smaller --sparsity or --block_size"
        )
    keep = torch.ones(len(price), dtype=torch.bool, device=price.device)
    keep[order[gone]] = False
    return [part.view_as(p) for part, p in zip(keep.split([p.numel() for p in prices]), prices)]


def _capped(price: Tensor, size: Tensor, left: Tensor, cap: float) -> Tensor:
    """Prices with infinity for the blocks that must stay because a matrix has lost `cap` of its weights before them."""
    order = price.flatten().sort(stable=True).indices
    limit = cap * float(size.sum()) - float((size - left).sum())
    over = left.flatten().to(price.device)[order].cumsum(dim=0) > limit
    return price.flatten().index_fill(0, order[over], float("inf")).view_as(price)


def _total(sizes: Sequence[int], sparsity: float) -> int:
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity is {sparsity!r}: give a share above 0 and below 1")
    return round(sparsity * sum(sizes))


def _whole(wished: Sequence[float], total: int) -> list[int]:
    """Whole numbers near `wished` that add up to `total`: rounded down, the largest remainders then up."""
    counts = [int(wish) for wish in wished]
    by_remainder = sorted(range(len(wished)), key=lambda i: counts[i] - wished[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    assert sum(counts) == total, (sum(counts), total)
    return counts
