"""What prune.py will not do: replace files of other runs, take flags that say nothing, work towards a bad path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from formats.checkpoint import load_checkpoint, save_checkpoint
from pruning.settings import PruneSettings, check, with_changes
from tests.pruning_runs import RECOVER, prune_command, save_model, working_folder
from tests.scripts import one_line_error
from tests.tiny import text_set
from training.settings import parse


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model and texts."""
    return working_folder(tmp_path, monkeypatch)


# -- files of others -------------------------------------------------------------------------------------------------


def test_the_report_of_another_run_stays(here: Path, capsys: Any) -> None:
    first = ("--method", "magnitude", "--out", "x/pruned.pt")
    assert prune_command(capsys, *first, "--test_after_prune")[0] == 0
    report = here / "logs/pruned/report.json"
    before = report.read_bytes()
    for words, says in (
        (("--out", "y/pruned.pt", "--test_after_prune"), "(out x/pruned.pt, now y/pruned.pt)"),
        (("--out", "z.pt", "--report", str(report)), "(out x/pruned.pt, now z.pt)"),
        (("--out", "x/pruned.pt", "--sparsity", 0.7, "--test_after_prune"), "(sparsity 0.5, now 0.7)"),
    ):
        error = one_line_error(prune_command(capsys, "--method", "magnitude", *words))
        assert "is the report of another run " + says in error and report.read_bytes() == before
    assert not (here / "y").exists() and not (here / "z.pt").exists()
    code, _, err = prune_command(capsys, *first, "--test_after_prune", "--eval_samples", 8)
    assert code == 0, err
    assert report.read_bytes() != before, "the same run, measured in another way"


@pytest.mark.parametrize("compact", [(), ("--compact",)])
def test_a_copy_with_masks_replaces_nothing_but_itself(compact: tuple[str, ...], here: Path, capsys: Any) -> None:
    text_set(here / "set", n_documents=80)
    payload = load_checkpoint("model.pt")
    name = "h.1.mlp.up_proj.weight"
    payload["model"][name] = payload["model"][name] * (torch.rand(48, 32, generator=torch.Generator()) > 0.5)
    save_checkpoint(here / "foreign.pt", payload)
    words = ("--method", "none", "--save_ckpt_log_name", "mm", "--save_model", "--finetune_data", "set", *RECOVER)
    masked = save_model(here / "logs/mm/masked.pt", seed=7)
    before = masked.read_bytes()
    error = one_line_error(prune_command(capsys, *words, *compact, base="foreign.pt"))
    assert "masked.pt: is there already and no copy of foreign.pt" in error and masked.read_bytes() == before
    masked.unlink()
    for _ in range(2):  # what the first run leaves is this run's own
        code, _, err = prune_command(capsys, *words, *compact, base="foreign.pt")
        assert code == 0, err
        (here / "logs/mm/recovered.pt").unlink()


# -- bad paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--out model.pt/x.pt", "--out model.pt/x.pt: model.pt is no folder, choose another"),
        ("--out model.pt/deep/x.pt", "--out model.pt/deep/x.pt: model.pt is no folder, choose another"),
        ("--out /proc/x.pt", "--out /proc/x.pt: no file can be made in /proc ("),
        ("--out x.pt --report model.pt/r.json", "--report model.pt/r.json: model.pt is no folder, choose another"),
        ("--out x.pt --report /proc/r.json", "--report /proc/r.json: no file can be made in /proc ("),
        ("--out x.pt --test_after_prune --prompts nosuch.txt", "nosuch.txt: no such file of prompts"),
        ("--out x.pt --save_ckpt_log_name afile", "--save_ckpt_log_name: logs/afile is no folder"),
        ("--save_model --save_ckpt_log_name afile/x", "--save_ckpt_log_name: logs/afile is no folder, choose another"),
    ],
)
def test_a_bad_path_is_told_before_the_work(words: str, says: str, here: Path, capsys: Any) -> None:
    (here / "logs").mkdir()
    (here / "logs/afile").touch()
    outcome = prune_command(capsys, "--method", "magnitude", *words.split())
    assert says in one_line_error(outcome) and "PPL" not in outcome[1]
    assert sorted(path.name for path in (here / "logs").iterdir() if path.is_file()) == ["afile"]
    assert not (here / "x.pt").exists() and not list(here.glob("tmp*"))


# -- flags that say nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--compact", "--compact says nothing to --method structured"),
        ("--method drop_layers --compact", "--compact says nothing to --method drop_layers"),
        ("--finetune_lr 1e-4", "--finetune_lr says nothing without recovery: add --finetune"),
        ("--finetune_method lora", "--finetune_method says nothing without recovery: add --finetune"),
        ("--lora_r 16", "--lora_r says nothing without recovery: add --finetune"),
        ("--teacher nosuch.pt", "--teacher says nothing without recovery: add --finetune"),
        ("--finetune --lora_r 16", "--lora_r says nothing to --finetune_method full: add --finetune_method lora"),
        ("--finetune --teacher nosuch.pt", "--teacher says nothing to --objective sft: add --objective distill"),
        ("--finetune --distill_hidden 0.1", "--distill_hidden says nothing to --objective sft: add --objective dist"),
        ("--prompts book.txt", "--prompts says nothing without a comparison: add --test_after_prune"),
    ],
)
def test_a_flag_without_effect_is_refused(words: str, says: str, here: Path, capsys: Any) -> None:
    assert says in one_line_error(prune_command(capsys, "--out", "a.pt", *words.split()))
    assert not (here / "a.pt").exists()


def test_a_file_is_a_recipe_of_which_flags_take_a_part(here: Path, capsys: Any) -> None:
    recipe = "finetune: true\nfinetune_method: lora\nlora_r: 4\nfinetune_lr: 1.0e-4\ndistill_hard: 0.2\n"
    (here / "recipe.yaml").write_text(recipe)
    code, _, err = prune_command(capsys, "--config", "recipe.yaml", "--out", "a.pt", "--no_finetune")
    assert code == 0, err
    settings = parse(PruneSettings, ["--config", "recipe.yaml", "--base_model", "model.pt", "--save_model"])
    check(settings)
    check(with_changes(settings, {"finetune_method": "full"}))


def test_texts_may_be_named_that_a_method_does_not_read(capsys: Any) -> None:
    code, out, err = prune_command(capsys, "--method", "magnitude", "--finetune_data", "set", "--out", "a.pt")
    assert code == 0, err
    assert "Note: --calibration book.txt is not read, --method magnitude needs none" in out
    assert "Note: --finetune_data set is not read without --finetune" in out


def test_what_is_stored_with_its_zeros_is_not_said_to_be_compact(here: Path, capsys: Any) -> None:
    text_set(here / "set", n_documents=80)
    words = ("--method", "magnitude", "--out", "a.pt", "--finetune_data", "set", *RECOVER)
    assert prune_command(capsys, *words)[0] == 0
    error = one_line_error(prune_command(capsys, *words, "--compact"))
    assert "a.pt: is there already, with its zeros: leave --compact out" in error
    assert "export.py compact a.pt OUT.pt stores it without" in error
    (here / "a.pt").unlink()
    assert "a-recovered.pt: is there already, with" in one_line_error(prune_command(capsys, *words, "--compact"))
    (here / "a-recovered.pt").unlink()
    (here / "logs/a").rename(here / "logs/before")
    for _ in range(2):
        assert prune_command(capsys, *words, "--compact")[0] == 0
