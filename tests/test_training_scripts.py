"""The scripts: help that loads nothing heavy, and what a user's mistake looks like."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.settings import PrepareSettings
from training.run_settings import TrainSettings
from training.settings import parse, run_script

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import io, json, contextlib, runpy, sys
codes = {}
for script in json.loads(sys.argv[1]):
    sys.argv = [script, "--help"]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(script, run_name="__main__")
        codes[script] = "no exit"
    except SystemExit as stop:
        codes[script] = [stop.code, "--seed" in out.getvalue() and "default: 1337" in out.getvalue()]
heavy = [name for name in ("torch", "numpy", "datasets", "wandb", "matplotlib", "optuna") if name in sys.modules]
print(json.dumps([codes, heavy]))
"""


def test_help_exits_0_and_loads_nothing_heavy() -> None:
    scripts = ["train_gpt2.py", "finetune_dolly.py", "model/finetune_dolly.py", "tune.py"]
    out = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(scripts)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    codes, heavy = json.loads(out.stdout)
    assert codes == {script: [0, True] for script in scripts}
    assert heavy == []


@pytest.mark.parametrize(
    ("script", "argv", "says"),
    [
        ("train_gpt2.py", ["--max_lrr", "1"], "Did you mean --max_lr?"),
        ("train_gpt2.py", ["--max_lr", "fast"], "--max_lr"),
        ("train_gpt2.py", ["--data_dir", "nowhere/at/all"], "nowhere/at/all"),
        ("train_gpt2.py", ["--config", "missing.yaml"], "missing.yaml"),
        ("train_gpt2.py", ["--resume"], "--resume: no usable checkpoint"),
        ("train_gpt2.py", ["--checkpoint_path", "model.pt"], "--resume"),
        ("train_gpt2.py", ["--device", "abacus"], "--device abacus"),
        ("finetune_dolly.py", ["--pretrained_checkpoint", "no-such.pt"], "no-such.pt: no such checkpoint"),
        ("finetune_dolly.py", ["--resume", "--checkpoint_path", "no-such.pt"], "no-such.pt: no such checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    script: str,
    argv: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


def test_other_errors_keep_their_traceback_and_debug_shows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Any:
        def main(_: TrainSettings) -> None:
            raise error

        return main

    with pytest.raises(KeyError):
        run_script(fail(KeyError("a defect")), TrainSettings, "", [])
    with pytest.raises(SystemExit):
        run_script(fail(OSError("disk")), TrainSettings, "", [])
    monkeypatch.setenv("ESPALIER_DEBUG", "1")
    with pytest.raises(OSError, match="disk"):
        run_script(fail(OSError("disk")), TrainSettings, "", [])


INTERRUPTED = {
    "at any place": "signal.raise_signal(signal.SIGINT)",
    # What Python makes of an interrupt there, most of all in imports: RuntimeError, and a printed line.
    "in a class body": "class C: name = Named()",
    "in a callback, where it is lost": "thing = Named(); _ = weakref.ref(thing, interrupt); del thing; time.sleep(60)",
}


@pytest.mark.parametrize("body", INTERRUPTED.values(), ids=INTERRUPTED)
def test_an_interrupt_is_one_line_and_exit_code_130(body: str) -> None:
    program = f"""
import signal, time, weakref
from training.run_settings import TrainSettings
from training.settings import run_script

def interrupt(*_):
    signal.raise_signal(signal.SIGINT)

class Named:
    __set_name__ = interrupt

def main(settings):
    {body}

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
run_script(main, TrainSettings, "", [])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=50)
    assert (done.returncode, done.stderr) == (130, "interrupted by SIGINT\n")


def test_errors_from_a_settings_class_itself_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"^--source text reads your own files"):
        parse(PrepareSettings, ["--source", "text"])
