"""The comparison page: what several checkpoints answered to the same prompts, as one self-contained HTML file.

The page carries its own style and script, asks the network for nothing, and lets nothing else run: its
Content-Security-Policy admits exactly these two by their hashes, and all that a model wrote is escaped.
The dict that it shows is made by `evaluation.compare.compare` and described there.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from report.files import write_file

TEMPLATES = Path(__file__).parent / "templates"
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
    return render_template("compare.html", page_values(comparison), ["compare.css"], ["compare.js"])


def render_template(name: str, page: dict[str, Any], styles: Sequence[str], scripts: Sequence[str] = ()) -> str:
    """The HTML of a template with `page` in it, escaped, and with these files as its only style and script."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ("".join((TEMPLATES / file).read_text("utf-8") for file in files) for files in (styles, scripts))
    # Markup: these two are ours and go in as they are. Everything else passes through the escaping of the template.
    return environment.get_template(name).render(
        page=page, style=Markup(style), script=Markup(script), policy=_policy(style, script)
    )


def mark_differences(base: str, text: str) -> list[tuple[str, bool]]:
    """`text` cut into (piece, differs from `base`) pairs that join to `text` again; words are compared, not spacing.

    A pair of answers so long that the comparison would take over a second comes back as one unmarked piece.
    """
    base_words, words = re.findall(WORD, base), re.findall(WORD, text)
    if len(base_words) * len(words) > MAX_WORD_PAIRS:
        return [(text, False)]
    same = [False] * len(words)
    matcher = difflib.SequenceMatcher(None, base_words, words, autojunk=False)
    for _, start, size in matcher.get_matching_blocks():
        same[start : start + size] = [True] * size
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
    facts = [_count(answer["tokens"], "token"), _count(len(answer["text"]), "character")]
    facts += [f"{answer['seconds']:.2f} s", f"{answer['tokens_per_s']:.0f} tokens/s"]
    facts += [{"length": "cut at the length limit"}.get(answer["finish"], answer["finish"])]
    reference = answer.get("reference")
    if reference:
        facts += [f"reference perplexity {format_perplexity(reference['perplexity'])}"]
    return facts


def checkpoint_facts(checkpoint: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) pairs that stand at the head of a column; what is not known is left out."""
    summary = checkpoint["summary"]
    facts = [
        ("step", None if checkpoint["step"] is None else f"{checkpoint['step']:,}"),
        ("validation loss", None if checkpoint["val_loss"] is None else f"{checkpoint['val_loss']:.4f}"),
        ("parameters", format_count(checkpoint["parameters"])),
        ("tokens", f"{summary['tokens']:,}"),
        ("tokens/s", f"{summary['tokens_per_s']:.0f}"),
        (
            "reference perplexity",
            summary["reference_perplexity"] and format_perplexity(summary["reference_perplexity"]),
        ),
    ]
    return [(name, value) for name, value in facts if value is not None]


def format_count(number: int) -> str:
    """1234567 -> `1.23 M`: a number of parameters as people say it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def format_perplexity(perplexity: float | None) -> str:
    """Three or four significant digits, never an exponent below a million; None (not finite) is said so."""
    if perplexity is None:
        return "not finite"
    return (
        f"{perplexity:.2f}" if perplexity < 100 else f"{perplexity:,.0f}" if perplexity < 1e6 else f"{perplexity:.2e}"
    )


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
        "rows": [_row(row, [c["label"] for c in checkpoints]) for row in comparison["rows"]],
    }


def _row(row: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    """One prompt with its answers, in the order of the columns."""
    texts = [show_controls(answer["text"]) for answer in row["answers"]]
    shown = {key: show_controls(row[key] or "") for key in ("prompt", "context", "reference", "input")}
    answers = [
        {
            "label": show_controls(label),
            "words": mark_differences(texts[0], text) if text.strip() else [],
            "facts": answer_facts(answer),
        }
        for label, text, answer in zip(labels, texts, row["answers"], strict=True)
    ]
    return {**shown, "input": "" if shown["input"] == shown["prompt"] else shown["input"], "answers": answers}


def show_controls(text: str) -> str:
    """Control characters made visible, but for line feed and tab.

    C0 controls become their Unicode pictures (U+2400 on); C1 controls, line and paragraph separators, and the signs
    that reverse the direction of the text around them, their code points.
    """

    def visible(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"

    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", visible, text.replace("\r\n", "\n"))


def _join(pieces: Iterable[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Neighbours with the same mark become one piece; empty pieces go."""
    joined: list[tuple[str, bool]] = []
    for text, differs in pieces:
        if joined and joined[-1][1] == differs:
            joined[-1] = (joined[-1][0] + text, differs)
        elif text:
            joined.append((text, differs))
    return joined


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _policy(style: str, script: str) -> str:
    """Content-Security-Policy: no network, no eval, no form, no base; our style and script by their SHA-256 only."""

    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    ours = f"style-src {digest(style)}; script-src {digest(script)}"
    return f"default-src 'none'; {ours}; base-uri 'none'; form-action 'none'"
