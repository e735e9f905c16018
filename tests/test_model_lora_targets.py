"""Which layers LoRA goes to, by the names that people know, and what its settings refuse."""

import dataclasses
import re

import pytest

from model.lora import LoraSettings, apply_lora, lora_layers, target_names
from tests.model_helpers import GPT2, LLAMA, UNBALANCED, build


def ends(names):
    return sorted({name.split(".", 2)[2] for name in names})


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        ("q_proj", ["attn.q_proj"]),
        ("attn.o_proj", ["attn.o_proj"]),
        ("c_attn", ["attn.k_proj", "attn.q_proj", "attn.v_proj"]),
        ("c_proj", ["attn.o_proj", "mlp.down_proj"]),
        ("attn.c_proj", ["attn.o_proj"]),
        ("mlp.c_proj", ["mlp.down_proj"]),
        ("c_fc", ["mlp.up_proj"]),
        ("all-linear", [f"attn.{x}_proj" for x in "koqv"] + ["mlp.down_proj", "mlp.up_proj"]),
    ],
)
def test_names_that_people_know(target, layers):
    model = build(GPT2)
    assert ends(target_names(model, [target])) == layers
    assert len(target_names(model, [target])) == len(layers) * GPT2.n_layer


def test_one_layer_by_its_whole_name_and_targets_that_overlap():
    model = build(LLAMA)
    assert target_names(model, ["h.1.mlp.gate_proj"]) == ["h.1.mlp.gate_proj"]
    assert target_names(model, ["v_proj", "c_attn", "q_proj"]) == target_names(model, ["c_attn"])


def test_absent_sub_layers_have_no_lora():
    model = build(dataclasses.replace(LLAMA, **UNBALANCED))
    assert target_names(model, ["q_proj", "down_proj"]) == [
        "h.0.attn.q_proj",
        "h.0.mlp.down_proj",
        "h.1.mlp.down_proj",
        "h.2.attn.q_proj",
    ]


@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        (LLAMA, "qproj", "matches no layer: did you mean 'q_proj'?"),
        (GPT2, "gate_proj", "This model has down_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        (LLAMA, "proj", "matches no layer"),
        (LLAMA, "all_linear", "did you mean 'all-linear'?"),
        (LLAMA, "wte", "is an embedding"),
        (LLAMA, "lm_head", "is tied to the embedding"),
        (dataclasses.replace(LLAMA, tie_embeddings=False), "lm_head", "inside the loss"),
    ],
)
def test_a_target_that_can_not_be_is_refused_before_anything_changes(config, target, message):
    model = build(config)
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_lora(model, LoraSettings(targets=("q_proj", target)))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_lora_is_not_put_on_lora():
    model = apply_lora(build(LLAMA), LoraSettings())
    with pytest.raises(ValueError, match="has LoRA already"):
        apply_lora(model, LoraSettings(targets=("down_proj",)))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("rank", 0, "at least 1"),
        ("rank", 2.0, "at least 1"),
        ("rank", True, "at least 1"),
        ("alpha", "16", "above 0"),
        ("alpha", 0, "above 0"),
        ("alpha", float("nan"), "above 0"),
        ("dropout", 1.0, "below 1"),
        ("dropout", "0.1", "below 1"),
        ("start", "svd", "default, pissa"),
        ("lr_ratio", -1, "above 0"),
        ("targets", (), "at least one"),
    ],
)
def test_settings_out_of_range(name, value, wanted):
    with pytest.raises(ValueError, match=wanted):
        LoraSettings(**{name: value})


def test_pissa_wants_a_rank_that_the_weight_has():
    with pytest.raises(ValueError, match=re.escape("rank 20 exceeds a weight of (16, 32)")):
        apply_lora(build(LLAMA), LoraSettings(rank=20, start="pissa", targets=("k_proj",)))
