"""Progressive unfreezing: the top of the network trains first, the layers below it join stage by stage.

Howard & Ruder 2018 (ULMFiT) unfreeze a layer an epoch; small data are passed over few times, so the stages here are
equal shares of the run. The schedule is a function of the step alone: a resumed run needs nothing but its step.
"""

from __future__ import annotations

from model.gpt import GPT
from model.tuning import unfreeze_last


class Unfreezing:
    """In stage s of S the last (s + 1) / S of the layers train, in the final stage the embeddings and head too."""

    def __init__(self, model: GPT, stages: int, max_steps: int) -> None:
        if stages < 1:
            raise ValueError(f"--unfreeze_stages {stages}: expected at least 1")
        self.model, self.max_steps = model, max_steps
        self.stages = min(stages, max_steps, model.config.n_layer)
        self._stage = -1

    def stage(self, step: int) -> int:
        """The stage of a step, 0-based; each begins at a whole step and has at least one."""
        return min(step * self.stages // self.max_steps, self.stages - 1)

    def layers(self, stage: int) -> int:
        """How many of the last layers train in a stage, rounded up."""
        return -(-(stage + 1) * self.model.config.n_layer // self.stages)

    def begin(self, step: int) -> str | None:
        """Makes the step's layers trainable; says what changed, None where nothing did."""
        stage = self.stage(step)
        if stage == self._stage:
            return None
        self._stage = stage
        if stage == self.stages - 1:
            self.model.requires_grad_(True)
            return f"Step {step}: all layers and the embeddings train"
        unfreeze_last(self.model, self.layers(stage))
        return f"Step {step}: the last {self.layers(stage)} of {self.model.config.n_layer} layers train"
