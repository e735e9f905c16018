"""The parent of all lives: it has imported what a run needs and trained nothing. Each life is a fork of it.

A life starts in 0.02 s in place of 4. It must be a fork of a process with one thread in which autograd's engine has
never run, which pytest's own process cannot promise: hence this process of its own, which tests/lives.py starts.
One JSON request a line comes in, one JSON outcome a line goes out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import re
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import formats.checkpoint as checkpoint  # noqa: E402
import report.curves as curves  # noqa: E402
import training.launch as launch  # noqa: E402
import training.loop as loop  # noqa: E402
import training.metrics as metrics  # noqa: E402
import training.recorder as recorder  # noqa: E402
import training.saver as saver  # noqa: E402
import training.stop as stop  # noqa: E402
from data.loader import Loader  # noqa: E402
from model.config import PRESETS  # noqa: E402
from tests.tiny import finetune_settings, train_settings  # noqa: E402
from training.progress import Progress  # noqa: E402
from training.run_settings import FinetuneSettings, TrainSettings  # noqa: E402
from training.settings import parse  # noqa: E402

TEMPORARY = re.compile(r"^\.tmp-(.*)-\d+$")
BOX_BYTES = 1 << 22
HUNG_S = 120.0  # a life that takes longer is ended and told as hung


def put(owner: Any, **values: Any) -> None:
    """Replace attributes for the rest of this process's life."""
    for name, value in values.items():
        setattr(owner, name, value)


class BlackBox:
    """One line an event, in memory that the parent shares: SIGKILL leaves it whole. [length: 8 bytes][text]"""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, BOX_BYTES)
        self.length = memoryview(self.memory)[:8].cast("q")

    def note(self, event: str) -> None:
        """Text first, length after: an event is there once it is whole."""
        line = event.encode() + b"\n"
        start = 8 + self.length[0]
        assert start + len(line) <= BOX_BYTES, "this life has more events than the box holds"
        self.memory[start : start + len(line)] = line
        self.length[0] += len(line)

    def events(self) -> list[str]:
        return self.memory[8 : 8 + self.length[0]].decode().splitlines()


class Watch:
    """Sees each event of a life just before it happens, and strikes at the chosen ones.

    An event reads `KIND NAME@STEP`, where STEP is the last completed update (`start` before there is one), as in
    `fsync model_00003.pt@3`. A strike is {at: pattern, nth: count from 0, signal: number}.
    """

    def __init__(self, box: BlackBox, strikes: list[dict[str, Any]]) -> None:
        self.box, self.strikes = box, strikes
        self.seen = [0] * len(strikes)
        self.step = "start"
        self.names: dict[int, str] = {}  # of open files
        self.last_change = ""  # what a flush of the folder makes durable

    def event(self, kind: str, name: object, torn: Callable[[], object] | None = None) -> None:
        """Note it; where it is struck by SIGKILL in the middle of a write, half of that is on disk."""
        text = f"{kind} {name}@{self.step}"
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
            self.event("fsync", f"folder-of-{self.last_change}" if folder else self.names.get(handle, "unknown"))
            real_fsync(handle)

        def replace(source: Any, target: Any) -> None:
            aside = Path(target).parent.name.startswith("earlier-")
            self.event("aside" if aside else "rename", Path(target).name)
            real_replace(source, target)
            self.last_change = Path(target).name

        def unlink(path: Path, missing_ok: bool = False) -> None:
            self.event("unlink", "temporary" if TEMPORARY.match(path.name) else path.name)
            real_unlink(path, missing_ok=missing_ok)
            self.last_change = path.name

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
        watch.event("save", Path(path).name)
        size = real_save(path, payload)
        watch.event("saved", Path(path).name)
        return size

    put(saver, save_checkpoint=save_checkpoint)


def watch_training(watch: Watch) -> None:
    """Micro-batches, completed steps, evaluation batches and sampled tokens."""
    trainer = loop.Trainer
    real_run, real_micro, real_count = trainer.run, trainer._micro_step, trainer._count
    real_batches, real_generate = loop.eval_batches, recorder.generate

    def run(self: Any) -> bool:
        watch.step = str(self.progress.step)
        watch.event("begin", self.progress.step)
        return real_run(self)

    def micro_step(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        watch.event("micro", f"{self.progress.step + 1}:{batch.samples[0]}")
        return real_micro(self, batch, *args, **kwargs)

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


def sabotage(kind: str) -> None:
    """Break one part of resuming, to show that the comparisons would notice."""
    if kind == "rng":
        put(launch.rng, set_rng_state=lambda state: launch.rng.seed_everything(0))
    elif kind == "optimizer":
        put(launch, load_optimizer_state=lambda model, optimizers, saved: None)
    elif kind == "loader":
        load_state = Loader.load_state

        def one_batch_late(self: Loader, state: dict[str, Any]) -> None:
            load_state(self, {**state, "sample": state["sample"] + self.batch_size})

        put(Loader, load_state=one_batch_late)
    elif kind == "scaler":
        put(torch.amp.GradScaler, load_state_dict=lambda self, state: None)
    elif kind == "progress":
        put(Progress, from_dict=classmethod(lambda cls, values: cls(step=values["step"])))
    else:
        raise AssertionError(f"unknown sabotage {kind}")


# -- one life --------------------------------------------------------------------------------------------------------


def settings_of(request: dict[str, Any]) -> TrainSettings | FinetuneSettings:
    """From a command line, or the shared tiny settings with changes."""
    tuning = request["kind"] == "finetune"
    if request["argv"] is not None:
        return parse(FinetuneSettings, request["argv"]) if tuning else parse(TrainSettings, request["argv"])
    data, folder, changes = Path(request["data_dir"]), Path(request["log_dir"]), request["changes"]
    if tuning:
        return finetune_settings(data, folder, Path(request["pretrained"]), **changes)
    return train_settings(data, folder, **changes)


def live(request: dict[str, Any], box: BlackBox) -> int:
    """In the child: run to the end, or to the strike; returns the exit code that a script would give."""
    watch = Watch(box, request["strikes"])
    watch_files(watch)
    watch_training(watch)
    for kind in request["sabotage"]:
        sabotage(kind)
    put(stop, FORWARDED_S=request["forwarded_s"])
    if not request["plots"]:  # a picture takes as long as the rest of a life
        put(curves, plot_curves=lambda folder: (folder / "curves.png").write_bytes(b""))
    try:
        settings = settings_of(request)
        summary = launch.finetune(settings) if isinstance(settings, FinetuneSettings) else launch.pretrain(settings)
        watch.event("returned", "run")
        box.note(f"summary {json.dumps(summary)}")
    except (ValueError, OSError) as error:
        traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(request: dict[str, Any]) -> dict[str, Any]:
    """One life, from fork to death."""
    assert threading.active_count() == 1, "a fork would copy a thread's locks without the thread"
    box, started = BlackBox(), time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 3
        with contextlib.suppress(BaseException):
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for number, handle in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
                os.dup2(handle, number)
            code = live(request, box)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    code, hung = _wait(pid, request["after_s"], started)
    return {"pid": pid, "code": code, "hung": hung, "events": box.events(), "seconds": time.monotonic() - started}


def _wait(pid: int, after_s: float | None, started: float) -> tuple[int, bool]:
    """The exit code (negative: the signal), and whether the life had to be ended. SIGKILL comes `after_s`, if given."""
    hung = False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), hung
        age = time.monotonic() - started
        hung = age > HUNG_S
        if hung or (after_s is not None and age >= after_s):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.0005)


def warm_up() -> None:
    """Everything that a life would load on first use, without a backward pass."""
    torch.set_num_threads(1)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "head_dim": 8, "n_embd": 16, "mlp_dim": 32}
    PRESETS["test-llama"] = dataclasses.replace(PRESETS["llama-tiny"], **sizes)  # beside tests/tiny.py's
    model = torch.nn.Linear(4, 4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), fused=True).step()  # imports torch._dynamo: more than a second
    torch.optim.Muon([model.weight]).step()
    torch.amp.GradScaler("cpu", enabled=True)
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

    np.random.get_state()
    model.zero_grad(set_to_none=True)


def serve() -> None:
    """Requests from standard input until it ends."""
    warm_up()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    print(json.dumps({"threads": len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1}),
          file=answers, flush=True)  # fmt: skip
    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve()
