"""The one door: a network as it was saved, or what does not fit, with both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.gguf_write import write_gguf
from formats.open_model import build_model, check_exists, is_hub_name, load_any_tokenizer, load_payload, open_model
from tests.adapters import make_adapter
from tests.foreign_models import random_ids, save_foreign
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


def test_one_door_for_every_kind_of_model(tmp_path: Path) -> None:
    theirs, ids = save_foreign("llama3", tmp_path / "folder"), random_ids()
    payload = load_payload(tmp_path / "folder")
    save_checkpoint(tmp_path / "m.pt", {key: value for key, value in payload.items() if key != "in_memory"})
    write_gguf(payload, tmp_path / "m.gguf", "f32")
    (tmp_path / "renamed.bin").write_bytes((tmp_path / "m.gguf").read_bytes())
    adapter = make_adapter(tmp_path / "m.pt", tmp_path / "adapters" / "lora.pt")
    with torch.inference_mode():
        expected = theirs(ids).logits
        for name in ("folder", "m.pt", "m.gguf", "renamed.bin"):
            opened = open_model(tmp_path / name)
            logits = opened.model(ids)[..., : expected.size(-1)]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            assert opened.parameters == opened.model.num_params()
            assert load_any_tokenizer(tmp_path / name).fingerprint == opened.tokenizer.fingerprint
        apart = open_model(adapter)
        assert not torch.allclose(apart.model(ids)[..., : expected.size(-1)], expected, atol=1e-2)
    assert apart.parameters > opened.parameters and apart.tokenizer.fingerprint == opened.tokenizer.fingerprint


def test_an_adapter_finds_its_base_where_both_were_moved_or_is_told(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    adapter = make_adapter(save_tiny(tmp_path / "here" / "base.pt"), tmp_path / "here" / "runs" / "a.pt")
    expected = open_model(adapter).model.state_dict()
    (tmp_path / "here").rename(tmp_path / "there")
    moved = tmp_path / "there" / "runs" / "a.pt"
    assert same(dict(open_model(moved).model.state_dict()), dict(expected))
    (tmp_path / "there" / "base.pt").rename(tmp_path / "elsewhere.pt")
    with pytest.raises(FileNotFoundError, match=r"a\.pt: its base is not at .*base\.pt.*: name it with --base_model"):
        open_model(moved)
    found = open_model(moved, base_model=tmp_path / "elsewhere.pt")
    assert same(dict(found.model.state_dict()), dict(expected))
    other = save_tiny(tmp_path / "other.pt", seed=9)
    with pytest.raises(
        ValueError, match=r"trained on a base whose weights have the digest \w{12}, those of .*other\.pt"
    ):
        open_model(moved, base_model=other)
    with pytest.raises(ValueError, match=r"a\.pt: is an adapter itself, .* needs a whole model"):
        open_model(moved, base_model=moved)


def test_an_adapter_that_does_not_fit_is_told(tmp_path: Path) -> None:
    adapter = make_adapter(save_tiny(tmp_path / "base.pt"), tmp_path / "a.pt")
    payload = load_checkpoint(adapter)
    name, tensor = next(iter(payload["model"].items()))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": {}}, "the adapter lacks"),
        ({"model": {**payload["model"], name: tensor[:1]}}, r"the adapter's .* is \(1, 32\), the model's \(4, 32\)"),
        ({"adapter": {**payload["adapter"], "method": "lara"}}, "lara.*did you mean 'lora'"),
        ({"adapter": {**payload["adapter"], "settings": {"rank": 0}}}, "LoRA rank is 0"),
        ({"adapter": {**payload["adapter"], "settings": {"runk": 4}}}, "unknown lora setting 'runk'.*rank"),
        ({"base": {"digest": "x"}}, "is an adapter that does not name its base"),
    ]
    for change, says in cases:
        save_checkpoint(adapter, {**payload, **change})
        with pytest.raises(ValueError, match=rf"a\.pt: .*{says}"):
            open_model(adapter)


@pytest.mark.parametrize(
    ("ref", "is_one"),
    [
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("owner/name@v1.0", True),
        ("owner/name:sub/file.Q4_0.gguf", True),
        ("logs/model_00009.pt", False),
        ("models/weights.safetensors", False),
        ("./owner/name", False),
        ("../owner", False),
        ("data/nowhere", False),  # the folder `data` is here: a mistyped path, not a repository
        ("name", False),
        ("a/b/c", False),
        ("/absolute/name", False),
    ],
)
def test_what_may_be_a_name_on_the_hub(ref: str, is_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    assert is_hub_name(ref) == is_one
    if not is_one:
        with pytest.raises(FileNotFoundError, match="no such checkpoint; expected a checkpoint"):
            check_exists(ref)


def test_building_a_foreign_model_copies_nothing_and_a_checkpoint_everything(tmp_path: Path) -> None:
    save_foreign("smollm2", tmp_path / "folder")
    foreign = load_payload(tmp_path / "folder")
    model = build_model(foreign, "folder")
    assert all(p.data_ptr() == foreign["model"][name].data_ptr() for name, p in model.named_parameters())
    mapped = load_checkpoint(save_tiny(tmp_path / "m.pt"))
    model = build_model(mapped, "m.pt")
    assert not {p.data_ptr() for p in model.parameters()} & {t.data_ptr() for t in mapped["model"].values()}
