"""Bottleneck adapters: where they sit, what they compute, what their settings refuse."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from model.adapters import AdapterSettings, Bottleneck, apply_adapters
from model.gpt import GPT
from tests.model_helpers import LLAMA, UNBALANCED, batch, build
from tests.test_model_lora import train_a_little


def adapter(x, module):
    inner = F.relu(x @ module.down.weight.t() + module.down.bias)
    return x + inner @ module.up.weight.t() + module.up.bias


def block_by_hand(block, x, shared):
    """The residual sums of a block, with its adapters where the paper and the tutorial put them."""
    for norm, layer in ((block.ln_1, block.attn), (block.ln_2, block.mlp)):
        inputs = (norm(x), shared) if layer is block.attn else (norm(x),)
        out = type(layer).forward(layer, *inputs)
        x = x + (adapter(out, layer.adapter) if hasattr(layer, "adapter") else out)
    return adapter(x, block.adapter) if hasattr(block, "adapter") else x


@pytest.mark.parametrize("placement", ["block", "houlsby"])
def test_places(placement):
    model = train_a_little(apply_adapters(build(LLAMA), AdapterSettings(dim=6, placement=placement))).eval()
    seen = {}
    block = model.h[1]
    block.register_forward_pre_hook(lambda module, args: seen.update(args=args))
    block.register_forward_hook(lambda module, args, out: seen.update(out=out))
    model(batch(LLAMA)[0])
    torch.testing.assert_close(seen["out"], block_by_hand(block, *seen["args"]))
    names = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("h.1.")}
    where = ["h.1.adapter"] if placement == "block" else ["h.1.attn.adapter", "h.1.mlp.adapter"]
    assert names == {
        f"{place}.{which}" for place in where for which in ("down.weight", "down.bias", "up.weight", "up.bias")
    }


def test_absent_sub_layers_have_none():
    config = dataclasses.replace(LLAMA, **UNBALANCED)
    model = apply_adapters(build(config), AdapterSettings(placement="houlsby"))
    hosts = [name for name, module in model.named_modules() if isinstance(module, Bottleneck)]
    assert hosts == ["h.0.attn.adapter", "h.0.mlp.adapter", "h.1.mlp.adapter", "h.2.attn.adapter"]


def test_dropout_is_on_the_bottleneck():
    module = Bottleneck(8, AdapterSettings(dim=2000, dropout=0.25))
    torch.nn.init.zeros_(module.down.weight), torch.nn.init.ones_(module.down.bias)
    torch.nn.init.constant_(module.up.weight, 1 / 2000)
    x = torch.zeros(4, 8)
    torch.testing.assert_close(module.eval()(x), torch.ones(4, 8))
    kept = module.train()(x)
    assert (kept[:, :1] == kept).all() and (kept - 1).abs().max() < 0.06 and len(kept[:, 0].unique()) > 1


def test_the_defaults_are_the_documents():
    settings = AdapterSettings()
    assert (settings.dim, settings.dropout, settings.placement) == (64, 0.1, "block")
    with torch.device("meta"):
        model = GPT(LLAMA)
    trained = sum(p.numel() for p in apply_adapters(model, settings).parameters() if p.requires_grad)
    assert trained == LLAMA.n_layer * (2 * 32 * 64 + 32 + 64)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("dim", 0, "at least 1"),
        ("dim", "64", "at least 1"),
        ("dropout", 1.0, "below 1"),
        ("dropout", None, "below 1"),
        ("placement", "after", "block, houlsby"),
    ],
)
def test_settings_out_of_range(name, value, wanted):
    with pytest.raises(ValueError, match=wanted):
        AdapterSettings(**{name: value})
