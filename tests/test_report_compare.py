"""The comparison page and its terminal form: all text shown, none of it run, differences marked where they are."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from report.compare import (
    answer_facts,
    compare_page,
    format_count,
    format_perplexity,
    mark_differences,
    render_page,
    show_controls,
)
from report.terminal import AnswerStream, cell_width, render_comparison, results_table, side_by_side, table, wrap

HOSTILE = [
    "<script>document.title='ran'</script>",
    "</script><img src=x onerror=\"document.title='ran'\">",
    "</style><style>body{display:none}</style>",
    "</div></section></article></main><h1>out</h1>",
    "a & b &amp; &lt;i&gt; \"double\" 'single'",
    "{{ page.title }} {% for x in y %} {# gone #}",
    "line\u2028separator\u2029paragraph",
    "\x1b[31mred\x00 \u202egnp.exe",
    "-->]]><!--",
]


def make_comparison(texts, prompts=None, reference=None):
    """A comparison with a row per list of answers."""

    def answer(text):
        scored = {"loss": 2.0, "perplexity": 7.39, "tokens": 4} if reference else None
        figures = {"tokens": len(text), "prompt_tokens": 3, "seconds": 0.5, "tokens_per_s": len(text) / 0.5}
        return {"text": text, **figures, "finish": "length", "reference": scored}

    summary = {"tokens": 40, "seconds": 2.0, "tokens_per_s": 20.0, "reference_perplexity": 7.39 if reference else None}
    known = {"step": 7, "val_loss": 4.5, "parameters": 124_439_808, "tokenizer": "byte", "template": None}
    columns = len(texts[0])
    return {
        "format": 1,
        "title": "a title",
        "notes": ["a note"],
        "settings": {"max_new_tokens": 128, "temperature": 0.8},
        "checkpoints": [
            {"label": f"column{i}", "path": f"column{i}.pt", **known, "summary": summary} for i in range(columns)
        ],
        "rows": [
            {
                "prompt": prompts[i] if prompts else f"prompt {i}",
                "context": "",
                "reference": reference or "",
                "category": "",
                "input": "",
                "answers": [answer(text) for text in row],
            }
            for i, row in enumerate(texts)
        ],
    }


class Page(HTMLParser):
    """The tags of a page, and the text outside style and script."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.raw, self.inside, self.attributes = [], "", {}, None, []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        kind = "data" if ("type", "application/json") in attributes else "script"
        self.inside = {"style": "style", "script": kind}.get(tag)

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.raw[self.inside] = self.raw.get(self.inside, "") + data
        else:
            self.text += data


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_becomes_markup_wherever_it_stands(hostile):
    harmless = Page(render_page(make_comparison([["x", "y"]], ["x"], reference="x")))
    comparison = make_comparison([[hostile, hostile + " more"]], [hostile], reference=hostile)
    row, checkpoint = comparison["rows"][0], comparison["checkpoints"][0]
    row["context"] = row["input"] = row["category"] = comparison["title"] = comparison["notes"][0] = hostile
    checkpoint["label"] = checkpoint["path"] = comparison["settings"]["temperature"] = hostile
    page = Page(render_page(comparison))
    assert page.tags.count("script") == 2 and page.tags.count("style") == 1
    for ours in ("style", "script"):
        assert page.raw[ours] == harmless.raw[ours]  # untouched
    data = json.loads(page.raw["data"])
    assert (data["rows"][0]["prompt"], data["rows"][0]["category"], data["title"]) == (hostile, hostile, hostile)
    assert "img" not in page.tags and page.tags.count("h1") == 1
    assert page.text.count(show_controls(hostile)) >= 8  # shown in full, not dropped
    assert not [name for name, _ in page.attributes if name.startswith("on")]


markup = st.lists(st.sampled_from([*HOSTILE, "<a", "</b>", "&lt;", "&#0;", '"']) | st.text(max_size=9), max_size=5).map(
    "".join
)


@given(markup)
def test_any_text_is_shown_as_it_is(text):
    comparison = make_comparison([["base", "= " + text]])
    comparison["rows"][0]["category"] = text
    page = Page(render_page(comparison))
    assert ("= " + show_controls(text)).strip("\n") in page.text
    assert page.tags.count("script") == 2 and json.loads(page.raw["data"])["rows"][0]["category"] == text


def test_the_policy_admits_our_style_and_script_and_nothing_else():
    html = render_page(make_comparison([["a", "b"]]))
    page = Page(html)
    (policy,) = [value for name, value in page.attributes if name == "content" and "default-src" in value]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        digest = base64.b64encode(hashlib.sha256(page.raw[tag].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert set(rules) == {"default-src", "style-src", "script-src", "base-uri", "form-action"}


def test_the_page_asks_nobody_for_anything():
    html = render_page(make_comparison([["a", "b"]]))
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttp|WebSocket|eval\(|innerHTML", html)
    names = {name for name, _ in Page(html).attributes}
    assert "src" not in names and "style" not in names
    assert [value for name, value in Page(html).attributes if name == "href"] == ["#prompt-1"]


def test_the_file_is_utf8_and_lone_surrogates_do_not_stop_it(tmp_path):
    path = compare_page(make_comparison([["caf\u00e9 \u4f60\u597d \ud800"]]), tmp_path / "new" / "page.html")
    text = path.read_bytes().decode("utf-8")
    assert "caf\u00e9 \u4f60\u597d ?" in text
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_one_column_and_an_empty_answer_are_fine():
    page = Page(render_page(make_comparison([["   "]])))
    assert "(no words)" in page.text
    assert "mark" not in page.tags and "mark differences" not in page.text
    assert "\n  kept  \n" not in render_page(make_comparison([["\n\n  kept  \n"]]))  # blank lines around it are not
    assert ">  kept  <" in render_page(make_comparison([["\n\n  kept  \n"]]))


def test_facts_stand_by_answers_and_columns():
    page = Page(render_page(make_comparison([["abc", "abd"]], reference="ref")))
    for fact in (
        "3 tokens",
        "3 characters",
        "0.50 s",
        "6 tokens/s",
        "cut at the length limit",
        "reference perplexity 7.39",
    ):
        assert page.text.count(fact) >= 2, fact
    for fact in ("124 M", "4.5000", "max new tokens", "column1.pt", "a note"):
        assert fact in page.text, fact


words = st.lists(st.sampled_from(["one", "two", "three", "\u4f60\u597d", " ", "\n", "  "]), max_size=30).map(" ".join)


@given(words, words)
def test_marked_pieces_join_to_the_text(base, text):
    assert "".join(piece for piece, _ in mark_differences(base, text)) == text


@given(words)
def test_the_same_words_have_no_marks(text):
    assert not any(differs for _, differs in mark_differences(text, "  " + text.replace(" ", "   ")))


def test_marks_cover_exactly_the_words_that_differ():
    assert mark_differences("a b c d", "a x c d") == [("a ", False), ("x", True), (" c d", False)]
    assert mark_differences("a d", "a b c d") == [("a ", False), ("b c", True), (" d", False)]
    assert mark_differences("", "a b") == [("a b", True)]
    assert mark_differences("a", "") == []
    assert mark_differences("x", "a\n  b") == [("a", True), ("\n  ", False), ("b", True)]  # no stroke over indentation
    assert mark_differences("\u4f60\u597d\u5417", "\u4f60\u574f\u5417") == [
        ("\u4f60", False),
        ("\u574f", True),
        ("\u5417", False),
    ]


def test_answers_too_long_to_compare_stay_unmarked():
    long = "x y " * 2000
    assert mark_differences(long, long + "z") == [(long + "z", False)]


def test_controls_become_visible():
    assert show_controls("a\r\nb\tc\x1b\x00\x7f\x9b\u202e") == "a\nb\tc\u241b\u2400\\u007f\\u009b\\u202e"


def test_numbers_as_people_say_them():
    assert [format_count(n) for n in (999, 7_534_336, 124_439_808, 1_557_611_200)] == [
        "999",
        "7.53 M",
        "124 M",
        "1.56 B",
    ]
    assert [format_perplexity(x) for x in (1.0, 22.714, 181.2, 50257.0, 3e9, None)] == [
        "1.00",
        "22.71",
        "181",
        "50,257",
        "3.00e+09",
        "not finite",
    ]
    one = {"text": "a", "tokens": 1, "seconds": 1.0, "tokens_per_s": 1.0, "finish": "end of text"}
    assert answer_facts(one) == ["1 token", "1 character", "1.00 s", "1 tokens/s", "end of text"]


@given(st.text(alphabet="ab \n\t\u4f60\u0301,", max_size=80), st.integers(2, 20))
def test_wrapped_lines_fit_and_lose_only_space(text, width):
    lines = wrap(text, width)
    assert all(sum(map(cell_width, line)) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_wrap_breaks_at_spaces_keeps_indentation_and_counts_wide_signs():
    assert wrap("aa bb cc", 5) == ["aa bb", "cc"]
    assert wrap("  aa bb", 5) == ["  aa", "bb"]
    assert wrap("abcdefg", 3) == ["abc", "def", "g"]
    assert wrap("\u4f60\u597d\u5417", 4) == ["\u4f60\u597d", "\u5417"]
    assert wrap("a\n\nb", 9) == ["a", "", "b"]


def test_columns_where_there_is_room_and_stacks_where_not():
    comparison = make_comparison([["left words", "right words"]])
    wide = render_comparison(comparison, 100).split("\n")
    assert any("left words" in line and "right words" in line for line in wide)
    assert max(map(len, wide)) <= 100
    for width in (40, None):
        stacked = render_comparison(comparison, width).split("\n")
        assert not any("left words" in line and "right words" in line for line in stacked)
        assert stacked.index("--- column0") < stacked.index("left words") < stacked.index("--- column1")


@given(st.lists(st.text(alphabet="ab \n\u4f60", max_size=60), min_size=2, max_size=4), st.integers(130, 200))
def test_columns_stand_under_each_other(texts, width):
    lines = side_by_side([f"label{i}" for i in range(len(texts))], texts, ["foot"] * len(texts), width)
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    for line in lines:
        cells = 0
        for character in line:
            if character == "|":
                assert (cells - column - 1) % (column + 3) == 0
            cells += cell_width(character)
        assert cells <= width


def test_no_control_character_reaches_the_terminal():
    comparison = make_comparison([HOSTILE], [" ".join(HOSTILE)], reference="\x1b[2J")
    shown = [render_comparison(comparison, 300), render_comparison(comparison, None)]
    stream = AnswerStream([{"prompt": "\x1b]0;x\x07", "context": "", "reference": ""}], shown.append, None)
    stream.text(0, "\x1b[2J")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e]", "".join(shown))


def test_a_stream_prints_prompt_text_and_figures_once_each():
    out: list[str] = []
    prompts = [
        {"prompt": "first", "context": "", "reference": ""},
        {"prompt": "second", "context": "", "reference": ""},
    ]
    stream = AnswerStream(prompts, out.append, None)
    figures = {"seconds": 1.0, "tokens_per_s": 2.0, "finish": "end of text", "reference": None}
    for piece in ("he", "llo"):
        stream.text(0, piece)
    stream.answer(0, {"text": "hello", "tokens": 2, **figures})
    stream.answer(1, {"text": "", "tokens": 0, **figures})
    shown = "".join(out)
    assert shown.count("[1/2] first") == shown.count("[2/2] second") == 1
    assert "hello\n(2 tokens" in shown and "(no words)\n(0 tokens" in shown


def test_tables_align():
    lines = table(["name", "n"], [["a", "1"], ["\u4f60\u597d\u5417", "22,000"]]).split("\n")
    assert lines == ["name         n", "------  ------", "a            1", "\u4f60\u597d\u5417  22,000"]
    result = {"checkpoint": "a", "text": "t", "tokens": 1234, "loss": 1.5, "perplexity": 4.4817, "bits_per_byte": None}
    assert "1,234  1.5000      4.4817          -" in results_table(
        [{**result, "windows": 2, "block_size": 8, "stride": 4}]
    )
