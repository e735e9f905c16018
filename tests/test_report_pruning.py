"""The report of prune.py as text and as a page: every figure, bars that tell shares, nothing that could run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from report.pruning import bars, chart, figures, heads, pruning_page, render_pruning


def a_model(label: str, **changes: Any) -> dict[str, Any]:
    figures = {"parameters": 1000, "nonzero": 1000, "file_bytes": 4_000_000, "peak_memory_mb": 500.0}
    return {"label": label, "path": f"{label}.pt", **figures, "tokens_per_s": 20.0, "perplexity": 24.0, **changes}


def an_answer(text: str) -> dict[str, Any]:
    return {"text": text, "tokens": 5, "seconds": 0.5, "tokens_per_s": 10.0, "finish": "length", "reference": None}


def a_report(**changes: Any) -> dict[str, Any]:
    summary = {"tokens": 5, "seconds": 0.5, "tokens_per_s": 10.0, "reference_perplexity": None}
    checkpoint = {"path": "x.pt", "step": None, "val_loss": None, "parameters": 1000, "summary": summary}
    row = {"prompt": "Why <b>?", "context": "", "reference": "", "input": "", "category": ""}
    answers = {
        "title": "two", "notes": [], "settings": {},
        "checkpoints": [{**checkpoint, "label": "dense"}, {**checkpoint, "label": "pruned"}],
        "rows": [{**row, "answers": [an_answer("Because."), an_answer("<script>alert(1)</script>")]}],
    }  # fmt: skip
    smaller = {"parameters": 750, "nonzero": 700, "file_bytes": 3_000_000, "tokens_per_s": 25.0, "perplexity": 60.0}
    report = {
        "title": "model.pt, structured", "notes": ["A note."], "protocol": "book.txt: 8 tokens in windows of 4",
        "models": [a_model("dense"), a_model("pruned", **smaller, peak_memory_mb=None)],
        "rival": {"note": "2 layers", "parameters": 800, "nonzero": 800, "perplexity": None},
        "layers": [
            {"layer": 0, "attention": [10, 10], "mlp": [0, 20]},
            {"layer": 1, "attention": [0, 0], "mlp": [5, 20]},
        ],
        "answers": answers,
    }  # fmt: skip
    return {**report, **changes}


def test_figures_stand_beside_what_they_are_of_the_first_column() -> None:
    report = a_report()
    assert heads(report) == ["dense", "pruned", "layers dropped"]
    assert figures(report) == [
        ["parameters", "1 k", "750 (75.0%)", "800 (80.0%)"],
        ["not zero", "1 k", "700 (70.0%)", "800 (80.0%)"],
        ["file, MB", "4.0", "3.0 (0.75x)", "-"],
        ["peak memory, MB", "500", "-", "-"],
        ["tokens/s", "20.0", "25.0 (1.25x)", "-"],
        ["perplexity", "24.00", "60.00 (2.50x)", "-"],
    ]
    assert heads(a_report(rival=None)) == ["dense", "pruned"]


def test_bars_are_as_long_as_the_shares() -> None:
    _, first, second = bars(a_report()["layers"])
    assert first == "   0  " + "█" * 20 + " 100.0%  " + "·" * 20 + "   0.0%"
    assert second == "   1  " + "·" * 20 + "   none  " + "█" * 5 + "·" * 15 + "  25.0%"


def test_the_chart_has_a_bar_for_each_part_on_one_base_line() -> None:
    found = chart(a_report()["layers"])
    heights = [shape["height"] for shape in found["shapes"]]
    assert heights == [150, 0, 0, 37.5]
    assert len({shape["y"] + shape["height"] for shape in found["shapes"]}) == 1
    assert found["shapes"][3]["words"] == "layer 1, mlp: 25.0% kept"
    many = chart([{"layer": i, "attention": [1, 2], "mlp": [1, 2]} for i in range(80)])
    assert 10 <= len(many["ticks"]) <= 20 and many["width"] > many["shapes"][-1]["x"] + many["shapes"][-1]["width"]


def test_the_text_holds_all_of_it() -> None:
    text = render_pruning(a_report(), width=100)
    for part in ("model.pt, structured", "Perplexity on book.txt", "A note.", "What each layer kept", "Because."):
        assert part in text
    assert "What each layer kept" not in render_pruning(a_report(layers=None))


def test_the_page_is_one_file_that_runs_nothing(tmp_path: Path) -> None:
    page = pruning_page(a_report(), tmp_path / "r.html").read_text("utf-8")
    assert "&lt;script&gt;alert(1)" in page and "<script>alert" not in page and "Why &lt;b&gt;?" in page
    assert page.count("<rect") == 4 and "750 (75.0%)" in page and "style=" not in page
    assert not re.search(r"(?:src|href)=\"(?!#)", page) and "default-src &#39;none&#39;" in page
    assert "<svg" not in pruning_page(a_report(layers=None), tmp_path / "n.html").read_text("utf-8")
