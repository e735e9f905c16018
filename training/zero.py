"""zero1: DDP whose processes share the optimizers' state (ZeRO stage 1, Rajbhandari et al. 2020)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from training.gathering import gather_entries
from training.optimizer import State
from training.parallel import DataParallel

_BETWEEN = "\0"  # of the parts of an entry's name; no parameter has it


class SharedOptimizer(DataParallel):
    """Each process steps the parameters of which it has the state, then sends them to the others.

    A parameter's state is on one process whole, so that the step is the very step of DDP, to the bit.
    """

    def make(
        self, kind: type[torch.optim.Optimizer], groups: list[dict[str, Any]], **options: Any
    ) -> torch.optim.Optimizer:
        """torch's ZeroRedundancyOptimizer around `kind`; it hands on each group's learning rate at each step."""
        # It warns each process each time that progressive unfreezing adds a layer.
        logging.getLogger(ZeroRedundancyOptimizer.__module__).setLevel(logging.ERROR)
        return ZeroRedundancyOptimizer(groups, kind, **options)

    def part(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer on this process's parameters."""
        assert isinstance(optimizer, ZeroRedundancyOptimizer)
        return optimizer.optim

    def whole(self, nest: dict[str, Any]) -> dict[str, Any]:
        """The optimizers' state from all processes."""
        # Not ZeroRedundancyOptimizer.consolidate_state_dict: that sends pickled objects, to every process.
        return {**nest, "optimizer": self._whole_state(nest["optimizer"])} if "optimizer" in nest else nest

    def _whole_state(self, state: State) -> State:
        entries = {
            _BETWEEN.join((kind, name, key)): value
            for kind, names in state.items()
            for name, values in names.items()
            for key, value in values.items()
        }
        found: State = {kind: {} for kind in state}
        for place, value in gather_entries(self.here, entries).items():
            kind, name, key = place.split(_BETWEEN)
            found[kind].setdefault(name, {})[key] = value
        order = [name for name, _ in self.model.named_parameters()]
        return {kind: {name: names[name] for name in order if name in names} for kind, names in found.items()}
