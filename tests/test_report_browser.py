"""The pages in a real browser: what their reader does with keys and controls, and that no text ever runs."""

import json
import time
from itertools import pairwise

import pytest

from report.compare import compare_page
from report.run import run_page
from report.votes import read_votes, sign_test, votes_report
from tests.browser import Browser, needs_browser
from tests.test_report_compare import HOSTILE, make_comparison
from tests.test_report_live import served
from tests.test_report_run import a_run

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def comparison():
    """Three columns, five prompts: reference losses and differences that stand in known orders."""
    rows = [
        ["the same words", "the same words", "the same words"],
        ["one two three four", "one two three five", "one two three four"],
        ["one two three four", "five six seven eight", "nine"],
        ["", "not empty", ""],
        ["alpha beta", "alpha gamma", "alpha beta"],
    ]
    made = make_comparison(rows, ["zero", "first", "second", "third", "fourth"])
    losses = [[1.0, 2.0, 3.0], [5.0, 0.5, 0.5], [2.0, 2.0, 2.0], None, [0.1, 0.2, 4.0]]
    for row, values, category in zip(made["rows"], losses, ["a", "b", "a", "", "b"]):
        row["category"] = category
        for answer, loss in zip(row["answers"], values or [None] * 3):
            answer["reference"] = loss and {"loss": loss, "perplexity": 2.0, "tokens": 4}
    return made


@pytest.fixture
def page(browser, tmp_path):
    browser.open(compare_page(comparison(), tmp_path / "page.html").as_uri())
    yield browser
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith(("file:", "blob:"))] == []
    browser.run("vote = null")  # or leaving it would ask whether to save the votes


def prompts(browser):
    """The prompts that are shown, in order."""
    return browser.run(
        "Array.from(document.querySelectorAll('.row')).filter((row) => !row.hidden)"
        ".map((row) => row.querySelector('.prompt .text').textContent)"
    )


def choose(browser, control, value):
    browser.run(
        f"{{ const c = document.getElementById({control!r}); c.value = {json.dumps(value)};"
        "c.dispatchEvent(new Event('input')); c.dispatchEvent(new Event('change')); }"
    )


def test_none_of_a_models_text_runs_whatever_is_clicked(browser, tmp_path):
    made = make_comparison([[text, text + " more"] for text in HOSTILE], HOSTILE, reference=HOSTILE[1])
    for row, text in zip(made["rows"], HOSTILE):
        row["category"] = row["context"] = text
    for checkpoint, text in zip(made["checkpoints"], HOSTILE):
        checkpoint["label"] = text
    browser.open(compare_page(made, tmp_path / "page.html").as_uri())
    browser.run("byId('blind').click(); byId('start').click()")
    browser.press("1", "2", "0")
    browser.run("byId('blind').click()")
    assert browser.run("document.title") == "a title"  # a text that ran would have changed it
    assert browser.run("byId('tally').querySelectorAll('img, script').length") == 0
    assert HOSTILE[0] in browser.run("byId('tally').textContent")
    assert f"{len(HOSTILE)} prompts" in browser.run("byId('shown').textContent")
    for place in range(len(HOSTILE)):  # categories, whatever their text, can be chosen
        choose(browser, "category", str(place))
        assert len(prompts(browser)) == 1
    assert browser.complaints() == []
    browser.run("vote = null")


def test_search_category_and_difference_filter_together(page):
    assert prompts(page) == ["zero", "first", "second", "third", "fourth"]
    page.press("/", "o", "n", "e")
    assert prompts(page) == ["first", "second"]
    assert page.run("byId('shown').textContent") == "2 of 5 prompts"
    choose(page, "category", "1")
    assert prompts(page) == ["first"]
    page.press("Escape")
    assert prompts(page) == ["first", "fourth"]
    choose(page, "category", "")
    for least, left in (("25", 4), ("30", 3), ("55", 2), ("100", 2)):
        choose(page, "differs", least)
        assert len(prompts(page)) == left, least
    page.press("/", "z", "z")
    assert prompts(page) == [] and not page.run("byId('none').hidden")


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("differs", ["second", "third", "fourth", "first", "zero"]),
        ("worst", ["zero", "first", "second", "fourth", "third"]),
        ("best", ["fourth", "zero", "first", "second", "third"]),
        ("gap", ["first", "fourth", "zero", "second", "third"]),
        ("worst 2", ["fourth", "zero", "second", "first", "third"]),
        ("", ["zero", "first", "second", "third", "fourth"]),
    ],
)
def test_rows_are_sorted_by_loss_and_by_difference_those_without_last(page, order, expected):
    choose(page, "sort", order)
    assert prompts(page) == expected


def test_a_column_can_be_left_out_and_one_stays(page):
    page.run("columns[2].click()")
    assert page.run("document.querySelectorAll('.answer:not([hidden])').length") == 10
    choose(page, "sort", "gap")  # of the two that are left
    assert prompts(page)[:3] == ["first", "zero", "fourth"]
    page.run("columns[1].click(); columns[0].click()")
    assert page.run("columns.map((box) => box.checked)") == [True, False, False]


def test_keys_move_between_the_rows_that_are_shown_and_open_the_help(page):
    choose(page, "category", "1")
    where = "document.activeElement.id"
    page.press("j")
    assert page.run(where) == "prompt-2"
    page.press("j", "j")
    assert page.run(where) == "prompt-5"
    page.press("k")
    assert page.run(where) == "prompt-2"
    page.press("?")
    assert page.run("byId('help').open")
    page.press("j", "Escape")
    assert page.run("!byId('help').open && " + where) == "prompt-2"
    page.press("m")
    assert page.run("getComputedStyle(document.querySelector('mark')).backgroundColor") == "rgba(0, 0, 0, 0)"


def test_light_and_dark_follow_the_system_until_the_reader_chooses(page):
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    page.show(scheme="light")
    assert page.run(brightness) > 200
    page.show(scheme="dark")
    assert page.run(brightness) < 60
    page.press("t")
    assert page.run(brightness) > 200
    page.show(scheme="light")
    page.press("t")
    assert page.run(brightness) < 60


def test_a_phone_shows_one_column_and_nothing_beside_the_screen(page):
    page.show(width=375, height=700, mobile=True)
    places = page.run("Array.from(rows[1].answers, (answer) => answer.getBoundingClientRect().left)")
    assert len(set(places)) == 1
    assert page.run("document.documentElement.scrollWidth") <= 375
    page.show()


def start_vote(page, seed):
    page.press("b")
    choose(page, "seed", str(seed))
    page.run("byId('start').click()")


def test_a_blind_vote_tells_nothing_before_its_end(page):
    start_vote(page, 5)
    shown = page.run("document.querySelector('main').innerText")
    for telling in ("column0", "column1", "tokens/s", "perplexity", "characters"):
        assert telling not in shown
    names = page.run("rows.map((row) => row.answers.map((answer) => answer.getAttribute('aria-label'))).flat()")
    assert set(names) == {"Answer A", "Answer B", "Answer C"}
    assert not page.run("document.querySelector('.checkpoints').checkVisibility()")
    assert (
        page.run("new Set(Array.from(document.querySelectorAll('.answer h3'), (h) => getComputedStyle(h).color)).size")
        == 1
    )
    assert page.run("getComputedStyle(document.querySelector('mark')).backgroundColor") == "rgba(0, 0, 0, 0)"
    assert page.run("control.sort.disabled && columns.every((box) => box.disabled)")


def test_the_order_follows_the_seed_and_is_fair(page):
    orders = []
    for seed in (1, 1, 2):
        start_vote(page, seed)
        orders.append(page.run("rows.map((row) => row.order.join(''))"))
        dom = page.run(
            "rows.map(({ element, answers }) =>"
            " Array.from(element.querySelectorAll('.answer'), (answer) => answers.indexOf(answer)).join(''))"
        )
        assert dom == orders[-1]
        page.press("b")
    assert orders[0] == orders[1] != orders[2]
    counts = page.run(
        "(() => { const seen = {}; for (let seed = 0; seed < 60; seed++) for (let row = 0; row < 100; row++) {"
        " const order = shuffled([0, 1, 2], seed, row).join(''); seen[order] = (seen[order] ?? 0) + 1; }"
        " return seen; })()"
    )
    assert len(counts) == 6 and all(900 < count < 1100 for count in counts.values())  # 1,000 each, sigma 29


def test_votes_by_keys_are_tallied_saved_and_read_back(page, tmp_path):
    page.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.run("columns[2].click()")  # a vote between two of three
    start_vote(page, 9)
    assert page.run("document.activeElement.id") == "prompt-1"
    orders = page.run("rows.map((row) => row.order)")
    assert all(sorted(order) == [0, 1] for order in orders)
    page.press("3")  # no such answer
    assert page.run("vote.choices.size") == 0
    page.press("1", "2", "0", "1")  # each goes on to the next prompt
    page.press("k", "2")  # the fourth once more, otherwise
    assert page.run("byId('shown').textContent") == "4 voted, 1 to go"
    page.press("1", "b")
    expected = [orders[0][0], orders[1][1], None, orders[3][1], orders[4][0]]
    assert page.run("document.querySelectorAll('.chosen').length") == 4
    assert page.run(f"rows[1].answers[{expected[1]}].querySelector('h3').textContent") == f"column{expected[1]}"
    page.run("byId('save').click()")
    deadline = time.monotonic() + 20
    while not (files := list(tmp_path.glob("votes-*-9.json"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    votes = read_votes(files[0])
    assert [(vote["row"], vote["shown"], vote["choice"]) for vote in votes["votes"]] == [
        (row, orders[row], expected[row]) for row in range(5)
    ]
    wins = [expected.count(0), expected.count(1)]
    tally = page.run("byId('tally').innerText")
    line = f"column0 {wins[0]} : {wins[1]} column1, p = {sign_test(*wins):.3f} (two-sided sign test)"
    assert line in tally and line in votes_report(files)
    assert "Tally of 5 votes" in tally and "neither\t1" in tally and "column2" not in tally


def test_the_pages_sign_test_is_the_exact_one(page):
    for wins, losses in ((0, 0), (1, 0), (5, 5), (9, 1), (12, 5), (0, 40), (700, 600), (3000, 2900)):
        assert page.run(f"signTest({wins}, {losses})") == pytest.approx(sign_test(wins, losses), rel=1e-9)


def test_leaving_with_votes_that_are_not_saved_asks(page):
    asks = "!dispatchEvent(new Event('beforeunload', { cancelable: true }))"
    assert not page.run(asks)
    start_vote(page, 1)
    page.press("1")
    assert page.run(asks)


def test_one_checkpoint_needs_no_vote_and_no_columns(browser, tmp_path):
    browser.open(compare_page(make_comparison([["a"], ["b"]], reference="r"), tmp_path / "one.html").as_uri())
    assert browser.run("byId('blind') === null && columns.length === 0 && byId('shown').textContent") == "2 prompts"
    choose(browser, "sort", "worst")
    assert browser.complaints() == []


# ---- the page of runs


def two_runs(tmp_path):
    return [a_run(tmp_path / "first"), a_run(tmp_path / "second", steps=12, max_lr=5e-4)]


@pytest.fixture
def runs(browser, tmp_path):
    browser.show()
    browser.open(run_page(two_runs(tmp_path), tmp_path / "runs.html").as_uri())
    yield browser
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("file:")] == []


def paths(browser, panel=0):
    return browser.run(f"boxes[{panel}].svg.querySelectorAll('path').length")


def test_curves_are_drawn_for_each_run_and_each_metric(runs):
    assert runs.run("boxes.map((box) => box.panel.key)") == ["loss", "lr", "grad_norm", "tokens_per_s"]
    assert [paths(runs, panel) for panel in range(4)] == [4, 2, 2, 2]  # training and validation of both; then one each
    assert runs.run("boxes[0].svg.querySelectorAll('circle').length") == 6 + 12 + 3 + 3
    inside = (
        "boxes.every(({ svg }) => Array.from(svg.querySelectorAll('circle')).every((dot) =>"
        " { const [x, y] = [dot.cx.baseVal.value, dot.cy.baseVal.value];"
        " return x >= 0 && x <= svg.clientWidth && y >= 0 && y <= svg.clientHeight; }))"
    )
    assert runs.run(inside)


def test_points_stand_where_their_values_are(runs):
    """The first run's loss falls by 1/6 a step: equal distances, and as high as its axis says."""
    points = runs.run(
        "Array.from(boxes[0].svg.querySelector('g').querySelectorAll('circle'),"
        " (dot) => [dot.cx.baseVal.value, dot.cy.baseVal.value])"
    )
    for axis in (0, 1):
        gaps = [b[axis] - a[axis] for a, b in pairwise(points)]
        assert max(gaps) - min(gaps) < 0.01 and gaps[0] > 5
    labels = runs.run(
        "Array.from(boxes[0].svg.querySelectorAll('text')).filter((text) => text.getAttribute('text-anchor') === 'end')"
        ".map((text) => [Number(text.textContent), Number(text.getAttribute('y')) - 4]).filter(([v]) => v < 6)"
    )
    per_unit = (labels[1][1] - labels[0][1]) / (labels[1][0] - labels[0][0])
    assert points[0][1] == pytest.approx(labels[0][1] + per_unit * (5.0 - labels[0][0]), abs=0.1)


def test_the_pointer_reads_values_off(runs):
    x, y = runs.run(
        "(({ svg, scale }) => { const place = svg.getBoundingClientRect();"
        " return [place.left + scale.x(4), place.top + 50]; })(boxes[0])"
    )
    runs.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    said = runs.run("boxes[0].readout.innerText").replace("\n", " ")
    assert said.startswith("step 4") and "first 4.3333" in said and "first, validation 4.2" in said
    assert runs.run("boxes[0].cursor.getAttribute('visibility')") == "visible"
    runs.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert runs.run("boxes[0].readout.innerText").startswith("at the end")


def test_runs_axes_and_smoothing_can_be_chosen(runs):
    runs.press("1")
    assert paths(runs) == 2
    runs.press("2")  # the last one stays
    assert paths(runs) == 2 and runs.run("runBoxes.map((box) => box.checked)") == [False, True]
    runs.press("1")
    choose(runs, "smoothing", "10")
    assert paths(runs) == 6 and runs.run("byId('window').textContent") == "10%"
    runs.press("l")
    assert runs.run("boxes[0].scale.logarithmic")
    runs.press("x")
    assert runs.run("byId('axis').value") == "t" and paths(runs) == 6
    assert runs.run("smooth([1, 2, 9, 2, 1], 1).map((value) => Math.round(value * 100))") == [150, 400, 433, 400, 150]


def test_ticks_are_round_and_lie_between_the_ends(runs):
    assert runs.run("ticks(0, 100, 5)") == [0, 20, 40, 60, 80, 100]
    assert runs.run("ticks(3.1, 4.4, 4).map((tick) => Number(tick.toFixed(6)))") == [3.5, 4]
    assert runs.run("ticks(0, 3, 10, false, true)") == [0, 1, 2, 3]  # steps are whole
    assert runs.run("ticks(0.5, 60, 4, true)") == [0.5, 1, 2, 5, 10, 20, 50]
    assert runs.run("[0.0001, 0, 5, 1234.5, 12345, 2.5e6, 3e9].map(format)") == [
        *("1.0e\u22124", "0", "5", "1235", "12.3k", "2.5M", "3B")
    ]


def test_runs_on_a_phone_fit_the_screen(runs):
    runs.show(width=375, height=700, mobile=True)
    assert runs.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))") is None
    assert runs.run("document.documentElement.scrollWidth") <= 375
    assert runs.run("boxes[0].svg.clientWidth") < 375
    runs.show()


def test_no_text_of_a_run_runs(browser, tmp_path):
    folder = a_run(tmp_path / "run", **{HOSTILE[0]: HOSTILE[1]})
    samples = [{"step": 0, "prompt": text, "text": text} for text in HOSTILE]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (folder / "training.log").write_text("".join(f"Warning: {text!r}\n" for text in HOSTILE))
    metrics = [{"step": step, "loss": 1.0, **{f"x/{text}": 1.0 for text in HOSTILE}} for step in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    browser.open(run_page(folder).as_uri())
    assert browser.run("document.title") == "run: a run"
    assert browser.run("boxes.length") == 1 + len(HOSTILE)
    assert browser.run("boxes.map((box) => box.element.querySelector('h2').textContent)")[1:] == [
        f"x/{text}" for text in HOSTILE
    ]
    assert browser.run("document.querySelectorAll('img').length") == 0 and browser.complaints() == []


def test_a_living_run_is_followed(browser, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with served(folder) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.wait_for("document.querySelector('.checkpoint')?.innerText.includes('no step is logged yet')")
        (folder / "metrics.jsonl").write_text(
            '{"step": 0, "loss": 3.0}\n{"step": 1, "loss": 2.5, "skipped": true}\n{"st'
        )
        browser.run("ask()")
        assert browser.run("boxes[0].readout.innerText").endswith("2.5")
        assert "not finite: step 1" in browser.run("byId('warnings').innerText")
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('ep": 2, "loss": 2.0, "lr": 0.1}\n')
        browser.run("ask()")
        assert browser.run("boxes.map((box) => box.readout.innerText.split(/\\s/).at(-1))") == ["2", "0.1"]
        (folder / "metrics.jsonl").write_text("broken\n{}\n")
        browser.run("ask()")
        assert "metrics.jsonl:1: not JSON" in browser.run("byId('state').innerText")
        assert browser.run("boxes.length") == 2  # what was known stays
        assert browser.complaints() in (
            [],
            ["Failed to load resource: the server responded with a status of 404 (Not Found)"],
        )
    browser.run("ask()")
    assert "No answer from the server" in browser.run("byId('state').innerText")
