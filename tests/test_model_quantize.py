"""NF4 and int8 stores: the paper's code, bounds of the error, bytes that are really fewer, gradients."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.lora import LoraSettings
from model.quantize import (
    BLOCK,
    NF4,
    QuantizedLinear,
    dequantize_int8,
    dequantize_nf4,
    quantize_blocks,
    quantize_int8,
    quantize_nf4,
    quantized_bytes,
)
from model.tuning import QLoraSettings, apply_method
from tests.model_helpers import GPT2, LLAMA, UNBALANCED, batch, build

# Half the widest gap between neighbouring codes of NF4, which is that from -1 to -0.696.
NF4_STEP = 0.5 * (1.0 - 0.6961928009986877)
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def test_the_code_is_made_of_quantiles_of_the_normal_distribution():
    """Appendix E: 9 quantiles from 0.5 up and 8 down to it, evenly spaced in probability, scaled to the largest."""
    offset = 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    code = torch.cat((below, torch.zeros(1), above)).sort().values
    torch.testing.assert_close(code / code.max(), torch.tensor(NF4), atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=SHAPES, seed=st.integers(0, 999), size=st.sampled_from([1e-6, 0.02, 50.0]))
def test_nf4_comes_back_within_half_a_step_of_its_block(shape, seed, size):
    torch.manual_seed(seed)
    weight = size * torch.randn(shape)
    weight[torch.rand(shape) < 0.1] = 0.0
    stored = quantize_nf4(weight)
    again = dequantize_nf4(shape, torch.float32, *stored)
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    absmax = flat.abs().amax(dim=1, keepdim=True)
    slack = (absmax - absmax.mean()).abs().max() / 127  # of the absmaxes' own eight bits
    bound = (NF4_STEP * (absmax + slack) + slack).expand_as(flat).flatten()[: weight.numel()].view(shape)
    assert ((again - weight).abs() <= bound * 1.0001).all()
    assert not again[weight == 0].any(), "a zero stays one"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=SHAPES, seed=st.integers(0, 999), size=st.sampled_from([1e-6, 0.02, 50.0]))
def test_int8_comes_back_within_half_a_step_of_its_row(shape, seed, size):
    torch.manual_seed(seed)
    weight = size * torch.randn(shape)
    weight[0] = 0.0
    codes, scales = quantize_int8(weight)
    again = dequantize_int8(shape, torch.float32, codes, scales)
    assert torch.equal(scales, scales.bfloat16().float()), "a kernel that wants bf16 scales gets these very ones"
    assert ((again - weight).abs() <= scales / 2 * 1.001).all()
    assert (scales <= weight.abs().amax(dim=1, keepdim=True) / 127 * 1.009).all()
    assert not again[0].any()


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.1), ("int8", 0.011)])
def test_the_error_of_normal_weights(kind, error):
    """About 9% of the spread in four bits, as QLoRA's figures imply, and under 1.1% in eight."""
    torch.manual_seed(0)
    base = torch.nn.Linear(512, 256)
    torch.nn.init.normal_(base.weight, std=0.02)
    again = QuantizedLinear(base, kind).dense_weight()
    assert error / 3 < (again - base.weight).std() / 0.02 < error


@pytest.mark.parametrize(("kind", "bytes_per_weight"), [("nf4", 0.518), ("int8", 1.004)])
def test_bytes_are_really_fewer(kind, bytes_per_weight):
    base = torch.nn.Linear(1024, 1024, bias=False)
    layer = QuantizedLinear(base, kind)
    owned = sum(t.untyped_storage().nbytes() for t in layer.stored())
    assert quantized_bytes(layer) == (owned, 4 * 1024 * 1024)
    assert abs(owned / 1024**2 - bytes_per_weight) < 0.001
    assert not list(layer.parameters()) and not layer.state_dict()


@pytest.mark.parametrize("inputs", [60, 433, 1153, 1160])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_codes_multiply_few_rows_of_any_number_of_inputs(inputs, rows):
    torch.manual_seed(0)
    layer = QuantizedLinear(torch.nn.Linear(inputs, 432), "int8")
    layer.reads_codes = True
    held = sum(each.nbytes for each in layer.stored())
    x = torch.randn(rows, inputs)
    with torch.no_grad():
        few, again, many = layer.few_rows(x), layer.few_rows(x), layer._many_rows(x)
        exact = x @ layer.dense_weight().T + layer.bias
    assert torch.equal(few, again)
    for found in (few, many):
        torch.testing.assert_close(found.float(), exact, atol=0.01 * float(exact.abs().max()), rtol=0)
    assert sum(each.nbytes for each in layer.stored()) == held


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_linear_layer_of_its_read_weight(kind, bias):
    torch.manual_seed(0)
    layer = QuantizedLinear(torch.nn.Linear(30, 20, bias=bias), kind)
    x = torch.randn(2, 5, 30, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    expected = torch.nn.functional.linear(again, layer.dense_weight(), layer.bias)
    weights = torch.randn(2, 5, 20)
    assert torch.equal(layer(x), expected)
    (layer(x) * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def saved_bytes(run):
    """Bytes of the tensors that autograd keeps for backward, each storage once."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        loss = run()
    return sum(kept.values()), loss


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_no_dense_weight_waits_for_backward(kind):
    layer = QuantizedLinear(torch.nn.Linear(256, 256, bias=False), kind)
    x = torch.randn(2, 256, requires_grad=True)
    kept, out = saved_bytes(lambda: layer(x))
    assert kept < 256 * 256, "the dense weight would be four times that"
    out.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("config", [GPT2, LLAMA, dataclasses.replace(LLAMA, **UNBALANCED)], ids=["gpt2", "llama", "un"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_of_quantised_blocks(config, kind):
    model = build(config, spread=0.02).eval()
    plain, dense = model, copy.deepcopy(model)
    quantize_blocks(model, kind)
    linear = [name for name, m in dense.named_modules() if name.startswith("h.") and isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        for name in linear:
            dense.get_submodule(name).weight.copy_(plain.get_submodule(name).dense_weight())
    idx, _ = batch(config)
    torch.testing.assert_close(model(idx), dense(idx), atol=1e-5, rtol=1e-5)
    assert [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)] == linear
    assert type(model.wte) is torch.nn.Embedding
    with pytest.raises(ValueError, match="no plain linear layers"):
        quantize_blocks(model, kind)


def test_an_unknown_kind_is_refused_before_anything_changes():
    model = build(LLAMA)
    with pytest.raises(ValueError, match="'int4': choose one of nf4, int8"):
        quantize_blocks(model, "int4")
    with pytest.raises(ValueError, match="'fp4'"):
        QLoraSettings(quantization="fp4")
    assert quantized_bytes(model) == (0, 0)


def test_the_base_of_qlora_takes_a_seventh():
    model = apply_method(build(dataclasses.replace(LLAMA, n_embd=256, mlp_dim=512)), "qlora", QLoraSettings())
    held, dense = quantized_bytes(model)
    assert dense / held > 7
    settings = QLoraSettings(lora=LoraSettings(targets=("all-linear",)), quantization="int8")
    held, dense = quantized_bytes(apply_method(build(LLAMA), "qlora", settings))
    assert dense / held > 3.5
