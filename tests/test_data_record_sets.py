"""Conversations, pairs and prompts as sets on disk, and in the cache of a run that is given a file of records."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from data.cache import prepare_records_cache
from data.chat import render_conversation
from data.manifest import read_manifest
from data.prepare import output_folder, prepare
from data.rendering import ANSWER_CUT
from data.settings import PrepareSettings
from data.shards import open_dataset
from data.templates import TEMPLATES, get_template
from data.tokenizer import load_tokenizer
from tests.test_data_records import ASK, BLUE, MORE, PAIRS, RED, YES, said
from tests.token_sets import edit_manifest

BYTES = load_tokenizer("byte")


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
