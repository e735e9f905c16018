"""Which whole layers go."""

import dataclasses

import pytest

from model.gpt import GPT
from model.pruning.layers import layer_parameters, layers_worth
from model.pruning.units import drop_layers
from tests.model_helpers import GPT2, LLAMA, QWEN3, UNBALANCED, build

CONFIGS = [GPT2, LLAMA, QWEN3, dataclasses.replace(QWEN3, **UNBALANCED)]


@pytest.mark.parametrize("config", CONFIGS, ids=["gpt2", "llama", "qwen3", "unbalanced"])
@pytest.mark.parametrize("layer", range(3))
def test_a_layer_holds_what_the_model_loses_without_it(config, layer):
    model = build(config)
    assert model.num_params() - drop_layers(model, [layer]).num_params() == layer_parameters(config, layer)


def test_an_empty_layer_holds_nothing():
    config = dataclasses.replace(LLAMA, n_head=(4, 0, 4), n_kv_head=(2, 0, 2), mlp_dim=(24, 0, 24))
    assert layer_parameters(config, 1) == 0 == sum(p.numel() for p in GPT(config).h[1].parameters())


SIX = dataclasses.replace(LLAMA, n_layer=6)
INFLUENCES = [0.99, 0.1, 0.05, 0.3, 0.02, 0.4]


@pytest.mark.parametrize(
    ("share_of_layers", "dropped"),
    [
        (0.5, [4]),
        (1.0, [4]),
        (1.49, [4]),
        (1.51, [2, 4]),
        (3.2, [1, 2, 4]),
        (5.0, [1, 2, 3, 4, 5]),
        (6.0, [1, 2, 3, 4, 5]),
    ],
)
def test_the_least_influential_layers_nearest_to_the_parameters(share_of_layers, dropped):
    assert layers_worth(SIX, INFLUENCES, share_of_layers * layer_parameters(SIX, 0)) == dropped


def test_only_layers_in_range_go():
    assert layers_worth(SIX, INFLUENCES, 2 * layer_parameters(SIX, 0), layers=[0, 1, 3]) == [1, 3]


def test_less_than_half_a_layer_is_refused():
    with pytest.raises(ValueError, match=r"holds 7,744 parameters, more than twice the 3,485"):
        layers_worth(SIX, INFLUENCES, 0.45 * layer_parameters(SIX, 0))


def test_what_stays_is_shared_only_where_asked():
    model = build(LLAMA)
    for share in (False, True):
        smaller = drop_layers(model, [0], share=share)
        same = model.h[1].mlp.up_proj.weight.data_ptr() == smaller.h[0].mlp.up_proj.weight.data_ptr()
        assert same == share
