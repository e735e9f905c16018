"""One long recovery: a pruned model learns from what it was, and its perplexity at each checkpoint, as a picture.

    python bench/pruning.py --model smol.gguf --calibration c4.jsonl --text wikitext2-test.txt --seeds 1337 \\
        --rows "blocks 50%" --keep
    python bench/recovery.py --model smol.gguf --pruned logs/bench-pruning/blocks-50-1337/pruned.pt \\
        --calibration c4.jsonl --text wikitext2-test.txt

The text is a third each of --calibration, of the embedded documentation and of samples in which the unpruned model goes
on from the first words of the documents of --calibration, at temperature 1. Never --text: that is measured by E16 (16
windows of 512 tokens spread evenly over it, no begin token, the first token of a window not scored). The same command
after an interruption goes on; what is there is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
_WORDS = 12  # of a document that a sample begins with
_SAMPLE_TOKENS = 480


def call(script: str, *words: str) -> None:
    """One of the scripts, its output on the terminal; ends this one where that fails."""
    done = subprocess.run([sys.executable, str(ROOT / script), *words])
    if done.returncode:
        sys.exit(done.returncode)


def make_samples(arguments: argparse.Namespace, texts: Sequence[str], to: Path) -> list[str]:
    """The unpruned model's own text, a sample for each document."""
    if not to.exists():
        prompts = to.with_name("prompts.jsonl")
        rows = [{"prompt": " ".join(text.split()[:_WORDS])} for text in texts]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        call(
            *("sample.py", "--checkpoints", arguments.model, "--prompts", str(prompts), "--prompt_template", "none"),
            *("--temperature", "1", "--top_k", "0", "--max_new_tokens", str(_SAMPLE_TOKENS)),
            *("--batch_size", "32", "--json", str(to)),
        )
    rows = json.loads(to.read_text())["rows"]
    return [row["prompt"] + row["answers"][0]["text"] for row in rows]


def as_long_as(texts: Sequence[str], others: Sequence[str]) -> list[str]:
    """So many of the others, drawn by a fixed seed, as have the length of the texts."""
    length = sum(map(len, texts))
    drawn = random.Random(1337).sample(others, len(others))
    ends = itertools.accumulate(map(len, drawn))
    return [other for other, end in zip(drawn, ends, strict=True) if end <= length]


def make_text(arguments: argparse.Namespace, folder: Path) -> Path:
    """The mixture as token shards, a twentieth of it kept to validate on."""
    from data.manifest import MANIFEST
    from data.pydocs import pydocs_documents
    from data.sources import documents

    mixture, shards = folder / "mixture.jsonl", folder / "mixture"
    if not (shards / MANIFEST).exists():
        texts = [piece.text for piece in documents("jsonl", [arguments.calibration])]
        samples = make_samples(arguments, texts, folder / "samples.json")
        embedded = as_long_as(texts, list(pydocs_documents()))
        mixture.write_text("".join(json.dumps({"text": text}) + "\n" for text in (*texts, *embedded, *samples)))
        call(
            *("prepare_data.py", "--source", "jsonl", "--input", str(mixture), "--tokenizer", arguments.pruned),
            *("--val_fraction", "0.05", "--data_dir", str(shards)),
        )
    return shards


def train(arguments: argparse.Namespace, shards: Path, folder: Path) -> None:
    """The run in `folder`, from where it is; ends this script where that was stopped."""
    call(
        *("finetune_dolly.py", "--pretrained_checkpoint", arguments.pruned, "--teacher", arguments.model),
        *("--objective", "distill", "--data_dir", str(shards), "--log_dir", str(folder), "--auto_resume"),
        *("--epochs", "1", "--block_size", "512", "--batch_size", "4", "--grad_accum_steps", "1"),
        *("--max_lr", str(arguments.lr), "--lr_schedule", "linear", "--min_lr_ratio", "0", "--warmup_steps", "10"),
        *("--eval_interval", "40", "--max_eval_samples", "16", "--generate_interval", "0", "--log_interval", "1"),
        *("--checkpoint_interval", "40", "--keep_last_n_checkpoints", "0"),
    )
    if json.loads((folder / "status.json").read_text())["state"] != "finished":
        sys.exit("The run was stopped. The same command goes on with it.")


def perplexity(path: Path | str, text: str) -> float:
    """By E16."""
    from formats.open_model import build_model, load_payload, payload_tokenizer
    from pruning.measure import measure_perplexity
    from pruning.text import VAL, read_text

    payload = load_payload(path)
    read = read_text(text, payload_tokenizer(payload, path), VAL)
    return float(measure_perplexity(build_model(payload, path).eval(), read, 16, 512)["perplexity"])


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Tokens read and perplexity, over that of the unpruned model, from the start to the last checkpoint."""
    found = folder / "perplexity.json"
    rows: list[dict[str, Any]] = json.loads(found.read_text()) if found.exists() else []
    steps = {int(path.stem.removeprefix("model_")): path for path in folder.glob("model_*.pt")}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tokens = {record["step"]: record["tokens"] for record in records if "tokens" in record}
    models = {"dense": (0, arguments.model), "pruned": (0, arguments.pruned)}
    models |= {f"step {step}": (tokens[step], path) for step, path in sorted(steps.items())}
    for name, (read, path) in models.items():
        if name not in {row["name"] for row in rows}:
            rows.append({"name": name, "tokens": read, "perplexity": perplexity(path, arguments.text)})
            found.write_text(json.dumps(rows))
        row = next(row for row in rows if row["name"] == name)
        print(f"{name}: {row['tokens']:,} tokens, perplexity {row['perplexity']:.2f}, "
              f"{row['perplexity'] / rows[0]['perplexity']:.3f} of dense", flush=True)  # fmt: skip
    return rows


def draw(rows: Sequence[dict[str, Any]], to: Path) -> None:
    """Perplexity over that of the unpruned model, the first row, against the tokens read."""
    from report.curves import BLUE, drawing_style, new_figure, save_figure

    dense, points = rows[0]["perplexity"], rows[1:]
    figure = new_figure(width=7.5, height=4.2)
    with drawing_style():
        axes = figure.add_subplot()
        axes.plot(
            [row["tokens"] / 1e3 for row in points], [row["perplexity"] / dense for row in points], "o-", color=BLUE
        )
        axes.set(xlabel="thousand tokens of recovery", yscale="log")
        axes.set_title("perplexity on WikiText-2, times that of the unpruned model")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    print(save_figure(figure, to))


def main() -> None:
    """Text, training, measurements, picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the unpruned model, which is the teacher")
    parser.add_argument("--pruned", required=True, help="what prune.py made of it")
    parser.add_argument("--calibration", required=True, help="JSON lines with text, to train on")
    parser.add_argument("--text", required=True, help="text to measure on")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--out", default="logs/bench-recovery", help="folder")
    arguments = parser.parse_args()
    folder = Path(arguments.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    train(arguments, make_text(arguments, folder), folder / "run")
    draw(measure(arguments, folder / "run"), folder / "recovery.png")


if __name__ == "__main__":
    main()
