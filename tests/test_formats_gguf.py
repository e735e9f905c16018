"""GGUF out and in: bit for bit in f32, the rounding of the type in f16 and q8_0, and a reason for what is refused."""

import dataclasses
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from formats.errors import FormatError
from formats.gguf_header import TensorInfo, read_gguf_header
from formats.gguf_read import DTYPES, _blocks, read_gguf
from formats.gguf_write import write_gguf
from formats.open_model import build_model
from model.config import GPTConfig
from tests.gguf_files import NETWORKS, UNEVEN, alter, floats, payload, variant
from tests.model_helpers import GPT2, LLAMA, QWEN3

gguf = pytest.importorskip("gguf")
ROOT = Path(__file__).resolve().parent.parent
EACH = pytest.mark.parametrize("name", NETWORKS)


@EACH
def test_f32_comes_back_bit_for_bit(tmp_path, name):
    architecture, config = NETWORKS[name]
    source, path = payload(config), tmp_path / "m.gguf"
    report = write_gguf(source, path)
    assert report == {"largest_difference": 0.0, "path": str(path), "bytes": path.stat().st_size, "notes": []}
    back = read_gguf(path)
    assert back["source"] == {"kind": "gguf", "path": str(path), "architecture": architecture}
    assert GPTConfig.from_dict(back["config"]) == config and back["notes"] == []
    assert back["model"].keys() == source["model"].keys()
    assert all(torch.equal(tensor, source["model"][key]) for key, tensor in back["model"].items())
    ids = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(1))
    ours, theirs = (build_model(each, path).eval()(ids) for each in (source, back))
    assert torch.equal(ours, theirs)
    write_gguf(back, tmp_path / "m2.gguf")
    tensors = [read_gguf_header(each).tensors for each in (path, tmp_path / "m2.gguf")]
    data = [each.read_bytes()[-report["bytes"] // 2 :] for each in (path, tmp_path / "m2.gguf")]
    assert tensors[0].keys() == tensors[1].keys() and data[0] == data[1]


# transformers leaves some sizes of the file unread, and takes the usual ones.
TRANSFORMERS_SIZES = {
    "gpt2": {"mlp_dim": 128, "block_size": 1024},
    "llama": {},
    "llama-untied-wide-heads": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
}


@pytest.mark.parametrize("name", TRANSFORMERS_SIZES)
def test_transformers_computes_the_same_from_the_file(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    source = payload(dataclasses.replace(NETWORKS[name][1], **TRANSFORMERS_SIZES[name]))
    write_gguf(source, tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = build_model(source, "m").eval()(ids)[..., :257]
        torch.testing.assert_close(theirs.eval()(ids).logits[..., :257], logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "deci"])
def test_f16_rounds_matrices_and_keeps_vectors(tmp_path, name):
    source = payload(NETWORKS[name][1])
    report = write_gguf(source, tmp_path / "m.gguf", "f16")
    largest = 0.0
    for key, tensor in read_gguf(tmp_path / "m.gguf")["model"].items():
        ours = source["model"][key]
        assert torch.equal(tensor, ours if ours.dim() == 1 else ours.half().float())
        largest = max(largest, float((tensor - ours).abs().max()))
    assert report["largest_difference"] == largest > 0


def test_q8_0_rounds_to_127ths_of_each_block(tmp_path):
    source = payload(variant(LLAMA))  # rows of 32 and of 48
    report = write_gguf(source, tmp_path / "m.gguf", "q8_0")
    assert report["notes"] == ["3 tensors whose rows are no multiple of 32 stay f16, blk.0.ffn_down.weight among them"]
    kinds = {name: info.type for name, info in read_gguf_header(tmp_path / "m.gguf").tensors.items()}
    assert (kinds["token_embd.weight"], kinds["blk.0.attn_norm.weight"]) == ("Q8_0", "F32")
    assert (kinds["blk.1.attn_q.weight"], kinds["blk.0.ffn_down.weight"]) == ("Q8_0", "F16")
    back = read_gguf(tmp_path / "m.gguf")["model"]
    for key, ours in source["model"].items():
        if ours.dim() == 2 and ours.size(1) == 32:
            step = ours.abs().amax(1, keepdim=True) / 127  # a row is one block
            assert torch.all((back[key] - ours).abs() <= 0.5 * step + 127 * step * 2**-11)
    largest = max(float((back[key] - ours).abs().max()) for key, ours in source["model"].items())
    assert report["largest_difference"] == largest


@pytest.mark.parametrize("kind", DTYPES)
def test_every_type_is_dequantised_across_blocks(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("formats.gguf_read._BLOCK", 5 * 512 * 4)  # 5 rows at a time of 23
    quantised = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantised]
    raw = np.random.default_rng(0).integers(0, 60, (23, 512 // block * block_bytes), dtype=np.uint8)
    (tmp_path / "t").write_bytes(b"head" + raw.tobytes() + b"tail")
    info = TensorInfo(kind, (23, 512), 4, 4 + raw.nbytes)
    with open(tmp_path / "t", "rb") as file:
        blocks = list(_blocks(file, info, tmp_path / "t"))
    assert [first for first, _ in blocks] == [0, 5, 10, 15, 20]
    whole = torch.cat([rows for _, rows in blocks]).numpy()
    assert whole.dtype == np.float32 and np.array_equal(whole, gguf.quants.dequantize(raw, quantised))


def test_a_tokenizer_smaller_than_the_table_cuts_it(tmp_path):
    config = dataclasses.replace(variant(LLAMA), vocab_size=300, padded_vocab_size=384)
    source = payload(config)
    report = write_gguf(source, tmp_path / "m.gguf")
    assert report["notes"] == ["vocabulary of 300 cut to the 257 ids that the tokenizer has"]
    back = read_gguf(tmp_path / "m.gguf")
    assert back["config"]["vocab_size"] == 257 and back["model"]["wte.weight"].shape == (384, 32)
    assert torch.equal(back["model"]["wte.weight"][:257], source["model"]["wte.weight"][:257])
    assert not back["model"]["wte.weight"][257:].any()


def test_rows_that_only_fill_the_table_are_left_out(tmp_path):
    write_gguf(payload(variant(LLAMA)), tmp_path / "m.gguf")
    keys = read_gguf_header(tmp_path / "m.gguf").metadata
    more = {
        "tokenizer.ggml.tokens": (*keys["tokenizer.ggml.tokens"], "[PAD257]", "[PAD258]"),
        "tokenizer.ggml.token_type": (*keys["tokenizer.ggml.token_type"], 5, 5),
    }
    back = read_gguf(alter(tmp_path / "m.gguf", tmp_path / "n.gguf", more, {"token_embd.weight": floats(260, 32)}))
    assert back["config"]["vocab_size"] == back["tokenizer"]["vocab_size"] == 257
    assert back["notes"] == ["3 rows of the embedding beyond the 257 tokens are left out"]


def test_what_a_file_cannot_say_does_not_stop_the_export(tmp_path):
    config = variant(LLAMA, dropout=0.1, rope_theta=283461213.0, norm_eps=1.00001e-5)  # theta is no float32
    write_gguf(payload(config), tmp_path / "m.gguf")
    back = GPTConfig.from_dict(read_gguf(tmp_path / "m.gguf")["config"])
    assert (back.dropout, back.norm_eps) == (0.0, 1.00001e-5)
    assert np.float32(back.rope_theta) == np.float32(config.rope_theta)


def test_a_sliding_window_shortens_the_context(tmp_path):
    write_gguf(payload(variant(LLAMA)), tmp_path / "m.gguf")
    back = read_gguf(alter(tmp_path / "m.gguf", tmp_path / "n.gguf", {"llama.attention.sliding_window": 16}))
    assert back["config"]["block_size"] == 16 and "sliding window" in back["notes"][0]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_1_and_3_2_are_known_by_their_factors(tmp_path, factor):
    """The factors as llama.cpp's converter computes them: in Python's float64 from float32 frequencies."""
    config = variant(LLAMA, head_dim=64, rope_theta=5e5)
    write_gguf(payload(config), tmp_path / "m.gguf")
    frequencies = 1.0 / (5e5 ** (torch.arange(0, 64, 2).float() / 64))
    factors = []
    for frequency in frequencies.tolist():
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1.0) / 3.0
        blend = 1.0 / ((1 - smooth) / factor + smooth)
        factors.append(1.0 if wavelength < 8192 / 4 else factor if wavelength > 8192 else blend)
    raw = np.array(factors, np.float32).view(np.uint8), "F32"
    back = read_gguf(alter(tmp_path / "m.gguf", tmp_path / "n.gguf", tensors={"rope_freqs.weight": raw}))
    assert back["config"]["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


BAD_KEYS = {
    "architecture": ({"general.architecture": "mamba"}, "'mamba'; read are deci, gpt2, llama, qwen2, qwen3"),
    "experts": ({"llama.expert_count": 8}, "expert_count = 8"),
    "state space": ({"llama.ssm.conv_kernel": 4}, "ssm.conv_kernel"),
    "scaled logits": ({"llama.logit_scale": 0.5}, "logit_scale"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is yarn"),
    "partly rotated": ({"llama.rope.dimension_count": 4}, "expected 8, the size of a head's keys"),
    "value heads": ({"llama.attention.value_length": 16}, "value_length is 16"),
    "a part": ({"split.count": 3}, "gguf-split --merge"),
    "no context": ({"llama.context_length": None}, "context_length is nothing"),
    "context text": ({"llama.context_length": "long"}, "context_length is long"),
    "absurd depth": ({"llama.block_count": 2_000_000_000}, "block_count is 2000000000"),
    "too many layers": ({"llama.block_count": 4}, "lacks the tensor blk.3"),
    "too few layers": ({"llama.block_count": 2}, "holds 'blk.2"),
    "heads per layer": ({"llama.attention.head_count": (4, 4)}, "one for each of the 3 layers"),
    "heads": ({"llama.attention.head_count": 3}, "describe no network"),
    "eps": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
    "width": ({"llama.embedding_length": 64}, "token_embd.weight has shape"),
    "tokens": ({"tokenizer.ggml.tokens": tuple(map(str, range(400))), "tokenizer.ggml.token_type": None}, "400 tokens"),
}
BAD_TENSORS = {
    "missing": ({"blk.1.ffn_up.weight": None}, "lacks the tensor blk.1.ffn_up.weight"),
    "no embedding": ({"token_embd.weight": None}, "lacks the tensor token_embd.weight"),
    "surplus": ({"blk.1.ffn_gate_inp.weight": floats(8, 32)}, "holds 'blk.1.ffn_gate_inp.weight'"),
    "bias": ({"blk.1.attn_q.bias": floats(32)}, "lacks the tensor blk.0.attn_q.bias"),
    "misshapen": ({"blk.1.ffn_up.weight": floats(32, 48)}, "has shape"),
    "three dimensions": ({"output_norm.weight": floats(1, 32)}, "has shape"),
    "type": ({"blk.1.ffn_up.weight": (np.zeros((48, 18), np.uint8), "IQ4_NL")}, "of type IQ4_NL; read are F32, F16"),
    "rope factors": ({"rope_freqs.weight": ((np.arange(4, dtype=np.float32) + 2).view(np.uint8), "F32")}, "Llama 3's"),
    "rope factors' type": ({"rope_freqs.weight": (np.zeros(4, np.uint8), "I8")}, r"is I8 \(4,\), expected one F32"),
    "rope factors' number": ({"rope_freqs.weight": floats(7)}, r"rope_freqs.weight has shape \(7,\)"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(payload(variant(LLAMA)), path)
    return path


@pytest.mark.parametrize("case", [*BAD_KEYS, *BAD_TENSORS])
def test_refuses_what_it_would_compute_otherwise(good, tmp_path, case):
    metadata, finding = BAD_KEYS.get(case, (None, None))
    tensors, found = BAD_TENSORS.get(case, (None, finding))
    path = alter(good, tmp_path / "bad.gguf", metadata, tensors)
    with pytest.raises(FormatError, match=found) as caught:
        read_gguf(path)
    assert "bad.gguf" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "deci"])
def test_only_format_errors_leave_the_reader_for_mutated_files(tmp_path, name):
    """What a header that is well-formed says may still be nonsense."""
    write_gguf(payload(NETWORKS[name][1]), tmp_path / "good.gguf")
    content, path, rng = (tmp_path / "good.gguf").read_bytes(), tmp_path / "m.gguf", random.Random(0)
    keys = read_gguf_header(tmp_path / "good.gguf")
    spots = [content.index(key.encode()) + len(key) + 4 for key in keys.metadata if key.startswith(("token", name[:4]))]
    spots += [content.index(key.encode()) + len(key) for key in keys.tensors]
    refused = 0
    for _ in range(1000):
        changed = bytearray(content)
        spot = rng.choice(spots) + rng.choice([0, 0, 0, 4, 8, 12, 20])
        value = rng.choice([0, 1, 2, 3, 5, 7, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 0x7FC00000, 0x7F800000, 0x80000000])
        changed[spot : spot + 4] = struct.pack("<I", value)
        path.write_bytes(changed)
        try:
            read_gguf(path)
        except FormatError:
            refused += 1
    assert refused > 500


BAD_NETWORKS = {
    "a layer without MLP": (variant(LLAMA, mlp_dim=(48, 0, 48)), "without an MLP"),
    "uneven gpt2": (variant(GPT2, n_head=(4, 2, 4), n_kv_head=(4, 2, 4)), "only for Llama-like networks"),
    "gpt2 with groups": (variant(GPT2, n_kv_head=2), "its own keys and values"),
    "gpt2 without bias": (variant(GPT2, qkv_bias=False), "every bias"),
    "gelu with rope": (variant(LLAMA, mlp="gelu"), "rmsnorm and gelu"),
    "uneven qwen3": (variant(QWEN3, **UNEVEN), "qwen3, with equal layers"),
    "uneven with biases": (variant(LLAMA, qkv_bias=True, **UNEVEN), "deci, without biases"),
    "small model": (dataclasses.replace(variant(LLAMA), vocab_size=200), "257 ids, the model only 200"),
}


@pytest.mark.parametrize("case", BAD_NETWORKS)
def test_says_why_a_network_has_no_place_in_gguf(tmp_path, case):
    config, reason = BAD_NETWORKS[case]
    with pytest.raises(ValueError, match=reason):
        write_gguf(payload(config), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_what_float16_cannot_hold_is_refused_and_the_old_file_stays(tmp_path):
    source, path = payload(variant(LLAMA)), tmp_path / "m.gguf"
    path.write_text("old")
    source["model"]["h.1.mlp.up_proj.weight"][0, 0] = 7e4
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight has values beyond the range of f16: write f32"):
        write_gguf(source, path, "f16")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_other_wrong_calls_are_named(tmp_path, monkeypatch):
    source = payload(variant(LLAMA))
    with pytest.raises(ValueError, match="dtype 'q4' cannot be written, choose one of f32, f16, q8_0"):
        write_gguf(source, tmp_path / "m.gguf", "q4")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        write_gguf({**source, "tokenizer": None}, tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        write_gguf(source, tmp_path / "m.gguf")


MEASURE = """
import sys, torch, gguf, tokenizers
from formats.gguf_read import read_gguf
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
read_gguf(sys.argv[1])  # what is loaded and allocated once
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
before = kib("VmRSS")
payload = read_gguf(sys.argv[2])
weights = sum(t.numel() * 4 for t in payload["model"].values())
print((kib("VmHWM") - before) * 1024 / weights, weights)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_reading_takes_at_most_a_fifth_more_than_the_weights(tmp_path, good, dtype):
    config = variant(LLAMA, n_embd=512, n_head=8, n_kv_head=2, head_dim=64, mlp_dim=4096)
    with torch.device("meta"):
        names = payload(config)["model"]
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.empty(t.shape).normal_(generator=generator) for name, t in names.items()}
    write_gguf({**payload(variant(LLAMA)), "config": config.to_dict(), "model": weights}, tmp_path / "m.gguf", dtype)
    del weights
    command = [sys.executable, "-c", MEASURE, str(good), str(tmp_path / "m.gguf")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ratio, size = map(float, done.stdout.split())
    assert size >= 60e6 and 0.95 < ratio < 1.2
