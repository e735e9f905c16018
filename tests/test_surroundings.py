"""Pretraining and fine-tuning end with the same bits whatever the language, the clock, the paths and the folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from formats.adapter import weights_digest
from formats.checkpoint import load_checkpoint
from report.records import read_lines
from tests.tiny import record_set, text_set

ROOT = Path(__file__).resolve().parent.parent
BOTH = """
import json, runpy, sys
for script, *flags in json.loads(sys.argv[1]):
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
"""
SHORT = ["--max_steps", "2", "--batch_size", "2", "--block_size", "64", "--total_batch_size", "256", "--device", "cpu"]
# What the runs must not depend on. None: not set at all.
PLAIN = {"LC_ALL": "C.UTF-8", "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0"}
ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
FAR = {"LC_ALL": "C", "LANG": "C", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "random"}


def both(home: Path, name: str, cwd: Path, environment: dict[str, str]) -> tuple[list[str], str]:
    """Trains and tunes in `home`/`name`; digests of the weights and the losses of both, and what was printed."""
    place = home / name
    place.mkdir()
    for made in ("text", "records"):
        shutil.copytree(home / made, place / made)
    first, second = place / "logs", place / "logs of tuning"
    scripts = [
        [str(ROOT / "train_gpt2.py"), "--preset", "tiny", "--data_dir", str(place / "text"), "--log_dir", str(first)],
        [str(ROOT / "finetune_dolly.py"), "--data_dir", str(place / "records"), "--log_dir", str(second)],
    ]
    scripts[1] += ["--pretrained_checkpoint", str(first / "model_00001.pt"), "--warmup_steps", "1"]
    words = json.dumps([[*script, *SHORT, "--dropout", "0.1", "--sample_tokens", "4"] for script in scripts])
    done = subprocess.run(
        [sys.executable, "-c", BOTH, words],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, timeout=300,
    )  # fmt: skip
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode == 0, said[-3000:]
    found: list[Any] = []
    for folder in (first, second):
        found.append(weights_digest(load_checkpoint(folder / "model_00001.pt", require_digest=True)["model"]))
        found += [record["loss"] for record in read_lines(folder / "metrics.jsonl")]
        assert {"run.html", "curves.png", "config.yaml"} <= {file.name for file in folder.iterdir()}
    return found, said


def locked(home: Path) -> Path:
    """A folder that nothing can be written to, by root neither."""
    if os.geteuid() == 0:
        return Path("/proc")
    folder = home / "locked"
    folder.mkdir(mode=0o555)
    return folder


@pytest.mark.slow  # 30 s: three launches
def test_the_same_bits_in_other_surroundings(tmp_path: Path) -> None:
    text_set(tmp_path / "text", 20)
    record_set(tmp_path / "records", 20)
    plain, _ = both(tmp_path, "plain", tmp_path, PLAIN)
    assert len(plain) == 6
    nowhere = locked(tmp_path)
    with pytest.raises(OSError):
        (nowhere / "file").write_bytes(b"")
    far, _ = both(tmp_path, "运行 目录 'with' \"marks\" & spaces", nowhere, FAR)
    assert far == plain
    ascii_only, said = both(tmp_path, "ascii", tmp_path, ASCII)
    assert ascii_only == plain
    assert "Traceback" not in said
