"""What a run says and writes while it goes: step lines, evaluation blocks, samples, epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from data.chat import Template, stop_ids
from data.templates import render_prompt
from data.tokenizer import Tokenizer
from model.generate import generate
from model.gpt import GPT
from training.loggers import Logger
from training.metrics import Console, JsonLines
from training.progress import Progress, Validation
from training.run_folder import RunFolder
from training.run_settings import RunSettings
from training.step_plan import StepPlan
from training.stop import StopRequest

# Told each line of metrics.jsonl when it is written; may raise Abandoned.
Watch = Callable[[StepPlan, dict[str, Any]], None]


class Abandoned(Exception):
    """Whoever watches the run wants no more of it; the message says why. The run ends as stopped."""


class _Interrupted(Exception):
    """A stop was asked for in the middle of a sample."""


class Recorder:
    """Writes on rank 0 and does nothing elsewhere."""

    def __init__(
        self,
        settings: RunSettings,
        plan: StepPlan,
        folder: RunFolder,
        console: Console,
        tokenizer: Tokenizer,
        template: Template | None,
        loggers: Sequence[Logger] = (),
        watch: Watch | None = None,
    ) -> None:
        self.settings, self.plan, self.console = settings, plan, console
        self.tokenizer, self.template, self.loggers, self.watch = tokenizer, template, loggers, watch
        self.best_path = folder.path / "best.pt"
        self.active = console.active
        self.metrics = JsonLines(folder.path / "metrics.jsonl", console.say)
        self.samples = JsonLines(folder.path / "samples.jsonl", console.say)

    def resume_after(self, progress: Progress) -> None:
        """Cut the records to the checkpoint: each step stands once, whatever was interrupted."""
        if self.active:
            last = progress.step if progress.finished_step else progress.step - 1
            self.metrics.cut_after(last)
            self.samples.cut_after(last)

    def log(self, record: dict[str, Any]) -> None:
        """One line in metrics.jsonl, on the terminal, and wherever else the run is told of."""
        if not self.active:
            return
        self.metrics.write(record)
        metrics = "".join(f"{name} {value:.3g} | " for name, value in record.items() if "/" in name)
        line = (
            f"Step {record['step']}/{self.plan.max_steps - 1} | Loss: {record['loss']:.4f} | {metrics}"
            f"LR: {record['lr']:.2e} | grad norm {record['grad_norm']:.2f} | {record['tokens_per_s']:,.0f} tok/s | "
            f"{record['s_per_step']:.2f} s/step | peak {record['memory_mb']:,.0f} MB"
        )
        if self.console.has_bar:
            self.console.note(line)  # the bar shows the same
        else:
            self.console.say(line)
        for logger in self.loggers:
            logger.log(record)
        if self.watch is not None:
            self.watch(self.plan, record)

    def step_done(self, record: dict[str, Any], progress: Progress) -> None:
        """Move the bar; every tenth of an epoch a line with the mean loss, and one at the epoch's end."""
        self.console.advance(
            {
                "loss": f"{record['loss']:.3f}",
                "lr": f"{record['lr']:.1e}",
                "tok/s": f"{record['tokens_per_s']:,.0f}",
                "s/step": f"{record['s_per_step']:.2f}",
                "MB": f"{record['memory_mb']:,.0f}",
            }
        )
        per_epoch = self.plan.steps_per_epoch
        before, after = record["step"] / per_epoch, (record["step"] + 1) / per_epoch
        mean = progress.epoch_loss / max(1, progress.epoch_tokens)
        ends = math.floor(after + 1e-9) > math.floor(before + 1e-9)
        tenth = math.floor(10 * after + 1e-9) % 10 or (10 if ends else 0)
        if math.floor(10 * after + 1e-9) > math.floor(10 * before + 1e-9):
            self.console.say(f"  Progress: {10 * tenth}% | mean loss: {mean:.4f} | LR: {record['lr']:.2e}")
        if ends:
            self.console.say(f"Epoch {math.floor(after + 1e-9)} done, mean loss: {mean:.4f}")
            progress.epoch_loss, progress.epoch_tokens = 0.0, 0

    def validation(self, progress: Progress, validation: Validation, improved: bool) -> None:
        """The block that evaluation scripts print, and whether this is the best so far."""
        self.console.say("***** Running evaluation *****")
        self.console.say(f"  Num examples = {validation.windows}")
        where = f"step {progress.step}, the best so far" if improved else f"step {progress.step}"
        if progress.step < 0:
            where = "before training"
        elif not improved and progress.best_val_loss is not None:
            where += f", best {progress.best_val_loss:.4f} at step {progress.best_step}"
        self.console.say(f"Eval Loss: {validation.loss:.4f} ({where})")
        if improved:
            for logger in self.loggers:
                logger.best(progress.step, validation.loss, self.best_path)
        for name, value in validation.metrics.items():
            self.console.say(f"Eval {name}: {value:.4f}")
        if not validation.metrics:  # a loss in nats per token
            self.console.say(f"Eval Perplexity: {math.exp(min(validation.loss, 700)):.3f}")
        patience, margin = self.plan.patience, self.plan.patience_threshold
        if patience and progress.waited:
            below = (
                "" if progress.patience_loss is None else f" more than {margin:g} below {progress.patience_loss:.4f}"
            )
            self.console.say(f"Early stopping: evaluation {progress.waited} of {patience} without a loss{below}")

    def sample(self, step: int, model: GPT, stop: StopRequest) -> None:
        """Answers to the fixed prompts, with the same seed each time, so that only the weights differ."""
        if not self.active:
            return
        rendered = [render_prompt(text, self.template, self.tokenizer) for text in self.settings.sample_prompts]
        prompts = [ids or [self.tokenizer.eot_id] for ids in rendered]  # of no words: as a new document begins

        def check(row: int, token: int) -> None:
            if stop.requested:
                raise _Interrupted

        try:
            answers = generate(
                model,
                prompts,
                max_new_tokens=self.settings.sample_tokens,
                temperature=0.8,
                top_k=50,
                seed=self.settings.seed,
                stop_ids=stop_ids(self.template, self.tokenizer),
                on_token=check,
            )
        except _Interrupted:
            return
        for prompt, answer in zip(self.settings.sample_prompts, answers):
            text = self.tokenizer.decode(answer)
            self.samples.write({"step": step, "prompt": prompt, "text": text})
            self.console.say(f"  Sample at step {step} | {prompt!r} -> {text!r}")
        for logger in self.loggers:
            logger.samples(step, self.samples.records())

    def flush_to_disk(self) -> None:
        self.metrics.flush_to_disk()
        self.samples.flush_to_disk()

    def close(self) -> None:
        self.metrics.close()
        self.samples.close()
        for logger in self.loggers:
            logger.close()
