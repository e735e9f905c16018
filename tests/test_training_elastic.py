"""Any number of processes, changed at any resume: the same global sequence of samples, the same batches and losses."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.loader import Batch, Loader, Unit
from data.shards import TokenSet
from tests.lives import Run, Strike, finetuning, pretraining, records, uninterrupted
from tests.runs import log
from tests.token_sets import VOCABULARY, counting_records, counting_text, open_set
from training.run_settings import TrainSettings
from training.settings import parse, to_dict
from training.start import with_checkpoint_settings
from training.step_plan import StepPlan, kept_windows, note_batch, plan_steps

# -- samples ----------------------------------------------------------------------------------------------------------

WINDOWS = 12  # of a step: 1, 2, 3 and 4 processes can share them
BLOCK = 16
LENGTHS = [7, 12, 3, 30, 9, 22, 5, 5, 16, 40, 8, 11, 6, 19, 4, 13, 8, 21, 10, 6, 14, 9]
KINDS: dict[str, tuple[Unit, bool]] = {
    "text": ("window", False),
    "packed": ("window", True),
    "records": ("window", False),
    "pairs": ("pair", False),
    "prompts": ("prompt", False),
}


def token_set(kind: str, folder: Path) -> TokenSet:
    """A set whose token i is i, so that what a sample holds tells which window it is."""
    if kind == "text":
        return counting_text(folder, 401)
    if kind != "pairs":
        return counting_records(folder, LENGTHS)
    lengths = [5 + number % 9 for number in range(46)]  # both sides of a pair are never equally long
    ends = np.cumsum(lengths)
    documents = [np.arange(end - length, end) for end, length in zip(ends, lengths)]
    masks = [(np.arange(length) >= 3).astype(np.uint8) for length in lengths]
    return open_set(folder, documents, kind="preference", vocab_size=VOCABULARY, masks=masks)


def samples_of(batch: Batch) -> Iterator[tuple[int, Any]]:
    """(number, content) of each sample of a micro-batch."""
    if batch.prompts is not None:
        yield from zip(batch.samples, [(tuple(prompt.ids), tuple(prompt.reference)) for prompt in batch.prompts])
        return
    rows = (len(batch.samples), -1, batch.inputs.size(1))  # one row a sample, two of a pair
    firsts = batch.inputs.view(rows)[:, :, 0].tolist()
    sums = batch.targets.clamp(min=0).view(rows).sum((1, 2)).tolist()
    yield from zip(batch.samples, ((*first, total) for first, total in zip(firsts, sums)))


def one_process(loader: Loader) -> Iterator[tuple[int, Any]]:
    while True:
        yield from samples_of(loader.next_batch())


def steps_of_processes(
    tokens: TokenSet, world_size: int, steps: int, state: dict[str, Any] | None, options: Mapping[str, Any]
) -> tuple[list[tuple[int, Any]], list[dict[str, Any]]]:
    """What so many processes see in so many steps, in global order, and the state that each would save."""
    loaders = [Loader(tokens, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for loader in loaders:
        if state is not None:
            loader.load_state(state)
    seen = []
    flags = TrainSettings(batch_size=options["batch_size"], grad_accum_steps=1, max_steps=9)
    plan = plan_steps(flags, BLOCK, loaders[0].windows_per_epoch, world_size, kept=WINDOWS)
    for _ in range(steps * plan.grad_accum):
        for loader in loaders:
            seen += samples_of(loader.next_batch())
    states = [loader.state() for loader in loaders]
    for loader in loaders:
        loader.close()
    return seen, states


@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_come_and_go_see_the_sequence_of_one(kind: str, tmp_path: Path) -> None:
    """200 random (processes, save point) pairs of each kind, in chains over three epochs and more."""
    unit, packing = KINDS[kind]
    tokens = token_set(kind, tmp_path)
    options: dict[str, Any] = {"block_size": BLOCK, "seed": 5, "packing": packing, "unit": unit}
    alone = Loader(tokens, batch_size=1, **options)
    windows = alone.windows_per_epoch
    assert windows > WINDOWS and windows % WINDOWS, "no epoch may end with a step"
    expected = list(islice(one_process(alone), 3 * windows + 4 * WINDOWS))
    alone.close()
    assert [number for number, _ in expected] == list(range(len(expected)))
    for epoch in range(3):
        contents = Counter(content for _, content in expected[epoch * windows : (epoch + 1) * windows])
        assert len(contents) == windows and set(contents.values()) == {1}, "an epoch has every window once"
    chance, pairs, chains = random.Random(kind), 0, 0
    while pairs < 200:
        seen, state, chains = [], None, chains + 1
        while len(seen) < 3 * windows:
            world_size = chance.choice((1, 2, 3, 4))
            share = WINDOWS // world_size
            batch_size = chance.choice([size for size in range(1, share + 1) if share % size == 0])
            more = {**options, "batch_size": batch_size}
            found, states = steps_of_processes(tokens, world_size, chance.randint(1, 2), state, more)
            seen, state, pairs = seen + found, chance.choice(states), pairs + 1
        assert seen == expected[: len(seen)], f"chain {chains}"
    assert chains < pairs / 1.5, "resumed runs, not beginnings"


# -- the global batch -------------------------------------------------------------------------------------------------


def saved(argv: list[str], world_size: int, windows: int) -> dict[str, Any]:
    """What the checkpoint of a run with these flags says of its batch."""
    return {
        "settings": to_dict(parse(TrainSettings, argv)),
        "progress": {"windows_per_step": windows},
        "rng": [{}] * world_size,
    }


def resumed(state: dict[str, Any], argv: list[str], world_size: int) -> tuple[StepPlan, list[str]]:
    """The steps of a run that goes on from it with flags of today, and what it says."""
    said: list[str] = []
    settings = with_checkpoint_settings(parse(TrainSettings, argv), state["settings"], said.append)
    kept = kept_windows(settings, state, world_size)
    plan = plan_steps(settings, settings.block_size, 1000, world_size, kept)
    note_batch(plan, state, said.append)
    return plan, said


ACCUMULATES = ["--batch_size", "2", "--grad_accum_steps", "8", "--block_size", "32"]
IN_TOKENS = ["--batch_size", "2", "--total_batch_size", "512", "--block_size", "32"]


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("flags", [ACCUMULATES, IN_TOKENS])
def test_a_restart_on_other_processes_keeps_the_global_batch(flags: list[str], repeated: bool) -> None:
    """torchrun repeats the flags of its first start; by hand one may leave them out."""
    state = saved(flags, world_size=1, windows=16)
    for world_size in (2, 4, 8, 1):
        plan, said = resumed(state, flags if repeated else [], world_size)
        assert (plan.windows_per_step, plan.grad_accum) == (16, 8 // world_size)
        changed = world_size != len(state["rng"])
        text = f"  processes: {len(state['rng'])} in the checkpoint, now {world_size}: a step keeps its 16 windows"
        assert [line.startswith(text) for line in said] == [True] * changed
        state = {**state, "rng": [{}] * world_size}  # the settings are saved as they were given


def test_steps_and_schedule_stay_with_the_global_batch() -> None:
    flags = [*ACCUMULATES, "--epochs", "2"]
    plans = [resumed(saved(flags, 1, 16), flags, world_size)[0] for world_size in (1, 2, 4)]
    assert {plan.max_steps for plan in plans} == {125} and {plan.steps_per_epoch for plan in plans} == {62.5}


@pytest.mark.parametrize(
    ("flags", "anew", "windows"),
    [
        (ACCUMULATES, ["--grad_accum_steps", "3"], 12),
        (ACCUMULATES, ["--batch_size", "1", "--grad_accum_steps", "8"], 16),
        (ACCUMULATES, ["--batch_size", "4"], 16),
        (ACCUMULATES, ["--batch_size", "3"], 48),  # 16 can not be shared by threes
        (ACCUMULATES, ["--total_batch_size", "1024"], 32),
        (ACCUMULATES, ["--total_batch_size", "524288"], 16384),  # the default, which the first run had too, unused
        (IN_TOKENS, ["--total_batch_size", "1024"], 32),
        (IN_TOKENS, ["--grad_accum_steps", "3"], 12),
        (IN_TOKENS, ["--batch_size", "4"], 16),
        (IN_TOKENS, ["--batch_size", "3"], 12),
    ],
)
def test_a_batch_given_anew_is_taken_and_the_difference_said(flags: list[str], anew: list[str], windows: int) -> None:
    plan, said = resumed(saved(flags, 1, 16), anew, 2)
    assert plan.windows_per_step == windows
    note = f"  windows of a step: 16 in the checkpoint, now {windows}"
    assert (note in said) == (windows != 16)


@pytest.mark.parametrize(
    ("world_size", "batch_size", "remedy"), [(3, 2, "use 2 processes"), (8, 4, "use --batch_size 2"), (32, 1, "use 16")]
)
def test_a_batch_that_can_not_be_shared_is_refused(world_size: int, batch_size: int, remedy: str) -> None:
    state = saved(["--batch_size", str(batch_size), "--grad_accum_steps", "4"], 1, 16)
    with pytest.raises(
        ValueError, match=f"16 windows, which {world_size} processes can not share .*: {remedy}"
    ) as told:
        resumed(state, [], world_size)
    assert "another --total_batch_size" in str(told.value)


def test_a_checkpoint_that_does_not_tell_leaves_it_to_the_flags() -> None:
    state = {**saved(ACCUMULATES, 1, 16), "progress": {}}
    plan, said = resumed(state, [], 2)
    assert plan.windows_per_step == 32 and said == []


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pretraining, finetuning])
def test_a_run_on_one_two_and_one_processes_equals_one_on_one(make: Any, tmp_path: Path) -> None:
    """Windows, losses and weights; the flags are repeated as torchrun does, the accumulation is of one process."""
    flags = {"batch_size": 1, "grad_accum_steps": 4, "total_batch_size": 524288, "max_steps": 8, "dropout": 0.0}
    run: Run = make(tmp_path / "run", **flags)
    run.live(Strike("step 1@1", signal=signal.SIGTERM))
    two = run.live_together(Strike("step 5@5", signal=signal.SIGTERM), ranks=2)
    last = run.live()
    assert [life.code for life in (*run.lives, *two)] == [0] * 5, last.describe()
    assert [life.began_after for life in run.lives] == [-1, 1, 5]
    for then, now, share in ((1, 2, 2), (2, 1, 4)):
        text = f"processes: {then} in the checkpoint, now {now}: a step keeps its 4 windows, {share} micro-batches of 1"
        assert text in log(run.folder)

    whole = uninterrupted(run)
    firsts = {int(event.split(":")[1].split("@")[0]) for life in (*run.lives, *two) for event in life.events
              if event.startswith("micro ")}  # fmt: skip
    assert firsts == set(range(8 * 4)), "a sample was lost"
    pairs = list(zip(records(run.folder), records(whole.folder)))
    assert len(pairs) == 8 and len({one["loss"] for one, _ in pairs}) == 8
    for one, other in pairs:
        assert one["supervised_tokens"] == other["supervised_tokens"] and one["epoch"] == other["epoch"]
        assert one.keys() == other.keys()
        for name in {"loss", "val_loss"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=2e-6), (one["step"], name)
