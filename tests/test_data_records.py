"""Records in every format become the conversations that they hold; damage is named, empties are left out."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.cache import prepare_records_cache
from data.chat import render_conversation
from data.manifest import read_manifest
from data.prepare import output_folder, prepare
from data.records import FIELD_NAMES, KINDS, Unusable, format_of, sample_of
from data.rendering import ANSWER_CUT
from data.settings import PrepareSettings
from data.shards import open_dataset
from data.templates import TEMPLATES, get_template
from data.tokenizer import load_tokenizer
from tests.token_sets import edit_manifest

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
        "begin with different questions",
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
        assert sample.messages[0] == sample.rejected[0] and sample.messages != sample.rejected


# ---- sets on disk


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def made(folder: Path, rows: list[Any], **changes: Any) -> dict[str, Any]:
    values = {"tokenizer": "byte", "workers": 1, "val_fraction": 0.0, "prompt_template": "chatml", **changes}
    file = write(folder.with_suffix(".jsonl"), rows)
    return prepare(PrepareSettings(source="jsonl", input=(file,), data_dir=str(folder), **values))


def documents(folder: Path, split: str = "train") -> list[tuple[list[int], list[int]]]:
    tokens = open_dataset(folder, split)
    bounds = tokens.document_starts.tolist()
    return [(tokens.tokens(a, b).tolist(), tokens.mask(a, b).tolist()) for a, b in itertools.pairwise(bounds)]


def test_a_preference_set_holds_the_chosen_before_the_rejected(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}, of course", "rejected": f"not {n}"} for n in range(40)]
    meta = made(tmp_path / "set", rows, val_fraction=0.25)
    assert (meta["kind"], meta["source"]["format"]) == ("preference", "preference")
    assert meta["splits"]["train"]["documents"] == 60 and meta["splits"]["val"]["documents"] == 20
    template = get_template("chatml")
    found = {}
    for split in ("train", "val"):
        parts = documents(tmp_path / "set", split)
        found.update({BYTES.decode(chosen[0]): (chosen, rejected) for chosen, rejected in zip(parts[::2], parts[1::2])})
    for row in rows:
        expected = [
            render_conversation([said("user", row["prompt"]), said("assistant", row[name])], template, BYTES)
            for name in ("chosen", "rejected")
        ]
        assert found.pop(BYTES.decode(expected[0][0])) == tuple(expected)
    assert not found


def test_of_a_pair_only_what_follows_the_shared_prompt_is_supervised(tmp_path: Path) -> None:
    made(tmp_path / "set", [{"chosen": [ASK, BLUE, MORE, YES], "rejected": [ASK, BLUE, MORE, said("assistant", "No")]}])
    (chosen, mask), (rejected, other) = documents(tmp_path / "set")
    answer = BYTES.decode([token for token, bit in zip(chosen, mask) if bit])
    assert answer == "Yes.<|im_end|>"
    assert BYTES.decode([token for token, bit in zip(rejected, other) if bit]) == "No<|im_end|>"
    start = mask.index(1)
    assert chosen[:start] == rejected[:start] and other.index(1) == start


def test_a_pair_may_part_before_its_last_answer(tmp_path: Path) -> None:
    made(tmp_path / "set", [{"chosen": [ASK, BLUE, MORE, YES], "rejected": [ASK, RED]}])
    marked = [
        BYTES.decode([token for token, bit in zip(ids, mask) if bit]) for ids, mask in documents(tmp_path / "set")
    ]
    assert marked == ["Blue.<|im_end|>Yes.<|im_end|>", "Red, or not?<|im_end|>"]


def test_a_set_of_prompts_supervises_nothing(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": "2 and 3", "output": "5"}, {"instruction": "Add 7 and 1.", "output": ""}]
    meta = made(tmp_path / "set", rows, format="prompts", prompt_template="dolly")
    assert meta["kind"] == "prompts" and meta["splits"]["train"]["supervised"] == 0
    found = documents(tmp_path / "set")
    record = {"instruction": "Add.", "context": "2 and 3"}
    assert BYTES.decode(found[0][0]) == TEMPLATES["dolly"].prompt(record)
    assert not any(bit for _, mask in found for bit in mask) and len(found) == 2


def test_an_odd_number_of_documents_is_no_set_of_pairs(tmp_path: Path) -> None:
    made(tmp_path / "set", [PAIRS["text"]])

    def shrink(meta: dict[str, Any]) -> None:
        meta["splits"]["train"]["documents"] = 1

    edit_manifest(tmp_path / "set", shrink)
    with pytest.raises(ValueError, match="documents is 1, expected an even number"):
        read_manifest(tmp_path / "set")


def test_damage_stops_or_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"messages": [ASK, BLUE]},
        {"messages": [BLUE, ASK]},
        {"messages": [ASK, BLUE, said("tool", "5"), YES]},  # sound, but the template has no such role
        {"messages": [ASK, said("assistant", "")]},
    ]
    with pytest.raises(ValueError, match=r"set.jsonl:2: the conversation begins .*--bad_records skip"):
        made(tmp_path / "set", rows)
    with pytest.raises(
        ValueError, match=r"set.jsonl:3: messages: prompt template dolly .* 'tool' .*--bad_records skip"
    ):
        made(tmp_path / "set", [rows[0], rows[0], rows[2]], prompt_template="dolly")
    meta = made(tmp_path / "set", rows, prompt_template="dolly", bad_records="skip")
    assert meta["splits"]["train"]["documents"] == 1
    assert meta["left_out"] == {"that are damaged": 2, "without an instruction or a response": 1}
    assert "left out 2 records that are damaged" in caplog.text


def test_what_is_counted_does_not_depend_on_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.encode._BATCH_CHARACTERS", 200)
    tools = {"messages": [ASK, BLUE, said("tool", "5"), YES]}
    rows = [{"messages": [ASK, said("assistant", "x" * (9 * n))]} if n % 4 else tools for n in range(60)]
    options: dict[str, Any] = {
        "prompt_template": "dolly",
        "bad_records": "skip",
        "max_length": 200,
        "val_fraction": 0.1,
    }
    for tokenizer in ("byte", "bpe"):  # forked and spawned processes
        options |= {"tokenizer": tokenizer, "vocab_size": 257}
        one, two = (made(tmp_path / f"{tokenizer}{workers}", rows, workers=workers, **options) for workers in (1, 2))
        assert one["left_out"] == two["left_out"] == {"that are damaged": 15}
        assert one["cut"] == two["cut"] and one["cut"][ANSWER_CUT] > 20
        assert one["splits"] == two["splits"]


def test_hub_sets_are_written_under_their_name(tmp_path: Path) -> None:
    assert output_folder(PrepareSettings(source="some-one/chat.v1:part")).parts[-2:] == ("data", "chat.v1")
    with pytest.raises(ValueError, match="Did you mean jsonl"):
        PrepareSettings(source="json")


def test_the_cache_knows_every_setting_that_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.cache.resolve_data_dir", lambda name: tmp_path / name)
    pairs, chat = (
        write(tmp_path / "p.jsonl", [PAIRS["text"]] * 3),
        write(tmp_path / "c.jsonl", [{"messages": [ASK, BLUE]}]),
    )
    assert read_manifest(prepare_records_cache(pairs, "dolly", BYTES))["kind"] == "preference"
    assert read_manifest(prepare_records_cache(pairs, "dolly", BYTES, format="prompts"))["kind"] == "prompts"
    jinja = tmp_path / "own.jinja"
    jinja.write_text("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    changes: list[dict[str, Any]] = [
        {},
        {"prompt_template": "alpaca"},
        {"prompt_template": str(jinja)},
        {"template": get_template("chatml")},
        {"format": "messages"},
        {"system": "Be brief."},
        {"train_on": "last"},
        {"max_length": 100},
        {"bad_records": "skip"},
    ]
    folders = [
        prepare_records_cache(chat, **{"prompt_template": "dolly", "tokenizer": BYTES, **each}) for each in changes
    ]
    assert len(set(folders)) == len(changes)
    before = folders[0].stat().st_mtime_ns
    assert prepare_records_cache(chat, "dolly", BYTES) == folders[0] and folders[0].stat().st_mtime_ns == before
    jinja.write_text(jinja.read_text() + " ")
    assert prepare_records_cache(chat, str(jinja), BYTES) not in folders


def test_every_format_has_a_kind() -> None:
    from data.settings import FORMATS

    assert set(FORMATS) == {"auto", *KINDS}
