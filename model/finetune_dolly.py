"""Forwards to finetune_dolly.py in the root: `python model/finetune_dolly.py ...` works, also under torchrun."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    sys.path[0] = str(root)  # in place of model/, whose modules must not be importable by their bare names
    runpy.run_path(str(root / "finetune_dolly.py"), run_name="__main__")
