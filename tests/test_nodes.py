"""Several machines in earnest, as far as one can play them: network namespaces, torchrun on each, disks of their own.

Machines are killed and join; what is left must go on and end as a run that nothing happened to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.checkpoint import save_checkpoint
from tests.cable import ADDRESSES, Cable, why_not
from tests.lives import differences
from tests.runs import log, losses, records, status, steps_on_disk, weights
from tests.tiny import BYTES, record_set, text_set
from tests.tiny_checkpoints import tiny_model

ROOT = Path(__file__).resolve().parent.parent
NODES = str(ROOT / "scripts" / "torchrun_nodes.sh")
SAMPLES = 4  # of a step, over all processes
STEP: dict[str, Any] = {"batch_size": 1, "total_batch_size": 512, "max_lr": 1e-2, "lr_schedule": "constant"}
STEP |= {"generate_interval": 0, "eval_interval": 4, "checkpoint_interval": 3, "auto_resume": True}
PATIENCE_S = 240  # for a machine that is busy with other things

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture
def cable(tmp_path: Path) -> Iterator[Cable]:
    """Two machines with the data in their folders 0 and 1, and a third folder for a run in peace."""
    for name in ("0", "1", "calm"):
        text_set(tmp_path / name / "text")
        record_set(tmp_path / name / "records")
    with Cable() as cable:
        yield cable


def start(cable: Cable, folder: Path, number: int, work: str, settings: dict[str, Any], **how: str) -> Any:
    """torchrun on one machine, by the script that users have."""
    how = {"PYTHON": sys.executable, "NODE_RANK": str(number), "MASTER_ADDR": ADDRESSES[0], "NPROC": "1", **how}
    words = ("bash", NODES, "tests/node_run.py", work, json.dumps(settings))
    return cable.start(number, *words, folder=folder / str(number), LOCAL_ADDR=ADDRESSES[number], **how)


def calm(folder: Path, processes: int, work: str, settings: dict[str, Any]) -> Path:
    """The same on one machine, undisturbed; where it is."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    subprocess.run(
        [*command, str(ROOT / "tests" / "node_run.py"), work, json.dumps({**settings, "seconds": 0.0})],
        cwd=folder / "calm",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=PATIENCE_S,
    )
    return folder / "calm" / "logs"


def wait_until(ready: Callable[[], object], folder: Path, what: str) -> None:
    """Poll; with what the machines said where it takes too long."""
    until = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < until, f"{what}\n{said(folder)}"
        time.sleep(0.05)


def said(folder: Path) -> str:
    """The ends of what the machines printed."""
    return "\n".join(path.read_text("utf-8", "replace")[-4000:] for path in folder.glob("*/output.txt"))


def ended(folder: Path, *processes: subprocess.Popen[bytes]) -> list[int]:
    """The exit codes of agents, when they have ended."""
    wait_until(lambda: all(process.poll() is not None for process in processes), folder, "the run does not end")
    return [process.returncode for process in processes]


def logged(folder: Path) -> int:
    """Steps on record in a machine's folder."""
    path = folder / "logs" / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def batches(folder: Path) -> list[dict[str, Any]]:
    """Every batch that any process trained on, in order of time."""
    found: list[dict[str, Any]] = []
    for path in folder.glob("[01]/seen-*.jsonl"):
        lines = [json.loads(line) for line in path.read_bytes().splitlines() if line.endswith(b"}")]
        last = max((index for index, line in enumerate(lines) if "back_to" in line), default=-1)
        found += lines[last + 1 :]  # before that it only looked
    return sorted(found, key=lambda line: float(line["time"]))


def check_samples(folder: Path, steps: int) -> None:
    """The last time that a step was made, its samples were those of its number, each once, over all processes."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for line in batches(folder):
        by_step.setdefault(line["samples"][0] // SAMPLES, []).append(line)
    assert set(by_step) >= set(range(steps))
    for step in range(steps):
        last = by_step[step][-SAMPLES:]  # batches of one sample
        samples = sorted(sample for line in last for sample in line["samples"])
        assert samples == list(range(SAMPLES * step, SAMPLES * (step + 1))), (step, by_step[step])
        (world_size,) = {line["world_size"] for line in last}
        assert {line["rank"] for line in last} == set(range(world_size)), (step, last)


def check_logged_once(logs: Path, steps: int) -> None:
    assert [record["step"] for record in records(logs)] == list(range(steps))


def check_close(logs: Path, other: Path, step: int) -> None:
    """Equal to the rounding of fp32, which grows with the steps."""
    assert losses(logs) == pytest.approx(losses(other), rel=1e-4)
    for name, tensor in weights(other, step).items():
        torch.testing.assert_close(weights(logs, step)[name], tensor, rtol=1e-2, atol=1e-3)


def test_static_the_second_machine_has_only_the_data(tmp_path: Path, cable: Cable) -> None:
    """Nine steps, then four more from the checkpoint: only the first machine has that, and the pretrained model."""
    model = tiny_model(block_size=128, scale=1.0)
    payload = {"model": model.state_dict(), "config": model.config.to_dict(), "tokenizer": BYTES.spec()}
    for name in ("0", "calm"):
        save_checkpoint(tmp_path / name / "model.pt", payload)
    for steps in (9, 13):
        both = [start(cable, tmp_path, number, "tune", {**STEP, "max_steps": steps}, NNODES="2") for number in (0, 1)]
        assert ended(tmp_path, *both) == [0, 0], said(tmp_path)
    logs = tmp_path / "0" / "logs"
    assert "Resuming from" in log(logs) and status(logs) == "finished"
    assert not (tmp_path / "1" / "logs").exists() and not (tmp_path / "1" / "model.pt").exists()
    check_samples(tmp_path, 13)
    check_logged_once(logs, 13)
    assert not differences(logs, calm(tmp_path, 2, "tune", {**STEP, "max_steps": 13}))


def test_static_the_second_machine_has_other_data(tmp_path: Path, cable: Cable) -> None:
    """One error on both, and nobody waits."""
    (tmp_path / "1" / "text" / "dataset.json").unlink()
    both = [start(cable, tmp_path, number, "train", {**STEP, "max_steps": 4}, NNODES="2") for number in (0, 1)]
    assert 0 not in ended(tmp_path, *both)
    for number in (0, 1):
        text = (tmp_path / str(number) / "output.txt").read_text()
        assert "is missing or no regular file" in text and "(rank 1 on " in text and "each machine needs" in text, text


def test_c10d_five_killed_workers_cost_only_time(tmp_path: Path, cable: Cable) -> None:
    """Two machines of two processes; one after the other is killed. All start again from the newest checkpoint."""
    settings = {**STEP, "max_steps": 48, "exact": True}
    how = {"NNODES": "2", "NPROC": "2", "RDZV": "c10d", "LAST_CALL": "2", "JOIN_TIMEOUT": "120"}
    both = [start(cable, tmp_path, number, "train", {**settings, "seconds": 0.2}, **how) for number in (0, 1)]
    victims = (3, 0, 2, 1, 3)
    for number, rank in enumerate(victims, start=1):
        wait_until(lambda number=number: logged(tmp_path / "0") >= 8 * number, tmp_path, "no steps")
        os.kill([line["pid"] for line in batches(tmp_path) if line["rank"] == rank][-1], signal.SIGKILL)
    assert ended(tmp_path, *both) == [0, 0], said(tmp_path)
    logs = tmp_path / "0" / "logs"
    assert log(logs).count("Resuming from") == len(victims) and not (tmp_path / "1" / "logs").exists()
    pids = {line["pid"] for line in batches(tmp_path)}
    assert len(pids) == 4 * (1 + len(victims)), "one failure is one restart of all four"
    assert len(batches(tmp_path)) > SAMPLES * 48, "no step was made twice"
    check_samples(tmp_path, 48)
    check_logged_once(logs, 48)
    assert not differences(logs, calm(tmp_path, 4, "train", {**settings}))


@pytest.mark.parametrize("how_it_goes", ["kill", "cut_power"])
def test_c10d_what_is_left_goes_on_without_a_machine(tmp_path: Path, cable: Cable, how_it_goes: str) -> None:
    """The second machine goes: the first goes on alone, with all samples."""
    settings = {**STEP, "max_steps": 24, "dropout": 0.0, "dist_timeout": 15}
    how = {"NNODES": "1:2", "NPROC": "2", "RDZV": "c10d", "LAST_CALL": "10", "JOIN_TIMEOUT": "120"}
    both = [start(cable, tmp_path, number, "train", {**settings, "seconds": 0.2}, **how) for number in (0, 1)]
    wait_until(lambda: logged(tmp_path / "0") >= 8, tmp_path, "no steps")
    assert {line["world_size"] for line in batches(tmp_path)} == {4}
    getattr(cable, how_it_goes)(1)
    assert ended(tmp_path, *both) == [0, -signal.SIGKILL], said(tmp_path)
    assert {line["world_size"] for line in batches(tmp_path)} >= {4, 2}
    logs = tmp_path / "0" / "logs"
    assert len(batches(tmp_path)) > SAMPLES * 24, "no step was made twice"
    check_samples(tmp_path, 24)
    check_logged_once(logs, 24)
    check_close(logs, calm(tmp_path, 1, "train", settings), 23)


def test_c10d_rank_0_moves_with_the_run_and_is_lost(tmp_path: Path, cable: Cable) -> None:
    """The machine of the higher address runs alone, and has the checkpoints; then the other joins it, and rank 0 is
    there from then on, whose folder is empty. When that one is killed, the first goes on from what it has itself.
    """
    settings = {**STEP, "max_steps": 40, "dropout": 0.0, "seconds": 0.15}
    how = {"NNODES": "1:2", "RDZV": "c10d", "LAST_CALL": "5", "JOIN_TIMEOUT": "120", "MASTER_ADDR": ADDRESSES[1]}
    first = start(cable, tmp_path, 1, "train", settings, **how, NODE_RANK="0")
    wait_until(lambda: logged(tmp_path / "1") >= 8, tmp_path, "no steps")
    second = start(cable, tmp_path, 0, "train", settings, **how, NODE_RANK="1")
    wait_until(lambda: logged(tmp_path / "0") >= 16, tmp_path, "rank 0 did not move")
    moved, left = tmp_path / "0" / "logs", tmp_path / "1" / "logs"
    assert "the run moves here from there" in log(moved)
    own = steps_on_disk(left)[-1]
    assert [record["step"] for record in records(moved)] == list(range(len(records(moved)))), "its records came along"
    cable.kill(0)
    assert ended(tmp_path, first, second) == [0, -signal.SIGKILL], said(tmp_path)
    assert f"(step {own}" in log(left).rpartition("Resuming from")[2]
    check_samples(tmp_path, 40)
    check_logged_once(left, 40)
    check_close(left, calm(tmp_path, 1, "train", settings), 39)
