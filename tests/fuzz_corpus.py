"""Inputs that a reader once failed on, by the reader's name, each with what came of it."""

from __future__ import annotations

import json
from typing import Any


def votes(**changes: Any) -> bytes:
    good = {"format": 1, "kind": "votes", "title": "t", "comparison": "c", "checkpoints": ["a", "b"], "rows": 4}
    return json.dumps({**good, "votes": [], **changes}).encode()


def config(**changes: Any) -> dict[str, Any]:
    sizes = {"block_size": 8, "vocab_size": 9, "padded_vocab_size": 128, "n_layer": 1, "n_head": 1, "n_kv_head": 1}
    return {**sizes, "head_dim": 4, "n_embd": 4, "mlp_dim": 4, **changes}


def peft(**changes: Any) -> bytes:
    return json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16.0, **changes}).encode()


def tokenizer(**changes: Any) -> bytes:
    end = {"id": 0, "content": "</s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    model = {"type": "BPE", "vocab": {"</s>": 0, "a": 1}, "merges": []}
    return json.dumps(
        {"version": "1.0", "added_tokens": [{**end, "normalized": False}], "model": model, **changes}
    ).encode()


def step(**changes: Any) -> bytes:
    return json.dumps({"step": 0, "loss": 1.0, **changes}).encode() + b"\n"


CASES: dict[str, list[Any]] = {
    "votes": [
        votes(votes=[{"row": 3, "shown": [1, 0]}]),  # KeyError: no choice
        votes(format="a" * 10_000),  # a message as long
    ],
    "GPTConfig": [
        config(n_layer=10**12),  # a list of 8 TB
        config(n_embd=10**30),  # TypeError of torch
        config(n_head=["a" * 10_000]),  # a message as long
        config(position=["rope"]),
        config(dropout="0.1"),  # TypeError: '<='
        config(position="rope", rope_scaling=[1]),  # TypeError of dict()
        config(position="rope", rope_scaling={"rope_type": ["linear"]}),  # TypeError: unhashable
        {**config(), "a" * 3000: 1},
    ],
    "mask": [
        {"shape": [8, 1 << 64], "block": [4, 4], "bits": None},
        {"shape": [0] * 3000, "block": [4, 4], "bits": None},  # a message as long
    ],
    "adapter_config.json": [
        peft(peft_type=[["LORA"]]),  # TypeError: unhashable
        peft(lora_dropout={"a": 0.0}),  # TypeError of float()
        peft(r=10**400),  # OverflowError
    ],
    "tokenizer.json": [
        tokenizer(decoder=["ByteLevel", True, True, True]),  # AttributeError: the library takes lists for objects
        tokenizer(model={"type": "BPE", "unk_token": "<unk>", "vocab": {"</s>": 0}, "merges": []}),  # bare Exception
        tokenizer(post_processor={"type": "TemplateProcessing", "single": "$A", "pair": "$A", "special_tokens": []}),
    ],
    "YAML": [
        b"[a, b]: 1\n",  # TypeError: unhashable
        b"a: " + b"[" * 3000,  # RecursionError
        b"&a [*a]: *a\n",
    ],
    "YAML of a search": [b"search:\n  max_lr: {low: 1e-5, high: 1e-3, step: " + b"a" * 10_000 + b"}\n"],
    "flags": [
        ["--max_lr", "a" * 10_000],  # a message as long
        ["--max_lr", *["1e-4"] * 300],
    ],
    "questions": [b'{"question": "a", "choices": {"text": ["x", "y"], "label": 3}, "answerKey": "B"}\n'],  # TypeError
    "prompts": [b'{"prompt": ' + b"[" * 5000 + b"\n"],  # RecursionError
    "live metrics": [step(loss=10**400), step(tokens=10**308)],  # OverflowError
    "page of metrics.jsonl": [step(loss=10**400), b"[" * 5000 + b"\n" + step()],
    "page of config.yaml": [
        b"a: &a [x, x, x, x, x, x, x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 8)) for c in range(ord("b"), ord("p"))),
        b"a: 2001-13-01\n",  # ValueError of datetime
    ],
    "config.json": [
        b'{"model_type": "llama", "rope_scaling": {"rope_type": "linear", "%s": 1}}' % (b"a" * 3000),
    ],
    "request of a completion": [b"[" * 5000, b'{"model": "a", "messages": [], "%s": 1}' % (b"a" * 10_000)],
    "records, Parquet": [b"PAR1" + b"\0" * 8, b"PAR1"],
}
