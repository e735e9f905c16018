"""The loop: learning rate, micro-steps, clip, finite check, step, log; then evaluate, sample and save when due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import torch

from data.loader import Batch, Loader, eval_batches
from data.shards import TokenSet
from model.gpt import GPT
from training.distributed import Dist
from training.metrics import Console
from training.nonfinite import MAX_SKIPPED_IN_A_ROW, NonFiniteLoss, culprits
from training.objectives.objective import Objective, Sums
from training.objectives.rewards import RewardError
from training.optimizer import set_learning_rate
from training.parallel import Parallel
from training.progress import Progress, Validation
from training.recorder import Recorder
from training.rng import rng_state, seed_micro_batch
from training.run_settings import RunSettings
from training.runtime import Runtime, peak_memory_mb, synchronize
from training.saver import Saver
from training.spikes import SpikeGuard
from training.step_plan import StepPlan
from training.stop import StopRequest
from training.unfreeze import Unfreezing

T = TypeVar("T")
Evaluation = tuple[float, int, Sums]  # as an objective gives it


@dataclass
class Step:
    """What one step did, over all processes: its last optimizer update, where it has several."""

    loss_sum: float
    count: int  # of what the objective's loss is a mean over: supervised tokens, pairs, completions
    grad_norm: float
    lr: float
    metrics: dict[str, float] = field(default_factory=dict)  # means
    seconds: float = 0.0
    taken: bool = True
    fault: str = ""  # where it was not taken, whose numbers were not finite

    @property
    def loss(self) -> float:
        """Mean over what is counted."""
        return self.loss_sum / max(1, self.count)


class Trainer:
    """One run from its first step here to its last, or to the signal that stops it."""

    def __init__(
        self,
        settings: RunSettings,
        plan: StepPlan,
        here: Dist,
        runtime: Runtime,
        model: GPT,
        parallel: Parallel,
        objective: Objective,
        optimizers: dict[str, torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
        loader: Loader,
        val_set: TokenSet | None,
        progress: Progress,
        saver: Saver,
        recorder: Recorder,
        console: Console,
        stop: StopRequest,
        unfreezing: Unfreezing | None = None,
        guard: SpikeGuard | None = None,
    ) -> None:
        self.settings, self.plan, self.here, self.runtime = settings, plan, here, runtime
        self.model, self.parallel, self.objective = model, parallel, objective
        self.optimizers, self.scaler = optimizers, scaler
        self.loader, self.val_set = loader, val_set
        self.progress, self.saver, self.recorder = progress, saver, recorder
        self.console, self.stop, self.unfreezing, self.guard = console, stop, unfreezing, guard
        self._save_wished = False  # by SIGUSR1 to any process
        if runtime.compile:
            parallel.compile()
        model.train(objective.dropout)  # before the first evaluation, which a preference makes as it stands
        parallel.wrap()

    def _unfreeze(self, step: int) -> None:
        """Progressive unfreezing: what the step trains."""
        change = self.unfreezing.begin(step) if self.unfreezing is not None else None
        if change is not None:
            self.console.say(change)
            self.parallel.wrap()

    def run(self) -> bool:
        """Train to the last step, or until patience is out; False when a signal came first (all is saved then).

        Raises Rollback where the guard wants to go back.
        """
        progress, plan = self.progress, self.plan
        self.saver.remember(progress, self.loader.state(), rng_state())
        if not progress.finished_step and not self._finish_step():
            return False
        self.console.start_bar(plan.max_steps, progress.step + 1)
        for step in range(progress.step + 1, plan.max_steps):
            if progress.out_of_patience(plan.patience):
                self._stop_early()
                break
            self._unfreeze(step)
            done = self._step(step)
            if done is None:
                return self._stopped()
            if not done.taken:
                self._refuse(step, done)
            elif self.guard is not None:
                self.guard.watch(step, done.loss, progress, self._samples[0])
            self._count(step, done)
            self.saver.remember(progress, self.loader.state(), rng_state())
            if not self._finish_step():
                return False
        return True

    def _step(self, step: int) -> Step | None:
        """The updates on one global batch; None when a stop was asked for before the first of them was made."""
        started = time.perf_counter()
        first = self.loader.sample
        batches = [self.loader.next_batch() for _ in range(self.plan.grad_accum)]
        self._samples = range(first, self.loader.sample), [batch.samples for batch in batches]
        with self.runtime.autocast():
            prepared = self._together(lambda: self.objective.prepare(step, batches))
        if prepared is None:
            return None
        (count,) = self.here.sum(sum(self.objective.count(batch) for batch in prepared))
        done = self._update(step, prepared, count, may_stop=True)
        for number in range(2, self.objective.updates + 1):
            if done is None or not done.taken:
                break
            later = self._update(step, prepared, count, may_stop=False)
            assert later is not None
            if not later.taken:
                text = f"Step {step}: update {number} is not finite and not taken; the step ends before it. "
                self.console.say(f"{text}{later.fault}.")
                break
            done = later
        if done is not None:
            done.seconds = time.perf_counter() - started
        return done

    def _update(self, step: int, batches: Sequence[Any], count: float, may_stop: bool) -> Step | None:
        """One optimizer step on the micro-batches; None when a stop was asked for between them."""
        here = self.here
        lr = self.plan.schedule(step)
        set_learning_rate(self.optimizers, lr)
        order = self.parallel.order(len(batches))
        losses, metrics = [], []
        for done, number in enumerate(order):
            if may_stop and self._should_stop():
                self._drop_gradients()
                return None
            loss, sums = self._micro_step(number, batches[number], count, last=done == len(batches) - 1)
            losses.append(loss)
            metrics.append(sums)
        self.parallel.finish_gradients()
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        self.parallel.mask_gradients()
        norm = self.parallel.clip(self.settings.max_grad_norm)
        names = self.objective.metrics
        columns = [[float(loss) for loss in losses], *([float(each[name]) for each in metrics] for name in names)]
        loss_sum, *totals = here.total(*columns)  # on a GPU the host has waited for it
        unusable = not math.isfinite(loss_sum) or not self._usable(norm)
        broken, wished = here.max(float(unusable), float(self.stop.take_wish_to_save()))
        self._save_wished |= wished > 0
        fault = ""
        if broken:
            fault = culprits(self.parallel, self.loader, dict(zip(order, map(float, losses))), self._samples[1])
        else:
            for optimizer in self.optimizers.values():
                self.scaler.step(optimizer)
            self.parallel.apply_masks()
        self.scaler.update()  # also after a step not taken: it readies the scaler for the next unscale_
        self._drop_gradients()
        synchronize(here.device)
        means = {name: value / max(1.0, count) for name, value in zip(names, totals)}
        return Step(loss_sum, int(count), float(norm), lr, means, taken=not broken, fault=fault)

    def _micro_step(self, number: int, batch: Any, count: float, last: bool) -> tuple[torch.Tensor, Sums]:
        """Forward and backward of one micro-batch; returns its summed loss and metrics.

        The gradient is that of (sum over supervised tokens) / (supervised tokens of the whole global step), or over
        what else the objective counts, whatever the split.
        """
        self.parallel.begin_micro_step(number, last)
        if self.settings.exact:
            seed_micro_batch(self.settings.seed, batch.samples[0])
        with self.runtime.autocast():
            loss, sums = self.objective.loss(self.parallel.network, batch)
        self.scaler.scale(loss * (self.parallel.gradient_scale / max(1.0, count))).backward()
        self.parallel.end_micro_step(number)
        return loss.detach(), sums

    def _together(self, work: Callable[[], T | None]) -> T | None:
        """What `work` gives, unless it gives None on any process because a stop was asked for meanwhile: then None.

        A reward that fails on one process ends the run on all, the last completed step saved.
        """
        result: T | None = None
        failure: RewardError | None = None
        try:
            result = work()
        except RewardError as error:
            failure = error
        failed, left = self.here.max(float(failure is not None), float(result is None))
        if failed:
            self._save_and_leave("a reward that failed")
            raise failure or RewardError("the reward failed on another process, which says why")
        return None if left else result

    def _usable(self, norm: torch.Tensor) -> bool:
        """A gradient norm that is not finite spoils the weights; under fp16 the scaler skips such steps by itself."""
        return self.scaler.is_enabled() or bool(torch.isfinite(norm))

    def _drop_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def _should_stop(self) -> bool:
        """Whether any process was asked to stop: all of them must leave at the same micro-batch."""
        (wish,) = self.here.max(float(self.stop.requested))
        return wish > 0

    def _refuse(self, step: int, done: Step) -> None:
        """No process took the step: stop the run, or count it as skipped."""
        progress = self.progress
        what = f"loss {done.loss:.4g}" if not math.isfinite(done.loss_sum) else f"gradient norm {done.grad_norm:.4g}"
        data = self._samples[0]
        text = (
            f"Step {step}: {what} is not finite; no process took the step. {done.fault}. Data: global samples "
            f"{data.start}..{data.stop - 1} of {self.loader.describe()}."
        )
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if self.settings.nan_policy == "skip" and progress.skipped_in_a_row <= MAX_SKIPPED_IN_A_ROW:
            self.console.say(text + " Skipped.")
            return
        self._save_and_leave("the last completed step")
        raise NonFiniteLoss(text + " Try a lower --max_lr, --max_grad_norm 0.5, or --nan_policy skip.")

    def _count(self, step: int, done: Step) -> None:
        """Enter the step just done into the run's progress, its log line included."""
        progress, plan = self.progress, self.plan
        progress.step, progress.finished_step, progress.windows_per_step = step, False, plan.windows_per_step
        progress.add(*((done.loss_sum, done.count) if done.taken else (0.0, 0)), plan.tokens_per_step)
        if done.taken:
            progress.skipped_in_a_row = 0
        progress.last_record = {
            "step": step,
            "loss": done.loss,
            "lr": done.lr,
            "grad_norm": done.grad_norm,
            "tokens": progress.tokens,
            self.objective.counts: done.count,
            **done.metrics,
            "epoch": (step + 1) / plan.steps_per_epoch,
            "s_per_step": round(done.seconds, 4),
            "tokens_per_s": round(plan.tokens_per_step / done.seconds, 1),
            "memory_mb": round(peak_memory_mb(self.here.device), 1),
            **({} if done.taken else {"skipped": True}),
            **({"val_loss_before": progress.val_loss_before} if step == 0 else {}),
        }

    def _finish_step(self) -> bool:
        """Evaluate, sample, log and save what is due after the last step; False when a signal came first.

        Interrupted in the middle, it is done over after the resume, from the state at the end of the step.
        """
        progress, plan, step = self.progress, self.plan, self.progress.step
        record = dict(progress.last_record)
        evaluates = self.val_set is not None and plan.due(plan.eval_every, step)
        if evaluates:
            validation = self.evaluate()
            if validation is None:
                return self._stopped()
            record["val_loss"] = validation.loss
            record |= {f"val_{name}": value for name, value in validation.metrics.items()}
            self._see_validation(validation)
        samples = plan.generate_every > 0 and plan.due(plan.generate_every, step)
        if samples:
            with self.parallel.gathered():
                self.recorder.sample(step, self.model, self.stop)
            if self._should_stop():
                return self._stopped()
        progress.finished_step = True
        if evaluates or samples or step == 0 or plan.due(plan.log_every, step):
            self.recorder.log(record)
        self.recorder.step_done(record, progress)
        self.saver.remember(progress, self.loader.state(), rng_state())
        if plan.saves(step) or self._save_wished:
            self._save_wished = False
            self.recorder.flush_to_disk()
            self.saver.save(required=plan.is_last(step))
        return True

    def evaluate(self) -> Validation | None:
        """Mean validation loss and metrics over all processes; None when a stop was asked for meanwhile."""
        assert self.val_set is not None
        batches = eval_batches(
            self.val_set,
            batch_size=self.settings.eval_batch_size or self.settings.batch_size,
            block_size=self.plan.block_size - self.objective.new_tokens,
            max_windows=self.settings.max_eval_samples or None,
            rank=self.here.rank,
            world_size=self.here.world_size,
            packing=self.settings.packing,
            unit=self.objective.unit,
        )
        with self.runtime.autocast():
            scores = self._together(lambda: self._scores(batches))
        if scores is None:
            return None
        columns = zip(*([windows, loss, count, *metrics.values()] for windows, (loss, count, metrics) in scores))
        windows, loss_sum, total, *sums = self.here.total(*(list(map(float, column)) for column in columns))
        means = {name: value / max(1.0, total) for name, value in zip(scores[0][1][2], sums)}
        return None if self._should_stop() else Validation(loss_sum / max(1.0, total), int(windows), means)

    def _scores(self, batches: Iterator[Batch]) -> list[tuple[int, Evaluation]] | None:
        """Number of windows and sums of each batch, apart: what they add up to must not depend on who has which.

        The first is of nothing, so that a process without a batch has the names of the metrics too.
        """
        scores = []
        for given in chain([[]], ([batch] for batch in self.parallel.in_step(batches, self.stop))):
            found = self.objective.evaluate(given)
            if found is None:
                return None
            scores.append((sum(len(batch.samples) for batch in given), found))
        return scores

    def _see_validation(self, validation: Validation) -> None:
        """Keep the best, warn of over-fitting."""
        improved, overfits = self.progress.see_validation(validation.loss, self.plan.patience_threshold)
        self.recorder.validation(self.progress, validation, improved)
        if overfits and self.objective.comparable:
            self.progress.overfitting_warned = True
            self.console.say("Warning: Overfitting detected (validation loss above its best, training loss falling)")
        if improved:
            self.saver.save_best(validation.loss)

    def _stop_early(self) -> None:
        """Early stopping: the last step is saved as that of a run which got to its end is."""
        self.recorder.flush_to_disk()
        self.saver.settle()
        if self.saver.saved_step != self.progress.step:
            self.saver.save(required=True)

    def _stopped(self) -> bool:
        """A signal: save the last completed step as it was at its end, and leave."""
        self._save_and_leave(self.stop.name)
        return False

    def _save_and_leave(self, reason: str) -> None:
        self.recorder.flush_to_disk()
        self.saver.save_remembered(reason)
