"""Prefixes in PEFT's format, against the peft library: the same logits, though its texts stand behind the prefix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.checkpoint import load_checkpoint
from formats.errors import FormatError
from formats.open_model import load_payload, load_tokenizer_and_template, open_model
from formats.peft import read_peft, write_peft
from model.generate import generate
from model.prompt_methods import PrefixSettings, PTuningSettings
from tests.adapters import make_adapter
from tests.foreign_models import random_ids, save_foreign
from tests.test_formats_peft import peft_logits

PLACED = PrefixSettings(length=5, hidden=16, takes_positions=True)
# Family of the base, our settings: rotary networks with grouped heads and every kind of angles, and learned positions.
OUT: dict[str, tuple[str, PrefixSettings]] = {
    "llama-gqa": ("smollm2", PrefixSettings(length=5, hidden=16)),
    "llama3-scaled": ("llama3", PrefixSettings(length=3, hidden=0)),
    "linear-scaled": ("llama-linear", PrefixSettings(length=4, hidden=8)),
    "qwen3-own-head-dim": ("qwen3", PrefixSettings(length=6, hidden=8)),
    "llama-placed": ("smollm2", PLACED),
    "gpt2-placed": ("gpt2", PLACED),
}


@pytest.mark.parametrize("case", OUT)
@torch.inference_mode()
def test_peft_loads_the_prefix_that_we_write_and_we_load_it_again(case: str, tmp_path: Path) -> None:
    family, settings = OUT[case]
    theirs, ids = save_foreign(family, tmp_path / "base"), random_ids()
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter.pt", "prefix", settings)
    assert write_peft(load_checkpoint(adapter), tmp_path / "peft")["largest_difference"] == 0
    ours = open_model(adapter).model(ids)
    plain = open_model(tmp_path / "base").model(ids)
    back = open_model(tmp_path / "peft", base_model=tmp_path / "base").model(ids)
    torch.testing.assert_close(back, ours, atol=1e-4, rtol=1e-4)
    expected = peft_logits(theirs, tmp_path / "peft", ids)
    torch.testing.assert_close(ours[..., : expected.size(-1)], expected, atol=1e-4, rtol=1e-4)
    assert (ours - plain)[..., : expected.size(-1)].abs().max() > 1e-2, "a prefix that does nothing shows nothing"


@pytest.mark.parametrize(("family", "projection"), [("smollm2", False), ("smollm2", True), ("gpt2", True)])
def test_we_load_the_prefix_that_peft_writes_and_generate_as_it_does(
    family: str, projection: bool, tmp_path: Path
) -> None:
    """With the network that re-parametrises it too: PEFT saves what that makes."""
    from peft import PrefixTuningConfig, get_peft_model

    theirs, ids = save_foreign(family, tmp_path / "base"), random_ids(batch_size=1, length=9)
    torch.manual_seed(0)
    config = PrefixTuningConfig(
        num_virtual_tokens=7, prefix_projection=projection, encoder_hidden_size=12, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for parameter in adapted.prompt_encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(str(tmp_path / "peft"))
    with torch.inference_mode():
        expected = adapted(ids).logits
        model = open_model(tmp_path / "peft", base_model=tmp_path / "base").model
        assert model.context_length == 64 - 7
        torch.testing.assert_close(model(ids)[..., : expected.size(-1)], expected, atol=1e-4, rtol=1e-4)
        greedy = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        (answer,) = generate(model, [ids[0].tolist()], max_new_tokens=8, temperature=0.0)
    assert greedy[0, -8:].tolist() == list(answer)[-8:]


def test_learned_positions_cannot_be_shifted(tmp_path: Path) -> None:
    save_foreign("gpt2", tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "a.pt", "prefix", PrefixSettings(length=3, hidden=0))
    with pytest.raises(ValueError, match=r"begins at position 3.* train it with --prefix_takes_positions"):
        write_peft(load_checkpoint(adapter), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    other = make_adapter(tmp_path / "base", tmp_path / "b.pt", "p_tuning", PTuningSettings(length=3))
    with pytest.raises(ValueError, match="an adapter of p_tuning cannot be written for PEFT"):
        write_peft(load_checkpoint(other), tmp_path / "peft")


def test_a_prefix_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_foreign("smollm2", tmp_path / "base")
    base = load_payload(tmp_path / "base")
    write_peft(load_checkpoint(make_adapter(tmp_path / "base", tmp_path / "a.pt", "prefix", PLACED)), tmp_path / "peft")
    config_file, weights_file = (
        tmp_path / "peft" / name for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    config, weights = json.loads(config_file.read_text()), load_file(weights_file)
    (made,) = weights.values()
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"num_virtual_tokens": 4}, weights, r"prompt_embeddings is \(5, 96\), expected num_virtual_tokens \(4\)"),
        ({"num_virtual_tokens": "5"}, weights, "num_virtual_tokens"),
        ({"modules_to_save": ["lm_head"]}, weights, "modules_to_save"),
        ({}, {"prompt_embeddings": made[:, :-1].clone()}, "3 layers x 2 x 2 heads x 8"),
        ({}, {"prompt_embeddings": made.flatten()}, "expected num_virtual_tokens"),
        ({}, {"prefix": made}, "holds prefix, which the base has no place for"),
        ({}, {**weights, "more": made.clone()}, "holds more"),
        ({"peft_type": "LORA"}, weights, "adapter_config.json: r is None"),
    ]
    for settings, tensors, says in cases:
        config_file.write_text(json.dumps({**config, **settings}))
        save_file(tensors, weights_file)
        with pytest.raises(FormatError, match=says):
            read_peft(tmp_path / "peft", base["config"])


def test_a_folder_speaks_as_its_base_without_reading_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_foreign("smollm2", tmp_path / "base")
    write_peft(load_checkpoint(make_adapter(tmp_path / "base", tmp_path / "a.pt", "prefix", PLACED)), tmp_path / "peft")
    expected = load_payload(tmp_path / "base")["tokenizer"]
    monkeypatch.setattr("formats.hf_read.read_huggingface", None)
    tokenizer, template = load_tokenizer_and_template(tmp_path / "peft")
    assert tokenizer.spec() == expected and template is not None
    config_file = tmp_path / "peft" / "adapter_config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "base_model_name_or_path": ""}))
    with pytest.raises(ValueError, match="names no base: add --base_model"):
        load_tokenizer_and_template(tmp_path / "peft")
