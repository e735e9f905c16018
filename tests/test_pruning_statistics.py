"""Statistics of calibration text against what forward hooks and autograd say about the whole model."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from model.gpt import GPT
from model.pruning.statistics import SITE_OF, SITES, collect, gradients
from tests.model_helpers import FAMILIES, GPT2, LLAMA, QWEN3, UNBALANCED, build

WINDOWS = torch.randint(97, (5, 12), generator=torch.Generator().manual_seed(0))


def inputs_of(model, windows):
    """Every linear layer's inputs (tokens, in) in fp64, by name, from one forward through all of the model."""
    found, handles = {}, []

    def keep(name):
        def hook(module, args):
            found[name] = args[0].flatten(0, 1).double()

        return hook

    for name, module in model.named_modules():
        if name.split(".", 2)[-1] in SITE_OF:
            handles.append(module.register_forward_pre_hook(keep(name)))
    model.eval()
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    return found


def assert_same(statistics, inputs, layer, rtol=1e-5):
    for linear in SITE_OF:
        x = inputs.get(f"h.{layer}.{linear}")
        if x is None:
            continue
        site = statistics.of(linear)
        assert site.tokens == len(x)
        wanted = x.t() @ x / len(x)
        assert (site.second - wanted).abs().max() <= rtol * wanted.diagonal().max()
        torch.testing.assert_close(site.mean.double(), x.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(site.norms.double(), x.square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)


CONFIGS = [GPT2, LLAMA, QWEN3, dataclasses.replace(LLAMA, **UNBALANCED)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=["gpt2", "llama", "qwen3", "unbalanced"])
def test_moments_are_those_of_the_inputs_that_hooks_see(config, frozen):
    model = build(config)
    inputs = inputs_of(model, WINDOWS)
    layers = 0
    for layer, statistics in collect(model, WINDOWS, batch_size=2, frozen=frozen):
        assert layer == layers
        assert_same(statistics, inputs, layer)
        layers += 1
    assert layers == config.n_layer


def test_sites_of_absent_sub_layers_are_none():
    found = [statistics for _, statistics in collect(build(dataclasses.replace(LLAMA, **UNBALANCED)), WINDOWS)]
    present = [[getattr(statistics, site) is not None for site in SITES] for statistics in found]
    assert present == [[True] * 4, [False, False, True, True], [True, True, False, False]]
    with pytest.raises(AssertionError, match="absent"):
        found[1].of("attn.o_proj")


def test_a_block_without_any_sub_layer_has_no_influence():
    config = dataclasses.replace(LLAMA, n_head=(4, 0, 4), n_kv_head=(2, 0, 2), mlp_dim=(24, 0, 24))
    _, second, _ = [statistics for _, statistics in collect(build(config), WINDOWS)]
    assert second.influence == pytest.approx(0, abs=1e-6)
    assert gradients(build(config), WINDOWS).output.keys().isdisjoint({"h.1.attn.o_proj", "h.1.mlp.up_proj"})


def test_influence_is_one_minus_the_mean_cosine_over_the_block():
    model = build(LLAMA).eval()
    states = []
    for block in model.h:
        block.register_forward_hook(lambda m, args, y: states.append((args[0], y)))
    with torch.no_grad():
        model(WINDOWS)
    wanted = [1 - float(F.cosine_similarity(x, y, dim=-1).mean()) for x, y in states]
    found = [statistics.influence for _, statistics in collect(build(LLAMA), WINDOWS, batch_size=2)]
    assert found == pytest.approx(wanted, abs=1e-5)
    assert min(wanted) > 0.01


def test_later_layers_see_a_block_that_was_changed_in_place():
    model = build(LLAMA)
    dense = [statistics for _, statistics in collect(model, WINDOWS)]
    pruned = {}
    for layer, statistics in collect(model, WINDOWS, batch_size=3):
        pruned[layer] = statistics
        if layer == 0:
            model.h[0].mlp.down_proj.weight.data[:, ::2] = 0
    inputs = inputs_of(model, WINDOWS)
    for layer in (1, 2):
        assert_same(pruned[layer], inputs, layer)
        assert not torch.allclose(pruned[layer].mlp_in.second, dense[layer].mlp_in.second, rtol=1e-2)


@pytest.mark.parametrize("config", CONFIGS, ids=["gpt2", "llama", "qwen3", "unbalanced"])
def test_weighed_tokens_count_by_the_inverse_mean_square_of_the_stream_behind(config):
    model = build(config).eval()
    with torch.no_grad():
        model.wte.weight[WINDOWS[0, 0]] *= 100  # a massive token
    inputs, seen = inputs_of(model, WINDOWS), {}
    for i, block in enumerate(model.h):
        if block.ln_2 is not None:
            block.ln_2.register_forward_pre_hook(lambda m, args, i=i: seen.__setitem__((i, "attn"), args[0]))
        block.register_forward_hook(lambda m, args, y, i=i: seen.__setitem__((i, "mlp"), y))
    with torch.no_grad():
        model(WINDOWS)
    streams = dict(seen)  # as they are now: the hooks will see the batches of `collect` too
    for layer, statistics in collect(model, WINDOWS, weigh=True, batch_size=2):
        for linear in ("attn.q_proj", "attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            x = inputs.get(f"h.{layer}.{linear}")
            if x is not None:
                behind = streams.get((layer, linear[:4].rstrip(".")), streams[layer, "mlp"])
                weights = 1 / behind.flatten(0, 1).double().square().mean(dim=1, keepdim=True)
                site = statistics.of(linear)
                wanted = (weights * x).t() @ x / weights.sum()
                torch.testing.assert_close(site.second.double(), wanted, rtol=1e-3, atol=1e-5)
                mean = (weights * x).sum(0) / weights.sum()
                torch.testing.assert_close(site.mean.double(), mean, rtol=1e-3, atol=1e-5)


def test_sums_in_fp32_stay_exact_beside_massive_activations():
    """Inputs of 1e4 beside inputs of 1, as Llama's first tokens have: each moment right to 1e-5 of its own scale."""
    from model.pruning.statistics import _Moments

    x = torch.randn(4096, 24, generator=torch.Generator().manual_seed(0)) + 0.5
    x[0, 3] = x[7, 5] = 1e4
    moments = _Moments()
    for rows in x.view(64, 64, 24).split(2):
        moments.add(rows)
    site, exact = moments.finish(), x.double().t() @ x.double() / len(x)
    scale = exact.diagonal().sqrt()
    assert ((site.second - exact).abs() / torch.outer(scale, scale)).max() < 1e-5


class GatedLinear(torch.nn.Module):
    """o_proj or down_proj behind explicit gates (B, 1, in), and with a copy of its output's gradient."""

    def __init__(self, base, rows):
        super().__init__()
        self.base, self.gate = base, torch.ones(rows, 1, base.in_features, requires_grad=True)

    def forward(self, x):
        return self.base(x * self.gate)


def retain(outputs, name, y):
    y.retain_grad()
    outputs.setdefault(name, y)  # the first forward's: the MLP runs again in backward


@pytest.mark.parametrize("config", CONFIGS, ids=["gpt2", "llama", "qwen3", "unbalanced"])
def test_gradients_are_those_of_autograd_with_explicit_gates(config):
    model = build(config)
    found = gradients(model, WINDOWS, batch_size=2)
    wanted = build(config).eval()
    gates, outputs = {}, {}
    for name, module in list(wanted.named_modules()):
        local = name.split(".", 2)[-1]
        if local not in SITE_OF:
            continue
        module.register_forward_hook(lambda m, args, y, name=name: retain(outputs, name, y))
        if SITE_OF[local].endswith("_out"):
            parent, _, child = name.rpartition(".")
            gated = GatedLinear(module, len(WINDOWS))
            setattr(wanted.get_submodule(parent), child, gated)
            gates[name.removesuffix(local) + SITE_OF[local]] = gated.gate
    logits = wanted(WINDOWS)[:, :-1, :97]  # not the loss of `forward`, which may lay its batch out as one row
    F.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten(), reduction="sum").backward()
    assert found.gate.keys() == gates.keys() and found.output.keys() == outputs.keys()
    for name, gate in gates.items():
        torch.testing.assert_close(found.gate[name], gate.grad.squeeze(1), rtol=1e-3, atol=1e-5)
    for name, y in outputs.items():
        torch.testing.assert_close(found.output[name], y.grad.square().mean(dim=(0, 1)), rtol=1e-3, atol=1e-9)


@FAMILIES
def test_gradients_leave_the_model_as_it_was(config):
    model = build(config).train()
    model.gradient_checkpointing = True
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients(model, WINDOWS)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dropout_is_off_in_both_passes():
    model = build(dataclasses.replace(GPT2, dropout=0.5)).train()
    same = [[statistics.mlp_out.second for _, statistics in collect(model, WINDOWS)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*same))
    one, two = gradients(model, WINDOWS), gradients(model, WINDOWS)
    assert torch.equal(one.gate["h.0.mlp_out"], two.gate["h.0.mlp_out"])


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (2, 33), (8,)])
def test_windows_that_do_not_fit_are_refused(shape):
    windows = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match="calibration windows"):
        next(collect(GPT(GPT2), windows))
    with pytest.raises(ValueError, match="calibration windows"):
        gradients(GPT(GPT2), windows)
