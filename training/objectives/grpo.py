"""Group relative policy optimisation (Shao et al. 2024, DeepSeekMath): completions are rated against each other.

Each prompt gets G completions o_i from the policy itself, with rewards r_i. What a completion is better or worse than
its group is its advantage A_i = (r_i - mean r) / std r, the same for all its tokens (outcome supervision, section
4.1.2). With the ratio of each token's probability now to that when it was sampled, rho, the loss of a completion is

    - 1/|o_i| sum over tokens of [ min(rho A_i, clip(rho, 1 - e, 1 + e) A_i) - beta KL ]

(equation 3, the mean over the completion's own length as there), KL = pi_ref / pi - log(pi_ref / pi) - 1 (equation 4).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.loader import IGNORED, Batch, Unit
from data.tokenizer import Tokenizer
from data.windows import Prompt
from model.generate import generate
from model.gpt import GPT
from training.objectives.objective import Sums
from training.objectives.reference import Reference
from training.objectives.rewards import load_reward, rate
from training.run_settings import FinetuneSettings
from training.stop import StopRequest


@dataclass
class Completions:
    """What the policy answered to a micro-batch of prompts: R rows of one prompt and one completion each."""

    samples: list[int]  # the prompts
    inputs: Tensor  # (R, T)
    targets: Tensor  # (R, T), the completions
    advantages: Tensor  # (R,)
    old: Tensor | None  # (R, T) log-probabilities when sampled; None: they are those of the first update
    reference: Tensor | None  # (R, T) those of the reference; None: no KL
    sums: dict[str, float]  # of the metrics that are known before any update


class _Interrupted(Exception):
    """A stop was asked for amid a completion."""


class GRPO:
    """Losses and metrics are means over completions. Dropout is off: ratios would measure its noise as well."""

    unit: Unit = "prompt"
    counts = "completions"
    metrics: tuple[str, ...] = (
        "reward/mean", "reward/std_in_group", "groups/without_signal", "completions/length", "completions/cut",
        "policy/kl", "policy/clipped",
    )  # fmt: skip
    dropout, comparable = False, False  # a loss of advantages, which have mean 0, says nothing of the reward

    def __init__(
        self,
        settings: FinetuneSettings,
        model: GPT,
        reference: Reference | None,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        stop: StopRequest,
    ) -> None:
        _check(settings)
        self.model, self.reference, self.tokenizer, self.stop = model, reference, tokenizer, stop
        self.beside = reference.frozen if reference is not None else None
        self.stop_ids, self.seed, self.group = tuple(stop_ids), settings.seed, settings.grpo_group
        self.updates, self.new_tokens = settings.grpo_epochs, settings.grpo_max_new_tokens
        self.clip, self.beta, self.temperature = settings.grpo_clip, settings.grpo_beta, settings.grpo_temperature
        self.reward_name, self.reward = settings.reward, load_reward(settings.reward)

    def describe(self) -> str:
        """What is rewarded, and against what the policy is held."""
        held = f"beta {self.beta:g}" + (f", reference: {self.reference.describe()}" if self.reference else "")
        return f"grpo, reward {self.reward_name}, {self.group} completions a prompt, {held}; dropout is off"

    # -- a step -------------------------------------------------------------------------------------------------------

    def prepare(self, step: int, batches: list[Batch]) -> list[Completions] | None:
        """Completions, rewards and advantages. Raises RewardError."""
        try:
            return [self._completions(step, batch) for batch in batches]
        except _Interrupted:
            return None

    def count(self, batch: Completions) -> int:
        """Completions."""
        return len(batch.inputs)

    def loss(self, network: nn.Module, batch: Completions) -> tuple[Tensor, Sums]:
        """Summed over the completions."""
        log_probs = -network(batch.inputs, batch.targets, reduction="none", temperature=self.temperature)  # (R, T)
        chosen = batch.targets != IGNORED  # (R, T)
        ratio = (log_probs - (log_probs.detach() if batch.old is None else batch.old)).exp()
        advantages = batch.advantages.unsqueeze(1)  # (R, 1)
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        gain = torch.minimum(ratio * advantages, clipped * advantages)  # (R, T)
        kl = torch.zeros_like(log_probs)
        if batch.reference is not None:
            below = batch.reference - log_probs
            kl = below.exp() - below - 1
        lengths = chosen.sum(1)  # (R,)

        def mean(values: Tensor) -> Tensor:
            return (values * chosen).sum(1) / lengths

        sums = {
            **{name: torch.tensor(value) for name, value in batch.sums.items()},
            "policy/kl": mean(kl.detach()).sum(),
            "policy/clipped": mean((ratio * advantages > clipped * advantages).float()).sum(),
        }
        return -mean(gain - self.beta * kl).sum(), sums

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int, Sums] | None:
        """Minus the reward of each prompt's likeliest completion (temperature 0), which has no noise of drawing."""
        count, sums = 0, {"reward/mean": 0.0, "completions/length": 0.0}
        for batch in batches:
            prompts = _prompts(batch)
            try:
                answers = self._generate([prompt.ids for prompt in prompts], temperature=0.0)
            except _Interrupted:
                return None
            count += len(prompts)
            sums["reward/mean"] += sum(self._rated(*each) for each in zip(prompts, answers))
            sums["completions/length"] += sum(map(len, answers))
        return -sums["reward/mean"], count, sums

    # -- completions --------------------------------------------------------------------------------------------------

    def _completions(self, step: int, batch: Batch) -> Completions:
        prompts = [prompt for prompt in _prompts(batch) for _ in range(self.group)]  # (R,)
        seeds = [_seed(self.seed, step, sample, k) for sample in batch.samples for k in range(self.group)]
        answers = self._generate([prompt.ids for prompt in prompts], temperature=self.temperature, seed=seeds)
        rewards = torch.tensor([self._rated(*each) for each in zip(prompts, answers)], dtype=torch.float64)
        groups = rewards.view(-1, self.group)  # (B, G)
        spread = groups.std(dim=1, correction=0, keepdim=True)  # (B, 1)
        # A group of equal rewards says nothing about which completion is better: its advantages are 0, not 0 / 0.
        silent = spread < 1e-6
        advantages = ((groups - groups.mean(dim=1, keepdim=True)) / spread.masked_fill(silent, 1.0)).flatten()
        cut = [len(answer) == self.new_tokens and answer[-1] not in self.stop_ids for answer in answers]
        sums = {
            "reward/mean": float(rewards.sum()),
            "reward/std_in_group": float(spread.sum()) * self.group,
            "groups/without_signal": float(silent.sum()) * self.group,
            "completions/length": float(sum(map(len, answers))),
            "completions/cut": float(sum(cut)),
        }
        inputs, targets = self._rows(prompts, answers)
        advantages = advantages.float().to(inputs.device)
        return Completions(batch.samples, inputs, targets, advantages, *self._log_probs(inputs, targets), sums)

    @torch.no_grad()
    def _log_probs(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of each position (R, T), what the updates compare with: the policy's as it is now, and the reference's."""
        old = reference = None
        if self.updates > 1:
            old = -self.model(inputs, targets, reduction="none", temperature=self.temperature)
        if self.reference is not None:
            reference = -self.reference.losses(inputs, targets, temperature=self.temperature)
        return old, reference

    def _generate(self, prompts: list[list[int]], **options: object) -> list[list[int]]:
        """New ids of each prompt, the id that ends it included: to end is a choice that is rewarded too."""

        def check(row: int, token: int) -> None:
            if self.stop.requested:
                raise _Interrupted

        how = {"max_new_tokens": self.new_tokens, "stop_ids": self.stop_ids, "keep_stop": True, **options}
        return generate(self.model, prompts, on_token=check, **how)

    def _rated(self, prompt: Prompt, answer: list[int]) -> float:
        """The reward of an answer, ids. Raises RewardError."""
        texts = [self.tokenizer.decode([token for token in ids if token not in self.stop_ids])
                 for ids in (prompt.ids, answer, prompt.reference)]  # fmt: skip
        return rate(self.reward, self.reward_name, *texts)

    def _rows(self, prompts: list[Prompt], answers: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Inputs and targets (R, T): the answer's tokens are the targets, padding stands on the right."""
        width = max(len(prompt.ids) + len(answer) for prompt, answer in zip(prompts, answers)) - 1
        inputs = torch.full((len(answers), width), self.tokenizer.eot_id)
        targets = torch.full((len(answers), width), IGNORED)
        for row, (prompt, answer) in enumerate(zip(prompts, answers)):
            ids = torch.tensor([*prompt.ids, *answer])
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(prompt.ids) - 1 : len(ids) - 1] = ids[len(prompt.ids) :]
        device = self.model.wte.weight.device
        return inputs.to(device), targets.to(device)


def _prompts(batch: Batch) -> list[Prompt]:
    assert batch.prompts is not None
    return batch.prompts


def _seed(seed: int, step: int, sample: int, number: int) -> int:
    """Of one completion: the same whatever process draws it, and after a resume."""
    digest = hashlib.blake2b(f"{seed} {step} {sample} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _check(settings: FinetuneSettings) -> None:
    for name, good, wanted in (
        ("grpo_group", settings.grpo_group >= 2, "at least 2, which are compared with each other"),
        ("grpo_epochs", settings.grpo_epochs >= 1, "at least 1"),
        ("grpo_max_new_tokens", settings.grpo_max_new_tokens >= 1, "at least 1"),
        ("grpo_clip", 0 < settings.grpo_clip < 1, "a share between 0 and 1"),
        ("grpo_beta", settings.grpo_beta >= 0, "0 or more"),
        ("grpo_temperature", settings.grpo_temperature > 0, "more than 0: equal completions teach nothing"),
    ):
        if not good:
            raise ValueError(f"--{name} {getattr(settings, name)}: expected {wanted}")
