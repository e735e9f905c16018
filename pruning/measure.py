"""What a model is: its size, its perplexity by a printed protocol, its speed and memory in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from evaluation.checkpoints import finite_or_none
from evaluation.perplexity import perplexity
from model.gpt import GPT
from pruning.text import Text

_ROOT = Path(__file__).resolve().parent.parent


def measure_perplexity(model: GPT, text: Text, samples: int, length: int) -> dict[str, Any]:
    """{"perplexity", "loss", "protocol"} over windows evenly spread over the text, all of them for 0 samples."""
    rows = text.even_windows(samples, length, "--eval_samples or --eval_seq_len")  # (samples, T)
    found = perplexity(model, rows.flatten().numpy(), block_size=length, stride=length)
    return {
        "perplexity": finite_or_none(found.perplexity),
        "loss": finite_or_none(found.loss),
        "protocol": f"{text.name}: {found.protocol}",
    }


def show(value: float | None) -> str:
    """A perplexity as the fixed lines print it."""
    return "not finite" if value is None else f"{value:.2f}"


def sizes(model: GPT) -> dict[str, int]:
    """Parameters, how many of them are not zero, and the bytes of the tensors."""
    weights = {id(parameter): parameter for parameter in model.parameters()}.values()
    return {
        "parameters": sum(parameter.numel() for parameter in weights),
        "nonzero": sum(int(torch.count_nonzero(parameter)) for parameter in weights),
        "tensor_bytes": sum(parameter.numel() * parameter.element_size() for parameter in weights),
    }


def layer_numbers(model: GPT) -> list[dict[str, int]]:
    """Of each layer, the numbers of its attention's and its MLP's matrices that are not zero."""
    return [
        {part: _nonzero(getattr(block, name)) for part, name in (("attention", "attn"), ("mlp", "mlp"))}
        for block in model.h
    ]


def _nonzero(module: torch.nn.Module | None) -> int:
    parameters = [] if module is None else [p for p in module.parameters() if p.dim() > 1]
    return sum(int(torch.count_nonzero(parameter)) for parameter in parameters)


def kept_by_layer(before: Sequence[dict[str, int]], after: Sequence[dict[str, int] | None]) -> list[dict[str, Any]]:
    """A row for each layer of the base: what it had, and what is left of it (None: the layer is gone)."""
    nothing = {"attention": 0, "mlp": 0}
    return [
        {"layer": i, **{part: [(now or nothing)[part], had[part]] for part in nothing}}
        for i, (had, now) in enumerate(zip(before, after, strict=True))
    ]


# -- speed and memory ------------------------------------------------------------------------------------------------


class Probe:
    """A model in a process of its own, that generates when told to and knows the memory that it took."""

    def __init__(self, ref: str, device: str) -> None:
        self.ref = ref
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pruning.probe", ref, device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def ask(self, command: str) -> dict[str, Any]:
        """What the process answers. ValueError, with its last line, where it died."""
        assert self._process.stdin is not None and self._process.stdout is not None and self._process.stderr is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said before it died is in stderr
        line = self._process.stdout.readline()
        if not line:
            last = (self._process.stderr.read().strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{self.ref}: its speed cannot be measured ({last[:200]})")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        self._process.kill()
        self._process.wait()


def speed_and_memory(refs: Sequence[str], runs: int, device: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """{"tokens_per_s", "runs", "peak_memory_mb", "weights"} of each model, medians of `runs` generations.

    They take turns, since a machine is faster one minute than the next, in processes of their own, so that each has its
    memory to itself. Raises ValueError where one cannot be opened.
    """
    say(f"Speed: {runs} generations of each of {len(refs)} models in turn")
    probes: list[Probe] = []
    try:
        for ref in refs:
            probes.append(Probe(ref, device))
        for probe in probes:
            probe.ask("run")  # the first pays for allocations
        found: list[list[float]] = [[] for _ in probes]
        for _ in range(runs):
            for own, probe in zip(found, probes):
                answer = probe.ask("run")
                own.append(answer["tokens"] / answer["seconds"])
        ends = [probe.ask("end") for probe in probes]
    finally:
        for probe in probes:
            probe.close()
    return [{"tokens_per_s": statistics.median(own), "runs": own, **end} for own, end in zip(found, ends)]
