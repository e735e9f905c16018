"""A search at a glance: how its trials went, and which settings mattered, as one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report.curves import BLUE, GREY, INK, ORANGE, drawing_style, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def search_picture(trials: Sequence[Mapping[str, Any]], importance: Mapping[str, float], out_path: str | Path) -> Path:
    """Draws the losses of all trials in their order, the best so far, and the settings' importance; the PNG's path.

    `trials`: {"number", "state", "value"}, states complete, pruned, fail or running; a pruned trial's value is its
    last. `importance`: shares by name, empty where there were too few trials.
    """
    figure = new_figure(width=10.0, height=max(3.8, 1.6 + 0.35 * len(importance)))
    with drawing_style():
        grid = figure.add_gridspec(1, 2 if importance else 1, width_ratios=[1.7, 1] if importance else None)
        _draw_history(figure.add_subplot(grid[0]), trials)
        if importance:
            _draw_importance(figure.add_subplot(grid[1]), importance)
    return save_figure(figure, Path(out_path))


def _draw_history(axes: Axes, trials: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    done = [trial for trial in trials if trial["state"] == "complete"]
    pruned = [trial for trial in trials if trial["state"] == "pruned" and trial["value"] is not None]
    failed = [trial["number"] for trial in trials if trial["state"] == "fail"]
    numbers, values = [trial["number"] for trial in done], [trial["value"] for trial in done]
    axes.plot(numbers, values, "o", color=BLUE, ms=5, label="complete", zorder=3)
    lowest = [min(values[: place + 1]) for place in range(len(values))]
    if values:  # to the last trial, however it ended
        last = trials[-1]["number"]
        axes.step([*numbers, last], [*lowest, lowest[-1]], where="post", color=ORANGE, lw=1.4, label="best so far")
    if pruned:
        places = [trial["number"] for trial in pruned], [trial["value"] for trial in pruned]
        axes.plot(*places, "o", ms=5, mfc="none", mec=GREY, label="pruned", zorder=3)
    if failed:
        foot = axes.get_xaxis_transform()
        axes.plot(failed, [0.02] * len(failed), "x", color=INK, ms=5, label="failed", transform=foot, zorder=3)
    if values and min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
    axes.set_title("validation loss")
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if axes.has_data():  # above the axes, where no point can lie behind it
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4, columnspacing=1.2, handletextpad=0.4)


def _draw_importance(axes: Axes, importance: Mapping[str, float]) -> None:
    names = list(importance)[::-1]  # the greatest on top
    bars = axes.barh(names, [importance[name] for name in names], color=BLUE, height=0.6)
    axes.bar_label(bars, labels=[f" {importance[name]:.0%}" for name in names])
    axes.set_xlim(0, max(importance.values()) * 1.18)
    axes.set_title("share in what makes a trial good")
    axes.xaxis.set_visible(False)
    axes.grid(visible=False)
