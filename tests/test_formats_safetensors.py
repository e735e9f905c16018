"""The safetensors reader: equal to the library on whole files, and nothing but FormatError on damaged ones."""

import json
import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from formats.errors import FormatError
from formats.safetensors_file import TensorEntry, read_blocks, read_header

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def whole(path, name, of):
    return torch.cat([rows.clone() for _, rows in read_blocks(path, name, of)])


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tensors=st.lists(st.tuples(shapes, st.sampled_from(sorted(DTYPES))), max_size=5))
def test_reads_what_the_library_writes(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    saved = {f"t.{i}": torch.randn(shape).to(DTYPES[dtype]) for i, (shape, dtype) in enumerate(tensors)}
    save_file(saved, path, metadata={"format": "pt"})
    entries = read_header(path)
    assert set(entries) == set(saved)
    for name, tensor in saved.items():
        assert entries[name].shape == tuple(tensor.shape) and DTYPES[entries[name].dtype] == tensor.dtype
        if tensor.numel():
            assert torch.equal(whole(path, name, entries[name]).view(tensor.shape), tensor)


def test_a_tensor_comes_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("formats.safetensors_file._BLOCK_BYTES", 100)
    tensor = torch.randn(23, 7)  # 28 bytes a row: 3 rows a block
    save_file({"w": tensor}, tmp_path / "m.safetensors")
    of = read_header(tmp_path / "m.safetensors")["w"]
    blocks = [(first, rows.clone()) for first, rows in read_blocks(tmp_path / "m.safetensors", "w", of)]
    assert [first for first, _ in blocks] == list(range(0, 23, 3))
    assert torch.equal(torch.cat([rows for _, rows in blocks]), tensor)


def test_metadata_and_holes_are_allowed(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "a": entry(offsets=(4, 12)), "b": entry(shape=(0, 9), offsets=(0, 0))}
    entries = read_header(write(tmp_path / "m", header, b"x" * 12))
    start = (tmp_path / "m").stat().st_size - 12
    assert entries["a"] == TensorEntry("F32", (2,), start + 4, start + 12) and entries["b"].shape == (0, 9)


@pytest.mark.parametrize(
    "header, message",
    [
        (b"", "no valid JSON"),
        (b"[]", "JSON list"),
        (b"{" * 5000, "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b"\xff{}", "no valid JSON"),
        (b'{"a": {}, "a": {}}', "'a' stands twice"),
        (b'{"a":' + b"9" * 5000 + b"}", "no valid JSON"),
        ({"__metadata__": {"a": 1}}, "__metadata__"),
        ({"a": 3}, "expected dtype, shape and data_offsets"),
        ({"a": {**entry(), "more": 1}}, "expected dtype, shape and data_offsets"),
        ({"a": entry(dtype="F31")}, "dtype 'F31'"),
        ({"a": entry(dtype="")}, "dtype ''"),
        ({"a": {**entry(), "dtype": ["F32"]}}, "has dtype"),
        ({"a": entry(shape=(-2,))}, r"shape \[-2\]"),
        ({"a": entry(shape=(2.0,))}, r"shape \[2.0\]"),
        ({"a": entry(shape=(True, 2))}, r"shape \[True, 2\]"),
        ({"a": entry(shape=(1,) * 8 + (2,))}, "at most 8"),
        ({"a": entry(shape=(1 << 63, 0), offsets=(0, 0))}, "at most 8 whole numbers"),
        ({"a": {**entry(), "shape": "22"}}, "shape 22"),
        ({"a": entry(shape=(1 << 40, 1 << 40))}, "needs"),
        ({"a": entry(shape=(3,))}, "needs 12 bytes, its offsets span 8"),
        ({"a": entry(offsets=(0, 8, 8))}, "two whole numbers"),
        ({"a": entry(offsets=(8, 0))}, "bytes 8..0"),
        ({"a": entry(offsets=(8, 16))}, "bytes 8..16 of 12"),
        ({"a": entry(offsets=(-8, 0))}, "two whole numbers"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, "'a' and 'b' overlap"),
        ({"a": entry(), "b": entry()}, "overlap"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, message):
    path = write(tmp_path / "m.safetensors", header, b"x" * 12)
    with pytest.raises(FormatError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_wrong_lengths_and_special_files_are_refused(tmp_path):
    for length in (3, 1 << 30, (1 << 64) - 1):
        with pytest.raises(FormatError):
            read_header(write(tmp_path / "m", {"a": entry()}, b"x" * 8, length=length))
    (tmp_path / "short").write_bytes(b"1234567")
    with pytest.raises(FormatError, match="has 7 bytes"):
        read_header(tmp_path / "short")
    with pytest.raises(FormatError, match="regular file"):
        read_header(Path("/dev/zero"))
    with pytest.raises(FormatError, match="regular file"):
        read_header(tmp_path)


def test_too_many_tensors_are_refused_before_they_are_parsed(tmp_path):
    path = write(tmp_path / "m", b'{"a":{},' + b'"":{},' * 1_000_000 + b'"b":{}}')
    with pytest.raises(FormatError, match="more than 1,000,000 tensors"):
        read_header(path)


def test_a_file_cut_while_it_is_read_and_integers_are_refused(tmp_path):
    path = write(tmp_path / "m", {"a": entry(), "n": entry("I32", offsets=(8, 16))}, b"x" * 16)
    entries = read_header(path)
    with pytest.raises(FormatError, match="'n' is stored as I32"):
        list(read_blocks(path, "n", entries["n"]))
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(FormatError, match="ended inside tensor 'a'"):
        list(read_blocks(path, "a", entries["a"]))


def test_a_header_is_read_without_torch():
    check = "import sys, formats.safetensors_file; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def mutated(rng, good):
    """One damaged copy of a file: flipped, cut, repeated or inserted bytes, another length, or an edit of its JSON."""
    data = bytearray(good)
    for _ in range(rng.randint(1, 4)):
        kind, place = rng.randrange(6), rng.randrange(len(data))
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[place : place + rng.randint(1, 40)]
        elif kind == 3:
            data[place:place] = data[place : place + rng.randint(1, 60)]
        elif kind == 4:
            data[:8] = struct.pack("<Q", rng.choice([0, 1, len(data), 1 << 40, (1 << 64) - 1, rng.randrange(400)]))
        else:
            words = [b"{", b"}", b"[", b"-1", b"1e9", b"99999999999999999999", b"null", b"true", b'"a"', b",", b'"F16"']
            data[place:place] = rng.choice(words)
        if not data:
            return b""
    return bytes(data)


def edited(rng, header):
    """The header with one number, name or type replaced, still valid JSON."""
    name = rng.choice([key for key in header if key != "__metadata__"])
    value = rng.choice([0, -1, 1, 3, 1 << 31, 1 << 62, 1 << 64, 0.5, None, "F32", "F64", "", [], {}, [2, 3], True])
    field = rng.choice(["dtype", "shape", "data_offsets", "name", "item"])
    changed = json.loads(json.dumps(header))
    if field == "name":
        changed[str(value)] = changed.pop(name)
    elif field == "item":
        numbers = changed[name][rng.choice(["shape", "data_offsets"])]
        numbers[rng.randrange(len(numbers))] = value
    else:
        changed[name][field] = value
    return json.dumps(changed).encode()


def test_10_000_damaged_files_raise_nothing_but_format_error(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": torch.randn(4, 3), "b": torch.randn(5).half(), "c": torch.zeros(2, 2, 2)}, path)
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    tracemalloc.start()
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    for number in range(10_000):
        if number % 2:
            path.write_bytes(mutated(rng, good))
        else:
            write(path, edited(rng, header), data)
        try:
            entries = read_header(path)
        except FormatError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        size = path.stat().st_size
        for name, of in entries.items():
            assert 0 <= of.start <= of.stop <= size
            if of.dtype in DTYPES and of.stop > of.start:
                assert whole(path, name, of).numel() * DTYPES[of.dtype].itemsize == of.stop - of.start
    assert outcomes["refused"] > 7_000 and outcomes["read"] > 300, outcomes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000, peak  # the files have 400 bytes
