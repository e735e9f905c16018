"""Tiny networks, one of each family, and what the model tests do with them."""

import dataclasses

import pytest
import torch

from model.config import GPTConfig, preset
from model.gpt import GPT
from model.masks import Mask

GPT2 = preset("tiny", vocab_size=97, block_size=32, n_layer=3, n_head=4, n_kv_head=4, head_dim=8, n_embd=32, mlp_dim=48)
LLAMA = dataclasses.replace(
    preset("llama-tiny", vocab_size=97),
    **{f.name: getattr(GPT2, f.name) for f in dataclasses.fields(GPTConfig)[:9]} | {"n_kv_head": 2},
)
UNBALANCED = {"n_head": (4, 0, 2), "n_kv_head": (2, 0, 1), "mlp_dim": (24, 40, 0)}
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True)
FAMILIES = pytest.mark.parametrize("config", [GPT2, LLAMA, QWEN3], ids=["gpt2", "llama", "qwen3"])


def build(config, seed=0, spread=0.1):
    """A model whose biases, norms and projections are all far from their initial values, so that each matters."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model


def masks_of_zeros(model):
    """A mask for each matrix of the blocks that holds zeros, of just these."""
    masks = {name: Mask.of(w != 0) for name, w in model.named_parameters() if name.endswith("_proj.weight")}
    return {name: mask for name, mask in masks.items() if mask.sparsity}


def batch(config, B=2, T=20, seed=1, masked=0.2):
    g = torch.Generator().manual_seed(seed)
    idx = torch.randint(config.vocab_size, (B, T), generator=g)
    targets = torch.randint(config.vocab_size, (B, T), generator=g)
    targets[torch.rand(B, T, generator=g) < masked] = -100
    return idx, targets


def loss_and_gradients(model, *args, **kwargs):
    model.zero_grad()
    loss = model(*args, **kwargs)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
