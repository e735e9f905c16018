"""What every way of fine-tuning has in common: the base untouched, gradients, caches, packed rows, files."""

import copy
import dataclasses
import json
import re

import pytest
import torch

from model.adapters import AdapterSettings
from model.cache import KVCache
from model.generate import generate
from model.lora import LoraSettings
from model.prompt_methods import PrefixSettings, PTuningSettings
from model.quantize import quantize_blocks
from model.tuning import (
    METHODS,
    FreezeSettings,
    QLoraSettings,
    adapter_state,
    adapters_off,
    apply_method,
    base_state,
    freeze_all_but,
    load_adapter_state,
    merge,
    settings_from_dict,
    settings_to_dict,
    trainable_line,
    trainable_report,
)
from tests.model_helpers import GPT2, LLAMA, UNBALANCED, batch, build, loss_and_gradients
from tests.test_model_lora import train_a_little

EVERY = ("c_attn", "o_proj", "up_proj", "down_proj")
CASES = {
    "lora": ("lora", LoraSettings(rank=3, targets=EVERY)),
    "dora-pissa": ("lora", LoraSettings(rank=3, targets=EVERY, dora=True, start="pissa")),
    "qlora-nf4": ("qlora", QLoraSettings(lora=LoraSettings(rank=3, targets=EVERY))),
    "qlora-int8": ("qlora", QLoraSettings(lora=LoraSettings(rank=3), quantization="int8")),
    "adapter": ("adapter", AdapterSettings(dim=6)),
    "houlsby": ("adapter", AdapterSettings(dim=6, placement="houlsby")),
    "prefix": ("prefix", PrefixSettings(length=5, hidden=16)),
    "prefix-direct": ("prefix", PrefixSettings(length=5, hidden=0)),
    "prefix-placed": ("prefix", PrefixSettings(length=5, hidden=0, takes_positions=True)),
    "p_tuning-mlp": ("p_tuning", PTuningSettings(length=5, hidden=16)),
    "p_tuning-lstm": ("p_tuning", PTuningSettings(length=5, hidden=8, encoder="lstm")),
}
CASE = pytest.mark.parametrize("case", CASES)
CONFIGS = pytest.mark.parametrize(
    "config", [GPT2, LLAMA, dataclasses.replace(LLAMA, **UNBALANCED)], ids=["gpt2", "llama", "unbalanced"]
)
START_IS_BASE = [case for case, (method, _) in CASES.items() if method in ("lora", "qlora", "adapter")]


def tuned(case, config, trained=True):
    method, settings = CASES[case]
    torch.manual_seed(2)
    model = apply_method(build(config), method, settings)
    return train_a_little(model, size=0.2) if trained else model


def real(logits, config):
    return logits[..., : config.vocab_size]


@pytest.mark.parametrize("case", START_IS_BASE)
@CONFIGS
def test_the_start_is_the_base(case, config):
    base = build(config)
    if "qlora" in case:
        quantize_blocks(base, CASES[case][1].quantization)
    idx, _ = batch(config)
    assert torch.equal(tuned(case, config, trained=False).train()(idx), base(idx))


@CASE
@CONFIGS
def test_the_base_keeps_its_names_and_its_bits(case, config):
    base, model = build(config).state_dict(), tuned(case, config)
    idx, targets = batch(config)
    loss_and_gradients(model, idx, targets)
    kept = base_state(model)
    assert all(torch.equal(base[name], tensor) for name, tensor in kept.items())
    if "qlora" not in case:
        assert list(kept) == list(base)


@CASE
@CONFIGS
def test_what_trains_gets_a_gradient_and_nothing_else_does(case, config):
    model = tuned(case, config)
    _, gradients = loss_and_gradients(model, *batch(config))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(gradients) == trainable
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    frozen = {name for name in adapter_state(model) if name.endswith("_start")}
    assert trainable == set(adapter_state(model)) - frozen


@CASE
@CONFIGS
def test_the_adapter_changes_the_model_and_can_be_switched_off(case, config):
    base, model = build(config).eval(), tuned(case, config).eval()
    if "qlora" in case:
        quantize_blocks(base, CASES[case][1].quantization)
    idx, _ = batch(config)
    on = real(model(idx), config)
    plain = real(base(idx), config)
    assert (on - plain).abs().max() > 0.05
    with pytest.raises(RuntimeError), adapters_off(model):
        assert torch.equal(real(model(idx), config), plain)
        raise RuntimeError("switched on again all the same")
    assert torch.equal(real(model(idx), config), on)


@CASE
@CONFIGS
def test_generation_with_the_cache_is_generation_without(case, config):
    model = tuned(case, config).eval()
    idx, _ = batch(config, T=12)
    whole = real(model(idx), config)
    cache = KVCache(2, 16)
    steps = [model(part, cache=cache) for part in idx.split((5, 1, 1, 5), dim=1)]
    torch.testing.assert_close(real(torch.cat(steps, dim=1), config), whole, atol=2e-5, rtol=1e-4)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    options = {"max_new_tokens": 40, "temperature": 0.0}  # beyond the context: rows are read anew
    cached = generate(model, prompts, **options)
    assert cached == generate(model, prompts, use_cache=False, **options)
    with adapters_off(model):
        assert cached != generate(model, prompts, **options)


@CASE
@CONFIGS
def test_packed_is_padded(case, config):
    model = tuned(case, config).eval()
    idx, targets = batch(config, B=1, T=20)
    lengths = (7, 9, 4)
    doc_ids = torch.repeat_interleave(torch.tensor([0, 1, -1]), torch.tensor(lengths)).unsqueeze(0)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    targets[doc_ids == -1] = -100
    packed, packed_gradients = loss_and_gradients(model, idx, targets, positions=positions, doc_ids=doc_ids)
    rows, wanted = torch.zeros(2, 9, dtype=torch.long), torch.full((2, 9), -100)
    rows[0, :7], rows[1] = idx[0, :7], idx[0, 7:16]
    wanted[0, :7], wanted[1] = targets[0, :7], targets[0, 7:16]
    padded, padded_gradients = loss_and_gradients(model, rows, wanted)
    torch.testing.assert_close(packed, padded)
    for name, gradient in packed_gradients.items():
        torch.testing.assert_close(gradient, padded_gradients[name], atol=1e-5, rtol=1e-3)


@CASE
@CONFIGS
def test_gradient_checkpointing_changes_no_gradient(case, config):
    config = dataclasses.replace(config, dropout=0.1)
    model = tuned(case, config).train()
    idx, targets = batch(config)
    results = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(0)
        results.append(loss_and_gradients(model, idx, targets))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-6, rtol=1e-5)


@CASE
def test_autocast_keeps_the_adapter_in_fp32(case):
    model = train_a_little(tuned(case, LLAMA, trained=False), size=0.02)
    idx, targets = batch(LLAMA)
    expected, exact = loss_and_gradients(model.eval(), idx, targets)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert (parameter.grad - exact[name]).norm() < 0.3 * exact[name].norm(), name


@pytest.mark.parametrize("folded", [False, True])
@CASE
@CONFIGS
def test_a_saved_adapter_on_a_fresh_base_is_the_same_model(case, config, folded):
    model = tuned(case, config).eval()
    state = {name: tensor.clone() for name, tensor in adapter_state(model, folded=folded).items()}
    torch.manual_seed(77)
    fresh = apply_method(build(config), *CASES[case], fresh=False).eval()
    idx, _ = batch(config)
    assert not torch.equal(fresh(idx), model(idx))
    load_adapter_state(fresh, state)
    assert torch.equal(fresh(idx), model(idx))
    assert set(adapter_state(fresh)) == set(state)
    assert sum(p.numel() for p in fresh.parameters() if p.requires_grad) <= trainable_report(model)[0]
    _, gradients = loss_and_gradients(fresh, *batch(config))
    assert gradients and all(gradient.abs().sum() > 0 for gradient in gradients.values()), "it trains on"


def test_an_adapter_of_other_settings_is_refused_and_nothing_changes():
    model = tuned("lora", LLAMA)
    before = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    other = adapter_state(apply_method(build(LLAMA), "lora", LoraSettings(rank=3, targets=("q_proj",))))
    with pytest.raises(ValueError, match=re.escape("the adapter lacks h.0.attn.k_proj.lora_A")):
        load_adapter_state(model, other)
    with pytest.raises(ValueError, match=r"holds, unknown to this model's .* h\.0\.mlp\.gate_proj\.lora_A"):
        load_adapter_state(model, before | {"h.0.mlp.gate_proj.lora_A": torch.zeros(3, 32)})
    wide = adapter_state(apply_method(build(LLAMA), "lora", LoraSettings(rank=4, targets=EVERY)))
    with pytest.raises(ValueError, match=re.escape("h.0.attn.q_proj.lora_A is (4, 32), the model's (3, 32)")):
        load_adapter_state(model, wide)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter_state(model).items())


@pytest.mark.parametrize("case", ["qlora-nf4", "adapter", "prefix", "p_tuning-mlp"])
def test_what_can_not_be_merged_says_why(case):
    model = tuned(case, LLAMA)
    with pytest.raises(ValueError, match="quantised" if "qlora" in case else "only LoRA can be merged"):
        merge(model)
    with pytest.raises(ValueError, match="no LoRA to merge"):
        merge(build(LLAMA))


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in ("dora-pissa", "houlsby", "p_tuning-mlp")]


@pytest.mark.parametrize("case", ["lora", "qlora-nf4", "prefix", *SLOW])
def test_compiled_is_eager(case):
    config = dataclasses.replace(LLAMA, n_layer=1, mlp_dim=32)
    model = tuned(case, config).eval()
    idx, targets = batch(config)
    loss, gradients = loss_and_gradients(model, idx, targets)
    torch.compiler.reset()
    assert torch._dynamo.explain(model.hidden)(idx).graph_break_count == 0
    compiled = torch.compile(model, backend="eager")
    model.zero_grad()
    again = compiled(idx, targets)
    again.backward()
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-4)
    torch.compiler.reset()


@CASE
def test_a_copy_of_the_model_is_its_own(case):
    model = tuned(case, LLAMA).eval()
    idx, _ = batch(LLAMA)
    expected, other = model(idx), copy.deepcopy(model)
    assert torch.equal(other(idx), expected)
    train_a_little(other)
    assert torch.equal(model(idx), expected) and not torch.equal(other(idx), expected)


def test_methods_that_train_the_model_itself():
    model = apply_method(build(LLAMA), "freeze", FreezeSettings(n_layer=1))
    _, gradients = loss_and_gradients(model, *batch(LLAMA))
    last = {name for name in dict(model.named_parameters()) if name.startswith(("h.2.", "ln_f."))}
    assert set(gradients) == last and adapter_state(model) == {}
    apply_method(model, "full")
    assert all(p.requires_grad for p in model.parameters())
    for wrong in (0, 4, True, 1.0):
        with pytest.raises(ValueError, match="give 1 to 3"):
            apply_method(model, "freeze", FreezeSettings(n_layer=wrong))


def test_freeze_all_but_takes_modules_and_parameters_by_whole_names():
    model = build(LLAMA)
    freeze_all_but(model, ["h.1.attn", "ln_f.weight"])
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"h.1.attn.{x}_proj.weight" for x in "qkvo"} | {"ln_f.weight"}
    with pytest.raises(ValueError, match=re.escape("no parameter is named 'h.1.att': did you mean 'h.1.attn")):
        freeze_all_but(model, ["h.1.att"])
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown finetune_method 'ptuning': did you mean 'p_tuning'\?"):
        apply_method(build(LLAMA), "ptuning")
    assert set(METHODS) == {"full", "progressive", "freeze", "lora", "qlora", "adapter", "prefix", "p_tuning"}


@CASE
def test_settings_survive_json(case):
    method, settings = CASES[case]
    values = json.loads(json.dumps(settings_to_dict(settings)))
    assert settings_from_dict(method, values) == settings
    with pytest.raises(ValueError, match=f"unknown {method} setting 'lengthh'"):
        settings_from_dict(method, values | {"lengthh": 3})
    if method == "qlora":
        with pytest.raises(ValueError, match="LoRA rank is 0"):
            settings_from_dict(method, values | {"lora": {"rank": 0}})


@pytest.mark.parametrize("method", ["adapter", "prefix", "p_tuning"])
def test_a_method_is_not_put_on_itself(method):
    model = apply_method(build(GPT2), method)
    with pytest.raises(ValueError, match="already: start from"):
        apply_method(model, method)


def test_the_line_of_trainable_parameters():
    model = apply_method(build(LLAMA), "lora", LoraSettings(rank=2, targets=("q_proj",)))
    total = build(LLAMA).num_params()
    trainable = 3 * 2 * (32 + 32)
    assert trainable_report(model) == (trainable, total + trainable)
    share = 100 * trainable / (total + trainable)
    assert trainable_line(model) == (
        f"trainable params: {trainable} || all params: {(total + trainable) // 1000},{(total + trainable) % 1000:03} "
        f"|| trainable%: {share:.4f}"
    )
    quantized = apply_method(build(LLAMA), "qlora", QLoraSettings(lora=LoraSettings(rank=2, targets=("q_proj",))))
    assert trainable_report(quantized) == trainable_report(model)
