"""SIGTERM and SIGINT at any moment: the last completed step is saved as it was at its end, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from formats.checkpoint import load_checkpoint
from tests.lives import (
    Life,
    Run,
    Strike,
    checkpoint_differences,
    differences,
    finetuning,
    pretrained,
    pretraining,
    records,
    uninterrupted,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def every_step_saved(run: Run) -> Run:
    """The same run in one life, with a checkpoint of each step."""
    return uninterrupted(Run(run.kind, run.data_dir, run.folder, {**run.changes, "checkpoint_interval": 1}))


def stop_at(run: Run, at: str, number: int) -> Life:
    """One life that is asked to stop at an event. It must leave in order: exit code 0, the last step saved once."""
    life = run.live(Strike(at, signal=number))
    assert life.code == 0 and not life.summary["finished"], f"stop at {at}: {life.describe()}"
    last = max(life.steps, default=life.began_after)
    assert last is not None
    assert run.status() == {"state": "stopped", "step": last}
    assert run.newest == last, f"stop at {at}: the newest checkpoint is {run.newest}, the last step {last}"
    saves = [event for event in life.events if event.startswith("save model_")]
    assert len(saves) == len(set(saves)), f"stop at {at}: saved twice: {saves}"
    assert not list(run.folder.glob(".tmp-*"))
    return life


def check_is_end_of_step(run: Run) -> bool:
    """What a stop saved is what a checkpoint due at that step would hold, bit for bit, and the record reaches it.

    Returns whether the step's evaluation was done. If not, only what is known of evaluations may differ: it is done
    over from the state at the end of the step, and the line in the record comes then.
    """
    whole, step = every_step_saved(run), run.newest
    finished = bool(load_checkpoint(run.checkpoint(step))["progress"]["finished_step"])
    if step > 0:  # no interval ends at step 0
        found = checkpoint_differences(run.checkpoint(step), whole.checkpoint(step))
        known = (f"model_{step:05d}.pt: progress.", f"model_{step:05d}.pt: val_loss")
        assert not [difference for difference in found if finished or not difference.startswith(known)]
    assert records(run.folder) == records(whole.folder)[: step + finished]
    return finished


def check_finish(run: Run) -> None:
    life = run.live()
    assert life.code == 0 and life.summary["finished"], life.describe()
    whole = uninterrupted(run)
    assert not differences(run.folder, whole.folder)
    assert run.status() == whole.status()


@pytest.mark.parametrize("make", [pretraining, finetuning])
def test_a_stop_at_every_micro_batch(make, tmp_path: Path) -> None:
    # Each life begins where the one before stopped, does as much as it is let, and stops one micro-batch later.
    run = make(tmp_path / "run", keep_last_n_checkpoints=2)
    micros = [event.split("@")[0] + "@*" for event in uninterrupted(run).lives[0].events if event.startswith("micro ")]
    assert len(micros) >= 12
    finished = []
    for number, micro in enumerate(micros[:-1]):  # after the last one there is nothing left to stop
        life = stop_at(run, micro, SIGNALS[number % 2])
        if run.newest >= 0:
            finished.append(check_is_end_of_step(run))
        else:
            assert "nothing to save" in life.log.read_text() and not run.steps_on_disk()
    assert set(finished) == {True, False}
    assert max(life.began_after for life in run.lives) >= 4
    check_finish(run)


MOMENTS = [  # in an order in which a life that goes on after one still comes to the next
    "write config.yaml@start",  # before anything is set up
    "eval 1@start",  # the evaluation before training
    "begin *",
    "step 0@0",
    "eval 0@2",
    "eval 2@2",
    "write best.pt@2",
    "fsync folder-of-best.pt@2",
    "token 0@4",
    "write samples.jsonl@4",
    "write metrics.jsonl@4",
    "eval 3@6",
    "fsync metrics.jsonl@6",
    "eval 1@7",  # all steps are done, what follows the last is not
    "token 0@7",
]


@pytest.mark.parametrize("first", [0, 1])
def test_a_stop_in_an_evaluation_in_a_sample_and_between(first: int, tmp_path: Path) -> None:
    run = pretraining(tmp_path / "run", keep_last_n_checkpoints=2)
    for number, moment in enumerate(MOMENTS[first::2]):
        stop_at(run, moment, SIGNALS[number % 2])
        kind, step = moment.split()[0], moment.split("@")[-1]
        if kind in ("eval", "token", "step") and step != "start":
            # The step is done, its evaluation and sample are not: they are done over, with their line in the record.
            assert run.newest == int(step)
    check_finish(run)


SAVE_MOMENTS = [f"{kind} model_00003.pt@3" for kind in ("save", "write", "fsync", "rename", "saved")]
SAVE_MOMENTS += ["fsync folder-of-model_00003.pt@3"]


def test_a_stop_in_a_save(tmp_path: Path) -> None:
    start = pretraining(tmp_path / "start", keep_last_n_checkpoints=2)
    stop_at(start, "micro 3:*", signal.SIGTERM)
    for number, moment in enumerate(SAVE_MOMENTS):
        run = Run(start.kind, start.data_dir, tmp_path / f"stop-{number}", start.changes)
        shutil.copytree(start.folder, run.folder)
        life = stop_at(run, moment, SIGNALS[number % 2])
        assert life.steps == [3], "the save is finished, no step is begun"
        assert check_is_end_of_step(run)
        check_finish(run)


@pytest.mark.parametrize("moment", ["save", "write", "fsync", "rename"])
def test_a_stop_while_a_checkpoint_is_written_beside_the_steps(moment: str, tmp_path: Path) -> None:
    run = pretraining(tmp_path / "run", async_save="on", keep_last_n_checkpoints=2)
    life = stop_at(run, f"{moment} model_00003.pt@3", SIGNALS[len(moment) % 2])
    assert "saved model_00003.pt@3" in life.events, "what was begun is finished"
    assert max(life.steps) in (3, 4, 5, 6), "and so is the micro-batch, not much more"
    check_is_end_of_step(run)
    check_finish(run)


def test_sigusr1_saves_after_the_step_and_goes_on(tmp_path: Path) -> None:
    run = pretraining(tmp_path / "run", keep_last_n_checkpoints=0)
    life = run.live(*(Strike(at, signal=signal.SIGUSR1) for at in ("micro 1:*", "micro 4:*", "eval 1@4", "token 0@4")))
    assert life.code == 0 and life.summary["finished"], life.describe()
    assert run.steps_on_disk() == [1, 3, 4, 5, 6, 7], "of steps 1, 4 and the one after the evaluation of 4 besides"
    for step in run.steps_on_disk():
        assert not checkpoint_differences(run.checkpoint(step), every_step_saved(run).checkpoint(step))
    assert not differences(run.folder, uninterrupted(run).folder)


def test_a_stop_in_the_first_step_after_resuming_into_another_folder_saves_there(tmp_path: Path) -> None:
    first, second = pretraining(tmp_path / "first"), pretraining(tmp_path / "second")
    stop_at(first, "micro 5:*", signal.SIGTERM)
    life = second.live(
        Strike("begin *", signal=signal.SIGINT),
        auto_resume=False,
        resume=True,
        checkpoint_path=str(first.checkpoint(4)),
    )
    assert life.code == 0 and life.steps == [], life.describe()
    assert not checkpoint_differences(first.checkpoint(4), second.checkpoint(4))


def test_a_stop_while_the_last_checkpoint_is_written_comes_too_late(tmp_path: Path) -> None:
    run = pretraining(tmp_path / "run")
    life = run.live(Strike("write model_00007.pt@7", nth=100, signal=signal.SIGTERM))
    assert life.code == 0 and life.summary["finished"]
    assert run.status()["state"] == "finished"
    assert not differences(run.folder, uninterrupted(run).folder)


@pytest.mark.parametrize(
    ("second", "forwarded_s", "code"),
    [
        (signal.SIGTERM, 3.0, 0),  # forwarded by a launcher: the same wish again
        (signal.SIGTERM, 0.0, 128 + signal.SIGTERM),  # later: somebody will not wait
        (signal.SIGINT, 3.0, 128 + signal.SIGINT),  # another one is no forwarded one
    ],
)
def test_a_second_signal(second: int, forwarded_s: float, code: int, tmp_path: Path) -> None:
    run = pretraining(tmp_path / "run")
    first = Strike("micro 5:*", signal=signal.SIGTERM)
    life = run.live(first, Strike("write model_00004.pt@4", nth=50, signal=second), forwarded_s=forwarded_s)
    assert life.code == code, life.describe()
    assert run.steps_on_disk() == ([3, 4] if code == 0 else [3])
    assert (list(run.folder.glob(".tmp-*")) == []) == (code == 0)
    check_finish(run)
    assert not list(run.folder.glob(".tmp-*"))


def test_a_forwarded_signal_after_the_run_has_stopped_does_not_spoil_the_exit_code(tmp_path: Path) -> None:
    # Slurm and torchrun send it twice; the second may come when all is saved and the interpreter is on its way out.
    run = pretraining(tmp_path / "run")
    life = run.live(Strike("micro 5:*", signal=signal.SIGTERM), Strike("returned *", signal=signal.SIGTERM))
    assert life.code == 0, life.describe()
    assert json.loads((run.folder / "status.json").read_text()) == {"state": "stopped", "step": 4}


def test_signals_do_what_they_did_once_a_run_has_ended(tmp_path: Path) -> None:
    life = pretraining(tmp_path / "run").live(Strike("returned *", signal=signal.SIGTERM))
    assert life.code == -signal.SIGTERM, life.describe()


# -- several processes -----------------------------------------------------------------------------------------------


def two_ranks(folder: Path) -> Run:
    return pretraining(folder, total_batch_size=1024)


@pytest.fixture(scope="module")
def whole_of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = two_ranks(tmp_path_factory.mktemp("ranks") / "whole")
    assert [life.code for life in run.live_together(ranks=2, checkpoint_interval=1, keep_last_n_checkpoints=0)] == [
        0,
        0,
    ]
    return run


def test_all_processes_stop_at_the_same_step_when_one_gets_the_signal(whole_of_two_ranks: Run, tmp_path: Path) -> None:
    run = two_ranks(tmp_path / "run")
    wish_to_save = Strike("micro 1:*", signal=signal.SIGUSR1, rank=1)
    moments = (("micro 2:*", 1), ("eval 1@4", 1), ("token 0@4", 0), ("micro 6:*", 0))
    for number, (moment, rank) in enumerate(moments):
        lives = run.live_together(wish_to_save, Strike(moment, signal=SIGNALS[number % 2], rank=rank), ranks=2)
        assert [life.code for life in lives] == [0, 0], lives[rank].describe()
        assert lives[0].steps == lives[1].steps and not lives[0].summary["finished"]
        assert lives[0].summary["step"] == lives[1].summary["step"] == run.newest
        assert run.status() == {"state": "stopped", "step": run.newest}
    events = [event.partition(":")[0] for event in run.lives[0].events]
    assert events.index("save model_00001.pt@1") < events.index("micro 2"), "one process was asked to, and it went on"
    assert [life.code for life in run.live_together(ranks=2)] == [0, 0]
    assert not differences(run.folder, whole_of_two_ranks.folder)


def test_a_process_that_is_killed_ends_the_others_by_name_and_harms_nothing(
    whole_of_two_ranks: Run, tmp_path: Path
) -> None:
    run = two_ranks(tmp_path / "run")
    for moment, rank in (("micro 4:*", 1), ("write model_00006.pt@6", 0)):
        lives = run.live_together(Strike(moment, rank=rank), ranks=2)
        assert lives[rank].killed and lives[1 - rank].code == 1
        error = lives[1 - rank].log.read_text().splitlines()[-1]
        assert f"rank {rank} (host {os.uname().nodename}, pid {lives[rank].pid}) is gone" in error
        assert f"Saved up to step 3 in {run.folder}: the same command with --auto_resume goes on from there" in error
        assert f"pid {lives[1 - rank].pid}" not in error
        assert run.status()["state"] == ("failed" if rank == 1 else "running"), "a killed process cannot say so"
        assert run.newest == 3, "nothing is saved after an exchange failed"
        assert not checkpoint_differences(run.checkpoint(3), whole_of_two_ranks.checkpoint(3))
    assert [life.code for life in run.live_together(ranks=2)] == [0, 0]
    assert not differences(run.folder, whole_of_two_ranks.folder)


# -- the scripts, as a user starts them ------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--device cpu --batch_size 4 --dropout 0.1 --seed 3 --sample_tokens 2 --checkpoint_interval 4 --eval_interval 8"
SMALL += " --generate_interval 8 --max_eval_samples 8 --keep_last_n_checkpoints 0"
# Steps enough for a signal to come before the end: 30 ms each in pretraining, 5 ms in fine-tuning.
PRETRAIN = "--preset tiny --block_size 32 --total_batch_size 256 --max_steps 16"
FINETUNE = "--block_size 128 --total_batch_size 1024 --max_steps 60"


def script(kind: str, folder: Path) -> tuple[Run, list[str]]:
    """A run by command line, and its words after `python SCRIPT`."""
    run = (finetuning if kind == "finetune" else pretraining)(folder)
    words = (
        ["--pretrained_checkpoint", str(pretrained()), *FINETUNE.split()] if kind == "finetune" else PRETRAIN.split()
    )
    return run, [*words, *SMALL.split(), "--data_dir", str(run.data_dir), "--log_dir", str(folder)]


def start(kind: str, words: list[str], launcher: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """The script in a process of its own, its output in a file beside the run's folder."""
    name = "finetune_dolly.py" if kind == "finetune" else "train_gpt2.py"
    log = Path(words[-1]).with_suffix(".out")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / name), *words], stdout=output, stderr=output, env=environment
        )


def signal_when_saved(process: subprocess.Popen[bytes], file: Path, number: int) -> int:
    """Send it as soon as the checkpoint is there; returns the exit code."""
    while not file.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait(120)


def check_script(kind: str, number: int, tmp_path: Path) -> None:
    """Struck after its first checkpoint, the same command with --auto_resume ends like a run that nobody disturbed."""
    run, words = script(kind, tmp_path / "run")
    code = signal_when_saved(start(kind, words), run.checkpoint(4), number)
    output = (tmp_path / "run.out").read_text()
    assert code == (-number if number == signal.SIGKILL else 0), output
    assert run.status()["state"] == ("running" if number == signal.SIGKILL else "stopped"), (
        "it was struck after its end"
    )
    assert start(kind, ["--auto_resume", *words]).wait(120) == 0, (tmp_path / "run.out").read_text()
    assert "Resuming from" in (tmp_path / "run.out").read_text().removeprefix(output)

    whole, words = script(kind, tmp_path / "whole")
    life = whole.live(argv=words)
    assert life.code == 0, life.describe()
    assert not differences(run.folder, whole.folder)
    assert run.status() == whole.status()
    assert (run.folder / "curves.png").stat().st_size > 10_000


def test_train_gpt2_killed_and_resumed(tmp_path: Path) -> None:
    check_script("pretrain", signal.SIGKILL, tmp_path)


def test_finetune_dolly_stopped_and_resumed(tmp_path: Path) -> None:
    check_script("finetune", signal.SIGTERM, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), [("pretrain", signal.SIGINT), ("finetune", signal.SIGKILL)])
def test_the_scripts_under_the_other_signals(kind: str, number: int, tmp_path: Path) -> None:
    check_script(kind, number, tmp_path)


@pytest.mark.slow
def test_torchrun_stops_both_processes_when_one_gets_the_signal(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run, words = script("pretrain", tmp_path / "run")
    agent = start("pretrain", words, torchrun)
    while not run.checkpoint(4).exists() and agent.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGTERM)
    assert agent.wait(120) == 0, (tmp_path / "run.out").read_text()
    assert run.status() == {"state": "stopped", "step": run.newest}
    assert start("pretrain", ["--auto_resume", *words], torchrun).wait(120) == 0
    whole, words = script("pretrain", tmp_path / "whole")
    assert start("pretrain", words, torchrun).wait(120) == 0
    assert not differences(run.folder, whole.folder)
