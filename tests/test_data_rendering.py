"""Samples as documents: what is supervised, what a system message and a limit of tokens do to them."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chat import Message, Template, render_conversation
from data.prepare import prepare
from data.records import Sample, Unusable
from data.rendering import ANSWER_CUT, PROMPT_CUT, TURNS_CUT, Renderer
from data.settings import PrepareSettings
from data.shards import open_dataset
from data.templates import get_template, template_from_file, template_from_spec
from data.tokenizer import END_OF_TEXT, load_tokenizer

BYTES = load_tokenizer("byte")
DOLLY, CHATML = get_template("dolly"), get_template("chatml")


def said(role: str, content: str, **more: str) -> Message:
    return {"role": role, "content": content, **more}


def chat(*texts: str) -> list[Message]:
    return [said(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]


def rendered(
    messages: list[Message], rejected: list[Message] | None = None, template: Template = DOLLY, **options: Any
) -> tuple[list[tuple[str, str]], list[str]]:
    """The text and the supervised text of each document, and the notes."""
    renderer = Renderer(options.pop("kind", "instruction"), template, **options)
    documents, notes = renderer.documents(Sample("here", messages, rejected), BYTES)
    texts = []
    for ids, mask in documents:
        assert len(ids) == len(mask) and set(mask) <= {0, 1}
        texts.append((BYTES.decode(ids), BYTES.decode([token for token, bit in zip(ids, mask) if bit])))
    return texts, notes


TALK = chat("One?", "First.", "Two?", "Second.", "Three?", "Third.")


@pytest.mark.parametrize("template", [DOLLY, CHATML, get_template("llama3")])
def test_all_answers_or_the_last_are_learnt(template: Template) -> None:
    ids, mask = render_conversation(TALK, template, BYTES)
    (whole,), _ = Renderer("instruction", template).documents(Sample("", TALK), BYTES)
    assert whole == (ids, mask)
    (last,), _ = Renderer("instruction", template, train_on="last").documents(Sample("", TALK), BYTES)
    marked = BYTES.decode([token for token, bit in zip(*last) if bit])
    assert last[0] == ids and marked.startswith("Third.") and "Second" not in marked
    begin = len(mask) - mask[::-1].index(1) - sum(last[1])
    assert last[1] == [0] * begin + mask[begin:], "the same end of the turn is learnt"


@pytest.mark.parametrize("template", [DOLLY, CHATML])
def test_a_system_message_is_for_conversations_without_one(template: Template) -> None:
    own = [said("system", "Be brief."), *TALK]
    assert rendered(TALK, template=template, system="Be brief.") == rendered(own, template=template)
    assert rendered(own, template=template, system="Be long.") == rendered(own, template=template)


def test_prompts_end_where_the_answer_would_begin() -> None:
    for template in (DOLLY, CHATML):
        question = chat("One?", "First.", "Two?")
        ((prompt, marked),), _ = rendered(question, template=template, kind="prompts")
        ((whole, _),), _ = rendered([*question, said("assistant", "X")], template=template)
        assert whole.startswith(prompt + "X") and marked == ""


# ---- what is too long


def test_the_oldest_turns_go_first_and_the_system_message_stays() -> None:
    messages = [said("system", "Be brief."), *TALK]
    ((whole, _),), _ = rendered(messages, template=CHATML)
    ((two, _),), notes = rendered(messages, template=CHATML, max_length=len(whole) - 1)
    assert notes == [TURNS_CUT]
    assert two == rendered([messages[0], *TALK[2:]], template=CHATML)[0][0][0]
    ((one, marked),), notes = rendered(messages, template=CHATML, max_length=len(two) - 1)
    assert one == rendered([messages[0], *TALK[4:]], template=CHATML)[0][0][0]
    assert notes == [TURNS_CUT] and marked == "Third.<|im_end|>"


def test_a_question_loses_its_beginning_that_of_its_context_first() -> None:
    messages = [said("user", "What is it?", context="0123456789" * 20), said("assistant", "A row of digits.")]
    ((text, marked),), notes = rendered(messages, max_length=150)
    assert notes == [PROMPT_CUT] and marked == "A row of digits.<|endoftext|>"
    assert "What is it?" in text and "6789\n\n### Response:\n" in text
    assert len(BYTES.encode(text)) - len(END_OF_TEXT) + 1 == 150, "no more than must be"
    ((text, marked),), _ = rendered(messages, max_length=55)
    assert text.startswith("### Instruction:\ns it?\n\n### Response:\n") and marked == "A row of digits.<|endoftext|>"


def test_an_answer_that_must_be_cut_loses_the_end_of_its_turn() -> None:
    messages = chat("Count.", "x" * 500)
    ((text, marked),), notes = rendered(messages, template=CHATML, max_length=300)
    assert notes == [ANSWER_CUT]
    assert "Count." in text and set(marked) == {"x"} and len(text) == 300
    messages = chat("Count " * 100, "x" * 500)
    ((text, marked),), notes = rendered(messages, template=DOLLY, max_length=300)
    assert notes == [PROMPT_CUT, ANSWER_CUT]
    assert (len(text), len(marked), set(marked)) == (300, 150, {"x"}), "the prompt takes half"


def test_both_of_a_pair_keep_the_same_prompt() -> None:
    question = [said("user", "old?"), said("assistant", "old."), said("user", "0123456789" * 10)]
    chosen, rejected = [*question, said("assistant", "yes")], [*question, said("assistant", "no, never, not at all")]
    texts, notes = rendered(chosen, rejected, kind="preference", max_length=120)
    assert notes == [TURNS_CUT, PROMPT_CUT]
    prompts = [text[: text.index("### Response:\n")] for text, _ in texts]
    assert prompts[0] == prompts[1] and "old" not in prompts[0]
    assert [marked for _, marked in texts] == ["yes<|endoftext|>", "no, never, not at all<|endoftext|>"]
    assert max(len(text) for text, _ in texts) - len(END_OF_TEXT) + 1 == 120


def test_answers_that_are_equal_as_documents_make_no_pair() -> None:
    with pytest.raises(Unusable, match="whose two answers are equal"):
        rendered(chat("a?", "b"), chat("a?", "b "), template=get_template("llama3"), kind="preference")
    long, longer = chat("a?", "b" * 200), chat("a?", "b" * 201)
    with pytest.raises(Unusable, match="whose two answers are equal"):
        rendered(long, longer, kind="preference", max_length=100)
    assert len(rendered(long, longer, kind="preference")[0]) == 2


def test_turns_after_a_pair_has_parted_are_not_dropped() -> None:
    chosen, rejected = chat("a?", "yes", "b?", "c"), chat("a?", "no", "b?", "c")
    texts, notes = rendered(chosen, rejected, kind="preference", max_length=90, template=CHATML)
    assert TURNS_CUT not in notes and [marked[:2] for _, marked in texts] == ["ye", "no"]


@pytest.mark.parametrize("kind", ["instruction", "prompts"])
def test_where_nothing_fits_a_record_is_unusable(kind: str) -> None:
    messages = chat("a?", "b") if kind == "instruction" else chat("a?")
    with pytest.raises(Unusable, match="nothing to learn within --max_length 9"):
        rendered(messages, kind=kind, max_length=9)


words = st.text("ab ", min_size=1, max_size=60).filter(str.strip)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    texts=st.lists(words, min_size=2, max_size=8).map(lambda texts: texts[: len(texts) // 2 * 2]),
    context=st.text("cd", max_size=40),
    limit=st.integers(30, 300),
    is_chatml=st.booleans(),
)
def test_what_is_cut_is_told_and_the_rest_is_whole(texts: list[str], context: str, limit: int, is_chatml: bool) -> None:
    messages = chat(*texts)
    if context:
        messages[0]["context"] = context
    template = CHATML if is_chatml else DOLLY
    renderer = Renderer("instruction", template, max_length=limit)
    whole = render_conversation(messages, template, BYTES)
    try:
        ((ids, mask),), notes = renderer.documents(Sample("", messages), BYTES)
    except Unusable:
        assert len(whole[0]) > limit
        return
    assert len(ids) <= limit and 1 in mask
    assert (notes == []) == (len(whole[0]) <= limit)
    if not notes:
        assert (ids, mask) == whole
    if ANSWER_CUT not in notes:
        end = render_conversation(messages[-2:], template, BYTES)
        answer = sum(end[1])
        assert ids[-answer:] == whole[0][-answer:] and mask[-answer:] == whole[1][-answer:]
    assert ANSWER_CUT not in notes or len(ids) == limit


# ---- templates


def test_a_file_of_jinja_is_a_template(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}")
    template = template_from_file(file, BYTES)
    ((text, marked),), _ = rendered(chat("Hi", "Ho"), template=template)
    assert text == "[user] Hi<|endoftext|>[assistant] Ho<|endoftext|>" and marked == "Ho<|endoftext|>"
    assert template_from_spec(template.spec()) == template
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"instruction": "Hi", "output": "Ho"}\n' * 30)
    common = {"source": "jsonl", "input": (str(rows),), "prompt_template": str(file), "val_fraction": 0.0}
    for tokenizer in ("byte", "bpe"):
        folder = tmp_path / tokenizer
        meta = prepare(PrepareSettings(**common, data_dir=str(folder), tokenizer=tokenizer, vocab_size=300))
        assert template_from_spec(meta["template"]) == template
        tokens = open_dataset(folder, "train")
        assert load_tokenizer(str(folder)).decode(tokens.tokens(0, int(tokens.document_starts[1]))) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"own.jinja: cannot be read \(No such file"),
        (b"\xff", r"own.jinja: not UTF-8 at byte 0"),
        (b"{% for %}", r"a.jsonl:1: chat template own"),
        (b"{{ raise_exception('no system') }}", r"a.jsonl:1: chat template own: .*no system"),
    ],
)
def test_a_jinja_file_that_is_none_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    (tmp_path / "a.jsonl").write_text('{"instruction": "Hi", "output": "Ho"}\n')
    with pytest.raises(ValueError, match=message) as caught:
        prepare(
            PrepareSettings(
                source="jsonl",
                input=(str(tmp_path / "a.jsonl"),),
                prompt_template=str(tmp_path / "own.jinja"),
                data_dir=str(tmp_path / "set"),
                tokenizer="byte",
            )
        )
    assert "\n" not in str(caught.value) and not (tmp_path / "set").exists()


def test_text_has_no_system_message_and_no_records_to_cut(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for changes in ({"system": "Be brief."}, {"max_length": 9}):
        values: dict[str, Any] = {"source": "jsonl", "input": (str(tmp_path / "a.jsonl"),), "tokenizer": "byte"}
        with pytest.raises(ValueError, match="are for records, and this is text"):
            prepare(PrepareSettings(**values, **changes, data_dir=str(tmp_path / "set")))


def test_the_template_of_a_model_needs_a_model(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "Hi", "output": "Ho"}\n')
    values = PrepareSettings(
        source="jsonl", input=(str(tmp_path / "a.jsonl"),), prompt_template="model", tokenizer="byte", data_dir="x/y"
    )
    with pytest.raises(ValueError, match="--tokenizer byte names no model with a template"):
        prepare(values)
    values.data_dir = str(tmp_path / "set")
    assert prepare(values, BYTES, CHATML)["template"]["name"] == "chatml"


def test_the_manifest_tells_how_records_were_rendered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"instruction": "Hi", "output": "Ho"}\n{"instruction": "%s", "output": "Ho"}\n' % ("x" * 90)
    )
    settings = PrepareSettings(
        source="jsonl",
        input=(str(tmp_path / "a.jsonl"),),
        tokenizer="byte",
        data_dir=str(tmp_path / "set"),
        system="Be brief.",
        train_on="last",
        max_length=80,
        val_fraction=0.0,
    )
    meta = prepare(settings)
    assert meta["rendering"] == {"system": "Be brief.", "train_on": "last", "max_length": 80}
    assert meta["cut"] == {PROMPT_CUT: 1} and f"1 records {PROMPT_CUT}" in caplog.text
