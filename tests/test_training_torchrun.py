"""Kills and signals under torchrun: whoever is struck, the job comes back, and ends as if nothing had been.

Slow: each start imports torch twice.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lives import Run, differences, records
from tests.test_training_stop import script, start
from training.peers import _born
from training.run_folder import RunFolder, lock_file

TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# A struck life makes about 8 steps, on a busy machine 12 and more: 20 strikes must not reach the end.
STEPS, INTERVAL = 480, 4
pytestmark = pytest.mark.slow


class Job:
    """A pretraining of two processes under torchrun, started as often as it takes."""

    def __init__(self, folder: Path, *flags: str, restarts: int = 0) -> None:
        self.run, words = script("pretrain", folder)
        more = ["--auto_resume", "--log_interval", "1", "--max_steps", str(STEPS)]
        more += ["--checkpoint_interval", str(INTERVAL), "--generate_interval", "0", "--eval_interval", "20"]
        more += ["--keep_last_n_checkpoints", "3"]
        self.words = [*words[:-2], *more, *flags, *words[-2:]]
        self.launcher = (*TWO, "--max-restarts", str(restarts))
        self.start()

    def start(self) -> None:
        self.agent = start("pretrain", self.words, self.launcher)

    @property
    def output(self) -> str:
        return self.run.folder.with_suffix(".out").read_text()

    def workers(self) -> dict[int, int]:
        """The process of each rank."""
        try:
            children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()
            environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
        except OSError:  # one of them ended just now
            return {}
        ranks = {pid: re.search(rb"\0RANK=(\d+)\0", text) for pid, text in environments.items()}
        return {int(match[1]): pid for pid, match in ranks.items() if match}

    def last_step(self) -> int:
        """In the record, which may be torn."""
        lines = re.findall(r'^{"step": (\d+),', _text(self.run.folder / "metrics.jsonl"), re.MULTILINE)
        return int(lines[-1]) if lines else -1

    def wait_until(self, ready: Callable[[], bool], seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while not ready():
            assert self.agent.poll() is None, f"it ended: {self.output[-3000:]}"
            assert time.monotonic() < until, f"it hangs: {self.output[-3000:]}"
            time.sleep(0.005)

    def resumed_from(self) -> list[int]:
        """The steps that its lives began after."""
        return [int(step) for step in re.findall(r"^Resuming from .*model_(\d+)\.pt", self.output, re.MULTILINE)]

    def strike(self, kind: str, chance: random.Random) -> int:
        """SIGKILL for "rank 0", "rank 1", "both" or the "agent", some steps after a save.

        Waits until the run is back; returns how many steps it lost.
        """
        begun = len(self.resumed_from())
        before = self.run.newest
        self.wait_until(lambda: self.run.newest > before)
        wanted = self.run.newest + chance.randrange(INTERVAL)  # however many saves come until it is seen
        self.wait_until(lambda: self.last_step() >= wanted)
        time.sleep(chance.uniform(0, 0.1))
        workers = self.workers()
        born = {pid: _born(pid) for pid in workers.values()}
        assert set(workers) == {0, 1}, f"{kind}: {workers}"
        with pytest.raises(ValueError, match="another run is writing here"):
            RunFolder(self.run.folder).open()
        victims = {"rank 0": [workers[0]], "rank 1": [workers[1]], "both": [*workers.values()], "agent": []}[kind]
        for pid in victims or [self.agent.pid]:
            os.kill(pid, signal.SIGKILL)
        reached, saved = self.last_step(), self.run.newest
        if kind == "agent":
            self.agent.wait()
            wait_for_death(workers, born, seconds=5)
            wait_for_lock(self.run.folder, seconds=5)
            self.start()
        self.wait_until(lambda: len(self.resumed_from()) > begun)
        assert self.resumed_from()[-1] >= saved
        return reached - self.resumed_from()[-1]


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_for_death(pids: dict[int, int], born: dict[int, str], seconds: float) -> None:
    until = time.monotonic() + seconds
    while any(_born(pid) == born[pid] for pid in pids.values()):
        assert time.monotonic() < until, "orphans are left"
        time.sleep(0.01)


def wait_for_lock(folder: Path, seconds: float) -> None:
    """Nobody holds it any more; the last thread of a killed process may be in the middle of a write."""
    until = time.monotonic() + seconds
    while (lock := lock_file(folder / ".lock")) is None:
        assert time.monotonic() < until, "a dead run holds its folder"
        time.sleep(0.01)
    lock.close()


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run that nobody strikes, by --parallel."""

    @functools.cache
    def made(parallel: str) -> Run:
        job = Job(tmp_path_factory.mktemp("torchrun") / "whole", "--parallel", parallel)
        assert job.agent.wait(300) == 0, job.output
        return job.run

    return made


def check_as_if_nothing_had_been(job: Job, whole: Run, parallel_differs: bool = False) -> None:
    files = (f"model_{STEPS - 1:05d}.pt", "best.pt") if parallel_differs else ()
    assert differences(job.run.folder, whole.folder) == [f"{name}: settings.parallel" for name in files]
    assert records(job.run.folder) == records(whole.folder)
    assert job.run.status() == whole.status()
    assert not list(job.run.folder.glob(".tmp-*")) and not list(job.run.folder.glob("earlier-*"))


def test_20_sigkills_of_either_rank_of_both_and_of_the_agent(calm: Callable[[str], Run], tmp_path: Path) -> None:
    chance = random.Random(7)
    kinds = ["rank 0"] * 6 + ["rank 1"] * 6 + ["both"] * 5 + ["agent"] * 3
    chance.shuffle(kinds)
    job = Job(tmp_path / "run", restarts=100)
    redone = sum(job.strike(kind, chance) for kind in kinds)
    assert job.agent.wait(300) == 0, job.output[-3000:]
    began = job.resumed_from()
    print(f"{len(kinds)} kills, {redone} steps re-done, went on after {began}")
    assert len(began) == len(kinds) and len(set(began)) >= len(kinds) // 2 and redone >= len(kinds)
    assert began[-1] - began[0] >= INTERVAL * (len(kinds) - 1), "progress between the kills"
    named = len(re.findall(r"error: rank [01] \(host .*?\) is gone", job.output))
    assert named >= 6, "survivors name the dead"
    check_as_if_nothing_had_been(job, calm("ddp"))


@pytest.mark.parametrize(("parallel", "like"), [("zero1", "ddp"), ("fsdp", "fsdp")])
def test_sigkills_where_no_process_has_it_all(
    calm: Callable[[str], Run], tmp_path: Path, parallel: str, like: str
) -> None:
    """zero1 ends as ddp does, to the bit. All processes gather what a save needs, so a kill can strike in between."""
    chance = random.Random(11)
    job = Job(tmp_path / "run", "--parallel", parallel, restarts=100)
    redone = sum(job.strike(kind, chance) for kind in ("rank 1", "rank 0", "both", "agent", "rank 0", "rank 1"))
    assert job.agent.wait(300) == 0, job.output[-3000:]
    began = job.resumed_from()
    print(f"{parallel}: {len(began)} kills, {redone} steps re-done, went on after {began}")
    assert len(began) == 6 and began[-1] - began[0] >= INTERVAL * 5 and redone >= 3
    check_as_if_nothing_had_been(job, calm(like), parallel != like)


def test_a_signal_to_the_agent_and_a_process_that_hangs(calm: Callable[[str], Run], tmp_path: Path) -> None:
    job = Job(tmp_path / "run", "--dist_timeout", "5")
    job.wait_until(lambda: job.run.newest >= INTERVAL)
    at = time.monotonic()
    job.agent.terminate()
    assert job.agent.wait(30) == 1, "torchrun's own code for a signal, whatever its processes say"
    assert time.monotonic() - at < 10, "a micro-batch, the save, and 5 s"
    stopped = job.run.newest
    assert job.run.status() == {"state": "stopped", "step": stopped}
    assert f"Stopped by SIGTERM after step {stopped}" in job.output

    for number, rank in zip(itertools.count(1), (1, 0)):
        job.start()
        job.wait_until(lambda number=number: len(job.resumed_from()) == number)
        before = job.run.newest
        job.wait_until(lambda before=before: job.run.newest > before)
        hung = job.workers()[rank]
        os.kill(hung, signal.SIGSTOP)
        at = time.monotonic()
        assert job.agent.wait(60) == 1
        assert time.monotonic() - at < 5 + 10, "timeout + 10 s"
        assert f"rank {rank} (host {os.uname().nodename}, pid {hung}) hangs" in job.output
        assert not Path(f"/proc/{hung}").exists()
    job.start()
    assert job.agent.wait(300) == 0, job.output[-3000:]
    check_as_if_nothing_had_been(job, calm("ddp"))
