"""Every way of fine-tuning on the same model, records and steps; prints a table of what each costs and brings.

    python scripts/compare_methods.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data records.json \
        --prompt_template smollm2

Each method runs in a process of its own, one after the other, with its default rate. The held-out loss is that of
response tokens; tokens/s is the median step's, over real tokens and padding alike (windows are packed).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Method -> its flags. The last layers of a small model, and what a reader would try first of each kind.
METHODS: dict[str, list[str]] = {
    "full": [],
    "progressive": ["--unfreeze_stages", "3"],
    "freeze": ["--train_layers", "8"],
    "lora": ["--lora_target_modules", "all-linear"],
    "lora, q and v": [],
    "lora, DoRA": ["--lora_target_modules", "all-linear", "--use_dora"],
    "lora, PiSSA": ["--lora_target_modules", "all-linear", "--lora_init", "pissa"],
    "qlora": ["--lora_target_modules", "all-linear"],
    "adapter": [],
    "prefix": [],
    "p_tuning": [],
}
HEAD = "| method | trained | peak memory, MB | tokens/s | held-out loss, before | after | file, MB |"


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One fine-tuning; its figures."""
    folder = Path(arguments.out) / re.sub(r"\W+", "-", name)
    command = [
        *(sys.executable, str(ROOT / "finetune_dolly.py"), "--pretrained_checkpoint", arguments.model),
        *("--data_dir", arguments.data, "--prompt_template", arguments.prompt_template, "--log_dir", str(folder)),
        *("--finetune_method", name.split(",")[0], *METHODS[name]),
        *("--max_steps", str(arguments.max_steps), "--block_size", str(arguments.block_size)),
        *("--batch_size", "2", "--grad_accum_steps", "2", "--eval_interval", str(arguments.max_steps)),
        *("--generate_interval", "0", "--checkpoint_interval", "0", "--max_eval_samples", str(arguments.eval_samples)),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    log = (folder / "training.log").read_text()
    trained = re.search(r"trainable params: ([\d,]+) .* trainable%: ([\d.]+)", log)
    assert trained is not None
    return {
        "trained": f"{trained[1]} ({float(trained[2]):.2f}%)",
        "memory": max(record["memory_mb"] for record in records),
        "speed": statistics.median(record["tokens_per_s"] for record in records),
        "before": records[0]["val_loss_before"],
        "after": records[-1]["val_loss"],
        "size": (folder / "best.pt").stat().st_size / 1e6,
    }


def main() -> None:
    """Run the methods, print a row as each ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="base model: checkpoint, folder, GGUF file or Hub name")
    parser.add_argument("--data", required=True, help="records: JSON lines or JSON")
    parser.add_argument("--prompt_template", default="dolly", help="prompt format of the records")
    parser.add_argument("--out", default="logs_finetune/methods", help="folder of the runs")
    parser.add_argument("--max_steps", type=int, default=30)
    parser.add_argument("--block_size", type=int, default=512)
    parser.add_argument("--eval_samples", type=int, default=16, help="validation windows")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    print(HEAD)
    print(re.sub(r"[^|]+", " --- ", HEAD))
    for name in arguments.methods:
        row = run(name, arguments)
        print(
            f"| {name} | {row['trained']} | {row['memory']:,.0f} | {row['speed']:.0f} | {row['before']:.3f} | "
            f"{row['after']:.3f} | {row['size']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
