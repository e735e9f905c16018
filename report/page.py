"""What every page shares: one self-contained HTML file that asks the network for nothing and runs only our script.

Each page carries its own style and script, admitted by a Content-Security-Policy through their hashes. What a model, a
file or a user wrote is escaped by the template, or lies in a block of JSON that the script reads as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def render_template(
    name: str,
    page: dict[str, Any],
    styles: Sequence[str],
    scripts: Sequence[str] = (),
    data: Any = None,
    connects: bool = False,
    folder: Path = TEMPLATES,
) -> str:
    """The HTML of a template with `page` in it, escaped, and with these files as its only style and script.

    The style and script of all pages come first. `data` is what the script reads; `connects` lets the page ask its own
    server, and nobody else. `folder` holds the template where that is not here; its other files are given whole paths.
    """
    from jinja2 import FileSystemLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from markupsafe import Markup

    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _joined(["page.css", *styles]), _joined(["page.js", *scripts])
    # Markup: these three are ours and go in as they are. Everything else passes through the escaping of the template.
    ours = {"style": Markup(style), "script": Markup(script), "data": Markup(json_block(data))}
    return environment.get_template(name).render(page=page, policy=_policy(style, script, connects), **ours)


def _joined(files: Sequence[str]) -> str:
    return "".join((TEMPLATES / file).read_text("utf-8") for file in files)


def json_block(value: Any) -> str:
    """JSON that may stand inside a <script> element: pure ASCII without <, > and &, so that no text in it ends it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def show_controls(text: str) -> str:
    """Control characters made visible, but for line feed and tab.

    C0 controls become their Unicode pictures (U+2400 on); C1 controls, line and paragraph separators, and the signs
    that reverse the direction of the text around them, their code points.
    """

    def visible(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"

    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", visible, text.replace("\r\n", "\n"))


def format_count(number: int) -> str:
    """1234567 -> `1.23 M`: a number of parameters as people say it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def format_bytes(number: int) -> str:
    """1234567 -> `1.23 MB`, in powers of ten as disks are sold."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} bytes"


def format_perplexity(perplexity: float | None) -> str:
    """Three or four significant digits, never an exponent below a million; None (not finite) is said so."""
    if perplexity is None:
        return "not finite"
    return (
        f"{perplexity:.2f}" if perplexity < 100 else f"{perplexity:,.0f}" if perplexity < 1e6 else f"{perplexity:.2e}"
    )


def counted(number: int, what: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _policy(style: str, script: str, connects: bool) -> str:
    """Content-Security-Policy: no network, no eval, no form, no base; our style and script by their SHA-256 only."""

    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    ours = f"style-src {digest(style)}; script-src {digest(script)}"
    network = "; connect-src 'self'" if connects else ""
    return f"default-src 'none'; {ours}{network}; base-uri 'none'; form-action 'none'"
