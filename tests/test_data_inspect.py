"""Inspect: its numbers are those of the set, and its marks stand where the mask does."""

import numpy as np
import pytest

from data.inspect import inspect_dataset
from data.prepare import prepare
from data.settings import PrepareSettings
from data.tokenizer import ByteTokenizer
from tests.token_sets import edit_manifest, write_set

BYTES = ByteTokenizer()


def record(prompt, answer):
    """Ids and mask of a prompt and its supervised answer with the end of text."""
    ids = [*BYTES.encode(prompt), *BYTES.encode(answer), BYTES.eot_id]
    return ids, [0] * len(BYTES.encode(prompt)) + [1] * (len(BYTES.encode(answer)) + 1)


def record_set(folder, records, val=()):
    pairs = [record(*each) for each in records]
    return write_set(
        folder, [ids for ids, _ in pairs], masks=[mask for _, mask in pairs], kind="instruction", val=list(val)
    )


def test_counts_lengths_and_shares(tmp_path):
    lengths = [8, 8, 9, 15, 16, 40]  # prompt of 4, answer of length - 5, end of text
    record_set(tmp_path, [("Say:", "x" * (length - 5)) for length in lengths], val=[[1, 2, 3]])
    text = inspect_dataset(tmp_path, 16, 0)
    rows = {line.split()[0]: line.split()[1:] for line in text.split("\n\n")[1].splitlines()}
    assert dict(zip(rows["split"], rows["train"])) == {
        "shards": "1",
        "documents": "6",
        "tokens": "96",
        "supervised": "75.0%",  # 72 of 96
        "mean": "16.0",
        "median": "12",
        "p95": "34",
        "max": "40",
    }
    assert rows["val"][:4] == ["1", "1", "3", "100.0%"]
    assert "instruction from test" in text and "tokenizer byte (257 ids, uint16)" in text


def test_the_histogram_counts_every_document_once(tmp_path):
    lengths = [1, 2, 3, 4, 7, 8, 8, 8, 8, 100]
    write_set(tmp_path, [np.ones(length) for length in lengths])
    lines = inspect_dataset(tmp_path, 16, 0).split("train: documents by length in tokens\n")[1].splitlines()
    bars = {}
    for line in lines[:7]:
        low, _, high, count, *bar = line.split()
        bars[int(low), int(high)] = (int(count), len("".join(bar)))
    assert bars == {
        (1, 1): (1, 10),
        (2, 3): (2, 20),
        (4, 7): (2, 20),
        (8, 15): (4, 40),
        (16, 31): (0, 0),
        (32, 63): (0, 0),
        (64, 127): (1, 10),
    }


def test_what_a_block_size_does_to_records(tmp_path):
    records = [
        ("ab", "c" * 5),  # 8 tokens, 7 slots
        ("ab", "c" * 6),  # 9 tokens: fills 8 slots
        ("ab", "c" * 7),  # 10 tokens: one supervised token is cut
        ("a" * 12, "c"),  # all of its answer is cut
    ]
    record_set(tmp_path, records)
    text = inspect_dataset(tmp_path, 8, 0)
    assert "2 (50.0%) records are truncated, 2 (50.0%) lose supervised tokens, 1 left out with none; packed" in text
    assert "packed into 3 rows, 95.8% of their slots in use" in text  # 7 + 8 + 8 of 24
    assert "3 (75.0%) records are truncated" in inspect_dataset(tmp_path, 7, 0)
    assert "0 (0.0%) records are truncated, 0 (0.0%) lose supervised tokens; packed" in inspect_dataset(tmp_path, 13, 0)
    assert "none has any left" in inspect_dataset(tmp_path, 1, 0)


def test_a_text_tells_its_windows(tmp_path):
    write_set(tmp_path, [np.ones(30), np.ones(3), np.ones(8)])
    assert "train at --block_size 16: 3 windows; 1 (33.3%) documents are longer than one" in inspect_dataset(
        tmp_path, 16, 0
    )


def test_supervised_tokens_are_marked_where_the_mask_is(tmp_path):
    record_set(tmp_path, [("Colour?\n", "grün"), ("Two?\n", "2")])
    text = inspect_dataset(tmp_path, 100, 5)
    assert "--- 0: 14 tokens, 6 supervised\nColour?\n[[grün<|endoftext|>]]" in text
    assert "--- 1: 7 tokens, 2 supervised\nTwo?\n[[2<|endoftext|>]]" in text
    assert "--- 2" not in text and "\x1b" not in text
    coloured = inspect_dataset(tmp_path, 100, 1, color=True)
    assert "Colour?\n\x1b[32mgrün<|endoftext|>\x1b[0m" in coloured and "[[" not in coloured


def sections(text, kind):
    return [line for line in text.split("\n\n") if line.startswith(kind)]


def test_records_that_teach_nothing_or_no_end_are_warned_of(tmp_path):
    good, (cut, mask) = record("Say:", "yes"), record("Say:", "no")
    mute = (cut, [0] * len(cut))
    endless = (cut[:-1], mask[:-1])
    both = [good, good, mute, endless]
    write_set(tmp_path / "some", [ids for ids, _ in both], masks=[mask for _, mask in both], kind="instruction")
    found = sections(inspect_dataset(tmp_path / "some", 16, 0), "train: warning")
    assert len(found) == 2
    assert "1 (25.0%) documents have no supervised token" in found[0]
    assert "1 (25.0%) documents teach no end: none of <|endoftext|> is supervised" in found[1]
    write_set(tmp_path / "all", [endless[0]] * 3, masks=[endless[1]] * 3, kind="instruction")
    assert "no end token is learnt in any document" in inspect_dataset(tmp_path / "all", 16, 0)
    record_set(tmp_path / "none", [("Say:", "yes")] * 3)
    assert "warning" not in inspect_dataset(tmp_path / "none", 16, 0)


def test_warnings_do_not_depend_on_the_blocks_that_are_looked_at(tmp_path, monkeypatch):
    texts = ["yes", "no" * 20, "y"] * 20
    parts = [record("Say:", text) for text in texts]
    masks = [mask if number % 3 else [0] * len(mask) for number, (_, mask) in enumerate(parts)]
    write_set(tmp_path, [ids for ids, _ in parts], masks=masks, kind="instruction")
    whole = inspect_dataset(tmp_path, 64, 0)
    assert "20 (33.3%) documents have no supervised token" in whole
    monkeypatch.setattr("data.inspect._BLOCK", 30)
    assert inspect_dataset(tmp_path, 64, 0) == whole


def test_an_end_that_is_no_token_of_the_vocabulary_is_found(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 3)
    values = {"source": "jsonl", "input": (str(tmp_path / "a.jsonl"),), "tokenizer": "byte", "val_fraction": 0.0}
    for template, warns in (("chatml", True), ("dolly", False)):
        folder = tmp_path / template
        prepare(PrepareSettings(**values, prompt_template=template, data_dir=str(folder)))
        assert ("no end token is learnt" in inspect_dataset(folder, 64, 0)) is warns


def test_what_padding_is_stands_there(tmp_path):
    record_set(tmp_path / "a", [("Say:", "yes")])
    (told,) = sections(inspect_dataset(tmp_path / "a", 16, 0), "padding")
    assert "<|endoftext|> (id 256), which is never supervised" in told and "The same token ends answers" in told
    write_set(tmp_path / "b", [[1, 2, 3]])
    assert "padding:" not in inspect_dataset(tmp_path / "b", 16, 0)


def test_pairs_are_shown_as_pairs(tmp_path):
    sides = [record("Colour?\n", answer) for answer in ("blue", "red, or not", "green", "no")]
    write_set(tmp_path, [ids for ids, _ in sides], masks=[mask for _, mask in sides], kind="preference")
    text = inspect_dataset(tmp_path, 32, 5)
    assert "The first pairs of train ([[marked]] = supervised)" in text
    assert (
        "--- 0: 8 tokens of prompt, 5 chosen, 12 rejected\nColour?\n\n"
        "chosen: [[blue<|endoftext|>]]\nrejected: [[red, or not<|endoftext|>]]" in text
    )
    assert "--- 1: 8 tokens of prompt, 6 chosen, 3 rejected" in text and "--- 2" not in text
    assert "train at --block_size 32: 2 pairs" in text
    assert "chosen: [[blue]] ... (1 more tokens)" in inspect_dataset(tmp_path, 12, 1)
    assert "no answer of its 2 pairs fits --block_size 2" in inspect_dataset(tmp_path, 2, 0)
    coloured = inspect_dataset(tmp_path, 32, 1, color=True)
    assert "chosen: \x1b[32mblue<|endoftext|>\x1b[0m\nrejected: \x1b[31mred, or not" in coloured


def test_prompts_have_nothing_supervised_and_no_warning(tmp_path):
    write_set(tmp_path, [[*b"Add 1.\n"], [*b"Add 22.\n"]], masks=[[0] * 7, [0] * 8], kind="prompts")
    text = inspect_dataset(tmp_path, 7, 2)
    assert "train at --block_size 7: 2 prompts, 1 with the beginning cut at 7 tokens" in text
    assert "--- 0: 7 tokens, 0 supervised\nAdd 1.\n" in text and "warning" not in text and "[[m" in text


def test_long_records_are_shown_up_to_the_block_size(tmp_path):
    record_set(tmp_path, [("Long?", "abcdefgh")])
    assert "Long?[[abc]] ... (6 more tokens)" in inspect_dataset(tmp_path, 8, 1)


def test_text_without_a_mask_is_shown_as_it_is(tmp_path):
    write_set(tmp_path, [[*b"one\ttwo\n", 256]])
    text = inspect_dataset(tmp_path, 16, 1)
    assert "(every token is supervised)" in text and "one\ttwo\n<|endoftext|>" in text and "[[" not in text


def test_data_does_not_steer_the_terminal(tmp_path):
    write_set(tmp_path, [list(b"\x1b[2Jboo\r\x07")])
    text = inspect_dataset(tmp_path, 16, 1)
    assert "\\x1b[2Jboo\\x0d\\x07" in text and "\x1b" not in text and "\r" not in text


def test_a_damaged_set_is_the_readers_error(tmp_path):
    write_set(tmp_path, [[1, 2, 3]])
    edit_manifest(tmp_path, lambda meta: meta.pop("seed"))
    with pytest.raises(ValueError, match=r"dataset\.json: seed is missing"):
        inspect_dataset(tmp_path, 16, 1)


@pytest.mark.parametrize(("block_size", "n_records", "flag"), [(0, 1, "--block_size"), (8, -1, "--records")])
def test_impossible_settings_are_refused(tmp_path, block_size, n_records, flag):
    write_set(tmp_path, [[1, 2, 3]])
    with pytest.raises(ValueError, match=flag):
        inspect_dataset(tmp_path, block_size, n_records)
