"""Checkpoints of every format that there was, as tests/fixtures keeps them: they open, go on and answer for ever."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from formats.checkpoint import FORMAT, has_digest, is_full, load_checkpoint, save_checkpoint
from formats.open_model import open_model
from model.generate import generate
from tests.checkpoint_fixtures import LORA, RUN, know_the_preset
from tests.runs import log, losses, spied_batches, steps_on_disk, train, tune

FIXTURES = Path(__file__).with_name("fixtures")
FORMATS = sorted(FIXTURES.glob("format-*"))
FILES = ("full/model_00002.pt", "weights.pt", "adapter/model_00002.pt", "masked.pt", "compact.pt")
TODAY = {name: value for name, value in RUN.items() if name != "nan_policy"}  # what a command line says now
# Numbers in the weights, and the sum of their absolute values, as they were when the file was written.
SUMS = {
    "format-1": {
        "full/model_00002.pt": (4800, 133.07797684858807),
        "weights.pt": (4800, 134.56247978336398),
        "adapter/model_00002.pt": (128, 12.369293919531628),
    }
}


@pytest.fixture(params=FORMATS, ids=lambda folder: folder.name)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the fixtures of one format, for runs to write in."""
    return Path(shutil.copytree(request.param, tmp_path / request.param.name))


def test_there_are_fixtures_of_today_and_all_are_small() -> None:
    assert [folder.name for folder in FORMATS] == [f"format-{number}" for number in range(1, FORMAT + 1)]
    for folder in FORMATS:
        assert all((folder / name).stat().st_size <= 200_000 for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_it_opens_and_answers(name: str, old: Path) -> None:
    payload = load_checkpoint(old / name, require_digest=True)
    assert f"format-{payload['format']}" == old.name and has_digest(old / name)
    assert is_full(payload) == name.endswith("00002.pt")
    opened = open_model(old / name)
    assert len(opened.model.masks) == (12 if name in ("masked.pt", "compact.pt") else 0)
    prompt = opened.tokenizer.encode("the quick")
    with torch.no_grad():
        (answer,) = generate(opened.model.eval(), [prompt], max_new_tokens=4, temperature=0.0)
    assert len(answer) == 4 and all(0 <= token < 257 for token in answer)


def test_what_is_in_it_is_what_was_written(old: Path) -> None:
    """Sums over the weights as they were then: they would tell another order of bytes, or another name."""
    for name, (count, total) in SUMS[old.name].items():
        weights = load_checkpoint(old / name)["model"]
        assert sum(w.numel() for w in weights.values()) == count
        assert sum(float(w.double().abs().sum()) for w in weights.values()) == pytest.approx(total, rel=1e-6)
    masked, compact = (load_checkpoint(old / name)["model"] for name in ("masked.pt", "compact.pt"))
    for name, weight in masked.items():
        torch.testing.assert_close(compact[name], weight, rtol=1e-3, atol=1e-6)


def test_a_pretraining_goes_on_from_it(old: Path) -> None:
    know_the_preset()
    with spied_batches() as batches:
        more = {**TODAY, "max_steps": 5, "auto_resume": True}
        summary = train(old / "sets" / "text", old / "full", **more, preset="fixture")
    assert (
        summary["finished"]
        and RUN["nan_policy"] == "skip"
        and steps_on_disk(old / "full") == [2, 4]
        and len(losses(old / "full")) == 2
    )
    assert batches[0].samples == [12, 13], "where it stopped"
    payload = load_checkpoint(old / "full" / "model_00004.pt")
    assert payload["format"] == FORMAT and "on_nonfinite" not in payload["settings"]
    assert payload["settings"]["nan_policy"] == "skip", "what the run was told when the setting had another name"


def test_a_fine_tuning_goes_on_from_it(old: Path) -> None:
    more = {**TODAY, **LORA, "max_steps": 5, "auto_resume": True}
    summary = tune(old / "sets" / "records", old / "adapter", old / "weights.pt", **more)
    assert summary["finished"] and steps_on_disk(old / "adapter") == [2, 4]
    assert "Resuming from" in log(old / "adapter")
    opened = open_model(old / "adapter" / "model_00004.pt")
    assert opened.model.config.n_layer == 2


def test_what_is_newer_than_this_program_is_refused_clearly(old: Path, tmp_path: Path) -> None:
    payload = load_checkpoint(old / "full" / "model_00002.pt")
    newer = tmp_path / "newer.pt"
    save_checkpoint(newer, {**payload, "format": FORMAT + 1})
    with pytest.raises(
        ValueError, match=rf"newer\.pt: has format {FORMAT + 1}, this version reads up to {FORMAT}: upd"
    ):
        load_checkpoint(newer)
    with pytest.raises(ValueError, match="update the project"):
        open_model(newer)
    (old / "full" / "model_00002.pt").write_bytes(newer.read_bytes())
    with pytest.raises(ValueError, match="no usable checkpoint"):
        train(old / "sets" / "text", old / "full", **RUN, preset=know_the_preset(), resume=True)
