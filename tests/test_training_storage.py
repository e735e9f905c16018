"""Disks that fail: the last checkpoint stays whole, a line says why, the next interval tries again, not for ever."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from formats.checkpoint import MAY_PASS, load_checkpoint, save_checkpoint
from tests.full_checkpoints import full_payload, same
from tests.runs import log, losses, records, status, steps_on_disk, train, weights
from tests.tiny_checkpoints import save_tiny
from training.metrics import JsonLines
from training.run_settings import TrainSettings
from training.saver import MAX_FAILED_IN_A_ROW
from training.settings import run_script

EVERY = {"checkpoint_interval": 1, "eval_interval": 0, "generate_interval": 0, "max_steps": 12}
FAULTS = {name: getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES")}


class _Failing:
    """A file whose writes fail beyond `room` bytes."""

    def __init__(self, file: Any, room: int, code: int) -> None:
        self._file, self._room, self._code = file, room, code

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size > self._room:
            self._file.write(memoryview(data).cast("B")[: self._room])
            raise OSError(self._code, os.strerror(self._code))
        self._room -= size
        return int(self._file.write(data))

    def __enter__(self) -> _Failing:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def failing_disk(fails: Callable[[str], bool], code: int, room: int = 20_000) -> Iterator[list[str]]:
    """Files whose final name `fails` takes break after `room` bytes; where there is no room, they do not even open."""
    tried: list[str] = []

    def opened(path: Any, mode: str = "r", **more: Any) -> Any:
        name = Path(path).name.removeprefix(".tmp-").rsplit("-", 1)[0]
        if "r" in mode or not fails(name):
            return open(path, mode, **more)
        tried.append(name)
        if not room:
            raise OSError(code, os.strerror(code), str(path))
        return _Failing(open(path, mode, **more), room, code)

    with mock.patch("formats.checkpoint.open", opened, create=True):
        yield tried


def failures(folder: Path) -> list[str]:
    return [line for line in log(folder).splitlines() if "Checkpoint not saved" in line]


# -- one file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 1, 5_000])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_save_that_fails_leaves_the_old_file_and_says_what_it_would_take(
    fault: str, room: int, tmp_path: Path
) -> None:
    file, code = tmp_path / "model.pt", FAULTS[fault]
    save_checkpoint(file, full_payload())
    before = file.read_bytes()
    with failing_disk(lambda name: True, code, room), pytest.raises(OSError) as caught:
        save_checkpoint(file, full_payload(4))
    assert caught.value.errno == code
    reason = MAY_PASS.get(code, os.strerror(code))
    expected = rf"\[Errno {code}\] {file}: {reason}: about 0\.0 MB needed, [\d.]+ MB free"
    assert re.fullmatch(expected, str(caught.value))
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


def test_where_the_folder_is_out_of_reach_the_room_is_unknown(tmp_path: Path) -> None:
    def gone(path: Any) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with (
        failing_disk(lambda name: True, errno.ESTALE, 0),
        mock.patch("shutil.disk_usage", gone),
        pytest.raises(OSError, match=r"model\.pt: stale file handle: about .* MB needed, free space unknown"),
    ):
        save_checkpoint(tmp_path / "model.pt", full_payload())


# -- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on a disk that works."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(text, folder, **EVERY)
    return folder


@pytest.mark.parametrize(
    ("fault", "room", "async_save"), [("ENOSPC", 20_000, "on"), ("EIO", 90_000, "off"), ("EROFS", 0, "off")]
)
def test_the_run_goes_on_tries_again_and_loses_nothing(
    fault: str, room: int, async_save: str, text: Path, whole: Path, tmp_path: Path
) -> None:
    bad = {"model_00004.pt", "model_00005.pt"}
    seen: list[int] = []

    def fails(name: str) -> bool:
        if name == "model_00006.pt":  # what was there while the disk failed
            seen.extend(steps_on_disk(tmp_path))
            assert all(load_checkpoint(file, require_digest=True) for file in tmp_path.glob("model_*.pt"))
            assert not list(tmp_path.glob(".tmp-*"))
        return name in bad

    with failing_disk(fails, FAULTS[fault], room) as tried:
        summary = train(text, tmp_path, **EVERY, async_save=async_save)
    assert tried == sorted(bad) and summary["finished"] and status(tmp_path) == "finished"
    assert seen == [1, 2, 3], "none was removed to make room"
    assert steps_on_disk(tmp_path) == [9, 10, 11] and not list(tmp_path.glob(".tmp-*"))
    lines = failures(tmp_path)
    assert len(lines) == 2
    for number, (line, name) in enumerate(zip(lines, sorted(bad)), 1):
        for part in (name, MAY_PASS[FAULTS[fault]], "MB needed", "MB free", "next interval"):
            assert part in line, line
        assert f"({number} of 5 in a row)" in line
    assert losses(tmp_path) == losses(whole) and same(dict(weights(tmp_path, 11)), dict(weights(whole, 11)))


@pytest.mark.parametrize("async_save", ["off", "on"])
def test_it_does_not_go_on_for_ever(async_save: str, text: Path, tmp_path: Path) -> None:
    with (
        failing_disk(lambda name: name.startswith("model_") and name > "model_00003.pt", errno.EIO) as tried,
        pytest.raises(OSError, match=r"model_00008\.pt: input/output error: .* needed, .* free \(save 5 of 5 in a row"),
    ):
        train(text, tmp_path, **EVERY, async_save=async_save)
    assert len(tried) == MAX_FAILED_IN_A_ROW and len(failures(tmp_path)) == MAX_FAILED_IN_A_ROW - 1
    assert steps_on_disk(tmp_path) == [1, 2, 3] and not list(tmp_path.glob(".tmp-*"))
    assert status(tmp_path) == "failed"
    assert len(records(tmp_path)) >= 9, "every step that was taken is in the record"
    assert train(text, tmp_path, **EVERY, auto_resume=True)["finished"], "and what is there goes on"


def test_only_failures_in_a_row_count(text: Path, tmp_path: Path) -> None:
    kept = ("model_00004.pt", "model_00008.pt", "model_00011.pt")
    with failing_disk(lambda name: name.startswith("model_") and name not in kept, errno.EIO):
        assert train(text, tmp_path, **EVERY)["finished"] is True
    assert steps_on_disk(tmp_path) == [4, 8, 11] and len(failures(tmp_path)) == 8 > MAX_FAILED_IN_A_ROW


def test_the_exit_code_and_the_last_line_tell(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--data_dir", str(text), "--log_dir", str(tmp_path)]
    with failing_disk(lambda name: name.startswith("model_"), errno.EIO), pytest.raises(SystemExit) as caught:
        run_script(lambda given: train(Path(given.data_dir), Path(given.log_dir), **EVERY), TrainSettings, "", settings)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "model_00005.pt: input/output error" in line and "5 of 5 in a row" in line


def test_old_checkpoints_that_cannot_be_removed_do_not_make_a_save_a_failure(text: Path, tmp_path: Path) -> None:
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == "model_00001.pt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(path, missing_ok=missing_ok)

    with mock.patch.object(Path, "unlink", refuse):
        assert train(text, tmp_path, **EVERY)["finished"]
    assert "Older checkpoints not removed: [Errno 5]" in log(tmp_path) and not failures(tmp_path)
    assert 11 in steps_on_disk(tmp_path)


# -- a disk that is full in earnest ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte: three checkpoints and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_small_disk_fills_up_and_is_made_room_on(small_disk: Path, text: Path, whole: Path) -> None:
    folder = small_disk / "run"
    every = {**EVERY, "keep_last_n_checkpoints": 0}
    with pytest.raises(OSError, match=r"model_0000\d\.pt: disk full: about 0\.2 MB needed, 0\.\d MB free"):
        train(text, folder, **every)
    kept = steps_on_disk(folder)
    assert kept == list(range(1, len(kept) + 1)) and 2 <= len(kept) <= 5
    assert len(failures(folder)) == MAX_FAILED_IN_A_ROW - 1 and not list(folder.glob(".tmp-*"))
    assert all(load_checkpoint(file, require_digest=True) for file in folder.glob("model_*.pt"))
    assert len(records(folder)) == kept[-1] + MAX_FAILED_IN_A_ROW + 1, "records find room where checkpoints do not"
    assert train(text, folder, **{**every, "keep_last_n_checkpoints": 1}, auto_resume=True)["finished"]
    assert steps_on_disk(folder) == [11] and losses(folder) == losses(whole)


# -- the records -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["EIO", "EROFS", "EDQUOT"])
def test_lines_wait_for_a_disk_that_comes_back(fault: str, tmp_path: Path) -> None:
    said: list[str] = []
    file = JsonLines(tmp_path / "metrics.jsonl", said.append)
    file.write({"step": 0})
    assert file._file is not None
    working, broken = file._file, _Failing(file._file, 0, FAULTS[fault])
    file._file = broken  # type: ignore[assignment]
    for step in (1, 2):
        file.write({"step": step})
    assert len(said) == 1 and MAY_PASS[FAULTS[fault]] in said[0] and str(file.path) in said[0]
    file._file = working
    file.write({"step": 3})
    assert [record["step"] for record in file.records()] == [0, 1, 2, 3]


def test_a_whole_model_names_the_megabytes_it_needs(tmp_path: Path) -> None:
    payload = load_checkpoint(save_tiny(tmp_path / "model.pt"))
    with failing_disk(lambda name: True, errno.ENOSPC, 100), pytest.raises(OSError, match=r"about 0\.\d MB needed"):
        save_checkpoint(tmp_path / "again.pt", payload)
