"""Every method of fine-tuning as a whole run: it learns, its files hold what they should, and open as what was trained.

What must not be mixed up is refused in one line: another base, another method, another size, flags of other methods.
"""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from formats.adapter import is_adapter
from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.export import merge_adapter
from formats.open_model import open_model
from formats.settings import MergeSettings
from model.gpt import GPT
from model.tuning import METHODS
from tests.full_checkpoints import same
from tests.runs import BARE, log, losses, tune
from tests.tiny import BYTES, record_set
from tests.tiny_checkpoints import tiny_model
from training import network

ROOT = Path(__file__).resolve().parent.parent

# Twelve steps at a rate that moves a random network; evaluated before the first and after the last.
STEPS: dict[str, Any] = {**BARE, "max_steps": 12, "max_lr": 2e-2, "dropout": 0.0}
STEPS |= {"block_size": 96, "total_batch_size": 192}
METHOD_CHANGES: dict[str, dict[str, Any]] = {
    "full": {},
    "progressive": {"unfreeze_stages": 2},
    "freeze": {"train_layers": 1},
    "lora": {"lora_r": 4, "lora_target_modules": ("q_proj,v_proj", "up_proj"), "use_rslora": True, "lora_dropout": 0.0},
    "qlora": {"lora_r": 4, "use_dora": True, "lora_dropout": 0.0},
    "adapter": {"adapter_dim": 8, "adapter_placement": "houlsby", "adapter_dropout": 0.0},
    "prefix": {"prefix_length": 4, "prefix_hidden": 16},
    "p_tuning": {"prefix_length": 4, "prefix_hidden": 16},
}


def changes(method: str, **more: Any) -> dict[str, Any]:
    """Settings of a run by this method."""
    return {**STEPS, **METHOD_CHANGES[method], "finetune_method": method, **more}


def save_base(path: Path, seed: int = 0) -> Path:
    model = tiny_model(seed, block_size=128, scale=3.0, n_layer=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = {"model": model.state_dict(), "config": model.config.to_dict(), "tokenizer": BYTES.spec()}
    save_checkpoint(path, payload)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with records, a base, and a finished run of each method asked for."""
    folder = tmp_path_factory.mktemp("methods")
    record_set(folder / "records")
    save_base(folder / "base.pt")
    save_base(folder / "other.pt", seed=1)
    return folder


@contextmanager
def caught_models() -> Iterator[list[GPT]]:
    """The networks that runs train, as they are when the run has ended."""
    caught: list[GPT] = []

    def build(*args: Any) -> network.Network:
        made = network.build_network(*args)
        caught.append(made.model)
        return made

    with mock.patch("training.launch.build_network", build):
        yield caught


FINISHED: dict[tuple[Path, str], tuple[dict[str, Any], GPT]] = {}


def run_of(place: Path, method: str) -> tuple[dict[str, Any], GPT]:
    """Summary and network of a run by this method in place/method, trained once."""
    key = place, method
    if key not in FINISHED:
        with caught_models() as models:
            summary = tune(place / "records", place / method, place / "base.pt", **changes(method))
        FINISHED[key] = summary, models[0].eval()
    return FINISHED[key]


# -- what a run does ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHOD_CHANGES)
def test_every_method_lowers_the_loss_on_records_it_has_not_seen(place: Path, method: str) -> None:
    assert set(METHOD_CHANGES) == set(METHODS)
    summary, _ = run_of(place, method)
    assert summary["finished"] and len(losses(place / method)) == 12
    assert summary["val_loss"] < summary["val_loss_before"] - 0.02


@pytest.mark.parametrize("method", METHOD_CHANGES)
def test_best_pt_opens_as_the_model_that_was_trained(place: Path, method: str) -> None:
    _, trained = run_of(place, method)
    opened = open_model(place / method / "best.pt")
    ids = torch.tensor([BYTES.encode("the quick brown fox jumps")])
    with torch.no_grad():
        logits = opened.model(ids)
        base = open_model(place / "base.pt").model(ids)
    torch.testing.assert_close(logits, trained(ids).detach(), rtol=0, atol=1e-5)
    assert (logits - base)[..., :257].abs().max() > 0.1, "nothing was learnt that the file could lack"


@pytest.mark.parametrize("method", METHOD_CHANGES)
def test_a_file_holds_the_adapter_alone_or_the_whole_model(place: Path, method: str) -> None:
    _, trained = run_of(place, method)
    base = load_checkpoint(place / "base.pt")["model"]
    for name in ("best.pt", "model_00011.pt"):
        payload = load_checkpoint(place / method / name)
        assert is_adapter(payload) == METHODS[method].adapts
        if not METHODS[method].adapts:
            assert set(payload["model"]) == set(base)
            continue
        assert not set(payload["model"]) & set(base)
        held = sum(tensor.numel() for tensor in payload["model"].values())
        assert held == sum(p.numel() for p in trained.parameters() if p.requires_grad)
    whole, part = (place / run / "best.pt" for run in ("full", method))
    if METHODS[method].adapts and method not in ("prefix", "p_tuning"):  # whose networks are as large as this base
        assert run_of(place, "full") and part.stat().st_size < whole.stat().st_size / 2


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("full", "trainable params: 42,080 || all params: 42,080 || trainable%: 100.0000"),
        # 3 layers x 4 x ((32 + 32) for q, the same for v, (32 + 64) for up)
        ("lora", "trainable params: 2,688 || all params: 44,768 || trainable%: 6.0043"),
        # a DoRA length for each of the 32 rows besides; the quantised weights count as what they stand for
        ("qlora", "trainable params: 1,728 || all params: 43,808 || trainable%: 3.9445"),
    ],
)
def test_the_run_says_how_much_trains(place: Path, method: str, line: str) -> None:
    run_of(place, method)
    assert line in log(place / method).splitlines()


def test_a_quantised_base_says_what_it_takes(place: Path) -> None:
    for method in ("lora", "qlora"):
        run_of(place, method)
        assert ("Quantised base: " in log(place / method)) == (method == "qlora")
    # 3 layers x (4 x 32 x 32 + 2 x 32 x 64) weights of 4 bytes
    assert "in place of 0.1 MB in float32" in log(place / "qlora")


def test_freezing_trains_the_last_layers_alone(place: Path) -> None:
    run_of(place, "freeze")
    before = load_checkpoint(place / "base.pt")["model"]
    after = load_checkpoint(place / "freeze" / "best.pt")["model"]
    changed = {name.rsplit(".", 2)[0] if name.startswith("h.") else name for name in before
               if not torch.equal(before[name], after[name])}  # fmt: skip
    assert {name.split(".")[1] for name in changed if name.startswith("h.")} == {"2"}
    assert not changed & {"wte.weight", "wpe.weight"} and "ln_f.weight" in changed


# -- one run after another ---------------------------------------------------------------------------------------------


def test_an_adapter_goes_on_where_it_was(place: Path, tmp_path: Path) -> None:
    """A second run by another rate, with the sizes of the adapter, not the defaults of the flags."""
    first, _ = run_of(place, "lora")
    flags = {**STEPS, "finetune_method": "lora", "adapter": str(place / "lora/best.pt"), "max_lr": 1e-3}
    second = tune(place / "records", tmp_path / "run", place / "base.pt", **flags)
    assert second["val_loss_before"] == pytest.approx(first["val_loss"], rel=1e-6)
    assert second["val_loss"] < first["val_loss"]
    saved, went_on = (load_checkpoint(folder / "best.pt") for folder in (place / "lora", tmp_path / "run"))
    assert went_on["adapter"] == saved["adapter"] and went_on["base"]["digest"] == saved["base"]["digest"]
    more = {**flags, "max_steps": 14, "auto_resume": True}
    assert tune(place / "records", tmp_path / "run", place / "base.pt", **more)["step"] == 13


def test_an_adapter_of_lora_plus_keeps_its_rates(place: Path, tmp_path: Path) -> None:
    run = changes("lora", lora_plus_ratio=4.0, max_steps=1)
    tune(place / "records", tmp_path / "first", place / "base.pt", **run)
    flags = {**STEPS, "finetune_method": "lora", "adapter": str(tmp_path / "first/best.pt"), "max_steps": 1}
    tune(place / "records", tmp_path / "second", place / "base.pt", **flags)
    for name in ("first", "second"):
        assert lr_scales(tmp_path / name, place) == {"lora_A": {1.0}, "lora_B": {4.0}}


def lr_scales(folder: Path, place: Path) -> dict[str, set[float]]:
    """What the rate of each kind of tensor is multiplied by, in a run resumed from the last checkpoint of `folder`."""
    seen: dict[str, set[float]] = {}
    with mock.patch("training.launch.build_optimizers", side_effect=RuntimeError("seen")) as build:
        with pytest.raises(RuntimeError, match="seen"):
            tune(place / "records", folder, place / "base.pt", **{**STEPS, "auto_resume": True})
        for name, scale in build.call_args.kwargs["lr_scales"].items():
            seen.setdefault(name.rsplit(".", 1)[1], set()).add(scale)
    return seen


@pytest.mark.parametrize("how", ["merged", "full"])
def test_a_second_stage_starts_from_what_the_first_made(place: Path, tmp_path: Path, how: str) -> None:
    """Two stages: LoRA on the result of a full run, or a full run on merged LoRA; the loss goes on from there."""
    first_method, then = ("lora", "full") if how == "merged" else ("full", "lora")
    first, _ = run_of(place, first_method)
    start = place / first_method / "best.pt"
    if how == "merged":
        merge_adapter(MergeSettings(adapter=str(start), out=str(tmp_path / "merged.pt")), print)
        start = tmp_path / "merged.pt"
    second = tune(place / "records", tmp_path / "run", start, **changes(then, max_lr=2e-3))
    assert second["val_loss_before"] == pytest.approx(first["val_loss"], rel=1e-4)
    assert second["val_loss"] < first["val_loss"]


def test_a_base_that_moved_is_found_with_the_run_or_where_it_is_said_to_be(place: Path, tmp_path: Path) -> None:
    run_of(place, "lora")
    (tmp_path / "both").mkdir()
    shutil.copy(place / "base.pt", tmp_path / "both")
    shutil.copytree(place / "lora", tmp_path / "both/lora")
    payload = load_checkpoint(place / "lora/best.pt")
    assert payload["base"]["path"] == "../base.pt"
    open_model(tmp_path / "both/lora/best.pt")  # beside it, as before
    # Only the run moved: the base is neither beside it nor at the name that it had.
    lost = {**payload, "base": {**payload["base"], "name": str(tmp_path / "gone.pt")}}
    save_checkpoint(tmp_path / "alone" / "run" / "model_00011.pt", lost)
    with pytest.raises(FileNotFoundError, match=r"its base is not at .*gone\.pt: name it with --base_model"):
        open_model(tmp_path / "alone/run/model_00011.pt")
    open_model(tmp_path / "alone/run/model_00011.pt", base_model=place / "base.pt")
    shutil.copy(place / "lora/model_00011.pt", tmp_path / "alone/run/model_00011.pt")
    more = {**changes("lora", max_steps=13), "auto_resume": True}
    assert tune(place / "records", tmp_path / "alone/run", place / "base.pt", **more)["step"] == 12
    with pytest.raises(ValueError, match=r"other\.pt have [0-9a-f]{12}: name the right one"):
        tune(place / "records", tmp_path / "alone/run", place / "other.pt", **{**more, "max_steps": 15})


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(place: Path, tmp_path: Path, argv: list[str], monkeypatch: Any, capsys: Any) -> str:
    """The one line with which finetune_dolly.py refuses these flags, exit code 2."""
    flags = ["--data_dir", str(place / "records"), "--log_dir", str(tmp_path / "run"), "--device", "cpu"]
    base = [] if {"--pretrained_checkpoint", "--base_model"} & set(argv) else ["--base_model", str(place / "base.pt")]
    monkeypatch.setattr(sys, "argv", ["finetune_dolly.py", *flags, "--block_size", "96", *base, *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "finetune_dolly.py"), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ")
    assert not list(tmp_path.glob("run/*.pt")) and not list(tmp_path.glob("run/earlier*"))
    return str(line)


LORA = ["--finetune_method", "lora"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*LORA, "--lora_r", "0"], "LoRA rank is 0: give a whole number of at least 1"),
        ([*LORA, "--lora_r", "-8"], "LoRA rank is -8"),
        ([*LORA, "--lora_r", "2.5"], "--lora_r"),
        ([*LORA, "--lora_alpha", "high"], "--lora_alpha"),
        ([*LORA, "--lora_alpha", "0"], "LoRA alpha is 0.0: give a number above 0"),
        ([*LORA, "--lora_dropout", "1"], "LoRA dropout is 1.0"),
        ([*LORA, "--lora_plus_ratio", "nan"], "LoRA lr_ratio is nan"),
        ([*LORA, "--lora_target_modules", "q_proj,w_proj"], "LoRA target 'w_proj' matches no layer: did you mean"),
        ([*LORA, "--lora_target_modules", ","], "LoRA has no targets"),
        ([*LORA, "--lora_target_modules", "lm_head"], "LoRA target 'lm_head' is tied to the embedding"),
        ([*LORA, "--lora_target_modules", "wte"], "is an embedding"),
        ([*LORA, "--lora_init", "pissa", "--lora_r", "33"], "LoRA rank 33 exceeds a weight of (32, 32)"),
        ([*LORA, "--pretrained_checkpoint", "no-such.pt"], "no-such.pt: no such checkpoint"),
        (["--finetune_method", "lorra"], "lora"),
        (["--finetune_method", "freeze", "--train_layers", "4"], "layers to train are 4: give 1 to 3"),
        (["--finetune_method", "progressive", "--unfreeze_stages", "0"], "--unfreeze_stages 0: expected at least 1"),
        (["--finetune_method", "progressive", "--layer_lr_decay", "0"], "--layer_lr_decay 0.0: expected more than 0"),
        (["--finetune_method", "adapter", "--adapter_dim", "0"], "adapter dim is 0"),
        (["--finetune_method", "prefix", "--prefix_length", "0"], "prefix length is 0"),
        (["--finetune_method", "p_tuning", "--prefix_length", "128"], "128"),
        (["--finetune_method", "qlora", "--quantization", "int4"], "int8"),
        (["--lora_r", "16"], "--lora_r 16 does nothing with --finetune_method full: it is for lora or qlora"),
        (["--lora_r", "8"], "--lora_r 8 does nothing with --finetune_method full: it is for lora or qlora"),
        (["--grpo_group", "8"], "--grpo_group 8 does nothing with --objective sft: it is for grpo"),
        ([*LORA, "--adapter_dim", "8"], "--adapter_dim 8 does nothing with --finetune_method lora: it is for adapter"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    place: Path, argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert says in refused(place, tmp_path, argv, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--base_model", "{adapter}"], "is an adapter: train it on with --adapter, or merge it (export.py merge)"),
        ([*LORA, "--adapter", "{base}"], "is a whole model, not an adapter: give it to --pretrained_checkpoint"),
        ([*LORA, "--adapter", "{adapter}", "--base_model", "{other}"], "name the right one with --base_model"),
        (["--adapter", "{adapter}"], "was trained by lora: add --finetune_method lora"),
        (["--finetune_method", "qlora", "--adapter", "{adapter}"], "was trained by lora"),
        ([*LORA, "--adapter", "{adapter}", "--lora_r", "16"], "holds a lora with lora_r 4, --lora_r asks for 16"),
        ([*LORA, "--adapter", "missing.pt"], "missing.pt"),
    ],
)
def test_a_wrong_adapter_or_base_is_refused(
    place: Path, argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run_of(place, "lora")
    files = {"adapter": place / "lora/best.pt", "base": place / "base.pt", "other": place / "other.pt"}
    words = [word.format(**files) for word in argv]
    assert says in refused(place, tmp_path, words, monkeypatch, capsys)


def test_an_adapter_without_its_base_is_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(place, "lora")
    monkeypatch.chdir(tmp_path)  # where there is no default model
    for more in ({}, {"adapter": str(place / "lora/best.pt")}):
        with pytest.raises(ValueError, match="base"):
            settings = {**changes("lora"), "pretrained_checkpoint": "logs/model_19072.pt", **more}
            tune(place / "records", tmp_path / "run", Path("logs/model_19072.pt"), **settings)


@pytest.mark.parametrize(
    ("method", "flags", "says"),
    [
        ("lora", {"finetune_method": "lora", "lora_r": 5}, "holds a lora with lora_r 4, --lora_r asks for 5"),
        ("qlora", {"finetune_method": "qlora", "quantization": "int8"}, "quantization nf4, --quantization asks for"),
        ("lora", {"finetune_method": "qlora"}, "is of a run with --finetune_method lora, the flags ask for qlora"),
        ("lora", {"finetune_method": "adapter"}, "is of a run with --finetune_method lora"),
        ("full", {"finetune_method": "lora"}, "start a new run from its result with --pretrained_checkpoint"),
    ],
)
def test_a_resumed_run_keeps_its_method_and_sizes(
    place: Path, method: str, flags: dict[str, Any], says: str, tmp_path: Path
) -> None:
    run_of(place, method)
    shutil.copytree(place / method, tmp_path / "run")
    with pytest.raises(ValueError, match=says):
        tune(place / "records", tmp_path / "run", place / "base.pt", **BARE, auto_resume=True, max_steps=14, **flags)
    assert (tmp_path / "run/model_00011.pt").exists() and not list(tmp_path.glob("run/earlier*"))


def test_a_resume_of_a_finished_run_needs_no_flags_of_its_method(place: Path, tmp_path: Path) -> None:
    run_of(place, "adapter")
    shutil.copytree(place / "adapter", tmp_path / "run")
    more = {**STEPS, "auto_resume": True, "max_steps": 13}
    done = tune(place / "records", tmp_path / "run", place / "base.pt", **more)
    assert done["finished"] and done["step"] == 12
    assert same(load_checkpoint(tmp_path / "run/model_00012.pt")["adapter"],
                load_checkpoint(place / "adapter/best.pt")["adapter"])  # fmt: skip
