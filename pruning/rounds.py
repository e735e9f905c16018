"""The arithmetic of `--rounds`: what each takes, and what is to be said of all."""

from __future__ import annotations

from typing import Any

from pruning.settings import SPARSE, PruneSettings


def round_shares(settings: PruneSettings, number: int, left: float) -> tuple[float, float]:
    """--pruning_ratio and --sparsity of a round, 1 the first; `left`: share of the units that is there by then.

    Units go in equal parts of the model as it was; the ratio of a round is a share of what is left by then, 0 where the
    whole units of the rounds before came to its part too. Zeros come fast at first and slowly at the end:
    s (1 - (1 - r/N)^3) after round r (Zhu & Gupta 2017).
    """
    stays = 1 - number / settings.rounds * settings.pruning_ratio
    sparsity = settings.sparsity * (1 - (1 - number / settings.rounds) ** 3)
    return max(0.0, left - stays) / left if left else 0.0, sparsity


def share_line(settings: PruneSettings, ratio: float, sparsity: float) -> str:
    """What a round is to take."""
    return f"sparsity {sparsity:.1%}" if settings.method in SPARSE else f"{ratio:.1%} of what is left"


def notes_of_rounds(done: dict[int, dict[str, Any]], gone: float) -> list[str]:
    """What is to be said of all rounds, by the entry `pruning` of each. A line on zeros counts those of before too."""
    *_, last = done.values()
    if last["made"]["method"] in SPARSE:
        return list(last["notes"])
    removed = [entry["removed"] for entry in done.values() if entry["removed"]]
    total = f"{sum(removed):,} parameters removed in {len(removed)} rounds, {gone:.1%} of the units in range"
    return [total, *(f"Round {number}: {note}" for number, entry in done.items() for note in entry["notes"])]
