"""Curves: any metrics.jsonl that a run can leave becomes a readable picture, or an error that says what is wrong."""

import json

import numpy as np
import pytest

from report.curves import plot_curves, plot_runs, read_metrics, series, smooth

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder, steps, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(steps):
            record = {
                "step": step,
                "loss": 5.0 - step / steps,
                "lr": 1e-3,
                "grad_norm": 1.0 + step,
                "tokens_per_s": 900.0,
            }
            record.update({key: values[step] for key, values in columns.items() if values.get(step) is not None})
            file.write(json.dumps(record) + "\n")
    return folder


def size_of(png):
    """(width, height) in pixels from a PNG's header."""
    data = png.read_bytes()
    assert data[:8] == PNG
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


@pytest.mark.parametrize("steps", [1, 6, 1200])
def test_a_run_of_any_length_becomes_a_picture_beside_its_metrics(tmp_path, steps):
    run = write_run(tmp_path / "run", steps, val_loss={0: 5.0, steps - 1: 4.0})
    path = plot_curves(run)
    assert path == run / "curves.png"
    width, height = size_of(path)
    assert width > height > 600
    assert [file.name for file in run.iterdir() if file.name.startswith(".tmp")] == []


def test_what_the_run_measured_shows_in_the_picture(tmp_path):
    plain = plot_curves(write_run(tmp_path / "a" / "run", 6)).read_bytes()
    again = plot_curves(write_run(tmp_path / "b" / "run", 6)).read_bytes()
    validated = plot_curves(write_run(tmp_path / "c" / "run", 6, val_loss={5: 4.0})).read_bytes()
    assert plain == again  # the same metrics and folder name: the same bytes
    assert plain != validated


def test_missing_metrics_get_no_panel(tmp_path):
    run = tmp_path / "bare"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 3.0}\n{"step": 1, "loss": null}\n')
    full = size_of(plot_curves(write_run(tmp_path / "full", 2)))
    assert size_of(plot_curves(run, tmp_path / "out" / "bare.png"))[1] < full[1]


def test_a_name_with_dollars_is_not_taken_for_mathematics(tmp_path):
    assert plot_curves(write_run(tmp_path / "$\\frac", 3)).exists()


def test_a_torn_last_line_is_left_out_at_every_length(tmp_path):
    run = write_run(tmp_path / "run", 3)
    whole = (run / "metrics.jsonl").read_bytes()
    starts = [i + 1 for i, byte in enumerate(whole[:-1]) if byte == 10]
    for length in range(starts[-1] + 1, len(whole) - 1):
        (run / "metrics.jsonl").write_bytes(whole[:length])
        found = [record["step"] for record in read_metrics(run)]
        # Cut before the closing brace the line is torn; the brace alone makes it whole, newline or not.
        assert found == [0, 1], length
    (run / "metrics.jsonl").write_bytes(whole[:-1])
    assert [record["step"] for record in read_metrics(run)] == [0, 1, 2]


def test_a_line_torn_inside_a_character_is_left_out(tmp_path):
    torn = '{"step": 1, "note": "\u00e9'.encode()[:-1]
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "loss": 1.0}\n' + torn)
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no finished line"),
        (b'{"step": 0', "no finished line"),
        (b'{"step": 0, "loss": 1}\nnonsense\n{"step": 2, "loss": 1}\n', ":2: not JSON"),
        (b'{"step": 0, "loss": 1}\n{"loss": 1}\n', ":2: expected an object with an integer 'step'"),
        (b"[1, 2]\n", ":1: expected an object"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, content, expected):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl") as error:
        plot_curves(tmp_path)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_metrics_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        plot_curves(tmp_path)


def test_series_keeps_finite_numbers_only():
    records = [
        {"step": 0, "x": 1},
        {"step": 1},
        {"step": 2, "x": None},
        {"step": 3, "x": float("nan")},
        {"step": 4, "x": 2.0},
    ]
    steps, values = series(records, "x")
    assert steps.tolist() == [0, 4]
    assert values.tolist() == [1.0, 2.0]


def test_smoothing_neither_lags_nor_shifts():
    line = np.linspace(10.0, 2.0, 1001)
    smoothed = smooth(line)
    half = 1001 // 200
    assert np.allclose(smoothed[half:-half], line[half:-half])  # a straight line stays where it is
    noise = np.random.default_rng(0).normal(size=1001)
    assert smooth(noise).std() < 0.5 * noise.std()
    assert np.allclose(smooth(np.full(300, 3.0)), 3.0)


def test_runs_stand_beside_each_other(tmp_path):
    first, second = write_run(tmp_path / "a", 5), write_run(tmp_path / "b", 300)
    both = plot_runs([("pretraining", first), ("fine-tuning", second)], tmp_path / "both.png")
    alone = plot_runs([("pretraining", first)], tmp_path / "alone.png")
    assert size_of(both)[0] == 2 * size_of(alone)[0]
    with pytest.raises(ValueError, match="at least one"):
        plot_runs([], tmp_path / "none.png")
