"""A run from settings to summary: `pretrain` and `finetune`, which the scripts, the search and the demo call."""

from __future__ import annotations

import gc
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.chat import stop_ids
from data.loader import Loader
from data.shards import TokenSet
from formats.checkpoint import load_checkpoint, write_durably
from model.gpt import GPT
from training import rng
from training.distributed import Dist, close_distributed, setup_distributed
from training.loggers import open_loggers
from training.loop import Trainer
from training.metrics import Console
from training.network import Network, build_network
from training.objectives.build import build_objective
from training.objectives.objective import Objective
from training.optimizer import build_optimizers, load_optimizer_state
from training.parallel import Parallel, check_parallel, choose_parallel, is_spread, stop_of_all
from training.peers import PeersLost
from training.plan_report import OutOfMemory, out_of_memory, show_plan
from training.progress import Progress
from training.recorder import Abandoned, Recorder, Watch
from training.run_data import open_data
from training.run_folder import RunFolder
from training.run_settings import FinetuneSettings, RunSettings, TrainSettings
from training.runtime import Runtime, choose_runtime
from training.saver import Saver, describe, versions
from training.settings import to_dict, to_yaml
from training.spikes import Detour, Rollback, SpikeGuard
from training.start import Start, note_versions, start_everywhere, with_checkpoint_settings, with_preset_defaults
from training.step_plan import (
    StepPlan,
    check_settings,
    fitted_block_size,
    kept_windows,
    note_batch,
    plan_steps,
    resolved,
)
from training.stop import StopRequest
from training.summary import introduce, nothing_to_do, outcome, why_early
from training.unfreeze import Unfreezing
from training.watch_peers import watched_peers


def pretrain(settings: TrainSettings) -> dict[str, Any]:
    """Train a GPT from random weights on a folder of token shards; returns a summary.

    Raises ValueError or OSError for what a user can mend.
    """
    return _run(settings)


def finetune(settings: FinetuneSettings, watch: Watch | None = None) -> dict[str, Any]:
    """Tune a pretrained model on instruction shards (or a JSONL of records); returns a summary.

    `watch` is told each logged step, validation losses among them, and may end a run of one process by raising
    Abandoned. Raises ValueError or OSError for what a user can mend.
    """
    return _run(settings, watch)


def _run(settings: RunSettings, watch: Watch | None = None) -> dict[str, Any]:
    here = setup_distributed(settings.device, settings.dist_timeout)
    console, folder = Console(here.is_main), RunFolder(settings.log_dir)
    settings = with_preset_defaults(settings)
    try:
        if settings.plan:
            return here.from_main(lambda: show_plan(settings, here.device, here.world_size, console.say))
        last_words = partial(_last_words, here, folder, console)
        with StopRequest() as stop, watched_peers(here, settings.dist_timeout, last_words):
            here.from_main(folder.open)
            if here.local_rank == 0 and not here.is_main:
                folder.join()
            return _with_detours(settings, here, console, folder, stop, watch)
    except Abandoned as reason:
        folder.write_status("stopped", reason=str(reason))
        raise
    except PeersLost:
        raise
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # as a CPU says
            raise
        raise OutOfMemory(out_of_memory(settings, here.device, here.world_size, error)) from None
    finally:
        console.close()
        folder.close()
        close_distributed(here)


def _last_words(here: Dist, folder: RunFolder, console: Console, reason: str) -> str:
    """Another process is gone: with what is saved and how to go on, for the terminal; in log and status too."""
    line = f"{reason}. {folder.how_to_go_on(here.rank == here.local_rank)}"
    console.note(f"error: {line}")
    folder.fail(reason)
    return line


def _with_detours(
    settings: RunSettings, here: Dist, console: Console, folder: RunFolder, stop: StopRequest, watch: Watch | None
) -> dict[str, Any]:
    """The run; put together anew, as if it had been interrupted, each time that it is to go back to a checkpoint."""
    detour = None
    while True:
        try:
            return _Run(settings, here, console, folder, stop, watch, detour).run()
        except Rollback as rollback:
            detour = rollback.detour
        gc.collect()  # the model that is left is part of cycles: two would not fit


class _Run:
    """Puts a run together, one concern a method, in the order in which they are called."""

    def __init__(
        self,
        settings: RunSettings,
        here: Dist,
        console: Console,
        folder: RunFolder,
        stop: StopRequest,
        watch: Watch | None,
        detour: Detour | None = None,
    ) -> None:
        self.watch, self.detour = watch, detour
        assert watch is None or here.world_size == 1, "a watcher speaks for one process"
        self.settings, self.here, self.console, self.folder, self.stop = settings, here, console, folder, stop
        self.say = console.say

    def run(self) -> dict[str, Any]:
        detour = self.detour
        start = start_everywhere(self.settings, self.here, self.folder, self.say) if detour is None else detour.start
        if start.resumes and start.payload is not None:
            assert start.path is not None
            self.say(f"Resuming from {describe(start.path, start.payload)}; settings not given here come from it")
            self.settings = with_checkpoint_settings(self.settings, start.payload.get("settings", {}), self.say)
            note_versions(start.payload.get("versions", {}), versions(), self.say)
        check_settings(self.settings)
        check_parallel(self.settings, self.here.world_size)
        data = open_data(self.settings, self.here, start)
        train_set, val_set, self.tokenizer, self.template = data.train, data.val, data.tokenizer, data.template
        network = build_network(self.settings, self.here, start, train_set, self.folder.path, self.say)
        spread = is_spread(self.settings, self.here.world_size)  # then it comes to the device in parts
        model = network.model if spread else network.model.to(self.here.device)
        model.masks = {name: mask.to(self.here.device) for name, mask in model.masks.items()}
        objective = self._objective(start, network)
        plan, loader = self._plan(start, train_set, model, objective)
        progress = self._progress(start, loader)
        unfreezing = self._unfreezing(model, plan)
        self._claim_folder(start, progress, plan)
        runtime = self._runtime()
        parallel = choose_parallel(self.settings, self.here, model, objective.beside, runtime)
        optimizers = self._optimizers(network, parallel, start, unfreezing, progress)
        scaler = torch.amp.GradScaler(self.here.device.type, enabled=runtime.dtype is torch.float16)
        if start.resumes and start.payload and start.payload["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(start.payload["scaler"])
        about = self._about(network)
        saver = Saver(
            self.folder,
            self.here,
            model,
            parallel,
            optimizers,
            scaler,
            self.settings.keep_last_n_checkpoints,
            self.console,
            about,
            self.settings.async_save,
        )
        if start.in_folder and progress.finished_step:
            saver.saved_step = progress.step
        loggers = open_loggers(self.settings, self.folder.path, progress) if self.here.is_main else []
        recorder = Recorder(
            self.settings, plan, self.folder, self.console, self.tokenizer, self.template, loggers, self.watch
        )
        recorder.resume_after(progress)
        trainer = Trainer(
            self.settings, plan, self.here, runtime, model, parallel, objective, optimizers, scaler, loader, val_set,
            progress, saver, recorder, self.console, self.stop, unfreezing, self._guard(plan, saver),
        )  # fmt: skip
        try:
            if (done := nothing_to_do(plan, progress)) is not None:
                self.say(done)
                return self._finish(plan, progress, finished=True)
            introduce(self.say, self.settings, plan, loader, model, runtime, has_val=val_set is not None)
            if (line := objective.describe()) is not None:
                self.say(f"Objective: {line}")
            self._check_forward(trainer, loader, progress)
            self._restore_rng(start, progress)
            finished = trainer.run()
        finally:
            saver.close()
            recorder.close()
            loader.close()
            parallel.close()
        return self._finish(plan, progress, finished)

    # -- what the run is made of -------------------------------------------------------------------------------------

    def _objective(self, start: Start, network: Network) -> Objective:
        """What the run minimises; what its checkpoints must say of it goes into `network.about`."""
        stops = stop_ids(self.template, self.tokenizer)
        where = self.folder.path
        stop = stop_of_all(self.settings, self.here, self.stop)
        objective, entries = build_objective(
            self.settings, self.here, start, network.model, self.tokenizer, stops, where, stop
        )
        network.about |= entries
        return objective

    def _plan(self, start: Start, train_set: TokenSet, model: GPT, objective: Objective) -> tuple[StepPlan, Loader]:
        """The data loader of this process, and the steps that follow from its windows."""
        settings, room = self.settings, (model.context_length, model.config.block_size)
        block_size = fitted_block_size(settings, *room, objective.new_tokens, self.say)
        loader = Loader(
            train_set,
            batch_size=settings.batch_size,
            block_size=block_size - objective.new_tokens,
            seed=settings.seed,
            rank=self.here.rank,
            world_size=self.here.world_size,
            packing=settings.packing,
            max_samples=settings.max_samples,
            unit=objective.unit,
        )
        state = start.payload if start.resumes else None
        windows, processes = loader.windows_per_epoch, self.here.world_size
        plan = plan_steps(settings, block_size, windows, processes, kept_windows(settings, state, processes))
        note_batch(plan, state, self.say)
        return plan, loader

    def _progress(self, start: Start, loader: Loader) -> Progress:
        """What the run remembers; the loader stands where the checkpoint left it."""
        if not start.resumes or start.payload is None:
            return Progress()
        loader.load_state(start.payload["train_loader_state"])
        progress = Progress.from_dict(start.payload["progress"])
        if self.detour is not None:
            self.detour.take(progress, loader)
        return progress

    def _claim_folder(self, start: Start, progress: Progress, plan: StepPlan) -> None:
        """Nothing of an earlier run is overwritten: what is in the way moves into earlier-NNN/. Then the log opens."""
        step = progress.step if start.in_folder else None
        new_course = self.settings.checkpoint_path is not None and self.detour is None
        self.folder.spare = plan.saves if self.settings.spike_guard else None
        config = to_yaml(resolved(self.settings, plan)).encode()
        if self.settings.auto_resume and step is None and self.folder.held and self.folder.begins_again(config):
            self.folder.clear_records()
        elif self.folder.held:  # on other machines too: a run must not go on some day from what an earlier one left
            self.folder.set_aside(step, self.say, new_course)
        if self.here.is_main:
            self.folder.prune(self.settings.keep_last_n_checkpoints)  # a kill may have come between rename and removal
            self.console.open_log(self.folder.path / "training.log")
            write_durably(self.folder.path / "config.yaml", lambda file: file.writelines([config]))
            self.folder.write_status("running", step=progress.step)

    def _runtime(self) -> Runtime:
        settings = self.settings
        how = (settings.dtype, settings.compile, settings.matmul_precision)
        return choose_runtime(self.here.device, *how, exact=settings.exact)

    def _guard(self, plan: StepPlan, saver: Saver) -> SpikeGuard | None:
        deviations = self.settings.spike_guard
        return SpikeGuard(deviations, self.here, plan, self.folder, saver, self.say) if deviations else None

    def _unfreezing(self, model: GPT, plan: StepPlan) -> Unfreezing | None:
        settings = self.settings
        if not isinstance(settings, FinetuneSettings) or settings.finetune_method != "progressive":
            return None
        return Unfreezing(model, settings.unfreeze_stages, plan.max_steps)

    def _optimizers(
        self,
        network: Network,
        parallel: Parallel,
        start: Start,
        unfreezing: Unfreezing | None,
        progress: Progress,
    ) -> dict[str, torch.optim.Optimizer]:
        settings, model = self.settings, network.model
        optimizers = build_optimizers(
            model,
            settings.optimizer,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=self.here.device.type in ("cpu", "cuda"),
            lr_scales=network.lr_scales,
            placement=parallel,
        )
        if unfreezing is not None and progress.step >= 0:
            unfreezing.begin(progress.step)  # what has not trained yet has no state to load
        if start.resumes and start.payload is not None:
            saved = start.payload.pop("optimizer")  # it would stay in memory
            load_optimizer_state(model, optimizers, saved, parallel)
        return optimizers

    def _about(self, network: Network) -> dict[str, Any]:
        return {
            **network.about,
            "tokenizer": self.tokenizer.spec(),
            "template": self.template.spec() if self.template is not None else None,
            "settings": to_dict(self.settings),
        }

    def _restore_rng(self, start: Start, progress: Progress) -> None:
        """The saved random states, one a process; with another number of processes each derives a new one."""
        saved = start.payload["rng"] if start.resumes and start.payload is not None else None
        if saved is not None and len(saved) == self.here.world_size:
            rng.set_rng_state(saved[self.here.rank])
            return
        if saved is not None and not self.settings.exact:
            self.say(
                f"{len(saved)} processes wrote the checkpoint, {self.here.world_size} run now: dropout is re-seeded"
            )
        rng.seed_everything(rng.derived_seed(self.settings.seed, progress.step + 1, self.here.rank))

    # -- before the first step and after the last --------------------------------------------------------------------

    def _check_forward(self, trainer: Trainer, loader: Loader, progress: Progress) -> None:
        """One batch forward before any training, and the validation loss of the weights as they come."""
        state = loader.state()
        batch = loader.next_batch()
        loader.load_state(state)
        with trainer.runtime.autocast():
            found = trainer.objective.evaluate(trainer.parallel.in_step(iter([batch]), self.stop))
        if found is None or not found[1]:  # a stop was asked for
            return
        loss_sum, count, _ = found
        mean = loss_sum / max(1, count)
        if not math.isfinite(mean):
            raise ValueError(f"the first batch gives a loss of {mean}: the weights are damaged, or dtype is too narrow")
        counted = trainer.objective.counts.replace("_", " ")
        self.say(f"Checked one batch forward: loss {mean:.4f} over {count:,} {counted}")
        if progress.step < 0 and trainer.val_set is not None:
            validation = trainer.evaluate()
            if validation is not None:
                progress.val_loss_before = validation.loss
                trainer.recorder.validation(progress, validation, improved=False)

    def _finish(self, plan: StepPlan, progress: Progress, finished: bool) -> dict[str, Any]:
        """The curves, the status, the last words."""
        summary = self._summary(plan, progress, finished)
        if not self.here.is_main:
            return summary
        early = summary["stopped_early"]
        if summary["final"] is not None:
            self._write_final(Path(summary["final"]), progress)
        reason = {"reason": why_early(plan, progress)} if early else {}
        self.folder.write_status("finished" if finished else "stopped", step=progress.step, **reason)
        if finished:
            from report.curves import plot_curves
            from report.run import run_page

            ended = why_early(plan, progress) if early else f"Finished {plan.max_steps} steps"
            self.say(f"{ended}: {outcome(progress, per_token=getattr(self.settings, 'objective', 'sft') == 'sft')}")
            self.say(f"Checkpoint: {summary['checkpoint']}")
            if summary["final"] is not None:
                self.say(f"Best weights, of step {progress.best_step}: {summary['final']}")
            self.say(f"Curves: {plot_curves(self.folder.path)}")
            self.say(f"Page: {run_page(self.folder.path)}")
        return summary

    def _write_final(self, path: Path, progress: Progress) -> None:
        """final.pt is best.pt once more, under a name that says that the run is done."""
        best = self.folder.path / "best.pt"
        if not best.exists() or load_checkpoint(best).get("step") != progress.best_step:
            raise ValueError(f"{best}: does not hold the best weights, of step {progress.best_step}: no {path.name}")
        with open(best, "rb") as file:
            write_durably(path, lambda copy: shutil.copyfileobj(file, copy))

    def _summary(self, plan: StepPlan, progress: Progress, finished: bool) -> dict[str, Any]:
        return {
            "finished": finished,
            "stopped_early": finished and progress.step < plan.max_steps - 1,
            "step": progress.step,
            "max_steps": plan.max_steps,
            "loss": progress.last_record.get("loss"),
            "val_loss": progress.val_loss,
            "val_loss_before": progress.val_loss_before,
            "best_val_loss": progress.best_val_loss,
            "best_step": progress.best_step,
            "checkpoint": str(self.folder.checkpoint_path(progress.step)),
            "final": str(self.folder.path / "final.pt") if finished and self.settings.load_best_model_at_end else None,
            "log_dir": str(self.folder.path),
        }
