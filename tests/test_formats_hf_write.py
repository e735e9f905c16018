"""Writing a Hugging Face folder: shards, tokenizers of our own, networks of no family, and nothing half written."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from data.templates import TEMPLATES
from data.tokenizer import BpeTokenizer, load_tokenizer, train_bpe
from formats.errors import FormatError
from formats.hf_read import read_huggingface
from formats.hf_write import write_huggingface
from formats.open_model import build_model
from formats.tokenizer_json import to_tokenizer_json
from model.config import padded_vocab
from tests.foreign_models import random_ids
from tests.model_helpers import GPT2, LLAMA, UNBALANCED, build

BYTE = load_tokenizer("byte")


def payload_of(config, tokenizer=BYTE, template=None):
    """A checkpoint of a random network that fits the tokenizer."""
    size = tokenizer.vocab_size
    config = dataclasses.replace(config, vocab_size=size, padded_vocab_size=padded_vocab(size))
    spec = None if template is None else template.spec()
    return {
        "format": 1,
        "config": config.to_dict(),
        "model": dict(build(config).state_dict()),
        "tokenizer": tokenizer.spec(),
        "template": spec,
    }


def logits(payload, idx):
    return build_model(payload, "payload").eval()(idx)[..., : payload["config"]["vocab_size"]]


@pytest.mark.parametrize(
    "config",
    [
        GPT2,
        dataclasses.replace(GPT2, tie_embeddings=False, dropout=0.1),
        LLAMA,
        dataclasses.replace(LLAMA, qkv_bias=True),
        dataclasses.replace(LLAMA, qk_norm=True, head_dim=6),
        dataclasses.replace(LLAMA, n_head=6, n_kv_head=3, head_dim=8),
        dataclasses.replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True, tie_embeddings=False),
    ],
    ids=["gpt2", "gpt2-untied", "llama", "qwen2", "qwen3", "mistral", "llama-biases"],
)
def test_transformers_computes_the_same_of_networks_made_here(tmp_path, config):
    from transformers import AutoModelForCausalLM

    payload = payload_of(config)
    report = write_huggingface(payload, tmp_path / "out")
    assert report["largest_difference"] == 0.0 and report["path"] == str(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    idx = random_ids(length=32, vocab_size=257)
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, logits(payload, idx), atol=1e-4, rtol=0)
    assert theirs.config.vocab_size == 257, "rows of padding stay here"


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(LLAMA, **UNBALANCED),
        dataclasses.replace(GPT2, position="rope", norm_bias=False, mlp_dim=(48, 0, 16)),
        dataclasses.replace(LLAMA, mlp="gelu", qk_norm=True, o_bias=True, tie_embeddings=False),
    ],
    ids=["unbalanced", "mixed", "gelu-qk-norm"],
)
def test_a_network_of_no_family_is_written_for_us_and_says_so(tmp_path, config):
    payload = payload_of(config)
    report = write_huggingface(payload, tmp_path / "out")
    assert "this project opens the folder, transformers does not" in report["notes"][0]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "espalier" and written["note"] == report["notes"][0]
    back = read_huggingface(tmp_path / "out")
    assert {**back["config"], "dropout": 0.0} == {**payload["config"], "dropout": 0.0}
    assert back["model"].keys() == payload["model"].keys()
    idx = random_ids(length=32, vocab_size=257)
    assert torch.equal(logits(back, idx), logits(payload, idx))


def test_shards_with_an_index(tmp_path):
    from transformers import AutoModelForCausalLM

    payload = payload_of(GPT2)
    report = write_huggingface(payload, tmp_path / "out", shard_bytes=60_000)
    shards = [name for name in report["files"] if name.endswith(".safetensors")]
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = 0
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            names = list(file.keys())
            size = sum(file.get_tensor(name).numel() * 4 for name in names)
        assert size <= 60_000 or len(names) == 1
        assert all(index["weight_map"][name] == shard for name in names)
        total += size
    assert index["metadata"]["total_size"] == total and report["largest_difference"] == 0.0
    idx = random_ids(length=32, vocab_size=257)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs(idx).logits, logits(payload, idx), atol=1e-4, rtol=0)


GPT2_TOKENIZER = load_tokenizer("gpt2")
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ["   \n\n\t  x", "don't  STOP 1234567", "<|endoftext|>", "\N{GRINNING FACE}你好\x00", "a" * 300]
)


@pytest.fixture(scope="module")
def backends():
    from tokenizers import Tokenizer

    return {name: Tokenizer.from_str(to_tokenizer_json(load_tokenizer(name))) for name in ("gpt2", "byte")}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=text)
def test_our_tokenizers_have_an_equal_tokenizer_json(backends, text):
    for name, tokenizer in (("gpt2", GPT2_TOKENIZER), ("byte", BYTE)):
        backends[name].encode_special_tokens = True
        assert backends[name].encode(text).ids == tokenizer.encode(text), name


def test_our_tokenizers_are_read_back_as_the_same_vocabulary(tmp_path):
    for tokenizer in (BYTE, GPT2_TOKENIZER):
        read = BpeTokenizer(to_tokenizer_json(tokenizer))
        assert read.fingerprint == tokenizer.fingerprint and read.eot_id == tokenizer.eot_id


@pytest.mark.parametrize("bos", ["<|endoftext|>", ""])
def test_a_first_token_given_apart_from_the_file_is_written_into_it(tmp_path, bos):
    """Whatever the file's own post-processor says, transformers puts in front what our texts begin with."""
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    backend = Tokenizer.from_str(train_bpe(["some words to learn from"], 300).tokenizer_json)
    if not bos:
        specials = [("<|endoftext|>", 0)]
        backend.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=specials)
    tokenizer = BpeTokenizer(backend.to_str(), bos=bos)
    assert write_huggingface(payload_of(LLAMA, tokenizer), tmp_path / "out")["largest_difference"] == 0.0
    expected = [*([0] if bos else []), *tokenizer.encode("words")]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("words").input_ids == expected
    back = read_huggingface(tmp_path / "out")["tokenizer"]
    assert back["bos"] == bos


def test_a_prompt_template_becomes_a_chat_template(tmp_path):
    from transformers import AutoTokenizer

    write_huggingface(payload_of(GPT2, template=TEMPLATES["dolly"]), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "Name a colour."}]
    rendered = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert rendered == TEMPLATES["dolly"].prompt({"instruction": "Name a colour.", "context": ""})
    assert theirs.eos_token == "<|endoftext|>"


def test_a_qwen2_model_with_another_tokenizer_is_noted(tmp_path):
    from transformers import PreTrainedTokenizerFast

    report = write_huggingface(payload_of(dataclasses.replace(LLAMA, qkv_bias=True)), tmp_path / "out")
    assert "PreTrainedTokenizerFast.from_pretrained" in report["notes"][0]
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert theirs("Don't  x=12").input_ids == BYTE.encode("Don't  x=12")


def test_ids_that_the_tokenizer_lacks_stay_here(tmp_path):
    payload = payload_of(LLAMA)
    payload["config"]["vocab_size"] = 300
    report = write_huggingface(payload, tmp_path / "out")
    assert report["notes"] == ["vocabulary of 300 cut to the 257 ids that the tokenizer has"]
    assert report["largest_difference"] == 0.0
    assert read_huggingface(tmp_path / "out")["config"]["vocab_size"] == 257


def test_an_existing_folder_or_file_is_left_alone(tmp_path):
    payload = payload_of(GPT2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        with pytest.raises(ValueError, match="not an empty folder"):
            write_huggingface(payload, tmp_path / name)
    (tmp_path / "empty").mkdir()
    write_huggingface(payload, tmp_path / "empty")
    assert (tmp_path / "full" / "precious.txt").read_text() == "x" and (tmp_path / "empty" / "config.json").exists()
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("step", ["_write_weights", "read_huggingface", "sync_folder"])
def test_a_failure_leaves_nothing(tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError(28, "disk full")

    monkeypatch.setattr(f"formats.hf_write.{step}", fail)
    with pytest.raises(OSError, match="disk full"):
        write_huggingface(payload_of(GPT2), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_read_back_is_compared(tmp_path, monkeypatch):
    """A weight that came out otherwise is in the report; another config or tokenizer is an error."""
    import formats.hf_write

    read = formats.hf_write.read_huggingface

    def damaged(change):
        def reader(folder):
            back = read(folder)
            change(back)
            return back

        monkeypatch.setattr("formats.hf_write.read_huggingface", reader)

    damaged(lambda back: back["model"]["h.1.mlp.up_proj.weight"][3, 4].add_(0.25))
    assert write_huggingface(payload_of(GPT2), tmp_path / "a")["largest_difference"] == pytest.approx(0.25)
    damaged(lambda back: back["config"].update(norm_eps=1e-3))
    with pytest.raises(FormatError, match="another config"):
        write_huggingface(payload_of(GPT2), tmp_path / "b")
    damaged(lambda back: back["tokenizer"].update(train_bpe(["x"], 257).spec()))
    with pytest.raises(FormatError, match="another tokenizer"):
        write_huggingface(payload_of(GPT2), tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    payload = payload_of(GPT2)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        write_huggingface({**payload, "tokenizer": None}, tmp_path / "out")
    del payload["model"]["h.1.ln_2.bias"]
    with pytest.raises(ValueError, match=r"lacks the weight h\.1\.ln_2\.bias"):
        write_huggingface(payload, tmp_path / "out")
    assert not list(tmp_path.iterdir())
