"""What is measured of the machine."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_LARGE = """
import subprocess, sys
held = b"x" * 1_000_000_000
measured = "import torch; from training.runtime import peak_memory_mb; print(peak_memory_mb(torch.device('cpu')))"
print(subprocess.run([sys.executable, "-c", measured], capture_output=True, text=True, check=True).stdout)
"""


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it() -> None:
    """On Linux ru_maxrss is: a report gave two models of different sizes the memory of prune.py."""
    done = subprocess.run([sys.executable, "-c", _LARGE], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 100 < float(done.stdout) < 700
