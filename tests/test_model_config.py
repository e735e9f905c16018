"""GPTConfig: presets, per-layer sizes, the errors, and the way to JSON and back."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from model.config import PRESETS, GPTConfig, LayerSizes, padded_vocab, preset

ROOT = Path(__file__).resolve().parent.parent
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config(**changes):
    return dataclasses.replace(preset("tiny", n_layer=3), **changes)


def test_presets_are_gpt2_and_llama_shapes():
    shapes = {name: (c.n_layer, c.n_head, c.n_kv_head, c.n_embd, c.mlp_dim) for name, c in PRESETS.items()}
    assert shapes["124M"] == (12, 12, 12, 768, 3072)
    assert shapes["350M"] == (24, 16, 16, 1024, 4096)
    assert shapes["774M"] == (36, 20, 20, 1280, 5120)
    assert shapes["1558M"] == (48, 25, 25, 1600, 6400)
    for name in ("124M", "350M", "774M", "1558M"):
        small, llama = PRESETS[name], PRESETS[f"llama-{name}"]
        assert (small.vocab_size, small.padded_vocab_size, small.head_dim) == (50_257, 50_304, 64)
        assert (llama.n_layer, llama.n_embd, llama.block_size) == (small.n_layer, small.n_embd, 1024)
        assert (llama.position, llama.norm, llama.mlp) == ("rope", "rmsnorm", "swiglu")
        assert llama.n_kv_head < llama.n_head


def test_preset_overrides_and_a_new_vocabulary_is_padded():
    changed = preset("124M", vocab_size=257, dropout=0.1)
    assert (changed.vocab_size, changed.padded_vocab_size, changed.dropout) == (257, 384, 0.1)
    assert preset("tiny", vocab_size=257, padded_vocab_size=257).padded_vocab_size == 257
    assert preset("tiny", block_size=32).padded_vocab_size == 50_304


@pytest.mark.parametrize(("n", "padded"), [(1, 128), (128, 128), (129, 256), (50_257, 50_304)])
def test_padded_vocab(n, padded):
    assert padded_vocab(n) == padded


def test_layer_reads_numbers_and_lists_alike():
    sizes = config(n_head=(4, 2, 0), n_kv_head=[2, 1, 0], mlp_dim=[10, 0, 30])
    assert [sizes.layer(i) for i in range(3)] == [
        LayerSizes(4, 2, 64, 10),
        LayerSizes(2, 1, 64, 0),
        LayerSizes(0, 0, 64, 30),
    ]
    assert config(n_head=4, n_kv_head=2).layer(2) == LayerSizes(4, 2, 64, 1024)


def test_a_list_of_equal_numbers_is_that_number():
    assert config(mlp_dim=[7, 7, 7]) == config(mlp_dim=7)
    assert config(mlp_dim=[7, 7, 8]).mlp_dim == (7, 7, 8)


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name):
    assert GPTConfig.from_dict(json.loads(json.dumps(PRESETS[name].to_dict()))) == PRESETS[name]


def test_round_trip_of_per_layer_sizes_and_rope_scaling():
    pruned = config(n_head=(4, 2, 0), n_kv_head=(4, 2, 0), mlp_dim=(1, 2, 3), position="rope", rope_scaling=LLAMA3)
    plain = json.loads(json.dumps(pruned.to_dict()))
    assert plain["n_head"] == [4, 2, 0]
    assert GPTConfig.from_dict(plain) == pruned


def test_config_is_frozen_and_does_not_share_the_scaling_dict():
    mine = dict(LLAMA3)
    built = config(position="rope", rope_scaling=mine)
    mine["factor"] = 99.0
    assert built.rope_scaling == LLAMA3
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.n_layer = 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 0}, "n_layer is 0"),
        ({"n_embd": 1.5}, "n_embd is 1.5"),
        ({"block_size": True}, "block_size is True"),
        ({"vocab_size": 50_305}, "give 50432"),
        ({"n_head": (4, 4)}, "n_head lists 2 layers, but n_layer is 3"),
        ({"mlp_dim": -1}, "mlp_dim is -1"),
        ({"mlp_dim": (1, 2.0, 3)}, "mlp_dim is"),
        ({"n_kv_head": 3}, "layer 0 has n_head 4 and n_kv_head 3"),
        ({"n_kv_head": (4, 4, 0)}, "layer 2 has n_head 4 and n_kv_head 0"),
        ({"n_kv_head": (4, 2, 4)}, "differs between layers"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"position": "alibi"}, "position is 'alibi': choose one of learned, rope"),
        ({"norm": "rmsnorm"}, "set norm_bias to False"),
        ({"position": "rope", "head_dim": 15}, "head_dim is 15"),
        ({"rope_scaling": LLAMA3}, "position is not 'rope'"),
        ({"position": "rope", "rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn': known are linear, llama3"),
        ({"position": "rope", "rope_scaling": {"rope_type": "linear"}}, "takes ['factor'], found []"),
        ({"position": "rope", "rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor 0"),
        ({"position": "rope", "rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "larger high_freq_factor"),
    ],
)
def test_errors_name_the_setting_and_what_is_wrong(changes, words):
    with pytest.raises(ValueError) as error:
        config(**changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_and_missing_keys():
    values = preset("tiny").to_dict()
    with pytest.raises(ValueError, match="unknown model setting 'n_heads': did you mean 'n_head'"):
        GPTConfig.from_dict({**values, "n_heads": 3})
    del values["n_layer"], values["head_dim"]
    with pytest.raises(ValueError, match="lacks n_layer, head_dim"):
        GPTConfig.from_dict(values)
    with pytest.raises(ValueError, match="unknown preset '124m': did you mean '124M'"):
        preset("124m")
    with pytest.raises(ValueError, match="unknown model setting 'n_lyer': did you mean 'n_layer'"):
        preset("124M", n_lyer=3)


def test_importing_the_config_does_not_import_torch():
    code = "import sys, model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
