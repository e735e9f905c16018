"""The results of an evaluation as text: one table for all, answers under their references."""

from __future__ import annotations

from report.terminal import predictions, results_table

TEXT = {"checkpoint": "a", "text": "t.txt", "tokens": 1234, "loss": 2.0, "perplexity": None, "windows": 3}
CHOICES = {"checkpoint": "b\x1b", "text": "q.jsonl", "samples": 5, "acc": 0.25, "acc_stderr": None}
SET = {"checkpoint": "a", "text": "r.jsonl", "samples": 4, "f1": 50.0}
ANSWER = {"prompt": "Why?\n\nBecause\x07", "category": "odd", "reference": "So it is.", "prediction": ""}


def test_columns_are_those_that_some_result_has() -> None:
    lines = results_table([TEXT, CHOICES]).split("\n")
    assert lines[0].split() == ["checkpoint", "text", "tokens", "loss", "perplexity", "windows", "samples", "acc", "+-"]
    assert lines[2].split() == ["a", "t.txt", "1,234", "2.0000", "-", "3", "-", "-", "-"]
    assert lines[3].split() == ["b\u241b", "q.jsonl", "-", "-", "-", "-", "5", "0.2500", "-"]


def test_a_category_is_a_row_below() -> None:
    categories = {"": {"samples": 1, "f1": 20.0}, "long": {"samples": 3, "f1": 60.0}}
    lines = results_table([{**SET, "categories": categories}, {**SET, "checkpoint": "b"}]).split("\n")
    assert [line.split()[-2:] for line in lines[2:]] == [["4", "50.00"], ["4", "50.00"], ["1", "20.00"], ["3", "60.00"]]
    assert "r.jsonl: (none)" in lines[4] and "r.jsonl: long" in lines[5]


def test_answers_stand_under_their_reference_a_line_each() -> None:
    results = [
        {"checkpoint": "one", "text": "r.jsonl", "predictions": [ANSWER, ANSWER]},
        {"checkpoint": "another one", "text": "r.jsonl", "predictions": [{**ANSWER, "prediction": "So."}] * 2},
        {"checkpoint": "one", "text": "t.txt"},
    ]
    lines = predictions(results, None).split("\n")
    assert lines[:5] == [
        "r.jsonl, answer 1 (odd)",
        "  prompt       Why? Because\u2407",
        "  reference    So it is.",
        "  one          (no words)",
        "  another one  So.",
    ]
    assert lines[5:7] == ["", "r.jsonl, answer 2 (odd)"] and len(lines) == 11
    assert predictions(results[2:], None) == ""


def test_long_answers_are_cut_to_the_terminal() -> None:
    answer = {**ANSWER, "reference": "木" * 50, "prediction": "x" * 23}
    results = [{"checkpoint": "a", "text": "r", "predictions": [answer]}]
    _, _, reference, prediction = predictions(results, 36).split("\n")
    assert reference == "  reference  " + "木" * 10 + "..."
    assert prediction == "  a          " + "x" * 23
