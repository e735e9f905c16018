"""Files of strangers at every door: pickles that would run something never do, names lead nowhere, secrets stay out."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.shards import open_dataset
from data.sources import record_rows
from data.tokenizer import load_tokenizer
from evaluation.prompts import read_prompts
from evaluation.texts import read_text
from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.checkpoint_command import main as checkpoint_command
from formats.open_model import load_any_tokenizer, open_model, read_config
from pruning.cache import _load as load_statistics
from report.records import read_run
from report.votes import read_votes
from tests.adapters import make_adapter
from tests.evil_pickles import EVILS, Evil
from tests.foreign_models import save_foreign
from tests.runs import tune
from tests.tiny import finetune_settings, record_set, text_set, train_settings
from tests.tiny_checkpoints import save_tiny
from training.launch import finetune, pretrain
from training.objectives.rewards import load_reward
from training.run_folder import RunFolder
from training.run_settings import FinetuneSettings
from training.settings import parse

WANTED = 30  # kinds of evil files at least


class Door:
    """Where files come in. `place` says where the file lies in a folder of good ones, `come_in` reads it there.

    text: the door takes any text, so that a pickle of printable characters is one to it, and nothing to refuse.
    """

    def __init__(self, place: str, come_in: Callable[[Path], Any], like: str = "", text: bool = False) -> None:
        self.place, self.come_in, self.like, self.text = place, come_in, like, text


def command(*words: str) -> Callable[[Path], None]:
    """`python -m formats.checkpoint`, its complaint raised as an error."""

    def come_in(file: Path) -> None:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = checkpoint_command([*words, str(file)])
        assert code, f"{words} took it: {said.getvalue()}"
        raise ValueError(said.getvalue().strip())

    return come_in


def not_the_newest(file: Path) -> None:
    said: list[str] = []
    assert RunFolder(file.parent).newest_good(said.append) is None
    raise ValueError(" ".join(said))


def tuned(**changes: Any) -> Callable[[Path], Any]:
    """finetune_dolly.py with these settings; "FILE" stands for the file."""

    def come_in(file: Path) -> Any:
        good = file.parent.parent / "good"
        given = {name: str(file) if value == "FILE" else value for name, value in changes.items()}
        data = Path(given.pop("data_dir", good / "records"))
        base = Path(given.pop("pretrained_checkpoint", good / "base.pt"))
        return finetune(finetune_settings(data, file.parent / "logs", base, block_size=64, **given))

    return come_in


def good_one(file: Path) -> Path:
    return file.parent.parent / "good" / "base.pt"


def resumed(file: Path) -> Any:
    data = file.parent.parent / "good" / "text"
    return pretrain(train_settings(data, file.parent / "logs", resume=True, checkpoint_path=str(file)))


DOORS = {
    "load_checkpoint": Door("model.pt", load_checkpoint),
    "load_checkpoint with digest": Door("model.pt", lambda file: load_checkpoint(file, require_digest=True)),
    "open_model": Door("model.pt", open_model),
    "read_config": Door("model.pt", read_config),
    "the tokenizer of a model": Door("model.pt", load_any_tokenizer),
    "GGUF": Door("model.gguf", open_model),
    "checkpoint verify": Door("model.pt", command("verify")),
    "checkpoint show": Door("model.pt", command("show")),
    "checkpoint diff": Door(
        "model.pt", lambda file: command("diff", str(file.parent.parent / "good" / "base.pt"))(file)
    ),
    "--auto_resume": Door("model_00003.pt", not_the_newest),
    "--resume": Door("model.pt", resumed),
    "--pretrained_checkpoint": Door("model.pt", tuned(pretrained_checkpoint="FILE")),
    "--adapter": Door("model.pt", tuned(finetune_method="lora", adapter="FILE")),
    "--teacher": Door("model.pt", tuned(objective="distill", teacher="FILE")),
    "--data_dir records": Door("records.jsonl", tuned(data_dir="FILE")),
    "--data_dir manifest": Door("dataset.json", lambda file: open_dataset(file.parent, "train"), "text"),
    "--data_dir shard": Door("train_000000.bin", lambda file: open_dataset(file.parent, "train"), "text"),
    "--input jsonl": Door("a.jsonl", lambda file: list(record_rows("jsonl", [str(file)]))),
    "--input parquet": Door("a.parquet", lambda file: list(record_rows("parquet", [str(file)]))),
    "--tokenizer file": Door("tokenizer.json", lambda file: load_tokenizer(str(file))),
    "--tokenizer pickle": Door("tokenizer.pkl", lambda file: load_tokenizer(str(file))),
    "--tokenizer folder": Door("tokenizer.json", lambda file: load_tokenizer(str(file.parent))),
    "pytorch_model.bin": Door("pytorch_model.bin", lambda file: open_model(file.parent), "bin"),
    "model.safetensors": Door("model.safetensors", lambda file: open_model(file.parent), "hf"),
    "config.json": Door("config.json", lambda file: open_model(file.parent), "hf"),
    "tokenizer.json": Door("tokenizer.json", lambda file: open_model(file.parent), "hf"),
    "adapter_config.json": Door("adapter_config.json", lambda file: open_model(file.parent), "peft"),
    "adapter_model.safetensors": Door("adapter_model.safetensors", lambda file: open_model(file.parent), "peft"),
    "a checkpoint of torch.distributed": Door(".metadata", lambda file: open_model(file.parent)),
    "statistics": Door("layer.safetensors", load_statistics),
    "--config": Door("run.yaml", lambda file: parse(FinetuneSettings, ["--config", str(file)]), text=True),
    "prompts": Door("prompts.jsonl", lambda file: read_prompts(str(file))),
    "prompts as text": Door("prompts.txt", lambda file: read_prompts(str(file)), text=True),
    "--input text": Door("text.txt", lambda file: read_text(str(file)), text=True),
    "metrics": Door("metrics.jsonl", lambda file: read_run(file.parent)),
    "votes": Door("votes.json", read_votes),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `good` with a file of every kind that is as it should be."""
    folder = tmp_path_factory.mktemp("security") / "good"
    save_tiny(folder / "base.pt", template="dolly")
    record_set(folder / "records", 12)
    text_set(folder / "text", 12)
    save_foreign("smollm2", folder / "hf")
    shutil.copytree(folder / "hf", folder / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "peft").mkdir()
    peft = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(folder / "base.pt")}
    (folder / "peft" / "adapter_config.json").write_text(json.dumps(peft))
    make_adapter(folder / "base.pt", folder / "adapter.pt")
    return folder


def put(evil: Evil, door: Door, good: Path, canary: Path) -> Path:
    """The file where the door looks for it, good ones beside it."""
    home = good.parent / "home"
    shutil.rmtree(home, ignore_errors=True)
    if door.like:
        shutil.copytree(good / door.like, home)
    home.mkdir(exist_ok=True)
    return evil.write(home / door.place, canary)


def test_the_files_do_harm_to_who_reads_them_naively(tmp_path: Path) -> None:
    for number, evil in enumerate(EVILS):
        canary = tmp_path / f"canary of {number}"
        file = evil.write(tmp_path / str(number), canary)
        with contextlib.suppress(Exception):
            evil.naive(file)
        assert canary.exists(), f"{evil.name} does nothing"
    assert len(EVILS) >= WANTED


@pytest.mark.parametrize("evil", EVILS, ids=lambda evil: evil.name)
def test_an_evil_pickle_runs_at_no_door(evil: Evil, good: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name, door in DOORS.items():
        file = put(evil, door, good, canary)
        try:
            door.come_in(file)
        except ValueError as error:
            told = str(error)
            where = file.parent if file.name == ".metadata" else file
            assert str(where) in told and "\n" not in told and told.isprintable(), f"{name}: {told}"
        else:
            assert door.text, f"{name} took it"
        assert not canary.exists(), f"{name} ran it"


def test_the_doors_take_what_is_good(good: Path) -> None:
    """Else they might refuse whatever comes."""
    for read in (load_checkpoint, open_model, read_config, load_any_tokenizer):
        read(good / "base.pt")
    for door in DOORS.values():
        if door.like in ("text", "hf"):
            shutil.copytree(good / door.like, good.parent / "home", dirs_exist_ok=True)
            door.come_in(good.parent / "home" / door.place)
    assert open_model(good / "adapter.pt").parameters
    assert tuned(pretrained_checkpoint="FILE", max_steps=1)(good / "base.pt")["finished"]


def test_no_checkpoint_has_a_program_run(good: Path, tmp_path: Path) -> None:
    """A reward is a function in a file of the user's. A run that goes on takes its settings from a checkpoint."""
    canary, program = tmp_path / "canary", tmp_path / "reward.py"
    program.write_text(f"open({str(canary)!r}, 'w')\ndef rate(*_): return 1.0\n")
    tune(good / "records", tmp_path / "run", good / "base.pt", max_steps=1, block_size=64)
    payload = load_checkpoint(tmp_path / "run" / "model_00000.pt")
    payload["settings"] |= {"objective": "grpo", "reward": f"{program}:rate"}
    evil = tmp_path / "evil" / "model_00000.pt"
    save_checkpoint(evil, payload)
    for way in ({"resume": True, "checkpoint_path": str(evil)}, {"auto_resume": True}):
        settings = finetune_settings(good / "records", evil.parent, good / "base.pt", max_steps=2, **way)
        with pytest.raises(ValueError, match=r"--reward .*reward.py:rate, which runs a program: give --reward again"):
            finetune(settings)
    assert not canary.exists()
    load_reward(f"{program}:rate")
    assert canary.exists()  # it does run where the user asks for it
