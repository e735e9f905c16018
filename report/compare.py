"""The comparison page: what several checkpoints answered to the same prompts, as one self-contained HTML file.

Its reader filters, sorts by how the columns differ or by their loss on the reference, and votes without knowing which
answer is whose (`report.votes` reads such votes back). The dict that it shows is made by `evaluation.compare.compare`
and described there.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from report.files import write_file
from report.page import counted, format_bytes, format_count, format_perplexity, render_template, show_controls

# difflib compares every word with every word at worst: 4 million pairs of few different words take 2 s.
MAX_WORD_PAIRS = 4_000_000
# A word is what stands between spaces; where a script has no spaces (kana, Han, Hangul) each sign counts as one.
_SIGNS = "\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uffef"
WORD = re.compile(rf"[{_SIGNS}]|[^\s{_SIGNS}]+")


def compare_page(comparison: dict[str, Any], out_path: str | Path) -> Path:
    """Writes the page of one comparison to `out_path` and returns its path. Raises OSError."""
    return write_file(out_path, render_page(comparison).encode("utf-8", errors="replace"))


def render_page(comparison: dict[str, Any]) -> str:
    """The page's HTML."""
    page = page_values(comparison)
    scripts = ["compare.js", "blind.js"] if len(comparison["checkpoints"]) > 1 else ["compare.js"]
    return render_template("compare.html", page, ["compare.css"], scripts, script_data(comparison))


def script_data(comparison: dict[str, Any]) -> dict[str, Any]:
    """What the page's script filters, sorts and votes by; `comparison` is a digest that tells two pages apart."""
    labels = [show_controls(checkpoint["label"]) for checkpoint in comparison["checkpoints"]]
    content = [labels, [[row["prompt"], *(answer["text"] for answer in row["answers"])] for row in comparison["rows"]]]
    rows = [
        {
            "prompt": row["prompt"][:200],
            "category": row["category"],
            "differs": row_difference(row),
            "losses": [(answer.get("reference") or {}).get("loss") for answer in row["answers"]],
        }
        for row in comparison["rows"]
    ]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return {
        "title": comparison["title"],
        "comparison": digest,
        "checkpoints": labels,
        "categories": categories(comparison),
        "rows": rows,
    }


def categories(comparison: dict[str, Any]) -> list[str]:
    """The categories of the prompts, in the order of their first ones."""
    return list(dict.fromkeys(row["category"] for row in comparison["rows"] if row["category"]))


def row_difference(row: dict[str, Any]) -> float:
    """How far the answers of a row are apart: the largest difference of any from the first, 0 (same words) to 1."""
    first, *others = (answer["text"] for answer in row["answers"])
    return round(max((difference(first, text) for text in others), default=0.0), 3)


def difference(base: str, text: str) -> float:
    """The share of the words of both texts that the other lacks, 0 to 1; 1 for texts too long to compare."""
    base_words, words = re.findall(WORD, base), re.findall(WORD, text)
    if base_words == words:
        return 0.0
    same = _same_words(base_words, words)
    return 1.0 if same is None else 1.0 - 2 * sum(same) / (len(base_words) + len(words))


def _same_words(base_words: list[str], words: list[str]) -> list[bool] | None:
    """For each of `words` whether it stands in the same place of `base_words`; None where that would take too long."""
    if len(base_words) * len(words) > MAX_WORD_PAIRS:
        return None
    same = [False] * len(words)
    matcher = difflib.SequenceMatcher(None, base_words, words, autojunk=False)
    for _, start, size in matcher.get_matching_blocks():
        same[start : start + size] = [True] * size
    return same


def mark_differences(base: str, text: str) -> list[tuple[str, bool]]:
    """`text` cut into (piece, differs from `base`) pairs that join to `text` again; words are compared, not spacing.

    A pair of answers so long that the comparison would take over a second comes back as one unmarked piece.
    """
    same = _same_words(re.findall(WORD, base), re.findall(WORD, text))
    if same is None:
        return [(text, False)]
    marked: list[tuple[str, bool]] = []
    end = 0
    for match, is_same in zip(re.finditer(WORD, text), same):
        gap = text[end : match.start()]
        gap_differs = not is_same and bool(marked) and marked[-1][1] and "\n" not in gap  # one stroke over neighbours
        marked += [(gap, gap_differs), (match[0], not is_same)]
        end = match.end()
    return _join([*marked, (text[end:], False)])


def answer_facts(answer: dict[str, Any]) -> list[str]:
    """What stands under an answer: length, speed, why it ended, and what the model makes of the reference."""
    facts = [counted(answer["tokens"], "token"), counted(len(answer["text"]), "character")]
    facts += [f"{answer['seconds']:.2f} s", f"{answer['tokens_per_s']:.0f} tokens/s"]
    facts += [{"length": "cut at the length limit"}.get(answer["finish"], answer["finish"])]
    reference = answer.get("reference")
    if reference:
        facts += [f"reference perplexity {format_perplexity(reference['perplexity'])}"]
    return facts


def checkpoint_facts(checkpoint: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) pairs that stand at the head of a column; what is not known is left out."""
    summary = checkpoint["summary"]
    size, length, perplexity = checkpoint.get("bytes"), summary.get("mean_tokens"), summary["reference_perplexity"]
    facts = [
        ("step", None if checkpoint["step"] is None else f"{checkpoint['step']:,}"),
        ("validation loss", None if checkpoint["val_loss"] is None else f"{checkpoint['val_loss']:.4f}"),
        ("parameters", format_count(checkpoint["parameters"])),
        ("file", None if size is None else format_bytes(size)),
        ("tokens", f"{summary['tokens']:,}"),
        ("tokens an answer", None if length is None else f"{length:.1f}"),
        ("tokens/s", f"{summary['tokens_per_s']:.0f}"),
        ("reference perplexity", perplexity and format_perplexity(perplexity)),
    ]
    return [(name, value) for name, value in facts if value is not None]


def category_table(comparison: dict[str, Any]) -> list[list[str]]:
    """Rows of category, number of prompts, and each column's perplexity on the references; none for one category."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in comparison["rows"]:
        groups.setdefault(row["category"], []).append(row)
    scored = any(answer.get("reference") for row in comparison["rows"] for answer in row["answers"])
    if len(groups) < 2 or not scored:
        return []
    columns = range(len(comparison["checkpoints"]))
    return [
        [show_controls(name) or "(none)", str(len(rows)), *(_category_cell(rows, column) for column in columns)]
        for name, rows in groups.items()
    ]


def _category_cell(rows: list[dict[str, Any]], column: int) -> str:
    references = [r for row in rows if (r := row["answers"][column].get("reference"))]
    tokens = sum(reference["tokens"] for reference in references)
    if not tokens:
        return "-"
    mean = sum(reference["loss"] * reference["tokens"] for reference in references) / tokens
    return format_perplexity(math.exp(mean) if mean < 700 else None)


def page_values(comparison: dict[str, Any]) -> dict[str, Any]:
    """The comparison as a template wants it: formatted, its differences marked, its control characters visible."""
    checkpoints = comparison["checkpoints"]
    return {
        "title": show_controls(comparison["title"]),
        "notes": [show_controls(note) for note in comparison["notes"]],
        "settings": [(name.replace("_", " "), value) for name, value in comparison["settings"].items()],
        "checkpoints": [
            {"label": show_controls(c["label"]), "path": show_controls(c["path"]), "facts": checkpoint_facts(c)}
            for c in checkpoints
        ],
        "categories": [show_controls(name) for name in categories(comparison)],
        "by_category": category_table(comparison),
        "scored": any(answer.get("reference") for row in comparison["rows"] for answer in row["answers"]),
        "rows": [_row(row, [c["label"] for c in checkpoints]) for row in comparison["rows"]],
    }


def _row(row: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    """One prompt with its answers, in the order of the columns."""
    texts = [show_controls(answer["text"]).strip("\n") for answer in row["answers"]]
    shown = {key: show_controls(row[key] or "") for key in ("prompt", "context", "reference", "input")}
    answers = [
        {
            "label": show_controls(label),
            "words": mark_differences(texts[0], text) if text.strip() else [],
            "facts": answer_facts(answer),
        }
        for label, text, answer in zip(labels, texts, row["answers"], strict=True)
    ]
    tags = [show_controls(row["category"])] if row["category"] else []
    tags += [f"seed {row['seed']}"] if row.get("seed") is not None else []
    read = "" if shown["input"] == shown["prompt"] else shown["input"]
    return {**shown, "input": read, "tags": tags, "answers": answers}


def _join(pieces: Iterable[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Neighbours with the same mark become one piece; empty pieces go."""
    joined: list[tuple[str, bool]] = []
    for text, differs in pieces:
        if joined and joined[-1][1] == differs:
            joined[-1] = (joined[-1][0] + text, differs)
        elif text:
            joined.append((text, differs))
    return joined
