"""Distillation: the model learns to predict what a teacher predicts, usually the model that it was before pruning.

The loss of a position is the Kullback-Leibler divergence of the model's next-token distribution from the teacher's
over the whole vocabulary (Hinton et al. 2015 at temperature 1; Muralidharan et al. 2024 found it alone to be the best
way to recover a pruned model). Two things may join it: a share of the ordinary loss on the text's own tokens, and how
far the stream behind each block is from the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import IGNORED, Batch, Unit
from data.tokenizer import Tokenizer
from formats.adapter import base_candidates, base_entry, weights_digest
from formats.checkpoint import stream_order
from formats.open_model import build_model, is_hub_name, load_payload, payload_tokenizer
from model.gpt import GPT
from model.loss import linear_distillation_sum
from training.distributed import Dist
from training.objectives.objective import Sums
from training.run_settings import FinetuneSettings
from training.settings import is_explicit
from training.start import Start


class Distillation:
    """Losses and metrics are means over supervised tokens."""

    unit: Unit = "window"
    counts = "supervised_tokens"
    updates, dropout, new_tokens, comparable = 1, True, 0, True

    def __init__(self, settings: FinetuneSettings, model: GPT, teacher: GPT, name: str) -> None:
        for flag, limit in (("distill_hard", 1.0), ("distill_hidden", float("inf"))):
            if not 0 <= getattr(settings, flag) <= limit:
                span = "0 to 1" if limit == 1 else "at least 0"
                raise ValueError(f"--{flag} {getattr(settings, flag)}: expected {span}")
        self.hard, self.hidden = settings.distill_hard, settings.distill_hidden
        self.model, self.teacher, self.name = model, teacher, name
        self.beside: GPT | None = teacher
        if self.hidden:
            _check_streams(model, teacher, name)
        more = ("distill/hidden",) if self.hidden else ()
        self.metrics: tuple[str, ...] = ("distill/kl", "distill/cross_entropy", *more)
        self._criterion = torch.compiler.disable(self._soft_loss)  # one object: compiled code is guarded by it
        self._batch: Batch | None = None  # of the micro-batch at hand, which the criterion is not told
        self._theirs: tuple[Tensor, Tensor] | None = None
        self._parts: tuple[Tensor, Tensor] | None = None

    def describe(self) -> str:
        """From whom, and what joins the divergence."""
        more = f", {self.hard:g} of the loss on the text itself" if self.hard else ""
        more += f", {self.hidden:g} x the distance of the streams" if self.hidden else ""
        return f"distill, KL from {self.name}, over the whole vocabulary{more}"

    def prepare(self, step: int, batches: list[Batch]) -> list[Batch]:
        """The teacher reads each micro-batch when its turn comes, so that one's hidden states exist at a time."""
        return batches

    def count(self, batch: Batch) -> int:
        """Supervised tokens."""
        return batch.supervised

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Sums]:
        """Nats, summed over the supervised tokens; a distance of streams counts as so many nats."""
        batch = batch.to(self.model.device)
        how: dict[str, Any] = {"positions": batch.positions, "doc_ids": batch.doc_ids}
        with streams(self.teacher, self.hidden > 0) as theirs, torch.no_grad():
            self._theirs = self.teacher(batch.inputs, criterion=lambda hidden, head: (hidden, head), **how)
        self._batch = batch
        with streams(self.model, self.hidden > 0) as ours:
            loss = network(batch.inputs, criterion=self._criterion, **how)
        assert self._parts is not None
        sums = dict(zip(self.metrics, self._parts))
        if self.hidden:
            apart = _distance(ours, theirs, batch.targets)
            loss, sums["distill/hidden"] = loss + self.hidden * apart, apart.detach()
        self._theirs = self._batch = self._parts = None
        return loss, sums

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int, Sums]:
        """The same without dropout."""
        loss_sum, count, sums = 0.0, 0, dict.fromkeys(self.metrics, 0.0)
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in batches:
                loss, found = self.loss(self.model, batch)
                loss_sum, count = loss_sum + float(loss), count + batch.supervised
                sums = {name: sums[name] + float(found[name]) for name in self.metrics}
        finally:
            self.model.train(was_training)
        return loss_sum, count, sums

    def _soft_loss(self, hidden: Tensor, head: Tensor) -> Tensor:
        """hidden (B, T, C) and head (V, C) of the model that learns."""
        assert self._theirs is not None and self._batch is not None
        theirs, their_head = self._theirs
        targets, vocab_size = self._batch.targets.flatten(), self.model.config.vocab_size
        flat = (hidden.flatten(0, 1), head, theirs.flatten(0, 1), their_head, targets)
        loss, *self._parts = linear_distillation_sum(*flat, vocab_size, self.hard)  # type: ignore[assignment]
        return loss


@contextmanager
def streams(model: GPT, wanted: bool = True) -> Iterator[dict[int, Tensor]]:
    """Inside, what each block of `model` puts out (B, T, C) is found under the block's number."""
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        return lambda module, inputs, output: found.__setitem__(number, output)

    hooks = [block.register_forward_hook(keep(number)) for number, block in enumerate(model.h)] if wanted else []
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _distance(ours: dict[int, Tensor], theirs: dict[int, Tensor], targets: Tensor) -> Tensor:
    """Squared distance over the teacher's squared length, mean over blocks, summed over supervised tokens.

    Over the length of each token's own stream: that of the first token is a hundred times that of the others in many
    models, and without this nothing else would count.
    """
    chosen = targets != IGNORED  # (B, T)
    total = torch.zeros((), device=targets.device)
    for number, stream in ours.items():
        wanted = theirs[number][chosen].float()  # (S, C)
        apart = (stream[chosen].float() - wanted).square().sum(1) / wanted.square().sum(1).clamp_min(1e-12)
        total = total + apart.sum()
    return total / len(ours)


def _check_streams(model: GPT, teacher: GPT, name: str) -> None:
    sizes = [(each.config.n_layer, each.config.n_embd) for each in (model, teacher)]
    if sizes[0] != sizes[1]:
        shown = [f"{n_layer} layers of width {n_embd}" for n_layer, n_embd in sizes]
        raise ValueError(
            f"--distill_hidden compares layer by layer, and the model has {shown[0]}, {name} {shown[1]}: leave it out"
        )


def _check_order(start: Start, payload: dict[str, Any], name: str) -> None:
    """A resumed run, whose checkpoint does not tell, was checked when it began."""
    if not start.resumes and stream_order(start.payload or {}) != stream_order(payload):
        raise ValueError(
            f"--distill_hidden compares channel by channel, and pruning in blocks gave {start.path} another order of "
            f"channels than {name} has: leave it out, or prune with --distill_hidden too, which keeps the order"
        )


def open_teacher(
    settings: FinetuneSettings, here: Dist, start: Start, model: GPT, tokenizer: Tokenizer, folder: Path
) -> tuple[GPT, str, dict[str, Any]]:
    """The teacher on the model's device, what it is called, and the entries by which a resumed run finds it again.

    Rank 0 reads it; there a checkpoint's fp32 weights stay mapped from its file. ValueError or FileNotFoundError where
    there is none, or another than the run began with.
    """
    entry = (start.payload or {}).get("teacher") if start.resumes else None
    names = [settings.teacher] if settings.teacher is not None else []
    if entry is not None and not is_explicit(settings, "teacher"):
        names = base_candidates({"base": entry}, start.path or folder)
    if not names:
        raise ValueError("--objective distill learns from a model: name it with --teacher")

    def read() -> tuple[str, dict[str, Any]]:
        name = next((name for name in names if Path(name).exists() or is_hub_name(name)), names[0])
        return name, load_payload(name)

    name, payload = here.from_main(read)
    if entry is not None and weights_digest(payload["model"]) != entry["digest"]:
        raise ValueError(f"--teacher {name}: is another model than the run began with ({entry['name']})")
    if (theirs := payload_tokenizer(payload, name)).fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"--teacher {name}: speaks {theirs.kind} ({theirs.fingerprint[:8]}), the model {tokenizer.kind} "
            f"({tokenizer.fingerprint[:8]}): distillation compares token by token, so both need the same tokenizer"
        )
    if settings.distill_hidden:
        _check_order(start, payload, name)
    entry = base_entry(payload, name, folder)
    teacher = build_model({**payload, "in_memory": True}, name).eval().requires_grad_(False)
    return teacher.to(model.wte.weight.device), name, {"teacher": entry}
