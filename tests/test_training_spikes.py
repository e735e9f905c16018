"""The spike guard: a batch of noise late in training makes the run go back, and on past it; nothing remains of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.order import permute
from formats.checkpoint import load_checkpoint, save_checkpoint
from report.records import read_run
from tests.full_checkpoints import same
from tests.lives import Run, Strike, differences
from tests.runs import log, losses, magnified, records, spied_batches, status, steps_on_disk, train
from tests.tiny import BYTES, sentence, write_set
from training.progress import Progress
from training.spikes import LEAST, MAX_IN_A_ROW, LossSpike, is_spike

SEED, BLOCK, STEPS, BAD, BACK = 1337, 32, 48, 37, 30  # the noise is in step 37, the checkpoint before it of step 30
NOISE = range(4 * BAD, 4 * BAD + 4)
RUN: dict[str, Any] = {"block_size": BLOCK, "batch_size": 2, "total_batch_size": 4 * BLOCK, "max_steps": STEPS}
RUN |= {"eval_interval": 10, "generate_interval": 0, "checkpoint_interval": 10, "max_eval_samples": 4}
GUARD = {**RUN, "spike_guard": 4.0}


def noisy_set(folder: Path) -> Path:
    """Text of which the samples NOISE are noise."""
    rng = np.random.default_rng(0)
    documents = [[*BYTES.encode(sentence(rng, 20)), BYTES.eot_id] for _ in range(120)]
    clean = documents[: len(documents) * 4 // 5]  # what becomes the training split
    stream = np.concatenate(clean)
    n_windows = -(-(len(stream) - 1) // BLOCK)
    assert n_windows > 4 * STEPS
    for window in permute(np.array(NOISE), n_windows, SEED, 0).tolist():
        place = slice(window * BLOCK, (window + 1) * BLOCK)
        stream[place] = rng.integers(0, 256, len(stream[place]))
    ends = np.cumsum([len(document) for document in clean])
    noisy = [part.tolist() for part in np.split(stream, ends[:-1])]
    return write_set(folder, [(ids, None) for ids in [*noisy, *documents[len(clean) :]]], "text", None)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noisy_set(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture(scope="module")
def guarded(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "guarded"
    with spied_batches():
        assert train(text, folder, **GUARD)["finished"]
    return folder


# -- what is a spike -------------------------------------------------------------------------------------------------


def test_it_takes_deviations_and_a_rise() -> None:
    flat = [2.0 + 0.01 * (number % 2) for number in range(LEAST)]
    assert is_spike(flat, 2.3, 6.0) and not is_spike(flat, 2.1, 6.0), "a tenth above, however flat the curve"
    wide = [2.0 + (number % 2) for number in range(LEAST)]
    assert not is_spike(wide, 5.0, 6.0) and is_spike(wide, 6.0, 6.0)
    assert not is_spike(flat[1:], 99.0, 6.0), "too few to say"
    below_zero = [-5.0 + 0.01 * (number % 2) for number in range(LEAST)]
    assert is_spike(below_zero, -4.0, 6.0) and not is_spike(below_zero, -4.9, 6.0), "a preference's loss may be"


# -- one run ---------------------------------------------------------------------------------------------------------


def test_the_noise_is_left_out_and_nothing_else_differs(text: Path, guarded: Path, tmp_path: Path) -> None:
    """A run of step 30's checkpoint whose place in the data was moved by hand ends with the same bits."""
    plain = {**RUN, "keep_last_n_checkpoints": 0}
    train(text, tmp_path / "plain", **plain)
    payload = load_checkpoint(tmp_path / "plain" / f"model_{BACK:05d}.pt")
    payload["train_loader_state"]["sample"] = NOISE.stop
    by_hand = tmp_path / "by-hand"
    save_checkpoint(by_hand / f"model_{BACK:05d}.pt", payload)
    with spied_batches() as batches:
        train(text, by_hand, **RUN, auto_resume=True)
    assert batches[0].samples[0] == NOISE.stop
    ours, theirs = (load_checkpoint(folder / f"model_{STEPS - 1:05d}.pt") for folder in (guarded, by_hand))
    for part in ("model", "optimizer", "rng", "train_loader_state"):
        assert same(ours[part], theirs[part]), part
    assert losses(guarded)[BACK + 1 :] == losses(by_hand)
    assert losses(guarded)[: BACK + 1] == losses(tmp_path / "plain")[: BACK + 1]
    assert losses(tmp_path / "plain")[BAD] > 2 * losses(tmp_path / "plain")[BAD - 1], "the noise was noticeable"


def test_it_is_told_once_and_each_step_stands_once(text: Path, guarded: Path) -> None:
    assert [record["step"] for record in records(guarded)] == list(range(STEPS))
    assert max(losses(guarded)[BACK:]) < 4.0
    (line,) = [line for line in log(guarded).splitlines() if line.startswith("Warning")]
    for part in (
        f"Loss spike at step {BAD}: ", f"global samples {NOISE.start}..{NOISE.stop - 1}", f"model_{BACK:05d}.pt",
        f"past samples {4 * (BACK + 1)}..{NOISE.stop - 1}, which are left out",
    ):  # fmt: skip
        assert part in line
    assert any("Loss spike at step 37" in warning for warning in read_run(guarded)["warnings"])
    assert status(guarded) == "finished" and steps_on_disk(guarded) == [30, 40, 47]
    progress = load_checkpoint(guarded / "model_00047.pt")["progress"]
    assert (progress["rolled_back_to"], progress["rollbacks"]) == (BACK, 1)
    assert progress["tokens"] == STEPS * 4 * BLOCK and len(progress["recent_losses"]) == STEPS
    best = load_checkpoint(guarded / "best.pt")
    assert best["step"] == progress["best_step"] and best["val_loss"] == progress["best_val_loss"]


def test_without_the_guard_the_loss_goes_up_and_stays_up(text: Path, tmp_path: Path) -> None:
    """The noise's gradient a thousandfold and unclipped, which is what makes large runs spike."""
    wild = {**GUARD, "max_grad_norm": 0.0, "lr_schedule": "constant"}
    with magnified(NOISE, 1000.0):
        train(text, tmp_path / "off", **{**wild, "spike_guard": 0.0})
        train(text, tmp_path / "on", **wild)
    off, on = (float(np.mean(losses(tmp_path / name)[-8:])) for name in ("off", "on"))
    assert off > on + 0.3, (off, on)


def test_a_spike_before_the_first_checkpoint_is_only_told(text: Path, tmp_path: Path) -> None:
    with magnified(range(100, 104), 1000.0):
        summary = train(text, tmp_path, **{**GUARD, "checkpoint_interval": 40, "max_steps": 28})
    assert summary["finished"] and "There is no checkpoint yet to go back to: going on." in log(tmp_path)
    assert len(records(tmp_path)) == 28


def test_a_loss_that_rises_whatever_the_data_is_an_error(text: Path, tmp_path: Path) -> None:
    with magnified(range(120, 10**6), 1000.0), pytest.raises(LossSpike, match=r"Loss spike at step 21: .* 3 times"):
        train(text, tmp_path, **GUARD, seed=2)
    told = [line for line in log(tmp_path).splitlines() if line.startswith("Warning: Loss spike at step")]
    assert len(told) == MAX_IN_A_ROW and status(tmp_path) == "failed"
    assert steps_on_disk(tmp_path) == [10, 20]


def test_a_damaged_checkpoint_is_passed_over_on_the_way_back(text: Path, tmp_path: Path) -> None:
    def rot(number: int) -> None:
        if number == 4 * BAD:
            (tmp_path / f"model_{BACK:05d}.pt").write_bytes(b"rotten")

    with magnified(NOISE, 2.0, before=rot):
        assert train(text, tmp_path, **GUARD)["finished"]
    assert f"Not used: {tmp_path}/model_00030.pt: is cut short" in log(tmp_path)
    assert "Going back to" in log(tmp_path) and "model_00020.pt, and on past samples 84..151" in log(tmp_path)
    assert [record["step"] for record in records(tmp_path)] == list(range(STEPS))


def test_settings_that_cannot_work_are_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--spike_guard goes back to a checkpoint: set --checkpoint_interval"):
        train(text, tmp_path, **{**GUARD, "checkpoint_interval": 0})
    with pytest.raises(ValueError, match=r"--spike_guard -1.0: expected at least 0"):
        train(text, tmp_path, **{**GUARD, "spike_guard": -1.0})


# -- interrupted -----------------------------------------------------------------------------------------------------


def test_interrupted_before_in_and_after_it_the_run_ends_the_same(text: Path, tmp_path: Path) -> None:
    changes = {**GUARD, "keep_last_n_checkpoints": 1}
    whole = Run("pretrain", text, tmp_path / "whole", changes)
    life = whole.live()
    assert life.code == 0 and "Loss spike at step 37" in life.log.read_text(), life.describe()
    assert [event.split("@")[0] for event in life.events if event.startswith("begin")] == ["begin -1", "begin 30"]

    run = Run("pretrain", text, tmp_path / "run", changes)
    run.live(Strike("step 35@35", signal=signal.SIGTERM))
    assert run.steps_on_disk() == [30, 35], "of keep 1, and the one to go back to"
    run.live(Strike("begin 30*"))  # killed as it has gone back
    assert run.steps_on_disk() == [30]
    run.live(Strike("step 33@33", nth=1, signal=signal.SIGTERM))  # on the new course
    assert run.steps_on_disk() == [30, 33]
    run.live(Strike("write model_00040.pt*", nth=40))
    last = run.live()
    assert [life.code for life in run.lives] == [0, -signal.SIGKILL, 0, -signal.SIGKILL, 0], last.describe()
    assert [life.began_after for life in run.lives] == [-1, 35, 30, 33, 33]
    assert not differences(run.folder, whole.folder)


def test_what_it_knows_survives_the_file() -> None:
    progress = Progress(recent_losses=[1.0, 2.5], rolled_back_to=3, rollbacks=1)
    again = Progress.from_dict(json.loads(json.dumps(progress.to_dict())))
    again.recent_losses.append(1.0)
    assert progress.recent_losses == [1.0, 2.5] and again.rollbacks == 1
    old = {key: value for key, value in progress.to_dict().items() if not key.startswith(("recent", "roll"))}
    assert Progress.from_dict(old).recent_losses == [], "of a checkpoint from before it was kept"
