"""A search over fine-tuning runs: it finds what is better, twice the same, and survives what goes wrong in a trial."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from tests.runs import BARE, changed_losses, poison, train
from tests.scripts import one_line_error, run_main
from tests.tiny import record_set, text_set
from training.launch import finetune
from training.run_folder import lock_file
from training.run_settings import FinetuneSettings
from training.search_settings import SearchSettings, Space, read_space
from training.settings import from_words, parse
from tune import main

optuna = pytest.importorskip("optuna", reason="no optuna here: searches are not tried")

from training import search as search_module  # noqa: E402 -- needs the library
from training.search import search  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SPACE = "search:\n  max_lr: {low: 1e-7, high: 1e-1, log: true}\n"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(records, pretrained checkpoint)."""
    root = tmp_path_factory.mktemp("sets")
    train(text_set(root / "text"), root / "logs", **{**BARE, "max_steps": 4})
    return record_set(root / "records"), root / "logs" / "model_00003.pt"


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Each run's picture and page take longer than its steps, and SQLite waits for the disk at every commit."""
    from sqlalchemy import Engine, event

    def hurry(connection: Any, _: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", hurry)
    pictures = mock.patch("report.curves.plot_curves"), mock.patch("report.run.run_page")
    with pictures[0], pictures[1], mock.patch.object(search_module.gc, "collect"):
        yield
    event.remove(Engine, "connect", hurry)


def config(folder: Path, sets: tuple[Path, Path], space: str = SPACE, **changes: Any) -> Path:
    """A file of a search over runs of 4 steps with two evaluations."""
    fixed: dict[str, Any] = {
        "pretrained_checkpoint": str(sets[1]),
        "data_dir": str(sets[0]),
        "log_dir": str(folder / "logs"),
        "block_size": 128,
        "batch_size": 1,
        "total_batch_size": 128,
        "max_steps": 4,
        "warmup_steps": 0,
        "eval_interval": 2,
        "generate_interval": 0,
        "checkpoint_interval": 0,
        "max_eval_samples": 2,
        "device": "cpu",
    }
    folder.mkdir(exist_ok=True)
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump({**fixed, **changes}) + space)
    return file


def settings(file: Path, **changes: Any) -> SearchSettings:
    return SearchSettings(config=str(file), **{"trials": 3, **changes})


def trials(folder: Path, study: str = "search") -> list[Any]:
    return optuna.load_study(study_name=study, storage=f"sqlite:///{folder / 'logs' / 'search.db'}").trials


def drawn(folder: Path) -> list[tuple[Any, ...]]:
    return [(t.params, t.value, t.state.name, t.intermediate_values) for t in trials(folder)]


# -- what it finds -----------------------------------------------------------------------------------------------------


def test_six_trials_beat_a_bad_default_and_are_the_same_twice(
    tmp_path: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = finetune(from_words(FinetuneSettings, {**words(config(tmp_path / "bad", sets)), "max_lr": ["1e-7"]}))
    file = config(tmp_path / "one", sets)
    capsys.readouterr()
    summary = search(settings(file, trials=6, startup_trials=3))
    assert summary["finished"] and sum(summary["states"].values()) == 6
    assert summary["best_val_loss"] < bad["best_val_loss"] - 0.05
    logs = tmp_path / "one" / "logs"
    out = capsys.readouterr().out
    assert f"validation loss {summary['best_val_loss']:.4f}" in out and "Trial 5" in out
    assert "Step 0/" not in out, "what a trial says stands in its own log"
    assert "Step 0/" in (logs / "trial-000" / "training.log").read_text()
    assert (logs / "search.png").read_bytes().startswith(b"\x89PNG")
    # The best settings give the same run again.
    again = finetune(parse(FinetuneSettings, ["--config", str(logs / "best.yaml")]))
    assert again["best_val_loss"] == summary["best_val_loss"] and again["log_dir"] == str(logs / "best")
    # Only the best trial's weights stay.
    kept = sorted(str(path.relative_to(logs)) for path in logs.glob("trial-*/*.pt"))
    assert kept == [f"trial-{summary['best_trial']:03d}/best.pt"]
    # A second search of the same seed.
    search(settings(config(tmp_path / "two", sets), trials=6, startup_trials=3))
    assert drawn(tmp_path / "two") == drawn(tmp_path / "one")


def words(file: Path) -> dict[str, list[str] | None]:
    space = read_space(str(file))
    return {**space.fixed, "log_dir": [str(file.parent / "run")]}


def test_other_seeds_draw_other_settings(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    with fake_runs():
        for seed in (1, 2):
            search(settings(config(tmp_path / str(seed), sets), seed=seed))
    one, two = ([t.params for t in trials(tmp_path / str(seed))] for seed in (1, 2))
    assert one != two and len({json.dumps(params) for params in one}) == 3


class fake_runs:
    """Stands for `finetune`: a loss that is lowest at max_lr 1e-3, after evaluations as given; notes the settings."""

    def __init__(self, before_end: Any = None) -> None:
        self.before_end = before_end
        self.seen: list[FinetuneSettings] = []

    def __call__(self, run: FinetuneSettings, watch: Any = None) -> dict[str, Any]:
        self.seen.append(run)
        loss = abs(torch.log10(torch.tensor(run.max_lr)).item() + 3)
        plan = mock.Mock(max_steps=10)
        for step in (0, 4, 9):
            watch(plan, {"step": step, "val_loss_before": 9.0, **({"val_loss": loss + 9 - step} if step else {})})
        if self.before_end is not None:
            self.before_end(len(self.seen))
        return {"finished": True, "best_val_loss": loss, "best_step": 9}

    def __enter__(self) -> fake_runs:
        self.patches = [
            mock.patch.object(search_module, name, by)
            for name, by in (("finetune", self), ("search_picture", mock.Mock()))
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()


def test_bad_trials_are_ended_at_an_evaluation(
    tmp_path: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_runs() as runs:
        summary = search(settings(config(tmp_path / "a", sets), trials=10, startup_trials=3))
        states = [t.state.name for t in trials(tmp_path / "a")]
        assert states[:3] == ["COMPLETE"] * 3 and "PRUNED" in states[3:]
        assert summary["states"] == {"complete": states.count("COMPLETE"), "pruned": states.count("PRUNED")}
        assert "pruned after 50%" in capsys.readouterr().out
        search(settings(config(tmp_path / "b", sets), trials=10, startup_trials=3, prune=False))
        assert {t.state.name for t in trials(tmp_path / "b")} == {"COMPLETE"}
    assert len(runs.seen) == 20
    losses = [abs(torch.log10(torch.tensor(t.params["max_lr"])).item() + 3) for t in trials(tmp_path / "a")]
    for place, trial in enumerate(trials(tmp_path / "a")):  # as the rule says: worse than the median of those before
        before = [loss for loss, state in zip(losses[:place], states) if state == "COMPLETE"]
        if trial.state.name == "PRUNED":
            assert losses[place] > float(torch.tensor(before).quantile(0.5))


def test_a_pruned_run_is_stopped_not_failed(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    file = config(tmp_path, sets, space="search:\n  max_lr: [1e-2, 1e-9]\n")
    with mock.patch.object(optuna.pruners.MedianPruner, "prune", lambda self, study, trial: trial.number == 1):
        search(settings(file, trials=2))
    status = json.loads((tmp_path / "logs" / "trial-001" / "status.json").read_text())
    assert status["state"] == "stopped" and "pruned after 75%" in status["reason"]
    assert [t.state.name for t in trials(tmp_path)] == ["COMPLETE", "PRUNED"]


# -- what goes wrong in a trial ----------------------------------------------------------------------------------------


def no_memory() -> Any:
    """Memory runs out once, in the second micro-batch."""
    left = [None]

    def change(number: int, loss: torch.Tensor) -> torch.Tensor:
        if number == 1 and left:
            left.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return loss

    return change


@pytest.mark.parametrize(
    ("change", "failure", "says"),
    [
        (poison(1), "not finite", "is not finite; no process took the step"),
        (no_memory(), "out of memory", "Remedies: "),
    ],
)
def test_a_trial_that_breaks_is_recorded_and_the_search_goes_on(
    change: Any, failure: str, says: str, tmp_path: Path, sets: tuple[Path, Path]
) -> None:
    with changed_losses(change):
        summary = search(settings(config(tmp_path, sets), trials=2))
    first, second = trials(tmp_path)
    assert (first.state.name, second.state.name) == ("FAIL", "COMPLETE")
    assert first.user_attrs["failure"] == failure and says in first.user_attrs["message"]
    assert summary["best_trial"] == 1 and summary["states"] == {"fail": 1, "complete": 1}


def test_none_completed(tmp_path: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with changed_losses(lambda number, loss: loss * float("nan")):
        words = ("--config", config(tmp_path, sets), "--trials", 2)
        error = one_line_error(run_main(capsys, main, SearchSettings, *words))
    assert "none of 2 trials was completed: not finite" in error


def test_settings_that_no_run_takes_end_the_search(
    tmp_path: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, sets, data_dir=str(tmp_path / "nowhere"))
    error = one_line_error(run_main(capsys, main, SearchSettings, "--config", file))
    assert "trial 0 (max_lr " in error and "nowhere" in error
    assert trials(tmp_path)[0].user_attrs["failure"] == "settings"


def test_one_bad_combination_does_not_end_it(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    def refuse_third(number: int) -> None:
        if number == 3:
            raise ValueError("--total_batch_size 128: not a multiple")

    with fake_runs(refuse_third):
        search(settings(config(tmp_path, sets), trials=4))
    assert [t.state.name for t in trials(tmp_path)] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]


def test_a_validation_split_is_needed(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    def run(run: FinetuneSettings, watch: Any) -> None:
        watch(mock.Mock(max_steps=10), {"step": 0, "val_loss_before": None})

    with mock.patch.object(search_module, "finetune", run), pytest.raises(ValueError, match="needs a validation split"):
        search(settings(config(tmp_path, sets)))


# -- interruptions and workers -----------------------------------------------------------------------------------------

WORKER = """
import sys
from unittest import mock
sys.path.insert(0, {root!r})
from tests.tiny import tiny_preset
tiny_preset()
from training.search_settings import SearchSettings
with mock.patch("report.curves.plot_curves"), mock.patch("report.run.run_page"):
    from training.search import search
    search(SearchSettings(config=sys.argv[1], trials=int(sys.argv[2])))
"""


def worker(file: Path, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER.format(root=str(ROOT)), str(file), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_search_goes_on_in_the_middle_of_its_trial(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    search(settings(config(tmp_path / "whole", sets, checkpoint_interval=1), trials=3))
    file = config(tmp_path / "killed", sets, checkpoint_interval=1)
    process = worker(file, 3)
    second = tmp_path / "killed" / "logs" / "trial-001" / "model_00001.pt"
    deadline = time.monotonic() + 120
    while not second.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    _, err = process.communicate()
    assert second.exists(), err
    unfinished = [t for t in trials(tmp_path / "killed") if not t.state.is_finished()]
    search(settings(file, trials=3))
    if unfinished:  # the machine may have been quick
        log = (tmp_path / "killed" / "logs" / "trial-001" / "training.log").read_text()
        assert unfinished[0].number == 1 and "Resuming from" in log
    assert drawn(tmp_path / "killed") == drawn(tmp_path / "whole"), "as if nothing had happened"


def test_a_signal_leaves_the_trial_to_be_gone_on_with(
    tmp_path: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, sets)
    with mock.patch.object(search_module, "finetune", lambda run, watch: {"finished": False}):
        assert not search(settings(file))["finished"]
    assert "Interrupted in trial 0: the same command goes on" in capsys.readouterr().out
    with fake_runs() as runs:
        search(settings(file))
    assert [t.state.name for t in trials(tmp_path)] == ["COMPLETE"] * 3
    assert [Path(run.log_dir).name for run in runs.seen] == ["trial-000", "trial-001", "trial-002"]


def test_a_trial_in_other_hands_is_left_alone(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    file = config(tmp_path, sets)
    with mock.patch.object(search_module, "finetune", lambda run, watch: {"finished": False}):
        search(settings(file))
    held = lock_file(tmp_path / "logs" / "trial-000" / ".worker")
    assert held is not None
    with held, fake_runs() as runs:
        summary = search(settings(file))
    assert len(runs.seen) == 2 and summary["states"] == {"running": 1, "complete": 2}


@pytest.mark.slow
def test_two_workers_share_the_trials(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    file = config(tmp_path, sets)
    workers = [worker(file, 8) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in workers]
    assert [process.returncode for process in workers] == [0, 0], said
    assert [t.state.is_finished() for t in trials(tmp_path)] == [True] * 8
    each = [
        {line.split(" of ")[0] for line in out.splitlines() if line.startswith("Trial ") and " of 8: " in line}
        for out, _ in said
    ]
    assert len(each[0]) + len(each[1]) == 8 and not each[0] & each[1]


def test_more_trials_later(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    with fake_runs() as runs:
        for count in (2, 2, 5):
            search(settings(config(tmp_path, sets), trials=count))
    assert len(runs.seen) == 5


# -- conditions --------------------------------------------------------------------------------------------------------


def test_a_rank_is_drawn_only_where_the_method_has_one(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    space = (
        "search:\n  lora_r: {low: 2, high: 8, step: 2}\n  finetune_method: [full, lora]\n  epochs: [1, 2]\n"
        "  lora_target_modules: [[q_proj, v_proj], [all-linear]]\n  lora_dropout: {low: 0, high: 0.3}\n"
    )
    file = config(tmp_path, sets, space)
    file.write_text(file.read_text().replace("max_steps: 4\n", ""))
    with fake_runs() as runs:
        search(settings(file, trials=10))
    methods = {run.finetune_method for run in runs.seen}
    assert methods == {"full", "lora"}
    for run, trial in zip(runs.seen, trials(tmp_path)):
        assert ("lora_r" in trial.params) == ("lora_dropout" in trial.params) == (run.finetune_method == "lora")
        assert run.explicit_names >= {"epochs", *trial.params} and run.epochs in (1.0, 2.0)  # type: ignore[attr-defined]
        if run.finetune_method == "lora":
            assert run.lora_r in (2, 4, 6, 8) and run.lora_target_modules in (("q_proj", "v_proj"), ("all-linear",))


def test_null_and_switches_are_values_too(tmp_path: Path, sets: tuple[Path, Path]) -> None:
    file = config(tmp_path, sets, "search:\n  max_samples: [null, 4]\n  packing: [true, off]\n")
    with fake_runs() as runs:
        search(settings(file, trials=10, prune=False))
    assert {(run.max_samples, run.packing) for run in runs.seen} <= {(a, b) for a in (None, 4) for b in (True, False)}
    assert {run.max_samples for run in runs.seen} == {None, 4} and {run.packing for run in runs.seen} == {True, False}


def test_the_examples_are_what_they_are_known_for() -> None:
    space = read_space(str(ROOT / "configs" / "search_full.yaml"))
    assert {name: values.plain() for name, values in space.ranges.items()} == {
        "max_lr": ["1e-5", "5e-5", "1e-4", "5e-4"],
        "batch_size": ["4", "8", "16"],
        "epochs": ["3", "5", "10"],
        "warmup_ratio": ["0.1", "0.2", "0.3"],
        "weight_decay": ["0.01", "0.1", "0.2"],
    }
    assert isinstance(read_space(str(ROOT / "configs" / "search_lora.yaml")), Space)
    assert SearchSettings().trials == 50


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ("", "needs a section `search:`"),
        ("search:\n", "needs a section `search:`"),
        ("search: [1]\n", "needs a section `search:`"),
        ("search:\n  max_rl: [1e-3]\n", "unknown setting 'max_rl'. Did you mean max_lr?"),
        ("search:\n  max_lr: []\n", "its list of values is empty"),
        ("search:\n  max_lr: 1e-3\n", "expected a list of values, or low and high"),
        ("search:\n  max_lr: [1e-3, 1e-3]\n", "1e-3 stands twice"),
        ("search:\n  max_lr: [fast]\n", "max_lr"),
        ("search:\n  max_lr: [{a: 1}]\n", "expected values"),
        ("search:\n  max_lr: {low: 1e-3, high: 1e-5}\n", "empty range: low 1e-3 is not below high 1e-5"),
        ("search:\n  max_lr: {low: 1e-3, high: 1e-3}\n", "empty range"),
        ("search:\n  max_lr: {low: 1e-3}\n", "needs low and high"),
        ("search:\n  max_lr: {low: 1e-5, hihg: 1e-3}\n", "unknown 'hihg'. Did you mean high?"),
        ("search:\n  max_lr: {low: a, high: 1}\n", "low: a: expected a number"),
        ("search:\n  max_lr: {low: [1], high: 1}\n", "expected a number"),
        ("search:\n  max_lr: {low: .nan, high: 1}\n", "expected a number"),
        ("search:\n  max_lr: {low: 0, high: 1, log: true}\n", "begins above 0"),
        ("search:\n  max_lr: {low: 1, high: 2, log: maybe}\n", "expected true or false"),
        ("search:\n  max_lr: {low: 1, high: 2, step: 0}\n", "step 0"),
        ("search:\n  epochs: {low: 1, high: 2, step: 0.5, log: true}\n", "has no step"),
        ("search:\n  lora_r: {low: 1, high: 2.5}\nfinetune_method: lora\n", "takes whole numbers only"),
        ("search:\n  optimizer: {low: 1, high: 2}\n", "is not a number"),
        ("search:\n  optimizer: [adamw, sgd]\n", "optimizer"),
        ("search:\n  log_dir: [a, b]\n", "cannot be searched"),
        ("search:\n  auto_resume: [true]\n", "cannot be searched"),
        ("search:\n  batch_size: [1, 2]\n", "batch_size is set a second time outside"),
        ("search:\n  max_lr: [1]\n  learning_rate: [2]\n", "max_lr is set a second time"),
        ("search:\n  lora_r: [4, 8]\n", "lora_r does nothing with finetune_method full: it is for lora"),
        ("search:\n  finetune_method: [full, freeze]\n  lora_r: [4]\n", "does nothing with finetune_method"),
        ("search:\n  dpo_beta: [0.1]\n", "does nothing with objective sft: it is for dpo"),
        ("plan: true\nsearch:\n  max_lr: [1]\n", "plan is for a run, not for a search"),
        ("max_setps: 3\nsearch:\n  max_lr: [1]\n", "unknown setting 'max_setps'. Did you mean max_steps?"),
    ],
)
def test_a_bad_file_is_one_line(
    space: str, says: str, tmp_path: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, sets, space)
    error = one_line_error(run_main(capsys, main, SearchSettings, "--config", file))
    assert says in error and str(file) in error
    assert not (tmp_path / "logs").exists()


def test_bad_flags_are_one_line(
    tmp_path: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config(tmp_path, sets)

    def error(*words: object) -> str:
        return one_line_error(run_main(capsys, main, SearchSettings, *words))

    assert "--config names the file" in error()
    assert "no such file" in error("--config", tmp_path / "none.yaml")
    assert "--trials 0: expected at least 1" in error("--config", file, "--trials", 0)
    assert "unknown flag --trails. Did you mean --trials?" in error("--config", file, "--trails", 3)
    assert "expected sqlite:///FILE" in error("--config", file, "--storage", "postgres://x")
    assert "expected sqlite:///FILE" in error("--config", file, "--storage", "sqlite:///")
    (tmp_path / "text").write_text("not a database" * 100)
    assert "is not a database" in error("--config", file, "--storage", f"sqlite:///{tmp_path / 'text'}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "no script for torchrun" in error("--config", file)


def test_a_locked_database_is_one_line(
    tmp_path: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, sets)
    with fake_runs():
        search(settings(file, trials=1))
    holder = sqlite3.connect(tmp_path / "logs" / "search.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with mock.patch("training.study.LOCK_TIMEOUT_S", 0.1):
        error = one_line_error(run_main(capsys, main, SearchSettings, "--config", file, "--trials", 2))
    assert "database is locked: another program holds it" in error
    holder.execute("ROLLBACK")
    holder.close()

    def lock(_: int) -> None:  # in the middle of a trial
        self_held.append(sqlite3.connect(tmp_path / "logs" / "search.db", isolation_level=None))
        self_held[0].execute("BEGIN EXCLUSIVE")

    self_held: list[sqlite3.Connection] = []
    with mock.patch("training.study.LOCK_TIMEOUT_S", 0.1), fake_runs(lock):
        error = one_line_error(run_main(capsys, main, SearchSettings, "--config", file, "--trials", 2))
    assert "database is locked" in error
    self_held[0].close()
    with fake_runs() as runs:
        search(settings(file, trials=2))
    assert [Path(run.log_dir).name for run in runs.seen] == ["trial-001"], "its trial is gone on with"


def test_another_search_under_the_same_name(
    tmp_path: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_runs():
        search(settings(config(tmp_path, sets)))
        other = config(tmp_path, sets, "search:\n  max_lr: {low: 1e-6, high: 1e-1, log: true}\n")
        error = one_line_error(run_main(capsys, main, SearchSettings, "--config", other))
        assert "--study search: is another search: max_lr was" in error and "1e-06" in error
        longer = config(tmp_path, sets, max_steps=5)
        error = one_line_error(run_main(capsys, main, SearchSettings, "--config", longer))
        assert 'max_steps was ["4"] there, is ["5"]' in error
        error = one_line_error(run_main(capsys, main, SearchSettings, "--config", longer, "--study", "b"))
        assert "holds the trials of another search" in error
    os.remove(tmp_path / "logs" / "search.db")
    os.remove(tmp_path / "logs" / ".study")
    error = one_line_error(run_main(capsys, main, SearchSettings, "--config", longer))
    assert "holds the trials of another search" in error
