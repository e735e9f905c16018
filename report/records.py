"""What a run left to read, without torch: its metrics, samples, settings, log and files, as plain values."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NUMBERED = re.compile(r"model_(\d{5,})\.pt")
# A point counts as a spike where it lies this far above the median of the points before it: so many median deviations
# of theirs, and so much of the median itself, for a smooth curve has deviations of nearly nothing.
SPIKE_WINDOW, SPIKE_DEVIATIONS, SPIKE_FACTOR = 20, 8.0, 1.5
MAX_SETTINGS = 1 << 18  # bytes; parsing takes some seconds for each megabyte
MAX_WARNINGS = 20  # lines; a run that warns at each evaluation is told so once, with the steps


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, each with a step. A torn last line (a killed writer) is left out.

    Raises ValueError naming file and line for anything else that is broken, OSError where the file cannot be read.
    """
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # broken JSON, or UTF-8 cut in the middle of a character
            if number == len(lines):  # no newline after it: the writer died here, or is still writing
                break
            raise ValueError(f"{path}:{number}: not JSON ({error}); remove the line or start the run again") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}:{number}: expected an object with an integer 'step', found {line[:60]!r}")
        records.append(record)
    return records


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of `run_dir/metrics.jsonl`, in file order; errors as `read_lines`, and ValueError for none at all."""
    path = Path(run_dir) / "metrics.jsonl"
    if Path(run_dir).is_file():
        raise ValueError(f"{run_dir}: is a file, expected the folder of a run (with metrics.jsonl in it)")
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; expected the folder of a run, which writes it from its first step on"
        )
    records = read_lines(path)
    if not records:
        raise ValueError(f"{path}: holds no finished line yet; curves need at least one logged step")
    return records


def read_run(run_dir: str | Path) -> dict[str, Any]:
    """{"path", "records", "settings", "samples", "checkpoints", "warnings", "state"} of a run; what it lacks is empty.

    Raises ValueError or OSError naming the file that is missing or damaged; only metrics.jsonl must be there.
    """
    folder = Path(run_dir)
    records = read_metrics(folder)
    samples = folder / "samples.jsonl"
    return {
        "path": str(run_dir),
        "records": records,
        "settings": _read_settings(folder / "config.yaml"),
        "samples": [_sample(record, samples) for record in (read_lines(samples) if samples.exists() else [])],
        "checkpoints": _checkpoints(folder, records),
        "warnings": _log_warnings(folder / "training.log") + metric_warnings(records),
        "state": _read_state(folder / "status.json"),
    }


def _read_settings(path: Path) -> dict[str, Any]:
    import yaml

    if not path.exists():
        return {}
    if path.stat().st_size > MAX_SETTINGS:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes are too many for a run's settings; move it away")
    try:
        text = path.read_text("utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise yaml.YAMLError("it has an alias (*name), and no run writes one")  # ten of them make a billion values
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date with a 13th month, say
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: not valid YAML: {reason}; mend it or move it away") from None
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path}: expected `name: value` lines, found {type(settings).__name__}; mend it or move it away"
        )
    return {str(name): value for name, value in settings.items()}


def _sample(record: dict[str, Any], path: Path) -> dict[str, Any]:
    if not isinstance(record.get("prompt"), str) or not isinstance(record.get("text"), str):
        raise ValueError(f"{path}: a line of step {record['step']} lacks `prompt` or `text`; is it a run's own file?")
    return record


def _checkpoints(folder: Path, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The checkpoints that are left, numbered ones by step, with the validation loss that was logged at theirs."""
    losses = {record["step"]: record.get("val_loss") for record in records}
    found = []
    for file in folder.iterdir():
        match = NUMBERED.fullmatch(file.name)
        if match or file.name in ("best.pt", "final.pt"):
            step = int(match[1]) if match else None
            found.append({"name": file.name, "step": step, "bytes": file.stat().st_size, "val_loss": losses.get(step)})
    return sorted(found, key=lambda entry: (entry["step"] is None, entry["step"], entry["name"]))


def _read_state(path: Path) -> str:
    """What status.json says: running, finished, stopped, failed; "" where there is none that can be read."""
    try:
        state = json.loads(path.read_bytes())["state"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return str(state)[:40]


def _log_warnings(path: Path) -> list[str]:
    """What the run itself warned of in training.log: over-fitting, steps not taken, an end before the last step."""
    if not path.exists():
        return []
    steps: dict[str, list[int]] = {}
    step: int | None = None
    for line in path.read_text("utf-8", errors="replace").splitlines():
        if match := re.search(r"^Step (\d+)|\(step (\d+)", line):
            step = int(match[1] or match[2])
        if re.match(r"warning\b", line, re.IGNORECASE) or "is not finite" in line or line.startswith("Stopped early"):
            seen = steps.setdefault(re.sub(r"^warning: *", "", line, flags=re.IGNORECASE)[:300], [])
            tells_itself = re.search(rf"\bstep {step}\b", line, re.IGNORECASE)
            seen += [step] if step is not None and step not in seen and not tells_itself else []
    warnings = [f"{line.rstrip('.')}, {_at_steps(found)}" if found else line for line, found in steps.items()]
    left = len(warnings) - MAX_WARNINGS
    return warnings[:MAX_WARNINGS] + ([f"... and {left} more in training.log"] if left > 0 else [])


def metric_warnings(records: Sequence[dict[str, Any]]) -> list[str]:
    """What the metrics themselves show: steps that were skipped, and spikes of the loss and of the gradient norm."""
    skipped = [record["step"] for record in records if record.get("skipped")]
    warnings = [f"Not taken, for their numbers were not finite: {_at_steps(skipped)}"] if skipped else []
    for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
        points = [(record["step"], record[key]) for record in records if is_finite(record.get(key))]
        found = spikes([value for _, value in points])
        if found:
            worst = max(found, key=lambda i: points[i][1])
            most = f"{points[worst][1]:.4g} at step {points[worst][0]:,}"
            warnings.append(f"Spikes of the {name}: {_at_steps([points[i][0] for i in found])}; the highest {most}")
    return warnings


def spikes(values: Sequence[float]) -> list[int]:
    """The places of values far above those before them (see SPIKE_WINDOW); the first 20 have nothing before them."""
    if len(values) <= SPIKE_WINDOW:
        return []
    curve = np.asarray(values, dtype=np.float64)
    before = np.lib.stride_tricks.sliding_window_view(curve[:-1], SPIKE_WINDOW)  # (n - window, window)
    middle = np.median(before, axis=1)
    deviation = np.median(np.abs(before - middle[:, None]), axis=1)
    limit = np.maximum(middle + SPIKE_DEVIATIONS * deviation, SPIKE_FACTOR * middle)
    found: list[int] = (np.flatnonzero(curve[SPIKE_WINDOW:] > limit) + SPIKE_WINDOW).tolist()
    return found


def is_finite(value: object) -> bool:
    """Whether it is a number of the usual kind."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _at_steps(steps: Sequence[int]) -> str:
    """`step 5`, `steps 5, 9`, `steps 5, 9, ... 40 (12 times)`."""
    shown = ", ".join(f"{step:,}" for step in steps[:6])
    if len(steps) > 6:
        shown = f"{shown}, ... {steps[-1]:,} ({len(steps)} times)"
    return f"step {shown}" if len(steps) == 1 else f"steps {shown}"
