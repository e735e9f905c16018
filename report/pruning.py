"""The report of `prune.py`: what a model was and what is left of it, as text and as one self-contained HTML file.

The dict that both show is made by `pruning.comparison.compare` and described there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from report.compare import page_values
from report.files import write_file
from report.page import format_count, format_perplexity, render_template, show_controls
from report.terminal import render_comparison, table

BAR = 20  # cells of a bar in the terminal
PARTS = ("attention", "mlp")


def pruning_page(report: dict[str, Any], out_path: str | Path) -> Path:
    """Writes the page of one report to `out_path` and returns its path. Raises OSError."""
    page = {
        "title": show_controls(report["title"]),
        "notes": [show_controls(note) for note in report["notes"]],
        "protocol": show_controls(report["protocol"]),
        "heads": heads(report),
        "figures": figures(report),
        "chart": None if report["layers"] is None else chart(report["layers"]),
        "answers": page_values(report["answers"]),
    }
    html = render_template("pruning.html", page, ["compare.css", "pruning.css"])
    return write_file(out_path, html.encode("utf-8", errors="replace"))


def render_pruning(report: dict[str, Any], width: int | None = None) -> str:
    """All of it as text. `width`: cells of the terminal, or None for no terminal."""
    lines = [show_controls(report["title"]), "", table(["", *heads(report)], figures(report))]
    lines += ["", f"Perplexity on {show_controls(report['protocol'])}", *map(show_controls, report["notes"])]
    if report["layers"] is not None:
        lines += ["", *bars(report["layers"])]
    return "\n".join([*lines, "", render_comparison(report["answers"], width)])


def heads(report: dict[str, Any]) -> list[str]:
    """The names of the columns: the models, and the cheap rival where there is one."""
    return [*(model["label"] for model in report["models"]), *(["layers dropped"] if report["rival"] else [])]


def figures(report: dict[str, Any]) -> list[list[str]]:
    """The rows of the table, each with a name and a cell a column: the figure, and what it is of the first column's."""
    columns = [*report["models"], *([report["rival"]] if report["rival"] else [])]

    def row(name: str, key: str, form: Callable[[float], str], ratio: str) -> list[str]:
        first = columns[0].get(key)
        cells = []
        for number, column in enumerate(columns):
            value = column.get(key)
            beside = f" ({ratio.format(value / first)})" if number and value and first else ""
            cells.append("-" if value is None else form(value) + beside)
        return [name, *cells]

    return [
        row("parameters", "parameters", lambda value: format_count(int(value)), "{:.1%}"),
        row("not zero", "nonzero", lambda value: format_count(int(value)), "{:.1%}"),
        row("file, MB", "file_bytes", lambda value: f"{value / 1e6:,.1f}", "{:.2f}x"),
        row("peak memory, MB", "peak_memory_mb", lambda value: f"{value:,.0f}", "{:.2f}x"),
        row("tokens/s", "tokens_per_s", lambda value: f"{value:,.1f}", "{:.2f}x"),
        row("perplexity", "perplexity", format_perplexity, "{:.2f}x"),
    ]


def bars(layers: list[dict[str, Any]]) -> list[str]:
    """What each layer kept, a line a layer."""
    lines = ["What each layer kept: attention, MLP"]
    for layer in layers:
        cells = []
        for part in PARTS:
            share = _share(layer[part])
            full = round(BAR * (share or 0))
            cells.append("█" * full + "·" * (BAR - full) + ("   none" if share is None else f" {share:6.1%}"))
        lines.append(f"{layer['layer']:>4}  " + "  ".join(cells))
    return lines


def chart(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The same as the rectangles of an SVG: two columns a layer, up from a base line, on a scale from 0 to 100%."""
    step = min(60, max(22, 660 // len(layers)))  # few layers fill the width of the text, many do not crowd
    column, height, left, top = (step - 4) // 2, 150, 40, 8
    shapes = []
    for place, layer in enumerate(layers):
        for side, part in enumerate(PARTS):
            share = _share(layer[part])
            size = height * (share or 0)
            words = "had none" if share is None else f"{share:.1%} kept"
            x = left + place * step + side * (column + 1)
            box = {"x": x, "y": round(top + height - size, 1), "width": column, "height": round(size, 1)}
            shapes.append({**box, "part": part, "words": f"layer {layer['layer']}, {part}: {words}"})
    every = max(1, len(layers) // 16)
    bottom = top + height
    return {
        "width": left + len(layers) * step + 4,
        "height": bottom + 20,
        "right": left + len(layers) * step,
        "left": left,
        "shapes": shapes,
        "lines": [(f"{share}%", bottom - height * share / 100) for share in (0, 50, 100)],
        "ticks": [(left + i * step + column, layer["layer"]) for i, layer in enumerate(layers) if i % every == 0],
        "label_y": bottom + 15,
    }


def _share(kept_of: list[int]) -> float | None:
    kept, of = kept_of
    return kept / of if of else None
