"""Comparisons and tables as plain text: answers side by side where the terminal is wide enough, else stacked."""

from __future__ import annotations

import itertools
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from report.compare import answer_facts, checkpoint_facts, show_controls

MIN_COLUMN = 28  # cells; narrower columns break every line of prose
GAP = " | "
NO_BREAK = "\u00a0"  # the space inside "83 tokens/s"


def render_comparison(comparison: dict[str, Any], width: int | None) -> str:
    """All answers as text. `width`: cells of the terminal, or None for no terminal (stacked, nothing is wrapped)."""
    checkpoints, rows = comparison["checkpoints"], comparison["rows"]
    labels = [show_controls(checkpoint["label"]) for checkpoint in checkpoints]
    parts = [show_controls(comparison["title"]), *(show_controls(note) for note in comparison["notes"]), ""]
    for label, checkpoint in zip(labels, checkpoints):
        facts = ", ".join(f"{name} {value}" for name, value in checkpoint_facts(checkpoint))
        parts += _wrap(f"{label}: {facts}", width)
    for number, row in enumerate(rows, start=1):
        parts += ["", *_heading(row, number, len(rows), width), ""]
        blocks = [show_controls(answer["text"]).strip("\n") or "(no words)" for answer in row["answers"]]
        feet = [", ".join(fact.replace(" ", NO_BREAK) for fact in answer_facts(answer)) for answer in row["answers"]]
        parts += side_by_side(labels, blocks, feet, width)
    return "\n".join(parts)


def side_by_side(labels: Sequence[str], texts: Sequence[str], feet: Sequence[str], width: int | None) -> list[str]:
    """Lines with one column a text under its label; blocks one under another where columns would be too narrow."""
    column = 0 if width is None else (width - len(GAP) * (len(labels) - 1)) // len(labels)
    if column < MIN_COLUMN or len(labels) == 1:
        blocks = [[f"--- {label}", *_wrap(text, width), f"({foot})"] for label, text, foot in zip(labels, texts, feet)]
        return [line for block in blocks for line in [*block, ""]][:-1]
    heads, bodies, ends = (_even([wrap(text, column) for text in part]) for part in (labels, texts, feet))
    stacks = [[*head, "-" * column, *body, "", *end] for head, body, end in zip(heads, bodies, ends)]
    return [GAP.join(_pad(cell, column) for cell in cells).rstrip() for cells in zip(*stacks)]


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken at spaces where there is one; line ends and indentation are kept.

    Wide characters (Chinese, Japanese, Korean) count as the two cells that they take.
    """
    lines = []
    for line in text.expandtabs(4).split("\n"):
        start = at = cells = 0  # the part from `start` has `cells` cells so far
        split: tuple[int, int] | None = None  # where it may end, and where the next part would begin
        while at < len(line):
            size = cell_width(line[at])
            if line[at] == " " and line[start:at].strip():
                split = (at, at + 1)
            if cells + size > width and at > start:
                end, at = split or (at, at)
                lines.append(line[start:end].rstrip())
                start, cells, split = at, 0, None
                continue
            if size == 2:  # scripts that write without spaces break between any two signs
                split = (at + 1, at + 1)
            cells, at = cells + size, at + 1
        lines.append(line[start:].rstrip())
    return lines


def cell_width(character: str) -> int:
    """Cells that a character takes in a terminal: 2 if wide, 0 if it combines with the one before, else 1."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A plain table: the first `left` columns begin at the left, the others (numbers) end at the right."""
    widths = [max(map(_cells, column)) for column in zip(header, *rows)]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [_pad(cell, width, right=i >= left) for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# Of a result of `evaluation.evaluate`: the key, the head of its column, and how the value is written.
_COLUMNS = (
    ("tokens", "tokens", ",d"),
    ("loss", "loss", ".4f"),
    ("perplexity", "perplexity", ".4f"),
    ("accuracy", "accuracy", ".4f"),
    ("bits_per_byte", "bits/byte", ".4f"),
    ("windows", "windows", ",d"),
    ("block_size", "length", "d"),
    ("stride", "stride", "d"),
    ("samples", "samples", ",d"),
    ("bleu", "BLEU", ".2f"),
    ("chrf", "chrF", ".2f"),
    ("rouge1", "ROUGE-1", ".2f"),
    ("rouge2", "ROUGE-2", ".2f"),
    ("rougeL", "ROUGE-L", ".2f"),
    ("exact_match", "exact", ".2f"),
    ("f1", "F1", ".2f"),
    ("acc", "acc", ".4f"),
    ("acc_stderr", "+-", ".4f"),
    ("acc_norm", "acc_norm", ".4f"),
    ("acc_norm_stderr", "+-", ".4f"),
)


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """The results of `evaluation.evaluate.evaluate` as a table, one row a checkpoint and text, and one a category."""
    rows = [([result["checkpoint"], result["text"]], result) for result in results]
    rows += [
        ([result["checkpoint"], f"{result['text']}: {category or '(none)'}"], values)
        for result in results
        for category, values in result.get("categories", {}).items()
    ]
    columns = [column for column in _COLUMNS if any(column[0] in values for _, values in rows)]
    header = ["checkpoint", "text", *(name for _, name, _ in columns)]
    cells = [
        [*map(show_controls, names), *(_number(values.get(key), form) for key, _, form in columns)]
        for names, values in rows
    ]
    return table(header, cells, left=2)


def predictions(results: Sequence[dict[str, Any]], width: int | None) -> str:
    """The first answers of every checkpoint under prompt and reference, a line each; "" where there are none."""
    lines = []
    by_text: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if result.get("predictions"):
            by_text.setdefault(result["text"], []).append(result)
    for text, group in by_text.items():
        size = max(len("reference"), *(_cells(show_controls(result["checkpoint"])) for result in group))
        for number, same in enumerate(zip(*(result["predictions"] for result in group)), start=1):
            category = f" ({same[0]['category']})" if same[0]["category"] else ""
            lines += ["", show_controls(f"{text}, answer {number}{category}")]
            said = [(result["checkpoint"], answer["prediction"]) for result, answer in zip(group, same)]
            for name, value in [("prompt", same[0]["prompt"]), ("reference", same[0]["reference"]), *said]:
                shown = one_line(value) or "(no words)"
                lines.append(_shortened(f"  {_pad(show_controls(name), size)}  {shown}", width))
    return "\n".join(lines[1:])


def one_line(text: str) -> str:
    """A text in one line: white space is one space, control characters are visible."""
    return show_controls(" ".join(text.split()))


def _shortened(line: str, width: int | None) -> str:
    """The line cut to `width` cells, 120 without a terminal; a mark tells that something is missing."""
    room = width or 120
    if _cells(line) <= room:
        return line
    cells = list(itertools.accumulate(map(cell_width, line)))
    return line[: bisect_right(cells, room - 3)] + "..."


class AnswerStream:
    """Prints the answers of a single checkpoint as they are written: the prompt, the text, its figures."""

    def __init__(self, prompts: Sequence[dict[str, Any]], write: Callable[[str], None], width: int | None) -> None:
        self.prompts, self.write, self.width = prompts, write, width
        self.row = -1

    def text(self, row: int, piece: str) -> None:
        """A further piece of an answer."""
        if row != self.row:
            self.row = row
            heading = _heading(self.prompts[row], row + 1, len(self.prompts), self.width)
            self.write("\n" + "\n".join(heading) + "\n\n")
        self.write(show_controls(piece))

    def answer(self, row: int, answer: dict[str, Any]) -> None:
        """The answer is whole."""
        if not answer["text"].strip():
            self.text(row, "(no words)")
        self.write(f"\n({', '.join(answer_facts(answer))})\n")


def _heading(row: dict[str, Any], number: int, count: int, width: int | None) -> list[str]:
    """The prompt with its context and its reference."""
    lines = _wrap(f"[{number}/{count}] {show_controls(row['prompt'])}", width)
    for name in ("context", "reference"):
        if row[name]:
            lines += _wrap(f"{name}: {show_controls(row[name])}", width)
    return lines


def _wrap(text: str, width: int | None) -> list[str]:
    return text.split("\n") if width is None else wrap(text, width)


def _even(blocks: list[list[str]]) -> list[list[str]]:
    """Blocks of lines, filled up to the height of the tallest."""
    height = max(map(len, blocks))
    return [block + [""] * (height - len(block)) for block in blocks]


def _cells(text: str) -> int:
    return sum(map(cell_width, text))


def _pad(text: str, width: int, right: bool = False) -> str:
    space = " " * (width - _cells(text))
    return space + text if right else text + space


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
