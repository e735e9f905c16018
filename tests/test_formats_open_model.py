"""The one door: a network as it was saved, or what does not fit, with both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.open_model import build_model, open_model
from tests.full_checkpoints import same
from tests.tiny_checkpoints import save_tiny, tiny_model


def test_a_model_that_does_not_fit_its_config_shows_both_sides(tmp_path: Path) -> None:
    model = tiny_model()
    payload: dict[str, Any] = {"model": model.state_dict(), "config": model.config.to_dict()}
    name = "h.0.attn.q_proj.weight"
    build_model(payload, "m.pt")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"config": {**payload["config"], "n_layer": 3}}, r"m\.pt: lacks the weight h\.2\."),
        ({"config": {**payload["config"], "n_layer": 1}}, r"m\.pt: has the weight h\.1\."),
        ({"config": {**payload["config"], "n_embd": 16}}, r"has shape \(\d+, 32\), the network has \(\d+, 16\)"),
        ({"config": {**payload["config"], "n_layr": 3}}, r"m\.pt: its config .*n_layr"),
        ({"config": {}}, r"m\.pt: its config .*lacks"),
        ({"config": {**payload["config"], "n_layer": "2"}}, r"m\.pt: its config"),
        ({"model": {k: v for k, v in payload["model"].items() if k != name}}, rf"m\.pt: lacks the weight {name}"),
    ]
    for change, says in cases:
        with pytest.raises(ValueError, match=says):
            build_model({**payload, **change}, "m.pt")


def test_open_model_gives_back_what_was_saved(tmp_path: Path) -> None:
    opened = open_model(save_tiny(tmp_path / "m.pt", seed=4, template="dolly"))
    assert (opened.step, opened.val_loss) == (7, 4.5)
    assert opened.template is not None and opened.template.name == "dolly"
    assert opened.tokenizer.decode(opened.tokenizer.encode("tree")) == "tree"
    assert not opened.model.training
    assert same(dict(opened.model.state_dict()), dict(tiny_model(4).state_dict()))
    payload = load_checkpoint(tmp_path / "m.pt")
    del payload["tokenizer"]
    save_checkpoint(tmp_path / "m.pt", payload)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        open_model(tmp_path / "m.pt")
