"""PEFT's format both ways, against the peft library: the same logits on the same base."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.checkpoint import load_checkpoint
from formats.errors import FormatError
from formats.open_model import load_payload, open_model
from formats.peft import read_peft, write_peft
from model.lora import LoraSettings
from tests.adapters import make_adapter
from tests.foreign_models import random_ids, save_foreign

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Name -> family of the base, our settings.
OUT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama3", {}),
    "qwen3-all": ("qwen3", {"targets": ALL, "rank": 3, "alpha": 5.0}),
    "rslora": ("smollm2", {"rslora": True, "rank": 3}),
    "dora": ("llama3", {"dora": True, "targets": ("o_proj", "up_proj")}),
    "pissa": ("llama3", {"start": "pissa"}),
    "pissa-rslora": ("smollm2", {"start": "pissa", "rslora": True}),
    "one-layer": ("llama3", {"targets": ("h.1.attn.q_proj",)}),
    "gpt2-all": ("gpt2", {"targets": ("all-linear",)}),
    "gpt2-q-and-v": ("gpt2", {"targets": ("q_proj", "v_proj"), "rank": 3}),
    "gpt2-rslora": ("gpt2", {"targets": ("c_attn", "mlp.c_proj"), "rslora": True}),
    "gpt2-dora": ("gpt2", {"targets": ("c_attn", "c_proj"), "dora": True}),
}


def peft_logits(theirs: Any, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of missing keys, say
        warnings.filterwarnings("ignore", category=FutureWarning)
        adapted = PeftModel.from_pretrained(theirs, str(folder)).eval()
    return adapted(ids).logits


@pytest.mark.parametrize("case", OUT)
@torch.inference_mode()
def test_peft_loads_what_we_write_and_we_load_it_again(case: str, tmp_path: Path) -> None:
    family, changes = OUT[case]
    theirs, ids = save_foreign(family, tmp_path / "base"), random_ids()
    settings = LoraSettings(**{"rank": 4, "dropout": 0.0, "targets": ("q_proj", "v_proj"), **changes})
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter.pt", settings=settings)
    report = write_peft(load_checkpoint(adapter), tmp_path / "peft")
    assert report["largest_difference"] < 1e-6
    ours = open_model(adapter).model(ids)
    plain = open_model(tmp_path / "base").model(ids)
    back = open_model(tmp_path / "peft", base_model=tmp_path / "base").model(ids)
    torch.testing.assert_close(back, ours, atol=1e-5, rtol=1e-5)
    expected = peft_logits(theirs, tmp_path / "peft", ids)
    torch.testing.assert_close(ours[..., : expected.size(-1)], expected, atol=1e-4, rtol=1e-4)
    assert (ours - plain)[..., : expected.size(-1)].abs().max() > 1e-2, "an adapter that does nothing shows nothing"


IN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama3", {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": ("smollm2", {"target_modules": "all-linear", "r": 2, "lora_alpha": 7}),
    "ranks-by-module": (
        "llama3",
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    ),
    "dora-rslora": ("qwen2", {"target_modules": ["k_proj", "down_proj"], "use_dora": True, "use_rslora": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "gpt2-dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
}


@pytest.mark.parametrize("case", IN)
def test_we_load_what_peft_writes(case: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    family, changes = IN[case]
    theirs, ids = save_foreign(family, tmp_path / "base"), random_ids()
    torch.manual_seed(0)
    adapted = get_peft_model(theirs, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **changes})).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(str(tmp_path / "peft"))
    expected = adapted(ids).logits
    with torch.inference_mode():
        ours = open_model(tmp_path / "peft", base_model=tmp_path / "base").model(ids)
    torch.testing.assert_close(ours[..., : expected.size(-1)], expected, atol=1e-4, rtol=1e-4)


def test_a_folder_of_pefts_names_its_base_or_asks_for_it(tmp_path: Path) -> None:
    save_foreign("smollm2", tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter.pt")
    write_peft(load_checkpoint(adapter), tmp_path / "peft")
    payload = load_payload(tmp_path / "peft")  # adapter_config.json names the base where it still is
    assert payload["base"]["digest"] == load_checkpoint(adapter)["base"]["digest"]
    assert payload["tokenizer"] == load_payload(tmp_path / "base")["tokenizer"]
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base: add --base_model"):
        open_model(tmp_path / "peft")


def test_what_is_not_plain_lora_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_foreign("smollm2", tmp_path / "base")
    base = load_payload(tmp_path / "base")
    write_peft(load_checkpoint(make_adapter(tmp_path / "base", tmp_path / "a.pt")), tmp_path / "peft")
    config_file, weights_file = (
        tmp_path / "peft" / name for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    config, weights = json.loads(config_file.read_text()), load_file(weights_file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"peft_type": "IA3"}, {}, "is of type 'IA3', LORA and PREFIX_TUNING can be read"),
        ({"bias": "all"}, {}, "bias is 'all', which is more than LoRA"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "changed the base's weights"),
        ({"r": "four"}, {}, "r is 'four'"),
        ({"r": 5}, {}, "has rank 4, adapter_config.json says 5"),
        ({"rank_pattern": [1]}, {}, "rank_pattern is"),
        ({"use_dora": True}, {}, "use_dora"),
        ({}, {name: None}, "has no A and B that fit"),
        ({}, {name: torch.zeros(4, 31)}, "has no A and B that fit a layer of 32 to 32"),
        ({}, {name.replace("layers.0", "layers.9"): torch.zeros(4, 32)}, "holds .*layers.9.* no place for"),
    ]
    for settings, tensors, says in cases:
        config_file.write_text(json.dumps({**config, **settings}))
        save_file({k: v for k, v in {**weights, **tensors}.items() if v is not None}, weights_file)
        with pytest.raises(FormatError, match=says):
            read_peft(tmp_path / "peft", base["config"])
    weights_file.write_bytes(weights_file.read_bytes()[:40])
    with pytest.raises(FormatError, match="adapter_model"):
        read_peft(tmp_path / "peft", base["config"])
    weights_file.unlink()
    with pytest.raises(FormatError, match="no such file"):
        read_peft(tmp_path / "peft", base["config"])


def test_what_pefts_format_has_no_place_for_is_refused(tmp_path: Path) -> None:
    from model.adapters import AdapterSettings

    save_foreign("gpt2", tmp_path / "base")
    cases = [
        ("adapter", AdapterSettings(dim=4), "an adapter of adapter cannot be written for PEFT"),
        ("lora", LoraSettings(targets=("q_proj",), dora=True), "DoRA on a part of .*c_attn"),
        ("lora", LoraSettings(targets=("c_attn",), dora=True, start="pissa"), "DoRA with PiSSA"),
    ]
    for number, (method, settings, says) in enumerate(cases):
        adapter = make_adapter(tmp_path / "base", tmp_path / f"{number}.pt", method, settings)
        with pytest.raises(ValueError, match=says):
            write_peft(load_checkpoint(adapter), tmp_path / f"out{number}")
        assert not (tmp_path / f"out{number}").exists()
