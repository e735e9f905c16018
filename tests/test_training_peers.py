"""Who is gone has a name: of processes that die, hang, fail or leave, in a store that may go with one of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.lives import Strike, pretraining
from training import peers
from training.peers import Member, Peers, blame
from training.watch_peers import in_time, is_failed_exchange

ROOT = Path(__file__).resolve().parent.parent


class Memory:
    """A store that answers, until it does not."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}
        self.answers = True

    def set(self, key: str, value: str) -> None:
        if not self.answers:
            raise RuntimeError("Connection was reset")
        self.lines[key] = value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        if not self.answers:
            raise RuntimeError("wait timeout")
        return [self.lines[key].encode() for key in keys]


class Job:
    """Several Peers in one process; what each would end its process with is in `ended`."""

    def __init__(
        self, size: int, agent: str | None = "10.0.0.1:29500", timeout_s: float = 0.5, **known: Member
    ) -> None:
        self.store, self.timeout_s = Memory(), timeout_s
        self.members = [Member(rank, f"node{rank}", 4000 + rank, "") for rank in range(size)]
        for member in known.values():
            self.members[member.rank] = member
        self.ended: dict[int, str] = {}
        self.all = [self._peers(rank, agent) for rank in range(size)]
        for each in self.all:
            each.beat()
        for each in self.all:
            each.start()

    def _peers(self, rank: int, agent: str | None) -> Peers:
        def last_words(reason: str) -> str:
            self.ended[rank] = reason
            return f"{reason}. Saved up to step 7"

        return Peers(self.members, rank, lambda: self.store, agent, self.timeout_s, last_words)

    def hang(self, rank: int) -> None:
        """It beats no more."""
        self.all[rank]._ended.set()
        self.all[rank]._thread.join()

    def wait(self, ranks: Sequence[int], seconds: float = 5.0) -> None:
        until = time.monotonic() + seconds
        while not set(ranks) <= set(self.ended) and time.monotonic() < until:
            time.sleep(0.01)
        assert set(self.ended) == set(ranks), self.ended


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Job]]:
    """Beats of 20 ms in place of a second."""
    for name, value in {"BEAT_S": 0.02, "SILENT_S": 0.2, "LEAVE_S": 1.0, "AWAY_S": 0.4, "ANSWER_S": 0.2}.items():
        monkeypatch.setattr(peers, name, value)
    jobs: list[Job] = []

    def end(code: int) -> None:  # of the thread, in place of the process
        for each in (each for job in jobs for each in job.all if each._thread is threading.current_thread()):
            each._ended.set()

    monkeypatch.setattr(peers.os, "_exit", end)

    def make(*args: object, **kwargs: object) -> Job:
        jobs.append(Job(*args, **kwargs))  # type: ignore[arg-type]
        return jobs[-1]

    yield make
    for each in jobs:
        for rank in range(len(each.all)):
            each.hang(rank)


def test_one_that_hangs_is_named_to_all_within_the_timeout(job, capsys: pytest.CaptureFixture[str]) -> None:
    four = job(4)
    time.sleep(0.7)
    assert not four.ended, "all beat"
    four.hang(2)
    started = time.monotonic()
    four.wait([0, 1, 3])
    assert 0.3 < time.monotonic() - started < 2
    assert len(set(four.ended.values())) == 1, "the others repeat what rank 0 found"
    assert "rank 2 (host node2, pid 4002) is gone or hangs: silent for " in four.ended[3]
    assert "last heard of at " in four.ended[3] and "tests/test_training_peers.py:" in four.ended[3]
    error = capsys.readouterr().err
    assert error.count("error: rank 2 (host node2, pid 4002)") == 3 and error.count("Saved up to step 7") == 3


def test_where_rank_0_hangs_each_finds_out_by_itself(job) -> None:
    three = job(3)
    three.hang(0)
    three.wait([1, 2])
    assert all(reason.startswith("rank 0 (host node0, pid 4000) is gone") for reason in three.ended.values())


def test_one_that_died_on_this_machine_is_not_waited_for_until_the_timeout(job) -> None:
    # As under NCCL, where the main threads hear nothing of it.
    child = subprocess.Popen(["sleep", "60"])
    born = peers._born(child.pid)
    three = job(3, timeout_s=60.0, died=Member(2, os.uname().nodename, child.pid, born))
    three.hang(2)
    time.sleep(1.3)
    assert not three.ended, "it lives"
    child.kill()
    child.wait()
    three.wait([0, 1])
    assert all(reason.startswith(f"{three.members[2]} is gone: silent for ") for reason in three.ended.values())


def test_one_that_left_in_order_is_not_called_dead(job) -> None:
    three = job(3)
    three.all[1].leave()
    three.all[0].leave()
    time.sleep(1.2)  # more than the timeout, and than a failed one gets
    assert not three.ended


def test_one_that_failed_is_quoted_after_a_while_in_which_the_others_may_notice_by_themselves(job) -> None:
    three = job(3)
    three.all[1].leave(ValueError("part_00003.jsonl:\n no such file"))
    time.sleep(0.7)
    assert not three.ended
    three.wait([0, 2])
    assert three.ended[0] == "rank 1 (host node1, pid 4001) failed: ValueError: part_00003.jsonl: no such file"


@pytest.mark.parametrize(
    ("agent", "who"), [("10.0.0.1:29500", "torchrun at 10.0.0.1:29500"), (None, "rank 0 (host node0, pid 4000)")]
)
def test_a_store_that_is_gone_takes_its_keeper_with_it(agent: str | None, who: str, job) -> None:
    three = job(3, agent=agent)
    three.store.answers = False
    three.wait([0, 1, 2])
    assert all(reason.startswith(who) for reason in three.ended.values())


def test_a_store_that_answers_again_in_time_has_done_no_harm(job) -> None:
    two = job(2)
    for _ in range(3):
        two.store.answers = False
        time.sleep(0.3)
        two.store.answers = True
        time.sleep(0.1)
    assert not two.ended


def test_who_was_away_itself_does_not_judge(job, monkeypatch: pytest.MonkeyPatch) -> None:
    # As after SIGCONT, or when a laptop wakes: every clock says that the others were silent for an hour.
    two = job(2)
    time.sleep(0.1)
    real, ahead = time.monotonic, 3600.0
    monkeypatch.setattr(peers.time, "monotonic", lambda: real() + ahead)
    time.sleep(0.3)
    assert not two.ended
    two.hang(1)
    two.wait([0])


def test_after_a_failed_exchange_the_silent_one_is_named_rather_than_those_who_failed_of_it(job) -> None:
    four = job(4)
    four.hang(2)
    four.all[3].leave(RuntimeError("something that came of it"))
    assert str(four.all[1].explain()).startswith("rank 2 (host node2, pid 4002) is gone or hangs, last heard of at")
    assert str(four.all[1].last_words("x")) == "x. Saved up to step 7"


def test_after_a_failed_exchange_one_that_failed_is_quoted(job) -> None:
    three = job(3)
    three.all[0].leave()  # it met the same error and went
    three.all[2].leave(MemoryError("4 GB"))
    assert "rank 2 (host node2, pid 4002) failed: MemoryError: 4 GB" in str(three.all[1].explain())


def test_where_none_is_dead_each_says_where_it_is(job) -> None:
    three = job(3)
    for rank in (0, 2):
        three.hang(rank)
        three.all[rank]._ended.clear()
    keep = threading.Event()

    def beat() -> None:
        count = 0
        while not keep.wait(0.02):
            count += 1
            for rank, place in ((0, "training/loop.py:194"), (2, "data/loader.py:88")):
                three.store.lines[str(rank)] = f"lives 12:00:00 {count} {place}"

    thread = threading.Thread(target=beat)
    thread.start()
    said = str(three.all[1].explain())
    keep.set()
    thread.join()
    assert said.startswith("the processes did not meet, though none is dead (")
    assert "rank 0: training/loop.py:194" in said and "rank 2: data/loader.py:88" in said
    assert "rank 1: tests/test_training_peers.py:" in said


def test_only_the_very_process_that_hangs_on_this_machine_gets_sigkill() -> None:
    child = subprocess.Popen(["sleep", "60"])
    member = Member(1, os.uname().nodename, child.pid, peers._born(child.pid))
    others = (
        Member(1, "elsewhere", child.pid, member.born),
        Member(1, member.host, child.pid, "1"),  # an older process had the number
        Member(1, member.host, child.pid, ""),
    )
    assert [blame(each).rpartition(") ")[2] for each in others] == ["is gone or hangs", "is gone", "is gone or hangs"]
    assert child.poll() is None
    os.kill(child.pid, signal.SIGSTOP)
    assert blame(member) == f"{member} hangs"
    assert child.wait(10) == -signal.SIGKILL
    assert blame(member) == f"{member} is gone"


def test_what_does_not_answer_is_left_behind() -> None:
    assert in_time(lambda: 7, 5) == 7
    with pytest.raises(RuntimeError, match="refused"):
        in_time(lambda: (_ for _ in ()).throw(RuntimeError("refused")), 5)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="no answer"):
        in_time(lambda: time.sleep(3), 0.1)
    assert time.monotonic() - started < 2


def test_errors_of_an_exchange_are_told_from_others() -> None:
    gloo = "[/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:23522"
    assert is_failed_exchange(RuntimeError(gloo))
    assert not is_failed_exchange(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_script_says_it_in_one_line_and_ends_with_exit_code_1() -> None:
    # Also where something would keep a process from ending: a thread that waits for whoever is gone.
    script = """
import threading
from training.peers import PeersLost
from training.run_settings import TrainSettings
from training.settings import run_script

def main(settings):
    threading.Thread(target=threading.Event().wait).start()
    print("Step 3")
    raise PeersLost("rank 1 (host a, pid 7) is gone. Saved up to step 3")

run_script(main, TrainSettings, "", [])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "Step 3\n")
    assert ended.stderr == "error: rank 1 (host a, pid 7) is gone. Saved up to step 3\n"


# -- orphans ---------------------------------------------------------------------------------------------------------

WORKER = """
import time
from training.peers import die_with_launcher
die_with_launcher()
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("under_torchrun", [True, False])
def test_workers_end_with_the_agent_that_started_them(under_torchrun: bool, tmp_path: Path) -> None:
    launcher = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {WORKER!r}]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | ({"TORCHELASTIC_RUN_ID": "1"} if under_torchrun else {})
    agent = subprocess.Popen(
        [sys.executable, "-c", launcher], stdout=subprocess.PIPE, env=environment, text=True, cwd=tmp_path
    )
    assert agent.stdout is not None and agent.stdout.readline() == "up\n"
    (worker,) = map(int, Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split())
    born = peers._born(worker)
    assert born
    agent.kill()
    agent.wait()
    until = time.monotonic() + (10 if under_torchrun else 1)
    while peers._born(worker) == born and time.monotonic() < until:
        time.sleep(0.01)
    alive = peers._born(worker) == born
    if alive:
        os.kill(worker, signal.SIGKILL)
    assert alive == (not under_torchrun)


# -- two processes of a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])  # with rank 0 goes the store
def test_a_process_that_hangs_is_named_and_ended(rank: int, tmp_path: Path) -> None:
    run = pretraining(tmp_path / "run", total_batch_size=1024, dist_timeout=5.0)
    begun = time.time()
    lives = run.live_together(Strike("micro 5:*", rank=rank, signal=signal.SIGSTOP), ranks=2)
    hung, other = lives[rank], lives[1 - rank]
    assert hung.code == -signal.SIGKILL and other.code == 1, other.describe()
    text = other.log.read_text()
    assert f"rank {rank} (host {os.uname().nodename}, pid {hung.pid}) hangs" in text
    assert f"Saved up to step 3 in {run.folder}: the same command with --auto_resume goes on from there" in text
    stopped = max(record.stat().st_mtime for record in run.folder.glob("metrics.jsonl"))  # of the step before
    assert begun + other.seconds - stopped < 5 + 10 + 1, "timeout + 10 s, and a step"
    assert run.newest == 3, "nothing was saved after the exchange failed"
    assert run.status()["state"] == ("failed" if rank == 1 else "running")


@pytest.mark.parametrize("rank", [0, 1])  # with rank 0 goes the store
def test_all_others_name_the_one_that_died_and_not_each_other(rank: int, tmp_path: Path) -> None:
    run = pretraining(tmp_path / "run", total_batch_size=768)
    lives = run.live_together(Strike("micro 2:*", rank=rank), ranks=3)
    assert lives[rank].killed
    for other in (life for life in lives if life is not lives[rank]):
        error = other.log.read_text().splitlines()[-1]
        assert other.code == 1 and f"rank {rank} (host {os.uname().nodename}, pid {lives[rank].pid}) is gone" in error
        assert error.count("(host ") == 1
        assert f"No checkpoint is in {run.folder} yet: the same command starts anew" in error
