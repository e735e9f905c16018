"""Made ready for generation: joined matrices give the same numbers, int8 nearly the same."""

import copy
import dataclasses
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.adapters import AdapterSettings, apply_adapters
from model.generate import generate
from model.gpt import Block
from model.lora import LoraSettings, apply_lora
from model.pack import PackedBlock, for_generation
from model.quantize import quantized_bytes
from tests.model_helpers import FAMILIES, GPT2, LLAMA, UNBALANCED, batch, build


@FAMILIES
@pytest.mark.parametrize("uneven", [False, True])
@torch.inference_mode()
def test_joined_layers_change_nothing(config, uneven):
    config = dataclasses.replace(config, **UNBALANCED) if uneven else config
    model = build(config)
    packed = for_generation(copy.deepcopy(model))
    assert not any(name.endswith(("q_proj.weight", "gate_proj.weight")) for name, _ in packed.named_parameters())
    idx, _ = batch(config, T=12)
    torch.testing.assert_close(packed(idx), model(idx), atol=1e-5, rtol=1e-5)
    how = {"max_new_tokens": 24, "temperature": 0.0}
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert generate(packed, prompts, **how) == generate(model, prompts, **how)


@FAMILIES
@torch.inference_mode()
def test_int8_is_near_and_small_and_reads_its_codes_as_it_dequantises_them(config):
    model = build(config)
    int8 = for_generation(copy.deepcopy(model), "int8")
    idx, _ = batch(config, B=2, T=12)
    exact, near = model(idx)[..., : config.vocab_size], int8(idx)[..., : config.vocab_size]
    assert (near - exact).abs().mean() < 0.05 * exact.std()
    assert all(type(block) is PackedBlock for block in int8.h)
    few = torch.cat([int8(row.unsqueeze(0)) for row in idx])  # 12 rows: the codes as they lie
    many = int8(idx.repeat(4, 1))[:2]  # 96 rows: as a prompt
    apart = (few - many)[..., : config.vocab_size].abs()  # both may round what they multiply to bf16, at other places
    assert apart.mean() < 0.015 * exact.std() and apart.max() < 0.1 * exact.std()
    held, dense = quantized_bytes(int8)
    assert held < 0.3 * dense


@pytest.mark.parametrize("placement", ["block", "houlsby"])
@torch.inference_mode()
def test_adapters_are_not_lost(placement):
    model = apply_adapters(build(LLAMA), AdapterSettings(dim=4, placement=placement)).eval()
    for name, parameter in model.named_parameters():
        if "adapter.up" in name:
            torch.nn.init.normal_(parameter)
    idx, _ = batch(LLAMA, T=8)
    before = model(idx)
    torch.testing.assert_close(for_generation(model)(idx), before, atol=1e-5, rtol=1e-5)


def test_what_something_was_added_to_stays_as_it_is():
    model = apply_lora(build(LLAMA), LoraSettings(targets=("q_proj",))).eval()
    idx, _ = batch(LLAMA, T=8)
    with torch.inference_mode():
        before = model(idx)
        packed = for_generation(model)
        assert type(packed.h[0]) is Block
        torch.testing.assert_close(packed(idx), before, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="merge it first"):
        for_generation(apply_lora(build(GPT2), LoraSettings(targets=("q_proj",))), "int8")
    with pytest.raises(ValueError, match="choose one of float32, int8, sparse"):
        for_generation(build(GPT2), "int4")


_HELD = """
import dataclasses
from model.gpt import GPT
from model.pack import for_generation
from tests.measured_memory import memory
from tests.model_helpers import GPT2
model = GPT(dataclasses.replace(GPT2, n_layer=8, n_head=8, n_kv_head=8, head_dim=64, n_embd=512, mlp_dim=2048))
weights = sum(p.numel() * p.element_size() for p in model.h.parameters())
before = memory("VmRSS")
for_generation(model, "int8")
print((before - memory("VmRSS")) / weights)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another heap")
def test_what_int8_saves_is_given_back_to_the_system():
    """A quarter of the weights stays, and what else was loaded to quantise them."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", _HELD], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.5
