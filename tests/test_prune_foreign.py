"""prune.py on models of other tools: zeros that nobody's mask explains, and layers that are gone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.gguf_write import write_gguf
from formats.open_model import load_payload, open_model
from model.pruning.matrices import matrices
from tests.gguf_files import alter
from tests.pruning_runs import LLAMA, prune_command, save_model, weights_of, working_folder
from tests.scripts import one_line_error

TAKEN = "which no masks explain: taken as pruned"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, whose rows quantisation takes, and texts."""
    return working_folder(tmp_path, monkeypatch, dataclasses.replace(LLAMA, mlp_dim=64))


def quantised(path: str, kind: str) -> str:
    """A GGUF file of a checkpoint whose blocks' matrices are quantised."""
    import gguf

    write_gguf(load_payload(path), Path("plain.gguf"), "f32")
    own = [t for t in gguf.GGUFReader("plain.gguf").tensors if t.name.startswith("blk") and "norm" not in t.name]
    packed = {t.name: (gguf.quants.quantize(np.array(t.data), gguf.GGMLQuantizationType[kind]), kind) for t in own}
    alter(Path("plain.gguf"), Path(f"{kind}.gguf"), None, packed)
    return f"{kind}.gguf"


def pruned_elsewhere(path: str, share: float, pattern: str) -> str:
    """A checkpoint without masks, `share` of whose blocks' weights some other tool has made zero."""
    payload, g = load_checkpoint("model.pt"), torch.Generator().manual_seed(0)
    for name, weight in payload["model"].items():
        if name.startswith("h.") and weight.dim() > 1:
            out, into = weight.shape
            if pattern == "2:4":
                kept = torch.rand(out, into // 4, 4, generator=g).argsort(dim=2).view(out, into) >= 2
            else:
                size = 8 if pattern == "block" else 1
                blocks = torch.rand(out // size, into // size, generator=g) > share
                kept = blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)
            payload["model"][name] = weight * kept
    save_checkpoint(path, payload)
    return path


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0"])
def test_the_zeros_of_a_quantised_dense_model_are_not_taken_as_pruned(kind: str, capsys: Any) -> None:
    """Symmetric kinds have an exact zero, which a tenth of the weights and more rounds to."""
    base = quantised("model.pt", kind)
    model = open_model(base).model
    found = matrices(model, range(3)).values()
    assert sum(int((m.weight == 0).sum()) for m in found) > 0.05 * sum(m.weight.numel() for m in found)
    code, out, err = prune_command(capsys, "--prune_mlp", "--out", "a.pt", base=base)
    assert code == 0 and TAKEN not in out, err
    words = ("--method", "sparsegpt", "--pattern", "block", "--block_size", 8, "--out", "b.pt")
    code, out, err = prune_command(capsys, *words, base=base)
    assert code == 0 and TAKEN not in out, err
    assert {mask.pattern for mask in open_model("b.pt").model.masks.values()} == {"8x8"}


@pytest.mark.parametrize(("share", "pattern"), [(0.3, "unstructured"), (0.5, "2:4"), (0.3, "block"), (0.1, "block")])
def test_the_zeros_of_a_model_that_was_pruned_elsewhere_are(share: float, pattern: str, capsys: Any) -> None:
    base = pruned_elsewhere("foreign.pt", share, pattern)
    words = ("--method", "magnitude", "--sparsity", 0.6, "--out", "a.pt")
    code, out, err = prune_command(capsys, *words, base=base)
    assert code == 0 and TAKEN in out, err
    before, after = weights_of(base), open_model("a.pt").model.masks
    assert not any(((before[name] == 0) & mask.dense()).any() for name, mask in after.items())


@pytest.mark.parametrize(("share", "kind"), [(0.5, "Q4_0"), (0.4, "Q5_0"), (0.3, "Q8_0")])
def test_so_are_those_of_one_that_was_quantised_after_that(share: float, kind: str, capsys: Any) -> None:
    base = quantised(pruned_elsewhere("foreign.pt", share, "unstructured"), kind)
    code, out, err = prune_command(capsys, "--method", "magnitude", "--sparsity", 0.7, "--out", "a.pt", base=base)
    assert code == 0 and TAKEN in out, err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--method", "magnitude"), "matrices"),
        (("--method", "magnitude", "--allocation", "unbalanced"), "matrices"),
        (("--method", "wanda", "--allocation", "owl"), "matrices"),
        (("--method", "sparsegpt", "--pattern", "block"), "matrices"),
        (("--method", "structured", "--prune_mlp"), "units"),
        (("--method", "structured"), "kv groups"),
        (("--method", "drop_layers"), "matrices"),
    ],
)
def test_layers_that_have_nothing_left_are_told(here: Path, words: tuple[str, ...], part: str, capsys: Any) -> None:
    gone = {"n_head": (4, 0, 4), "n_kv_head": (2, 0, 2), "mlp_dim": (48, 0, 48)}
    save_model(here / "model.pt", dataclasses.replace(LLAMA, **gone))
    only = (*words, "--layer_start", 1, "--layer_end", 2, "--out", "a.pt")
    error = one_line_error(prune_command(capsys, *only))
    assert error.startswith(f"error: model.pt: layers 1 to 2 (exclusive) have no {part} left")
    assert "--layer_end" in error and not (here / "logs/statistics").exists(), "told before anything is measured"
    code, _, err = prune_command(capsys, *words, "--out", "a.pt")
    assert code == 0, err


def test_attention_that_is_gone_leaves_the_mlp_to_be_pruned(here: Path, capsys: Any) -> None:
    save_model(here / "model.pt", dataclasses.replace(LLAMA, n_head=(0,) * 3, n_kv_head=(0,) * 3))
    error = one_line_error(prune_command(capsys, "--out", "a.pt"))
    assert "have no kv groups left that --method structured may take: add --prune_mlp" in error
    assert prune_command(capsys, "--out", "a.pt", "--prune_mlp")[0] == 0
