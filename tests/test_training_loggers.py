"""What Weights & Biases and TensorBoard are told of a run; that without them it runs all the same."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from formats.checkpoint import load_checkpoint
from tests.runs import records, train
from tests.tiny import train_settings
from training.loggers import TensorBoard, Wandb
from training.settings import to_dict

# -- Weights & Biases --------------------------------------------------------------------------------------------------


class FakeWandb(ModuleType):
    """Notes what it is told."""

    Error = RuntimeError

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.artifacts: list[Any] = []
        self.summary: dict[str, Any] = {}
        self.finished = 0

    def setup(self) -> Any:
        return SimpleNamespace(settings=SimpleNamespace(api_key="key"))

    def init(self, **how: Any) -> Any:
        self.inits.append(how)
        return SimpleNamespace(
            id=how["id"] or "made-up", log=self._log, summary=self.summary, finish=self._finish,
            log_artifact=self.artifacts.append,
        )  # fmt: skip

    def _log(self, values: dict[str, Any], step: int) -> None:
        assert not self.logged or step >= self.logged[-1][0], "steps never go back"
        self.logged.append((step, values))

    def _finish(self) -> None:
        self.finished += 1

    @staticmethod
    def Table(columns: list[str], data: list[list[Any]]) -> Any:
        return SimpleNamespace(columns=columns, data=data)

    class Artifact:
        def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
            self.name, self.metadata, self.references = name, metadata, []  # type: ignore[var-annotated]

        def add_reference(self, uri: str, **more: Any) -> None:
            self.references.append((uri, more))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_told_all_that_the_record_holds(text: Path, tmp_path: Path, wandb: FakeWandb) -> None:
    folder = tmp_path / "run"
    train(text, folder, wandb=True, wandb_project="trees")
    (how,) = wandb.inits
    assert how["project"] == "trees" and how["name"] == "run" and how["dir"] == str(folder) and how["resume"] == "allow"
    assert how["config"]["max_lr"] == 1e-2 and set(how["config"]) == set(to_dict(train_settings(text, folder)))
    curves = [{"step": step, **values} for step, values in wandb.logged if "samples" not in values]
    assert curves == records(folder)
    tables = [(step, values["samples"].data) for step, values in wandb.logged if "samples" in values]
    rows = [[row["step"], row["prompt"], row["text"]] for row in records(folder, "samples.jsonl")]
    assert tables[-1] == (7, rows) and len(tables) == 2 and tables[0][1] == rows[:1]
    best = load_checkpoint(folder / "best.pt")
    assert wandb.summary == {
        "best_val_loss": best["val_loss"], "best_step": best["step"], "best_checkpoint": str(folder / "best.pt"),
    }  # fmt: skip
    (artifact,) = wandb.artifacts
    assert artifact.name == "made-up-best" and artifact.metadata["step"] == best["step"]
    ((uri, more),) = artifact.references
    assert uri == (folder / "best.pt").resolve().as_uri() and more["checksum"] is False
    assert wandb.finished == 1


def test_a_resumed_run_goes_on_under_its_id(text: Path, tmp_path: Path, wandb: FakeWandb) -> None:
    folder = tmp_path / "run"
    train(text, folder, wandb=True, max_steps=4, lr_schedule="constant")
    train(text, folder, wandb=True, max_steps=8, lr_schedule="constant", auto_resume=True)
    assert [how["id"] for how in wandb.inits] == [None, "made-up"]
    steps = [step for step, values in wandb.logged if "samples" not in values]
    assert steps == list(range(8))
    assert [row[0] for row in wandb.logged[-2][1]["samples"].data] == [3, 4, 7], "the table begins at the beginning"


def test_a_missing_key_is_a_clear_message_and_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no API key: set WANDB_API_KEY or run `wandb login`, or set WANDB_MODE"):
        Wandb("project", {}, tmp_path, None)


@pytest.mark.slow
def test_the_real_library_offline(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    train(text, folder, wandb=True)
    (run,) = (folder / "wandb").glob("offline-run-*")
    assert next(run.glob("*.wandb")).stat().st_size > 1000
    assert list(run.glob("files/media/table/samples*.table.json"))


# -- TensorBoard -------------------------------------------------------------------------------------------------------


class FakeWriter:
    """Stands for torch's SummaryWriter, which needs the tensorboard package."""

    made: ClassVar[list[FakeWriter]] = []

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: list[tuple[str, str, int | None]] = []
        FakeWriter.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_text(self, name: str, text: str, step: int | None = None) -> None:
        self.texts.append((name, text, step))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[FakeWriter]:
    stand_in = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr(FakeWriter, "made", [])
    return FakeWriter.made


def test_tensorboard_is_told_the_same(text: Path, tmp_path: Path, writers: list[FakeWriter]) -> None:
    folder = tmp_path / "run"
    train(text, folder, tensorboard=True, max_steps=4, lr_schedule="constant")
    train(text, folder, tensorboard=True, max_steps=8, lr_schedule="constant", auto_resume=True)
    first, second = writers
    assert first.folder == str(folder / "tensorboard") and (first.purge_step, second.purge_step) == (0, 4)
    losses = [(value, step) for writer in writers for name, value, step in writer.scalars if name == "loss"]
    assert losses == [(record["loss"], record["step"]) for record in records(folder)]
    assert any(name == "best_val_loss" for name, _, _ in first.scalars)
    samples = [(text, step) for writer in writers for name, text, step in writer.texts if name == "samples/0"]
    assert [step for _, step in samples] == [3, 4, 7]
    assert all(line.startswith("    ") for text, _ in samples for line in text.splitlines()), "nothing is Markdown"
    assert first.closed and second.closed


def test_without_tensorboard_one_line_says_so(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="--tensorboard: is not installed: pip install tensorboard"):
        train(text, tmp_path / "run", tensorboard=True)


def test_real_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="no tensorboard here: its event files are not written")
    board = TensorBoard({"max_lr": 1e-3}, tmp_path, 0)
    board.log({"step": 3, "loss": 1.5, "val_loss": None})
    board.close()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss" in file.read_bytes()
