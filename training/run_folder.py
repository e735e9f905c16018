"""A run's folder: one run at a time, which checkpoints are in it, which are kept, what an earlier run left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from formats.checkpoint import is_full, load_checkpoint, remove_temporaries, sync_folder, write_durably

Say = Callable[[str], None]

_CHECKPOINT = re.compile(r"^model_(\d{5,})\.pt$")
_WOULD_RESUME = " (--auto_resume would have gone on with it)"
_RUN_FILES = (
    *("metrics.jsonl", "samples.jsonl", "training.log", "config.yaml", "curves.png", "run.html", "status.json"),
    *("best.pt", "final.pt", "tensorboard"),
)


# A process that was killed keeps its lock until its last thread is out of a write.
DYING_S = 2.0


def lock_file(path: Path, wait_s: float = 0.0) -> IO[bytes] | None:
    """The file, made if need be, locked while it stays open: the kernel frees the lock of a dead process.

    None where another holds it still after `wait_s` seconds.
    """
    file = open(path, "ab")  # noqa: SIM115 -- the caller holds it open
    until = time.monotonic() + wait_s
    while not _try_lock(file):
        if time.monotonic() >= until:
            file.close()
            return None
        time.sleep(0.02)
    return file


def _try_lock(file: IO[bytes]) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: no lock, the rest works
        return True
    except OSError:
        return False
    return True


def _stamp(file: Path) -> tuple[int, ...]:
    """What changes when a file does, but for damage of the disk itself."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


class RunFolder:
    """The folder of one run, locked while the run lives (rank 0 only; the kernel frees the lock of a dead process)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[bytes] | None = None
        self._good: dict[Path, tuple[int, ...]] = {}  # which files were found good, by what tells that they changed
        self.spare: Callable[[int], bool] | None = None  # the newest good one of these steps is kept besides
        self._running = False  # as status.json says

    def open(self) -> None:
        """Make the folder and lock it. Raises ValueError if another run holds it, OSError if it cannot be written."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--log_dir {self.path}: is a file, expected a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_file(self.path / ".lock", DYING_S)
        if self._lock is None:
            raise ValueError(f"--log_dir {self.path}: another run is writing here; wait for it or choose another")
        remove_temporaries(self.path)

    def join(self) -> None:
        """Lock the folder on another machine than rank 0's, where there is one that rank 0 does not hold already.

        On a shared disk rank 0 has it; on a disk of its own the machine may have checkpoints from when it had rank 0.
        """
        if self.path.is_dir():
            with contextlib.suppress(OSError):
                self._lock = lock_file(self.path / ".lock")
        if self.held:
            remove_temporaries(self.path)

    @property
    def held(self) -> bool:
        """Whether this process has the folder for itself."""
        return self._lock is not None

    def close(self) -> None:
        """Let the next run in. A run that did not say how it ended has failed."""
        if self._running:
            with contextlib.suppress(OSError):  # it failed of something else, which is on its way up
                self.write_status("failed")
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def checkpoint_path(self, step: int) -> Path:
        """model_NNNNN.pt, NNNNN = the 0-based index of the last completed update."""
        return self.path / f"model_{step:05d}.pt"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, file) of every numbered checkpoint, newest first, whole or not."""
        if not self.path.is_dir():
            return []
        found = [(int(match[1]), file) for file in self.path.iterdir() if (match := _CHECKPOINT.match(file.name))]
        return sorted(found, reverse=True)

    def newest_good(self, say: Say, among: Callable[[int], bool] | None = None) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole and holds the training state; each bad one is named with the reason.

        `among`: of the steps that this takes.
        """
        for step, file in self.checkpoints():
            if among is not None and not among(step):
                continue
            try:
                return file, self._load(step, file)
            except (ValueError, OSError) as error:
                say(f"Not used: {error}")
        return None

    def vouch_for(self, file: Path) -> None:
        """The file was just written and read again: good, as long as it does not change."""
        self._good[file] = _stamp(file)

    def prune(self, keep: int) -> None:
        """Delete the numbered checkpoints that nothing needs: all but the `keep` newest good ones (0 = keep all).

        A damaged file is none of them: it never pushes out a good one, and goes once a newer good one is there. Files
        are read for this only where there are more than `keep`, and once each.
        """
        found = self.checkpoints()
        if keep <= 0 or len(found) <= keep:
            return
        good, spared, old = 0, self.spare is None, []
        for step, file in found:
            spares = not spared and self.spare is not None and self.spare(step)
            if (good < keep or spares) and self._is_good(step, file):
                good, spared = good + 1, spared or spares
            elif good and not file.is_dir():
                old.append(file)
        for file in old:
            file.unlink(missing_ok=True)
            self._good.pop(file, None)
        if old:
            sync_folder(self.path)

    def _is_good(self, step: int, file: Path) -> bool:
        try:
            if self._good.get(file) != _stamp(file):
                self._load(step, file)
        except (ValueError, OSError):
            return False
        return True

    def _load(self, step: int, file: Path) -> dict[str, Any]:
        """What a numbered checkpoint holds. Raises ValueError or OSError for one that a run can not go on from."""
        before = _stamp(file)
        payload = load_checkpoint(file, require_digest=True)
        if not is_full(payload):
            raise ValueError(f"{file}: weights only, no training state to go on from")
        if payload.get("step") != step:
            raise ValueError(f"{file}: holds step {payload.get('step')}, its name says {step}")
        self._good[file] = before
        return payload

    def set_aside(self, after_step: int | None, say: Say, new_course: bool = False, hint: str = _WOULD_RESUME) -> None:
        """Move an earlier run's files out of the way: all of them, or only checkpoints later than `after_step`.

        `hint` is said of a whole run in the way.
        `new_course`: somebody goes back to an older step on purpose, so best.pt of a later step does not belong to it.
        """
        files = [file for step, file in self.checkpoints() if after_step is None or step > after_step]
        if after_step is None:
            files += [self.path / name for name in _RUN_FILES if (self.path / name).exists()]
        elif new_course and self._best_step() > after_step:
            # Of the course that is being left.
            files += [self.path / name for name in ("best.pt", "final.pt") if (self.path / name).exists()]
        if not files:
            return
        number = 1
        while (aside := self.path / f"earlier-{number:03d}").exists():
            number += 1
        aside.mkdir()
        for file in files:
            os.replace(file, aside / file.name)
        what = "an earlier run" if after_step is None else f"checkpoints later than step {after_step}"
        hint = hint if after_step is None else ""
        say(f"{self.path} held {what}: moved to {aside} ({len(files)} files){hint}.")

    def begins_again(self, config: bytes) -> bool:
        """Whether what is here is of a run with this config.yaml, broken off before its first checkpoint: it will do
        all of that once more, to the same bits. Nothing is moved aside then, or a job that is struck again and again
        would leave a heap.
        """
        path = self.path / "config.yaml"
        same = path.is_file() and path.read_bytes() == config
        return same and not self.checkpoints() and not (self.path / "final.pt").exists()

    def clear_records(self) -> None:
        """Remove the records of a run that begins again; its log goes on, best.pt stays until the next."""
        for name in ("metrics.jsonl", "samples.jsonl", "curves.png", "run.html"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)

    def how_to_go_on(self, here: bool) -> str:
        """For whoever reads that the run was broken off: what is saved, and how to use it. `here`: on this disk."""
        resume = "the same command with --auto_resume goes on from there"
        if not here:
            return f"What is saved is in {self.path} on the machine of rank 0: {resume}"
        steps = [step for step, _ in self.checkpoints()]
        if not steps:
            return f"No checkpoint is in {self.path} yet: the same command starts anew"
        return f"Saved up to step {steps[0]} in {self.path}: {resume}"

    def _best_step(self) -> int:
        """The step of best.pt, -1 where there is none that can be read."""
        try:
            return int(load_checkpoint(self.path / "best.pt").get("step", -1))
        except (ValueError, OSError):
            return -1

    def write_status(self, state: str, **more: Any) -> None:
        """status.json tells a supervisor what the exit code cannot: running, finished, stopped or failed."""
        data = json.dumps({"state": state, **more}).encode() + b"\n"
        write_durably(self.path / "status.json", lambda file: file.writelines([data]))
        self._running = state == "running"

    def fail(self, reason: str) -> None:
        """The status of a run that is broken off, if one was running here."""
        if self._running:
            with contextlib.suppress(OSError):  # the reason is said besides
                self.write_status("failed", reason=reason)
