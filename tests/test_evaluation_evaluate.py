"""evaluate.py from the outside: a table, fixed lines, a JSON file, and one line for everything that is wrong."""

import io
import json
import re
import sys

import numpy as np
import pytest
from tiny_checkpoints import instruction_set, save_tiny

import evaluate as script
from data.tokenizer import ByteTokenizer
from evaluation.perplexity import perplexity
from evaluation.settings import EvaluateSettings, SampleSettings
from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.open_model import open_model
from tests.scripts import one_line_error, run_main
from training.settings import parse

TEXT = "The first line of a text.\nThe second, with caf\u00e9 and \u4f60\u597d in it.\n" * 4


def run(capsys, *words):
    """(exit code, stdout, stderr) of evaluate.py."""
    return run_main(capsys, script.main, EvaluateSettings, *words, "--device", "cpu")


def fails(capsys, *words):
    """The one line that a mistake is answered with."""
    return one_line_error(run(capsys, *words))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "a.pt")


def test_every_checkpoint_on_every_text(tmp_path, capsys, text, model):
    other = save_tiny(tmp_path / "b.pt", seed=1)
    more = tmp_path / "more.txt"
    more.write_text("Another text.", "utf-8")
    out_file = tmp_path / "out" / "scores.json"
    words = ["--metrics", "perplexity", "--input", text, more, "--block_size", "32", "--stride", "8"]
    code, out, _ = run(capsys, "--checkpoints", model, other, *words, "--json", out_file)
    assert code == 0
    results = json.loads(out_file.read_text("utf-8"))["results"]
    assert [(r["checkpoint"], r["text"]) for r in results] == [
        ("a", "text.txt"),
        ("a", "more.txt"),
        ("b", "text.txt"),
        ("b", "more.txt"),
    ]
    expected = perplexity(
        open_model(model).model, ByteTokenizer().encode_numpy(TEXT), block_size=32, stride=8, tokenizer=ByteTokenizer()
    )
    first = results[0]
    assert first["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert first["tokens"] == first["bytes"] == len(TEXT.encode()) - 1
    assert first["bits_per_byte"] == pytest.approx(expected.loss / np.log(2), rel=1e-6)
    assert first["step"] == 7 and first["protocol"].startswith(f"{expected.tokens} tokens scored in {expected.windows}")
    rows = [line.split() for line in out.split("\n") if re.match(r"[ab] ", line)]
    assert [row[:2] for row in rows] == [[r["checkpoint"], r["text"]] for r in results]
    assert rows[0][2:5] == [str(expected.tokens), f"{expected.loss:.4f}", f"{expected.perplexity:.4f}"]


def test_the_fixed_lines_of_the_log(capsys, text, model):
    _, out, _ = run(capsys, "--checkpoints", model, "--input", text)
    block = out[: out.index("\n\n")].split("\n")
    assert block[0] == "***** Running evaluation *****"
    (examples,) = [line for line in block if line.startswith("  Num examples = ")]
    assert examples == "  Num examples = 8"  # 269 tokens in windows of 64, a stride of 32
    loss = float(re.fullmatch(r"Eval Loss: (\d+\.\d+)", block[-2])[1])
    found = float(re.fullmatch(r"Eval Perplexity: (\d+\.\d+)", block[-1])[1])
    assert found == pytest.approx(np.exp(loss), rel=1e-3)
    assert any("windows of 64, stride 32" in line for line in block)


def test_a_prepared_set_scores_answers_only(tmp_path, capsys, model):
    ids = np.frombuffer(TEXT.encode()[:60], np.uint8)
    tokens = instruction_set(tmp_path / "set", [(ids, np.arange(60) >= 40), (ids[:20], np.arange(20) >= 15)])
    code, out, _ = run(capsys, "--checkpoints", model, "--data_dir", tokens.folder, "--json", tmp_path / "x.json")
    assert code == 0
    (result,) = json.loads((tmp_path / "x.json").read_text())["results"]
    assert (result["tokens"], result["text"], result["scored"]) == (25, "set/val", "answers only")
    assert "answers only" in out
    assert "there is no split 'train'" in fails(
        capsys, "--checkpoints", model, "--data_dir", tokens.folder, "--split", "train"
    )


def test_other_names_of_the_flags():
    """Changing one of them breaks somebody's script."""
    other = "--model_name_or_path a --text x --seq_len 32 --max_eval_samples 4 --per_device_eval_batch_size 2"
    ours = "--checkpoints a --input x --block_size 32 --max_samples 4 --batch_size 2"
    assert parse(EvaluateSettings, other.split()) == parse(EvaluateSettings, ours.split())
    assert parse(EvaluateSettings, ["--eval_batch_size", "2"]).batch_size == 2
    with pytest.raises(ValueError, match="--seq_len and --block_size both set block_size"):
        parse(EvaluateSettings, ["--seq_len", "32", "--block_size", "32"])
    with pytest.raises(ValueError, match="unknown flag --seq_len"):
        parse(SampleSettings, ["--seq_len", "32"])


def test_the_share_of_hits_is_one_more_line_and_column(tmp_path, capsys, text, model):
    words = ["--checkpoints", model, "--input", text, "--json", tmp_path / "x.json"]
    code, out, _ = run(capsys, *words, "--metrics", "perplexity,accuracy")
    (result,) = json.loads((tmp_path / "x.json").read_text())["results"]
    assert code == 0 and f"Eval Accuracy: {result['accuracy']:.4f}" in out and "  accuracy  " in out
    code, out, _ = run(capsys, *words)
    (other,) = json.loads((tmp_path / "x.json").read_text())["results"]
    assert "accuracy" not in other and "ccuracy" not in out
    assert other["loss"] == pytest.approx(result["loss"], rel=1e-6)


def test_text_from_standard_input_and_commas_in_metrics(capsys, monkeypatch, model):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    code, out, _ = run(capsys, "--checkpoints", model, "--metrics", "perplexity,", "--input", "-", "--max_tokens", "11")
    assert code == 0
    assert "10 tokens scored in 1 windows" in out


def test_the_same_file_twice_has_two_names(capsys, text, model):
    _, out, _ = run(capsys, "--checkpoints", model, model, "--input", text)
    assert "a (1)" in out.replace("/", " ") and "a (2)" in out


def test_mistakes_cost_one_line(tmp_path, capsys, text, model):
    def why(*words):
        return fails(capsys, "--checkpoints", model, *words)

    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"one line\ncaf\xe9\n")
    (tmp_path / "one.txt").write_text("x")
    assert "no checkpoint" in fails(capsys, "--input", text)
    assert "nothing to score" in why()
    assert "empty.txt: is empty" in why("--input", tmp_path / "empty.txt")
    assert "latin.txt:2: is not UTF-8 (byte 0xe9)" in why("--input", tmp_path / "latin.txt")
    assert "is a folder" in why("--input", tmp_path)
    assert "no such text file" in why("--input", tmp_path / "nowhere.txt")
    assert "one.txt: the first 1 tokens hold no token with another before it" in why("--input", tmp_path / "one.txt")
    assert "Did you mean perplexity?" in why("--input", text, "--metrics", "perplexty")
    assert "expected 2 to 64, the model's context" in why("--input", text, "--block_size", "128")
    assert "block_size 0: expected 2 to 64" in why("--input", text, "--seq_len", "0")
    assert "stride 0: expected 1 to 64" in why("--input", text, "--stride", "0")
    assert "stride 65" in why("--input", text, "--stride", "65")
    assert "--max_tokens 1" in why("--input", text, "--max_tokens", "1")
    assert "no such checkpoint" in fails(capsys, "--checkpoints", tmp_path / "b.pt", "--input", text)
    assert "--stride" in fails(capsys, "--checkpoints", model, "--input", text, "--strid", "4")


def test_a_tokenizer_that_does_not_fit_is_refused_with_both_sides(tmp_path, capsys, text, model):
    tokens = instruction_set(tmp_path / "set", [(np.arange(9), np.ones(9))])
    manifest = tokens.folder / "dataset.json"
    other = "0" * 64
    manifest.write_text(manifest.read_text().replace(ByteTokenizer().fingerprint, other))
    message = fails(capsys, "--checkpoints", model, "--data_dir", tokens.folder)
    assert other[:12] in message and ByteTokenizer().fingerprint[:12] in message and "--tokenizer" in message

    small = save_tiny(tmp_path / "small.pt", vocab_size=200, padded_vocab_size=256)
    message = fails(capsys, "--checkpoints", small, "--input", text)
    assert "ids up to 256" in message and "up to 199" in message

    payload = load_checkpoint(model)
    save_checkpoint(tmp_path / "none.pt", {**payload, "tokenizer": None})
    assert "holds no tokenizer" in fails(capsys, "--checkpoints", tmp_path / "none.pt", "--input", text)
