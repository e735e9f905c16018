"""The parent of all lives: it has imported what a run needs and trained nothing. Each life is a fork of it.

A life begins to train after 0.1 s in place of 4. It must be a fork of a process with one thread in which autograd has
never run, which pytest's own process cannot promise: hence this process of its own, which tests/lives.py starts.
One JSON request a line comes in, one JSON list of outcomes, one a process, goes out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import report.curves as curves  # noqa: E402
import report.run as pages  # noqa: E402
import training.launch as launch  # noqa: E402
import training.peers as peers  # noqa: E402
import training.stop as stop  # noqa: E402
from model.config import PRESETS  # noqa: E402
from tests.life_watch import BlackBox, Watch, put, sabotage, watch_files, watch_training  # noqa: E402
from tests.tiny import finetune_settings, train_settings  # noqa: E402
from training.run_settings import FinetuneSettings, TrainSettings  # noqa: E402
from training.settings import parse  # noqa: E402

HUNG_S = 120.0  # a life that takes longer is ended and told as hung


def settings_of(request: dict[str, Any]) -> TrainSettings | FinetuneSettings:
    """From a command line, or the shared tiny settings with changes."""
    tuning = request["kind"] == "finetune"
    if request["argv"] is not None:
        return parse(FinetuneSettings, request["argv"]) if tuning else parse(TrainSettings, request["argv"])
    data, folder, changes = Path(request["data_dir"]), Path(request["log_dir"]), request["changes"]
    if tuning:
        return finetune_settings(data, folder, Path(request["pretrained"]), **changes)
    return train_settings(data, folder, **changes)


def live(request: dict[str, Any], rank: int, box: BlackBox) -> int:
    """In the child: run to the end, or to the strike; returns the exit code that a script would give."""
    watch = Watch(box, [strike for strike in request["strikes"] if strike["rank"] == rank])
    watch_files(watch)
    watch_training(watch, draws=request["argv"] is None)
    for kind in request["sabotage"]:
        sabotage(kind, watch)
    put(stop, FORWARDED_S=request["forwarded_s"])
    put(peers, BEAT_S=0.25, SILENT_S=1.0)  # who is dead is found out in less time
    if not request["plots"]:  # a picture takes as long as the rest of a life
        put(curves, plot_curves=lambda folder: (folder / "curves.png").write_bytes(b""))
        put(pages, run_page=lambda folder: (folder / "run.html").write_bytes(b""))
    try:
        settings = settings_of(request)
        summary = launch.finetune(settings) if isinstance(settings, FinetuneSettings) else launch.pretrain(settings)
        watch.event("returned", "run")
        box.note(f"summary {json.dumps(summary)}")
    except BaseException as error:
        traceback.print_exc()
        return 2 if isinstance(error, (ValueError, OSError)) else 1
    return 0


def lives(request: dict[str, Any]) -> list[dict[str, Any]]:
    """All processes of a run, from fork to death."""
    assert threading.active_count() == 1, "a fork would copy a thread's locks without the thread"
    started = time.monotonic()
    boxes = [BlackBox() for _ in range(request["ranks"])]
    group = process_group(len(boxes))
    children = [fork(request, rank, box, group) for rank, box in enumerate(boxes)]
    ends = wait(children, request["after_s"], started)
    return [{**end, "events": box.events()} for end, box in zip(ends, boxes)]


def process_group(size: int) -> dict[str, str]:
    """What torchrun would tell each process, but for its rank; empty for one process."""
    if size == 1:
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    return {name: str(value) for name, value in group.items()}


def fork(request: dict[str, Any], rank: int, box: BlackBox, group: dict[str, str]) -> tuple[int, int]:
    """One process; returns its id, and the end of a pipe that closes when it dies."""
    dies, lives_on = os.pipe()
    pid = os.fork()
    if pid:
        os.close(lives_on)
        return pid, dies
    code = 3
    with contextlib.suppress(BaseException):
        log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number, handle in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(handle, number)
        if group:
            os.environ.update(group, RANK=str(rank), LOCAL_RANK=str(rank))
        code = live(request, rank, box)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def wait(children: list[tuple[int, int]], after_s: float | None, started: float) -> list[dict[str, Any]]:
    """For each process its exit code (negative: the signal), how long it lived, and whether it hung.

    SIGKILL comes after `after_s` seconds, if given, else when a life has hung.
    """
    pids = {dies: pid for pid, dies in children}
    ends: dict[int, dict[str, Any]] = {}
    limit = HUNG_S if after_s is None else after_s
    killed = False
    while pids:
        patience = None if killed else max(0.0, started + limit - time.monotonic())
        ready, _, _ = select.select(list(pids), [], [], patience)
        for dies in ready:
            pid = pids.pop(dies)
            os.close(dies)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            hung = killed and after_s is None
            ends[pid] = {"pid": pid, "code": code, "hung": hung, "seconds": time.monotonic() - started}
        if not ready:
            killed = True
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)
    return [ends[pid] for pid, _ in children]


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

    del model, parameter
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every page of this process


def serve() -> None:
    """Requests from standard input until it ends."""
    warm_up()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    print(json.dumps({"threads": len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1}),
          file=answers, flush=True)  # fmt: skip
    for line in sys.stdin:
        print(json.dumps(lives(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve()
