"""Token shards: what is written is what is read, whole or not at all, with few open files and constant memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import shard_file
from data.manifest import read_manifest, resolve_data_dir, staged_folder, write_manifest
from data.shard_file import HEADER, MAGIC, U2, MappedFiles
from data.shards import SplitWriter, open_dataset, token_dtype
from tests.token_sets import manifest, open_set, write_set, write_split

REPOSITORY = Path(__file__).resolve().parent.parent


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    shard_size=st.integers(1, 50),
    vocab_size=st.sampled_from([257, 50257, 65536, 65537, 151936]),
    slices=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=5),
)
def test_the_stream_is_the_documents_in_order_wherever_shards_end(
    tmp_path_factory, lengths, shard_size, vocab_size, slices
):
    rng = np.random.default_rng(sum(lengths))
    documents = [rng.integers(0, vocab_size, length) for length in lengths]
    documents[0][0] = vocab_size - 1  # the largest id fits the dtype
    masks = [rng.integers(0, 2, length) for length in lengths]
    folder = tmp_path_factory.mktemp("set")
    tokens = open_set(folder, documents, masks=masks, shard_size=shard_size, vocab_size=vocab_size)
    stream, mask = np.concatenate(documents), np.concatenate(masks)

    counts = [shard["count"] for shard in tokens.meta["splits"]["train"]["shards"]]
    assert counts == [shard_size] * (len(counts) - 1) + [len(stream) - shard_size * (len(counts) - 1)]
    assert (tokens.n_tokens, tokens.n_documents, tokens.n_supervised) == (len(stream), len(lengths), mask.sum())
    assert tokens.document_starts.tolist() == [0, *np.cumsum(lengths).tolist()]
    for low, high in [(0.0, 1.0), *slices]:
        start, stop = sorted((round(low * len(stream)), round(high * len(stream))))
        np.testing.assert_array_equal(tokens.tokens(start, stop), stream[start:stop])
        np.testing.assert_array_equal(tokens.mask(start, stop), mask[start:stop])
    assert tokens.tokens(0, 1).dtype == np.int64 and tokens.mask(0, 1).dtype == np.uint8


def test_the_header_is_64_bytes_little_endian(tmp_path):
    write_set(tmp_path, [[1, 2, 3], [256]])
    raw = (tmp_path / "train_000000.bin").read_bytes()
    assert raw[:24] == MAGIC + (1).to_bytes(4, "little") + (2).to_bytes(4, "little") + (4).to_bytes(8, "little")
    assert raw[24:64] == bytes(40)
    assert raw[64:] == bytes([1, 0, 2, 0, 3, 0, 0, 1])
    assert (tmp_path / "train_000000.docs").read_bytes()[64:] == (0).to_bytes(8, "little") + (3).to_bytes(8, "little")
    assert not (tmp_path / "train_000000.mask").exists()


def test_a_document_may_be_added_in_pieces_and_span_shards(tmp_path):
    writer = SplitWriter(tmp_path, "train", dtype=U2, shard_size=4, with_mask=False, vocab_size=257)
    writer.add(np.arange(3))
    writer.add(np.arange(3, 13), new_document=False)
    writer.add(np.array([], dtype=int), new_document=False)
    writer.add(np.arange(13, 15))
    entry = writer.close()
    write_manifest(tmp_path, manifest({"train": entry}))
    tokens = open_dataset(tmp_path, "train")
    assert tokens.document_starts.tolist() == [0, 13, 15]
    assert tokens.tokens(0, 15).tolist() == list(range(15))
    assert entry["supervised"] == 15 and tokens.mask(2, 5).tolist() == [1, 1, 1]  # no mask: all count


@pytest.mark.parametrize(
    ("ids", "mask", "options", "message"),
    [
        ([5, 257], [0, 1], {}, "token id 257, expected 0 to 256"),
        ([-1, 5], [0, 1], {}, "token id -1"),
        ([], [], {}, "no tokens"),
        ([1], [1], {"new_document": False}, "must begin a document"),
        ([1, 2], [1], {}, "mask of 1 values"),
        ([1, 2], [1, 2], {}, "must hold 0 or 1"),
        ([1, 2], None, {}, "expected a mask"),
    ],
)
def test_the_writer_refuses_what_no_reader_could_use(tmp_path, ids, mask, options, message):
    writer = SplitWriter(tmp_path, "train", dtype=U2, shard_size=4, with_mask=True, vocab_size=257)
    with pytest.raises(ValueError, match=message):
        writer.add(np.array(ids, dtype=int), None if mask is None else np.array(mask), **options)


def test_the_writer_refuses_a_dtype_that_is_too_narrow(tmp_path):
    with pytest.raises(ValueError, match="uint16 does not hold"):
        SplitWriter(tmp_path, "train", dtype=U2, shard_size=4, with_mask=False, vocab_size=65537)
    assert [token_dtype(size).name for size in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]


def test_equal_sets_have_equal_fingerprints_and_one_changed_mask_another(tmp_path):
    documents = [[1, 2, 3], [4, 5]]
    first = open_set(tmp_path / "a", documents, masks=[[0, 1, 1], [0, 1]])
    again = open_set(tmp_path / "b", documents, masks=[[0, 1, 1], [0, 1]])
    other = open_set(tmp_path / "c", documents, masks=[[0, 1, 1], [1, 1]])
    bare = open_set(tmp_path / "d", documents)
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, other.fingerprint, bare.fingerprint}) == 3


def test_a_set_that_has_settled_is_read_through_once_a_process(tmp_path, monkeypatch):
    write_set(tmp_path, [list(range(100))], shard_size=30)
    reads = []
    original = shard_file._read_through

    def counted(*args):
        reads.append(args)
        return original(*args)

    monkeypatch.setattr(shard_file, "_read_through", counted)
    open_dataset(tmp_path, "train")
    open_dataset(tmp_path, "train")
    assert len(reads) == 16  # just written: the clock of the file system may be too coarse to show another change
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    open_dataset(tmp_path, "train")
    open_dataset(tmp_path, "train")
    assert len(reads) == 24
    os.utime(tmp_path / "train_000000.bin", (2, 2))
    open_dataset(tmp_path, "train")
    assert len(reads) == 25


def test_reading_many_shards_keeps_few_files_open(tmp_path):
    tokens = open_set(tmp_path, [np.arange(2000) % 257], shard_size=10, masks=[np.ones(2000)])
    assert len(tokens.meta["splits"]["train"]["shards"]) == 200
    handles = Path("/proc/self/fd")
    before = len(list(handles.iterdir())) if handles.exists() else 0
    for _ in range(2):
        np.testing.assert_array_equal(tokens.tokens(0, 2000), np.arange(2000) % 257)
        tokens.mask(0, 2000)
        assert len(tokens._files._maps) == MappedFiles.MAX_OPEN
        if handles.exists():
            assert len(list(handles.iterdir())) - before <= MappedFiles.MAX_OPEN


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see its own memory")
def test_memory_does_not_grow_with_what_was_read(tmp_path):
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))  # KiB

    count = 24 << 20  # 48 MB
    (tmp_path / "train_000000.bin").write_bytes(HEADER.pack(MAGIC, 1, 2, count) + bytes(2 * count))
    (tmp_path / "train_000000.docs").write_bytes(HEADER.pack(MAGIC, 1, 4, 1) + bytes(8))
    shard = {"file": "train_000000.bin", "count": count, "sha256": "0" * 64}
    shard["docs"] = {"file": "train_000000.docs", "sha256": "0" * 64}
    split = {"tokens": count, "documents": 1, "supervised": count, "shards": [shard]}
    write_manifest(tmp_path, manifest({"train": split}))
    tokens = open_dataset(tmp_path, "train", verify="size")
    tokens.tokens(0, 1024)
    before = resident()
    for start in range(0, count - 1024, count // 1000):
        tokens.tokens(start, start + 1024)
    assert resident() - before < 8 << 10


def test_a_shard_that_changes_under_a_running_program_is_an_error(tmp_path):
    tokens = open_set(tmp_path, [np.arange(90)], shard_size=30)
    assert tokens.tokens(0, 3).tolist() == [0, 1, 2]
    second = tmp_path / "train_000001.bin"
    second.write_bytes(second.read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"train_000001\.bin: has changed since this program opened it"):
        tokens.tokens(25, 35)
    (tmp_path / "train_000002.bin").unlink()
    with pytest.raises(ValueError, match=r"train_000002\.bin: cannot be read any more"):
        tokens.tokens(60, 61)


def test_verify_size_reads_headers_only(tmp_path):
    write_set(tmp_path, [np.arange(90)], shard_size=30)
    path = tmp_path / "train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x07\x00")
    assert open_dataset(tmp_path, "train", verify="size").tokens(59, 60).tolist() == [7]
    with pytest.raises(ValueError, match="has changed"):
        open_dataset(tmp_path, "train")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train_000001\.bin: has 122 bytes, expected 124"):
        open_dataset(tmp_path, "train", verify="size")


@pytest.mark.slow
def test_ten_thousand_shards_open_and_read_through_sixteen_handles(tmp_path):
    tokens = open_set(tmp_path, [np.arange(10_000 * 512) % 257], shard_size=512)
    assert len(tokens.meta["splits"]["train"]["shards"]) == 10_000
    before = len(os.listdir("/proc/self/fd"))
    for start in range(0, tokens.n_tokens - 1025, 5_000):
        assert tokens.tokens(start, start + 1025)[0] == start % 257
    assert len(os.listdir("/proc/self/fd")) - before <= 16


# ---- whole or not at all


def build(folder, documents):
    with staged_folder(folder) as staging:
        write_set(staging, documents)


def test_a_set_takes_the_place_of_the_old_one_and_keeps_its_readme(tmp_path):
    target = tmp_path / "set"
    target.mkdir()
    (target / "README.md").write_text("what goes here")
    build(target, [[1, 2]])
    build(target, [[3, 4, 5]])
    assert open_dataset(target, "train").tokens(0, 3).tolist() == [3, 4, 5]
    assert (target / "README.md").read_text() == "what goes here"
    assert os.listdir(tmp_path) == ["set"]


def test_a_run_that_fails_leaves_the_old_set_and_nothing_else(tmp_path):
    target = tmp_path / "set"
    build(target, [[1, 2]])
    with pytest.raises(RuntimeError, match="half way"), staged_folder(target) as staging:
        write_split(staging, "train", [[9, 9]], None, 10, 257)
        raise RuntimeError("half way")
    assert open_dataset(target, "train").tokens(0, 2).tolist() == [1, 2]
    assert os.listdir(tmp_path) == ["set"]


def test_files_that_are_no_sets_are_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds 'thesis\.tex'"):
        build(tmp_path, [[1, 2]])
    with pytest.raises(ValueError, match="is a file"):
        build(tmp_path / "thesis.tex", [[1, 2]])
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_killed_run_leaves_no_set_and_the_next_one_clears_up(tmp_path):
    target = tmp_path / "set"
    script = (
        "import os, sys; from pathlib import Path; from data.manifest import staged_folder\n"
        "with staged_folder(Path(sys.argv[1])) as staging:\n"
        "    (staging / 'train_000000.bin').write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(target)], cwd=REPOSITORY)
    assert killed.returncode == -9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".tmp-set-") and os.listdir(tmp_path / left) == ["train_000000.bin"]
    with pytest.raises(ValueError, match="no such folder"):
        open_dataset(target, "train")
    build(target, [[1, 2]])
    assert os.listdir(tmp_path) == ["set"]


def test_the_folder_of_a_run_that_lives_is_left_alone(tmp_path):
    target = tmp_path / "set"
    with staged_folder(target) as staging:
        write_set(staging, [[1, 2]])
        build(tmp_path / "set", [[3, 4]])  # a second run, meanwhile
        assert (staging / "dataset.json").exists()
        assert open_dataset(target, "train").tokens(0, 2).tolist() == [3, 4]
    assert open_dataset(target, "train").tokens(0, 2).tolist() == [1, 2]


def test_an_interrupt_as_soon_as_the_folder_is_there_leaves_none(tmp_path):
    with mock.patch("fcntl.flock", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        build(tmp_path / "set", [[1, 2]])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_leads_to_the_set(tmp_path, there):
    (tmp_path / "big").mkdir()
    (tmp_path / "set").symlink_to(tmp_path / "big" / "real")
    if there:
        build(tmp_path / "big" / "real", [[1, 2]])
    build(tmp_path / "set", [[3, 4]])
    assert (tmp_path / "set").is_symlink() and os.listdir(tmp_path / "big") == ["real"]
    assert open_dataset(tmp_path / "big" / "real", "train").tokens(0, 2).tolist() == [3, 4]


def test_an_interrupt_between_the_two_renames_leaves_the_old_set(tmp_path):
    target = tmp_path / "set"
    build(target, [[1, 2]])
    rename = os.rename

    def interrupted(source, to):
        if Path(to) == target and not str(source).endswith("-old"):
            raise KeyboardInterrupt
        rename(source, to)

    with mock.patch("os.rename", interrupted), pytest.raises(KeyboardInterrupt):
        build(target, [[3, 4]])
    assert open_dataset(target, "train").tokens(0, 2).tolist() == [1, 2]
    assert os.listdir(tmp_path) == ["set"]


def test_a_set_moved_aside_by_a_killed_run_comes_back(tmp_path):
    target = tmp_path / "set"
    build(target, [[1, 2]])
    os.rename(target, tmp_path / ".tmp-set-abcd1234-old")  # killed between the two renames
    (tmp_path / ".tmp-set-more-abcd1234").mkdir()  # of another set, named set-more
    with pytest.raises(RuntimeError), staged_folder(target):
        raise RuntimeError
    assert open_dataset(target, "train").tokens(0, 2).tolist() == [1, 2]
    assert sorted(os.listdir(tmp_path)) == [".tmp-set-more-abcd1234", "set"]


# ---- names and splits


def test_a_bare_name_means_a_folder_under_data_unless_such_a_path_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_data_dir("dolly15k") == REPOSITORY / "data" / "dolly15k"
    assert resolve_data_dir("some/where") == Path("some/where")
    assert resolve_data_dir(tmp_path / "set") == tmp_path / "set"
    (tmp_path / "dolly15k").mkdir()
    assert resolve_data_dir("dolly15k") == Path("dolly15k")


def test_a_missing_split_is_an_error_that_tells_how_to_get_one(tmp_path):
    write_set(tmp_path, [[1, 2, 3]])
    with pytest.raises(ValueError, match=r"no split 'val', only train; .*--val_fraction"):
        open_dataset(tmp_path, "val")
    write_set(tmp_path / "two", [[1, 2, 3]], val=[[4, 5]])
    assert open_dataset(tmp_path / "two", "val").tokens(0, 2).tolist() == [4, 5]


def test_write_manifest_refuses_what_read_manifest_would(tmp_path):
    meta = read_manifest(write_set(tmp_path, [[1, 2, 3]]))
    assert json.loads((tmp_path / "dataset.json").read_text()) == meta
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(ValueError, match="eot_id is 257"):
        write_manifest(tmp_path, meta | {"eot_id": 257})
    assert not (tmp_path / "dataset.json").exists()
