"""finetune_dolly.py given a file of records: which shapes it takes, in whose prompt format, and what is learnt."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from data.manifest import read_manifest
from data.shards import open_dataset
from formats.checkpoint import load_checkpoint
from tests.runs import BARE, tune
from tests.tiny import BYTES
from tests.tiny_checkpoints import save_tiny

CHATS = [
    {"messages": [{"role": role, "content": f"{role} says {number}"} for role in ("user", "assistant") * 2]}
    for number in range(40)
]


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the prepared sets go, in place of the checkout's data/."""
    monkeypatch.setattr("data.cache.resolve_data_dir", lambda name: tmp_path / "sets" / name)
    return tmp_path / "sets"


def records(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path: Path, file: Path, template: str | None = "human_assistant", **changes: Any) -> dict[str, Any]:
    base = save_tiny(tmp_path / "base.pt", template=template, block_size=256)
    sizes = {"max_steps": 2, "block_size": 256, "batch_size": 2, "total_batch_size": 512}
    return tune(file, tmp_path / "run", base, **{**BARE, **sizes, **changes})


def learnt(folder: Path) -> list[str]:
    """The supervised text of each document of the one prepared set."""
    train = open_dataset(folder, "train")
    spans = itertools.pairwise(train.document_starts.tolist())
    return [BYTES.decode(train.tokens(a, b)[train.mask(a, b) > 0]) for a, b in spans]


def test_conversations_in_the_models_own_template(tmp_path: Path, sets: Path) -> None:
    run(tmp_path, records(tmp_path / "chats.jsonl", CHATS), prompt_template="model", system="Be brief.")
    (folder,) = sets.iterdir()
    assert read_manifest(folder)["template"]["name"] == "human_assistant"
    assert load_checkpoint(tmp_path / "run" / "model_00001.pt")["template"]["name"] == "human_assistant"
    assert all(text.count("assistant says") == 2 and "user says" not in text for text in learnt(folder))


def test_the_last_answer_only(tmp_path: Path, sets: Path) -> None:
    run(tmp_path, records(tmp_path / "chats.jsonl", CHATS), train_on="last")
    (folder,) = sets.iterdir()
    assert all(text.count("assistant says") == 1 for text in learnt(folder))


def test_pairs_are_for_dpo_and_damaged_records_can_be_left_out(tmp_path: Path, sets: Path) -> None:
    pairs = [{"prompt": f"Count {n}.", "chosen": f"one {n}", "rejected": f"zero {n}"} for n in range(30)]
    file = records(tmp_path / "pairs.jsonl", pairs)
    done = run(tmp_path, file, objective="dpo", finetune_method="lora", lora_r=2, dropout=0.1)
    assert done["val_loss_before"] == pytest.approx(math.log(2)), "policy and reference are one, without dropout"
    with pytest.raises(ValueError, match="dpo"):
        run(tmp_path, file)
    bad = [*CHATS, {"messages": [{"role": "assistant", "content": "I begin."}]}]
    file = records(tmp_path / "bad.jsonl", bad)
    with pytest.raises(ValueError, match=r"bad\.jsonl:41"):
        run(tmp_path, file)
    assert run(tmp_path, file, bad_records="skip")["finished"]


def test_a_model_without_a_template_cannot_lend_one(tmp_path: Path, sets: Path) -> None:
    with pytest.raises(ValueError, match=r"--prompt_template model: .*base\.pt holds no template"):
        run(tmp_path, records(tmp_path / "chats.jsonl", CHATS), template=None, prompt_template="model")
