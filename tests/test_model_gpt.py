"""The network: names, initialisation, per-layer sizes, the loss, dropout, freezing, recomputation."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from model.config import padded_vocab, preset
from model.gpt import GPT
from tests.model_helpers import FAMILIES, GPT2, LLAMA, UNBALANCED, batch, build, loss_and_gradients


def plain_loss(model, idx, targets):
    logits = model(idx)[..., : model.config.vocab_size]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


# Names and sizes

ATTENTION = [f"attn.{p}_proj" for p in "qkvo"]


def names(layer, modules, kinds):
    return [f"h.{layer}.{module}.{kind}" for module in modules for kind in kinds]


def test_state_dict_names_gpt2():
    both = ("weight", "bias")
    wanted = ["wte.weight", "wpe.weight"]
    for i in range(3):
        wanted += names(i, ["ln_1", *ATTENTION, "ln_2", "mlp.up_proj", "mlp.down_proj"], both)
    assert list(GPT(GPT2).state_dict()) == [*wanted, "ln_f.weight", "ln_f.bias"]


def test_state_dict_names_llama_with_its_own_head_and_absent_sub_layers():
    config = dataclasses.replace(LLAMA, tie_embeddings=False, **UNBALANCED)
    mlp = ["ln_2", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    wanted = ["wte.weight", *names(0, ["ln_1", *ATTENTION, *mlp], ["weight"])]
    wanted += [*names(1, mlp, ["weight"]), *names(2, ["ln_1", *ATTENTION], ["weight"])]
    assert list(GPT(config).state_dict()) == [*wanted, "ln_f.weight", "lm_head.weight"]


@pytest.mark.parametrize("bias", ["qkv_bias", "o_bias", "mlp_bias", "norm_bias"])
def test_each_bias_is_its_own_choice(bias):
    config = dataclasses.replace(
        GPT2, **{f"{part}_bias": f"{part}_bias" == bias for part in ("qkv", "o", "mlp", "norm")}
    )
    wanted = {
        "qkv_bias": {"attn.q_proj", "attn.k_proj", "attn.v_proj"},
        "o_bias": {"attn.o_proj"},
        "mlp_bias": {"mlp.up_proj", "mlp.down_proj"},
        "norm_bias": {"ln_1", "ln_2"},
    }[bias]
    found = {
        name.split(".", 2)[2].removesuffix(".bias")
        for name in GPT(config).state_dict()
        if name.endswith(".bias") and name.startswith("h")
    }
    assert found == wanted


def test_parameter_counts_are_those_of_gpt2():
    with torch.device("meta"):
        model = GPT(preset("124M", padded_vocab_size=50_257))
        assert model.num_params() == 124_439_808  # the published checkpoint's
        assert model.num_params(non_embedding=True) == 124_439_808 - 50_257 * 768 - 1024 * 768
        assert GPT(preset("1558M", padded_vocab_size=50_257)).num_params() == 1_557_611_200
        untied = GPT(preset("124M", tie_embeddings=False))
    assert untied.num_params() - untied.num_params(non_embedding=True) == (2 * 50_304 + 1024) * 768


def test_flops_count_what_is_multiplied():
    model = GPT(dataclasses.replace(LLAMA, norm_bias=False, **UNBALANCED))
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2)  # the tied table is the head
    norms = 5 * 32
    assert model.flops_per_token(16) == 6 * (matrices + norms) + 12 * (4 + 2) * 8 * 16


# Initialisation


def test_initialisation_is_gpt2s():
    model = GPT(preset("tiny", vocab_size=257))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert p.std().item() == pytest.approx(0.02 / (8**0.5) if residual else 0.02, rel=0.03), name
            assert abs(p.mean().item()) < 3e-4, name


def test_init_weights_with_a_generator_repeats_itself():
    first, second = GPT(GPT2), build(GPT2)
    for model in (first, second):
        model.init_weights(torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_a_model_can_be_made_without_memory_and_filled_afterwards():
    source = build(LLAMA)
    with torch.device("meta"):
        model = GPT(LLAMA)
    model.load_state_dict(source.state_dict(), assign=True)
    idx, _ = batch(LLAMA)
    assert torch.equal(model(idx), source(idx))


# Per-layer sizes


@FAMILIES
def test_per_layer_sizes_train_and_absent_sub_layers_equal_silenced_ones(config):
    small = dataclasses.replace(
        config, n_head=(4, 0, 4), n_kv_head=(config.n_kv_head, 0, config.n_kv_head), mlp_dim=(48, 48, 0)
    )
    pruned, full = build(small), build(config)
    kept = full.load_state_dict(pruned.state_dict(), strict=False)
    assert not kept.unexpected_keys and {name.split(".")[1] for name in kept.missing_keys} == {"1", "2"}
    with torch.no_grad():
        for module in (full.h[1].attn.o_proj, full.h[2].mlp.down_proj):
            for p in module.parameters():
                p.zero_()
    idx, targets = batch(config)
    torch.testing.assert_close(pruned(idx), full(idx))
    _, gradients = loss_and_gradients(pruned, idx, targets)
    assert set(gradients) == {name for name, _ in pruned.named_parameters()}


@FAMILIES
def test_unbalanced_widths(config):
    heads = {"n_head": (4, 0, 2), "n_kv_head": (2, 0, 1), "mlp_dim": (24, 40, 0)}
    model = build(dataclasses.replace(config, **heads))
    assert model.h[2].attn.q_proj.weight.shape == (16, 32) and model.h[2].attn.k_proj.weight.shape == (8, 32)
    assert model.h[1].mlp.up_proj.weight.shape == (40, 32) and model.h[1].attn is None
    idx, targets = batch(config)
    loss, gradients = loss_and_gradients(model, idx, targets)
    assert torch.isfinite(loss) and all(g.any() for g in gradients.values())


# Forward: logits, loss, padded ids, limits


@FAMILIES
def test_loss_is_the_sum_over_supervised_tokens(config):
    model = build(config)
    idx, targets = batch(config)
    loss, ours = loss_and_gradients(model, idx, targets)
    wanted = plain_loss(model, idx, targets)
    torch.testing.assert_close(loss, wanted.detach())
    model.zero_grad()
    wanted.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@FAMILIES
def test_a_tied_table_gets_both_gradients(config):
    model = build(config)
    idx, targets = batch(config)
    _, ours = loss_and_gradients(model, idx, targets)
    untied = GPT(dataclasses.replace(config, tie_embeddings=False))
    untied.load_state_dict({**model.state_dict(), "lm_head.weight": model.wte.weight})
    _, apart = loss_and_gradients(untied, idx, targets)
    torch.testing.assert_close(ours["wte.weight"], apart["wte.weight"] + apart["lm_head.weight"])
    torch.testing.assert_close(ours["h.0.ln_1.weight"], apart["h.0.ln_1.weight"])


def test_a_tied_table_accumulates_over_micro_batches():
    model = build(GPT2)
    idx, targets = batch(GPT2, B=4)
    _, whole = loss_and_gradients(model, idx, targets)
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        model(idx[rows], targets[rows]).backward()
    torch.testing.assert_close(model.wte.weight.grad, whole["wte.weight"], atol=1e-4, rtol=1e-4)


@FAMILIES
def test_padded_ids_have_no_logit_and_logits_can_be_asked_for_some_positions(config):
    model = build(config)
    idx, _ = batch(config)
    logits = model(idx)
    assert logits.shape == (2, 20, padded_vocab(97))
    assert (logits[..., 97:] == float("-inf")).all() and torch.isfinite(logits[..., :97]).all()
    torch.testing.assert_close(model(idx, logits_for="last"), logits[:, -1:])
    chosen = model(idx, logits_for=torch.tensor([3, 11]))
    torch.testing.assert_close(chosen[:, 0], torch.stack([logits[0, 3], logits[1, 11]]))


def test_a_context_that_is_too_long_is_refused():
    idx, _ = batch(GPT2, T=33)
    with pytest.raises(ValueError, match="33 tokens do not fit the model's context of 32"):
        GPT(GPT2)(idx)


@FAMILIES
def test_positions_given_as_they_are_change_nothing_and_others_do(config):
    model = build(config)
    idx, _ = batch(config)
    plain = model(idx)
    torch.testing.assert_close(model(idx, positions=torch.arange(20)), plain)
    torch.testing.assert_close(model(idx, positions=torch.arange(20).expand(2, 20)), plain)
    spread = model(idx, positions=torch.cat([torch.arange(10), torch.arange(20, 30)]))
    torch.testing.assert_close(spread[:, :10], plain[:, :10])
    assert not torch.allclose(spread[:, 10:], plain[:, 10:], atol=1e-3)


@FAMILIES
def test_autocast_bf16_is_near_fp32(config):
    model = build(config)
    idx, targets = batch(config)
    exact, _ = loss_and_gradients(model, idx, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(idx, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and loss != exact
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


# Dropout, recomputation, freezing


@FAMILIES
def test_dropout_follows_torchs_random_state_and_the_mode(config):
    model = build(dataclasses.replace(config, dropout=0.3))
    idx, targets = batch(config)

    def run(seed):
        torch.manual_seed(seed)
        return loss_and_gradients(model, idx, targets)[0].item()

    assert run(1) == run(1) != run(2)
    model.eval()
    assert run(1) == run(2)


@pytest.mark.parametrize("place", ["embedding", "attention", "after attention", "after mlp"])
def test_each_dropout_of_gpt2_is_there(place, monkeypatch):
    sizes = {"n_layer": 1, "dropout": 0.3}
    if place != "after mlp":
        sizes["mlp_dim"] = 0
    if place not in ("attention", "after attention"):
        sizes |= {"n_head": 0, "n_kv_head": 0}
    model = build(dataclasses.replace(GPT2, **sizes))
    if place != "embedding":
        monkeypatch.setattr(model, "config", dataclasses.replace(model.config, dropout=0.0))
    if place in ("embedding", "attention"):
        model.h[0].dropout = 0.0
    if place == "after attention":
        model.h[0].attn.dropout = 0.0
    idx, _ = batch(GPT2)
    assert not torch.equal(model(idx), model(idx))


@FAMILIES
def test_gradient_checkpointing_changes_no_bit(config):
    model = build(dataclasses.replace(config, dropout=0.2))
    idx, targets = batch(config)
    runs = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(3)
        runs.append((*loss_and_gradients(model, idx, targets), torch.get_rng_state()))
    (loss, gradients, state), (again, gradients_again, state_again) = runs
    assert torch.equal(loss, again) and torch.equal(state, state_again)
    assert all(torch.equal(g, gradients_again[name]) for name, g in gradients.items())


def saved_elements(model, idx, targets):
    """How many numbers autograd keeps for backward, parameters aside."""
    kept, parameters = {}, {p.data_ptr() for p in model.parameters()}

    def pack(t):
        if t.data_ptr() not in parameters and t.is_floating_point():
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(idx, targets)
    return sum(kept.values()), loss


@FAMILIES
def test_less_is_kept_with_checkpointing_and_the_mlp_activation_never(config):
    model = build(dataclasses.replace(config, mlp_dim=512))
    idx, targets = batch(config)
    tokens = idx.numel()
    kept, loss = saved_elements(model, idx, targets)
    widths = 2 if config.mlp == "swiglu" else 1  # gate and up, or up alone; not what is made from them
    assert kept < tokens * (widths * 512 + 16 * config.n_embd) * config.n_layer
    assert loss.requires_grad
    model.gradient_checkpointing = True
    assert saved_elements(model, idx, targets)[0] < kept / 3


@FAMILIES
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_backward_stops_at_the_lowest_trainable_parameter(config, dropout):
    model = build(dataclasses.replace(config, dropout=dropout, tie_embeddings=False))
    for module in (model.wte, model.wpe, model.h[0], model.h[1]):
        if module is not None:
            module.requires_grad_(False)
    seen = []
    for block in model.h:
        block.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    idx, targets = batch(config)
    _, gradients = loss_and_gradients(model, idx, targets)
    assert seen == [False, False, True]
    assert gradients and all(name.startswith(("h.2", "ln_f", "lm_head")) for name in gradients)


def test_a_tied_and_frozen_table_lets_the_graph_start_above_it():
    model = build(GPT2)
    for module in (model.wte, model.wpe, model.h[0]):
        module.requires_grad_(False)
    seen = []
    model.h[0].register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    idx, targets = batch(GPT2)
    _, gradients = loss_and_gradients(model, idx, targets)
    assert seen == [False] and "h.1.ln_1.weight" in gradients and "wte.weight" not in gradients


@pytest.mark.slow
@FAMILIES
def test_a_compiled_training_step_gives_the_same_loss_and_gradients(config):
    model = build(config)
    idx, targets = batch(config)
    plain, gradients = loss_and_gradients(model, idx, targets)
    model.compile()
    compiled, gradients_compiled = loss_and_gradients(model, idx, targets)
    torch.testing.assert_close(compiled, plain)
    for name, g in gradients.items():
        torch.testing.assert_close(gradients_compiled[name], g, atol=1e-4, rtol=1e-4)
    assert list(model.state_dict()) == list(build(config).state_dict())


@FAMILIES
def test_losses_of_positions_at_a_temperature_are_those_of_its_logits(config):
    model = build(config)
    idx, targets = batch(config)
    for temperature in (1.0, 0.7):
        losses = model(idx, targets, reduction="none", temperature=temperature)
        logits = model(idx)[..., : config.vocab_size] / temperature
        wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        torch.testing.assert_close(losses, wanted)
        ours, theirs = (torch.autograd.grad((each**2).sum(), list(model.parameters())) for each in (losses, wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
