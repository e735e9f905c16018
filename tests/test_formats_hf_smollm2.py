"""A published model, from its GGUF file to a Hugging Face folder that transformers opens as the same model."""

import pytest
import torch

from data.chat import render_conversation
from data.templates import template_from_spec
from data.tokenizer import tokenizer_from_spec
from formats.gguf_read import read_gguf
from formats.hf_read import read_huggingface
from formats.hf_write import write_huggingface
from formats.open_model import build_model
from model.generate import generate
from tests.smollm2 import smollm2  # noqa: F401  (a fixture)

TALK = [{"role": "user", "content": "Name three colours of the sky, and say when each is seen."}]


@pytest.mark.slow
def test_the_exported_folder_is_the_same_model_in_transformers(smollm2, tmp_path):  # noqa: F811
    from transformers import AutoModelForCausalLM, AutoTokenizer

    payload = read_gguf(smollm2)
    report = write_huggingface(payload, tmp_path / "out", shard_bytes=200_000_000)
    assert report["largest_difference"] == 0.0 and report["notes"] == []
    assert len([name for name in report["files"] if name.endswith(".safetensors")]) >= 3
    back = read_huggingface(tmp_path / "out")
    for key in ("config", "model"):
        assert back[key].keys() == payload[key].keys()
    assert all(torch.equal(back["model"][name], tensor) for name, tensor in payload["model"].items())

    ours = build_model(back, tmp_path / "out").eval()
    tokenizer, template = tokenizer_from_spec(back["tokenizer"]), template_from_spec(back["template"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = render_conversation(TALK, template, tokenizer, add_generation_prompt=True)[0]
    encoded = their_tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=True)
    assert encoded["input_ids"] == prompt
    idx = torch.tensor([prompt])
    with torch.no_grad():
        wanted = theirs(idx).logits
        # Logits of a trained model reach 30, so that 1e-4 is 3e-6 of them.
        torch.testing.assert_close(ours(idx)[..., : wanted.size(-1)], wanted, atol=2e-4, rtol=1e-5)
    new = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=48, do_sample=False)
    stop = theirs.generation_config.eos_token_id
    found = generate(ours, [prompt], max_new_tokens=48, temperature=0.0, stop_ids=stop)[0]
    assert found == [token for token in new[0, len(prompt) :].tolist() if token not in stop] and len(found) > 20
