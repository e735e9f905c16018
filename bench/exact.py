"""What `--exact` costs: a step with its summation tree beside an ordinary one, in turns; prints ratios of time.

    python bench/exact.py
    torchrun --standalone --nproc_per_node 2 bench/exact.py
    torchrun --standalone --nproc_per_node 4 bench/exact.py --preset tiny --accumulate 8

Each process holds the network twice, once under DDP (alone: as it is) and once under Exact, and all of them take a step
of either in turns: micro-batches, the exchange of gradients, clipping, AdamW. Random tokens, float32. The steps are
made of the parts that the training loop uses.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from model.config import preset  # noqa: E402
from model.gpt import GPT  # noqa: E402
from training.distributed import Dist, close_distributed, setup_distributed  # noqa: E402
from training.optimizer import build_optimizers, set_learning_rate  # noqa: E402
from training.parallel import choose_parallel  # noqa: E402
from training.rng import seed_micro_batch  # noqa: E402
from training.run_settings import TrainSettings  # noqa: E402
from training.runtime import choose_runtime  # noqa: E402


class Side:
    """A network of its own with its optimizer, stepped one way."""

    def __init__(self, here: Dist, arguments: argparse.Namespace, exact: bool) -> None:
        self.here, self.exact, self.accumulate = here, exact, arguments.accumulate
        torch.manual_seed(0)
        model = GPT(preset(arguments.preset, block_size=arguments.block, dropout=arguments.dropout)).to(here.device)
        self.model = model.train()
        runtime = choose_runtime(here.device, "float32", "off", "high")
        self.parallel = choose_parallel(TrainSettings(exact=exact), here, self.model, None, runtime)
        self.parallel.wrap()
        self.optimizers = build_optimizers(model, "adamw", betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
        set_learning_rate(self.optimizers, 6e-4)
        self.count = arguments.batch * arguments.block * arguments.accumulate * here.world_size

    def step(self, batches: list[torch.Tensor]) -> float:
        """Seconds of one step on `batches`, (B, T + 1) each."""
        self.here.barrier()
        started = time.perf_counter()
        for done, number in enumerate(self.parallel.order(len(batches))):
            self.parallel.begin_micro_step(number, last=done == len(batches) - 1)
            if self.exact:
                seed_micro_batch(0, number)
            inputs, targets = batches[number][:, :-1], batches[number][:, 1:]
            loss = self.parallel.network(inputs.contiguous(), targets.contiguous())
            (loss * (self.parallel.gradient_scale / self.count)).backward()
            self.parallel.end_micro_step(number)
        self.parallel.finish_gradients()
        self.parallel.clip(1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        if self.here.device.type == "cuda":
            torch.cuda.synchronize()
        self.here.barrier()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="124M", help="network (default 124M)")
    parser.add_argument("--batch", type=int, default=1, help="windows of a micro-batch (default 1)")
    parser.add_argument("--block", type=int, default=256, help="tokens of a window (default 256)")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of a step in each process (default 4)")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout (default 0)")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of steps, one of each (default 5)")
    arguments = parser.parse_args()
    here = setup_distributed()
    sides = [Side(here, arguments, exact) for exact in (False, True)]
    generator = torch.Generator().manual_seed(here.rank)
    shape = (arguments.accumulate, arguments.batch, arguments.block + 1)
    pairs = []
    for _ in range(1 + arguments.pairs):
        batches = list(torch.randint(0, 50257, shape, generator=generator).to(here.device))
        pairs.append([side.step(batches) for side in sides])
    ratios = [exact / plain for plain, exact in pairs[1:]]  # the first of each warms up
    if here.is_main:
        print(
            f"{arguments.preset}, {here.world_size} processes x {arguments.accumulate} micro-batches of "
            f"{arguments.batch} x {arguments.block}: exact takes {statistics.median(ratios):.2f}x the time (range "
            f"{min(ratios):.2f} to {max(ratios):.2f}), {statistics.median(pair[1] for pair in pairs[1:]):.2f} s a step"
        )
    close_distributed(here)


if __name__ == "__main__":
    main()
