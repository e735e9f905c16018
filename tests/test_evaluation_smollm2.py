"""A published model on WikiText-2: the perplexity of transformers, on the same windows."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from evaluation.evaluate import evaluate
from evaluation.settings import EvaluateSettings
from evaluation.texts import read_text
from formats.gguf_read import read_gguf
from formats.hf_write import write_huggingface
from tests.smollm2 import smollm2  # noqa: F401  (a fixture)

ROOT = Path(__file__).resolve().parent.parent
TEXT = Path(os.environ.get("ESPALIER_WIKITEXT2", ROOT.parent / "shared" / "data" / "wikitext2-test.txt"))
LENGTH, TOKENS = 512, 4 * 512


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "stride"), [("wikitext2:", LENGTH), ("", 192)])
def test_perplexity_equals_transformers(smollm2: Path, tmp_path: Path, recipe: str, stride: int) -> None:  # noqa: F811
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not TEXT.is_file():
        pytest.skip(f"{TEXT} is not there; ESPALIER_WIKITEXT2 can name WikiText-2's test text")
    write_huggingface(read_gguf(smollm2), tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    text = read_text(f"{recipe}{TEXT}").characters
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")(text[:20_000], return_tensors="pt").input_ids[:, :TOKENS]
    total, count, done = 0.0, 0, 0
    for begin in range(0, TOKENS, stride):
        end = min(begin + LENGTH, TOKENS)
        labels = ids[:, begin:end].clone()
        labels[:, : done - begin] = -100
        new = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += theirs(ids[:, begin:end], labels=labels).loss.item() * new
        count, done = count + new, end
        if end == TOKENS:
            break
    settings = EvaluateSettings(
        checkpoints=(str(smollm2),),
        input=(f"{recipe}{TEXT}",),
        block_size=LENGTH,
        stride=stride,
        max_tokens=TOKENS,
        batch_size=2,
    )
    (found,) = evaluate(settings)["results"]
    assert found["tokens"] == count
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
