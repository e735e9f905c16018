"""The work of `sample.py --serve`: open the models, build the page, answer until Ctrl+C."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from data.chat import Template
from data.templates import get_template
from evaluation.checkpoints import short_labels
from evaluation.compare import Sampling
from formats.open_model import OpenModel, open_model
from model.pack import for_generation
from report.page import format_count, render_template
from serve.server import ADDRESS, ChatServer
from serve.talker import Talker

TEMPLATES = Path(__file__).parent / "templates"


def open_talkers(
    checkpoints: Sequence[str],
    *,
    prompt_template: str = "auto",
    device: object = "cpu",
    base_model: str | None = None,
    weights: str = "float32",
) -> list[Talker]:
    """The models, one or two, by the shortest names that tell them apart.

    `auto` takes each model's own template, and for one that has none that of the other. Raises ValueError or OSError.
    """
    if not 1 <= len(checkpoints) <= 2:
        raise ValueError(f"--serve takes one model, or two to be seen side by side: {len(checkpoints)} were given")
    opened = [open_model(ref, device, base_model=base_model) for ref in checkpoints]  # type: ignore[arg-type]
    for each in opened:
        for_generation(each.model, weights)
    names = short_labels(checkpoints)
    return [Talker(name, each, _template(prompt_template, each, opened)) for name, each in zip(names, opened)]


def _template(name: str, own: OpenModel, all_of_them: Sequence[OpenModel]) -> Template:
    if name not in ("auto", "none"):
        return get_template(name)
    found = next((each.template for each in (own, *all_of_them) if each.template is not None), None)
    if found is None or name == "none":
        raise ValueError(f"{own.path}: a chat needs a prompt template: name one with --prompt_template, such as dolly")
    return found


def chat_page(talkers: Sequence[Talker], sampling: Sampling, system: str = "") -> str:
    """The HTML of the page: our own script and style, admitted by their hashes; it may ask its own server only."""
    models = [
        {
            "name": talker.name,
            "facts": f"{format_count(talker.opened.parameters)} parameters, context "
            f"{talker.opened.model.context_length}, template {talker.template.name}",
        }
        for talker in talkers
    ]
    title = " and ".join(talker.name for talker in talkers)
    return render_template(
        "chat.html",
        {"title": title, "notes": [], "models": models, "sampling": asdict(sampling), "system": system},
        styles=[str(TEMPLATES / "chat.css")],
        scripts=[str(TEMPLATES / "chat.js")],
        data={"models": [model["name"] for model in models]},
        connects=True,
        folder=TEMPLATES,
    )


def serve_chat(
    talkers: Sequence[Talker], sampling: Sampling, system: str, port: int, say: Callable[[str], None] = print
) -> None:
    """Serves the page and the API until Ctrl+C. Raises ValueError where the port cannot be had."""
    with ChatServer(talkers, sampling, chat_page(talkers, sampling, system), port) as server:
        address = f"http://{ADDRESS}:{server.server_port}"
        say(f"Chat: {address}/  API: {address}/v1  (Ctrl+C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")
