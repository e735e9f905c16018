"""What a run leaves to read: records that survive kills and full disks, a log that mirrors the terminal."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings, strategies

from training.metrics import AppendFile, Console, JsonLines, lines_from_the_end


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def record_file(path: Path) -> JsonLines:
    return JsonLines(path, pytest.fail)


# -- metrics.jsonl -----------------------------------------------------------------------------------------------------


def test_one_object_a_line_at_once(tmp_path: Path) -> None:
    file = record_file(tmp_path / "m.jsonl")
    assert not file.path.exists(), "made with the first line"
    file.write({"step": 0, "loss": 1.5, "text": "größer\nzweite Zeile"})
    assert lines(file.path) == [{"step": 0, "loss": 1.5, "text": "größer\nzweite Zeile"}], "no buffer in between"
    file.write({"step": 1})
    file.flush_to_disk()
    file.close()
    file.close()
    assert [line["step"] for line in lines(file.path)] == [0, 1]


def test_json_has_no_nan(tmp_path: Path) -> None:
    file = record_file(tmp_path / "m.jsonl")
    file.write({"step": 0, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1, "e": True, "f": None})
    text = file.path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert lines(file.path) == [{"step": 0, "a": None, "b": None, "c": None, "d": 0.1, "e": True, "f": None}]


def test_a_float_keeps_every_bit(tmp_path: Path) -> None:
    file = record_file(tmp_path / "m.jsonl")
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, 4.476415634155273]
    for step, value in enumerate(values):
        file.write({"step": step, "loss": value})
    assert [line["loss"] for line in lines(file.path)] == values


def test_cut_keeps_each_step_up_to_the_checkpoint_once(tmp_path: Path) -> None:
    file = record_file(tmp_path / "m.jsonl")
    for step in range(6):
        file.write({"step": step})
    file.close()
    kept = file.path.read_bytes().splitlines(keepends=True)[:4]
    file.cut_after(3)
    assert file.path.read_bytes() == b"".join(kept), "what stays, stays byte for byte"
    file.write({"step": 4, "again": True})
    file.close()
    assert [line["step"] for line in lines(file.path)] == [0, 1, 2, 3, 4]
    assert os.listdir(tmp_path) == ["m.jsonl"]
    file.cut_after(-1)
    assert file.path.read_bytes() == b""


@given(
    steps=strategies.lists(strategies.integers(0, 3), max_size=40),
    cut=strategies.integers(-1, 60),
    block=strategies.integers(1, 40),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_lines_from_the_end_are_the_lines(
    steps: list[int], cut: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "m.jsonl"
    file, step = record_file(path), 0
    for number, more in enumerate(steps):  # several lines of one step, as samples are, and steps without any
        step += more
        file.write({"step": step, "text": "w" * (7 * number % 90)})
    file.close()
    if not steps:
        return
    whole = path.read_bytes().splitlines()
    with open(path, "rb") as raw:
        found = list(lines_from_the_end(raw, block))
        assert [line for _, line in found] == whole[::-1]
        assert all(path.read_bytes()[place:].startswith(line + b"\n") for place, line in found)
    file.cut_after(cut)
    assert path.read_bytes().splitlines() == [line for line in whole if json.loads(line)["step"] <= cut]


def test_a_cut_reads_no_more_than_it_cuts(tmp_path: Path) -> None:
    read: dict[int, int] = {}
    for count in (5_000, 50_000):
        file = record_file(tmp_path / f"{count}.jsonl")
        file.path.write_text("".join(f'{{"step": {step}}}\n' for step in range(count)))

        class Counting(io.FileIO):
            def read(self, size: int | None = -1) -> bytes:
                data = super().read(-1 if size is None else size) or b""
                read[count] = read.get(count, 0) + len(data)  # noqa: B023 -- used within the turn
                return data

        with mock.patch("training.metrics.open", lambda path, mode: Counting(path, "r+"), create=True):
            file.cut_after(count - 11)
        assert [record["step"] for record in file.records()] == list(range(count - 10))
    assert 0 < read[5_000] == read[50_000] <= 1 << 18


@pytest.mark.parametrize(
    "rest", [b'{"step": 4, "lo', b'{"step": 4', b"\x00\x00\x00", b"\xff\xfe", b"[4]\n", b'{"loss": 1}\n', b"\n", b"4\n"]
)
def test_what_a_power_cut_left_of_the_last_line_goes(rest: bytes, tmp_path: Path) -> None:
    file = record_file(tmp_path / "m.jsonl")
    for step in range(4):
        file.write({"step": step})
    file.close()
    with open(file.path, "ab") as raw:
        raw.write(rest)
    file.cut_after(9)
    file.write({"step": 4})
    file.close()
    assert [line["step"] for line in lines(file.path)] == [0, 1, 2, 3, 4]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_tears_the_last_line_at_most_and_the_next_start_takes_it_away(tmp_path: Path) -> None:
    for attempt in range(5):
        file = record_file(tmp_path / f"{attempt}.jsonl")
        child = os.fork()
        if not child:
            for step in range(10**9):
                file.write({"step": step, "text": "word " * (step % 500)})
        while not file.path.exists() or file.path.stat().st_size < 100_000 * attempt:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        whole = file.path.read_bytes().count(b"\n")
        assert [record["step"] for record in file.records()] == list(range(whole))
        file.write({"step": whole})
        assert [line["step"] for line in lines(file.path)] == list(range(whole + 1))


@pytest.mark.parametrize("whole", [b"", b'{"step": 0}\n', b'{"step": 0}\n' * 9000])
@pytest.mark.parametrize("torn", [b"", b"{", b'{"step": 1, "text": "' + b"word " * 40_000], ids=["none", "one", "long"])
def test_a_torn_line_goes_before_the_next_is_appended(whole: bytes, torn: bytes, tmp_path: Path) -> None:
    file = record_file(tmp_path / "m.jsonl")
    file.path.write_bytes(whole + torn)
    assert len(file.records()) == whole.count(b"\n")
    file.write({"step": 7})
    assert file.path.read_bytes() == whole + b'{"step": 7}\n'


def test_nothing_to_cut(tmp_path: Path) -> None:
    record_file(tmp_path / "m.jsonl").cut_after(3)
    assert os.listdir(tmp_path) == []


# -- a full disk -------------------------------------------------------------------------------------------------------


class Disk:
    """Takes `room` bytes, then refuses as a full disk does: a short write first, ENOSPC after it."""

    def __init__(self, path: Path, room: int) -> None:
        self.file, self.room = open(path, "ab", buffering=0), room  # noqa: SIM115

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(data[: self.room])
        assert taken is not None
        self.room -= taken
        return taken

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [0, 1, 12, 13, 30])
def test_a_full_disk_tears_no_line_and_loses_none(room: int, tmp_path: Path) -> None:
    said: list[str] = []
    file = JsonLines(tmp_path / "m.jsonl", said.append)
    disk = Disk(file.path, room)
    file._file = disk  # type: ignore[assignment]
    for step in range(5):
        file.write({"step": step})
    file.flush_to_disk()
    assert len(said) == 1 and "disk full" in said[0] and str(file.path) in said[0], "said once, not at every line"
    disk.room = 10**6
    file.write({"step": 5})
    assert [line["step"] for line in lines(file.path)] == list(range(6))
    disk.room = 0
    file.write({"step": 6})
    assert len(said) == 2, "said again when it fills again"
    disk.room = 10**6
    file.close()
    assert [line["step"] for line in lines(file.path)] == list(range(7)), "a last try at the end"


def test_other_errors_are_not_kept_quiet(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "no such folder" / "m.jsonl", pytest.fail)
    with pytest.raises(FileNotFoundError):
        file.append(b"x")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_on_a_full_disk_does_not_stop_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(active=True)
    console.open_log(Path("/dev/full"))
    console.say("one")
    console.say("two")
    console.close()
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\n"
    assert captured.err.count("disk full") == 1


# -- training.log ------------------------------------------------------------------------------------------------------


def test_the_log_mirrors_the_terminal_from_the_first_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(active=True)
    console.say("before the folder is known")
    console.open_log(tmp_path / "training.log")
    console.say("größer")
    console.say()
    console.note("only in the log")
    assert (tmp_path / "training.log").read_text("utf-8") == "before the folder is known\ngrößer\n\nonly in the log\n"
    console.close()
    assert capsys.readouterr().out == "before the folder is known\ngrößer\n\n"
    again = Console(active=True)
    again.open_log(tmp_path / "training.log")
    again.say("resumed")
    again.close()
    assert (tmp_path / "training.log").read_text("utf-8").endswith("only in the log\nresumed\n")


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(active=False)
    console.say("nothing")
    console.open_log(tmp_path / "training.log")
    console.note("nothing")
    console.start_bar(3, 0)
    console.advance({})
    console.close()
    assert os.listdir(tmp_path) == [] and capsys.readouterr().out == ""


def test_with_a_bar_the_same_words_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(active=True)
    console.open_log(tmp_path / "training.log")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    console.start_bar(4, 1)
    assert console.has_bar
    console.advance({"loss": "1.0"})
    console.say("in between")
    console.close()
    assert not console.has_bar
    assert "in between" in capsys.readouterr().out
    assert (tmp_path / "training.log").read_text() == "in between\n"
