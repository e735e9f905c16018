"""Curves of a run: `metrics.jsonl` becomes one PNG that reads as well with 6 steps as with 20,000."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from report.files import write_file
from report.records import is_finite, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTH_ABOVE = 200  # points; below that a line is readable as it is, and smoothing would only hide steps
MARKERS_BELOW = 40  # points; a handful of steps is drawn with dots, or a run of one step would be invisible

BLUE, ORANGE, GREEN, GREY, INK = "#3b6ea5", "#d9822b", "#3f8f6b", "#8a8f98", "#2b2f36"
STYLE: Any = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": "#c9ced6",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff3",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "agg.path.chunksize": 10_000,  # Agg refuses single paths of more than about 20,000 noisy points without it
}
# One row of small panels under the loss: metric, title, colour, log scale.
PANELS = (
    ("lr", "learning rate", GREEN, False),
    ("grad_norm", "gradient norm before clipping", BLUE, True),
    ("tokens_per_s", "tokens per second", GREY, False),
)
OWN_PER_ROW = 4  # panels of the objective's own metrics


def series(records: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that hold a finite number under `key`; both float64 of shape (n,)."""
    points = [(record["step"], record[key]) for record in records if is_finite(record.get(key))]
    steps, values = zip(*points) if points else ((), ())
    return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over about 1% of the points, those around each one, shape (n,); at both ends the window is cut off.

    Centred, because a trailing mean lags behind a falling loss and would draw it above its own points.
    """
    n = len(values)
    half = max(2, n // 200)
    sums = np.concatenate([[0.0], np.cumsum(values)])  # (n + 1,): the sum over [a, b) is sums[b] - sums[a]
    start = np.maximum(np.arange(n) - half, 0)
    stop = np.minimum(np.arange(n) + half + 1, n)
    return (sums[stop] - sums[start]) / (stop - start)


def plot_curves(run_dir: str | Path, out_path: str | Path | None = None) -> Path:
    """Draws loss, validation, learning rate, gradient norm and tokens/s of one run; returns the PNG's path.

    `out_path` defaults to `run_dir/curves.png`. Metrics that the run did not log get no panel; those of its objective,
    whose names hold a slash (rewards/margins), get one each.
    Raises ValueError or OSError where `metrics.jsonl` is missing, empty or broken.
    """
    records = read_metrics(run_dir)
    panels = [panel for panel in PANELS if len(series(records, panel[0])[0])]
    own = [(name, name, BLUE, False) for name in _objective_metrics(records)]
    rows = [row for row in (panels, *(own[i : i + OWN_PER_ROW] for i in range(0, len(own), OWN_PER_ROW))) if row]
    figure = new_figure(width=10.0, height=4.4 + 2.0 * len(rows))
    grid = figure.add_gridspec(1 + len(rows), 1, height_ratios=[1.9, *(1 for _ in rows)])
    with drawing_style():
        figure.suptitle(
            Path(run_dir).resolve().name, x=0.012, ha="left", fontsize=13, fontweight="bold", parse_math=False
        )
        _draw_loss(figure.add_subplot(grid[0]), records, "loss")
        for place, row in enumerate(rows, start=1):
            columns = grid[place].subgridspec(1, len(row))
            for column, panel in enumerate(row):
                _draw_metric(figure.add_subplot(columns[column]), records, *panel)
    return save_figure(figure, Path(out_path) if out_path is not None else Path(run_dir) / "curves.png")


def _objective_metrics(records: Sequence[dict[str, Any]]) -> list[str]:
    """The metrics of the run's objective, in the order in which they are logged."""
    names = dict.fromkeys(name for record in records for name in record if "/" in name and not name.startswith("val_"))
    return [name for name in names if len(series(records, name)[0])]


def plot_runs(runs: Sequence[tuple[str, str | Path]], out_path: str | Path) -> Path:
    """Draws several runs beside each other, one column a run: (label, run folder) pairs. Returns the PNG's path.

    The loss axes are not shared: a pretraining loss and a loss on answers only are different quantities.
    """
    if not runs:
        raise ValueError("plot_runs needs at least one (label, run folder)")
    loaded = [(label, read_metrics(run_dir)) for label, run_dir in runs]
    figure = new_figure(width=6.2 * len(loaded), height=5.6)
    grid = figure.add_gridspec(2, len(loaded), height_ratios=[2.2, 1])
    with drawing_style():
        for column, (label, records) in enumerate(loaded):
            _draw_loss(figure.add_subplot(grid[0, column]), records, label)
            _draw_metric(figure.add_subplot(grid[1, column]), records, *PANELS[0])
    return save_figure(figure, Path(out_path))


def _draw_loss(axes: Axes, records: Sequence[dict[str, Any]], title: str) -> None:
    """Training loss as a line, validation as dots with the best one ringed and named."""
    steps, losses = series(records, "loss")
    _draw_line(axes, steps, losses, BLUE, "training")
    val_steps, val_losses = series(records, "val_loss")
    if len(val_losses):
        size = 4.5 if len(val_losses) <= MARKERS_BELOW else 2.5
        axes.plot(val_steps, val_losses, "o-", color=ORANGE, lw=1.1, ms=size, label="validation", zorder=4)
        best = int(val_losses.argmin())
        label = f"best {val_losses[best]:.4f} at step {int(val_steps[best]):,}"
        axes.plot(val_steps[best], val_losses[best], "o", label=label, zorder=5, ms=11, mfc="none", mec=ORANGE, mew=1.6)
    axes.set_title(title, parse_math=False)  # a run named "$x" is a name, not mathematics
    axes.set_ylabel("loss" if _objective_metrics(records) else "nats per token")
    if axes.has_data():
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top + 0.12 * (top - bottom))  # room for the legend: no point hides behind it
        axes.legend(loc="upper right", ncols=3, columnspacing=1.4, borderaxespad=0.2)
    _label_steps(axes)


def _draw_metric(axes: Axes, records: Sequence[dict[str, Any]], key: str, title: str, colour: str, log: bool) -> None:
    """One small panel of a metric over the steps; its y axis starts at 0 unless it is logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    steps, values = series(records, key)
    # A logarithmic axis only where it earns its keep: a gradient norm may fall by a factor of 100 in warm-up.
    if log and len(values) and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif len(values) and values.min() >= 0:
        axes.set_ylim(bottom=0, top=values.max() * 1.08 or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}"))
    _draw_line(axes, steps, values, colour, None, overlay=key != "lr")
    axes.plot(*series(records, f"val_{key}"), "o", color=ORANGE, ms=3.5, zorder=4)
    axes.set_title(title)
    _label_steps(axes, ticks=4)


def _draw_line(
    axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str | None, *, overlay: bool = True
) -> None:
    """A line; many points become a pale, thin line with their running mean over it, few ones get dots."""
    if overlay and len(values) > SMOOTH_ABOVE:
        axes.plot(steps, values, color=colour, lw=0.5, alpha=0.3)
        axes.plot(steps, smooth(values), color=colour, lw=1.5, label=f"{label}, smoothed" if label else None)
    elif len(values):
        marker = "o" if len(values) <= MARKERS_BELOW else None
        axes.plot(steps, values, color=colour, lw=1.5, marker=marker, ms=3.5, label=label)


def _label_steps(axes: Axes, ticks: int = 6) -> None:
    """Names the x axis and gives it at most about `ticks` labels, at whole steps only."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    left, right = axes.dataLim.intervalx
    margin = 0.02 * (right - left) if right > left else 1.0  # a single step stands in the middle
    axes.set_xlim(left - margin, right + margin)


def drawing_style() -> Any:
    """A context in which everything is drawn in the style of all our pictures."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def new_figure(width: float, height: float) -> Figure:
    """A figure (inches) on the Agg canvas, without pyplot: no display, no global list of figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes the figure as a PNG, whole or not at all; returns `path`."""
    data = io.BytesIO()
    with drawing_style():
        figure.savefig(data, format="png", dpi=130, metadata={"Software": None})
    return write_file(path, data.getvalue())
