"""Where else a run is told of, when asked: Weights & Biases, TensorBoard. metrics.jsonl stays the record."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from training.progress import Progress
from training.run_settings import RunSettings
from training.settings import to_dict


class Logger(Protocol):
    """Told by rank 0 of what is logged."""

    def log(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""

    def samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """New samples at `step`; `rows`: all lines of samples.jsonl, {"step", "prompt", "text"}, the new ones last."""

    def best(self, step: int, val_loss: float, path: Path) -> None:
        """The lowest validation loss so far; its weights are being written to `path`."""

    def close(self) -> None:
        """The run is over, or ends here for now."""


def open_loggers(settings: RunSettings, folder: Path, progress: Progress) -> list[Logger]:
    """Those that the settings ask for. Raises ValueError where one cannot be had."""
    loggers: list[Logger] = []
    if settings.wandb:
        wandb = Wandb(settings.wandb_project, to_dict(settings), folder, progress.wandb_id)
        progress.wandb_id = wandb.run_id  # kept in checkpoints, so that a resumed run goes on in the same place
        loggers.append(wandb)
    if settings.tensorboard:
        next_step = progress.step + 1 if progress.finished_step else progress.step
        loggers.append(TensorBoard(to_dict(settings), folder / "tensorboard", next_step))
    return loggers


class Wandb:
    """Weights & Biases: settings, curves, the samples as a table, the best checkpoint by reference."""

    def __init__(self, project: str, config: dict[str, Any], folder: Path, run_id: str | None) -> None:
        """Raises ValueError where no API key is set: its own prompt would hang a job without a terminal."""
        import wandb

        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.setup().settings.api_key and not _has_login():
            raise ValueError(
                "--wandb: no API key: set WANDB_API_KEY or run `wandb login`, or set WANDB_MODE=offline to log without"
            )
        where: dict[str, Any] = {"project": project, "dir": str(folder), "name": folder.name, "mode": mode}
        try:
            self.run = wandb.init(config=config, id=run_id, resume="allow", **where)
        except wandb.Error as error:
            raise ValueError(f"--wandb: {' '.join(str(error).split())}") from None
        self.run_id: str = self.run.id
        self._best: tuple[int, float, Path] | None = None

    def log(self, record: dict[str, Any]) -> None:
        """One point of each curve."""
        self.run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])

    def samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """The whole table: a row added to one that was logged would not be shown."""
        import wandb

        columns = ["step", "prompt", "text"]
        table = wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])
        self.run.log({"samples": table}, step=step)

    def best(self, step: int, val_loss: float, path: Path) -> None:
        """The run's summary names it at once; the reference is made at the end, not for each of many."""
        self._best = step, val_loss, path
        self.run.summary.update({"best_val_loss": val_loss, "best_step": step, "best_checkpoint": str(path)})

    def close(self) -> None:
        """Leaves an artifact that says where the best checkpoint lies. Nothing is uploaded, nor read for a checksum."""
        import wandb

        if self._best is not None and self._best[2].exists():
            step, val_loss, path = self._best
            artifact = wandb.Artifact(f"{self.run_id}-best", "model", metadata={"step": step, "val_loss": val_loss})
            artifact.add_reference(path.resolve().as_uri(), name=f"step-{step:05d}.pt", checksum=False)
            self.run.log_artifact(artifact)
        self.run.finish()


class TensorBoard:
    """Event files for TensorBoard: settings and samples as text, curves."""

    def __init__(self, config: dict[str, Any], folder: Path, next_step: int) -> None:
        """`next_step`: points from there on, of a run that was interrupted, are no longer shown.

        Raises ValueError where TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard: is not installed: pip install tensorboard") from None
        self.writer: Any = SummaryWriter(str(folder), purge_step=next_step)
        self.writer.add_text("settings", _as_code(yaml.safe_dump(config, sort_keys=False, allow_unicode=True)))

    def log(self, record: dict[str, Any]) -> None:
        """One point of each curve."""
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)):
                self.writer.add_scalar(key, value, record["step"])

    def samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """The new ones, a text for each prompt."""
        new = [row for row in rows if row["step"] == step]
        for number, row in enumerate(new):
            self.writer.add_text(f"samples/{number}", _as_code(f"{row['prompt']}\n\n{row['text']}"), step)

    def best(self, step: int, val_loss: float, path: Path) -> None:
        """A curve of the best losses."""
        self.writer.add_scalar("best_val_loss", val_loss, step)

    def close(self) -> None:
        """Write what waits."""
        self.writer.close()


def _as_code(text: str) -> str:
    """TensorBoard reads Markdown; indented, a text is shown as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _has_login() -> bool:
    """Whether `wandb login` was run: it leaves a machine entry in the netrc file."""
    import netrc

    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
