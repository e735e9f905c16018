"""A search for settings: Optuna proposes them, `finetune` tries them, the lowest validation loss wins.

Every worker is a process of one study in a SQLite file; what must be agreed on between them is decided under one lock.
A trial is a run in LOG_DIR/trial-NNN; interrupted, it goes on from its checkpoint, in whichever worker meets it first.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
import yaml

from formats.checkpoint import write_durably
from report.search import search_picture
from training.launch import finetune
from training.nonfinite import NonFiniteLoss
from training.plan_report import OutOfMemory
from training.recorder import Abandoned
from training.run_folder import lock_file
from training.run_settings import FinetuneSettings
from training.search_settings import Choices, SearchSettings, Space, Value, read_space
from training.settings import from_words, to_dict
from training.spikes import LossSpike
from training.step_plan import StepPlan
from training.study import open_study, optuna_library, storage_errors

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial


def search(settings: SearchSettings) -> dict[str, Any]:
    """Run trials until the study has `settings.trials` of them; returns a summary.

    With one worker the same seed gives the same trials, interrupted or not. Raises ValueError or OSError for what a
    user can mend.
    """
    if settings.config is None:
        raise ValueError("--config names the file with the ranges to search, see configs/search_lora.yaml")
    for name, least in (("trials", 1), ("startup_trials", 1)):
        if getattr(settings, name) < least:
            raise ValueError(f"--{name} {getattr(settings, name)}: expected at least {least}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("tune.py is no script for torchrun: start it several times with the same --storage")
    space = read_space(settings.config)
    folder = Path(space.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    url = settings.storage or f"sqlite:///{folder / 'search.db'}"
    optuna = optuna_library()
    with warnings.catch_warnings(), storage_errors(url):
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _Search(settings, space, folder, url).run()


class _Search:
    """One worker of a study."""

    def __init__(self, settings: SearchSettings, space: Space, folder: Path, url: str) -> None:
        self.settings, self.space, self.folder = settings, space, folder
        self.say = _printer()
        with self._alone():
            self.study = open_study(settings, space, folder, url)

    def run(self) -> dict[str, Any]:
        """Trials one after another while there are some to be done; then the pictures and the last words."""
        while (taken := self._take()) is not None:
            trial, lock = taken
            with lock:
                if not self._try(trial):
                    self.say(f"Interrupted in trial {trial.number}: the same command goes on")
                    return self._summary(finished=False)
            with self._alone():
                self._write_best()
                self._tidy()
        return self._conclude()

    # -- which trial -------------------------------------------------------------------------------------------------

    def _alone(self) -> IO[bytes]:
        """Keeps the other workers waiting, while it is open."""
        lock = lock_file(self.folder / ".search.lock", math.inf)
        assert lock is not None
        return lock

    def _take(self) -> tuple[Trial, IO[bytes]] | None:
        """An unfinished trial that no living worker holds, or a new one, with its lock; None when all are taken."""
        from optuna import Trial

        with self._alone():
            trials = self.study.get_trials(deepcopy=False)
            for old in trials:
                if not old.state.is_finished() and (lock := self._lock(old.number)) is not None:
                    self.study.sampler = self._sampler(old.number)
                    trial = Trial(self.study, old._trial_id)
                    self._draw(trial)  # what was drawn stays; the worker may have died before the last of it
                    return trial, lock
            if len(trials) >= self.settings.trials:
                return None
            self.study.sampler = self._sampler(len(trials))
            trial = self.study.ask()
            lock = self._lock(trial.number)
            assert lock is not None, "nobody else knows of this trial"
            self._draw(trial)
            return trial, lock

    def _lock(self, number: int) -> IO[bytes] | None:
        folder = self._folder(number)
        folder.mkdir(exist_ok=True)
        return lock_file(folder / ".worker")

    def _folder(self, number: int) -> Path:
        return self.folder / f"trial-{number:03d}"

    def _sampler(self, number: int) -> Any:
        """TPE with a seed of the trial's own, so that a search interrupted and resumed draws what it would have."""
        digest = hashlib.blake2b(f"{self.settings.seed}:{number}".encode(), digest_size=4).digest()
        return optuna_library().samplers.TPESampler(
            n_startup_trials=self.settings.startup_trials, constant_liar=True, seed=int.from_bytes(digest, "big")
        )

    def _draw(self, trial: Trial) -> dict[str, Value]:
        """The trial's values by the names of settings."""
        drawn: dict[str, Value] = {}
        for name in self.space.names(drawn):
            values = self.space.ranges[name]
            if isinstance(values, Choices):
                drawn[name] = trial.suggest_categorical(name, list(values.words))
            elif values.whole:
                step = {} if values.step is None else {"step": int(values.step)}
                drawn[name] = trial.suggest_int(name, int(values.low), int(values.high), log=values.log, **step)
            else:
                drawn[name] = trial.suggest_float(name, values.low, values.high, log=values.log, step=values.step)
        return drawn

    # -- one trial ---------------------------------------------------------------------------------------------------

    def _try(self, trial: Trial) -> bool:
        """Run it and tell the study how it ended; False when a signal came first: it stays unfinished then."""
        from optuna.trial import TrialState

        self.say(f"Trial {trial.number} of {self.settings.trials}: {_shown(trial.params)}")
        try:
            with _quiet():
                summary = finetune(self._settings_of(trial), watch=self._watch(trial))
        except Abandoned as reason:
            self.study.tell(trial, state=TrialState.PRUNED)
            self.say(f"Trial {trial.number}: {reason}")
        except NonFiniteLoss as error:
            self._fail(trial, "not finite", str(error))
        except LossSpike as error:
            self._fail(trial, "loss spikes", str(error))
        except OutOfMemory as error:
            self._fail(trial, "out of memory", str(error))
        except ValueError as error:
            self._fail(trial, "settings", str(error))
            if not self._usable():
                raise ValueError(f"trial {trial.number} ({_shown(trial.params)}): {error}") from None
        else:
            if not summary["finished"]:
                return False
            self._complete(trial, summary)
        finally:
            gc.collect()  # an exception's frames hold the model
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return True

    def _complete(self, trial: Trial, summary: dict[str, Any]) -> None:
        loss = summary["best_val_loss"]
        if loss is None:
            self._fail(trial, "not finite", "no validation loss was finite")
            return
        trial.set_user_attr("best_step", summary["best_step"])
        self.study.tell(trial, loss)
        best = self.study.best_trial
        also = "the best so far" if best.number == trial.number else f"best {best.value:.4f} of trial {best.number}"
        self.say(f"Trial {trial.number}: validation loss {loss:.4f} at step {summary['best_step']} ({also})")

    def _fail(self, trial: Trial, failure: str, message: str) -> None:
        """Kept with the trial, which the sampler leaves out of account."""
        from optuna.trial import TrialState

        trial.set_user_attr("failure", failure)
        trial.set_user_attr("message", message)
        self.study.tell(trial, state=TrialState.FAIL)
        self.say(f"Trial {trial.number} failed ({failure}): {message}")

    def _settings_of(self, trial: Trial) -> FinetuneSettings:
        folder = self._folder(trial.number)
        return self._settings(trial.params, log_dir=[str(folder)], auto_resume=["true"])

    def _settings(self, params: dict[str, Value], **more: list[str]) -> FinetuneSettings:
        return from_words(FinetuneSettings, {**self.space.words(params), **more})

    def _watch(self, trial: Trial) -> Callable[[StepPlan, dict[str, Any]], None]:
        """Reports validation losses and ends the trial where the median of the others is better.

        Trials may differ in steps and batches, and their schedules with them: they are compared at the same share of
        the run, in thousandths.
        """
        reported = set(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)  # before a resume

        def watch(plan: StepPlan, record: dict[str, Any]) -> None:
            if record["step"] == 0 and record["val_loss_before"] is None:
                raise ValueError("a search needs a validation split (prepare_data.py --val_fraction 0.05)")
            if "val_loss" not in record:
                return
            share, loss = round(1000 * (record["step"] + 1) / plan.max_steps), record["val_loss"]
            if share not in reported:
                reported.add(share)
                trial.report(loss, share)
            self.say(f"  {share / 10:.0f}%: validation loss {loss:.4f}")
            if share < 1000 and trial.should_prune():
                raise Abandoned(f"pruned after {share / 10:.0f}%: validation loss {loss:.4f}, above the others' median")

        return watch

    # -- what is left --------------------------------------------------------------------------------------------

    def _usable(self) -> list[FrozenTrial]:
        """The trials that were completed or pruned."""
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    def _best(self) -> FrozenTrial | None:
        from optuna.trial import TrialState

        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return min(complete, key=lambda trial: (trial.value, trial.number), default=None)

    def _write_best(self) -> None:
        """best.yaml: the settings that stay and the best ones drawn, as a file for finetune_dolly.py."""
        best = self._best()
        if best is None:
            return
        settings = self._settings(best.params, log_dir=[str(self.folder / "best")])
        given = {name: value for name, value in to_dict(settings).items() if name in settings.explicit_names}  # type: ignore[attr-defined]
        text = (
            f"# Trial {best.number} of the search {self.settings.study!r}: validation loss {best.value:.4f}\n"
            f"# python finetune_dolly.py --config {self.folder / 'best.yaml'}\n"
            + yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
        )
        write_durably(self.folder / "best.yaml", lambda file: file.writelines([text.encode()]))

    def _tidy(self) -> None:
        """Remove the checkpoints of finished trials: dozens of models with their optimizers fill a disk."""
        if self.settings.keep_checkpoints:
            return
        best = self._best()
        for trial in self.study.get_trials(deepcopy=False):
            folder, is_best = self._folder(trial.number), best is not None and trial.number == best.number
            if trial.state.is_finished():
                for file in (*folder.glob("model_*.pt"), folder / "final.pt", folder / "best.pt"):
                    if not (is_best and file.name == "best.pt"):
                        file.unlink(missing_ok=True)

    def _conclude(self) -> dict[str, Any]:
        best = self._best()
        if best is None:
            reasons = sorted({trial.user_attrs.get("failure", "pruned") for trial in self.study.get_trials()})
            raise ValueError(f"none of {self.settings.trials} trials was completed: {', '.join(reasons)}")
        summary = self._summary(finished=True)
        counts = ", ".join(f"{number} {state}" for state, number in summary["states"].items())
        self.say(f"Best of {sum(summary['states'].values())} trials ({counts}): trial {best.number}")
        self.say(f"  validation loss {best.value:.4f}: {_shown(best.params)}")
        if summary["importance"]:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in summary["importance"].items())
            self.say(f"  importance: {shares}")
        with self._alone():
            trials = [
                {"number": t.number, "state": t.state.name.lower(), "value": t.value, "params": t.params}
                for t in self.study.get_trials(deepcopy=False)
            ]
            picture = search_picture(trials, summary["importance"], self.folder / "search.png")
        self.say(f"Settings: {summary['config']} (python finetune_dolly.py --config {summary['config']})")
        self.say(f"Picture: {picture}")
        return summary

    def _summary(self, finished: bool) -> dict[str, Any]:
        best = self._best()
        states: dict[str, int] = {}
        for trial in self.study.get_trials(deepcopy=False):
            states[trial.state.name.lower()] = states.get(trial.state.name.lower(), 0) + 1
        return {
            "finished": finished,
            "states": states,
            "best_trial": None if best is None else best.number,
            "best_val_loss": None if best is None else best.value,
            "best_params": {} if best is None else dict(best.params),
            "importance": self._importance(),
            "config": None if best is None else str(self.folder / "best.yaml"),
            "log_dir": str(self.folder),
        }

    def _importance(self) -> dict[str, float]:
        """How much each setting makes a trial good (PED-ANOVA, Watanabe et al. 2023), as shares; {} of less than 5."""
        optuna = optuna_library()
        completed = [trial for trial in self._usable() if trial.state.name == "COMPLETE"]
        if len(completed) < 5:  # its good ones are the best tenth, at least one
            return {}
        importance = optuna.importance
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # where all trials are equally good
            evaluator = importance.PedAnovaImportanceEvaluator()
            return dict(importance.get_param_importances(self.study, evaluator=evaluator))


def _printer() -> Callable[[str], None]:
    """Prints to what is the terminal now, also while a trial's own words go nowhere, and past its progress bar."""
    from tqdm import tqdm

    terminal = sys.stdout

    def say(text: str) -> None:
        tqdm.write(text, file=terminal)
        terminal.flush()

    return say


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a trial says stands in its training.log."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _shown(params: dict[str, Value]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )
