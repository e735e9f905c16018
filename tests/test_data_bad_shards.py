"""Damaged token sets: each kind of damage is one line that names the file; nothing but ValueError leaves the reader.

A case damages a good set of 2 training shards (4 tokens each) with masks. Where the digest in dataset.json would give
the damage away before anything else could, it is made to agree, so that the check that is meant is the one that speaks.
"""

import builtins
import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.manifest import REMEDY
from data.shard_file import HEADER, MAGIC
from data.shards import open_dataset
from tests.token_sets import edit_manifest, overwrite, write_set

BIN, MASK, DOCS = "train_000000.bin", "train_000000.mask", "train_000000.docs"


def good_set(folder):
    documents = [[1, 2, 3], [4, 5], [6, 7, 256]]
    return write_set(folder, documents, masks=[[0, 1, 1], [0, 1], [1, 1, 1]], shard_size=4, kind="instruction")


def header(magic=MAGIC, version=1, code=2, count=4):
    return HEADER.pack(magic, version, code, count)


def body(*values, code="H"):
    return struct.pack(f"<{len(values)}{code}", *values)


GOOD = header() + body(1, 2, 3, 4)


def flip_one_bit(folder):
    overwrite(folder, BIN, GOOD[:-2] + bytes([GOOD[-2] ^ 1, GOOD[-1]]), trusted=False)


def folder_for_file(folder):
    (folder / BIN).unlink()
    (folder / BIN).mkdir()


def pipe_for_file(folder):
    (folder / BIN).unlink()
    os.mkfifo(folder / BIN)  # opening it would wait for ever


def content(name, data):
    return lambda folder: overwrite(folder, name, data, trusted=True)


def gone(name):
    return lambda folder: (folder / name).unlink()


FILES = {
    "empty": (content(BIN, b""), BIN, "has 0 bytes, expected a header of 64"),
    "header cut short": (content(BIN, GOOD[:40]), BIN, "has 40 bytes, expected a header of 64"),
    "body cut short": (content(BIN, GOOD[:-2]), BIN, "has 70 bytes, expected 72 for the 4 values"),
    "odd size": (content(BIN, GOOD + b"\0"), BIN, "has 73 bytes, expected 72"),
    "wrong magic": (content(BIN, b"NUMPYNPY" + GOOD[8:]), BIN, "begins with b'NUMPYNPY', expected b'ESPALIER'"),
    "never finished": (content(BIN, bytes(64) + GOOD[64:]), BIN, "cut short"),
    "newer version": (content(BIN, header(version=2) + GOOD[64:]), BIN, "has version 2, this program reads version 1"),
    "unknown dtype": (content(BIN, header(code=9) + GOOD[64:]), BIN, "unknown dtype code 9, expected uint16"),
    "other dtype": (content(BIN, header(code=3, count=2) + GOOD[64:]), BIN, "holds uint32, expected uint16"),
    "count one too high": (content(BIN, header(count=5) + GOOD[64:]), BIN, "has 72 bytes, expected 74"),
    "count like the size, not the manifest": (
        content(BIN, header(count=3) + GOOD[64:70]),
        BIN,
        "its header counts 3 values, dataset.json 4",
    ),
    "count that overflows": (content(BIN, header(count=2**64 - 1) + GOOD[64:]), BIN, "has 72 bytes, expected"),
    "one bit flipped": (flip_one_bit, BIN, "has changed since it was written"),
    "token over the vocabulary": (
        content(BIN, header() + body(1, 2, 3, 257)),
        BIN,
        "has token id 257, expected 0 to 256",
    ),
    "missing shard": (gone(BIN), BIN, "is missing"),
    "missing last shard": (gone("train_000001.bin"), "train_000001.bin", "is missing"),
    "missing mask": (gone(MASK), MASK, "is missing"),
    "missing documents": (gone(DOCS), DOCS, "is missing"),
    "a folder in place of a file": (folder_for_file, BIN, "is no regular file"),
    "a pipe in place of a file": (pipe_for_file, BIN, "is no regular file"),
    "mask shorter than the tokens": (
        content(MASK, header(code=1, count=3) + bytes(3)),
        MASK,
        "its header counts 3 values, dataset.json 4",
    ),
    "mask of twos": (content(MASK, header(code=1) + bytes([0, 1, 2, 1])), MASK, "has the value 2, expected 0 or 1"),
    "documents do not ascend": (
        content(DOCS, header(code=4, count=2) + body(0, 0, code="Q")),
        DOCS,
        "do not ascend",
    ),
    "a document outside": (
        content(DOCS, header(code=4, count=2) + body(0, 4, code="Q")),
        DOCS,
        "a document starts at 4, the shard has 4 tokens",
    ),
    "the first document not at 0": (
        content(DOCS, header(code=4, count=2) + body(1, 3, code="Q")),
        DOCS,
        "does not start at 0",
    ),
    "a document too few": (
        content(DOCS, header(code=4, count=1) + body(0, code="Q")),
        "dataset.json",
        "documents is 3",
    ),
    "supervised miscounted": (
        content(MASK, header(code=1) + bytes([1, 1, 1, 1])),
        "dataset.json",
        "supervised is 6, its shards hold 8",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, case):
    damage, name, message = FILES[case]
    good_set(tmp_path)
    assert open_dataset(tmp_path, "train").n_tokens == 8  # the damage is all that is wrong
    damage(tmp_path)
    check_error(tmp_path, name, message)


def edited(**changes):
    return lambda folder: edit_manifest(folder, lambda meta: meta.update(changes))


def edited_split(edit):
    return lambda folder: edit_manifest(folder, lambda meta: edit(meta["splits"]["train"]))


def text(value):
    return lambda folder: (folder / "dataset.json").write_bytes(value)


MANIFESTS = {
    "missing": (gone("dataset.json"), "is missing"),
    "empty": (text(b""), "line 1, column 1: broken JSON"),
    "broken JSON": (text(b'{\n "format": 1,\n "kind" "text"\n}'), "line 3, column 9: broken JSON"),
    "not UTF-8": (text(b'{"kind": "\xff"}'), "is not UTF-8 at byte 10"),
    "a list": (text(b"[]"), "expected a JSON object, found list"),
    "nested without end": (text(b"[" * 100_000), "broken JSON"),
    "a number of 5,000 digits": (text(b'{"format": ' + b"1" * 5000 + b"}"), "broken JSON"),
    "missing key": (lambda folder: edit_manifest(folder, lambda meta: meta.pop("vocab_size")), "vocab_size is missing"),
    "unknown format": (edited(format=2), "has format 2, this program reads format 1"),
    "format true": (edited(format=True), "format is True, expected int"),
    "unknown kind": (edited(kind="images"), "kind is 'images', expected one of text, instruction"),
    "unknown dtype": (edited(dtype="float32"), "dtype is 'float32', expected one of uint16, uint32"),
    "wrong type": (edited(vocab_size="257"), "vocab_size is '257', expected int"),
    "vocabulary over the dtype": (edited(vocab_size=70_000), "vocab_size is 70000, expected 1 to 65,536"),
    "end of text outside": (edited(eot_id=257), "eot_id is 257, expected 0 to 256"),
    "fraction not a number": (edited(val_fraction=float("nan")), "val_fraction is nan"),
    "no splits": (edited(splits={}), "splits is empty"),
    "split no object": (edited(splits={"train": []}), r"splits.train: expected an object, found list"),
    "shards no list": (edited_split(lambda train: train.update(shards={})), "shards is {}, expected list"),
    "no shards": (edited_split(lambda train: train.update(shards=[])), "its shards hold 0 tokens, expected 8"),
    "shard no object": (edited_split(lambda train: train.update(shards=[1])), r"shards[0]: expected an object"),
    "negative count": (edited_split(lambda train: train["shards"][1].update(count=-4)), r"shards[1].count is -4"),
    "tokens miscounted": (edited_split(lambda train: train.update(tokens=9)), "its shards hold 8 tokens, expected 9"),
    "more supervised than there are": (edited_split(lambda train: train.update(supervised=9)), "supervised is 9"),
    "a path out of the folder": (
        edited_split(lambda train: train["shards"][0].update(file="../secret.bin")),
        "shards[0].file is '../secret.bin', expected a plain file name",
    ),
    "an absolute path": (
        edited_split(lambda train: train["shards"][0]["docs"].update(file="/etc/passwd")),
        "docs.file",
    ),
    "a name of two lines": (edited_split(lambda train: train["shards"][0].update(file="a\nb")), "file is 'a\\nb'"),
    "no digest": (edited_split(lambda train: train["shards"][0].update(sha256="")), "sha256 is '', expected 64"),
    "a mask here and none there": (edited_split(lambda train: train["shards"][1].pop("mask")), "expected all or none"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_damaged_manifest_is_one_line_that_says_where(tmp_path, case):
    damage, message = MANIFESTS[case]
    damage(good_set(tmp_path))
    check_error(tmp_path, "dataset.json", message)


def check_error(folder, name, message):
    with pytest.raises(ValueError) as caught:
        open_dataset(folder, "train")
    line = str(caught.value)
    assert line.startswith(f"{folder / name}: ") and message in line and line.endswith(REMEDY)
    assert "\n" not in line and len(line) < 400 + len(str(folder))


@pytest.mark.parametrize("name", ["dataset.json", BIN, MASK, DOCS])
def test_a_file_without_permission_is_named(tmp_path, monkeypatch, name):
    good_set(tmp_path)
    original = builtins.open  # root may read everything, so the refusal is played

    def guarded(path, *args, **kwargs):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", guarded)
    monkeypatch.setattr("io.open", guarded)  # what pathlib calls
    check_error(tmp_path, name, "cannot be read (Permission denied)")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: there is no such folder; make the set with prepare_data\.py"):
        open_dataset(tmp_path / "nowhere", "train")


# ---- all of a kind


def test_every_flipped_bit_of_every_shard_file_is_found(tmp_path):
    good_set(tmp_path)
    tried = 0
    for path in sorted(tmp_path.glob("train_000001.*")):
        original = path.read_bytes()
        for bit in range(8 * len(original)):
            changed = bytearray(original)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=path.name):
                open_dataset(tmp_path, "train")
            tried += 1
        path.write_bytes(original)
    assert tried == 8 * ((64 + 4 * 2) + (64 + 4) + (64 + 8))
    open_dataset(tmp_path, "train")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return good_set(tmp_path_factory.mktemp("fuzz"))


@settings(max_examples=400, deadline=None)
@given(
    start=st.integers(0, 71),
    values=st.binary(min_size=1, max_size=16),
    cut=st.one_of(st.none(), st.integers(0, 90)),
    name=st.sampled_from([BIN, MASK, DOCS]),
)
def test_whatever_bytes_a_file_holds_only_value_error_leaves_the_reader(fuzzed, start, values, cut, name):
    """Bytes are overwritten, and the file cut or lengthened, with a digest that agrees: the other checks are alone."""
    good = {BIN: GOOD, MASK: header(code=1) + bytes([0, 1, 1, 0]), DOCS: header(code=4, count=2) + body(0, 3, code="Q")}
    data = bytearray(good[name])
    data[start : start + len(values)] = values
    if cut is not None:
        data = data[:cut].ljust(cut, b"\0")
    overwrite(fuzzed, name, bytes(data), trusted=True)
    try:
        tokens = open_dataset(fuzzed, "train")
    except ValueError as error:
        assert "\n" not in str(error) and (name in str(error) or "dataset.json" in str(error))
    else:  # what passes is consistent, so it can be read
        assert tokens.tokens(0, 8).max() < 257
        assert tokens.document_starts[0] == 0 and (np.diff(tokens.document_starts) > 0).all()
    finally:
        overwrite(fuzzed, name, good[name], trusted=True)


@settings(max_examples=400, deadline=None)
@given(start=st.integers(0, 2000), values=st.binary(max_size=12), remove=st.integers(0, 12))
def test_whatever_text_a_manifest_holds_only_value_error_leaves_the_reader(fuzzed, start, values, remove):
    path = fuzzed / "dataset.json"
    good = path.read_bytes()
    start %= len(good)
    path.write_bytes(good[:start] + values + good[start + remove :])
    try:
        open_dataset(fuzzed, "train")
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith(str(fuzzed))
    finally:
        path.write_bytes(good)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(value=_JSON, pick=st.integers(0, 10_000))
def test_any_field_of_a_manifest_may_hold_any_json(fuzzed, value, pick):
    path = fuzzed / "dataset.json"
    good = path.read_bytes()
    meta = json.loads(good)
    places = list(_places(meta))
    place, key = places[pick % len(places)]
    place[key] = value
    path.write_text(json.dumps(meta))
    try:
        open_dataset(fuzzed, "train")
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith(str(fuzzed))
    finally:
        path.write_bytes(good)


def _places(node):
    """Every (container, key) of a JSON tree."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    for key in keys:
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from _places(node[key])
