"""Templates: the exact text around a record, what is supervised, and one rendering for training and sampling."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.templates import (
    TEMPLATES,
    PromptTemplate,
    Record,
    get_template,
    normalize_record,
    render_prompt,
    render_record,
    template_from_spec,
)
from data.tokenizer import load_tokenizer, train_bpe

BYTES = load_tokenizer("byte")
TOKENIZERS = {"byte": BYTES, "gpt2": load_tokenizer("gpt2"), "bpe": train_bpe(["### Response:\nyes no"] * 9, 300)}
RECORD = {"instruction": "Add.", "context": "2 and 3", "response": "5", "category": "math"}
PLAIN = {**RECORD, "context": ""}

RENDERED = {
    "dolly": (
        "### Instruction:\nAdd.\n\n### Context:\n2 and 3\n\n### Response:\n",
        "### Instruction:\nAdd.\n\n### Response:\n",
        "5",
    ),
    "alpaca": (
        "Carry out the task that follows.\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n",
        "Carry out the task that follows.\n\n### Instruction:\nAdd.\n\n### Response:\n",
        "5",
    ),
    "zh_instruction": (
        "### \u6307\u4ee4:\nAdd.\n\n### \u8f93\u5165:\n2 and 3\n\n### \u8f93\u51fa:\n",
        "### \u6307\u4ee4:\nAdd.\n\n### \u8f93\u51fa:\n",
        "5",
    ),
    "human_assistant": ("Human: Add.\n2 and 3\nAssistant: ", "Human: Add.\nAssistant: ", "5\n"),
    "zh_code": (
        "\u95ee\u9898: Add.\n\n2 and 3\n\n\u89e3\u51b3\u65b9\u6848:\n```python\n",
        "\u95ee\u9898: Add.\n\n\u89e3\u51b3\u65b9\u6848:\n```python\n",
        "5\n```",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_of_each_template(name: str) -> None:
    with_context, without, answer = RENDERED[name]
    for record, prompt in ((RECORD, with_context), (PLAIN, without)):
        ids, mask = render_record(record, TEMPLATES[name], BYTES)
        assert BYTES.decode(ids) == prompt + answer + "<|endoftext|>"
        supervised = [token for token, counts in zip(ids, mask) if counts]
        assert BYTES.decode(supervised) == answer + "<|endoftext|>"
        assert mask == sorted(mask), "the supervised part is the tail"


words = st.text(st.characters(codec="utf-8"), max_size=20)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(record=st.fixed_dictionaries(dict.fromkeys(RECORD, words)))
def test_sampling_feeds_the_ids_of_training(name: str, kind: str, record: Record) -> None:
    ids, mask = render_record(record, TEMPLATES[name], TOKENIZERS[kind])
    prompt = render_prompt(record, TEMPLATES[name], TOKENIZERS[kind])
    assert len(ids) == len(mask)
    assert ids[: mask.index(1)] == prompt
    assert ids[-1] == TOKENIZERS[kind].eot_id
    assert TOKENIZERS[kind].decode(ids[mask.index(1) : -1]) == record["response"] + TEMPLATES[name].end


def test_a_prompt_from_text_is_a_record_without_context() -> None:
    for template in TEMPLATES.values():
        assert render_prompt("Add.", template, BYTES) == render_prompt(PLAIN, template, BYTES)


def test_without_a_template_the_raw_text_is_fed() -> None:
    assert BYTES.decode(render_prompt("Once upon", None, BYTES)) == "Once upon"
    assert BYTES.decode(render_prompt(RECORD, None, BYTES)) == "Add.\n\n2 and 3"


def test_braces_and_headings_in_a_record_stay_what_they_are() -> None:
    record = {**RECORD, "instruction": "{context} {x} {instruction!r}", "context": "{instruction}"}
    prompt = TEMPLATES["dolly"].prompt(record)
    assert prompt.startswith("### Instruction:\n{context} {x} {instruction!r}\n\n### Context:\n{instruction}\n\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_spec_is_json_and_rebuilds_the_template(name: str) -> None:
    assert template_from_spec(json.loads(json.dumps(TEMPLATES[name].spec()))) == TEMPLATES[name]


def test_specs_that_are_none() -> None:
    assert template_from_spec(None) is None
    spec = PromptTemplate("mine", "{instruction}", "{context}", ">").spec()
    assert template_from_spec(spec) == PromptTemplate("mine", "{instruction}", "{context}", ">", "")
    for wrong in ({}, {**spec, "more": "x"}, {**spec, "end": 3}):
        with pytest.raises(ValueError, match="prompt template"):
            template_from_spec(wrong)


def test_unknown_names_get_the_nearest() -> None:
    assert get_template("alpaca") is TEMPLATES["alpaca"]
    with pytest.raises(ValueError, match=r"'dollie' is unknown.*Did you mean dolly\?"):
        get_template("dollie")


# ---- records as they are found


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (RECORD, RECORD),
        ({"instruction": " Add.\n", "response": "5 "}, {**PLAIN, "category": ""}),
        ({"instruction": "Add.", "context": None, "response": "5", "category": "math"}, PLAIN),
        ({"instruction": "Add.", "input": "2 and 3", "output": "5", "history": []}, {**RECORD, "category": ""}),
        ({"problem": "Add.", "solution": "5"}, {**PLAIN, "category": ""}),
        ({"instruction": "Add.", "response": ""}, {**PLAIN, "response": "", "category": ""}),
    ],
)
def test_known_field_names_become_the_four_fields(raw: dict, expected: Record) -> None:
    assert normalize_record(raw, "here") == expected


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"instruction": "Add."}, "no 'response' or 'output' or 'solution'; its fields are 'instruction'"),
        ({"output": "5"}, "no 'instruction' or 'problem'"),
        ({"instruction": None, "response": "5"}, "no 'instruction'"),
        ({"instruction": "Add.", "response": 5}, "'response' is int, expected text"),
        ({"instruction": "Add.", "input": ["2"], "output": "5"}, "'input' is list, expected text"),
        ({}, "its fields are none"),
        (["Add."], "expected a record with fields, found list"),
        ({"x" * 9000: 1}, "no 'instruction'"),
    ],
)
def test_records_without_their_fields_are_named_in_one_line(raw: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        normalize_record(raw, "file.jsonl:7")
    assert str(caught.value).startswith("file.jsonl:7: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 400
