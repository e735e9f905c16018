"""prune.py as a command: what it leaves, what it prints, how it goes on, what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from formats.adapter import base_entry
from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.open_model import open_model
from model.masks import check_masks
from model.pruning.matrices import matrices
from pruning import probe
from pruning.rounds import round_shares
from pruning.settings import PruneSettings
from tests.pruning_runs import GPT2, LLAMA, RECOVER, prune_command, save_model, weights_of, working_folder
from tests.runs import changed_losses
from tests.scripts import one_line_error
from tests.tiny import text_set


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model and texts."""
    return working_folder(tmp_path, monkeypatch)


def perplexities(out: str) -> dict[str, float]:
    """The fixed lines."""
    return {when: float(value) for when, value in re.findall(r"^PPL (.*): ([\d.]+)$", out, flags=re.M)}


def zeros(path: str) -> dict[str, torch.Tensor]:
    """Where the matrices of a checkpoint's blocks are zero."""
    model = open_model(path).model
    return {name: module.weight == 0 for name, module in matrices(model, range(model.config.n_layer)).items()}


def share_of_zeros(path: str) -> float:
    """Of all of them."""
    found = zeros(path).values()
    return sum(int(each.sum()) for each in found) / sum(each.numel() for each in found)


# -- pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_structured_pruning_leaves_a_smaller_model_that_opens(here: Path, config: Any, capsys: Any) -> None:
    save_model(here / "model.pt", config)
    code, out, err = prune_command(capsys, "--prune_mlp", "--save_model")
    assert code == 0, err
    found = perplexities(out)
    assert set(found) == {"before pruning", "after pruning"}
    assert (here / "logs/prune/training.log").read_text().rstrip() == out.rstrip()
    opened, dense = open_model("logs/prune/pruned.pt"), open_model("model.pt")
    assert opened.template is not None and opened.tokenizer.kind == "byte"
    removed = dense.parameters - opened.parameters
    units = sum(w.numel() for name, w in weights_of("model.pt").items() if name.startswith("h.") and "_proj" in name)
    assert removed / units == pytest.approx(0.25, abs=0.02)
    assert "other.txt" in out and "Calibration: 4 windows of 32 tokens from book.txt" in out
    assert "The cheap rival, " in out
    entry = load_checkpoint("logs/prune/pruned.pt")["pruning"]
    assert entry["perplexity"]["after"] == pytest.approx(found["after pruning"], abs=0.01)
    assert entry["base"]["name"] == "model.pt" and len(entry["layers"]) == 3
    assert not list(here.glob("logs/prune/.tmp-*"))


SPARSE_WAYS = [
    ("magnitude", "unstructured"),
    ("wanda", "2:4"),
    ("ria", "4:8"),
    ("sparsegpt", "unstructured"),
    ("sparsegpt", "block"),
    ("wanda", "block"),
]


@pytest.mark.parametrize(("method", "pattern"), SPARSE_WAYS)
def test_sparse_pruning_leaves_a_model_with_masks(method: str, pattern: str, capsys: Any) -> None:
    block = ("--block_size", 8) if pattern == "block" else ()
    code, out, err = prune_command(capsys, "--method", method, "--pattern", pattern, *block, "--out", "sparse.pt")
    assert code == 0, err
    model = open_model("sparse.pt").model
    assert set(model.masks) == {f"{name}.weight" for name in matrices(model, range(3))}
    check_masks(model, model.masks)
    # A matrix of 32 x 16 has 8 blocks of 8 x 8, and where each has a share of its own it is met in whole blocks.
    near = 0.05 if (method, pattern) == ("wanda", "block") else 0.01
    assert share_of_zeros("sparse.pt") == pytest.approx(0.5, abs=near)
    assert "% of" in out and "masked weights are zero" in out
    patterns = {mask.pattern for mask in model.masks.values()}
    assert patterns == {"8x8" if pattern == "block" else pattern}


def test_a_sparse_model_is_stored_without_its_zeros_where_asked(here: Path, capsys: Any) -> None:
    words = ("--method", "sparsegpt", "--pattern", "block", "--block_size", 8)
    for name, more in (("whole", ()), ("compact", ("--compact",))):
        assert prune_command(capsys, *words, "--out", f"{name}.pt", *more)[0] == 0
    assert (here / "compact.pt").stat().st_size < 0.8 * (here / "whole.pt").stat().st_size
    for name, tensor in weights_of("whole.pt").items():
        assert torch.equal(weights_of("compact.pt")[name], tensor)
    assert load_checkpoint("compact.pt")["pruning"]["base"]["name"] == "model.pt"


def test_whole_layers_go(capsys: Any) -> None:
    code, out, _ = prune_command(capsys, "--method", "drop_layers", "--pruning_ratio", 0.34, "--out", "short.pt")
    assert code == 0 and open_model("short.pt").model.config.n_layer == 2
    rows = load_checkpoint("short.pt")["pruning"]["layers"]
    assert [row["attention"][0] == 0 for row in rows].count(True) == 1
    assert "with 1 whole layers" in out


def test_a_range_of_layers_bounds_what_goes(capsys: Any) -> None:
    prune_command(
        capsys, "--prune_mlp", "--layer_start", 1, "--layer_end", 2, "--budget", "flops", "--out", "middle.pt"
    )
    rows = load_checkpoint("middle.pt")["pruning"]["layers"]
    assert [row["mlp"][0] < row["mlp"][1] for row in rows] == [False, True, False]


def test_statistics_are_kept_and_serve_the_next_run(here: Path, capsys: Any) -> None:
    first = prune_command(capsys, "--prune_mlp", "--out", "a.pt")[1]
    again = prune_command(capsys, "--prune_mlp", "--out", "b.pt", "--pruning_ratio", 0.25)[1]
    other = prune_command(capsys, "--prune_mlp", "--out", "c.pt", "--no_cache_statistics")[1]
    assert "Statistics of 4 x 32 tokens" in first and "Statistics" not in again and "Statistics of" in other
    for name, tensor in weights_of("a.pt").items():
        assert torch.equal(weights_of("b.pt")[name], tensor) and torch.equal(weights_of("c.pt")[name], tensor)
    assert len(list(here.glob("logs/statistics/*/layer_*.safetensors"))) == 3


def test_a_sparse_model_becomes_sparser_and_its_zeros_stay(capsys: Any) -> None:
    prune_command(capsys, "--method", "wanda", "--sparsity", 0.3, "--out", "a.pt")
    code, _, _ = prune_command(capsys, "--method", "magnitude", "--sparsity", 0.6, "--out", "b.pt", base="a.pt")
    assert code == 0
    before, after = zeros("a.pt"), zeros("b.pt")
    assert all(bool((after[name] | ~before[name]).all()) for name in before)
    for how, says in ((("--method", "wanda", "--sparsity", 0.3), "are zero already"), ((), "is sparse already")):
        assert says in one_line_error(prune_command(capsys, *how, "--out", "c.pt", base="a.pt"))


# -- the same command again, and what is in the way ------------------------------------------------------------------


def test_the_same_command_goes_on_and_another_is_refused(here: Path, capsys: Any) -> None:
    prune_command(capsys, "--prune_mlp", "--save_model")
    before = (here / "logs/prune/pruned.pt").read_bytes()
    code, out, _ = prune_command(capsys, "--prune_mlp", "--save_model")
    assert code == 0 and "was made by these settings, the run goes on from it" in out
    assert set(perplexities(out)) == {"before pruning", "after pruning"}
    code, other, _ = prune_command(capsys, "--prune_mlp", "--save_model", "--eval_samples", 8)
    assert code == 0 and perplexities(other) != perplexities(out), "measured in another way, it is measured anew"
    error = one_line_error(prune_command(capsys, "--prune_mlp", "--save_model", "--pruning_ratio", 0.3))
    assert "is there already, made with other settings (pruning_ratio 0.25 -> 0.3)" in error
    save_model(here / "model.pt", seed=1)
    assert "(base " in one_line_error(prune_command(capsys, "--prune_mlp", "--save_model"))
    assert (here / "logs/prune/pruned.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["precious.pt", "precious-recovered.pt", "precious.json", "precious.html"])
def test_what_is_there_stays(name: str, here: Path, capsys: Any) -> None:
    (here / name).write_bytes((here / "model.pt").read_bytes())
    words = ("--out", "precious.pt", "--report", "precious.json", *RECOVER)
    assert "is there already" in one_line_error(prune_command(capsys, *words))
    assert (here / name).read_bytes() == (here / "model.pt").read_bytes()
    assert not (here / "logs").exists(), "it was told before any work"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--pruning_ratio", "0"], "--pruning_ratio 0.0: expected a share between 0 and 1"),
        (["--pruning_ratio", "1.5"], "--pruning_ratio 1.5: expected a share between 0 and 1"),
        (["--method", "wanda", "--sparsity", "1"], "--sparsity 1.0: expected a share between 0 and 1"),
        (["--method", "wanda", "--pruning_ratio", "0.3"], "says nothing to --method wanda; use --sparsity"),
        (["--sparsity", "0.3"], "says nothing to --method structured; use --pruning_ratio"),
        (["--layer_start", "3"], "--layer_start 3: the model has 3 layers"),
        (["--layer_end", "4"], "--layer_end 4: the model has 3 layers"),
        (["--layer_start", "2", "--layer_end", "1"], "the range is empty"),
        (["--importance_samples", "5000"], "book.txt: has"),
        (["--eval_samples", "5000"], "other.txt: has"),
        (["--method", "wanda", "--pattern", "2:4", "--sparsity", "0.6"], "--pattern 2:4 is half zeros"),
        (["--method", "wanda", "--block_size", "8"], "add --pattern block"),
        (["--method", "wanda", "--pattern", "2:4", "--allocation", "owl"], "2:4 takes the same share everywhere"),
        (["--method", "wandaa"], "--method"),
        (["--prunning_ratio", "0.3"], "Did you mean --pruning_ratio?"),
        (["--method", "wanda", "--no_refit"], "--refit says nothing to --method wanda"),
        (["--method", "sparsegpt", "--pattern", "block", "--no_refit"], "blocks are fitted again in any case"),
        (["--rounds", "2"], "add --finetune"),
        (["--method", "none"], "add --finetune"),
        (["--calibration", "missing.txt"], "missing.txt: no such text"),
        (["--base_model", "missing.pt"], "missing.pt: no such checkpoint"),
        (["--finetune", "--objective", "distill", "--distill_hard", "2"], "--distill_hard 2.0: expected 0 to 1"),
        (["--pruning_ratio", "0.001"], "removes nothing"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(words: list[str], says: str, here: Path, capsys: Any) -> None:
    assert says in one_line_error(prune_command(capsys, "--out", "pruned.pt", *words))
    assert not (here / "pruned.pt").exists() or "distill" in words


def test_several_processes_are_sent_to_finetune_dolly(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "prune.py is one process" in one_line_error(prune_command(capsys, "--save_model"))


def test_nothing_to_keep_is_a_mistake(capsys: Any) -> None:
    assert "add --save_model (logs/NAME/pruned.pt) or --out FILE.pt" in one_line_error(prune_command(capsys))
    assert "ends in .pt" in one_line_error(prune_command(capsys, "--out", "pruned.bin"))


def test_a_ratio_that_heads_cannot_meet_takes_the_nearest_and_says_so(capsys: Any) -> None:
    code, out, _ = prune_command(capsys, "--pruning_ratio", 0.4, "--out", "pruned.pt")
    assert code == 0
    assert "asked to remove 40.0%; whole units and the floors allow 33.3%" in out


def test_an_adapter_is_to_be_merged_first(here: Path, capsys: Any) -> None:
    base = load_checkpoint("model.pt")
    entry = {"adapter": {"method": "lora", "settings": {}}, "base": base_entry(base, "model.pt", here)}
    save_checkpoint(here / "adapter.pt", {**base, "model": {}, **entry})
    error = one_line_error(prune_command(capsys, "--out", "pruned.pt", base="adapter.pt"))
    assert "adapter.pt: is an adapter: merge it first (export.py merge adapter.pt merged.pt)" in error


# -- recovery --------------------------------------------------------------------------------------------------------


@pytest.fixture
def records(here: Path) -> Path:
    return text_set(here / "set", n_documents=80)


def test_full_recovery_keeps_zeros_and_prints_what_the_guide_does(here: Path, records: Path, capsys: Any) -> None:
    words = ("--method", "wanda", "--out", "sparse.pt", "--finetune_data", "set", "--finetune_lr", 1e-3, *RECOVER)
    code, out, err = prune_command(capsys, *words)
    assert code == 0, err
    found = perplexities(out)
    assert set(found) == {"before pruning", "after pruning", "after recovery"}
    assert "  Progress: 50% | mean loss: " in out and "Epoch 1 done, mean loss: " in out and "| LR: " in out
    assert "LR schedule: linear, down to 0 of the peak" in out and "Effective batch size: 2 windows" in out
    before, after = zeros("sparse.pt"), zeros("sparse-recovered.pt")
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = [n for n, w in weights_of("sparse.pt").items() if not torch.equal(w, weights_of("sparse-recovered.pt")[n])]
    assert moved
    payload = load_checkpoint("sparse-recovered.pt")
    assert payload["pruning"]["base"]["name"] == "model.pt" and "optimizer" not in payload
    again = prune_command(capsys, *words)[1]
    assert "was recovered by these settings already" in again and perplexities(again) == found
    error = one_line_error(prune_command(capsys, *words, "--finetune_epochs", 2))
    assert "recovered with other settings (finetune_epochs 1.0 -> 2.0)" in error


def test_lora_recovery_leaves_adapter_and_merged_model_with_the_same_zeros(records: Path, capsys: Any) -> None:
    words = (
        "--method",
        "wanda",
        "--pattern",
        "block",
        "--compact",
        "--out",
        "a.pt",
        "--finetune_method",
        "lora",
        *RECOVER,
    )
    code, out, err = prune_command(capsys, *words, "--finetune_data", "set", "--finetune_lr", 0.05)
    assert code == 0, err
    assert re.search(r"trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: ", out)
    adapter, merged = open_model("logs/a/recovery/model_00003.pt").model, open_model("a-recovered.pt").model
    ids = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged(ids)[..., :257], adapter(ids)[..., :257], atol=1e-4, rtol=1e-4)
    before, after = zeros("a.pt"), zeros("a-recovered.pt")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(weights_of("a.pt")["h.0.attn.q_proj.weight"], merged.h[0].attn.q_proj.weight)


def test_a_rate_for_lora_of_its_own(capsys: Any, records: Path) -> None:
    out = prune_command(capsys, "--out", "a.pt", "--finetune_data", "set", *RECOVER, "--finetune_method", "lora")[1]
    assert "  Learning rate: 0.0002" in out


def test_an_interrupted_recovery_goes_on_to_the_same_bits(here: Path, records: Path, capsys: Any) -> None:
    words = ("--prune_mlp", "--finetune_data", "set", "--finetune_lr", 1e-2, *RECOVER)
    prune_command(capsys, *words, "--out", "whole.pt")

    def stop(number: int, loss: torch.Tensor) -> torch.Tensor:
        if number == 3:  # the second micro-batch of the second step
            signal.raise_signal(signal.SIGTERM)
        return loss

    with changed_losses(stop):
        code, out, _ = prune_command(capsys, *words, "--out", "cut.pt")
    assert code == 0 and "Recovery was stopped. The same command goes on with it." in out
    assert not (here / "cut-recovered.pt").exists()
    code, out, _ = prune_command(capsys, *words, "--out", "cut.pt")
    assert code == 0 and "Resuming from" in out and "after recovery" in perplexities(out)
    for name, tensor in weights_of("whole-recovered.pt").items():
        assert torch.equal(weights_of("cut-recovered.pt")[name], tensor), name


def test_distillation_learns_from_the_model_that_was_pruned(records: Path, capsys: Any) -> None:
    words = ("--prune_mlp", "--out", "a.pt", "--finetune_data", "set", *RECOVER, "--objective", "distill")
    code, out, err = prune_command(capsys, *words, "--finetune_lr", 1e-2, "--distill_hidden", 0.1)
    assert code == 0, err
    assert "Objective: distill, KL from model.pt, over the whole vocabulary" in out and "distill/kl" in out
    # The second stage, of what the first left: its teacher is still the model that was pruned.
    stage = ("--method", "none", "--out", "b.pt", "--finetune_data", "set", *RECOVER, "--objective", "distill")
    code, out, err = prune_command(capsys, *stage, "--finetune_lr", 5e-3, base="a-recovered.pt")
    assert code == 0, err
    assert "KL from model.pt" in out and set(perplexities(out)) == {"before recovery", "after recovery"}
    assert open_model("b.pt").parameters == open_model("a.pt").parameters


def test_zeros_that_another_tool_left_are_taken_as_pruned(here: Path, records: Path, capsys: Any) -> None:
    payload = load_checkpoint("model.pt")
    name = "h.1.mlp.up_proj.weight"
    payload["model"][name] = payload["model"][name] * (torch.rand(48, 32, generator=torch.Generator()) > 0.5)
    save_checkpoint(here / "foreign.pt", payload)
    words = ("--method", "none", "--out", "b.pt", "--finetune_data", "set", *RECOVER, "--finetune_lr", 1e-2)
    code, out, err = prune_command(capsys, *words, base="foreign.pt")
    assert code == 0, err
    assert "zeros in 1 matrices, which no masks explain: taken as pruned" in out
    assert torch.equal(weights_of("b.pt")[name] == 0, weights_of("foreign.pt")[name] == 0)


def test_rounds_prune_by_and_by(here: Path, records: Path, capsys: Any) -> None:
    words = ("--method", "magnitude", "--sparsity", 0.6, "--rounds", 2, "--out", "a.pt", "--finetune_data", "set")
    code, out, err = prune_command(capsys, *words, *RECOVER, "--finetune_lr", 1e-3)
    assert code == 0, err
    assert "Round 1 of 2: sparsity 52.5%" in out and "Round 2 of 2: sparsity 60.0%" in out
    first, last = zeros("logs/a/round-1/pruned.pt"), zeros("a-recovered.pt")
    assert all(bool((last[name] | ~first[name]).all()) for name in first)
    assert share_of_zeros("a-recovered.pt") == pytest.approx(0.6, abs=0.01)


def test_shares_of_rounds_end_at_what_was_asked() -> None:
    settings = PruneSettings(pruning_ratio=0.4, sparsity=0.5, rounds=3)
    left = 1.0
    for number in (1, 2, 3):
        left *= 1 - round_shares(settings, number, left)[0]
    assert left == pytest.approx(0.6) and round_shares(settings, 3, left)[1] == 0.5
    assert round_shares(settings, 1, 1.0)[0] == pytest.approx(0.4 / 3)
    assert round_shares(settings, 2, 0.7)[0] == 0, "more than its part is gone by then"


def measured_here(refs: list[str], runs: int, device: str, say: Any) -> list[dict[str, Any]]:
    """`speed_and_memory` without processes."""
    answers = []
    for ref in refs:
        commands, out = io.StringIO("run\n" * runs + "end\n"), io.StringIO()
        with mock.patch.object(sys, "stdin", commands), redirect_stdout(out):
            probe.main(ref, device)
        *found, last = map(json.loads, out.getvalue().splitlines())
        speeds = [answer["tokens"] / answer["seconds"] for answer in found]
        answers.append({"tokens_per_s": speeds[0], "runs": speeds, **last})
    return answers


# -- the comparison --------------------------------------------------------------------------------------------------


def test_help_answers_without_torch() -> None:
    probe = "import runpy, sys; sys.argv = ['prune.py', '--help']\n"
    probe += "try: runpy.run_path('prune.py', run_name='__main__')\n"
    probe += "except SystemExit as stop: print(stop.code, 'torch' in sys.modules, 'numpy' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", probe], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 False False\n") and "--finetune_warmup_steps" in done.stdout


def test_a_block_sparse_model_says_what_it_takes_and_how_fast_it_is(here: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("pruning.comparison.speed_and_memory", measured_here)
    words = ("--method", "sparsegpt", "--pattern", "block", "--out", "a.pt", "--test_after_prune", "--speed_runs", 1)
    code, _, err = prune_command(capsys, *words)
    assert code == 0, err
    report = json.loads((here / "logs/a/report.json").read_text())
    dense, pruned = report["models"]
    assert pruned["weights"] == "sparse" and dense["weights"] == "float32"
    assert pruned["compact_bytes"] < dense["file_bytes"] and dense["compact_bytes"] is None
    notes = "\n".join(report["notes"])
    assert re.search(r"Generation is (NOT )?faster than the dense model's: [\d.]+ times", notes)
    assert "its zeros are left out" in notes and "Without its zeros it takes 0." in notes


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_whole_of_it_with_speed_and_a_page(
    processes: bool, here: Path, records: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Quickly with the speed of one process, slowly with one for each model."""
    if not processes:
        monkeypatch.setattr("pruning.comparison.speed_and_memory", measured_here)
    words = ("--prune_mlp", "--out", "a.pt", "--finetune_data", "set", *RECOVER, "--report", "a.json")
    code, out, err = prune_command(capsys, *words, "--speed_runs", 1)
    assert code == 0, err
    report = json.loads((here / "a.json").read_text())
    assert [model["label"] for model in report["models"]] == ["dense", "pruned", "recovered"]
    dense, pruned, recovered = report["models"]
    assert pruned["parameters"] < dense["parameters"] == open_model("model.pt").parameters
    assert pruned["file_bytes"] == (here / "a.pt").stat().st_size and recovered["perplexity"] is not None
    assert all(model["tokens_per_s"] > 0 and model["peak_memory_mb"] > 50 for model in report["models"])
    assert any("Generation is" in note for note in report["notes"]) and report["rival"]["perplexity"] > 1
    assert [len(row["answers"]) for row in report["answers"]["rows"]] == [3, 3, 3]
    assert "stride 32, no begin token" in report["protocol"] and "other.txt" in report["protocol"]
    page = (here / "a.html").read_text()
    assert "<svg" in page and "layers dropped" in page and "http" not in page.replace("http-equiv", "")
    assert "What each layer kept" in out and "perplexity" in out


def test_the_embedded_text_serves_where_none_is_named(here: Path, monkeypatch: Any, capsys: Any) -> None:
    documents = [f"The module m{i}\n\n" + f"sentence {i} of the embedded text. " * 20 for i in range(60)]
    monkeypatch.setattr("pruning.text.pydocs_documents", lambda: iter(documents))
    monkeypatch.setattr("data.pydocs.pydocs_documents", lambda: iter(documents))
    monkeypatch.setattr("data.cache.resolve_data_dir", lambda name: here / "data" / name)
    words = ("--base_model", "model.pt", "--save_model", "--save_ckpt_log_name", "quick_test", "--pruning_ratio", 0.25)
    words = (*words, "--prune_mlp", "--importance_samples", 20, "--importance_seq_len", 32, "--eval_seq_len", 32)
    code, out, err = prune_command(capsys, *words, *RECOVER, small=False)
    assert code == 0, err
    assert "Calibration: 20 windows of 32 tokens from the embedded text (documentation of Python); --calib" in out
    assert "Perplexity is measured on the embedded text (documents kept for evaluation); --eval_text names" in out
    assert "Recovery reads the embedded text (documentation of Python); --finetune_data names another" in out
    assert (here / "logs/quick_test/recovered.pt").exists() and len(list(here.glob("data/cache-pydocs-*"))) == 1


SCENARIOS = {
    "standard": "--pruning_ratio 0.25 --prune_mlp --finetune_method full --finetune_lr 1e-5 --finetune_epochs 2 "
    "--finetune_samples 1000 --finetune_grad_accum 4 --finetune_warmup_steps 50",
    "recommended": "--pruning_ratio 0.25 --prune_mlp --finetune_method full --finetune_lr 1e-5 --finetune_epochs 2 "
    "--finetune_samples 1000 --finetune_batch_size 1 --finetune_grad_accum 4 --finetune_max_grad_norm 1.0 "
    "--finetune_weight_decay 0.01 --finetune_warmup_steps 50",
    "aggressive": "--pruning_ratio 0.30 --prune_mlp --finetune_method full --finetune_lr 2e-5 --finetune_epochs 3 "
    "--finetune_samples 2000 --finetune_grad_accum 8 --finetune_warmup_steps 100 --finetune_weight_decay 0.02",
    "lora": "--pruning_ratio 0.25 --prune_mlp --finetune_method lora --finetune_lr 2e-4 --finetune_epochs 3 "
    "--finetune_samples 1500 --finetune_grad_accum 8",
    "quick": "--pruning_ratio 0.25 --importance_samples 20 --layer_start 10 --layer_end 15 --finetune_samples 100 "
    "--finetune_epochs 1 --finetune_batch_size 1 --finetune_grad_accum 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_scenarios_of_the_guide_run_as_written(name: str, here: Path, monkeypatch: Any, capsys: Any) -> None:
    """But for the script's name and the model's path: a model of 16 layers of width 32."""
    monkeypatch.setattr("data.cache.resolve_data_dir", lambda at: here / "data" / at)
    save_model(here / "model.pt", dataclasses.replace(LLAMA, n_layer=16))
    words = ["--save_ckpt_log_name", name, *SCENARIOS[name].split(), "--save_model", "--test_after_prune", "--finetune"]
    code, out, err = prune_command(capsys, *words, small=False)
    assert code == 0, err
    assert set(perplexities(out)) == {"before pruning", "after pruning", "after recovery"}
    assert (here / f"logs/{name}/recovered.pt").exists() and (here / f"logs/{name}/report.html").exists()
