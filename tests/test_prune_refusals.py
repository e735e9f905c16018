"""What prune.py will not do: replace files of other runs, take flags that say nothing, work towards a bad path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from formats.checkpoint import load_checkpoint, save_checkpoint
from tests.pruning_runs import RECOVER, prune_command, save_model, write_texts
from tests.scripts import one_line_error
from tests.tiny import text_set


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model and texts."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    save_model(tmp_path / "model.pt")
    return tmp_path


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
