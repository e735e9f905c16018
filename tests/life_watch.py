"""What a life under test does differently: each step and each act on a file is an event that can be struck.

Everything here is called in a child of tests/life_server.py and lasts as long as that child.
"""

from __future__ import annotations

import mmap
import os
import random
import re
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

import formats.checkpoint as checkpoint
import training.launch as launch
import training.loop as loop
import training.metrics as metrics
import training.recorder as recorder
import training.saver as saver
from data.loader import Loader
from training.progress import Progress

TEMPORARY = re.compile(r"^\.tmp-(.*)-\d+$")
BOX_BYTES = 1 << 22


def put(owner: Any, **values: Any) -> None:
    """Replace attributes for the rest of this process's life."""
    for name, value in values.items():
        setattr(owner, name, value)


class BlackBox:
    """One line an event, in memory that the parent shares: SIGKILL leaves it whole. [length: 8 bytes][text]"""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, BOX_BYTES)
        self.length = memoryview(self.memory)[:8].cast("q")
        self._turn = threading.Lock()  # a checkpoint may be written by a thread

    def note(self, event: str) -> None:
        """Text first, length after: an event is there once it is whole."""
        line = event.encode() + b"\n"
        with self._turn:
            start = 8 + self.length[0]
            assert start + len(line) <= BOX_BYTES, "this life has more events than the box holds"
            self.memory[start : start + len(line)] = line
            self.length[0] += len(line)

    def events(self) -> list[str]:
        return self.memory[8 : 8 + self.length[0]].decode().splitlines()


class _InThread(threading.local):
    """What a thread that writes a checkpoint beside the steps has for itself."""

    step = ""  # of the checkpoint; the loop is further
    last_change = ""  # what a flush of the folder makes durable


class Watch:
    """Sees each event of a life just before it happens, and strikes at the chosen ones.

    An event reads `KIND NAME@STEP`, where STEP is the last completed update (`start` before there is one), as in
    `fsync model_00003.pt@3`; in a thread that writes a checkpoint it is the checkpoint's. A strike is {at: pattern,
    nth: count from 0, signal: number, rank}.
    """

    def __init__(self, box: BlackBox, strikes: list[dict[str, Any]]) -> None:
        self.box, self.strikes = box, strikes
        self.seen = [0] * len(strikes)
        self.step = "start"
        self.names: dict[int, str] = {}  # of open files
        self.thread = _InThread()

    def event(self, kind: str, name: object, torn: Callable[[], object] | None = None) -> None:
        """Note it; where it is struck by SIGKILL in the middle of a write, half of that is on disk."""
        text = f"{kind} {name}@{self.thread.step or self.step}"
        self.box.note(text)
        for index, strike in enumerate(self.strikes):
            if not fnmatchcase(text, strike["at"]):
                continue
            self.seen[index] += 1
            if self.seen[index] - 1 == strike["nth"]:
                if strike["signal"] == signal.SIGKILL and torn is not None:
                    torn()
                os.kill(os.getpid(), strike["signal"])

    # -- files ---------------------------------------------------------------------------------------------------

    def open(self, path: Any, mode: str = "r", **options: Any) -> Any:
        """Stands in for `open` in the modules that write a run's files."""
        file = open(path, mode, **options)  # noqa: SIM115 -- closed by whom it was opened for
        name = final_name(path)
        if mode == "rb" or name == "training.log":  # prose: no run depends on it
            return file
        self.names[file.fileno()] = name
        return _WatchedFile(self, file, name)

    def watch_system(self) -> None:
        """os.fsync, os.replace and Path.unlink report here before they act."""
        real_fsync, real_replace, real_unlink = os.fsync, os.replace, Path.unlink

        def fsync(handle: int) -> None:
            folder = stat.S_ISDIR(os.fstat(handle).st_mode)
            self.event("fsync", f"folder-of-{self.thread.last_change}" if folder else self.names.get(handle, "unknown"))
            real_fsync(handle)

        def replace(source: Any, target: Any) -> None:
            aside = Path(target).parent.name.startswith("earlier-")
            self.event("aside" if aside else "rename", Path(target).name)
            real_replace(source, target)
            self.thread.last_change = Path(target).name

        def unlink(path: Path, missing_ok: bool = False) -> None:
            self.event("unlink", "temporary" if TEMPORARY.match(path.name) else path.name)
            real_unlink(path, missing_ok=missing_ok)
            self.thread.last_change = path.name

        put(os, fsync=fsync, replace=replace)
        put(Path, unlink=unlink)


class _WatchedFile:
    """A file that reports each write."""

    def __init__(self, watch: Watch, file: IO[bytes], name: str) -> None:
        self._watch, self._file, self._name = watch, file, name

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")

        def half() -> None:
            self._file.write(view[: len(view) // 2])
            self._file.flush()

        self._watch.event("write", self._name, torn=half)
        return self._file.write(view)

    def writelines(self, lines: list[bytes]) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> _WatchedFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def final_name(path: Any) -> str:
    """The name that a temporary file is to get."""
    match = TEMPORARY.match(Path(path).name)
    return match[1] if match else Path(path).name


def watch_files(watch: Watch) -> None:
    """Every write, flush, rename and removal of a run's files."""
    for module in (checkpoint, metrics):
        put(module, open=watch.open)  # shadows the built-in there
    watch.watch_system()
    real_save = saver.save_checkpoint

    def save_checkpoint(path: Any, payload: dict[str, Any]) -> int:
        if threading.current_thread() is not threading.main_thread():
            watch.thread.step = str(payload["step"])
        watch.event("save", Path(path).name)
        size = real_save(path, payload)
        watch.event("saved", Path(path).name)
        return size

    put(saver, save_checkpoint=save_checkpoint)


def watch_training(watch: Watch, draws: bool) -> None:
    """Micro-batches, completed steps, evaluation batches and sampled tokens.

    `draws`: each micro-batch takes a number from NumPy's and Python's generators, which nothing else moves.
    """
    trainer = loop.Trainer
    real_run, real_micro, real_count = trainer.run, trainer._micro_step, trainer._count
    real_batches, real_generate = loop.eval_batches, recorder.generate

    def run(self: Any) -> bool:
        watch.step = str(self.progress.step)
        watch.event("begin", self.progress.step)
        return real_run(self)

    def micro_step(self: Any, number: int, batch: Any, *args: Any, **kwargs: Any) -> Any:
        watch.event("micro", f"{self.progress.step + 1}:{batch.samples[0]}")
        if draws:
            np.random.random()
            random.random()
        return real_micro(self, number, batch, *args, **kwargs)

    def count(self: Any, step: int, done: Any) -> None:
        watch.step = str(step)
        watch.event("step", step)
        real_count(self, step, done)

    def eval_batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, batch in enumerate(real_batches(*args, **kwargs)):
            watch.event("eval", number)
            yield batch

    def generate(*args: Any, on_token: Callable[[int, int], None], **kwargs: Any) -> Any:
        def token(row: int, value: int) -> None:
            watch.event("token", row)
            on_token(row, value)

        return real_generate(*args, on_token=token, **kwargs)

    put(trainer, run=run, _micro_step=micro_step, _count=count)
    put(loop, eval_batches=eval_batches)
    put(recorder, generate=generate)


def sabotage(kind: str, watch: Watch) -> None:
    """Break one part of saving or resuming, to show that the tests would notice."""
    if kind == "rng":
        put(launch.rng, set_rng_state=lambda state: launch.rng.seed_everything(0))
    elif kind == "optimizer":
        put(launch, load_optimizer_state=lambda model, optimizers, saved, parallel: None)
    elif kind == "loader":
        load_state = Loader.load_state

        def one_batch_late(self: Loader, state: dict[str, Any]) -> None:
            load_state(self, {**state, "sample": state["sample"] + self.batch_size})

        put(Loader, load_state=one_batch_late)
    elif kind == "scaler":
        put(torch.amp.GradScaler, load_state_dict=lambda self, state: None)
    elif kind == "progress":
        put(Progress, from_dict=classmethod(lambda cls, values: cls(step=values["step"])))
    elif kind == "atomic":

        def write_in_place(
            path: Path, write: Callable[[Any], None], check: Callable[[Path], None] | None = None
        ) -> None:
            with watch.open(path, "wb") as file:
                write(file)

        put(checkpoint, write_durably=write_in_place)
    else:
        raise AssertionError(f"unknown sabotage {kind}")
