"""The published families: which of them can express a network, and its config.json in their words."""

from __future__ import annotations

from typing import Any

from model.config import GPTConfig

ESPALIER = "espalier"  # the model_type of a network that no published family can express
# model_type -> the class of its language model.
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    ESPALIER: "EspalierForCausalLM",
}


def family_of(config: GPTConfig) -> str:
    """The model_type that can express the network exactly; "espalier" where no published family can."""
    layers = [config.layer(i) for i in range(config.n_layer)]
    if len(set(layers)) > 1 or not layers[0].n_head or not layers[0].mlp_dim:
        return ESPALIER
    style = (config.position, config.norm, config.mlp)
    biases = (config.qkv_bias, config.o_bias, config.mlp_bias)
    if style == ("learned", "layernorm", "gelu"):
        fits = all(biases) and config.norm_bias and not config.qk_norm and layers[0].n_head == layers[0].n_kv_head
        return "gpt2" if fits and layers[0].n_head * config.head_dim == config.n_embd else ESPALIER
    if style != ("rope", "rmsnorm", "swiglu"):
        return ESPALIER
    if config.qk_norm:
        return "qwen3" if biases in ((False, False, False), (True, True, False)) else ESPALIER
    if biases == (True, False, False):
        return "qwen2"
    if config.qkv_bias != config.o_bias:
        return ESPALIER
    if config.n_embd % layers[0].n_head:  # transformers refuses such a Llama, though head_dim is given
        return ESPALIER if any(biases) else "mistral"
    return "llama"


def from_gpt_config(config: GPTConfig) -> dict[str, Any]:
    """The config.json of a network: `family_of` it, with every key that its family has.

    Rotary positions are written as `rope_theta` and `rope_scaling`, which transformers 4 and 5 both read. "espalier"
    has GPTConfig's own names, with one number per layer where sizes differ.
    """
    model_type = family_of(config)
    head = {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type, "dtype": "float32"}
    if model_type == ESPALIER:
        values = config.to_dict()
        del values["padded_vocab_size"]
        return {**head, **values}
    if model_type == "gpt2":
        return {**head, **_gpt2_keys(config)}
    return {**head, **_llama_like_keys(config, model_type)}


def _gpt2_keys(config: GPTConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.mlp_dim,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "tie_word_embeddings": config.tie_embeddings,
    }


def _llama_like_keys(config: GPTConfig, model_type: str) -> dict[str, Any]:
    keys = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if model_type in ("llama", "qwen3"):
        keys["attention_bias"] = config.qkv_bias
    if model_type == "llama":
        keys["mlp_bias"] = config.mlp_bias
    if model_type == "mistral":
        keys["sliding_window"] = None
    if model_type.startswith("qwen"):
        keys["use_sliding_window"] = False
    return keys
