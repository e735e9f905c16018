"""export.py as people call it: any model in, every format out, each way compared with what was given."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import export as script
from data.tokenizer import ByteTokenizer
from formats.adapter import weights_digest
from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.open_model import build_model, load_any_tokenizer, load_payload, open_model
from tests.adapters import make_adapter
from tests.foreign_models import random_ids, save_foreign
from tests.tiny_checkpoints import save_tiny, tiny_model

ROOT = Path(__file__).resolve().parent.parent


def run(capsys: Any, *words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of export.py."""
    code = 0
    try:
        script.command_line([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys: Any, *words: object) -> str:
    code, _, err = run(capsys, *words)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def differences(out: str) -> list[float]:
    return [float(number) for number in re.findall(r"largest difference (\S+)", out)]


@pytest.mark.parametrize("family", ["gpt2", "smollm2", "qwen3"])
@torch.inference_mode()
def test_a_folder_goes_in_and_out_of_every_format_with_the_same_logits(
    family: str, tmp_path: Path, capsys: Any
) -> None:
    theirs, ids = save_foreign(family, tmp_path / "theirs"), random_ids()
    expected = theirs(ids).logits

    def logits(ref: Path) -> torch.Tensor:
        return open_model(ref).model(ids)[..., : expected.size(-1)]

    code, out, _ = run(capsys, "import", tmp_path / "theirs", tmp_path / "ours.pt")
    assert code == 0 and differences(out) == [0.0]
    torch.testing.assert_close(logits(tmp_path / "ours.pt"), expected, atol=1e-4, rtol=1e-4)
    for command, target in (("hf", "folder"), ("gguf", "file.gguf")):
        dtype = ["--dtype", "f32"] if command == "gguf" else []
        code, out, _ = run(capsys, command, tmp_path / "ours.pt", tmp_path / target, *dtype)
        assert code == 0 and differences(out) == [0.0, 0.0], out
        assert torch.equal(logits(tmp_path / target), logits(tmp_path / "ours.pt"))
        assert load_any_tokenizer(tmp_path / target).encode("Two trees") == load_any_tokenizer(
            tmp_path / "ours.pt"
        ).encode("Two trees")


def test_a_gguf_in_fewer_bits_says_how_far_it_is_off(tmp_path: Path, capsys: Any) -> None:
    save_tiny(tmp_path / "m.pt", template="dolly")
    sizes = []
    for dtype in ("f32", "f16", "q8_0"):
        code, out, _ = run(capsys, "gguf", tmp_path / "m.pt", tmp_path / f"{dtype}.gguf", "--dtype", dtype)
        weights, logits = differences(out)
        assert code == 0 and (weights == logits == 0.0) == (dtype == "f32")
        sizes.append((tmp_path / f"{dtype}.gguf").stat().st_size)
    assert sizes == sorted(sizes, reverse=True)


def test_the_same_weights_have_one_digest_whatever_holds_them(tmp_path: Path, capsys: Any) -> None:
    save_foreign("smollm2", tmp_path / "folder")
    run(capsys, "import", tmp_path / "folder", tmp_path / "m.pt")
    run(capsys, "gguf", tmp_path / "m.pt", tmp_path / "m.gguf", "--dtype", "f32")
    found = {weights_digest(load_payload(tmp_path / name)["model"]) for name in ("folder", "m.pt", "m.gguf")}
    assert len(found) == 1
    other = load_payload(tmp_path / "m.pt")["model"]
    other = {**other, "ln_f.weight": other["ln_f.weight"] + 1e-6}
    assert weights_digest(other) not in found


def test_merging_is_the_adapter_within_rounding(tmp_path: Path, capsys: Any) -> None:
    base = save_tiny(tmp_path / "base.pt", template="dolly")
    adapter = make_adapter(base, tmp_path / "runs" / "adapter.pt")
    code, out, _ = run(capsys, "merge", adapter, tmp_path / "merged.pt")
    assert code == 0 and differences(out)[0] < 1e-4
    merged, apart = load_checkpoint(tmp_path / "merged.pt"), open_model(adapter)
    assert merged["model"].keys() == tiny_model().state_dict().keys()
    ids = torch.randint(257, (1, 20))
    with torch.inference_mode():
        plain = open_model(base).model(ids)
        torch.testing.assert_close(build_model(merged, "merged")(ids), apart.model(ids), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(plain[..., :257], apart.model(ids)[..., :257], atol=1e-2)
    assert merged["template"]["name"] == "dolly"


def test_what_cannot_be_done_is_told_in_one_line_and_leaves_nothing(tmp_path: Path, capsys: Any) -> None:
    model, folder = save_tiny(tmp_path / "m.pt"), tmp_path / "empty"
    folder.mkdir()
    before = sorted(tmp_path.iterdir())
    cases: list[tuple[list[object], str]] = [
        (["explode"], r"unknown command 'explode'"),
        (["expot"], r"unknown command 'expot'"),
        (["import"], r"SRC, the model to import, is missing"),
        (["import", tmp_path / "nowhere"], r"OUT\.pt, the file to write, is missing"),
        (["import", tmp_path / "nowhere", tmp_path / "o.pt"], r"nowhere: no such checkpoint; expected a checkpoint"),
        (["import", folder, tmp_path / "o.pt"], r"empty: is a folder without config\.json"),
        (["import", model, model], r"m\.pt: is there already: choose another name, or add --overwrite"),
        (["import", model, tmp_path / "o.bin"], r"o\.bin: expected a name that ends in \.pt"),
        (["import", model, folder, "x"], r"unexpected 'x': expected SOURCE OUT"),
        (["gguf", model, tmp_path / "o.pt"], r"expected a name that ends in \.gguf"),
        (["gguf", model, tmp_path / "o.gguf", "--dtype", "q4"], r"dtype"),
        (["hf", model, tmp_path], r"exists and is not an empty folder"),
        (["hf", model, folder, "--max_shard_gb", "0"], r"--max_shard_gb 0\.0: expected a size above 0"),
        (["merge", model, tmp_path / "o.pt"], r"m\.pt: is a whole model, there is nothing to merge"),
        (["peft", model, tmp_path / "o"], r"is a whole model, not an adapter"),
    ]
    for words, says in cases:
        assert re.search(says, fails(capsys, *words)), words
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_an_adapter_alone_is_no_model_to_export(form: str, tmp_path: Path, capsys: Any) -> None:
    save_tiny(tmp_path / "base.pt")
    make_adapter(tmp_path / "base.pt", tmp_path / "lora.pt")
    said = fails(capsys, form, tmp_path / "lora.pt", tmp_path / "out.gguf")
    assert "lora.pt: is an adapter: merge it (export.py merge)" in said
    assert not (tmp_path / "out.gguf").exists()


def test_overwrite_replaces(tmp_path: Path, capsys: Any) -> None:
    save_tiny(tmp_path / "a.pt", seed=1)
    save_tiny(tmp_path / "b.pt", seed=2)
    assert run(capsys, "import", tmp_path / "a.pt", tmp_path / "b.pt", "--overwrite")[0] == 0
    assert torch.equal(
        load_checkpoint(tmp_path / "b.pt")["model"]["wte.weight"], tiny_model(1).state_dict()["wte.weight"]
    )


def test_help_answers_before_torch_is_loaded() -> None:
    look = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"
    run_it = "import runpy; runpy.run_path('export.py', run_name='__main__')"
    for words in ([], ["--help"], ["gguf", "--help"]):
        command = [sys.executable, "-c", f"{look}; {run_it}", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "gguf CKPT OUT.gguf" in done.stdout and done.stdout.rstrip().endswith("False")


def test_a_model_with_more_token_ids_than_rows_is_refused(tmp_path: Path, capsys: Any) -> None:
    save_tiny(tmp_path / "m.pt")
    payload = load_checkpoint(tmp_path / "m.pt")
    config = {**payload["config"], "vocab_size": 100}
    save_checkpoint(tmp_path / "small.pt", {**payload, "config": config, "tokenizer": ByteTokenizer().spec()})
    for command, out in (("hf", "o"), ("gguf", "o.gguf")):
        assert "257" in fails(capsys, command, tmp_path / "small.pt", tmp_path / out)
