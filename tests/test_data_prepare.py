"""prepare: from sources to a set on disk, whole or not at all, the same whatever the number of processes."""

import itertools
import json
import logging
import multiprocessing
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import encode
from data.encode import Item, encode_all
from data.manifest import read_manifest
from data.prepare import default_val_fraction, prepare
from data.settings import PrepareSettings
from data.shards import SplitWriter, open_dataset
from data.stream import in_validation
from data.templates import TEMPLATES, normalize_record, render_record
from data.tokenizer import Tokenizer, load_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parent.parent
BYTES = load_tokenizer("byte")
VOCABULARY = "the quick brown fox jumps over a lazy dog near the river bank".split()  # noqa: SIM905


def sentences(count: int, seed: int = 0, words: int = 12) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(VOCABULARY, k=rng.randint(2, words))) for _ in range(count)]


def text_rows(path: Path, count: int = 200, seed: int = 0) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(count, seed)))
    return str(path)


def record_rows(path: Path, count: int = 100) -> str:
    asked, answers = sentences(count, 1), sentences(count, 2)
    rows = [
        {"instruction": a, "input": a if n % 3 else "", "output": b} for n, (a, b) in enumerate(zip(asked, answers))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(folder: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"tokenizer": "byte", "data_dir": str(folder), "workers": 1, **changes}
    return prepare(PrepareSettings(**values))


def decoded(folder: Path, split: str, tokenizer: Tokenizer = BYTES) -> list[str]:
    tokens = open_dataset(folder, split)
    starts = tokens.document_starts
    return [tokenizer.decode(tokens.tokens(int(a), int(b))) for a, b in itertools.pairwise(starts)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- the validation split


@settings(max_examples=200, deadline=None)
@given(fraction=st.floats(0.001, 0.99), seed=st.integers(0, 9), count=st.integers(1, 3000))
def test_the_split_takes_its_share_of_every_stretch(fraction: float, seed: int, count: int) -> None:
    chosen = [in_validation(index, fraction, seed) for index in range(count)]
    for stop in {count, count // 2, count // 7}:
        assert abs(sum(chosen[:stop]) - fraction * stop) <= 2


def test_the_split_depends_on_the_seed_and_the_index_alone() -> None:
    first = [in_validation(index, 0.1, 1) for index in range(500)]
    assert first == [in_validation(index, 0.1, 1) for index in range(500)]
    assert first != [in_validation(index, 0.1, 2) for index in range(500)]
    places = {index % 10 for index, chosen in enumerate(first) if chosen}
    assert len(places) > 5, "not always at the same place of a run"
    assert not any(in_validation(index, fraction, 1) for index in range(50) for fraction in (0.0, 1e-9))
    assert not any(in_validation(0, fraction, seed) for fraction in (0.01, 0.1, 0.5) for seed in range(50))


def test_default_fractions() -> None:
    assert default_val_fraction("fineweb-edu", "text") == default_val_fraction("c4", "text") == 0.01
    assert default_val_fraction("text", "text") == 0.1
    assert default_val_fraction("dolly15k", "instruction") == 0.05


# ---- what is written


def test_documents_come_back_whole_and_in_order(tmp_path: Path) -> None:
    meta = run(tmp_path / "set", source="jsonl", input=(text_rows(tmp_path / "a.jsonl"),), val_fraction=0.1, seed=3)
    expected: dict[str, list[str]] = {"train": [], "val": []}
    for index, text in enumerate(sentences(200)):
        expected["val" if in_validation(index, 0.1, 3) else "train"].append(text + "<|endoftext|>")
    assert {split: decoded(tmp_path / "set", split) for split in expected} == expected
    assert meta == read_manifest(tmp_path / "set")
    assert (meta["kind"], meta["template"], meta["dtype"], meta["val_fraction"]) == ("text", None, "uint16", 0.1)
    assert meta["source"]["inputs"] == [str(tmp_path / "a.jsonl")]
    assert meta["splits"]["val"]["documents"] == len(expected["val"]) == 20


def test_records_are_rendered_with_their_mask(tmp_path: Path) -> None:
    path = record_rows(tmp_path / "a.jsonl")
    meta = run(tmp_path / "set", source="jsonl", input=(path,), prompt_template="alpaca", val_fraction=0.0)
    tokens = open_dataset(tmp_path / "set", "train")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    rendered = [render_record(normalize_record(row, "row"), TEMPLATES["alpaca"], BYTES) for row in rows]
    assert tokens.tokens(0, tokens.n_tokens).tolist() == [token for ids, _ in rendered for token in ids]
    assert tokens.mask(0, tokens.n_tokens).tolist() == [bit for _, mask in rendered for bit in mask]
    assert np.diff(tokens.document_starts).tolist() == [len(ids) for ids, _ in rendered]
    assert meta["template"] == TEMPLATES["alpaca"].spec()
    assert (meta["kind"], list(meta["splits"])) == ("instruction", ["train"])


def test_one_text_file_is_split_and_nothing_of_it_is_lost(tmp_path: Path) -> None:
    lines = [text + "\n" for text in sentences(3000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    meta = run(tmp_path / "set", source="text", input=(str(tmp_path / "book.txt"),))
    parts = {split: decoded(tmp_path / "set", split) for split in ("train", "val")}
    bare = [text.removesuffix("<|endoftext|>") for split in parts.values() for text in split]
    assert all(text.endswith("<|endoftext|>") for split in parts.values() for text in split)
    assert not any("<|endoftext|>" in text for text in bare), "only at the end of a stretch"
    assert sorted("".join(bare).splitlines()) == sorted("".join(lines).splitlines())
    assert 0.05 < meta["splits"]["val"]["tokens"] / len("".join(lines)) < 0.15
    assert len(parts["train"]) == len(parts["val"]) + 1 <= 4, "neighbouring pieces stay one document"
    whole = "".join(lines)
    assert [whole.index(text) for text in bare[: len(parts["train"])]] == sorted(
        whole.index(text) for text in bare[:-2]
    )


def test_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / f"{name}.txt").write_text(f"this is {name}\n")
    (tmp_path / "in" / "empty.txt").write_text("")
    run(tmp_path / "set", source="text", input=(str(tmp_path / "in"),), val_fraction=0)
    assert decoded(tmp_path / "set", "train") == [f"this is {name}\n<|endoftext|>" for name in "abc"]


def test_shards_are_cut_at_their_size(tmp_path: Path) -> None:
    meta = run(tmp_path / "set", source="jsonl", input=(text_rows(tmp_path / "a.jsonl"),), shard_size=1000)
    counts = [shard["count"] for shard in meta["splits"]["train"]["shards"]]
    assert len(counts) > 3
    assert set(counts[:-1]) == {1000}


def test_the_number_of_documents_can_be_limited(tmp_path: Path) -> None:
    path = text_rows(tmp_path / "a.jsonl")
    run(tmp_path / "a", source="jsonl", input=(path,), max_documents=7, val_fraction=0)
    assert decoded(tmp_path / "a", "train") == [text + "<|endoftext|>" for text in sentences(200)[:7]]
    files = []
    for number in range(3):
        files.append(str(tmp_path / f"{number}.txt"))
        Path(files[-1]).write_text(f"{number} word\n" * 2000)
    run(tmp_path / "b", source="text", input=tuple(files), max_documents=2, val_fraction=0)
    assert [text[0] for text in decoded(tmp_path / "b", "train")] == ["0", "1"]


def test_what_is_empty_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("ask", "answer"), ("ask", " "), ("", "answer"), ("ask2", "answer2")]
    lines = [json.dumps({"instruction": a, "response": b}) for a, b in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING):
        meta = run(tmp_path / "set", source="dolly15k", input=(str(tmp_path / "a.jsonl"),), val_fraction=0)
    assert meta["splits"]["train"]["documents"] == 2
    assert "left out 2 records" in caplog.text


def test_an_empty_validation_split_is_mentioned_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = text_rows(tmp_path / "a.jsonl", count=3)
    with caplog.at_level(logging.WARNING):
        meta = run(tmp_path / "set", source="jsonl", input=(path,), val_fraction=0.01)
    assert list(meta["splits"]) == ["train"]
    assert [record.getMessage() for record in caplog.records] == [
        "3 documents: too few for --val_fraction 0.01, no validation split"
    ]


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"text": ""}\n'])
def test_input_without_documents_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.jsonl: holds no documents to train on"):
        run(tmp_path / "set", source="jsonl", format="text", input=(str(tmp_path / "a.jsonl"),))
    assert not (tmp_path / "set").exists()


# ---- tokenizers


def test_a_learned_tokenizer_lies_beside_the_set_and_serves_another(tmp_path: Path) -> None:
    path = text_rows(tmp_path / "a.jsonl")
    meta = run(tmp_path / "a", source="jsonl", input=(path,), tokenizer="bpe", vocab_size=300)
    assert "json" not in meta["tokenizer"]
    assert 257 < meta["vocab_size"] <= 300
    tokenizer = load_tokenizer(str(tmp_path / "a"))
    assert tokenizer.fingerprint == meta["tokenizer_fingerprint"]
    assert decoded(tmp_path / "a", "train", tokenizer)[0].endswith("<|endoftext|>")
    records = record_rows(tmp_path / "b.jsonl")
    other = run(tmp_path / "b", source="jsonl", input=(records,), tokenizer=str(tmp_path / "a"))
    assert other["tokenizer_fingerprint"] == meta["tokenizer_fingerprint"]
    assert load_tokenizer(str(tmp_path / "b")).fingerprint == meta["tokenizer_fingerprint"]
    (tmp_path / "b" / "tokenizer.json").write_text(train_bpe(["another text"], 270).spec()["json"])
    with pytest.raises(ValueError, match="fingerprint"):
        load_tokenizer(str(tmp_path / "b"))


def test_validation_text_teaches_the_tokenizer_nothing(tmp_path: Path) -> None:
    texts = sentences(40)
    for index in range(40):
        if in_validation(index, 0.1, 1337):
            texts[index] = "zyxzyxzyx " * 50
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run(tmp_path / "a", source="jsonl", input=(str(tmp_path / "a.jsonl"),), tokenizer="bpe", vocab_size=400)
    assert "zyx" not in (tmp_path / "a" / "tokenizer.json").read_text()


def test_a_tokenizer_that_is_given_wins(tmp_path: Path) -> None:
    values = PrepareSettings(source="jsonl", input=(text_rows(tmp_path / "a.jsonl"),), data_dir=str(tmp_path / "set"))
    assert prepare(values, BYTES)["tokenizer"]["kind"] == "byte"


# ---- processes


@pytest.mark.parametrize("kind", ["text", "records", "learned"])
def test_the_result_does_not_depend_on_the_number_of_processes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 700)
    make = record_rows if kind == "records" else text_rows
    values = {"source": "jsonl", "input": (make(tmp_path / "a.jsonl"),), "shard_size": 999}
    if kind == "learned":
        values |= {"tokenizer": "bpe", "vocab_size": 300}
    pools = []
    in_pool = encode._in_pool
    monkeypatch.setattr(encode, "_in_pool", lambda *args: pools.append(args[2]) or in_pool(*args))
    for workers in (1, 2):
        run(tmp_path / f"{workers}", workers=workers, **values)
    assert pools == [2], "one run in this process, one in two others"
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 1 << 20)
    run(tmp_path / "3", **values)
    one, two, large = (contents(tmp_path / name) for name in "123")
    assert len(one) > 5
    assert one == two == large


def test_batches_come_in_order_and_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 100)
    read = 0

    def items() -> Any:
        nonlocal read
        for number in range(60):
            read += 1
            yield Item("train", f"{number:02d}" * 60)

    found = []
    for number, batch in enumerate(encode_all(items(), BYTES, None, 2)):
        assert read <= number + 9, "4 * workers batches are under way, whatever the input's size"
        found.append(BYTES.decode(batch.ids[:2]))
        assert batch.ids.dtype == np.uint16
    assert found == [f"{number:02d}" for number in range(60)]


def test_a_worker_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 100)
    before = set(multiprocessing.active_children())
    stream = encode_all((Item("train", "word " * 40) for _ in range(10_000)), BYTES, None, 2)
    next(stream)
    for worker in set(multiprocessing.active_children()) - before:
        worker.kill()
    with pytest.raises(OSError, match="fewer --workers"):
        list(stream)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_workers_end_when_their_parent_is_killed(tokenizer: str, tmp_path: Path) -> None:
    """byte: forked workers; bpe: spawned ones."""
    (tmp_path / "hold.py").write_text(
        "import itertools, multiprocessing, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from data import encode; from data.tokenizer import load_tokenizer, train_bpe\n"
        "if __name__ == '__main__':\n"
        "    encode._BATCH_CHARACTERS = 100\n"
        "    tokenizer = load_tokenizer('byte') if sys.argv[2] == 'byte' else train_bpe(['a b'], 260)\n"
        "    items = (encode.Item('train', 'a b ' * 40) for _ in itertools.count())\n"
        "    stream = encode.encode_all(items, tokenizer, None, 2)\n"
        "    next(stream)\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "hold.py"), str(ROOT), tokenizer], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in workers)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# ---- whole or not at all


@pytest.mark.parametrize("fault", ["broken input", "interrupt", "disk full"])
def test_a_failed_run_leaves_the_old_set_whole_and_nothing_else(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(text_rows(tmp_path / "a.jsonl"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text("kept")
    run(tmp_path / "set", source="jsonl", input=(str(path),))
    before = contents(tmp_path / "set")
    assert before["README.md"] == b"kept"
    other = Path(text_rows(tmp_path / "b.jsonl", seed=5))
    add = SplitWriter.add
    calls = itertools.count()

    def fail_later(*args: Any, **named: Any) -> None:
        if next(calls) == 50:
            raise KeyboardInterrupt if fault == "interrupt" else OSError(28, "No space left on device", "set")
        add(*args, **named)

    if fault == "broken input":
        other.write_text(other.read_text() + '{"text": \n')
    else:
        monkeypatch.setattr(SplitWriter, "add", fail_later)
    with pytest.raises((ValueError, OSError, KeyboardInterrupt)):
        run(tmp_path / "set", source="jsonl", input=(str(other),))
    assert contents(tmp_path / "set") == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "set"]
