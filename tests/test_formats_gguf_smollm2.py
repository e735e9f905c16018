"""A published GGUF file (SmolLM2-135M-Instruct, Q4_1) read here, by transformers and by llama.cpp."""

import pytest
import torch

from data.tokenizer import tokenizer_from_spec
from formats.gguf_read import read_gguf
from formats.gguf_write import write_gguf
from formats.open_model import build_model
from model.cache import KVCache
from tests import llama_cpp
from tests.smollm2 import smollm2  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three primary colours are",
    "To bake bread, you first",
    "In 1969, the first",
    "Q: What is 12 + 30?\nA:",
    "The opposite of cold is",
    "Shakespeare wrote",
    "import numpy as np\n\n",
    "Dear Sir or Madam,\n\n",
    "The mitochondria are",
    "A list of fruits:\n- apple\n-",
    "Gravity is the force that",
    "My favourite season is",
    "SELECT name FROM",
    "The train leaves at 9:45 and",
    "Photosynthesis turns",
    "El perro corre por",
]


@pytest.fixture(scope="module")
def opened(smollm2):  # noqa: F811
    payload = read_gguf(smollm2)
    return payload, build_model(payload, smollm2).eval(), tokenizer_from_spec(payload["tokenizer"])


def greedy(model, ids, count):
    """The `count` likeliest tokens after `ids`, one after the other."""
    cache = KVCache(1, len(ids) + count)
    step, found = torch.tensor([ids]), []
    with torch.no_grad():
        for _ in range(count):
            found.append(int(model(step, cache=cache, logits_for="last")[0, -1].argmax()))
            step = torch.tensor([found[-1:]])
    return found


def test_logits_and_greedy_tokens_are_those_of_transformers(smollm2, opened):  # noqa: F811
    transformers = pytest.importorskip("transformers")
    _, model, tokenizer = opened
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    ids = torch.randint(49152, (2, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    for prompt in PROMPTS:
        start = tokenizer.encode(prompt)
        answer = theirs.generate(
            torch.tensor([start]), max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
        )
        assert greedy(model, start, 64) == answer[0, len(start) :].tolist(), prompt


def test_the_exported_file_says_the_same_through_llama_cpp(tmp_path, opened):
    payload, model, tokenizer = opened
    report = write_gguf(payload, tmp_path / "m.gguf")
    assert report["largest_difference"] == 0.0 and report["notes"] == []
    answers = llama_cpp.greedy(tmp_path / "m.gguf", PROMPTS, 64, timeout=600)
    said = 0
    for prompt, answer in zip(PROMPTS, answers):
        start = tokenizer.encode(prompt)
        assert answer.prompt_tokens == len(start)
        ours = greedy(model, start, 64)
        end = next((place for place, token in enumerate(ours) if token in tokenizer.special_tokens.values()), 64)
        assert answer.text == tokenizer.decode(ours[:end]), prompt  # llama.cpp stops there
        said += end
    assert said > 500


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_smaller_exports_begin_alike(tmp_path, opened, dtype):
    payload, model, tokenizer = opened
    report = write_gguf(payload, tmp_path / "m.gguf", dtype)
    assert 0 < report["largest_difference"] < (0.002 if dtype == "f16" else 0.04)
    (answer,) = llama_cpp.greedy(tmp_path / "m.gguf", PROMPTS[:1], 8, timeout=600)
    assert answer.text == tokenizer.decode(greedy(model, tokenizer.encode(PROMPTS[0]), 8))
