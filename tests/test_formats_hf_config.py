"""config.json: what each family's keys and missing keys mean, what is refused, and the way back."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.errors import FormatError
from formats.hf_config import to_gpt_config
from formats.hf_families import ARCHITECTURES, family_of, from_gpt_config
from model.config import PRESETS, GPTConfig, preset
from tests.foreign_models import FAMILIES
from tests.model_helpers import GPT2, LLAMA, ROPE_LLAMA3, UNBALANCED

LLAMA31 = {  # as the file on the Hub has it
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


ROPE_KEYS = ["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "original_max_position_embeddings"]


def read(**values):
    return to_gpt_config(values, "config.json")


def test_gpt2_s_four_sizes_need_few_keys():
    for name, n_layer, n_head, n_embd in [
        ("124M", 12, 12, 768),
        ("350M", 24, 16, 1024),
        ("774M", 36, 20, 1280),
        ("1558M", 48, 25, 1600),
    ]:
        config, notes = read(model_type="gpt2", n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_ctx=1024)
        assert config == PRESETS[name] and notes == []


def test_llama_3_1_as_it_is_published():
    config, notes = to_gpt_config(LLAMA31, "config.json")
    assert notes == []
    assert (config.n_layer, config.n_head, config.n_kv_head, config.head_dim) == (32, 32, 8, 128)
    assert (config.block_size, config.vocab_size, config.padded_vocab_size) == (131072, 128256, 128256)
    assert config.rope_theta == 500_000.0 and config.rope_scaling["original_max_position_embeddings"] == 8192
    assert not (config.tie_embeddings or config.qkv_bias or config.qk_norm) and config.norm_eps == 1e-5


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_missing_keys_mean_what_transformers_takes_them_for(model_type):
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(model_type)
    config, _ = read(model_type=model_type)
    heads = theirs.num_attention_heads
    assert (config.n_layer, config.n_head, config.n_embd) == (theirs.num_hidden_layers, heads, theirs.hidden_size)
    assert (config.vocab_size, config.tie_embeddings) == (theirs.vocab_size, theirs.tie_word_embeddings)
    assert config.n_kv_head == getattr(theirs, "num_key_value_heads", heads)
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
    if model_type != "gpt2":
        assert (config.mlp_dim, config.norm_eps) == (theirs.intermediate_size, theirs.rms_norm_eps)
        assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    window = theirs.sliding_window if model_type == "mistral" else None
    assert config.block_size == (window or theirs.max_position_embeddings)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_transformers_own_files_are_read_alike_in_both_ways_of_writing_rope(family):
    """What transformers 5 writes, and the same with rope_theta and rope_scaling, as 4 did."""
    import transformers

    class_name, keys = FAMILIES[family]
    values = getattr(transformers, class_name).config_class(**keys).to_dict()
    values["architectures"] = [class_name]
    new, _ = to_gpt_config(values, "new")
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        values["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        values["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    old, _ = to_gpt_config(values, "old")
    assert old == new and new.n_layer == 3


def test_a_sliding_window_limits_the_context():
    config, notes = read(model_type="mistral", sliding_window=4096, max_position_embeddings=32768)
    assert config.block_size == 4096 and "32768 limited to 4096" in notes[0]
    assert read(model_type="mistral", sliding_window=None, max_position_embeddings=32768)[0].block_size == 32768
    qwen = {"model_type": "qwen2", "sliding_window": 512, "max_window_layers": 2}
    assert read(**qwen, use_sliding_window=False)[0].block_size == 32768
    assert read(**qwen, use_sliding_window=True)[0].block_size == 512
    assert read(**qwen, use_sliding_window=True, num_hidden_layers=2)[0].block_size == 32768
    layers = ["full_attention", "sliding_attention"]
    found, notes = read(**qwen, use_sliding_window=True, num_hidden_layers=2, layer_types=layers)
    assert found.block_size == 512 and len(notes) == 1


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "lacks model_type"),
        ({"model_type": "phi3"}, "model_type is 'phi3': known are gpt2, llama, mistral"),
        ({"model_type": ["llama"]}, "expected text"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
        ({"model_type": "llama", "architectures": "LlamaForCausalLM"}, "a list of names"),
        ({"model_type": "llama", "auto_map": {"AutoModel": "m.M"}}, "auto_map.*own code.*never run"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config: give the unquantized"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu'"),
        ({"model_type": "gpt2", "activation_function": "gelu"}, "activation_function is 'gelu': only 'gelu_new'"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights is 'False'"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
        ({"model_type": "gpt2", "n_head": 7}, "does not divide the width 768"),
        ({"model_type": "llama", "num_hidden_layers": "32"}, "num_hidden_layers is '32', expected a whole number"),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "from 1 to 10000"),
        ({"model_type": "llama", "hidden_size": 0}, "hidden_size is '0'"),
        ({"model_type": "llama", "vocab_size": 1.5}, "vocab_size is '1.5'"),
        ({"model_type": "llama", "vocab_size": True}, "vocab_size is 'True'"),
        ({"model_type": "llama", "rms_norm_eps": float("nan")}, "rms_norm_eps is 'nan'"),
        ({"model_type": "llama", "rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"model_type": "llama", "tie_word_embeddings": 1}, "expected true or false"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "must be a multiple of n_kv_head"),
        ({"model_type": "llama", "head_dim": 5}, "rotary positions turn pairs"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic': supported are"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"model_type": "qwen2", "rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor is '-1'"),
        ({"model_type": "llama", "rope_scaling": {"mrope_section": [1, 2]}}, "mrope_section"),
        ({"model_type": "llama", "rope_scaling": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        ({"model_type": "llama", "rope_scaling": [1]}, "expected an object"),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"]}, "layer_types is 'linear_attention'"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"]}, "layer_types is 'sliding_attention'"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is '0'"),
        ({"model_type": "espalier"}, "vocab_size"),
        ({"model_type": "espalier", "vocab_size": 5}, "n_layer"),
        ({"model_type": "espalier", "vocab_size": 5, "n_layer": 2}, "lacks block_size"),
    ],
)
def test_what_is_not_supported_is_said(values, message):
    with pytest.raises(FormatError, match=message) as caught:
        to_gpt_config(values, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ") and "\n" not in str(caught.value)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.integers()
    | st.floats()
    | st.sampled_from(["silu", "", "yarn"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ROPE_KEYS), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_stands_in_a_config_only_format_error_leaves(data):
    """Keys of good configs, some with values of any kind."""
    good = data.draw(st.sampled_from([LLAMA31, from_gpt_config(GPT2), from_gpt_config(llama(**UNBALANCED))]))
    names = st.sampled_from([*good, "rope_parameters", "layer_types", "sliding_window", "head_dim"])
    kinds = st.fixed_dictionaries({}, optional={"model_type": st.sampled_from([*ARCHITECTURES, None])})
    values = {**good, **data.draw(kinds), **data.draw(st.dictionaries(names, json_values, max_size=3))}
    try:
        config, notes = to_gpt_config(values, "config.json")
    except FormatError as error:
        assert str(error).startswith("config.json: ") and len(str(error)) < 700
        return
    assert config.block_size >= 1 and all(isinstance(note, str) for note in notes)
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def llama(**changes):
    return dataclasses.replace(LLAMA, **changes)


@pytest.mark.parametrize(
    "config, family",
    [
        (GPT2, "gpt2"),
        (dataclasses.replace(GPT2, tie_embeddings=False), "gpt2"),
        (dataclasses.replace(GPT2, n_kv_head=2), "espalier"),
        (dataclasses.replace(GPT2, head_dim=16), "espalier"),
        (dataclasses.replace(GPT2, qkv_bias=False), "espalier"),
        (dataclasses.replace(GPT2, norm_bias=False), "espalier"),
        (dataclasses.replace(GPT2, position="rope"), "espalier"),
        (dataclasses.replace(GPT2, mlp_dim=(48, 32, 48)), "espalier"),
        (LLAMA, "llama"),
        (llama(qkv_bias=True, o_bias=True, mlp_bias=True, tie_embeddings=False), "llama"),
        (llama(rope_scaling=ROPE_LLAMA3, rope_theta=5e5), "llama"),
        (llama(mlp_bias=True), "llama"),
        (llama(n_head=6, n_kv_head=3), "mistral"),
        (llama(n_head=6, n_kv_head=3, mlp_bias=True), "espalier"),
        (llama(qkv_bias=True), "qwen2"),
        (llama(qkv_bias=True, mlp_bias=True), "espalier"),
        (llama(o_bias=True), "espalier"),
        (llama(qk_norm=True), "qwen3"),
        (llama(qk_norm=True, qkv_bias=True, o_bias=True), "qwen3"),
        (llama(qk_norm=True, qkv_bias=True), "espalier"),
        (llama(mlp="gelu"), "espalier"),
        (llama(**UNBALANCED), "espalier"),
        (llama(mlp_dim=0), "espalier"),
        (llama(n_head=0, n_kv_head=0), "espalier"),
    ],
)
def test_the_way_back_says_all(config, family):
    assert family_of(config) == family
    written = json.loads(json.dumps(from_gpt_config(config)))
    assert written["model_type"] == family
    found, notes = to_gpt_config(written, "config.json")
    assert dataclasses.replace(found, padded_vocab_size=config.padded_vocab_size) == config and notes == []


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_has_a_published_family(name):
    assert family_of(preset(name)) in ("gpt2", "llama")


@pytest.mark.parametrize(
    "changes",
    [
        {"n_head": "many"},
        {"n_head": [4, 4]},
        {"mlp_dim": None},
        {"position": 3},
        {"norm_eps": "small"},
        {"rope_scaling": {"rope_type": []}},
        {"rope_scaling": 3},
        {"tie_embeddings": "no"},
        {"block_size": -1},
        {"n_layer": 10**12},
    ],
)
def test_a_damaged_config_of_our_own_kind_is_refused(changes):
    with pytest.raises(FormatError, match=r"^c\.json: "):
        to_gpt_config({**from_gpt_config(llama(**UNBALANCED)), **changes}, "c.json")


def test_our_own_kind_keeps_one_number_per_layer():
    written = from_gpt_config(llama(**UNBALANCED))
    assert written["architectures"] == ["EspalierForCausalLM"]
    assert [written[name] for name in UNBALANCED] == [list(sizes) for sizes in UNBALANCED.values()]
    assert set(written) & set(GPTConfig.__dataclass_fields__) >= {"n_head", "qk_norm", "rope_scaling"}
