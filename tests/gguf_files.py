"""Payloads of tiny networks of each GGUF architecture, and GGUF files altered in one point."""

import dataclasses

import numpy as np
import torch

from data.tokenizer import ByteTokenizer
from formats.gguf_header import read_gguf_header
from model.config import padded_vocab
from tests.model_helpers import GPT2, LLAMA, QWEN3, ROPE_LLAMA3, build


def variant(config, **changes):
    return dataclasses.replace(config, vocab_size=257, padded_vocab_size=padded_vocab(257), **changes)


BIASED = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
UNEVEN = {"n_head": (4, 0, 2), "n_kv_head": (2, 0, 1), "mlp_dim": (24, 40, 64)}
# Name -> (the architecture that it has in GGUF, the network).
NETWORKS = {
    "gpt2": ("gpt2", variant(GPT2)),
    "gpt2-untied": ("gpt2", variant(GPT2, tie_embeddings=False)),
    "llama": ("llama", variant(LLAMA)),
    "llama-untied-wide-heads": ("llama", variant(LLAMA, tie_embeddings=False, head_dim=12, rope_theta=5e5)),
    "llama-biases": ("llama", variant(LLAMA, **BIASED)),
    "llama3": ("llama", variant(LLAMA, rope_scaling=ROPE_LLAMA3)),
    "llama-linear": ("llama", variant(LLAMA, rope_scaling={"rope_type": "linear", "factor": 4.0})),
    "qwen2": ("qwen2", variant(LLAMA, qkv_bias=True, norm_eps=1e-6)),
    "qwen3": ("qwen3", variant(QWEN3, head_dim=16)),
    "deci": ("deci", variant(LLAMA, **UNEVEN)),
}


def payload(config, seed=0, tokenizer=None, template=None):
    """A checkpoint's payload as loading gives it: float32, the rows beyond the vocabulary zero."""
    weights = {name: tensor.clone() for name, tensor in build(config, seed).state_dict().items()}
    for name in ("wte.weight", "lm_head.weight"):
        if name in weights:
            weights[name][config.vocab_size :] = 0.0
    return {
        "format": 1,
        "config": config.to_dict(),
        "model": weights,
        "tokenizer": (tokenizer or ByteTokenizer()).spec(),
        "template": None if template is None else template.spec(),
        "in_memory": True,
    }


def greedy(model, ids, count):
    """(ids, logprobs) of the `count` likeliest tokens, one after the other."""
    ids, found = list(ids), []
    for _ in range(count):
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        ids.append(int(logprobs.argmax()))
        found.append(float(logprobs.max()))
    return ids[-count:], found


def alter(source, target, metadata=None, tensors=None):
    """A copy of a GGUF file in which keys and tensors (name -> (array, type)) are replaced, or left out where None."""
    import gguf

    header = read_gguf_header(source)
    keys = {**header.metadata, **(metadata or {})}
    writer = gguf.GGUFWriter(target, keys.pop("general.architecture") or "nothing")
    for key, value in keys.items():
        if isinstance(value, tuple):
            writer.add_array(key, list(value))
        elif value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, kind)
    raw = source.read_bytes()
    found = {
        name: (np.frombuffer(raw[info.start : info.stop], np.uint8).reshape(*info.shape[:-1], -1), info.type)
        for name, info in header.tensors.items()
    }
    for name, replaced in {**found, **(tensors or {})}.items():
        if replaced is not None:
            values, kind = replaced
            kind = gguf.GGMLQuantizationType[kind]
            shape = gguf.quant_shape_from_byte_shape(values.shape, kind)
            writer.add_tensor_info(name, shape, np.dtype(np.float32), values.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for replaced in {**found, **(tensors or {})}.values():
        if replaced is not None:
            writer.write_tensor_data(replaced[0])
    writer.close()
    return target


def floats(*shape):
    """Zeros of a shape, as the bytes of an F32 tensor."""
    return np.zeros(shape, np.float32).view(np.uint8), "F32"
