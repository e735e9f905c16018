"""GGUF headers: what is read equals what was written, and only FormatError leaves the reader for what is wrong."""

import random
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from formats.errors import FormatError
from formats.gguf_header import TENSOR_TYPES, read_gguf_header

ROOT = Path(__file__).resolve().parent.parent
U32, F32, STRING, ARRAY = 4, 6, 8, 9


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def array(kind, values):
    return struct.pack("<IQ", kind, len(values)) + b"".join(values)


def tensor(name, dims, kind, offset):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


GOOD_KEYS = (
    key("general.architecture", STRING, text("llama")),
    key("llama.block_count", U32, struct.pack("<I", 2)),
    key("llama.eps", F32, struct.pack("<f", 0.5)),
    key("flag", 7, b"\x01"),
    key("tokens", ARRAY, array(STRING, [text("a"), text("é🎉"), text("")])),
    key("scores", ARRAY, array(F32, [struct.pack("<f", -1.0), struct.pack("<f", 2.0)])),
    key("nested", ARRAY, array(ARRAY, [array(5, [struct.pack("<i", -3)]), array(STRING, [text("x")])])),
)
GOOD_TENSORS = (tensor("a", (32, 3), 8, 0), tensor("b", (5,), 0, 128), tensor("c", (4, 2, 3), 1, 160))


def gguf_file(keys=GOOD_KEYS, tensors=GOOD_TENSORS, version=3, counts=None, data=160 + 48):
    counts = counts or (len(tensors), len(keys))
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + b"\0" * data


@pytest.fixture
def write(tmp_path):
    def to_file(content):
        path = tmp_path / "m.gguf"
        path.write_bytes(content)
        return path

    return to_file


@pytest.mark.parametrize("version", [2, 3])
def test_reads_what_stands_there(write, version):
    content = gguf_file(version=version)
    header = read_gguf_header(write(content))
    assert header.metadata == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.eps": 0.5,
        "flag": True,
        "tokens": ("a", "é🎉", ""),
        "scores": (-1.0, 2.0),
        "nested": ((-3,), ("x",)),
    }
    first = len(content) - 208
    places = {name: (t.type, t.shape, t.start - first, t.stop - first) for name, t in header.tensors.items()}
    assert places == {
        "a": ("Q8_0", (3, 32), 0, 102),
        "b": ("F32", (5,), 128, 148),
        "c": ("F16", (3, 2, 4), 160, 208),
    }


def test_tensor_types_are_those_of_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    for number, (name, block, size) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (block, size))


def alignment(value, kind=U32):
    return (key("general.alignment", kind, value),)


BAD = {
    "empty": (b"", "no GGUF file"),
    "magic": (b"GGML" + gguf_file()[4:], "no GGUF file"),
    "version 1": (gguf_file(version=1), "version 1"),
    "big-endian": (gguf_file(version=3 << 24), "big-endian"),
    "cut in the counts": (gguf_file()[:20], "needs"),
    "tensors without end": (gguf_file(counts=(1 << 60, 7)), "claims"),
    "keys without end": (gguf_file(counts=(3, 1 << 63)), "claims"),
    "string past the end": (gguf_file(keys=[struct.pack("<Q", 1 << 62) + b"abcdefgh"]), "needs"),
    "array past the end": (gguf_file(keys=[key("a", ARRAY, struct.pack("<IQ", F32, 1 << 61))]), "needs"),
    "strings past the end": (gguf_file(keys=[key("a", ARRAY, struct.pack("<IQ", STRING, 1 << 40))]), "needs"),
    "string of an array past the end": (
        gguf_file(keys=[key("a", ARRAY, array(STRING, [text("x"), struct.pack("<Q", 1 << 50)]))]),
        "needs",
    ),
    "nested arrays past the end": (gguf_file(keys=[key("a", ARRAY, struct.pack("<IQ", ARRAY, 1 << 40))]), "needs"),
    "nested too deep": (gguf_file(keys=[key("a", ARRAY, array(ARRAY, [array(ARRAY, [array(0, [])])]))]), "deeper"),
    "value type": (gguf_file(keys=[key("a", 13, b"\0" * 8)]), "unknown value type 13"),
    "value type of an array": (gguf_file(keys=[key("a", ARRAY, array(77, []))]), "unknown value type 77"),
    "truth value": (gguf_file(keys=[key("a", 7, b"\x02")]), "truth value of 2"),
    "truth values": (gguf_file(keys=[key("a", ARRAY, array(7, [b"\x01", b"\x03"]))]), "truth value of 3"),
    "text": (gguf_file(keys=[key("a", STRING, text(b"\xff"))]), "not UTF-8"),
    "text in an array": (gguf_file(keys=[key("a", ARRAY, array(STRING, [text("b"), text(b"\xc3")]))]), "not UTF-8"),
    "key twice": (gguf_file(keys=GOOD_KEYS[:1] * 2), "twice"),
    "key empty": (gguf_file(keys=[key("", U32, b"\0" * 4)]), "empty"),
    "name twice": (gguf_file(tensors=[tensor("a", (8,), 0, 0), tensor("a", (8,), 0, 32)]), "twice"),
    "no dimension": (gguf_file(tensors=[tensor("a", (), 0, 0), tensor("b", (8,), 0, 0)]), "0 dimensions"),
    "five dimensions": (gguf_file(tensors=[tensor("a", (1,) * 5, 0, 0)]), "5 dimensions"),
    "a dimension of 0": (gguf_file(tensors=[tensor("a", (8, 0), 0, 0)]), "shape"),
    "overflow": (gguf_file(tensors=[tensor("a", (1 << 62, 1 << 62, 4), 0, 0)]), "ends at byte"),
    "tensor type": (gguf_file(tensors=[tensor("a", (8,), 5, 0)]), "unknown type 5"),
    "rows of broken blocks": (gguf_file(tensors=[tensor("a", (33,), 8, 0)]), "multiples of 32"),
    "offset past the end": (gguf_file(tensors=[tensor("a", (8,), 0, 1 << 50)]), "ends at byte"),
    "tensor past the end": (gguf_file(tensors=[tensor("a", (64,), 0, 0)], data=252), "ends at byte"),
    "misaligned": (gguf_file(tensors=[tensor("a", (8,), 0, 4)]), "no multiple of 32"),
    "overlap": (gguf_file(tensors=[tensor("a", (8,), 0, 32), tensor("b", (16,), 0, 0)]), "'b' and 'a' overlap"),
    "alignment 0": (gguf_file(keys=alignment(struct.pack("<I", 0))), "general.alignment"),
    "alignment 48": (gguf_file(keys=alignment(struct.pack("<I", 48))), "general.alignment"),
    "alignment text": (gguf_file(keys=alignment(text("32"), STRING)), "general.alignment"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(write, case):
    content, finding = BAD[case]
    with pytest.raises(FormatError, match=finding) as caught:
        read_gguf_header(write(content))
    assert "m.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        read_gguf_header(tmp_path / "none.gguf")


def mutated(content, rng):
    """Bits flipped, numbers replaced by extreme ones, pieces cut out, repeated or torn off."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            extreme = rng.choice([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data), len(data) * 8, 5, 12])
            data[place : place + 8] = struct.pack("<Q", extreme)
        elif kind == 2:
            del data[place : place + rng.randint(1, 16)]
        elif kind == 3:
            data[place:place] = data[place : place + rng.randint(1, 40)]
        else:
            del data[place:]
        if not data:
            break
    return bytes(data)


def test_only_format_errors_leave_the_reader_for_10000_mutated_headers(tmp_path):
    rng, content, path = random.Random(0), gguf_file(), tmp_path / "m.gguf"
    refused = 0
    for _ in range(10_000):
        path.write_bytes(mutated(content, rng))
        size = path.stat().st_size
        try:
            header = read_gguf_header(path)
        except FormatError:
            refused += 1
        else:
            assert all(0 <= t.start < t.stop <= size for t in header.tensors.values())
    assert refused > 5000


def test_a_large_vocabulary_is_read_in_under_a_second_and_across_the_first_buffer(write):
    tokens = [f"token{i:09d}" for i in range(300_000)]  # 6.6 MB of header
    path = write(gguf_file(keys=[*GOOD_KEYS[:1], key("t", ARRAY, array(STRING, [text(t) for t in tokens]))]))
    start = time.process_time()
    assert list(read_gguf_header(path).metadata["t"]) == tokens
    assert time.process_time() - start < 1.0


def test_a_lying_count_costs_no_memory(write):
    path = write(gguf_file(keys=[key("a", ARRAY, struct.pack("<IQ", STRING, 131_000))], data=1 << 20))
    tracemalloc.start()
    read_or_refuse(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def read_or_refuse(path):
    try:
        return read_gguf_header(path)
    except FormatError:
        return None


def test_a_header_without_end_is_refused_before_it_is_read_whole(tmp_path):
    path = tmp_path / "m.gguf"
    with open(path, "wb") as file:  # a sparse file: 1 GiB, of which one page is written
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("a", STRING, struct.pack("<Q", 1 << 29)))
        file.truncate(1 << 30)
    with pytest.raises(FormatError, match="more than 64 MiB"):
        read_gguf_header(path)


def test_needs_neither_torch_nor_numpy():
    code = "import sys, formats.gguf_header; print([m for m in ('torch', 'numpy', 'gguf') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
