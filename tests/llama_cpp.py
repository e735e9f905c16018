"""llama.cpp as a second opinion on GGUF files, through PyPI's xllamacpp, in a process of its own: it may crash.

answers = greedy(path, ["text", [1, 2, 3]], 16)         # one Answer per prompt (text or ids)
"""

import json
import subprocess
import sys
from typing import NamedTuple

import pytest


class Answer(NamedTuple):
    """What llama.cpp made of one prompt."""

    prompt_tokens: int
    ids: list[int]
    logprobs: list[float]  # of the chosen tokens
    text: str


def greedy(path, prompts, count, timeout=60):
    """The `count` likeliest tokens, one after the other, up to the first that ends a text; float32, on one thread."""
    pytest.importorskip("xllamacpp")
    command = [sys.executable, __file__, str(path), json.dumps(prompts), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    lines = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert done.returncode == 0 and len(lines) == len(prompts), done.stderr[-3000:]
    return [Answer(**json.loads(line)) for line in lines]


def _main(path, prompts, count):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 512, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    for prompt in prompts:
        request = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "n_probs": 1}
        reply = server.handle_completions({**request, "cache_prompt": False})
        choice = reply["choices"][0]
        tokens = (choice["logprobs"] or {"content": []})["content"]  # none where a character is not whole yet
        answer = {
            "prompt_tokens": reply["usage"]["prompt_tokens"],
            "ids": [token["id"] for token in tokens],
            "logprobs": [token["logprob"] for token in tokens],
            "text": choice["text"],
        }
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
