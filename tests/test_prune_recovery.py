"""What recovery tells the training loop: the guide's defaults, the data it means, the teacher it learns from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from data.shards import open_dataset
from data.tokenizer import ByteTokenizer
from formats.adapter import weights_digest
from formats.checkpoint import load_checkpoint
from pruning import recovery
from pruning.settings import PruneSettings
from tests.pruning_runs import RECOVER, prune_command, save_model, write_texts
from tests.scripts import one_line_error
from tests.tiny import text_set
from training.run_settings import FinetuneSettings
from training.settings import is_explicit, parse
from training.step_plan import check_settings, plan_steps

BYTES = ByteTokenizer()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with texts and a prepared set; caches go there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.cache.resolve_data_dir", lambda name: tmp_path / "cached" / name)
    write_texts(tmp_path)
    text_set(tmp_path / "set")
    save_model(tmp_path / "model.pt")
    return tmp_path


def told(*words: object) -> FinetuneSettings:
    settings = parse(PruneSettings, ["--base_model", "model.pt", "--save_model", "--finetune", *map(str, words)])
    payload = load_checkpoint("model.pt")
    return recovery.finetune_settings(settings, Path("model.pt"), payload, BYTES, lambda line: None)


def test_the_defaults_are_the_guides() -> None:
    tuning = told("--finetune_data", "set")
    wanted: dict[str, Any] = {
        "finetune_method": "full", "max_lr": 1e-5, "epochs": 1.0, "max_samples": 500, "batch_size": 1,
        "grad_accum_steps": 4, "max_grad_norm": 1.0, "weight_decay": 0.01, "warmup_steps": 0, "lr_schedule": "linear",
        "min_lr_ratio": 0.0, "objective": "sft", "auto_resume": True, "data_dir": "set", "block_size": 64,
    }  # fmt: skip
    assert {name: getattr(tuning, name) for name in wanted} == wanted, "512 tokens, but for the context of 64"
    assert all(is_explicit(tuning, name) for name in wanted)
    check_settings(tuning)
    plan = plan_steps(tuning, tuning.block_size, windows_per_epoch=500, world_size=1)
    assert plan.max_steps == 125 and [plan.schedule(step) for step in (0, 124)] == [1e-5, 0.0]


def test_each_flag_reaches_the_loop() -> None:
    words = (
        "--finetune_lr 3e-5 --finetune_epochs 2 --finetune_samples 7 --finetune_batch_size 3 --finetune_grad_accum 5"
    )
    more = "--finetune_max_grad_norm 0.5 --finetune_weight_decay 0.02 --finetune_warmup_steps 9 --finetune_seq_len 32"
    lora = "--finetune_method lora --lora_r 4 --lora_alpha 8 --lora_target_modules all-linear --seed 5"
    tuning = told(*words.split(), *more.split(), *lora.split(), "--finetune_data", "set")
    found = (tuning.max_lr, tuning.epochs, tuning.max_samples, tuning.batch_size, tuning.grad_accum_steps)
    assert found == (3e-5, 2.0, 7, 3, 5)
    assert (tuning.max_grad_norm, tuning.weight_decay, tuning.warmup_steps, tuning.block_size) == (0.5, 0.02, 9, 32)
    assert (tuning.finetune_method, tuning.lora_r, tuning.lora_alpha, tuning.seed) == ("lora", 4, 8.0, 5)
    check_settings(tuning)


def test_a_teacher_is_the_base_another_or_what_the_base_was_pruned_from() -> None:
    distill = ("--objective", "distill", "--finetune_data", "set")
    assert told(*distill, "--distill_hard", 0.2).teacher == "model.pt"
    assert told(*distill, "--teacher", "big.pt").teacher == "big.pt"
    settings = PruneSettings(method="none", base_model="model.pt")
    assert recovery.teacher(settings, {"pruning": {"base": {"name": "dense.pt"}}}) == "dense.pt"
    with pytest.raises(ValueError, match=r"model\.pt does not say what it was pruned from: name that with --teacher"):
        recovery.teacher(settings, {"pruning": None})


def test_a_teacher_that_was_replaced_since_is_not_learned_from(here: Path) -> None:
    digest = weights_digest(load_checkpoint("model.pt")["model"])
    pruned = {"pruning": {"base": {"name": "model.pt", "digest": digest}}}
    settings = PruneSettings(method="none", base_model="pruned.pt")
    assert recovery.teacher(settings, pruned) == "model.pt"
    save_model(here / "model.pt", seed=1)
    with pytest.raises(ValueError, match=r"model\.pt: is not the model that pruned\.pt was pruned from .* --teacher"):
        recovery.teacher(settings, pruned)
    assert recovery.teacher(dataclasses.replace(settings, teacher="model.pt"), pruned) == "model.pt"


@pytest.mark.parametrize("name", ["book.txt", "docs.jsonl"])
def test_text_becomes_a_set_once(name: str, here: Path) -> None:
    settings, said = PruneSettings(finetune_data=name), []
    folder = Path(recovery.training_data(settings, BYTES, said.append))
    assert folder.parent == here / "cached"
    tokens = open_dataset(folder, "train")
    assert tokens.meta["kind"] == "text" and tokens.tokenizer_fingerprint == BYTES.fingerprint
    before = (folder / "dataset.json").stat().st_mtime_ns
    assert recovery.training_data(settings, BYTES, said.append) == str(folder)
    assert (folder / "dataset.json").stat().st_mtime_ns == before
    (here / name).write_text((here / name).read_text() * 2)
    assert recovery.training_data(settings, BYTES, said.append) != str(folder), "other text, another set"


def test_records_and_prepared_sets_go_to_the_loop_as_they_are(here: Path) -> None:
    (here / "records.jsonl").write_text(json.dumps({"instruction": "a?", "response": "b"}) + "\n")
    for name in ("records.jsonl", "set"):
        assert recovery.training_data(PruneSettings(finetune_data=name), BYTES, print) == name
    assert not (here / "cached").exists()


def test_of_a_set_of_the_hub_enough_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("pruning.recovery.prepare_text_cache", lambda *words: asked.append(words) or Path("folder"))
    settings = PruneSettings(finetune_data="c4", finetune_samples=300)
    assert recovery.training_data(settings, BYTES, print) == "folder"
    assert asked == [("c4", (), BYTES, 1200)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--finetune_batch_size 0", "--finetune_batch_size 0: expected at least 1"),
        ("--finetune_grad_accum 0", "--finetune_grad_accum 0: expected at least 1"),
        ("--finetune_checkpoint_interval -1", "--finetune_checkpoint_interval -1: expected at least 0"),
        ("--finetune_warmup_steps -1", "--finetune_warmup_steps -1: expected at least 0"),
        ("--finetune_max_grad_norm -1", "--finetune_max_grad_norm -1.0: expected a number of at least 0"),
        ("--finetune_weight_decay nan", "--finetune_weight_decay nan: expected a number of at least 0"),
        ("--finetune_lr inf", "--finetune_lr inf: expected a number of at least 0"),
        ("--finetune_epochs 0", "--finetune_epochs 0.0: expected more than 0"),
        ("--finetune_method lora --lora_r 0", "--lora_r 0: expected at least 1"),
        ("--finetune_method lora --lora_alpha 0", "--lora_alpha 0.0: expected more than 0"),
        ("--finetune_method lora --lora_dropout 1", "--lora_dropout 1.0: expected a share from 0 to below 1"),
        ("--finetune_method lora --lora_target_modules nope", "--lora_target_modules: LoRA target 'nope' matches no"),
        ("--objective distill --distill_hard 2", "--distill_hard 2.0: expected 0 to 1"),
        ("--objective distill --distill_hidden -1", "--distill_hidden -1.0: expected a number of at least 0"),
        ("--objective distill --teacher nosuch.pt", "nosuch.pt: no such checkpoint"),
        ("--finetune_data nosuch.txt", "nosuch.txt: no such text"),
    ],
)
def test_a_mistaken_recovery_is_told_before_anything_is_pruned(words: str, says: str, here: Path, capsys: Any) -> None:
    outcome = prune_command(capsys, "--method", "magnitude", "--out", "a.pt", *RECOVER, *words.split())
    assert says in one_line_error(outcome)
    assert not (here / "a.pt").exists()


def test_a_folder_is_anothers_only_once_there_is_something_to_go_on_from(tmp_path: Path) -> None:
    recovery.claim(tmp_path, {"seed": 1})
    recovery.claim(tmp_path, {"seed": 2})
    (tmp_path / "model_00003.pt").touch()
    with pytest.raises(ValueError, match=r"holds a recovery with another seed \(2, now 3\)"):
        recovery.claim(tmp_path, {"seed": 3})
    recovery.claim(tmp_path, {"seed": 2})
