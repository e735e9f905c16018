"""Sources: every form of input gives its documents, in order and whole; a fault is one line that names its place."""

import gzip
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import sources
from data.records import KINDS
from data.sources import Piece, documents, record_rows, source_format
from data.templates import Record, normalize_record
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ["instruction", "context", "response", "category"]


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def texts(source: str, *paths: object) -> list[str]:
    return [piece.text for piece in documents(source, [str(path) for path in paths])]


def records(source: str, paths: list[str] | tuple[str, ...] = ()) -> Iterator[Record]:
    return (normalize_record(row, where) for where, row in record_rows(source, paths))


# ---- plain text


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("ab \n\n\u00e9\u4e2d"), max_size=3000),
    target=st.sampled_from([4, 5, 16, 64]),
)
def test_pieces_of_a_file_join_to_the_file(text: str, target: int) -> None:
    data = text.encode()
    rest, pieces = data, []
    while rest:
        cut = sources._cut(rest, target)
        assert 0 < cut <= target
        pieces.append(rest[:cut].decode())  # a cut inside a character would raise
        rest = rest[cut:]
    assert "".join(pieces) == text


def test_a_text_file_comes_in_pieces_that_end_at_lines(tmp_path: Path) -> None:
    lines = [f"line {number} of the book, which goes on for a while\n" for number in range(2000)]
    path = tmp_path / "book.txt"
    path.write_text("".join(lines))
    pieces = list(documents("text", [str(path)], val_fraction=0.1))
    assert "".join(piece.text for piece in pieces) == "".join(lines)
    assert 19 <= len(pieces) <= 23, "about 2 / val_fraction, so that a tenth can be taken"
    assert all(piece.text.endswith("\n") for piece in pieces)
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_pieces_have_the_token_ids_of_the_whole_text(tmp_path: Path) -> None:
    paragraphs = [f"Speaker {n}:\nLine one, isn't it?\n  and two.\n\n = Head = \n text " for n in range(300)]
    text = "\n\n".join(paragraphs)
    path = tmp_path / "play.txt"
    path.write_text(text)
    tokenizer = load_tokenizer("gpt2")
    pieces = list(documents("text", [str(path)], val_fraction=0.1))
    assert len(pieces) > 10
    assert np.concatenate([tokenizer.encode_numpy(piece.text) for piece in pieces]).tolist() == tokenizer.encode(text)


def test_a_line_longer_than_a_piece_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("\u4e2d" * 50_000, "utf-8")
    pieces = texts("text", path)
    assert len(pieces) > 3
    assert "".join(pieces) == "\u4e2d" * 50_000


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert texts("text", tmp_path / "a.txt") == ["hello\n"]
    assert texts("jsonl", tmp_path / "a.jsonl") == ["hello"]


def test_line_ends_are_kept(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\n")
    assert texts("text", tmp_path / "dos.txt") == ["one\r\ntwo\r\n"]


def test_a_folder_gives_its_files_sorted_and_recursively(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in (("c.txt", "3"), ("b/z.md", "2"), ("a.txt", "1"), (".hidden", "0")):
        (tmp_path / name).write_text(text)
    assert texts("text", tmp_path) == ["1", "2", "3"]
    assert texts("text", tmp_path / "c.txt", tmp_path / "b") == ["3", "2"], "what is named comes in the order given"


def test_wikitext_lines_become_articles(tmp_path: Path) -> None:
    text = " \n = Gold = \n \n A metal . \n = = Uses = = \n Coins . \n = Iron = \n Also a metal . \n"
    (tmp_path / "wiki.test.tokens").write_text(text)
    found = texts("wikitext", tmp_path)
    assert found == [" \n", " = Gold = \n \n A metal . \n = = Uses = = \n Coins . \n", " = Iron = \n Also a metal . \n"]
    rows = [{"text": line} for line in text.splitlines(keepends=True)]
    assert texts("wikitext", write_jsonl(tmp_path / "wiki.jsonl", rows)) == found


# ---- records


def test_json_lines_an_array_and_gz_are_the_same_records(tmp_path: Path) -> None:
    rows = [{"instruction": f"ask {n}", "response": f"\u00e9 {n}"} for n in range(3)]
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(Path(lines).read_bytes()))
    expected = [{"instruction": f"ask {n}", "context": "", "response": f"\u00e9 {n}", "category": ""} for n in range(3)]
    for name in ("a.jsonl", "b.json", "c.jsonl.gz"):
        assert list(records("jsonl", [str(tmp_path / name)])) == expected, name
    assert list(records("dolly15k", [str(tmp_path)])) == expected * 3


def test_parquet_gives_its_rows_over_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    table = pyarrow.table({"text": [f"document {n}" for n in range(1000)], "score": range(1000)})
    pyarrow.parquet.write_table(table, path, row_group_size=100)
    assert texts("parquet", path) == [f"document {n}" for n in range(1000)]
    assert texts("fineweb-edu", tmp_path) == [f"document {n}" for n in range(1000)]


def test_parquet_gives_conversations_and_pairs(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pair = {"prompt": "a", "chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "c"}]}
    for name, row in (("messages", {"messages": turns}), ("preference", pair)):
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "score": 1}] * 3), path)
        assert source_format("parquet", [str(path)]) == name
        assert [found for _, found in record_rows("parquet", [str(path)])] == [row] * 3


def test_blank_lines_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n   \n{"text": null}\n\n')
    assert texts("jsonl", tmp_path / "a.jsonl") == ["a", ""]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"text": "a"}, "text"),
        ({"instruction": "a", "output": "b"}, "instruction"),
        ({"problem": "a", "solution": "b"}, "code"),
        ({"instruction": "a", "output": "b", "text": "rendered"}, "instruction"),
    ],
)
def test_the_first_record_tells_what_a_file_holds(row: dict, format: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    assert source_format("jsonl", [path]) == format
    assert source_format("jsonl", [path], "text") == "text", "a format that is named is believed"


def test_kinds_of_the_named_sources() -> None:
    instructions = {"pydocs-qa", "dolly15k"}
    for source in ("pydocs", "pydocs-qa", "dolly15k", "fineweb-edu", "wikitext", "c4"):
        assert source_format(source) == ("instruction" if source in instructions else "text")
    with pytest.raises(ValueError, match="--source pydocs holds text, not --format instruction"):
        source_format("pydocs", (), "instruction")
    assert source_format("pydocs-qa", (), "prompts") == "prompts", "records of any format can be prompts"
    with pytest.raises(ValueError, match="--source dolly15k holds instruction, not --format preference"):
        source_format("dolly15k", (), "preference")


# ---- faults: (source, file name, content, what the one line says)

FAULTS: dict[str, tuple[str, str, bytes, str]] = {
    "text that is latin-1": ("text", "a.txt", b"fine\ncaf\xe9\n", r"a.txt: not UTF-8 at byte 8, line 2 \(found 0xe9\)"),
    "text cut inside a character": ("text", "a.txt", "\u4e2d".encode()[:2], r"a.txt: not UTF-8 at byte 0, line 1"),
    "bytes far into a text": ("text", "a.txt", b"line\n" * 40_000 + b"\xff", r"byte 200000, line 40001"),
    "JSON lines not UTF-8": ("jsonl", "a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"byte 24, line 2"),
    "JSON broken": (
        "jsonl",
        "a.jsonl",
        b'{"text": "a"}\n\n{"text": b}\n',
        r"a.jsonl:3: column 10: broken JSON \(Expec",
    ),
    "JSON cut off": (
        "jsonl",
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b',
        r"a.jsonl:2: column 10: broken JSON \(Untermin",
    ),
    "JSON array broken": ("jsonl", "a.json", b'[{"text": "a"},\n{"text": }]', r"a.json:2: column 10: broken JSON"),
    "JSON of too many brackets": ("jsonl", "a.jsonl", b'{"text": ' + b"[" * 100_000, r"a.jsonl:1: .*JSON"),
    "a number too long": (
        "jsonl",
        "a.jsonl",
        b'{"text": ' + b"9" * 5000 + b"}",
        r"a.jsonl:1: JSON that cannot be read",
    ),
    "one object over several lines": ("jsonl", "a.json", b'{\n"text": "a"}', r"a.json:1: .*expected one object a line"),
    "a line that is no object": (
        "jsonl",
        "a.jsonl",
        b'{"text": "a"}\n3\n',
        r"a.jsonl:2: the record has no field 'text'",
    ),
    "a text that is a number": (
        "jsonl",
        "a.jsonl",
        b'{"text": "a"}\n{"text": 3}\n',
        r"a.jsonl:2: the field 'text' is int",
    ),
    "no known fields": ("jsonl", "a.jsonl", b'{"question": "a"}\n', r"a.jsonl:1: expected a field 'text'.*'question'"),
    "a record without its response": (
        "dolly15k",
        "a.jsonl",
        b'{"instruction": "a", "response": "b"}\n{"instruction": "a"}\n',
        r"a.jsonl:2: the record has no 'response'",
    ),
    "an array's record without its field": (
        "dolly15k",
        "a.json",
        b'[{"instruction": "a", "output": "b"}, {"output": "b"}]',
        r"a.json: record 2: the record has no 'instruction'",
    ),
    "no Parquet": ("parquet", "a.parquet", b"PAR1 not really", r"a.parquet: not a Parquet file"),
    "a .gz that is none": ("text", "a.txt.gz", b"plain", r"a.txt.gz: cannot be read"),
    "a .gz cut short": ("text", "a.txt.gz", gzip.compress(os.urandom(2000))[:900], r"a.txt.gz: cannot be read"),
    "an empty JSON file": ("jsonl", "a.jsonl", b"", r"a.jsonl: holds no records"),
}


def drain(source: str, path: str) -> None:
    """Read a source as prepare does: what is it, then all of it."""
    if KINDS[source_format(source, [path])] == "text":
        list(documents(source, [path]))
    else:
        list(records(source, [path]))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_file_is_one_line_that_names_its_place(fault: str, tmp_path: Path) -> None:
    source, name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        drain(source, str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_paths_that_lead_to_nothing(source: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        drain(source, str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="the folder holds no files"):
        drain(source, str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is no regular file"):
        drain(source, str(tmp_path / "pipe"))


def test_a_parquet_file_without_text(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: has the columns body; expected text"):
        drain("parquet", str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(("source", "name"), [("text", "a.txt"), ("jsonl", "a.jsonl"), ("parquet", "a.parquet")])
def test_no_permission(source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text("x")

    def refuse(path: object, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)  # root may read anything, so the refusal is made
    with pytest.raises(OSError, match=rf"{name}: cannot be read \(Permission denied\)"):
        drain(source, str(tmp_path / name))


def test_a_large_json_array_is_mentioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "_LARGE_JSON", 10)
    (tmp_path / "a.json").write_text('[{"text": "a"}]')
    with caplog.at_level(logging.WARNING):
        assert texts("jsonl", tmp_path / "a.json") == ["a"]
    assert "read whole into memory" in caplog.text


# ---- the Hub


def test_without_a_network_the_hub_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source, read in (("dolly15k", records), ("c4", documents), ("wikitext", documents), ("fineweb-edu", documents)):
        began = time.monotonic()
        with pytest.raises(OSError, match=r"--input, or point HF_ENDPOINT") as caught:
            next(iter(read(source)))
        assert "\n" not in str(caught.value)
        assert time.monotonic() - began < 15, "retries would take 23 s"


def test_rows_of_the_hub_are_records_and_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "dolly15k": {"instruction": "a", "context": "", "response": "b", "category": "qa"},
        "c4": {"text": "web", "url": "u"},
        "wikitext": {"text": " = A = \n"},
    }
    by_path = {sources.HUB_SETS[source].path: row for source, row in rows.items()}
    monkeypatch.setattr(sources, "_hub_stream", lambda hub: iter([by_path[hub.path]] * 2))
    assert list(records("dolly15k")) == [rows["dolly15k"]] * 2
    assert list(documents("c4")) == [Piece("web")] * 2
    assert list(documents("wikitext")) == [Piece(" = A = \n")] * 2


def test_any_set_of_the_hub_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stream(hub: sources.HubSet) -> Iterator[dict]:
        asked.append((hub.path, hub.name))
        return iter([{"messages": [], "source": "x"}])

    monkeypatch.setattr(sources, "_hub_stream", stream)
    assert source_format("some-one/chat.v1:part") == "messages"
    assert list(record_rows("some-one/chat.v1")) == [("some-one/chat.v1 row 1", {"messages": [], "source": "x"})]
    assert asked == [("some-one/chat.v1", "part"), ("some-one/chat.v1", None)]


def test_a_stream_that_breaks_off_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: object) -> Iterator[dict]:
        yield {"text": "a"}
        raise RuntimeError("connection reset\nby peer")

    monkeypatch.setattr(sources, "_hub_stream", breaks)
    stream = documents("c4")
    assert next(stream) == Piece("a")
    with pytest.raises(OSError, match=r"allenai/c4: could not be read .*\(connection reset\)"):
        next(stream)
