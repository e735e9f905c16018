"""When a checkpoint is written, what goes into it, and what happens when that fails."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formats.checkpoint import masks_entry, payload_bytes, save_checkpoint
from model.gpt import GPT
from model.masks import sparsity_line, sparsity_report
from model.tuning import adapter_state
from training import rng
from training.background import Background, HostCopies
from training.distributed import Dist
from training.metrics import Console
from training.optimizer import optimizer_state
from training.parallel import Parallel
from training.progress import Progress
from training.run_folder import RunFolder

MAX_FAILED_IN_A_ROW = 5  # saves, after which a run ends: it would go on for nothing
LARGE = 64 << 20  # bytes of a checkpoint from which writing it is left to a thread: below, it takes under 0.2 s


class Saver:
    """Writes the state at the end of the last completed step. Every rank calls it; rank 0 writes one file of it all.

    A large one is copied to host memory and written beside the next steps (`async_save`); the loop waits for the copy,
    and for the write when the next save is due, before it leaves, and at the last step.

    A stop can come in the middle of a step: weights and optimizer are still those of the step before, but random
    states and the data cursor have moved on. So these are remembered at the end of each step.
    """

    def __init__(
        self,
        folder: RunFolder,
        here: Dist,
        model: GPT,
        parallel: Parallel,
        optimizers: dict[str, torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
        keep: int,
        console: Console,
        about: dict[str, Any],
        async_save: str = "auto",
    ) -> None:
        self.folder, self.here, self.keep, self.console = folder, here, keep, console
        self.async_save = async_save
        self._background, self._copies = Background(), HostCopies()
        self._writing: int | None = None  # the step whose checkpoint the thread has in hand; known to every rank
        self.model, self.parallel, self.optimizers, self.scaler = model, parallel, optimizers, scaler
        self.about = about  # config, tokenizer, template, settings: what does not change in a run
        self.saved_step: int | None = None
        self._failed_in_a_row = 0
        self._progress = Progress()
        self._loader_state: dict[str, Any] = {}
        self._rng: dict[str, Any] = {}

    def remember(self, progress: Progress, loader_state: dict[str, Any], rng_state: dict[str, Any]) -> None:
        """Keep what moves within a step, as it is now."""
        self._progress = Progress.from_dict(progress.to_dict())
        self._loader_state, self._rng = loader_state, rng_state

    def save(self, required: bool = False) -> None:
        """Write model_NNNNN.pt, then prune the old ones. A failure is said and tried again later.

        Raises OSError, on every process, where it is `required` or too many in a row have failed.
        """
        states = [rng.from_bytes(each) for each in self.here.gather_bytes(rng.to_bytes(self._rng))]
        self.settle()
        written, failure = False, None
        payload = self.parallel.whole(self._payload(states)) if self._finite() else None
        if self.here.is_main:
            try:
                written = self._write(payload, may_go_on=not required)
            except OSError as error:
                failure = error
        # Else rank 0 alone would save again before leaving, and wait for ever.
        saved, goes_on, failed = (
            bool(flag) for flag in self.here.max(written, self._background.pending, failure is not None)
        )
        if saved:
            self.saved_step = self._progress.step
        if saved and self.model.masks:
            rows = sparsity_report(self.model, self.model.masks, self.parallel.share_of_zeros)
            self.console.say(f"Sparsity: {sparsity_line(rows)}")
        self._writing = self._progress.step if goes_on else None
        if failed:
            self._count_failure(failure, required)
        elif saved and not goes_on:
            self._failed_in_a_row = 0

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, if one is; from then on it counts as saved, or not."""
        if self._writing is None:
            return
        failure = self._wait()
        (failed,) = self.here.max(float(failure is not None))
        if failed and self.saved_step == self._writing:
            self.saved_step = None
        self._writing = None
        if failed:
            self._count_failure(failure, required=False)
        else:
            self._failed_in_a_row = 0

    def close(self) -> None:
        """The same without the other ranks, on the way out."""
        failure = self._wait()
        if failure is not None:
            self.console.say(f"Checkpoint not saved: {failure}. The previous one is whole.")

    def _wait(self) -> OSError | None:
        try:
            self._background.wait()
        except OSError as error:
            return error
        return None

    def _count_failure(self, failure: OSError | None, required: bool) -> None:
        """Every process calls it, rank 0 with what happened. Raises where the run can not go on without."""
        self._failed_in_a_row += 1
        in_a_row = f"{self._failed_in_a_row} of {MAX_FAILED_IN_A_ROW} in a row"
        if required or self._failed_in_a_row == MAX_FAILED_IN_A_ROW:
            if failure is None:
                raise OSError("rank 0 could not write the checkpoint, and says why")
            raise failure if required else OSError(failure.errno, f"{failure.strerror} (save {in_a_row} that failed)")
        if failure is not None:
            self.console.say(
                f"Checkpoint not saved: {failure}. The previous one is whole; trying again at the next interval "
                f"({in_a_row})."
            )

    def _write(self, payload: dict[str, Any] | None, may_go_on: bool) -> bool:
        """One file, on rank 0; False where there is nothing worth it. `may_go_on`: the loop need not wait for it."""
        step = self._progress.step
        if payload is None:
            self.console.say(f"Step {step}: the weights are not finite; no checkpoint of them is kept.")
            return False
        path = self.folder.checkpoint_path(step)
        large = payload_bytes(payload) >= LARGE
        if may_go_on and (self.async_save == "on" or (self.async_save == "auto" and large)):
            copied = payload if self.parallel.copies else self._copies.of(payload)
            self._background.start(lambda: self._write_file(path, copied))
        else:
            self._write_file(path, payload)
        return True

    def _write_file(self, path: Path, payload: dict[str, Any]) -> None:
        size = save_checkpoint(path, payload)
        self.folder.vouch_for(path)
        self.console.say(f"Saved {path} ({size / 1e6:.1f} MB)")
        try:
            self.folder.prune(self.keep)
        except OSError as error:
            self.console.say(f"Older checkpoints not removed: {error}")

    def save_remembered(self, reason: str) -> None:
        """Before leaving early: save the last completed step, unless that is done or there is none."""
        self.settle()
        step = self._progress.step
        if step < 0:
            self.console.say(f"Stopped by {reason} before the first step was complete: nothing to save.")
        elif self.saved_step == step:
            self.console.say(f"Stopped by {reason} after step {step}, which is saved. --auto_resume goes on from here.")
        else:
            self.console.say(f"Stopped by {reason} after step {step}; saving it. --auto_resume goes on from here.")
            self.save(required=True)

    def save_best(self, val_loss: float) -> None:
        """best.pt: the weights with the lowest validation loss so far, without training state (a third of the size)."""
        payload = self.parallel.whole({**self._weights(), "step": self._progress.step, "val_loss": val_loss})
        if not self.here.is_main:
            return
        path = self.folder.path / "best.pt"
        try:
            save_checkpoint(path, payload)
        except OSError as error:
            self.console.say(f"Best weights not saved: {error}")

    def _finite(self) -> bool:
        """Whether all weights of all processes are."""
        finite = all(
            bool(torch.isfinite(self.parallel.local(parameter)).all()) for parameter in self.model.parameters()
        )
        (broken,) = self.here.max(float(not finite))
        return not broken

    def _weights(self) -> dict[str, Any]:
        adapter = adapter_state(self.model)
        if adapter:  # its base is named in `about`, and has the masks
            return {"model": adapter, "versions": versions(), **self.about}
        masks = masks_entry(self.model.masks)
        return {"model": self.model.state_dict(), **masks, "versions": versions(), **self.about}

    def _payload(self, rng_states: list[dict[str, Any]]) -> dict[str, Any]:
        """A full checkpoint: everything that the next step depends on."""
        return {
            **self._weights(),
            "optimizer": optimizer_state(self.model, self.optimizers, self.parallel),
            "scaler": self.scaler.state_dict(),
            "step": self._progress.step,
            "val_loss": self._progress.val_loss,
            "train_loader_state": self._loader_state,
            "rng": rng_states,
            "progress": self._progress.to_dict(),
        }


def versions() -> dict[str, Any]:
    """What wrote a file; the number of threads too, since it changes the last bits of sums on a CPU."""
    return {
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
        "python": platform.python_version(),
        "platform": sys.platform,
        "threads": torch.get_num_threads(),
    }


def describe(path: Path, payload: dict[str, Any]) -> str:
    """One line about a loaded checkpoint."""
    loss = payload.get("val_loss")
    shown = "" if loss is None else f", validation loss {loss:.4f}"
    return f"{path} (step {payload.get('step', '?')}{shown})"
