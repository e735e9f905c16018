"""Damaged, foreign and harmful files: all noticed, named with the reason, and never run."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from formats import checkpoint
from formats.checkpoint import FORMAT, has_digest, load_checkpoint, save_checkpoint
from formats.open_model import open_model
from tests.full_checkpoints import full_payload, same
from training.run_folder import RunFolder

TAIL = 82  # bytes: comment length, "espalier-sha256:", 64 hex digits


# -- damage ----------------------------------------------------------------------------------------------------------


def flip_bit(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_bit_in_the_tail(data: bytearray, rng: random.Random) -> None:
    data[-rng.randint(1, TAIL)] ^= 1 << rng.randrange(8)


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def truncate_the_tail(data: bytearray, rng: random.Random) -> None:
    del data[-rng.randint(1, TAIL + 30) :]


def zero_a_page(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(0, len(data), 512)
    data[start : start + 512] = bytes(len(data[start : start + 512]))


def append(data: bytearray, rng: random.Random) -> None:
    data.extend(rng.randbytes(rng.choice([1, 2, 22, TAIL, 4096])))


def append_an_archive_end(data: bytearray, rng: random.Random) -> None:
    """What would make it look like a plain archive, which needs no digest."""
    data.extend(b"PK\x05\x06" + bytes(18))


def swap_blocks(data: bytearray, rng: random.Random) -> None:
    size = rng.choice([16, 256, 1024])
    a, b = rng.sample(range(0, len(data) - size, size), 2)
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def remove_a_piece(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data) - 100)
    del data[start : start + rng.randint(1, 99)]


def empty(data: bytearray, rng: random.Random) -> None:
    data.clear()


def another_digest(data: bytearray, rng: random.Random) -> None:
    data[-64:] = rng.randbytes(32).hex().encode()


def overwrite_with_noise(data: bytearray, rng: random.Random) -> None:
    data[:] = rng.randbytes(rng.choice([1, 21, 22, 82, 83, 5000]))


def zero_the_rest(data: bytearray, rng: random.Random) -> None:
    """What a file system may make of a file that was not flushed before the power went."""
    start = rng.randrange(0, len(data), 4096)
    data[start:] = bytes(len(data) - start)


MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [
    flip_bit, flip_bit_in_the_tail, truncate, truncate_the_tail, zero_a_page, zero_the_rest, append,
    append_an_archive_end, swap_blocks, remove_a_piece, empty, another_digest, overwrite_with_noise,
]  # fmt: skip

# -- whole files in the wrong place: step 6 is the newest, 3 and 0 are older


def swap_with_the_older(folder: Path) -> None:
    os.rename(folder / "model_00006.pt", folder / "x")
    os.rename(folder / "model_00003.pt", folder / "model_00006.pt")
    os.rename(folder / "x", folder / "model_00003.pt")


def older_under_the_newest_name(folder: Path) -> None:
    shutil.copy(folder / "model_00000.pt", folder / "model_00006.pt")


def newest_under_a_later_name(folder: Path) -> None:
    os.rename(folder / "model_00006.pt", folder / "model_00009.pt")


def weights_in_its_place(folder: Path) -> None:
    shutil.copy(folder / "best.pt", folder / "model_00006.pt")


def plain_archive_in_its_place(folder: Path) -> None:
    shutil.copy(folder / "plain.pt", folder / "model_00006.pt")


def folder_in_its_place(folder: Path) -> None:
    (folder / "model_00006.pt").unlink()
    (folder / "model_00006.pt").mkdir()


def pipe_in_its_place(folder: Path) -> None:
    (folder / "model_00006.pt").unlink()
    os.mkfifo(folder / "model_00006.pt")


def link_to_nothing(folder: Path) -> None:
    (folder / "model_00006.pt").unlink()
    (folder / "model_00006.pt").symlink_to("gone.pt")


# What is said of each bad file, and which step is used.
MISPLACED: dict[Callable[[Path], None], tuple[list[str], int]] = {
    swap_with_the_older: (["00006.pt: holds step 3, its name says 6", "00003.pt: holds step 6, its name says 3"], 0),
    older_under_the_newest_name: (["00006.pt: holds step 0, its name says 6"], 3),
    newest_under_a_later_name: (["00009.pt: holds step 6, its name says 9"], 3),
    weights_in_its_place: (["00006.pt: weights only, no training state"], 3),
    plain_archive_in_its_place: (["00006.pt: ends without a digest"], 3),
    folder_in_its_place: (["00006.pt: is a folder"], 3),
    pipe_in_its_place: (["00006.pt: is not a regular file"], 3),
    link_to_nothing: (["00006.pt"], 3),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints of a run, its best weights, and a file that torch.save wrote."""
    for step in (0, 3, 6):
        save_checkpoint(tmp_path / f"model_{step:05d}.pt", full_payload(step))
    weights = {key: value for key, value in full_payload(6).items() if key in ("model", "config", "step")}
    save_checkpoint(tmp_path / "best.pt", weights)
    torch.save(full_payload(6), tmp_path / "plain.pt")
    return tmp_path


def test_a_thousand_damaged_files_are_all_detected_and_the_newest_good_one_is_used(run: Path) -> None:
    folder, bad = RunFolder(run), run / "model_00006.pt"
    original = bad.read_bytes()
    good = load_checkpoint(run / "model_00003.pt")
    reasons: Counter[str] = Counter()
    rng, tried = random.Random(20261121), Counter[str]()
    while sum(tried.values()) < 1000:
        mutate = MUTATIONS[sum(tried.values()) % len(MUTATIONS)]
        data = bytearray(original)
        mutate(data, rng)
        if data == original:  # two equal blocks swapped, a zero page zeroed: not damage
            continue
        tried[mutate.__name__] += 1
        bad.write_bytes(data)
        said: list[str] = []
        found = folder.newest_good(said.append)
        assert found is not None and found[0].name == "model_00003.pt", f"{mutate.__name__} was not detected"
        assert len(said) == 1 and str(bad) in said[0] and said[0].isprintable(), said
        reasons[said[0].split("model_00006.pt: ")[1].split(":")[0]] += 1
        assert sum(tried.values()) > 1 or same(found[1], good)
        with pytest.raises(ValueError, match=str(bad)):  # nor is it taken for a plain archive, which needs no digest
            load_checkpoint(bad)
    assert len(tried) == len(MUTATIONS) and min(tried.values()) >= 70
    assert {"is empty", "is damaged", "ends without a digest"} <= set(reasons), reasons
    bad.write_bytes(original)  # the guard against a test that refuses everything
    found = folder.newest_good(said.append)
    assert found is not None and found[0] == bad


@pytest.mark.parametrize("act", MISPLACED, ids=lambda act: act.__name__)
def test_a_whole_file_in_the_wrong_place_is_not_used(act: Callable[[Path], None], run: Path) -> None:
    reasons, step = MISPLACED[act]
    act(run)
    said: list[str] = []
    found = RunFolder(run).newest_good(said.append)
    assert found is not None and found[1]["step"] == step and same(found[1]["model"], full_payload(step)["model"])
    assert len(said) == len(reasons)
    for line, reason in zip(said, reasons):
        assert line.startswith("Not used: ") and reason in line and str(run) in line and line.isprintable()
    folder = RunFolder(run)
    folder.prune(1)
    assert folder.newest_good(lambda _: None) is not None, "nor does it push out a good one"


def test_every_bit_of_the_tail_counts(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    save_checkpoint(file, full_payload())
    original = file.read_bytes()
    for place in range(1, TAIL + 1):
        for bit in range(8):
            data = bytearray(original)
            data[-place] ^= 1 << bit
            file.write_bytes(data)
            with pytest.raises(ValueError, match=str(file)):
                load_checkpoint(file)


def test_a_file_under_another_name_is_not_the_newest(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save_checkpoint(folder.checkpoint_path(3), full_payload(3))
    save_checkpoint(folder.checkpoint_path(9), full_payload(1))
    said: list[str] = []
    found = folder.newest_good(said.append)
    assert found is not None and found[0] == folder.checkpoint_path(3)
    assert "holds step 1, its name says 9" in said[0]


def test_tail_is_what_the_module_says(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    save_checkpoint(file, full_payload())
    tail = file.read_bytes()[-TAIL:]
    assert struct.unpack("<H", tail[:2])[0] == TAIL - 2 and tail[2:18] == b"espalier-sha256:"


# -- files that are no checkpoints -----------------------------------------------------------------------------------


def test_plain_archives_are_weights_but_nothing_to_resume_from(tmp_path: Path) -> None:
    file = tmp_path / "model_00003.pt"
    torch.save(full_payload(), file)
    assert not has_digest(file)
    assert same(load_checkpoint(file)["model"], full_payload()["model"])
    with pytest.raises(ValueError, match="without a digest"):
        load_checkpoint(file, require_digest=True)
    assert RunFolder(tmp_path).newest_good(lambda _: None) is None


class Payload:
    """Unpickling this would write the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.canary}'",)


def test_harmful_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    file = tmp_path / "model_00003.pt"
    attempts: list[Callable[[], Any]] = [
        lambda: torch.save({**full_payload(), "extra": Payload(canary)}, file),
        lambda: torch.save({**full_payload(), "extra": Payload(canary)}, file, _use_new_zipfile_serialization=False),
        lambda: file.write_bytes(pickle.dumps(Payload(canary))),
        lambda: _with_digest(file, {**full_payload(), "extra": Payload(canary)}),
    ]
    for number, attempt in enumerate(attempts):
        attempt()
        for load in (load_checkpoint, open_model):
            with pytest.raises(ValueError, match=str(file)) as caught:
                load(file)
            assert "\n" not in str(caught.value)
        assert RunFolder(tmp_path).newest_good(lambda _: None) is None
        assert not canary.exists(), f"attempt {number} ran"
    with open(file, "rb") as stream, zipfile.ZipFile(stream) as archive:  # the payloads do work
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    assert b"system" in pickled


def _with_digest(file: Path, payload: Any) -> None:
    """Save as our own writer would, without its check: a correct digest is no proof of good will."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_read", lambda *_, **__: {})
        save_checkpoint(file, payload)


def test_the_refused_type_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({**full_payload(), "extra": Payload(tmp_path / "canary")}, file)
    with pytest.raises(ValueError, match=r"holds (posix|nt)\.system, expected only tensors"):
        load_checkpoint(file)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "holds a list"),
        ({"model": {}}, "holds no config"),
        ({"config": {}}, "holds no model"),
        ({"model": [1], "config": {}}, "holds no model"),
        ({"model": {"w": 3}, "config": {}}, "its weight 'w' is no tensor"),
        ({"model": {}, "config": {}, "format": FORMAT + 1}, f"format {FORMAT + 1}, this version reads up to {FORMAT}"),
        ({"model": {}, "config": {}, "format": "2"}, "format '2'"),
    ],
)
def test_other_contents_are_refused(content: Any, says: str, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save(content, file)
    with pytest.raises(ValueError, match=says) as caught:
        load_checkpoint(file)
    assert str(file) in str(caught.value)


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(ValueError, match="is a folder"):
        load_checkpoint(tmp_path)
    for data in (b"", b"x", bytes(21), bytes(TAIL), bytes(TAIL + 1), b"PK\x05\x06" + bytes(18)):
        (tmp_path / "short.pt").write_bytes(data)
        with pytest.raises(ValueError, match=r"short\.pt"):
            load_checkpoint(tmp_path / "short.pt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_no_permission(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.pt", full_payload())
    (tmp_path / "model.pt").chmod(0)
    with pytest.raises(PermissionError):
        load_checkpoint(tmp_path / "model.pt")
