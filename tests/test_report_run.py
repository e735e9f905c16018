"""The page of runs: what the files hold is on it, whatever they hold; and one line for every folder that is no run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from report.records import metric_warnings, read_run, spikes
from report.run import curves_data, evenly, render_runs, run_facts, run_labels, run_page, samples_over_time, thin
from tests.test_report_compare import HOSTILE, Page
from tests.test_report_curves import write_run

ROOT = Path(__file__).resolve().parent.parent
LOG = """Fine-tuning configuration:
WARNING: no pretrained model: starting from RANDOM weights.
Step 2/5 | Loss: 3.0
Eval Loss: 4.1000 (step 2, best 4.0000 at step 0)
Warning: Overfitting detected (validation loss above its best, training loss falling)
Step 3/5 | Loss: 3.0
Step 4: loss nan is not finite; no process took the step. Data: global samples 8..11 of x. Skipped.
Eval Loss: 4.2000 (step 4, best 4.0000 at step 0)
Warning: Overfitting detected (validation loss above its best, training loss falling)
"""


def a_run(folder, steps=6, **changes):
    """A run's folder with all that a run leaves."""
    write_run(folder, steps, val_loss={0: 4.0, 2: 4.1, 4: 4.2})
    settings = {"data_dir": "data/x", "log_dir": str(folder), "max_lr": 1e-3, "prompts": ["a", "b"], "epochs": None}
    (folder / "config.yaml").write_text(json.dumps({**settings, **changes}))
    samples = [{"step": s, "prompt": p, "text": f"{p} at {s}"} for s in range(0, steps, 2) for p in ("one", "two")]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (folder / "training.log").write_text(LOG)
    (folder / "status.json").write_text('{"state": "finished", "step": 5}')
    (folder / "model_00004.pt").write_bytes(b"x" * 1500)
    (folder / "best.pt").write_bytes(b"x")
    return folder


def page_of(*folders):
    return Page(render_runs([read_run(folder) for folder in folders]))


def curve(page, key, run=0):
    return json.loads(page.raw["data"])["runs"][run]["curves"][key]


def test_everything_that_a_run_leaves_is_on_its_page(tmp_path):
    path = run_page(a_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "run.html"
    page = Page(path.read_text("utf-8"))
    for fact in (
        "state",
        "finished",
        "6",
        "4.0000 at step 0",
        "0.001",
        "a, b",
        "one at 4",
        "1.5 kB",
        "best.pt",
        "4.2000",
    ):
        assert fact in page.text, fact
    warnings = read_run(tmp_path / "run")["warnings"]
    assert warnings[0] == "no pretrained model: starting from RANDOM weights."
    assert "detected (validation loss above its best, training loss falling), steps 2, 4" in " ".join(warnings)
    assert sum("global samples 8..11" in line for line in warnings) == 1
    assert all(line in page.text for line in warnings)
    assert curve(page, "loss")["x"] == [0, 1, 2, 3, 4, 5]
    assert curve(page, "val_loss") == {"x": [0, 2, 4], "t": [0, 0, 0], "y": [4.0, 4.1, 4.2]}


def test_several_runs_are_told_apart_and_their_settings_compared(tmp_path):
    first, second = a_run(tmp_path / "a" / "logs"), a_run(tmp_path / "b" / "logs", max_lr=5e-4, extra=1)
    page = page_of(first, second)
    assert "a/logs" in page.text and "b/logs" in page.text
    differing = page.text.split("Settings that differ")[1].split("Checkpoints")[0].split()
    assert differing == ["settinga/logsb/logs", "max_lr0.0010.0005", "extra-1"]
    same = page_of(first, a_run(tmp_path / "c" / "logs"))
    assert "the runs have the same settings" in same.text
    with pytest.raises(ValueError, match="given more than once"):
        page_of(first, first)
    with pytest.raises(ValueError, match="--html FILE"):
        run_page([first, second])
    with pytest.raises(ValueError, match="no run"):
        run_page([])


def test_only_metrics_are_needed(tmp_path):
    page = page_of(write_run(tmp_path / "bare", 1))
    assert curve(page, "loss")["y"] == [5.0]
    assert "Samples" not in page.text and "All settings" not in page.text and "Checkpoints" not in page.text
    assert ("hidden", None) in page.attributes  # no warnings


def test_an_objectives_own_metrics_get_panels(tmp_path):
    margins = {step: 0.1 * step for step in range(6)}
    run = write_run(tmp_path / "dpo", 6, **{"rewards/margins": margins, "val_rewards/margins": {5: 0.7}})
    data = json.loads(page_of(run).raw["data"])
    assert [panel["key"] for panel in data["panels"]] == ["loss", "lr", "grad_norm", "tokens_per_s", "rewards/margins"]
    assert data["runs"][0]["curves"]["val_rewards/margins"]["y"] == [0.7]


def test_numbers_that_are_none_break_nothing(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [
        '{"step": 0, "loss": null, "lr": 1e-3}',
        '{"step": 1, "loss": NaN, "skipped": true}',
        '{"step": 2, "loss": "x"}',
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "lo')
    page = page_of(folder)
    assert "Not taken, for their numbers were not finite: step 1" in page.text
    assert json.loads(page.raw["data"])["runs"][0]["curves"] == {"lr": {"x": [0], "t": [0], "y": [0.001]}}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_becomes_markup_wherever_it_stands(tmp_path, hostile):
    harmless = page_of(a_run(tmp_path / "harmless"))
    name = re.sub("[/\x00]", "_", hostile)
    folder = a_run(tmp_path / name, **{hostile: hostile})
    (folder / "training.log").write_text(f"Warning: {hostile}\n")
    (folder / "samples.jsonl").write_text(json.dumps({"step": 0, "prompt": hostile, "text": hostile}) + "\n")
    (folder / "status.json").write_text(json.dumps({"state": hostile}))
    metrics = [{"step": step, "loss": 1.0, f"x/{hostile}": 2.0} for step in range(2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    page = page_of(folder)
    for ours in ("style", "script"):
        assert page.raw[ours] == harmless.raw[ours]
    assert page.tags.count("script") == 2 and page.tags.count("style") == page.tags.count("h1") == 1
    assert "img" not in page.tags and not [name for name, _ in page.attributes if name.startswith("on")]
    assert json.loads(page.raw["data"])["panels"][1]["key"] == f"x/{hostile}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b"", "holds no finished line yet"),
        ("metrics.jsonl", b'{"step": 0}\nnonsense\n{"step": 2}\n', r"metrics\.jsonl:2: not JSON"),
        ("metrics.jsonl", b"\x89PNG\r\n\x1a\n\x00\n", r"metrics\.jsonl:1: not JSON"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n", r"metrics\.jsonl:1: not JSON"),
        ("samples.jsonl", b'{"step": 0, "prompt": 3, "text": "x"}\n', "lacks `prompt` or `text`"),
        ("config.yaml", b"a: [1, 2\nb: }", r"config\.yaml: not valid YAML"),
        ("config.yaml", b"a: \xff", r"config\.yaml: not valid YAML"),
        ("config.yaml", b"- 1\n- 2\n", r"config\.yaml: expected `name: value` lines, found list"),
    ],
)
def test_what_is_damaged_is_named_in_one_line(tmp_path, name, content, message):
    folder = a_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        run_page(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not (folder / "run.html").exists()


def test_a_folder_that_is_none_is_told(tmp_path):
    (tmp_path / "file").touch()
    for name, kind in (("empty", FileNotFoundError), ("file", ValueError)):
        with pytest.raises(kind, match="expected the folder of a run"):
            run_page(tmp_path / name)


def test_a_status_that_is_broken_is_left_out(tmp_path):
    folder = a_run(tmp_path / "run")
    for content in (b"", b"[]", b"{}", b"\xff", b"3"):
        (folder / "status.json").write_bytes(content)
        assert read_run(folder)["state"] == ""


def test_spikes_are_found_where_they_are_and_nowhere_else():
    rng = np.random.default_rng(0)
    curve = 3 + 2 * np.exp(-np.arange(400) / 60) + rng.normal(size=400) * 0.05
    assert spikes(curve.tolist()) == []
    curve[[100, 250]] = 9.0
    assert spikes(curve.tolist()) == [100, 250]
    assert spikes([1.0] * 30 + [1.2]) == [] and spikes([1.0] * 30 + [1.6]) == [30]
    assert spikes([1.0] * 19 + [50.0]) == []  # too few before it
    records = [{"step": 10 * i, "loss": float(value), "grad_norm": 1.0} for i, value in enumerate(curve)]
    assert metric_warnings(records) == ["Spikes of the loss: steps 1,000, 2,500; the highest 9 at step 1,000"]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(10, 60))
def test_thinning_keeps_ends_peaks_and_order(values, limit):
    places = thin(values, limit)
    assert len(places) <= max(limit, len(values) if len(values) <= limit else 0)
    assert places == sorted(set(places)) and places[0] == 0 and places[-1] == len(values) - 1
    kept = [values[i] for i in places]
    assert max(kept) == max(values) and min(kept) == min(values)


def test_a_long_run_stays_a_small_page(tmp_path):
    records = [{"step": i, "loss": 3 + 1e-5 * i, "tokens": 10 * i} for i in range(50_000)]
    records[31_234]["loss"] = 99.0
    curve = curves_data([("long", records)])["runs"][0]["curves"]["loss"]
    assert len(curve["x"]) <= 2000 and 99.0 in curve["y"]
    assert curve["t"] == [10 * step for step in curve["x"]]


def test_samples_stand_by_prompt_step_and_run():
    def run(*samples):
        return {"samples": [{"step": s, "prompt": p, "text": t} for s, p, t in samples]}

    first, second = run((0, "p", "a0"), (5, "p", "a5")), run((5, "p", "b5"), (5, "q", "only b"))
    p, q = samples_over_time([first, second])
    assert p["columns"] == [0, 1] and q["columns"] == [1]
    assert p["steps"] == [{"step": "0", "texts": ["a0", None]}, {"step": "5", "texts": ["a5", "b5"]}]
    (many,) = samples_over_time([run(*((s, "p", str(s)) for s in range(100)))])
    assert [step["step"] for step in many["steps"]][:: len(many["steps"]) - 1] == ["0", "99"]
    assert many["left_out"] == "88 more steps"


@given(st.integers(1, 200), st.integers(2, 20))
def test_evenly_keeps_both_ends(count, limit):
    kept = evenly(range(count), limit)
    assert len(kept) == len(set(kept)) == min(count, limit) and kept[0] == 0 and kept[-1] == count - 1


def test_labels_and_facts():
    assert run_labels(["x/logs", "y/logs"]) == ["x/logs", "y/logs"] and run_labels(["logs/a", "logs/b"]) == ["a", "b"]
    records = [
        {"step": 0, "loss": 4.0, "tokens": 10, "val_loss_before": 5.0, "tokens_per_s": 10.0, "memory_mb": 100.0},
        {"step": 9, "loss": 3.0, "tokens": 100, "val_loss": 3.5, "tokens_per_s": 30.0, "memory_mb": 200.0},
    ]
    assert dict(run_facts(records, "stopped")) == {
        "state": "stopped",
        "steps": "10",
        "tokens": "100",
        "training loss": "3.0000",
        "validation loss before": "5.0000",
        "validation loss": "3.5000",
        "best": "3.5000 at step 9",
        "tokens/s (median)": "20",
        "peak memory": "200 MB",
    }


def command(*words):
    """(exit code, stdout, stderr) of `python -m report`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "report", *map(str, words)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_the_command_writes_the_page_and_answers_mistakes_with_one_line(tmp_path):
    runs = [a_run(tmp_path / "a"), a_run(tmp_path / "b")]
    code, out, err = command(*runs, "--html", tmp_path / "out" / "both.html")
    assert (code, err) == (0, "") and out == f"Page: {tmp_path / 'out' / 'both.html'}\n"
    for words in (
        (),
        ("none",),
        (*runs,),
        ("serve", "none"),
        ("votes", "none"),
        ("serve", runs[0], "--port", "x"),
        ("--x",),
    ):
        code, out, err = command(*words)
        assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (words, err)
    assert "python -m report serve" in command("--help")[1]
