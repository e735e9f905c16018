"""The chat page in a real browser: answers as they are written, side by side, stopped; and no text ever runs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from serve.chat import open_talkers
from serve.talker import Talker
from tests.browser import Browser, needs_browser
from tests.test_report_compare import HOSTILE
from tests.test_serve import served
from tests.tiny_checkpoints import save_tiny

pytestmark = needs_browser


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> list[Talker]:
    root = tmp_path_factory.mktemp("models")
    save_tiny(root / "base.pt", seed=0, block_size=512)
    save_tiny(root / "tuned.pt", seed=1, template="dolly", block_size=512)
    return open_talkers([str(root / "base.pt"), str(root / "tuned.pt")])


class Script:
    """Stands for `stream`: each model writes the bytes of its text, the letters apart; notes what it read."""

    def __init__(self, talkers: list[Talker]) -> None:
        self.texts = {id(talker.opened.model): "an answer" for talker in talkers}
        self.pause, self.read = 0.0, []  # type: ignore[var-annotated]
        self.closed = threading.Event()

    def __call__(self, model: Any, prompt: list[int], **how: Any) -> Iterator[int]:
        self.read.append((bytes(token for token in prompt if token < 256).decode(), how))
        try:
            for byte in self.texts[id(model)].encode()[: how["max_new_tokens"]]:
                time.sleep(self.pause)
                yield byte
        finally:
            self.closed.set()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def script(talkers: list[Talker]) -> Iterator[Script]:
    script = Script(talkers)
    with mock.patch("serve.talker.stream", script):
        yield script


@pytest.fixture
def page(browser: Browser, talkers: list[Talker], script: Script) -> Iterator[Browser]:
    with served(talkers) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        yield browser
        assert browser.complaints() == []
        assert all(url.startswith(f"http://127.0.0.1:{port}/") for url in browser.requests())


def say(page: Browser, text: str, wait: bool = True) -> None:
    page.run(f"byId('text').value = {json.dumps(text)}; byId('text').focus(); 0")
    page.press("Enter")
    if wait:
        done(page)


def done(page: Browser) -> None:
    page.wait_for("current === null && !document.querySelector('.writing')")


def turns(page: Browser) -> list[list[str]]:
    """The texts of each model's conversation."""
    return page.run(
        "columns.map((column) => Array.from("
        "document.querySelectorAll(`.turn.user .text, .turn.${column.colour} .text`)).map((text) => text.textContent))"
    )


def test_two_models_answer_side_by_side_in_conversations_of_their_own(
    page: Browser, script: Script, talkers: list[Talker]
) -> None:
    one, two = (id(talker.opened.model) for talker in talkers)
    script.texts = {one: "from the base", two: "größer 中 🌳"}
    page.run("byId('seed').value = 7; byId('temperature').value = 0.5; byId('system').value = 'Be brief.'; 0")
    say(page, "First?")
    assert turns(page) == [["First?", "from the bas"], ["First?", "größer 中"]], "12 tokens, which are bytes here"
    page.run("byId('max_tokens').value = 100; 0")
    say(page, "Second?")
    assert turns(page)[1] == ["First?", "größer 中", "Second?", "größer 中 🌳"]
    (base,) = [read for read, _ in script.read[2:] if "from the" in read]
    assert "Be brief." in base and base.index("First?") < base.index("from the") < base.index("Second?")
    assert {(how["seed"], how["temperature"]) for _, how in script.read} == {(7, 0.5)}
    assert "tokens/s" in page.run("byId('exchanges').textContent")
    page.run("document.activeElement.blur()")
    page.press("n")
    assert turns(page) == [[], []]


def test_text_appears_as_it_is_written_and_stop_ends_it(page: Browser, script: Script, talkers: list[Talker]) -> None:
    script.texts = {id(talker.opened.model): "word " * 200 for talker in talkers}
    script.pause = 0.03
    page.run("byId('max_tokens').value = 100; 0")
    say(page, "Go", wait=False)
    for colour in ("c1", "c2"):
        page.wait_for(f"document.querySelector('.turn.{colour}')?.textContent.includes('word word')")
    assert page.run("byId('send').disabled") and not page.run("byId('stop').disabled")
    script.closed.clear()
    page.run("byId('stop').click()")
    done(page)
    assert script.closed.wait(2), "the model stops too"
    for _, answer in turns(page):
        assert answer.startswith("word word") and len(answer) < 100
    assert page.run("document.querySelectorAll('.figures')[0].textContent") == "stopped"
    script.pause = 0.0
    say(page, "Again")
    assert all(len(column) == 4 and len(column[3]) == 100 for column in turns(page))


def test_no_text_of_a_model_or_a_person_runs(page: Browser, script: Script, talkers: list[Talker]) -> None:
    title = page.run("document.title")
    page.run("byId('max_tokens').value = 500; 0")
    for text in HOSTILE:
        script.texts = {id(talker.opened.model): text for talker in talkers}
        say(page, text or "nothing")
        page.run("byId('anew').click()")
        script.texts = {id(talker.opened.model): text for talker in talkers}
        say(page, "Hi")
        assert page.run("document.querySelector('.turn.assistant .text').children.length") == 0
        page.run("byId('anew').click()")
    assert page.run("document.title") == title
    assert page.run("document.querySelectorAll('main img, main script, main a, main iframe').length") == 0


def test_a_conversation_beyond_the_context_forgets_its_oldest_exchanges(page: Browser, script: Script) -> None:
    for place in range(4):
        say(page, f"question {place} " + "x" * 120)
    assert len(turns(page)[0]) == 8, "all is still shown"
    last = script.read[-1][0]
    assert "question 3" in last and "question 0" not in last
    say(page, "y" * 600)
    assert "context is 512" in page.run("document.querySelector('.wrong').textContent")
    page.run("byId('text').value = ''; 0")
    say(page, "short again")
    assert turns(page)[0][-1] == "an answer"
    browser_said = [line for line in page.complaints() if "400" not in line]
    assert browser_said == []
    page.events.clear()  # the refusals are told by the browser's log too


@pytest.mark.parametrize(("width", "scheme", "mobile"), [(1280, "light", False), (390, "dark", True)])
def test_it_fits_the_window(width: int, scheme: str, mobile: bool, page: Browser, tmp_path: Path) -> None:
    page.show(width, 800, scheme, mobile)
    say(page, "How do I read a file line by line? " * 4)
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    boxes = page.run(
        "Array.from(document.querySelectorAll('.turn')).map((turn) => turn.getBoundingClientRect().toJSON())"
    )
    said, one, two = boxes
    assert said["width"] > 0.85 * width and min(one["width"], two["width"]) > (0.85 if mobile else 0.42) * width
    assert (one["top"] == two["top"]) != mobile, "side by side where there is room"
    assert page.run(
        "byId('exchanges').lastChild.getBoundingClientRect().bottom <= byId('say').getBoundingClientRect().top"
    )
    assert page.screenshot(tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
