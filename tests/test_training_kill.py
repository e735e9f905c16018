"""SIGKILL at every write, flush, rename and removal of a run: nothing is lost, torn or different afterwards.

A run is killed at one event, goes on with --auto_resume, is killed at the next, and so on to its end; then its weights,
optimizer, random states, data cursor, metrics and samples must equal those of a run that nobody disturbed.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from formats.checkpoint import load_checkpoint
from tests.lives import (
    IO_KINDS,
    Life,
    Run,
    Strike,
    Toll,
    checkpoint_differences,
    differences,
    finetuning,
    pretraining,
    records,
    uninterrupted,
)

RUN_FILES = {
    ".lock",
    "best.pt",
    "config.yaml",
    "curves.png",
    "metrics.jsonl",
    "run.html",
    "samples.jsonl",
    "status.json",
    "training.log",
}


def beside_the_steps(run: Run) -> bool:
    """Whether its checkpoints are written by a thread."""
    return run.changes.get("async_save") == "on"


def check_wreck(run: Run, life: Life, newest_before: int) -> None:
    """What a killed life leaves must be usable as it is."""
    whole = uninterrupted(run)
    temporaries = [file.name for file in run.folder.glob(".tmp-*")]
    assert len(temporaries) <= 1 + beside_the_steps(run)
    if set(life.events) - {"unlink temporary@start"}:  # it lived long enough to clean up after the one before
        assert all(name.endswith(f"-{life.pid}") for name in temporaries), f"left by earlier lives: {temporaries}"
    steps = run.steps_on_disk()
    for step in steps:
        assert not checkpoint_differences(run.checkpoint(step), whole.checkpoint(step)), life.describe()
    newest = run.newest
    assert newest >= newest_before, f"step {newest_before} is gone, the newest is {newest}: {life.describe()}"
    if newest >= 0:
        known = [json.loads(line) for line in _whole_lines(run.folder / "metrics.jsonl")]
        assert [record["step"] for record in known][: newest + 1] == list(range(newest + 1)), "a checkpoint is ahead"
    if (run.folder / "best.pt").exists():
        best = load_checkpoint(run.folder / "best.pt", require_digest=True)
        assert best["val_loss"] == records(whole.folder)[best["step"]]["val_loss"]
    for name, read in (("config.yaml", yaml.safe_load), ("status.json", json.loads)):
        if (run.folder / name).exists():
            assert isinstance(read((run.folder / name).read_text()), dict)


def _whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def strike_all(run: Run, strikes: list[Strike]) -> Toll:
    """Kill it at each event in turn, check what is left each time, let it finish, and compare.

    Once a checkpoint has its name, a next life begins after it and never meets the remaining events of that step
    again: each of those gets a copy of the folder as it was before, and its own way to the end.
    """
    passed, toll = "", Toll()
    before = run.folder.with_name(run.folder.name + "-before")
    for number, strike in enumerate(strikes):
        step = strike.at.split("@")[1]
        if step == passed:
            branch = twin(run, run.folder.with_name(f"branch-{number}"))
            shutil.copytree(before, branch.folder)
            strike_once(branch, strike)
            finish(branch)
            toll += branch.toll
            continue
        strike_once(run, strike)
        if strike.at.startswith("rename model_"):
            shutil.rmtree(before, ignore_errors=True)
            shutil.copytree(run.folder, before)
            passed = step
    finish(run)
    return toll + run.toll


def strike_once(run: Run, strike: Strike) -> None:
    """One life, killed at one event: it began where the newest checkpoint left it, and left a usable folder."""
    newest = run.newest
    life = run.live(strike)
    last = life.events[-4:] if beside_the_steps(run) else life.events[-1:]  # the loop may come to something meanwhile
    assert life.killed and strike.at in last, f"{strike} never came: {life.describe()}"
    assert life.began_after in (None, newest), f"{newest} was the newest: {life.describe()}"
    check_wreck(run, life, newest)


def finish(run: Run) -> None:
    """The last life, undisturbed; then everything equals the run in one life."""
    life = run.live()
    assert life.code == 0 and life.summary["finished"], life.describe()
    whole = uninterrupted(run)
    assert not differences(run.folder, whole.folder)
    kept = whole.steps_on_disk()[-run.changes["keep_last_n_checkpoints"] :]
    assert run.files() == RUN_FILES | {whole.checkpoint(step).name for step in kept}
    assert run.status() == {"state": "finished", "step": kept[-1]}


def twin(run: Run, folder: Path) -> Run:
    """The same run in another folder."""
    return Run(run.kind, run.data_dir, folder, run.changes)


def plan_strikes(run: Run, folder: Path, writes_of_a_file: int) -> list[Strike]:
    """SIGKILL at every disk event that the run has, in an order in which each can still happen.

    Of many writes into one file only that many, evenly spread. Besides the run's own events there are those of
    a new start: before there is a checkpoint it clears the records; later it cuts the records; and it removes what the
    killed life left half-written.
    """
    events = twin(run, folder / "trace").live().disk_strikes
    first_checkpoint = next(n for n, strike in enumerate(events) if strike.at.startswith("write model_"))
    last_best = max(n for n, strike in enumerate(events) if strike.at.startswith("rename best.pt"))
    parts = [
        events[: first_checkpoint + 1],
        _events_of_a_new_start(twin(run, folder / "early"), events[first_checkpoint]),
        events[first_checkpoint + 1 : last_best + 1],
        _events_of_a_new_start(twin(run, folder / "late"), events[last_best]),
        events[last_best + 1 :],
    ]
    return [strike for part in parts for strike in spread(part, writes_of_a_file)]


def _events_of_a_new_start(run: Run, after: Strike) -> list[Strike]:
    run.live(after)
    return run.live(Strike("begin *")).disk_strikes


def spread(strikes: list[Strike], count: int) -> list[Strike]:
    """All but the writes; and of the writes into one file the first, the last, and some between: `count` in all."""
    writes = Counter(strike.at for strike in strikes if strike.at.startswith("write "))
    places = {at: {round(n * (total - 1) / max(1, count - 1)) for n in range(count)} for at, total in writes.items()}
    return [strike for strike in strikes if strike.at not in places or strike.nth in places[strike.at]]


def test_sigkill_at_every_flush_rename_and_removal_and_a_spread_of_writes(tmp_path: Path) -> None:
    run = pretraining(tmp_path / "run", keep_last_n_checkpoints=2)
    strikes = plan_strikes(run, tmp_path, writes_of_a_file=3)
    toll = strike_all(run, strikes)
    toll.check(kills=len(strikes), in_saves=len(strikes) // 4, redone=60, beginnings=3, kinds=IO_KINDS - {"aside"})


def test_sigkill_while_an_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    old = pretraining(tmp_path / "old", generate_interval=0)
    assert old.live().code == 0
    files = {path.name: path.read_bytes() for path in old.folder.iterdir() if path.name != ".lock"}
    for number in (0, len(files) // 2, len(files) - 1):
        run = twin(old, tmp_path / f"{number}")
        shutil.copytree(old.folder, run.folder)
        life = run.live(Strike("aside *", nth=number), auto_resume=False)
        assert life.killed and life.events[-1].startswith("aside "), life.describe()
        found = {path.name: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
        assert {name: found[name] for name in files} == files and len(list(run.folder.glob("earlier-*"))) == 1


def test_a_run_that_is_killed_before_its_first_checkpoint_again_and_again_leaves_no_heap(tmp_path: Path) -> None:
    run = pretraining(tmp_path / "run", checkpoint_interval=6, keep_last_n_checkpoints=1)
    for moment in ("step 1@1", "micro 5:*", "write best.pt@2", "unlink metrics.jsonl@start", "begin *"):
        life = run.live(Strike(moment))
        assert life.killed and not run.steps_on_disk(), life.describe()
        assert not list(run.folder.glob("earlier-*"))
    log = (run.folder / "training.log").read_text()
    assert log.count("starting anew") >= 3, "the log goes on"
    finish(run)
    other = twin(run, tmp_path / "other")
    assert other.live(Strike("step 1@1")).killed
    assert other.live(Strike("begin *"), max_lr=5e-3).killed, "not the same run: what it did might be missed"
    assert (other.folder / "earlier-001" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_sigkill_in_a_fine_tuning(tmp_path: Path) -> None:
    run = finetuning(tmp_path / "run", keep_last_n_checkpoints=2, optimizer="muon")
    strikes = plan_strikes(run, tmp_path, writes_of_a_file=12)
    toll = strike_all(run, strikes)
    toll.check(kills=len(strikes), in_saves=len(strikes) // 3, redone=60, beginnings=3, kinds=IO_KINDS - {"aside"})


@pytest.mark.slow
def test_sigkill_at_every_write(tmp_path: Path) -> None:
    # Every write of one full checkpoint, of one best.pt, and of each small file; a thousand lives.
    run = pretraining(tmp_path / "run", keep_last_n_checkpoints=2, checkpoint_interval=1, max_steps=4)
    strikes = plan_strikes(run, tmp_path, writes_of_a_file=10**6)
    again = ("write model_00001.pt", "write model_00003.pt", "write best.pt@3")
    few = set(spread(strikes, 3))
    strikes = [strike for strike in strikes if strike in few or not strike.at.startswith(again)]
    toll = strike_all(run, strikes)
    toll.check(kills=len(strikes), in_saves=900, redone=900, beginnings=3, kinds=IO_KINDS - {"aside"})


def background_strikes(run: Run, folder: Path, step: int, writes_of_a_file: int) -> list[Strike]:
    """SIGKILL at the disk events of a step's checkpoint that is written beside the next steps, from its first write to
    the removal of the one before.
    """
    life = twin(run, folder / "trace").live()
    assert life.code == 0, life.describe()
    first, last = (life.events.index(f"{kind} model_{step:05d}.pt@{step}") for kind in ("save", "saved"))
    assert any(event.startswith("micro ") for event in life.events[first:last]), "the loop waited for it"
    return spread([strike for strike in life.disk_strikes if fnmatch(strike.at, f"*model_*@{step}")], writes_of_a_file)


def strike_each(run: Run, strikes: list[Strike]) -> Toll:
    """A run of its own for each: what the loop has done by then differs from life to life."""
    toll = Toll()
    for number, strike in enumerate(strikes):
        branch = twin(run, run.folder / f"{number}")
        strike_once(branch, strike)
        finish(branch)
        toll += branch.toll
    return toll


def test_sigkill_while_a_checkpoint_is_written_beside_the_steps(tmp_path: Path) -> None:
    run = pretraining(tmp_path / "run", async_save="on", keep_last_n_checkpoints=1)
    strikes = background_strikes(run, tmp_path, step=6, writes_of_a_file=3)
    toll = strike_each(run, strikes)
    toll.check(kills=len(strikes), in_saves=4, redone=len(strikes), beginnings=2, kinds=IO_KINDS - {"aside"})


@pytest.mark.slow
def test_sigkill_at_every_write_of_a_checkpoint_that_is_written_beside_the_steps(tmp_path: Path) -> None:
    run = finetuning(tmp_path / "run", async_save="on", keep_last_n_checkpoints=1, checkpoint_interval=1)
    strikes = background_strikes(run, tmp_path, step=3, writes_of_a_file=60)
    toll = strike_each(run, strikes)
    toll.check(kills=60, in_saves=60, redone=60, beginnings=2, kinds=IO_KINDS - {"aside"})


@pytest.mark.slow
def test_200_sigkills_at_random_instants(tmp_path: Path) -> None:
    chance, toll = random.Random(1), Toll()
    changes = {"max_steps": 30, "checkpoint_interval": 2, "keep_last_n_checkpoints": 2, "eval_interval": 4}
    for number in itertools.count():
        make = finetuning if number % 2 else pretraining
        run = make(tmp_path / f"run-{number}", **changes, async_save="on" if number % 4 < 2 else "off")
        whole_s = uninterrupted(run).lives[0].seconds
        while True:
            newest = run.newest
            life = run.live(after_s=chance.uniform(0, whole_s / 2))
            if not life.killed:
                break
            assert life.began_after in (None, newest), f"{newest} was the newest: {life.describe()}"
            check_wreck(run, life, newest)
        finish(run)
        toll += run.toll
        if toll.kills >= 200:
            break
    toll.check(kills=200, in_saves=40, redone=100, beginnings=30)


@pytest.mark.parametrize("signals", [(), ("micro 5:*",), ("eval 2@4",)])
def test_nothing_is_renamed_before_it_is_on_disk_nor_removed_before_its_successor_is(
    tmp_path: Path, signals: tuple[str, ...]
) -> None:
    # A power cut cannot be tried here, but the order of flushes can be read off.
    run = pretraining(tmp_path / "run", keep_last_n_checkpoints=1)
    life = run.live(*(Strike(at, signal=signal.SIGTERM) for at in signals))
    assert life.code == 0, life.describe()
    dirty: set[str] = set()  # written and not flushed
    unlisted = ""  # renamed, the folder not flushed
    renamed = 0
    for event in life.events:
        kind, name = event.split("@")[0].split(" ", 1)
        if kind == "write":
            dirty.add(name)
        elif kind == "fsync":
            dirty.discard(name)
            unlisted = "" if name.startswith("folder") else unlisted
        elif kind == "rename":
            assert name not in dirty, f"{event}: its content is not on disk"
            if name.startswith("model_"):
                assert not dirty, f"{event}: the checkpoint is ahead of {dirty}"
            unlisted = name
            renamed += 1
        elif kind == "unlink" and name != "temporary":
            assert not unlisted, f"{event}: {unlisted} may not be in the folder yet"
    assert renamed >= 5 and not dirty - {"metrics.jsonl"}


def test_without_a_temporary_file_the_same_kill_is_seen(tmp_path: Path) -> None:
    # That the kills would tear a checkpoint which is written in place; and that the digest then tells.
    run = pretraining(tmp_path / "run")
    life = run.live(Strike("write model_00006.pt@6", nth=300), sabotage=["atomic"])
    assert life.killed and run.steps_on_disk() == [3, 6]
    with pytest.raises(ValueError, match="ends without a digest"):
        load_checkpoint(run.checkpoint(6))
    last = run.live()
    assert last.code == 0 and last.began_after == 3
    assert "model_00006.pt: ends without a digest" in last.log.read_text()
    assert not differences(run.folder, uninterrupted(run).folder)
