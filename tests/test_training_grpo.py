"""GRPO against its paper's formula, rewards, and as whole runs: what they equal, learn, log and refuse."""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from data.loader import Batch, eval_batches
from data.shards import open_dataset
from model.gpt import GPT
from model.lora import LoraSettings
from model.tuning import apply_method
from tests.lives import Strike, finetuning, records
from tests.runs import BARE, log, losses, status, steps_on_disk, tune
from tests.tiny import BYTES, finetune_settings, pair_set, sum_set
from tests.tiny_checkpoints import save_tiny, tiny_model
from training.objectives.grpo import GRPO
from training.objectives.reference import Reference
from training.objectives.rewards import FORM, RewardError, arithmetic, load_reward, rate
from training.progress import Progress
from training.run_settings import FinetuneSettings
from training.stop import StopRequest

FUNCTIONS = Path(__file__).with_name("reward_functions.py")
LETTERS = f"{FUNCTIONS}:letters"
GRPO_RUN: dict[str, Any] = {"objective": "grpo", "reward": LETTERS, "grpo_group": 4, "grpo_max_new_tokens": 6}
GRPO_RUN |= {"batch_size": 2, "total_batch_size": 512, **BARE}


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sum_set(tmp_path_factory.mktemp("data") / "sums")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("start") / "model.pt", block_size=128, scale=1.0)


def objective(model: GPT, reference: GPT | None = None, **settings: Any) -> GRPO:
    chosen = {**{name: GRPO_RUN[name] for name in ("objective", "reward", "grpo_group", "grpo_max_new_tokens")}}
    given = FinetuneSettings(**{**chosen, **settings})
    held = None if given.grpo_beta == 0 else Reference(model, reference)
    return GRPO(given, model, held, BYTES, (BYTES.eot_id,), StopRequest())


def a_batch(sums: Path, size: int = 3) -> Batch:
    how: dict[str, Any] = {"block_size": 122, "max_windows": size, "rank": 0, "world_size": 1, "unit": "prompt"}
    return next(iter(eval_batches(open_dataset(sums, "train"), batch_size=size, **how)))


def naive(grpo: GRPO, policy: GPT, old: GPT, reference: GPT | None, made: Any, group: int) -> torch.Tensor:
    """Equations 3 and 4 of the paper, completion by completion and token by token, from all logits."""

    def log_probs(model: GPT, row: int) -> torch.Tensor:
        places = (made.targets[row] != -100).nonzero().flatten()
        logits = model(made.inputs[row : row + 1])[0][places] / grpo.temperature
        return logits.log_softmax(-1)[torch.arange(len(places)), made.targets[row][places]]

    texts = []
    for row in range(len(made.inputs)):
        ids = [int(token) for token in made.targets[row] if token not in (-100, BYTES.eot_id)]
        texts.append(grpo.reward("", BYTES.decode(ids), ""))
    total = torch.zeros(())
    for row in range(len(made.inputs)):
        first = row // group * group
        rewards = torch.tensor(texts[first : first + group], dtype=torch.float64)
        advantage = float((rewards[row - first] - rewards.mean()) / rewards.std(correction=0))
        new, before = log_probs(policy, row), log_probs(old, row).detach()
        loss = torch.zeros(())
        for t in range(len(new)):
            ratio = (new[t] - before[t]).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - grpo.clip, 1 + grpo.clip) * advantage)
            if reference is not None:
                below = log_probs(reference, row).detach()[t] - new[t]
                gain = gain - grpo.beta * (below.exp() - below - 1)
            loss = loss - gain
        total = total + loss / len(new)
    return total


def moved(model: GPT, size: float, seed: int = 3) -> GPT:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.mark.parametrize(("beta", "temperature", "epochs"), [(0.0, 1.0, 1), (0.5, 1.0, 1), (0.5, 0.8, 2)])
def test_loss_and_gradients_are_the_papers(sums: Path, beta: float, temperature: float, epochs: int) -> None:
    model = tiny_model(block_size=128, scale=2.0)
    reference = moved(model, 0.02, seed=9)
    grpo = objective(model, reference, grpo_beta=beta, grpo_temperature=temperature, grpo_epochs=epochs)
    (made,) = grpo.prepare(4, [a_batch(sums)]) or ()
    assert made.inputs.shape[0] == 12 and (made.old is None) == (epochs == 1) and (made.reference is None) == (not beta)
    # With a second update the policy is another than the one that sampled, and the ratio is clipped.
    policy = moved(model, 0.03 if epochs > 1 else 0.0).requires_grad_(True)
    loss, metrics = grpo.loss(policy, made)
    wanted = naive(grpo, policy, model if epochs > 1 else policy, reference if beta else None, made, 4)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-3, abs=1e-4)
    ours, theirs = (torch.autograd.grad(each, list(policy.parameters())) for each in (loss, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4 * max(float(g.abs().max()) for g in theirs))
    assert set(metrics) == set(grpo.metrics)
    assert (float(metrics["policy/clipped"]) > 0) == (epochs > 1) and (float(metrics["policy/kl"]) > 0) == (beta > 0)


def test_advantages_have_mean_0_and_spread_1_and_equal_rewards_say_nothing(sums: Path) -> None:
    model = tiny_model(block_size=128, scale=2.0)
    batch = a_batch(sums)
    (made,) = objective(model, grpo_beta=0.0).prepare(0, [batch]) or ()
    groups = made.advantages.view(3, 4)
    torch.testing.assert_close(groups.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(groups.std(1, correction=0), torch.ones(3), atol=1e-5, rtol=0)
    flat = objective(model, grpo_beta=0.0)
    flat.reward = lambda prompt, completion, reference: 0.3
    (made,) = flat.prepare(0, [batch]) or ()
    assert not made.advantages.any()
    assert made.sums["groups/without_signal"] == 12 and made.sums["reward/mean"] == pytest.approx(3.6)


def test_a_completion_depends_on_seed_step_prompt_and_its_number_alone(sums: Path) -> None:
    model = tiny_model(block_size=128, scale=2.0)
    grpo = objective(model, grpo_beta=0.0)
    batch = a_batch(sums, 4)
    halves = [
        Batch(batch.inputs[part], batch.targets[part], None, None, batch.samples[part], (batch.prompts or [])[part])
        for part in (slice(0, 2), slice(2, 4))
    ]

    def answers(step: int, batches: list[Batch]) -> list[list[int]]:
        rows = [row for made in grpo.prepare(step, batches) or () for row in made.targets.tolist()]
        return [[token for token in row if token != -100] for row in rows]

    whole = answers(5, [batch])
    assert whole == answers(5, halves) == answers(5, [batch])
    assert whole != answers(6, [batch]) and len({str(row) for row in whole}) > 8


def test_rows_hold_the_prompt_and_train_the_completion_with_its_end(sums: Path) -> None:
    grpo = objective(tiny_model(block_size=128), grpo_beta=0.0)
    prompts = (a_batch(sums).prompts or [])[:2]
    inputs, targets = grpo._rows(prompts, [[65, 66, BYTES.eot_id], [67]])
    for row, (prompt, answer) in enumerate(zip(prompts, [[65, 66, BYTES.eot_id], [67]])):
        places = (targets[row] != -100).nonzero().flatten().tolist()
        begin = len(prompt.ids) - 1
        assert places == list(range(begin, begin + len(answer))) and targets[row][places].tolist() == answer
        assert inputs[row, : begin + len(answer)].tolist() == [*prompt.ids, *answer[:-1]]


def test_evaluation_is_the_reward_of_the_likeliest_answers(sums: Path) -> None:
    grpo = objective(tiny_model(block_size=128, scale=2.0), grpo_beta=0.0)
    once, again = (grpo.evaluate([a_batch(sums)]) for _ in range(2))
    assert once == again and once is not None
    loss, count, metrics = once
    assert count == 3 and loss == -metrics["reward/mean"] and 0 < metrics["completions/length"] <= 18


# -- rewards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion", "reward"),
    [
        ("What is 17 + 25?", "42", 1.0),
        ("What is 17 + 25?", " It is 42.\n", 1.0),
        ("What is 17 + 25?", "43", FORM),
        ("What is 17 + 25?", "4 2", FORM),
        ("What is 17 + 25?", "42 apples", 0.0),
        ("What is 17 + 25?", "142", FORM),
        ("What is 17 + 25?", "", 0.0),
        ("3 - 20 =", "-17", 1.0),
        ("3 - 20 =", "17", FORM),
        ("6 × 7", "the answer: 42", 1.0),
        ("6*7", "42", 1.0),
        ("1 + 1 = 2. Now 2 + 2 =", "4", 1.0),
        ("the difference between 9 and 4", "5", 1.0),
        ("Give the Sum of 3 and 4", "7", 1.0),
        ("What is 1 + 1?", "0.2", 0.0),
        ("What is 1 + 1?", "9" * 5000, 0.0),
    ],
)
def test_arithmetic_reads_the_question_and_rates_the_last_number(prompt: str, completion: str, reward: float) -> None:
    assert arithmetic(prompt, completion) == reward


def test_rewards_of_a_file_are_called_by_name_and_must_be_numbers(tmp_path: Path) -> None:
    assert load_reward("arithmetic") is arithmetic
    letters = load_reward(LETTERS)
    assert rate(letters, LETTERS, "p", "ab1 ", "") == 0.5
    for name, message in (
        ("text", "gave 'good' for the prompt 'p', expected a number"),
        ("nothing", "gave nan for the prompt 'p', expected a number"),
        ("failing", "fails on the prompt 'p': KeyError: '!'"),
    ):
        with pytest.raises(RewardError, match=message) as error:
            rate(load_reward(f"{FUNCTIONS}:{name}"), name, "p", "c", "")
        assert "\n" not in str(error.value)
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    for name, kind, message in (
        ("sums", ValueError, "expected arithmetic, or path/to/file"),
        ("gone.py:f", FileNotFoundError, r"--reward gone\.py:f: there is no file"),
        (f"{FUNCTIONS}:absent", ValueError, "has no function 'absent'"),
        (f"{broken}:f", ValueError, "fails: ModuleNotFoundError"),
    ):
        with pytest.raises(kind, match=message):
            load_reward(name)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_the_reward_rises_and_is_logged(sums: Path, start: Path, tmp_path: Path) -> None:
    more = {"max_steps": 25, "max_lr": 3e-2, "warmup_steps": 0, "eval_interval": 12, "lr_schedule": "constant"}
    tune(sums, tmp_path, start, **{**GRPO_RUN, **more, "grpo_beta": 0.001})
    made = records(tmp_path)
    rewards = [record["reward/mean"] for record in made]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert made[0]["completions"] == 16 and made[0]["policy/kl"] == 0.0 < made[-1]["policy/kl"]
    assert made[-1]["val_reward/mean"] == -made[-1]["val_loss"] > -made[0].get("val_loss_before", 0.0)
    text = log(tmp_path)
    assert "Objective: grpo, reward" in text and "| reward/mean " in text and "Eval reward/mean:" in text


def test_a_reward_below_its_best_beside_a_falling_loss_is_no_overfitting(
    sums: Path, start: Path, tmp_path: Path
) -> None:
    with mock.patch.object(Progress, "see_validation", lambda *_: (False, True)):  # what supervised training warns of
        tune(sums, tmp_path, start, **{**GRPO_RUN, "max_steps": 2, "eval_interval": 1})
    assert "Eval reward/mean:" in log(tmp_path) and "Overfitting" not in log(tmp_path)


def test_lora_is_held_by_its_base(sums: Path, start: Path, tmp_path: Path) -> None:
    tune(sums, tmp_path, start, **{**GRPO_RUN, "finetune_method": "lora", "max_steps": 4, "max_lr": 3e-2})
    kl = [record["policy/kl"] for record in records(tmp_path)]
    assert kl[0] == 0.0 < kl[-1]
    model = apply_method(tiny_model(block_size=128), "lora", LoraSettings(rank=4))
    (made,) = objective(model).prepare(0, [a_batch(sums)]) or ()
    wanted = -tiny_model(block_size=128)(made.inputs, made.targets, reduction="none")
    torch.testing.assert_close(made.reference, wanted.detach())


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_two_processes_equal_one(kind: str, tmp_path: Path) -> None:
    more = {"max_steps": 3, "total_batch_size": 512, "weight_decay": 0.0}
    if kind == "grpo":
        more |= {"reward": LETTERS, "grpo_group": 3, "grpo_max_new_tokens": 8}
    one = finetuning(tmp_path / "one", objective=kind, **more)
    two = finetuning(tmp_path / "two", objective=kind, **more)
    assert one.live().code == 0
    lives = two.live_together(ranks=2)
    assert [life.code for life in lives] == [0, 0], lives[0].describe()
    for left, right in zip(records(one.folder), records(two.folder)):
        assert set(left) == set(right)
        for name, value in left.items():
            assert right[name] == pytest.approx(value, rel=2e-3, abs=1e-6), name
    assert len(losses(one.folder)) == 3
    first = [records(run.folder)[0] for run in (one, two)]
    if kind == "grpo":
        assert first[0]["completions/length"] == first[1]["completions/length"]


def test_a_stop_amid_completions_loses_nothing(tmp_path: Path) -> None:
    changes = {"reward": LETTERS, "grpo_group": 3, "grpo_max_new_tokens": 8, "max_steps": 4, "total_batch_size": 512}
    run = finetuning(tmp_path / "run", objective="grpo", **changes)
    stopped = run.live(Strike("step 1@1", signal=signal.SIGTERM))
    assert stopped.code == 0 and run.steps_on_disk()[-1] == 1
    assert run.live().code == 0 and len(records(run.folder)) == 4


def test_a_reward_that_fails_ends_the_run_with_the_last_step_saved(sums: Path, start: Path, tmp_path: Path) -> None:
    counter = tmp_path / "reward.py"
    counter.write_text(
        "calls = 0\n\ndef score(prompt, completion, reference):\n"
        "    global calls\n    calls += 1\n    return calls % 5 if calls < 45 else 'many'\n"
    )
    with pytest.raises(ValueError, match="gave 'many' for the prompt"):
        tune(sums, tmp_path / "run", start, **{**GRPO_RUN, "reward": f"{counter}:score", "max_steps": 4})
    assert steps_on_disk(tmp_path / "run") == [1] and status(tmp_path / "run") == "failed"
    assert "Stopped by a reward that failed after step 1; saving it." in log(tmp_path / "run")


def test_a_reward_sees_texts_without_special_tokens_and_the_records_answer(
    sums: Path, start: Path, tmp_path: Path
) -> None:
    seen = tmp_path / "seen.jsonl"
    file = tmp_path / "reward.py"
    file.write_text(
        "import json\n\ndef score(prompt, completion, reference):\n"
        f"    with open({str(seen)!r}, 'a') as out:\n"
        "        out.write(json.dumps([prompt, completion, reference]) + '\\n')\n    return 0\n"
    )
    tune(sums, tmp_path / "run", start, **{**GRPO_RUN, "reward": f"{file}:score", "max_steps": 1})
    for line in seen.read_text().splitlines():
        prompt, completion, reference = json.loads(line)
        assert prompt.startswith("### Instruction:\n") and prompt.endswith("### Response:\n")
        one, two = prompt.split("\n")[1].split(" + ")
        assert int(reference) == int(one) + int(two) and isinstance(completion, str)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grpo_group": 1}, "--grpo_group 1: expected at least 2"),
        ({"grpo_temperature": 0.0}, "--grpo_temperature 0.0: expected more than 0"),
        ({"grpo_clip": 1.0}, "--grpo_clip 1.0: expected a share"),
        ({"grpo_beta": -0.1}, "--grpo_beta -0.1: expected 0 or more"),
        ({"grpo_max_new_tokens": 128}, "--grpo_max_new_tokens 128: leaves no room for a prompt in 128 tokens"),
        ({"reward": "gone.py:f"}, "there is no file gone"),
    ],
)
def test_what_can_not_be_is_refused_in_a_line(
    changes: dict[str, Any], message: str, sums: Path, start: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        tune(sums, tmp_path, start, **{**GRPO_RUN, **changes})
    assert "\n" not in str(error.value)


def test_pairs_are_no_prompts(start: Path, tmp_path: Path) -> None:
    pairs = pair_set(tmp_path / "pairs", n_pairs=5)
    with pytest.raises(ValueError, match=r"kind preference, --objective grpo needs prompts or instruction: use .*dpo"):
        tune(pairs, tmp_path / "run", start, **GRPO_RUN)
    assert finetune_settings(pairs, tmp_path, start).objective == "sft"
