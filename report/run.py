"""The page of one or several runs: curves over one another, what their settings differ in, samples over time, warnings.

All of it is made from the files that a run leaves (report.records); the curves are drawn in the page by its own script.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from report.files import write_file
from report.page import counted, format_bytes, render_template, show_controls
from report.records import is_finite, metric_warnings, read_run

MAX_POINTS = 2000  # of a curve in the page; 1,200 pixels show no more
MAX_SAMPLES = 12  # steps whose samples are shown
# (metric, title, drawn from zero, logarithmic where it spans much)
PANELS = (
    ("loss", "loss", False, False),
    ("lr", "learning rate", True, False),
    ("grad_norm", "gradient norm before clipping", True, True),
    ("tokens_per_s", "tokens per second", True, False),
    ("memory_mb", "peak memory, MB", True, False),
)


def run_page(runs: str | Path | Sequence[str | Path], out_path: str | Path | None = None) -> Path:
    """Writes the page of a run, or of several, and returns its path: run.html in the folder of a single one.

    Raises ValueError or OSError naming the file that is missing or damaged.
    """
    paths = [runs] if isinstance(runs, (str, Path)) else list(runs)
    if not paths:
        raise ValueError("no run: give the folder of at least one, such as logs_finetune")
    if out_path is None and len(paths) > 1:
        raise ValueError(f"--html FILE: say where the page of {len(paths)} runs goes")
    html = render_runs([read_run(path) for path in paths])
    return write_file(out_path or Path(paths[0]) / "run.html", html.encode("utf-8", errors="replace"))


def render_runs(runs: Sequence[dict[str, Any]]) -> str:
    """The HTML of runs that `report.records.read_run` has read."""
    labels = run_labels([run["path"] for run in runs])
    page = {
        "title": show_controls(f"{labels[0]}: a run" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(labels)}"),
        "notes": [],
        "live": False,
        "runs": [
            {"label": label, "path": show_controls(run["path"]), "facts": run_facts(run["records"], run["state"])}
            for label, run in zip(map(show_controls, labels), runs)
        ],
        "warnings": [[show_controls(line) for line in run["warnings"]] for run in runs],
        "differences": settings_table(runs, only_differences=True) if len(runs) > 1 else [],
        "settings": settings_table(runs, only_differences=False),
        "samples": samples_over_time(runs),
        "checkpoints": [checkpoint_rows(run["checkpoints"]) for run in runs],
    }
    data = curves_data([(label, run["records"]) for label, run in zip(labels, runs)])
    return render_template("run.html", page, ["compare.css", "run.css"], ["run.js"], data)


def run_labels(paths: Sequence[str]) -> list[str]:
    """The fewest last parts of the folders' paths that tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(path[-count:]) for path in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"{paths[0]}: the same run is given more than once")


def curves_data(runs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> dict[str, Any]:
    """What the page's script draws: panels, and of each run (label, records) the curves that it has, thinned."""
    own = dict.fromkeys(name for _, records in runs for name in _objective_metrics(records))
    panels = [*PANELS, *((name, name, False, False) for name in own)]
    keys = [name for panel in panels for name in (panel[0], f"val_{panel[0]}")]
    return {
        "panels": [
            {"key": key, "title": title, "zero": zero, "log": log}
            for key, title, zero, log in panels
            if any(is_finite(record.get(key)) for _, records in runs for record in records)
        ],
        "runs": [
            {"label": show_controls(label), "curves": {key: c for key in keys if (c := _curve(records, key))}}
            for label, records in runs
        ],
    }


def _objective_metrics(records: Iterable[dict[str, Any]]) -> list[str]:
    """The metrics of the run's objective (rewards/margins) in the order in which they are logged."""
    return list(
        dict.fromkeys(name for record in records for name in record if "/" in name and not name.startswith("val_"))
    )


def _curve(records: Sequence[dict[str, Any]], key: str) -> dict[str, list[float]] | None:
    """{"x": steps, "t": tokens seen, "y": values} of the records that hold a finite number; None for no such record."""
    points = [
        (record["step"], record["tokens"] if is_finite(record.get("tokens")) else 0, _short(record[key]))
        for record in records
        if is_finite(record.get(key))
    ]
    kept = [points[i] for i in thin([value for _, _, value in points])]
    return {name: list(column) for name, column in zip("xty", zip(*kept))} if kept else None


def thin(values: Sequence[float], limit: int = MAX_POINTS) -> list[int]:
    """Places of at most `limit` values that keep every peak: of each stretch its lowest and highest, and both ends."""
    if len(values) <= limit:
        return list(range(len(values)))
    stretches = limit // 2 - 1
    kept = {0, len(values) - 1}
    for number in range(stretches):
        places = range(number * len(values) // stretches, (number + 1) * len(values) // stretches)
        kept |= {min(places, key=values.__getitem__), max(places, key=values.__getitem__)}
    return sorted(kept)


def _short(value: float) -> float:
    """Six digits: a curve shows no more, and the page stays small."""
    return float(f"{value:.6g}")


def run_facts(records: Sequence[dict[str, Any]], state: str = "") -> list[tuple[str, str]]:
    """(name, value) pairs that sum a run up; what was not logged is left out."""
    last = records[-1]
    validated = [record for record in records if is_finite(record.get("val_loss"))]
    facts = [("state", state)] if state else []
    facts += [("steps", f"{last['step'] + 1:,}")]
    facts += [("tokens", f"{last['tokens']:,}")] if is_finite(last.get("tokens")) else []
    facts += [("training loss", f"{last['loss']:.4f}")] if is_finite(last.get("loss")) else []
    if is_finite(records[0].get("val_loss_before")):
        facts += [("validation loss before", f"{records[0]['val_loss_before']:.4f}")]
    if validated:
        best = min(validated, key=lambda record: record["val_loss"])
        facts += [("validation loss", f"{validated[-1]['val_loss']:.4f}")]
        facts += [("best", f"{best['val_loss']:.4f} at step {best['step']:,}")]
    for key, name in (("tokens_per_s", "tokens/s (median)"), ("s_per_step", "s/step (median)")):
        values = [record[key] for record in records if is_finite(record.get(key))]
        facts += [(name, f"{statistics.median(values):,.4g}")] if values else []
    memory = [record["memory_mb"] for record in records if is_finite(record.get("memory_mb"))]
    return facts + ([("peak memory", format_bytes(round(max(memory) * 1e6)))] if memory else [])


def settings_table(runs: Sequence[dict[str, Any]], only_differences: bool) -> list[list[str]]:
    """Rows of a setting's name and its value in each run; the folder of the run itself is no setting."""
    names = dict.fromkeys(name for run in runs for name in run["settings"] if name != "log_dir")
    rows = [[name, *(_setting(run["settings"], name) for run in runs)] for name in names]
    return [[show_controls(cell) for cell in row] for row in rows if not only_differences or len(set(row[1:])) > 1]


def _setting(settings: dict[str, Any], name: str) -> str:
    value = settings.get(name, "")
    return (
        "-" if value is None or value == "" else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    )


def samples_over_time(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each prompt: the runs that have it, and steps (some, where there are many) with each run's text or None."""
    found: dict[str, dict[int, dict[int, str]]] = {}
    for column, run in enumerate(runs):
        for sample in run["samples"]:
            found.setdefault(sample["prompt"], {}).setdefault(sample["step"], {})[column] = sample["text"]
    result = []
    for prompt, steps in found.items():
        columns = sorted({column for texts in steps.values() for column in texts})
        kept = evenly(sorted(steps), MAX_SAMPLES)
        shown = [
            {
                "step": f"{step:,}",
                "texts": [show_controls(steps[step][c]) if c in steps[step] else None for c in columns],
            }
            for step in kept
        ]
        left_out = counted(len(steps) - len(kept), "more step") if len(kept) < len(steps) else ""
        result.append({"prompt": show_controls(prompt), "columns": columns, "steps": shown, "left_out": left_out})
    return result


def evenly(items: Sequence[int], limit: int) -> list[int]:
    """At most `limit` of the items, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[math.floor(i * (len(items) - 1) / (limit - 1) + 0.5)] for i in range(limit)]


def checkpoint_rows(checkpoints: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of file, size and validation loss."""
    return [
        [
            entry["name"],
            format_bytes(entry["bytes"]),
            f"{entry['val_loss']:.4f}" if is_finite(entry["val_loss"]) else "",
        ]
        for entry in checkpoints
    ]


def live_page(title: str) -> str:
    """The page that a server shows while runs go on: empty at first, then filled by its script from `live_data`."""
    empty: dict[str, Any] = {name: [] for name in ("notes", "runs", "warnings", "differences", "settings", "samples")}
    page = {**empty, "title": show_controls(title), "live": True, "checkpoints": []}
    data: dict[str, Any] = {"panels": [], "runs": []}
    return render_template("run.html", page, ["compare.css", "run.css"], ["run.js", "live.js"], data, connects=True)


def live_data(runs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> dict[str, Any]:
    """What the live page asks for: the curves, the figures and the warnings that metrics.jsonl alone tells."""
    data = curves_data(runs)
    for entry, (_, records) in zip(data["runs"], runs):
        entry["facts"] = run_facts(records) if records else [("state", "no step is logged yet")]
        entry["warnings"] = metric_warnings(records)
    return data
