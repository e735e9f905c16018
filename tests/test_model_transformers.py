"""The same numbers as transformers, in both families, on random weights: logits and gradients."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.model_helpers import GPT2, LLAMA, ROPE_LLAMA3, batch, build


def hugging_face_gpt2(model):
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    sizes = {"n_positions": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd}
    # Our attention may be wider or narrower than n_embd; GPT-2's may not.
    assert c.n_head * c.head_dim == c.n_embd
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=c.padded_vocab_size, n_inner=c.mlp_dim, **sizes)).eval()
    ours, state = model.state_dict(), {}
    for name in theirs.transformer.state_dict():
        layer, _, rest = name.rpartition(".attn.c_attn.")
        if layer:
            value = torch.cat([ours[f"{layer}.attn.{p}_proj.{rest}"] for p in "qkv"])
        else:
            new = name.replace("attn.c_proj", "attn.o_proj")
            value = ours[new.replace("mlp.c_fc", "mlp.up_proj").replace("mlp.c_proj", "mlp.down_proj")]
        state[name] = value.t() if value.dim() == 2 and ".c_" in name else value
    theirs.transformer.load_state_dict(state)
    return theirs


def hugging_face_llama(model):
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.padded_vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=c.mlp_dim,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            head_dim=c.head_dim,
            max_position_embeddings=c.block_size,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_theta": c.rope_theta, **(c.rope_scaling or {"rope_type": "default"})},
            tie_word_embeddings=c.tie_embeddings,
            attention_bias=c.qkv_bias,
            mlp_bias=c.mlp_bias,
        )
    ).eval()
    state = {}
    for name, value in model.state_dict().items():
        new = name.replace("h.", "model.layers.", 1) if name.startswith("h.") else name
        new = new.replace("ln_1", "input_layernorm").replace("ln_2", "post_attention_layernorm")
        new = new.replace(".attn.", ".self_attn.").replace("ln_f", "model.norm").replace("wte", "model.embed_tokens")
        state[new] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return theirs


def assert_same_as(theirs, model, embedding):
    """Logits, and the gradient that the (tied) embedding gets from a mean loss."""
    idx, targets = batch(model.config, T=32)
    targets = idx.clone()  # their loss shifts by one itself
    out = theirs(idx, labels=targets)
    ours = model(idx)
    V = model.config.vocab_size
    assert out.logits.std() > 0.3, "the logits must differ enough for the comparison to mean something"
    torch.testing.assert_close(ours[..., :V], out.logits[..., :V], atol=1e-4, rtol=0)
    # Their softmax runs over the padded ids too, so theirs is recomputed without them.
    F.cross_entropy(out.logits[:, :-1, :V].flatten(0, 1), targets[:, 1:].flatten()).backward()
    shifted = F.pad(targets[:, 1:], (0, 1), value=-100)
    model.zero_grad()
    (model(idx, shifted) / (shifted != -100).sum()).backward()
    torch.testing.assert_close(model.wte.weight.grad, embedding.weight.grad, atol=1e-5, rtol=1e-4)


def test_same_as_transformers_gpt2():
    model = build(GPT2).eval()
    theirs = hugging_face_gpt2(model)
    assert_same_as(theirs, model, theirs.transformer.wte)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_head": 4, "rope_theta": 500_000.0, "tie_embeddings": False},
        {"n_kv_head": 1, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": ROPE_LLAMA3, "head_dim": 16, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    ],
    ids=["default", "mha-untied", "mqa-linear", "llama3-biases-wide-heads"],
)
def test_same_as_transformers_llama(changes):
    model = build(dataclasses.replace(LLAMA, **changes)).eval()
    theirs = hugging_face_llama(model)
    assert_same_as(theirs, model, theirs.model.embed_tokens)
