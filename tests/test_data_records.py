"""Records in every format become the conversations that they hold; damage is named, empties are left out."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chat import render_conversation
from data.records import FIELD_NAMES, KINDS, Unusable, format_of, sample_of
from data.settings import FORMATS
from data.templates import get_template
from data.tokenizer import load_tokenizer

BYTES = load_tokenizer("byte")


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def shared(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


ASK, BLUE, RED = said("user", "Name a colour."), said("assistant", "Blue."), said("assistant", "Red, or not?")
MORE, YES = said("user", "Sure?"), said("assistant", "Yes.")
BRIEF = said("system", "Be brief.")

SAMPLES: dict[str, tuple[str, dict[str, Any], list[dict[str, str]]]] = {
    "dolly": (
        "instruction",
        {"instruction": "Name a colour.", "context": "", "response": "Blue.", "category": "qa"},
        [ASK, BLUE],
    ),
    "alpaca with input and system": (
        "instruction",
        {"system": "Be brief.", "instruction": "Name a colour.", "input": "of the sky", "output": "Blue."},
        [BRIEF, {**ASK, "context": "of the sky"}, BLUE],
    ),
    "code keeps its indentation": (
        "code",
        {"problem": "Name a colour.", "solution": "\n  \n    return 'blue'\n"},
        [ASK, said("assistant", "    return 'blue'")],
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [
                shared("system", "Be brief."),
                shared("human", "Name a colour."),
                shared("gpt", "Blue."),
                shared("User", "Sure?"),
                shared("chatgpt", "Yes."),
            ]
        },
        [BRIEF, ASK, BLUE, MORE, YES],
    ),
    "sharegpt with tools": (
        "sharegpt",
        {
            "conversations": [
                shared("human", "Name a colour."),
                shared("function_call", "look()"),
                shared("observation", ""),
                shared("gpt", "Blue."),
            ]
        },
        [ASK, said("assistant", "look()"), said("tool", ""), BLUE],
    ),
    "openai": ("messages", {"messages": [said("developer", "Be brief."), ASK, BLUE]}, [BRIEF, ASK, BLUE]),
    "openai parts": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Name a colour."}]}, BLUE]},
        [ASK, BLUE],
    ),
    "an empty system message is none": ("messages", {"messages": [said("system", " "), ASK, BLUE]}, [ASK, BLUE]),
    "messages under conversations": ("messages", {"conversations": [ASK, BLUE]}, [ASK, BLUE]),
    "prompt and completion": ("messages", {"prompt": [ASK], "completion": [BLUE]}, [ASK, BLUE]),
    "prompt and completion as text": ("messages", {"prompt": "Name a colour.", "completion": "Blue."}, [ASK, BLUE]),
    "prompt alone": ("prompts", {"prompt": "Name a colour.", "answer": "Blue."}, [ASK]),
    "prompt of messages": ("prompts", {"prompt": [BRIEF, ASK]}, [BRIEF, ASK]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_format_is_told_by_its_fields_and_read(name: str) -> None:
    format, row, messages = SAMPLES[name]
    assert format_of(row, "here") == format
    sample = sample_of(row, format, "here")
    assert (sample.messages, sample.rejected, sample.where) == (messages, None, "here")


@pytest.mark.parametrize("name", SAMPLES)
def test_records_of_any_format_are_prompts_without_their_answer(name: str) -> None:
    format, row, messages = SAMPLES[name]
    question = messages if format == "prompts" else messages[:-1]
    if format == "code":
        question = [ASK]
    assert sample_of(row, "prompts", "here").messages == question


PAIRS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Red, or not?"},
    "alpaca": {"instruction": "Name a colour.", "input": "", "chosen": "Blue.", "rejected": "Red, or not?"},
    "question": {"question": "Name a colour.", "chosen": "Blue.", "rejected": "Red, or not?"},
    "messages": {"prompt": [ASK], "chosen": [BLUE], "rejected": [RED]},
    "an implicit prompt": {"chosen": [ASK, BLUE], "rejected": [ASK, RED]},
    "the prompt as text and in the conversations": {
        "prompt": " Name a colour.",
        "chosen": [ASK, BLUE],
        "rejected": [ASK, RED],
    },
    "the prompt repeated": {"prompt": [ASK], "chosen": [ASK, BLUE], "rejected": [ASK, RED]},
    "sharegpt": {
        "conversations": [shared("human", "Name a colour.")],
        "chosen": shared("gpt", "Blue."),
        "rejected": shared("gpt", "Red, or not?"),
    },
    "sharegpt with answers as text": {
        "conversations": [shared("human", "Name a colour.")],
        "chosen": "Blue.",
        "rejected": "Red, or not?",
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_in_every_form_are_two_conversations(name: str) -> None:
    assert format_of(PAIRS[name], "here") == "preference"
    sample = sample_of(PAIRS[name], "preference", "here")
    assert (sample.messages, sample.rejected) == ([ASK, BLUE], [ASK, RED])


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "the assistant begins": ("messages", {"messages": [BLUE, ASK, BLUE]}, "begins with 'assistant', expected 'system'"),
    "two users": ("messages", {"messages": [ASK, MORE, BLUE]}, "has 'user' after 'user' as message 2"),
    "two answers": ("messages", {"messages": [ASK, BLUE, YES]}, "has 'assistant' after 'assistant' as message 3"),
    "system in the middle": ("messages", {"messages": [ASK, BLUE, BRIEF, ASK, BLUE]}, "'system' after 'assistant'"),
    "no answer": ("messages", {"messages": [ASK]}, "ends with 'user', expected 'assistant'"),
    "no message": ("messages", {"messages": []}, "is empty"),
    "an unknown role": ("messages", {"messages": [said("narrator", "x")]}, r"messages\[0\]: has the role 'narrator'"),
    "no role": ("messages", {"messages": [{"content": "x"}]}, "has the role None"),
    "content of numbers": ("messages", {"messages": [{"role": "user", "content": 5}]}, "content is int, expected text"),
    "an image": ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content is list"),
    "a call": ("messages", {"messages": [ASK, {**BLUE, "tool_calls": [{}]}]}, "tool_calls, which are not supported"),
    "messages of text": ("messages", {"messages": [ASK, "Blue."]}, r"messages\[1\]: expected a message .* found str"),
    "messages of a number": ("messages", {"messages": 5}, "'messages' is int, expected text or a list"),
    "other fields": ("sharegpt", {"turns": []}, "no 'conversations' or 'messages'; found the fields 'turns'"),
    "no record": ("sharegpt", ["a"], "expected a record with fields, found list"),
    "code without solution": ("code", {"problem": "x", "output": "y"}, "no 'response' or 'output' or 'solution'"),
    "system of a number": ("instruction", {"instruction": "a", "output": "b", "system": 5}, "'system' is int"),
    "pairs without a prompt": ("preference", {"chosen": "a", "rejected": "b"}, "no 'prompt'"),
    "half a pair": ("preference", {"prompt": "x", "chosen": "a", "rejected": None}, "no 'rejected'"),
    "pairs of different questions": (
        "preference",
        {"chosen": [ASK, BLUE], "rejected": [MORE, YES]},
        "do not part at an answer",
    ),
    "pairs of different questions to one system message": (
        "preference",
        {"chosen": [BRIEF, ASK, BLUE], "rejected": [BRIEF, MORE, YES]},
        "do not part at an answer",
    ),
    "an answer that begins the other": (
        "preference",
        {"chosen": [ASK, BLUE], "rejected": [ASK, BLUE, MORE, YES]},
        "do not part at an answer",
    ),
    "a pair that ends with a question": (
        "preference",
        {"chosen": [ASK, BLUE, MORE], "rejected": [ASK, RED]},
        "here: chosen: the conversation ends with 'user'",
    ),
    "prompts without any": ("prompts", {"colour": "red"}, "no 'instruction' or 'problem'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_that_names_the_record(name: str) -> None:
    format, row, message = DAMAGE[name]
    with pytest.raises(ValueError, match=message) as caught:
        sample_of(row, format, "here")
    assert not isinstance(caught.value, Unusable)
    assert str(caught.value).startswith("here: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("format", "row", "why"),
    [
        ("instruction", {"instruction": "a", "output": " "}, "without an instruction or a response"),
        ("messages", {"messages": [ASK, said("assistant", "")]}, "without an instruction or a response"),
        ("messages", {"messages": [ASK, {"role": "assistant", "content": None}]}, "without an instruction"),
        ("sharegpt", {"conversations": [shared("human", " "), shared("gpt", "b")]}, "without an instruction"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b "}, "whose two answers are equal"),
    ],
)
def test_records_that_teach_nothing_are_unusable(format: str, row: dict[str, Any], why: str) -> None:
    with pytest.raises(Unusable, match=why) as caught:
        sample_of(row, format, "here")
    assert why in f"a record {caught.value.why}"


# ---- whatever a file may hold

ROLES = st.sampled_from(["system", "user", "human", "Assistant", "gpt", "tool", "narrator", 5, None])
SPOKEN = st.sampled_from(["a", "b", " ", "", None, 3, [{"type": "text", "text": "c"}], [{"type": "image"}]])
TURN = st.fixed_dictionaries({}, optional={"role": ROLES, "from": ROLES, "content": SPOKEN, "value": SPOKEN})
SOUND = st.lists(st.sampled_from([BRIEF, ASK, BLUE, MORE, YES, said("tool", "5")]), max_size=5)
VALUE = st.none() | st.integers() | st.text(max_size=3) | TURN | st.lists(TURN, max_size=4) | SOUND
NOISE = st.dictionaries(st.sampled_from(sorted(FIELD_NAMES)), VALUE, max_size=5) | VALUE


@st.composite
def rows(draw: st.DrawFn) -> tuple[str, Any]:
    """A format and a row: mostly one that is read, with up to two fields or turns changed; else anything."""
    known = [(format, row) for format, row, _ in SAMPLES.values()] + [("preference", row) for row in PAIRS.values()]
    format, row = draw(st.sampled_from(known))
    row = dict(row)
    for name in draw(st.lists(st.sampled_from(sorted(row)), max_size=2)):
        if isinstance(row.get(name), list) and draw(st.booleans()):
            at = draw(st.integers(0, len(row[name])))
            row[name] = [*row[name][:at], *draw(st.lists(TURN, max_size=1) | SOUND), *row[name][at + 1 :]]
        elif draw(st.booleans()):
            row[name] = draw(VALUE)
        else:
            row.pop(name, None)
    anything = draw(st.integers(0, 5)) == 0
    return (draw(st.sampled_from(sorted(set(KINDS) - {"text"}))), draw(NOISE)) if anything else (format, row)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(given=rows())
def test_any_row_is_a_sample_or_one_line(given: tuple[str, Any]) -> None:
    format, row = given
    try:
        format_of(row, "here")
    except ValueError as error:
        assert str(error).startswith("here: ") and "\n" not in str(error) and len(str(error)) <= 400
    try:
        sample = sample_of(row, format, "here")
    except ValueError as error:
        assert str(error).startswith("here: ") and "\n" not in str(error) and len(str(error)) <= 600
        return
    assert (sample.rejected is not None) == (format == "preference")
    for messages in (sample.messages, sample.rejected or sample.messages):
        roles = [message["role"] for message in messages]
        assert roles[roles[0] == "system"] == "user" and "system" not in roles[1:]
        assert (roles[-1] in ("user", "tool")) == (format == "prompts")
        assert not any(
            one == other == "user" or one == other == "assistant" for one, other in itertools.pairwise(roles)
        )
        assert all(isinstance(value, str) for message in messages for value in message.values())
        render_conversation(messages, get_template("chatml"), BYTES, format == "prompts")
    if sample.rejected is not None:
        both = itertools.zip_longest(sample.messages, sample.rejected)
        one, other = next((one, other) for one, other in both if one != other)
        assert one is not None and other is not None and one["role"] == other["role"] == "assistant"


def test_every_format_has_a_kind() -> None:
    assert set(FORMATS) == {"auto", *KINDS}


def test_a_pair_may_be_two_transcripts_that_share_their_question() -> None:
    begin = "\n\nHuman: Is it\n\nold?\n\nAssistant: Very.\n\nHuman: How old?\n\nAssistant:"
    row = {"chosen": f"{begin} 90: years.", "rejected": f"{begin} No Human: knows."}
    sample = sample_of(row, "preference", "line 1")
    roles = ["user", "assistant", "user", "assistant"]
    question = ["Is it\n\nold?", "Very.", "How old?"]
    for messages, answer in ((sample.messages, "90: years."), (sample.rejected, "No Human: knows.")):
        assert [(m["role"], m["content"]) for m in messages or []] == list(zip(roles, [*question, answer]))
    for text in ("Human said so", "A word first.\n\nHuman: Hm?\n\nAssistant: Hm."):
        with pytest.raises(ValueError, match="has no 'prompt'"):
            sample_of({"chosen": text, "rejected": "Human: a\n\nAssistant: b"}, "preference", "line 1")
    with pytest.raises(ValueError, match="line 1"):
        sample_of(
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "preference",
            "line 1",
        )
