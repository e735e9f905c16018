"""The whole road on embedded data: text, a GPT trained from scratch, tuned on instructions, compared before and after.

    make demo            (or: python scripts/demo.py)

About ten minutes on two cores. Interrupted, the same command goes on where it was. Each part prints the command that
does the same by hand.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # the rooms lie in the root, this script in scripts/

from scripts.configured import configured  # noqa: E402
from training.run_settings import FinetuneSettings, TrainSettings  # noqa: E402
from training.settings import run_script  # noqa: E402


@dataclass
class DemoSettings:
    """How much of the demo to run, and where."""

    data_dir: str = "data"
    """Folder in which the two data sets are made."""
    logs: str = "logs/demo"
    """Folder of the pretraining run."""
    logs_finetune: str = "logs_finetune/demo"
    """Folder of the fine-tuning run; the page and the picture go there too."""
    max_steps: int | None = None
    """Optimizer steps of each run, instead of those in configs/demo_*.yaml (for a quick look)."""
    max_documents: int | None = None
    """Documents and records to prepare, instead of all."""


def main(settings: DemoSettings) -> None:
    started = time.monotonic()
    text, records = Path(settings.data_dir) / "pydocs", Path(settings.data_dir) / "pydocs-qa"
    tell("1/5  Text: the documentation of this Python, as tokens of a vocabulary learned from it")
    prepare_once("pydocs", text, "bpe", settings.max_documents)
    tell("2/5  Questions and answers made from the same documentation")
    prepare_once("pydocs-qa", records, str(text), settings.max_documents)

    from training.launch import finetune, pretrain

    tell("3/5  Pretraining: python train_gpt2.py --config configs/demo_pretrain.yaml")
    base = configured(
        TrainSettings, "demo_pretrain.yaml", settings.max_steps, data_dir=str(text), log_dir=settings.logs
    )
    if not pretrain(base)["finished"]:
        return
    tell("4/5  Fine-tuning: python finetune_dolly.py --config configs/demo_finetune.yaml")
    best = str(Path(settings.logs) / "best.pt")
    places = {"data_dir": str(records), "log_dir": settings.logs_finetune, "pretrained_checkpoint": best}
    if not finetune(configured(FinetuneSettings, "demo_finetune.yaml", settings.max_steps, **places))["finished"]:
        return
    tell("5/5  Before and after: python sample.py --checkpoints ... --prompts configs/demo_prompts.jsonl")
    show(settings, best)
    tell(f"Done in {(time.monotonic() - started) / 60:.1f} minutes")


def prepare_once(source: str, folder: Path, tokenizer: str, max_documents: int | None) -> None:
    """Prepare an embedded data set, unless an earlier demo did."""
    if (folder / "dataset.json").exists():
        print(f"{folder} is there already")
        return
    from data.prepare import prepare
    from data.settings import PrepareSettings

    print(f"python prepare_data.py --source {source} --tokenizer {tokenizer} --data_dir {folder}", flush=True)
    prepare(PrepareSettings(source=source, tokenizer=tokenizer, data_dir=str(folder), max_documents=max_documents))


def show(settings: DemoSettings, base: str) -> None:
    """Answers side by side on the terminal, as a page, and the curves of both runs as a picture."""
    from evaluation.compare import Sampling, compare
    from evaluation.prompts import read_prompts
    from report.compare import compare_page
    from report.curves import plot_runs
    from report.terminal import render_comparison

    tuned = str(Path(settings.logs_finetune) / "best.pt")
    prompts = read_prompts(str(ROOT / "configs" / "demo_prompts.jsonl"))
    sampling = Sampling(max_new_tokens=48, temperature=0.7, top_k=40)
    comparison = compare([base, tuned], prompts, sampling)
    print(render_comparison(comparison, width=110))
    folder = Path(settings.logs_finetune)
    runs = [("pretraining", settings.logs), ("fine-tuning", settings.logs_finetune)]
    print(f"Page:   {compare_page(comparison, folder / 'compare.html').resolve()}")
    print(f"Curves: {plot_runs(runs, folder / 'demo.png').resolve()}")


def tell(text: str) -> None:
    """A heading."""
    print(f"\n=== {text}", flush=True)


if __name__ == "__main__":
    run_script(main, DemoSettings, "Train, tune and compare on the embedded data.")
