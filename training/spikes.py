"""A guard against spikes of the loss: back to the last good checkpoint, then on past the batch that brought it.

Large runs do this by hand: PaLM's loss spiked about 20 times, at irregular places and with clipping on, and its makers
restarted some 100 steps before a spike and left out 200 to 500 batches (Chowdhery et al. 2022, section 5.1). The data
alone were not to blame: the same batches did no harm from another state. So what is left out here is all that lies
between the checkpoint and the end of the spike's batch, and how much that is follows from --checkpoint_interval.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from data.loader import Loader
from training.distributed import Dist
from training.progress import Progress
from training.run_folder import RunFolder, Say
from training.saver import Saver
from training.start import Start
from training.step_plan import StepPlan

WINDOW = 64  # steps that a loss is held against
LEAST = 20  # fewer say too little about how far losses scatter
RISE = 0.1  # of the mean, below which nothing is a spike: a flat curve has hardly any scatter
MAX_IN_A_ROW = 3  # times back to one checkpoint


class LossSpike(ValueError):
    """The loss rises whatever the data: the run ends."""


@dataclass(frozen=True)
class Detour:
    """Where a run that goes back goes on: at which checkpoint and sample, and what it knew on the course it leaves."""

    start: Start
    sample: int
    left: Progress
    times: int  # that it has gone back to this checkpoint in a row, this one included

    def take(self, progress: Progress, loader: Loader) -> None:
        """Change the checkpoint's state where the detour differs. best.pt stays, and with it what is known of it."""
        loader.seek(self.sample)
        progress.best_val_loss, progress.best_step = self.left.best_val_loss, self.left.best_step
        progress.rolled_back_to, progress.rollbacks = progress.step, self.times


class Rollback(Exception):
    """The run is to be put together again from `detour`: there it loads as any resumed run does."""

    def __init__(self, detour: Detour) -> None:
        super().__init__("back to a checkpoint")
        self.detour = detour


class SpikeGuard:
    """Holds each loss against those before it. What it knows is in `Progress`, so that a kill changes nothing.

    It goes back to checkpoints of the interval alone: those that a signal left are not there in a run that had none,
    and the two would no longer do the same.
    """

    def __init__(
        self, deviations: float, here: Dist, plan: StepPlan, folder: RunFolder, saver: Saver, say: Say
    ) -> None:
        self.deviations, self.here, self.plan = deviations, here, plan
        self.folder, self.saver, self.say = folder, saver, say

    def watch(self, step: int, loss: float, progress: Progress, samples: range) -> None:
        """The loss of a step, on these global samples. Every process calls it; all raise Rollback, or none."""
        recent = progress.recent_losses
        (spikes,) = self.here.max(is_spike(recent, loss, self.deviations))
        if spikes:
            mean = statistics.fmean(recent)
            text = (
                f"Loss spike at step {step}: {loss:.4f}, where the {len(recent)} steps before had {mean:.4f} "
                f"+- {statistics.stdev(recent):.4f}, on global samples {samples.start}..{samples.stop - 1}"
            )
            self._go_back(text, progress, samples.stop)
        recent.append(loss)
        del recent[:-WINDOW]

    def _go_back(self, text: str, progress: Progress, sample: int) -> None:
        """Raises Rollback, or LossSpike where that did not help; returns where there is no checkpoint to go back to."""
        self.saver.settle()
        found = self.here.from_main(lambda: self.folder.newest_good(self.say, self.plan.saves))
        if found is None:
            self.say(f"Warning: {text}. There is no checkpoint yet to go back to: going on.")
            return
        path, payload = found
        times = progress.rollbacks + 1 if progress.rolled_back_to == payload["step"] else 1
        if times > MAX_IN_A_ROW:
            raise LossSpike(
                f"{text}: after going back to {path} {MAX_IN_A_ROW} times, past other data each time, it is not the "
                "data: try a lower --max_lr, a longer --warmup_steps or --max_grad_norm 0.5, or a higher --spike_guard"
            )
        left_out = f"{payload['train_loader_state']['sample']}..{sample - 1}"
        self.say(f"Warning: {text}. Going back to {path}, and on past samples {left_out}, which are left out.")
        raise Rollback(Detour(Start(path, payload, resumes=True, in_folder=True), sample, progress, times))


def is_spike(recent: Sequence[float], loss: float, deviations: float) -> bool:
    """Whether a loss lies so many standard deviations above the mean of those before it, and RISE of it at least."""
    if len(recent) < LEAST:
        return False
    mean = statistics.fmean(recent)
    return loss > mean + max(deviations * statistics.stdev(recent), RISE * abs(mean))
