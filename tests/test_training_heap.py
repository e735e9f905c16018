"""A training script begins with a heap in which freed buffers stay whole: in its own process only, and only once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.heap import begin_with_tuned_heap, heap_is_tuned, keeps_freed_memory

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from training.heap import begin_with_tuned_heap
print(os.getpid(), sys.argv[1:], flush=True)
begin_with_tuned_heap()
print(os.environ.get("GLIBC_TUNABLES"), "torch" in sys.modules)
"""

glibc = pytest.mark.skipif(not keeps_freed_memory(), reason="glibc alone has these caches")


def lines_of(command: list[str], **environment: str) -> list[str]:
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | environment
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


@glibc
def test_the_command_begins_anew_in_its_process_and_once(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    first, second, tuned = lines_of(["-u", str(script), "--max_lr", "a b", "--", "-c"])
    assert first == second and "['--max_lr', 'a b', '--', '-c']" in first
    assert tuned == "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0 False"
    *_, added = lines_of([str(script)], GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert added.startswith("glibc.malloc.hugetlb=0:glibc.malloc.tcache_count=0")


@glibc
@pytest.mark.parametrize(
    ("name", "value"), [("ESPALIER_MALLOC", "default"), ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=3")]
)
def test_what_the_user_chose_stays(name: str, value: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    assert len(lines_of([str(script)], **{name: value})) == 2


def test_a_process_that_is_not_the_scripts_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", "--plan"])
    begin_with_tuned_heap()
    assert not heap_is_tuned()
    said = lines_of(["-c", SCRIPT, "x"])
    assert len(said) == 2 and said[1] == "None False"


@glibc
def test_the_training_scripts_begin_so(tmp_path: Path) -> None:
    """What `--plan` says of the heap depends on it."""
    command = ["--plan", "--preset", "tiny", "--device", "cpu"]
    plans = [
        next(line for line in lines_of([str(ROOT / "train_gpt2.py"), *command, "--log_dir", str(tmp_path)], **more)
             if "allocator" in line)
        for more in ({}, {"GLIBC_TUNABLES": "glibc.malloc.mxfast=0"}, {"ESPALIER_MALLOC": "default"})
    ]  # fmt: skip
    assert plans[0] == plans[1] != plans[2] and " 0.0 MB" in plans[2]
