"""`python -m formats.checkpoint`: says what a file is, whether it is whole, and where two differ."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.checkpoint_command import main
from model.masks import Mask
from tests.full_checkpoints import full_payload
from tests.test_house import ROOT


def written(path: Path, **changes: object) -> str:
    save_checkpoint(path, {**full_payload(), **changes})
    return str(path)


def test_verify_tells_whole_from_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = written(tmp_path / "good.pt"), tmp_path / "bad.pt"
    data = bytearray(Path(good).read_bytes())
    data[len(data) // 2] ^= 1
    bad.write_bytes(data)
    torch.save({"model": {}, "config": {}}, tmp_path / "plain.pt")
    assert main(["verify", good]) == 0
    assert "model, with its training state, step" in (out := capsys.readouterr().out) and "digest matches" in out
    assert main(["verify", good, str(bad), str(tmp_path / "none.pt"), str(tmp_path / "plain.pt")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        good,
        str(bad),
        *(str(tmp_path / f"{n}.pt") for n in ("none", "plain")),
    ]
    assert "is damaged" in lines[1] and "no such checkpoint" in lines[2] and "carries no digest" in lines[3]


def test_show_names_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    payload = full_payload()
    name, weight = next((name, w) for name, w in payload["model"].items() if w.dim() == 2)
    kept = torch.arange(weight.numel()).view_as(weight) % 2 == 0
    model = {**payload["model"], name: torch.where(kept, weight, 0)}
    file = written(tmp_path / "model.pt", model=model, masks={name: Mask.of(kept).spec()})
    assert main(["show", file]) == 0
    out = capsys.readouterr().out
    assert "pruned model" in out and "masks: 1 matrices, 50.00% zeros" in out
    assert f"{len(model)} tensors, {sum(w.numel() for w in model.values()):,} numbers, " in out
    assert "optimizer:" in out and "of tensors" in out


def test_diff_finds_each_change_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, same = written(tmp_path / "a.pt"), written(tmp_path / "b.pt")
    assert main(["diff", first, same]) == 0
    assert "hold the same" in capsys.readouterr().out
    payload = full_payload()
    name, weight = next(iter(payload["model"].items()))
    changed = weight.clone()
    changed.view(-1)[3] += 0.5
    other = written(tmp_path / "c.pt", model={**payload["model"], name: changed}, step=99, extra=1)
    assert main(["diff", first, other]) == 1
    assert set(capsys.readouterr().out.splitlines()) == {
        f"{name}: largest difference 0.5, 1 of {weight.numel():,}",
        f"step: {payload['step']} | 99",
        f"extra: only in {other}",
    }


def test_it_runs_as_a_module_and_refuses_what_says_nothing(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "formats.checkpoint", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert run("--help").stdout.startswith("usage: python -m formats.checkpoint")
    assert run("verify", written(tmp_path / "a.pt")).returncode == 0
    for wrong in ([], ["prove", "a.pt"], ["diff", "a.pt"], ["show"]):
        refused = run(*wrong)
        assert refused.returncode == 2 and refused.stderr.startswith("usage") and "Traceback" not in refused.stderr
    missing = run("diff", "a.pt", "b.pt")
    assert missing.returncode == 2 and missing.stderr == "a.pt: no such checkpoint\n"
    assert load_checkpoint(tmp_path / "a.pt")
