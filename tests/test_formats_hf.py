"""Each family against transformers on tiny random models: the same logits, gradients and text, in and out again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from formats.hf_names import prefix, stored_tensors
from formats.hf_read import read_huggingface
from formats.hf_write import write_huggingface
from formats.open_model import build_model
from model.config import GPTConfig
from model.generate import generate
from tests.foreign_models import FAMILIES, VOCAB, make_foreign, make_tokenizer, random_ids, save_foreign

ROOT = Path(__file__).resolve().parent.parent
TEXTS = (
    "Hello 12345 world's  \n\n  DON'T x=3.14;\t\tend   ",
    "你好 \N{GRINNING FACE}\N{ZERO WIDTH JOINER}\N{GREEK SMALL LETTER ALPHA}\N{COMBINING ACUTE ACCENT}\x00\x07",
    "<|im_start|>user\nhi<|im_end|>",
    "",
)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request, tmp_path_factory):
    """(their model, the folder, our payload, our model) of one family."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = save_foreign(request.param, folder, bos=request.param == "llama3")
    payload = read_huggingface(folder)
    return theirs, folder, payload, build_model(payload, folder).eval()


def test_logits_are_theirs(pair):
    theirs, _, _, ours = pair
    idx = random_ids(length=64)
    with torch.no_grad():
        wanted, found = theirs(idx).logits, ours(idx)
    assert wanted.std() > 0.3, "the logits must differ enough for the comparison to mean something"
    torch.testing.assert_close(found[..., :VOCAB], wanted, atol=1e-4, rtol=0)
    assert torch.isneginf(found[..., VOCAB:]).all()


def test_cached_greedy_text_is_theirs(pair):
    theirs, _, _, ours = pair
    prompts = random_ids(batch_size=2, length=10, seed=3)
    wanted = theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=40, do_sample=False, eos_token_id=VOCAB
    )
    options = {"max_new_tokens": 40, "temperature": 0.0}
    found = generate(ours, prompts.tolist(), **options)
    assert found == wanted[:, 10:].tolist()
    assert found == generate(ours, prompts.tolist(), use_cache=False, **options)
    assert len({tuple(row) for row in found}) == 2, "two prompts with one continuation would prove little"


def test_gradients_are_theirs(pair):
    """Of the mean loss over shifted targets, for every tensor that their model has, by the names of the folder."""
    theirs, folder, payload, ours = pair
    idx = random_ids(seed=5)
    theirs.zero_grad()
    logits = theirs(idx).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).backward()
    ours.zero_grad()
    targets = F.pad(idx[:, 1:], (0, 1), value=-100)
    (ours(idx, targets) / (targets != -100).sum()).backward()
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for stored in stored_tensors(GPTConfig.from_dict(payload["config"]), model_type):
        name = stored.name if stored.name == "lm_head.weight" else prefix(model_type) + stored.name
        torch.testing.assert_close(stored.assemble(gradients), wanted.pop(name), atol=1e-5, rtol=1e-4)
    assert not wanted


def test_out_and_in_again_is_bit_identical_and_transformers_agrees(pair, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs, _, payload, _ = pair
    report = write_huggingface(payload, tmp_path / "out")
    assert report["largest_difference"] == 0.0 and report["notes"] == []
    back = read_huggingface(tmp_path / "out")
    for key in ("config", "tokenizer", "template", "notes"):
        assert back[key] == payload[key]
    assert back["model"].keys() == payload["model"].keys()
    assert all(torch.equal(back["model"][name], tensor) for name, tensor in payload["model"].items())
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    idx = random_ids(length=64)
    with torch.no_grad():
        torch.testing.assert_close(again(idx).logits, theirs(idx).logits, atol=1e-5, rtol=0)
    assert again.generation_config.eos_token_id == [0, 3]


def test_the_exported_tokenizer_is_theirs(pair, tmp_path):
    from transformers import AutoTokenizer

    _, folder, payload, _ = pair
    write_huggingface(payload, tmp_path / "out")
    theirs, exported = (AutoTokenizer.from_pretrained(place) for place in (folder, tmp_path / "out"))
    for text in TEXTS:
        assert exported(text).input_ids == theirs(text).input_ids
    talk = [{"role": "user", "content": "hi  there"}, {"role": "assistant", "content": "yes"}]
    for prompt in (False, True):
        options = {"tokenize": False, "add_generation_prompt": prompt}
        assert exported.apply_chat_template(talk, **options) == theirs.apply_chat_template(talk, **options)
    assert (exported.eos_token, exported.bos_token) == (theirs.eos_token, theirs.bos_token)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_other_dtypes_become_float32_exactly(tmp_path, family, dtype):
    from transformers import AutoModelForCausalLM

    save_foreign(family, tmp_path).to(dtype).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = build_model(read_huggingface(tmp_path), tmp_path).eval()
    idx = random_ids()
    torch.testing.assert_close(ours(idx)[..., :VOCAB], theirs(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_shards_and_bin_and_bodies_give_the_same_weights(tmp_path, family):
    theirs = save_foreign(family, tmp_path / "one", bos=family == "llama3")
    wanted = read_huggingface(tmp_path / "one")["model"]

    def variant(name):
        folder = tmp_path / name
        folder.mkdir()
        for file in (tmp_path / "one").iterdir():
            if file.name != "model.safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        return folder

    theirs.save_pretrained(variant("shards"), max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    torch.save(theirs.state_dict(), variant("bin") / "pytorch_model.bin")
    torch.save(theirs.state_dict(), variant("old") / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for name in ("shards", "bin", "old"):
        found = read_huggingface(tmp_path / name)["model"]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_blocks_smaller_than_a_tensor_end_up_in_their_places(tmp_path, monkeypatch, family):
    """Fused, transposed, and of a table with more rows than ids: in blocks of a few rows, from both kinds of file."""
    theirs = save_foreign(family, tmp_path)
    if family == "qwen2":
        theirs = make_foreign(family, vocab_size=401)
        theirs.save_pretrained(tmp_path)
    wanted = read_huggingface(tmp_path)["model"]
    monkeypatch.setattr("formats.safetensors_file._BLOCK_BYTES", 1500)
    monkeypatch.setattr("formats.hf_folder._BLOCK_ELEMENTS", 300)
    for _ in range(2):
        found = read_huggingface(tmp_path)["model"]
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")


def test_names_without_prefix_and_old_buffers_are_read(tmp_path):
    """The first files of GPT-2 on the Hub: no `transformer.`, causal masks among the weights."""
    from safetensors.torch import save_file

    theirs = save_foreign("gpt2", tmp_path)
    wanted = read_huggingface(tmp_path)["model"]
    state = {name: tensor.clone() for name, tensor in theirs.transformer.state_dict().items()}
    for i in range(3):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, tmp_path / "model.safetensors")
    found = read_huggingface(tmp_path)["model"]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_stored_head_beside_a_tied_table(tmp_path):
    """Equal, it is dropped; different, it is kept, as transformers does."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    save_foreign("smollm2", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    payload = read_huggingface(tmp_path)
    assert payload["config"]["tie_embeddings"] and "lm_head.weight" not in payload["model"] and payload["notes"] == []
    state["lm_head.weight"] += 0.5
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    payload = read_huggingface(tmp_path)
    assert not payload["config"]["tie_embeddings"] and "both are kept" in payload["notes"][0]
    idx = random_ids()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = build_model(payload, tmp_path).eval()
    torch.testing.assert_close(ours(idx)[..., :VOCAB], theirs(idx).logits, atol=1e-4, rtol=0)


def test_a_vocabulary_wider_than_the_tokenizer_is_cut(tmp_path):
    """Qwen's tables have rows that no token has; nothing could decode them."""
    theirs = make_foreign("qwen2", vocab_size=401)
    theirs.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    payload = read_huggingface(tmp_path)
    assert (payload["config"]["vocab_size"], payload["config"]["padded_vocab_size"]) == (VOCAB, 384)
    assert payload["notes"] == ["vocabulary of 401 cut to the 320 ids that the tokenizer has"]
    assert payload["model"]["wte.weight"].shape == (384, 32) and not payload["model"]["wte.weight"][VOCAB:].any()
    idx = random_ids()
    found = build_model(payload, tmp_path).eval()(idx)[..., :VOCAB]
    torch.testing.assert_close(found, theirs(idx).logits[..., :VOCAB], atol=1e-4, rtol=0)


PEAK = """
import sys
from pathlib import Path

import torch

from formats.hf_read import read_huggingface
from formats.open_model import build_model


def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024


folder = Path(sys.argv[1])
build_model(read_huggingface(folder / "small"), folder)  # whatever is imported or allocated once
before = peak()
payload = read_huggingface(folder / "large")
build_model(payload, folder)
size = sum(tensor.numel() * 4 for tensor in payload["model"].values())
assert size > 60e6, size
print((peak() - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("family", ["gpt2", "llama2"])
def test_the_peak_of_memory_is_close_to_the_weights(tmp_path, family):
    width = {"gpt2": {"n_embd": 512, "n_layer": 5}, "llama2": {"hidden_size": 512, "intermediate_size": 2048}}[family]
    save_foreign(family, tmp_path / "small")
    layers = {} if family == "gpt2" else {"num_hidden_layers": 4}
    save_foreign(family, tmp_path / "large", **width, **layers)
    found = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert 0.8 < float(found.stdout) < 1.2
