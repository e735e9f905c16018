"""What units cost in time, with a clock that the test knows and, once, with the real one."""

import dataclasses

import pytest

from model.pruning.latency import decoding_seconds, unit_seconds
from model.pruning.units import unit_parameters
from tests.model_helpers import GPT2, LLAMA, UNBALANCED, build

CONFIGS = [GPT2, LLAMA, dataclasses.replace(LLAMA, **UNBALANCED)]


@pytest.mark.parametrize("config", CONFIGS, ids=["gpt2", "llama", "unbalanced"])
def test_where_time_goes_by_parameters_so_do_the_costs(config):
    """Norms and biases of whole sub-layers that go (one kv group, halved, is none) count a little too."""
    found, wanted = unit_seconds(build(config), lambda model: model.num_params() / 1e9), unit_parameters(config)
    assert found.group == pytest.approx(wanted.group / 1e9, rel=0.05)
    assert found.channel == pytest.approx(wanted.channel / 1e9, rel=0.05)


def test_a_clock_without_difference_is_said():
    with pytest.raises(ValueError, match="save no time here"):
        unit_seconds(build(LLAMA), lambda model: 1e-3)


def test_the_model_stays_as_it_was():
    model = build(LLAMA)
    names = list(model.state_dict())
    try:
        unit_seconds(model)
    except ValueError as error:  # so small a model's steps may all take the same time
        assert "save no time" in str(error)
    assert list(model.state_dict()) == names and 0 < decoding_seconds(model, repeats=3) < 1
