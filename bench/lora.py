"""LoRA fine-tuning beside transformers + PEFT, and TRL: the same model, records, rank, targets and rate, in turns.

    python bench/lora.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data alpaca.json

Each step takes the next 16 records. Sides:
  ours           the same batches of 4 as PEFT's, padded to their longest record
  ours, packed   the windows that our loader packs from the same 16 records (--block_size)
  PEFT, longest  batches of 4, padded to the longest; prompts masked out of the labels
  PEFT, padded   the same, padded to --block_size, as in most tutorials
  TRL, packed    SFTTrainer, packing bfd, bf16 and gradient checkpointing (its defaults) off; a step is one batch of 4
                 rows of --block_size of the same records. Left out, with a line, where trl is not installed
float32, AdamW, clipping at 1.0, no dropout. Prints real (non-pad) tokens/s, peak memory, the loss of the first batch.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.side_by_side import Worker, answer_calls, interleave  # noqa: E402
from training.heap import begin_with_tuned_heap  # noqa: E402

BATCH, PER_STEP, RANK, LR = 4, 16, 8, 2e-4
PEFT_LORA: dict[str, Any] = {
    "r": RANK,
    "lora_alpha": 2 * RANK,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
Record = tuple[list[int], list[int]]  # ids, loss mask
Step = Callable[[], dict[str, Any]]


def rendered(arguments: argparse.Namespace) -> list[Record]:
    """The records as ids and masks, by our renderer, for every side alike; cut at the block."""
    from data.templates import get_template, normalize_record, render_record
    from formats.open_model import load_any_tokenizer

    tokenizer, template = load_any_tokenizer(arguments.model), get_template(arguments.prompt_template)
    text = Path(arguments.data).read_text("utf-8")
    raw = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    pairs = [render_record(normalize_record(record, "record"), template, tokenizer) for record in raw]
    return [(ids[: arguments.block_size], mask[: arguments.block_size]) for ids, mask in pairs]


def sixteens(records: list[Record]) -> Iterator[list[Record]]:
    """The records of each step, round and round."""
    place = 0
    while True:
        yield [records[(place + offset) % len(records)] for offset in range(PER_STEP)]
        place += PER_STEP


def padded(records: list[Record], width: int | None = None) -> tuple[Any, Any, Any]:
    """Ids, labels (-100 where nothing is supervised) and attention mask, (B, T) each, padded on the right."""
    import torch

    width = width or max(len(ids) for ids, _ in records)
    ids = torch.zeros(len(records), width, dtype=torch.long)
    labels, seen = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (tokens, mask) in enumerate(records):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(tokens)] = torch.where(torch.tensor(mask) > 0, torch.tensor(tokens), -100)
        seen[row, : len(tokens)] = 1
    return ids, labels, seen


def measured(records: list[Record], train: Callable[[list[Record]], float]) -> Step:
    """One timed step on the next records; `train` returns the loss of its first batch."""
    following = sixteens(records)

    def step() -> dict[str, Any]:
        batch = next(following)
        began = time.perf_counter()
        loss = train(batch)
        seconds = time.perf_counter() - began
        return {"tokens_per_s": sum(len(ids) for ids, _ in batch) / seconds, "loss": loss}

    return step


def ours(arguments: argparse.Namespace, packed: bool) -> Step:
    """Our model, LoRA, loss and optimizer."""
    import numpy as np
    import torch

    from data.packing import pack
    from formats.open_model import build_model, load_payload
    from model.lora import LoraSettings
    from model.tuning import apply_method
    from training.optimizer import build_optimizers, set_learning_rate
    from training.runtime import choose_runtime

    choose_runtime(torch.device("cpu"), "auto", "auto", "high")
    torch.manual_seed(0)
    model = build_model(load_payload(arguments.model), arguments.model)
    apply_method(model, "lora", LoraSettings(rank=RANK, alpha=2.0 * RANK, dropout=0.0)).train()
    optimizers = build_optimizers(model, "adamw", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    set_learning_rate(optimizers, LR)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def update(loss: Any, supervised: int) -> float:
        mean = loss / supervised
        mean.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers["adamw"].step()
        model.zero_grad(set_to_none=True)
        return float(mean.detach())

    def shifted(labels: Any) -> Any:
        return torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), dim=1)

    def same_batches(records: list[Record]) -> float:
        losses = []
        for start in range(0, PER_STEP, BATCH):
            ids, labels, _ = padded(records[start : start + BATCH])
            targets = shifted(labels)
            losses.append(update(model(ids, targets), int((targets >= 0).sum())))
        return losses[0]

    def windows(records: list[Record]) -> float:
        losses = []
        order, begins = pack(np.array([len(ids) for ids, _ in records]), arguments.block_size, seed=0)
        bins = [order[first:last].tolist() for first, last in itertools.pairwise(begins)]
        for start in range(0, len(bins), 2):
            rows = [[records[index] for index in window] for window in bins[start : start + 2]]
            ids, labels, docs, positions = [], [], [], []
            width = max(sum(len(tokens) for tokens, _ in row) for row in rows)
            for row in rows:
                joined = padded(
                    [([t for tokens, _ in row for t in tokens], [m for _, mask in row for m in mask])], width
                )
                starts = [0, *(len(tokens) for tokens, _ in row)]
                used = sum(starts)
                doc = [number for number, (tokens, _) in enumerate(row) for _ in tokens]
                position = [place for tokens, _ in row for place in range(len(tokens))]
                docs.append(doc + [-1] * (width - used))
                positions.append(position + list(range(width - used)))
                first = torch.tensor(position + [0] * (width - used)) == 0
                labels.append(torch.where(first, -100, joined[1][0]))  # a record's first token follows nothing
                ids.append(joined[0][0])
            targets = shifted(torch.stack(labels))
            loss = model(torch.stack(ids), targets, positions=torch.tensor(positions), doc_ids=torch.tensor(docs))
            losses.append(update(loss, int((targets >= 0).sum())))
        return losses[0]

    return measured(rendered(arguments), windows if packed else same_batches)


def peft(arguments: argparse.Namespace, width: int | None) -> Step:
    """transformers + PEFT in a plain loop."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**PEFT_LORA)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)

    def train(records: list[Record]) -> float:
        losses = []
        for start in range(0, PER_STEP, BATCH):
            ids, labels, seen = padded(records[start : start + BATCH], width)
            loss = model(input_ids=ids, attention_mask=seen, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        return losses[0]

    return measured(rendered(arguments), train)


def trl(arguments: argparse.Namespace) -> Step:
    """TRL's packed SFT: its data preparation, collator and loss, with the statistics that it takes of each batch."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    rows = [
        {"input_ids": ids, "labels": [token if learnt else -100 for token, learnt in zip(ids, mask)]}
        for ids, mask in rendered(arguments)
    ]
    config = SFTConfig(
        output_dir=str(Path(arguments.folder) / "trl"),
        packing=True,
        packing_strategy="bfd",
        max_length=arguments.block_size,
        per_device_train_batch_size=BATCH,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
    )
    base = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32)
    lora = LoraConfig(**PEFT_LORA)
    trainer = SFTTrainer(base, args=config, train_dataset=Dataset.from_list(rows), peft_config=lora)
    model = trainer.model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    batches = itertools.chain.from_iterable(iter(trainer.get_train_dataloader()) for _ in itertools.count())

    def step() -> dict[str, Any]:
        batch = next(batches)
        tokens = batch["input_ids"].numel()  # flattened into one row: none of them is padding
        began = time.perf_counter()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"tokens_per_s": tokens / (time.perf_counter() - began), "loss": float(loss.detach())}

    return step


SIDES: dict[str, Callable[[argparse.Namespace], Step]] = {
    "ours": lambda arguments: ours(arguments, packed=False),
    "ours, packed": lambda arguments: ours(arguments, packed=True),
    "TRL, packed": trl,
    "PEFT, padded": lambda arguments: peft(arguments, arguments.block_size),
    "PEFT, longest": lambda arguments: peft(arguments, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="base model: GGUF file, Hugging Face folder or checkpoint")
    parser.add_argument("--data", required=True, help="records with instruction, input, output: JSON or JSON lines")
    parser.add_argument("--prompt_template", default="alpaca", help="prompt format (default alpaca)")
    parser.add_argument("--block_size", type=int, default=512, help="longest record, window, padded width")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES), help="the last is the peer")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=list(SIDES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        if arguments.worker.startswith("ours"):
            begin_with_tuned_heap()  # as finetune_dolly.py does
        answer_calls(lambda: SIDES[arguments.worker](arguments))
        return
    from formats.hf_write import write_huggingface
    from formats.open_model import load_payload

    if "TRL, packed" in arguments.sides and importlib.util.find_spec("trl") is None:
        print("TRL, packed: left out, trl is not installed (pip install trl)")
        arguments.sides.remove("TRL, packed")
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary) / "hf")
        write_huggingface(load_payload(arguments.model), folder)
        same = [f"--{name}={getattr(arguments, name)}" for name in ("model", "data", "prompt_template", "block_size")]
        workers = [Worker(__file__, [*same, "--folder", folder, "--worker", side]) for side in arguments.sides]
        answers = interleave(workers, arguments.rounds)
    for side, own in zip(arguments.sides, answers):
        ratios = [mine["tokens_per_s"] / peer["tokens_per_s"] for mine, peer in zip(own, answers[-1])]
        print(
            f"{side:<14} {statistics.median(a['tokens_per_s'] for a in own):6.1f} real tokens/s, peak "
            f"{own[-1]['peak_mb']:.0f} MB ({own[-1]['peak_mb'] / answers[-1][-1]['peak_mb']:.2f}x), loss "
            f"{own[0]['loss']:.4f}: {statistics.median(ratios):.2f}x {arguments.sides[-1]} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
