"""LoRA and its kin: the same numbers as PEFT, a start that changes nothing, merging both ways, pruning masks kept."""

import copy
import dataclasses
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generate import generate
from model.lora import LoraLinear, LoraSettings, apply_lora, lora_layers, lr_multipliers, target_names
from model.tuning import adapter_state, adapters_off, base_state, merge, unmerge
from tests.model_helpers import FAMILIES, GPT2, LLAMA, UNBALANCED, batch, build, loss_and_gradients, masks_of_zeros
from tests.test_model_transformers import hugging_face_llama

ALL = LoraSettings(rank=4, dropout=0.0, targets=("all-linear",))
VARIANTS = pytest.mark.parametrize(
    "changes",
    [{}, {"rslora": True}, {"dora": True}, {"start": "pissa"}, {"dora": True, "start": "pissa"}],
    ids=["lora", "rslora", "dora", "pissa", "dora-pissa"],
)


def train_a_little(model, seed=3, size=0.05):
    """Stands in for training: moves whatever trains."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=g))
    return model


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def peft_twin(layer, base, changes):
    """PEFT's layer on a copy of `base`, with our layer's A, B and lengths; the starts compared are those of both."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear as PeftLinear

    options = {"use_dora": changes.get("dora", False), "use_rslora": changes.get("rslora", False)}
    init = "pissa" if changes.get("start") == "pissa" else True
    config = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, init_lora_weights=init, **options)
    theirs = PeftLinear(copy.deepcopy(base), "default", config, r=4, lora_alpha=16)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    if init == "pissa":
        # The singular vectors' signs are free, but B A is not.
        torch.testing.assert_close(B @ A, layer.lora_B @ layer.lora_A, atol=1e-5, rtol=0)
    A.data, B.data = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    if layer.lora_magnitude is not None:
        magnitude = theirs.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude, layer.lora_magnitude)
        magnitude.data = layer.lora_magnitude.detach().clone()
    return theirs


@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"dora": True}, {"start": "pissa"}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_has_pefts_output_and_gradients(changes, bias):
    torch.manual_seed(0)
    base = torch.nn.Linear(24, 40, bias=bias)
    layer = LoraLinear(copy.deepcopy(base), LoraSettings(rank=4, dropout=0.0, **changes))
    if changes.get("start") == "pissa":
        layer.start_pissa()
    else:
        torch.nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
    theirs = peft_twin(layer, base, changes)
    with torch.no_grad():
        for ours, other in ((layer.lora_A, theirs.lora_A), (layer.lora_B, theirs.lora_B)):
            ours.add_(0.1 * torch.randn_like(ours))
            other["default"].weight.copy_(ours)
    x, weights = torch.randn(3, 7, 24), torch.randn(3, 7, 40)
    out, expected = layer(x), theirs(x)
    assert relative(out, expected) < 1e-5 and relative(out, base(x)) > 0.1
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert relative(layer.lora_A.grad, theirs.lora_A["default"].weight.grad) < 1e-5
    assert relative(layer.lora_B.grad, theirs.lora_B["default"].weight.grad) < 1e-5
    if layer.lora_magnitude is not None:
        assert relative(layer.lora_magnitude.grad, theirs.lora_magnitude_vector["default"].weight.grad) < 1e-5


def test_a_llama_has_pefts_logits_and_gradients():
    from peft import LoraConfig, get_peft_model

    model = build(LLAMA).eval()
    theirs = get_peft_model(
        hugging_face_llama(model),
        LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    apply_lora(model, dataclasses.replace(ALL, targets=("q_proj", "v_proj", "down_proj")))
    train_a_little(model)
    other = dict(theirs.named_parameters())
    twins = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, _, which = name.removeprefix("h.").rpartition(".")
            layer = layer.replace(".attn.", ".self_attn.")
            twins[name] = other[f"base_model.model.model.layers.{layer}.{which}.default.weight"]
            twins[name].data.copy_(parameter)
    assert len(twins) == 2 * 3 * LLAMA.n_layer
    idx, _ = batch(LLAMA)
    ours, expected = model(idx)[..., : LLAMA.vocab_size], theirs(idx).logits[..., : LLAMA.vocab_size]
    assert relative(ours, expected) < 1e-5
    for logits in (ours, expected):
        logits.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert relative(parameter.grad, twins[name].grad) < 1e-4, name


@FAMILIES
@VARIANTS
@pytest.mark.parametrize("masked", [False, True])
def test_the_start_is_the_base_to_the_bit(config, changes, masked):
    model = build(config)
    idx, _ = batch(config)
    if masked:
        model.masks = masks_of_zeros(prune(model))
    expected = model(idx)
    settings = dataclasses.replace(ALL, dropout=0.3, **changes)
    apply_lora(model, settings)
    assert torch.equal(model.train()(idx), expected)
    with torch.autocast("cpu", torch.bfloat16):
        tuned = model(idx)
        with adapters_off(model):
            assert torch.equal(tuned, model(idx))


@pytest.mark.parametrize("config", [GPT2, LLAMA, dataclasses.replace(LLAMA, **UNBALANCED)], ids=["gpt2", "llama", "un"])
@VARIANTS
def test_merged_is_the_adapter_and_unmerged_the_base(config, changes):
    model = build(config).eval()
    idx, _ = batch(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = model(idx)[..., : config.vocab_size]
    train_a_little(apply_lora(model, dataclasses.replace(ALL, **changes)))
    adapter = model(idx)[..., : config.vocab_size]
    merge(model)
    merged = model(idx)[..., : config.vocab_size]
    assert relative(merged, adapter) < 1e-5 and relative(merged, plain) > 0.05
    fresh = build(config, seed=5)
    fresh.load_state_dict(base_state(model))
    assert torch.equal(fresh.eval()(idx)[..., : config.vocab_size], merged), "base_state while merged is a plain model"
    merge(model)  # a second time changes nothing
    assert torch.equal(model(idx)[..., : config.vocab_size], merged)
    with pytest.raises(ValueError, match="unmerge it"), adapters_off(model):
        pass
    unmerge(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in base_state(model).items())
    assert set(before) == set(base_state(model))
    assert torch.equal(model(idx)[..., : config.vocab_size], adapter)


def prune(model, share=0.5):
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("h.1.") and name.endswith("_proj.weight"):
                parameter.mul_(torch.rand(parameter.shape, generator=g) > share)
                parameter[0] = 0.0  # a row that is gone altogether
    return model


@VARIANTS
def test_what_is_pruned_stays_so(changes):
    model = prune(build(LLAMA)).eval()
    idx, targets = batch(LLAMA)
    masks = model.masks = masks_of_zeros(model)
    assert sorted(masks) == sorted(f"{name}.weight" for name in target_names(model, ["all-linear"]) if "h.1." in name)
    train_a_little(apply_lora(model, dataclasses.replace(ALL, **changes)))
    adapter = model(idx)[..., : LLAMA.vocab_size]
    _, gradients = loss_and_gradients(model, idx, targets)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    merge(model)
    assert relative(model(idx)[..., : LLAMA.vocab_size], adapter) < 1e-5
    weights = model.state_dict()
    for name, mask in masks.items():
        assert torch.equal(weights[name] != 0, mask.dense()), name


@VARIANTS
def test_without_gradients_an_update_under_a_mask_is_the_merged_weight_to_the_bit(changes):
    model = build(LLAMA).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.mul_(torch.rand(parameter.shape) > 0.5)
    model.masks = masks_of_zeros(model)
    idx, _ = batch(LLAMA)
    train_a_little(apply_lora(model, dataclasses.replace(ALL, **changes)))
    model.eval()
    assert all(layer.mask is not None for layer in lora_layers(model))
    with torch.no_grad():
        adapter = model(idx)
        merge(model)
        assert torch.equal(model(idx), adapter)


def test_a_lora_that_ignores_the_mask_can_not_be_merged():
    model = prune(build(LLAMA)).eval()
    dense = apply_lora(copy.deepcopy(model), ALL)
    model.masks = masks_of_zeros(model)
    free = apply_lora(model, dataclasses.replace(ALL, masked=False))
    idx, _ = batch(LLAMA)
    for one in (dense, free):
        for layer in lora_layers(one):
            torch.nn.init.constant_(layer.lora_A, 0.1), torch.nn.init.constant_(layer.lora_B, 0.1)
    assert torch.equal(free(idx), dense(idx))
    state = {name: tensor.clone() for name, tensor in free.state_dict().items()}
    with pytest.raises(ValueError, match="lose the mask"):
        merge(free)
    assert all(torch.equal(state[name], tensor) for name, tensor in free.state_dict().items()), "all layers or none"


def test_dropout_is_on_the_adapters_input_only():
    torch.manual_seed(0)
    base = torch.nn.Linear(16, 8)
    layer = LoraLinear(copy.deepcopy(base), LoraSettings(rank=2, dropout=0.5))
    torch.nn.init.ones_(layer.lora_A), torch.nn.init.ones_(layer.lora_B)
    x = torch.ones(4000, 16)
    update = (layer(x) - base(x)).detach()
    kept = update[:, 0] / (8.0 * 2 * 2)  # scale 16 / 2, rank 2, each input kept doubled: a count of 0..16
    torch.testing.assert_close(kept, kept.round(), atol=1e-4, rtol=0)
    assert 7.8 < kept.mean() < 8.2 and 1.8 < kept.std() < 2.2  # binomial: 16 inputs, one half each
    torch.testing.assert_close(layer.eval()(x), base(x) + 8.0 * 16 * 2)


def kept_for_backward(run):
    """Bytes of the tensors that autograd keeps, each storage once."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        out = run()
    return sum(kept.values()), out


def test_dropout_has_autograds_gradients_and_keeps_less():
    torch.manual_seed(0)
    layers = [LoraLinear(torch.nn.Linear(64, 48).requires_grad_(False), LoraSettings(dropout=0.25)) for _ in range(2)]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_A), torch.nn.init.normal_(layer.lora_B)
    x, weights = torch.randn(4, 50, 64, requires_grad=True), torch.randn(4, 50, 48)
    by_hand = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    kept, outs = kept_for_backward(lambda: [layer(x) for layer in layers])
    ((outs[0] + outs[1]) * weights).sum().backward()
    ours = [p.grad.clone() for layer in layers for p in (layer.lora_A, layer.lora_B)]
    torch.manual_seed(1)
    for layer, out in zip(layers, outs):
        layer.lora_A.grad = layer.lora_B.grad = None
        dropped = torch.native_dropout(by_hand, 0.25, True)[0]
        expected = by_hand @ layer.weight.t() + layer.bias + layer.scale * dropped @ layer.lora_A.t() @ layer.lora_B.t()
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, by_hand.grad, atol=1e-4, rtol=1e-4)
    for gradient, parameter in zip(ours, [p for layer in layers for p in (layer.lora_A, layer.lora_B)]):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-4)
    thin = sum(4 * t.numel() for layer in layers for t in (layer.lora_A, layer.lora_B, layer.weight))
    thin += 2 * 2 * 4 * 200 * 8  # scaled and unscaled (N, rank) of both
    assert kept <= (4 + 1 + 1) * x.numel() + thin


@VARIANTS
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_masked_update_has_autograds_gradients_and_keeps_none_of_it(changes, dtype):
    torch.manual_seed(0)
    base, mask = torch.nn.Linear(64, 48).requires_grad_(False), torch.rand(48, 64) < 0.5
    base.weight *= mask
    layer = LoraLinear(base, LoraSettings(rank=4, dropout=0.0, **changes), mask)
    if layer.lora_A_start is not None:
        layer.start_pissa()
    torch.nn.init.normal_(layer.lora_A), torch.nn.init.normal_(layer.lora_B)
    x, weights = torch.randn(2, 50, 64, requires_grad=True), torch.randn(2, 50, 48)
    found = []
    for plainly in (False, True):
        layer.zero_grad(), setattr(x, "grad", None)
        with (
            torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None),
            mock.patch("torch.compiler.is_compiling", lambda now=plainly: now),
        ):
            kept, out = kept_for_backward(lambda: layer(x))
        (out.float() * weights).sum().backward()
        found.append([kept, out.detach(), x.grad.clone(), *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert dtype is not None or found[0][0] <= found[1][0] - 4 * base.weight.numel()
    for ours, expected in zip(found[0][1:], found[1][1:]):
        assert relative(ours, expected) < (1e-5 if dtype is None else 2e-2)


@pytest.mark.parametrize("start", ["default", "pissa"])
def test_a_plain_pair_is_the_adapter_on_the_published_base(start):
    model = train_a_little(apply_lora(build(LLAMA), dataclasses.replace(ALL, start=start)))
    for layer in lora_layers(model):
        A, B = layer.plain_pair()
        assert len(A) == B.size(1) == (8 if start == "pissa" else 4)
        torch.testing.assert_close(layer.scale * B @ A, layer.delta())


def test_plus_rates_and_scales():
    model = apply_lora(build(LLAMA), LoraSettings(lr_ratio=16.0, dora=True))
    rates = lr_multipliers(model, LoraSettings(lr_ratio=16.0))
    assert set(rates) == set(adapter_state(model))
    assert {name.rpartition(".")[2]: rate for name, rate in rates.items()} == {
        "lora_A": 1.0,
        "lora_B": 16.0,
        "lora_magnitude": 1.0,
    }
    assert LoraSettings(rank=4, alpha=16).scale == 4.0
    assert LoraSettings(rank=4, alpha=16, rslora=True).scale == 8.0


def test_a_layer_takes_over_the_parameters_and_hooks_of_its_base():
    model = build(GPT2)
    base, seen = model.h[0].attn.q_proj, []
    base.register_forward_hook(lambda module, args, out: seen.append(module))
    apply_lora(model, LoraSettings())
    layer = model.h[0].attn.q_proj
    assert layer.weight is base.weight and layer.bias is base.bias and layer is not base
    model(batch(GPT2)[0])
    assert seen == [layer]
    assert {"h.0.attn.q_proj.weight", "h.0.attn.q_proj.lora_A", "h.0.attn.q_proj.lora_B"} <= set(model.state_dict())


def test_generation_and_copies_of_an_adapted_model():
    model = train_a_little(apply_lora(build(LLAMA), ALL)).eval()
    expected = generate(model, [[1, 2, 3]], max_new_tokens=8, temperature=0.0)
    assert generate(copy.deepcopy(model), [[1, 2, 3]], max_new_tokens=8, temperature=0.0) == expected
    merge(model)
    assert generate(model, [[1, 2, 3]], max_new_tokens=8, temperature=0.0) == expected


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rank=st.integers(1, 12),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    alpha=st.floats(0.5, 64),
    dora=st.booleans(),
    seed=st.integers(0, 99),
)
def test_one_weight_does_what_base_and_adapter_do(rank, shape, alpha, dora, seed):
    torch.manual_seed(seed)
    base = torch.nn.Linear(*shape)
    mask = torch.rand(base.weight.shape) > 0.3
    base.weight.data *= mask
    layer = LoraLinear(copy.deepcopy(base), LoraSettings(rank=rank, alpha=alpha, dora=dora), mask).eval()
    torch.nn.init.normal_(layer.lora_A), torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, shape[0])
    weight = layer.effective_weight()
    assert not weight[~mask].any()
    torch.testing.assert_close(layer(x), x @ weight.t() + base.bias, atol=1e-3, rtol=1e-4)
