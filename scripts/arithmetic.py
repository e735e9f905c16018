"""Reinforcement learning from a reward that can be checked, on embedded sums: a short supervised start, then GRPO.

    python scripts/arithmetic.py

About ten minutes on two cores. Interrupted, the same command goes on where it was. Each part prints the command that
does the same by hand; the curve of the reward is the picture of the second run.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # the rooms lie in the root, this script in scripts/

from scripts.configured import configured  # noqa: E402
from training.run_settings import FinetuneSettings, TrainSettings  # noqa: E402
from training.settings import run_script  # noqa: E402

MEAN_OF = 20  # steps at either end: the reward of one step's 16 prompts is noisy


@dataclass
class ArithmeticSettings:
    """How much to run, and where."""

    data_dir: str = "data/arithmetic"
    """Folder of the sums."""
    logs: str = "logs/arithmetic"
    """Folder of the supervised start."""
    logs_finetune: str = "logs_finetune/arithmetic"
    """Folder of the GRPO run."""
    warm_steps: int | None = None
    """Steps of the supervised start, instead of those in configs/arithmetic_warm.yaml."""
    max_steps: int | None = None
    """Steps of GRPO, instead of those in configs/arithmetic_grpo.yaml."""


def main(settings: ArithmeticSettings) -> None:
    """Prepare the sums, learn their form, then raise the reward; prints how far it rose."""
    started = time.monotonic()
    print("1/3  python prepare_data.py --source arithmetic --tokenizer bpe --vocab_size 288 --val_fraction 0.1")
    prepare_once(Path(settings.data_dir))

    from training.launch import finetune, pretrain

    places = {"data_dir": settings.data_dir, "log_dir": settings.logs}
    warm = configured(TrainSettings, "arithmetic_warm.yaml", settings.warm_steps, **places)
    print("2/3  python train_gpt2.py --config configs/arithmetic_warm.yaml", flush=True)
    if not pretrain(warm)["finished"]:
        return
    places = {"data_dir": settings.data_dir, "log_dir": settings.logs_finetune}
    places["pretrained_checkpoint"] = str(Path(settings.logs) / "best.pt")
    print("3/3  python finetune_dolly.py --config configs/arithmetic_grpo.yaml", flush=True)
    if not finetune(configured(FinetuneSettings, "arithmetic_grpo.yaml", settings.max_steps, **places))["finished"]:
        return
    first, last = rewards(Path(settings.logs_finetune))
    print(f"Mean reward: {first:.2f} in the first {MEAN_OF} logged steps, {last:.2f} in the last {MEAN_OF}")
    print(f"Done in {(time.monotonic() - started) / 60:.1f} minutes")


def prepare_once(folder: Path) -> None:
    """The sums as tokens, unless an earlier run made them: so few ids that digits stay apart, as sums need them."""
    if (folder / "dataset.json").exists():
        print(f"{folder} is there already")
        return
    from data.prepare import prepare
    from data.settings import PrepareSettings

    sums = PrepareSettings("arithmetic", data_dir=str(folder), tokenizer="bpe", vocab_size=288, val_fraction=0.1)
    prepare(sums)


def rewards(folder: Path) -> tuple[float, float]:
    """Mean reward of the first and of the last MEAN_OF logged steps of a run."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line)["reward/mean"] for line in lines]
    first, last = found[:MEAN_OF], found[-MEAN_OF:]
    return sum(first) / len(first), sum(last) / len(last)


if __name__ == "__main__":
    run_script(main, ArithmeticSettings, "Raise a reward on sums by GRPO, after a supervised start.")
