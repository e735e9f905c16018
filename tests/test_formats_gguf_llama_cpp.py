"""llama.cpp computes from our files what we compute: tokens and their probabilities, for every architecture."""

import pytest

from formats.gguf_read import read_gguf
from formats.gguf_write import write_gguf
from formats.open_model import build_model
from tests import llama_cpp
from tests.gguf_files import NETWORKS, greedy, payload

pytest.importorskip("gguf")
PROMPT = [72, 101, 108, 108, 111, 32, 119, 111]


def ascii_payload(name):
    """A network that says only what is whole UTF-8: llama.cpp's server holds other tokens back."""
    source = payload(NETWORKS[name][1], seed=3)
    source["model"].get("lm_head.weight", source["model"]["wte.weight"])[128:] = 0.0
    return source


@pytest.mark.parametrize("name", NETWORKS)
def test_greedy_tokens_and_probabilities_of_an_f32_file(tmp_path, name):
    source = ascii_payload(name)
    write_gguf(source, tmp_path / "m.gguf")
    (answer,) = llama_cpp.greedy(tmp_path / "m.gguf", [PROMPT], 12)
    ids, logprobs = greedy(build_model(source, "m").eval(), PROMPT, 12)
    assert answer.ids == ids
    assert answer.logprobs == pytest.approx(logprobs, abs=2e-3)


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
@pytest.mark.parametrize("name", ["gpt2", "deci"])
def test_rounded_files_load_and_compute_nearly_the_same(tmp_path, name, dtype):
    write_gguf(ascii_payload(name), tmp_path / "m.gguf", dtype)
    (answer,) = llama_cpp.greedy(tmp_path / "m.gguf", [PROMPT], 1)
    ids, logprobs = greedy(build_model(read_gguf(tmp_path / "m.gguf"), "m").eval(), PROMPT, 1)
    assert answer.ids == ids
    # llama.cpp rounds what it multiplies by q8_0 weights to 8 bits too.
    assert answer.logprobs == pytest.approx(logprobs, abs=2e-3 if dtype == "f16" else 5e-2)
