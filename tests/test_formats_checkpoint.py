"""Checkpoints: whole or not there, verified, free of pickle's dangers, and clear about what is wrong."""

from __future__ import annotations

import errno
import os
import resource
import zipfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from formats import checkpoint
from formats.checkpoint import (
    FORMAT,
    TRAINING_KEYS,
    has_digest,
    is_full,
    load_checkpoint,
    payload_bytes,
    remove_temporaries,
    save_checkpoint,
    write_durably,
)
from tests.full_checkpoints import full_payload, same
from training.run_folder import RunFolder

TAIL = 82  # bytes: comment length, "espalier-sha256:", 64 hex digits


# -- what is written comes back --------------------------------------------------------------------------------------


def test_round_trip_is_exact_and_leaves_nothing_else(tmp_path: Path) -> None:
    file, payload = tmp_path / "deep" / "model_00003.pt", full_payload()
    size = save_checkpoint(file, payload)
    assert file.stat().st_size == size
    assert os.listdir(file.parent) == [file.name]
    loaded = load_checkpoint(file, require_digest=True)
    assert loaded.pop("format") == FORMAT
    assert same(loaded, payload)
    assert is_full(loaded) and has_digest(file)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"rng": 3}, "its rng is a int"),
        ({"rng": [3]}, "its rng holds something else"),
        ({"settings": {1: 2}}, "its settings has a key that is no text"),
        ({"pruning": [1]}, "its pruning is a list"),
        ({"pruning": {"base": "x"}}, "its pruning has a base that is no dict"),
        ({"recovery": {"made": "q"}}, "its recovery has a made that is no dict"),
    ],
)
def test_what_stands_beside_the_weights_is_of_its_kind(entries: dict[str, Any], says: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", {**full_payload(), **entries})
    with pytest.raises(ValueError, match=rf"a\.pt: {says}"):
        load_checkpoint(tmp_path / "a.pt")


def test_other_tools_open_it(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    save_checkpoint(file, full_payload())
    for mapped in (False, True):
        assert same(torch.load(file, weights_only=True, mmap=mapped)["model"], full_payload()["model"])
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"espalier-sha256:") and len(archive.comment) == TAIL - 2


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", full_payload())
    save_checkpoint(tmp_path / "b.pt", full_payload())
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_loaded_tensors_may_be_changed_and_the_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    save_checkpoint(file, full_payload())
    load_checkpoint(file)["model"]["h.0.w"].zero_()
    assert same(load_checkpoint(file, require_digest=True)["model"], full_payload()["model"])


@pytest.mark.parametrize("sizes", [[1] * 7, [2, 1, 5], [1, 1, 100, 1], [0, 3], [50]])
def test_digest_does_not_depend_on_how_the_bytes_come(sizes: list[int], tmp_path: Path) -> None:
    import hashlib

    data = bytes(range(256))
    with open(tmp_path / "x", "wb") as file:
        writer, at = checkpoint._DigestWriter(file), 0
        for size in [*sizes, 256 - sum(sizes)]:
            assert writer.write(data[at : at + size]) == size
            at += size
    assert (tmp_path / "x").read_bytes() == data
    assert writer.digest.hexdigest() == hashlib.sha256(data[:-2]).hexdigest() and writer.held == data[-2:]


def test_full_and_weights_only_are_told_apart(tmp_path: Path) -> None:
    assert is_full(full_payload())
    for key in TRAINING_KEYS:
        payload = full_payload()
        del payload[key]
        assert not is_full(payload)


def test_payload_bytes_counts_tensors() -> None:
    assert payload_bytes({"a": [torch.zeros(3), {"b": torch.zeros(2, dtype=torch.float16)}], "c": "text"}) == 16


# -- failed writes ---------------------------------------------------------------------------------------------------


def in_a_child(limit: int, act: Callable[[], object]) -> str:
    """What `act` raises in a process whose files cannot grow beyond `limit` bytes ("" = nothing)."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            act()
            text = ""
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    assert os.waitpid(child, 0)[1] == 0
    return text


def test_disk_full_at_any_byte_leaves_the_previous_file_and_no_other(tmp_path: Path) -> None:
    file, payload = tmp_path / "model.pt", full_payload()
    size = save_checkpoint(file, payload)
    before = file.read_bytes()
    limits = [0, 1, 100, 5000, 9000, size // 2, size - TAIL, size - TAIL + 2, size - 3, size - 2, size - 1]
    for limit in limits:
        said = in_a_child(limit, lambda: save_checkpoint(file, full_payload(4)))
        assert said.startswith("OSError") and str(file) in said, (limit, said)
        assert "MB needed" in said and "MB free" in said and "\n" not in said
        assert file.read_bytes() == before
        assert os.listdir(tmp_path) == [file.name]
    assert in_a_child(size, lambda: save_checkpoint(file, payload)) == ""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "disk full"),
        (errno.EDQUOT, "disk quota used up"),
        (errno.EIO, "input/output error"),
        (errno.EROFS, "read-only file system"),
        (errno.EACCES, "Permission denied"),
    ],
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_errors_of_the_last_steps_keep_their_reason(
    step: str, code: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.pt"
    save_checkpoint(file, full_payload())
    before = file.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError) as caught:
        save_checkpoint(file, full_payload(4))
    assert caught.value.errno == code
    assert f"{file}: {reason}: about " in str(caught.value) and "MB free" in str(caught.value)
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


def test_a_write_that_did_not_reach_the_disk_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read again before it takes the old one's place."""
    file = tmp_path / "model.pt"
    save_checkpoint(file, full_payload())
    before = file.read_bytes()
    sync = os.fsync

    def rot(handle: int) -> None:
        sync(handle)
        (temporary,) = tmp_path.glob(".tmp-*")
        data = bytearray(temporary.read_bytes())
        data[len(data) // 2] ^= 4
        temporary.write_bytes(data)

    monkeypatch.setattr(os, "fsync", rot)
    with pytest.raises(OSError, match=r"model\.pt: is damaged"):  # an OSError: a run goes on and tries again later
        save_checkpoint(file, full_payload(4))
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("value", [np.float64(1.5), np.int64(2), np.zeros(2), Path("x"), deque([1])])
def test_what_weights_only_would_refuse_never_becomes_a_file(value: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    with pytest.raises(ValueError, match=r"model\.pt: holds \S+, expected only tensors"):
        save_checkpoint(file, {**full_payload(), "extra": value})
    assert os.listdir(tmp_path) == []


def test_order_of_the_steps_of_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushed before the rename, the folder flushed after it: else a power cut could leave an empty file."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(handle: int) -> None:
        events.append("flush folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "flush file")
        fsync(handle)

    def logged_replace(source: Any, target: Any) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)

    def write(file: Any) -> None:
        events.append("write")
        file.write(b"x")

    write_durably(tmp_path / "x", write, lambda _: events.append("check"))
    assert events == ["write", "flush file", "check", "rename", "flush folder"]


def test_left_over_temporaries_are_neither_read_nor_kept(tmp_path: Path) -> None:
    left = tmp_path / ".tmp-model_00009.pt-123"
    left.write_bytes(b"half")
    (tmp_path / "other.pt").write_bytes(b"mine")
    assert RunFolder(tmp_path).checkpoints() == []
    remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["other.pt"]
