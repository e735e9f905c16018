"""What a run refuses before its first step: data, model and settings that do not fit, with both sides shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from data.prepare import prepare
from data.settings import PrepareSettings
from formats.checkpoint import load_checkpoint, save_checkpoint
from tests.runs import BARE, log, spied_batches, status, train, tune
from tests.tiny import record_set, text_set


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_set(tmp_path_factory.mktemp("data") / "records")


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretraining to resume from and to tune; nothing may write into it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(text, folder, checkpoint_interval=3, eval_interval=0, generate_interval=0)
    return folder


@pytest.fixture(scope="module")
def tuned(run: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    tune(instructions, folder, run / "model_00007.pt", **{**BARE, "checkpoint_interval": 2})
    return folder


@pytest.fixture(scope="module")
def bpe_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of text under another tokenizer."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "a.txt").write_text("the quick brown fox jumps over a lazy dog. " * 60)
    data_dir = folder / "set"
    options: dict[str, Any] = {"source": "text", "input": (str(folder / "a.txt"),), "data_dir": str(data_dir)}
    prepare(PrepareSettings(**options, tokenizer="bpe", vocab_size=280, val_fraction=0.0, workers=1))
    return data_dir


# -- model and data ----------------------------------------------------------------------------------------------------


def test_a_data_set_of_another_tokenizer_shows_both_sides(bpe_text: Path, run: Path, tmp_path: Path) -> None:
    model = run / "model_00007.pt"
    with pytest.raises(ValueError) as caught:
        tune(bpe_text, tmp_path, model)
    said = str(caught.value)
    assert f"{bpe_text} was tokenized with bpe" in said and f"{model} speaks byte (257 ids, " in said
    assert f"--tokenizer {model}" in said and "\n" not in said
    with pytest.raises(ValueError, match="was tokenized with bpe"):
        train(bpe_text, tmp_path, resume=True, checkpoint_path=str(model))


def test_pretraining_takes_its_tokenizer_from_the_data(bpe_text: Path, tmp_path: Path) -> None:
    train(bpe_text, tmp_path, max_steps=2, block_size=32, total_batch_size=128, **BARE)
    payload = load_checkpoint(tmp_path / "model_00001.pt")
    assert payload["tokenizer"]["kind"] == "bpe" and payload["config"]["vocab_size"] <= 280
    assert payload["config"]["padded_vocab_size"] % 64 == 0


def test_a_model_of_another_vocabulary_shows_both_sides(instructions: Path, run: Path, tmp_path: Path) -> None:
    payload = load_checkpoint(run / "model_00007.pt")
    payload["config"] = {**payload["config"], "vocab_size": 250}
    save_checkpoint(tmp_path / "other.pt", payload)
    with pytest.raises(ValueError, match=r"other\.pt has a vocabulary of 250, the data set .* one of 257"):
        tune(instructions, tmp_path / "run", tmp_path / "other.pt")


def test_a_context_longer_than_the_models(instructions: Path, run: Path, tmp_path: Path) -> None:
    model = run / "model_00007.pt"
    with pytest.raises(ValueError, match="--block_size 256: the model's context is 128 tokens"):
        tune(instructions, tmp_path, model, block_size=256)
    with spied_batches() as batches:  # 1024 is the default: it gives way, and says so
        tune(instructions, tmp_path, model, block_size=1024, **{**BARE, "max_steps": 1})
    assert "block_size 128: the model's context" in log(tmp_path) and batches[0].inputs.shape == (1, 128)
    with spied_batches() as batches:  # shorter is fine
        tune(instructions, tmp_path, model, block_size=64, **{**BARE, "max_steps": 1})
    assert batches[0].inputs.shape == (1, 64)


def test_damaged_data_is_found_before_the_first_step(text: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "data"
    shutil.copytree(text, folder)
    shard = sorted(folder.glob("train*"))[0]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=shard.name):
        train(folder, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"preset": "tiny"}, "holds another network than --preset tiny asks for: .*n_layer 2 -> "),
        ({"block_size": 64, "total_batch_size": 256}, "block_size 128 -> 64"),
        ({"max_samples": 20}, "max_samples was None and is 20 now"),
        ({"seed": 4}, "seed was 1337 and is 4 now"),
    ],
)
def test_a_resumed_pretraining_keeps_its_network_and_its_data(
    changes: dict[str, Any], says: str, text: Path, run: Path, tmp_path: Path
) -> None:
    resume = {"resume": True, "checkpoint_path": str(run / "model_00003.pt")}
    with pytest.raises(ValueError, match=says) as caught:
        train(text, tmp_path, **resume, **changes)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("model_*")), "refused before anything is written"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"packing": False}, "packing was True and is False now"),
        ({"block_size": 64}, "block_size was 128 and is 64 now"),
        ({"max_samples": 5}, "max_samples was None and is 5 now"),
    ],
)
def test_a_resumed_fine_tuning_keeps_its_windows(
    changes: dict[str, Any], says: str, instructions: Path, tuned: Path, tmp_path: Path
) -> None:
    resume = {"resume": True, "checkpoint_path": str(tuned / "model_00002.pt")}
    with pytest.raises(ValueError, match=says):
        tune(instructions, tmp_path, tuned / "unused.pt", **resume, **changes)


def test_a_resumed_run_keeps_its_data_set(text: Path, run: Path, tmp_path: Path) -> None:
    other = text_set(tmp_path / "other", seed=9)
    resume = {"resume": True, "checkpoint_path": str(run / "model_00003.pt")}
    with pytest.raises(ValueError, match=r"data was [0-9a-f]+ and is [0-9a-f]+ now"):
        train(other, tmp_path / "run", **resume)
    (tmp_path / "moved").mkdir()
    moved = text.rename(tmp_path / "moved" / "text")  # the same content elsewhere is the same data
    try:
        assert train(moved, tmp_path / "run", **resume, **BARE)["finished"]
    finally:
        moved.rename(text)


def test_a_checkpoint_that_lacks_what_resume_needs_is_no_traceback(text: Path, run: Path, tmp_path: Path) -> None:
    """A file with the right digest may still be from an older or another program."""
    good = load_checkpoint(run / "model_00003.pt")
    wrong: dict[str, Any] = {
        "progress": {"step": 3, "unknown": 1},
        "train_loader_state": {},
        "rng": [{"torch": None}],
        "optimizer": {"adamw": {}},
        "tokenizer": {"kind": "abacus"},
        "template": {"name": "unknown"},
        "config": {**good["config"], "n_layr": 3},
    }
    for key, value in wrong.items():
        save_checkpoint(tmp_path / "odd.pt", {**good, key: value})
        with pytest.raises(ValueError) as caught:
            train(text, tmp_path / "run", resume=True, checkpoint_path=str(tmp_path / "odd.pt"))
        assert "\n" not in str(caught.value), key


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"preset": "tinny"}, "tinny.*tiny"),
        ({"total_batch_size": 500}, "--total_batch_size 500: not a multiple of batch_size 2 x block_size 128 x 1"),
        ({"batch_size": 0}, "--batch_size 0: expected at least 1"),
        ({"block_size": 0}, "--block_size 0: expected at least 1"),
        ({"max_samples": 0}, "--max_samples 0: expected at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"device": "cuda:7"}, "--device cuda:7"),
        ({"max_lr": -1.0}, "--max_lr"),
        ({"epochs": 1.0}, "--epochs and --max_steps are both set"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], says: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        train(text, tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_refused_start_leaves_an_earlier_run_as_it_was(text: Path, tmp_path: Path) -> None:
    train(text, tmp_path, **BARE)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(ValueError):
        train(text, tmp_path, total_batch_size=500)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    assert status(tmp_path) == "finished"


def test_a_run_in_use_is_left_alone(text: Path, tmp_path: Path) -> None:
    from training.run_folder import RunFolder

    other = RunFolder(tmp_path)
    other.open()
    with pytest.raises(ValueError, match="another run is writing here"):
        train(text, tmp_path)
    other.close()
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


# -- a file of records in place of a folder ----------------------------------------------------------------------------


def write_records(file: Path, count: int) -> None:
    lines = [{"instruction": f"Say {n}", "context": "", "response": f"{n}!", "category": "qa"} for n in range(count)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_jsonl_of_records_is_prepared_once_with_the_models_tokenizer(run: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "mine.jsonl", 40)
    model = run / "model_00007.pt"
    with mock.patch("data.cache.resolve_data_dir", lambda name: tmp_path / "cache" / name):
        tune(tmp_path / "mine.jsonl", tmp_path / "a", model, prompt_template="alpaca", **BARE)
        (cache,) = (tmp_path / "cache").iterdir()
        changed = (cache / "dataset.json").stat().st_mtime_ns
        tune(tmp_path / "mine.jsonl", tmp_path / "b", model, prompt_template="alpaca", **BARE)
        assert (
            list((tmp_path / "cache").iterdir()) == [cache] and (cache / "dataset.json").stat().st_mtime_ns == changed
        )
        write_records(tmp_path / "mine.jsonl", 41)
        tune(tmp_path / "mine.jsonl", tmp_path / "c", model, prompt_template="alpaca", **BARE)
        assert len(list((tmp_path / "cache").iterdir())) == 2, "other content is another set"
    payload = load_checkpoint(tmp_path / "a" / "model_00005.pt")
    assert payload["template"]["name"] == "alpaca" and payload["tokenizer"]["kind"] == "byte"


def test_a_jsonl_that_is_not_there_or_broken(run: Path, tmp_path: Path) -> None:
    model = run / "model_00007.pt"
    with mock.patch("data.cache.resolve_data_dir", lambda name: tmp_path / "cache" / name):
        with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: no such file of records"):
            tune(tmp_path / "gone.jsonl", tmp_path / "run", model)
        write_records(tmp_path / "bad.jsonl", 3)
        with open(tmp_path / "bad.jsonl", "a") as file:
            file.write('{"instruction": "no answer"}\n')
        with pytest.raises(ValueError, match=r"bad\.jsonl.*4"):
            tune(tmp_path / "bad.jsonl", tmp_path / "run", model)
        assert not list((tmp_path / "cache").glob("*/dataset.json"))


# -- Weights & Biases --------------------------------------------------------------------------------------------------


def test_wandb_without_a_key_is_refused_before_the_first_step(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ValueError, match="--wandb: no API key: set WANDB_API_KEY"):
        train(text, tmp_path / "run", wandb=True)
    assert status(tmp_path / "run") == "failed" and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_wandb_offline_needs_no_account(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert train(text, tmp_path / "run", wandb=True, **BARE)["finished"]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert load_checkpoint(tmp_path / "run" / "model_00007.pt")["progress"]["wandb_id"]
