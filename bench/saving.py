"""What checkpoints cost a run: the same steps without, with torch.save, with ours written at once or beside the steps.

    python bench/saving.py
    python bench/saving.py --preset tiny --block 64 --steps 20

Each round takes --steps steps (AdamW, random tokens, float32) and one save, each side in turn. `stops` is how long the
loop stands still for it; `overhead` how much longer the round takes than one without a save, the write beside the next
steps and the wait for its end included. torch.save writes the same tensors, neither flushed nor digested nor read back.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from model.config import preset  # noqa: E402
from model.gpt import GPT  # noqa: E402
from training.distributed import Dist  # noqa: E402
from training.heap import begin_with_tuned_heap, keep_freed_memory  # noqa: E402
from training.metrics import Console  # noqa: E402
from training.optimizer import build_optimizers, optimizer_state, set_learning_rate  # noqa: E402
from training.parallel import Parallel  # noqa: E402
from training.progress import Progress  # noqa: E402
from training.rng import rng_state  # noqa: E402
from training.run_folder import RunFolder  # noqa: E402
from training.saver import Saver  # noqa: E402

Save = Callable[[int], None]


class Run:
    """A network in training, and the ways to save it."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        torch.manual_seed(0)
        self.arguments, self.folder = arguments, folder
        self.model = GPT(preset(arguments.preset, block_size=arguments.block))
        self.optimizers = build_optimizers(
            self.model, "adamw", betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
        )
        set_learning_rate(self.optimizers, 1e-4)
        self.savers = {kind: self._saver(kind) for kind in ("off", "on")}

    def _saver(self, async_save: str) -> Saver:
        here, folder = Dist(), RunFolder(self.folder / async_save)
        folder.path.mkdir()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        about = {"config": self.model.config.to_dict()}
        parallel = Parallel(here, self.model)
        return Saver(folder, here, self.model, parallel, self.optimizers, scaler, 1, Console(False), about, async_save)

    def step(self) -> None:
        """One batch forward, backward, AdamW."""
        tokens = torch.randint(0, 50257, (self.arguments.batch, self.arguments.block + 1))
        loss = self.model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        (loss / tokens[:, 1:].numel()).backward()
        self.optimizers["adamw"].step()
        self.model.zero_grad(set_to_none=True)

    def save_ours(self, kind: str) -> Save:
        """Through the run's own Saver; what it kept before goes when the new file is whole."""

        def save(number: int) -> None:
            saver = self.savers[kind]
            saver.remember(Progress(step=number), {"sample": 0}, rng_state())
            saver.save()

        return save

    def save_plainly(self, number: int) -> None:
        """As most training scripts do."""
        state = {"model": self.model.state_dict(), "optimizer": optimizer_state(self.model, self.optimizers)}
        torch.save(state, self.folder / "plain.pt")

    def round(self, save: Save | None, number: int) -> tuple[float, float]:
        """(seconds that the loop stands still, seconds in all)."""
        began = time.perf_counter()
        if save is not None:
            save(number)
        stood = time.perf_counter() - began
        for _ in range(self.arguments.steps):
            self.step()
        for saver in self.savers.values():
            saver.settle()
        return stood, time.perf_counter() - began


def main() -> None:
    """A line a side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="124M", help="network (default 124M)")
    parser.add_argument("--batch", type=int, default=1, help="windows of a step (default 1)")
    parser.add_argument("--block", type=int, default=256, help="tokens of a window (default 256)")
    parser.add_argument("--steps", type=int, default=10, help="steps between saves (default 10)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = Run(arguments, Path(folder))
        sides: dict[str, Save | None] = {
            "no save": None,
            "torch.save": run.save_plainly,
            "ours, at once": run.save_ours("off"),
            "ours, beside": run.save_ours("on"),
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for number in range(1 + arguments.rounds):  # the first warms up
            for name, save in sides.items():
                taken[name].append(run.round(save, number))
        size = max(file.stat().st_size for file in (Path(folder) / "on").glob("*.pt"))
    bare = [seconds for _, seconds in taken["no save"][1:]]
    median = statistics.median(bare)
    print(f"{arguments.preset}: {size / 1e6:.0f} MB a checkpoint, {arguments.steps} steps in {median:.1f} s")
    for name, rounds in list(taken.items())[1:]:
        stops = statistics.median(stood for stood, _ in rounds[1:])
        over = [seconds - without for (_, seconds), without in zip(rounds[1:], bare)]
        print(
            f"{name:<14} stops the loop {stops:5.2f} s, overhead {statistics.median(over):5.2f} s "
            f"({min(over):.2f} to {max(over):.2f})"
        )


if __name__ == "__main__":
    begin_with_tuned_heap()
    keep_freed_memory()
    main()
