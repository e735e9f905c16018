"""The memory plan: what it says autograd keeps is what autograd keeps, and its total is what a run really takes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.checkpoint import save_checkpoint
from formats.gguf_write import write_gguf
from formats.hf_write import write_huggingface
from formats.open_model import load_payload, read_config
from model.config import GPTConfig, preset
from model.gpt import GPT
from model.tuning import apply_method
from tests.runs import tune
from tests.tiny import BYTES, record_set
from tests.tiny_checkpoints import save_tiny
from training import launch
from training.network import chosen_method
from training.plan import MemoryPlan, plan_memory
from training.plan_report import largest_batch, savings
from training.run_settings import FinetuneSettings, RunSettings, TrainSettings

ROOT = Path(__file__).resolve().parent.parent

SIZES: dict[str, Any] = {"n_layer": 4, "n_head": 4, "head_dim": 32, "n_embd": 128, "vocab_size": 500, "block_size": 160}


def config(name: str = "tiny") -> GPTConfig:
    narrow = {"n_kv_head": 2, "mlp_dim": 352} if name.startswith("llama") else {"n_kv_head": 4, "mlp_dim": 512}
    return preset(name, **SIZES, **narrow)


def settings(method: str | None = None, **more: Any) -> RunSettings:
    values = {"batch_size": 3, "block_size": 128, "grad_accum_steps": 1, "device": "cpu", **more}
    if method is None:
        return TrainSettings(**values)
    return FinetuneSettings(finetune_method=method, **values)  # type: ignore[arg-type]


def kept_by_autograd(run: RunSettings, network: GPTConfig) -> int:
    """Bytes of the arrays that one forward leaves for backward, each counted once, weights left out."""
    model = GPT(dataclasses.replace(network, dropout=run.dropout))
    if isinstance(run, FinetuneSettings):
        apply_method(model, run.finetune_method, chosen_method(run))
    model.gradient_checkpointing = run.gradient_checkpointing
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(0, 500, (run.batch_size, run.block_size))
    where: dict[str, Any] = {}
    if isinstance(run, FinetuneSettings):
        where = {"doc_ids": torch.zeros_like(ids), "positions": torch.arange(run.block_size).expand_as(ids)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(ids, ids, **where)
    return sum(sizes.values())


CASES: dict[str, tuple[str, RunSettings]] = {
    "pretrain": ("tiny", settings()),
    "pretrain-llama": ("llama-tiny", settings()),
    "pretrain-dropout": ("tiny", settings(dropout=0.1)),
    "pretrain-checkpointed": ("tiny", settings(gradient_checkpointing=True)),
    "full": ("tiny", settings("full")),
    "full-llama": ("llama-tiny", settings("full")),
    "freeze": ("tiny", settings("freeze", train_layers=2)),
    "freeze-llama": ("llama-tiny", settings("freeze", train_layers=1)),
    "lora": ("tiny", settings("lora")),
    "lora-llama": ("llama-tiny", settings("lora")),
    "lora-all": ("llama-tiny", settings("lora", lora_target_modules=("all-linear",))),
    "lora-mlp-no-dropout": ("tiny", settings("lora", lora_target_modules=("up_proj",), lora_dropout=0.0)),
    "lora-upper": ("tiny", settings("lora", lora_target_modules=("h.2.attn.q_proj", "h.3.attn.o_proj"))),
    "dora": ("tiny", settings("lora", use_dora=True)),
    "qlora": ("llama-tiny", settings("qlora")),
    "adapter": ("tiny", settings("adapter", adapter_dim=16)),
    "houlsby": ("llama-tiny", settings("adapter", adapter_dim=16, adapter_placement="houlsby")),
    "prefix": ("tiny", settings("prefix", prefix_length=4, prefix_hidden=16)),
    "p_tuning": ("llama-tiny", settings("p_tuning", prefix_length=4, prefix_hidden=16)),
}


@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_autograd_keeps(case: str) -> None:
    name, run = CASES[case]
    expected = kept_by_autograd(run, config(name))
    if run.gradient_checkpointing:  # one block is computed again in backward, which the forward here does not show
        plain = plan_memory(dataclasses.replace(run, gradient_checkpointing=False), config(name)).activations
        expected += (plain - 4 * 3 * 128 * 128) // 4  # without the last norm's input
    assert plan_memory(run, config(name)).activations == pytest.approx(expected, rel=0.05)


# -- the total -------------------------------------------------------------------------------------------------------

BATCH: dict[str, Any] = {"batch_size": 4, "block_size": 256, "grad_accum_steps": 1, "checkpoint_interval": 0}
MEASURED: dict[str, dict[str, Any]] = {
    "full": BATCH,
    "lora": {**BATCH, "finetune_method": "lora"},
    "freeze": {**BATCH, "finetune_method": "freeze", "train_layers": 2},
    "checkpointed": {**BATCH, "gradient_checkpointing": True},
    "accumulated": {**BATCH, "batch_size": 2, "grad_accum_steps": 2},
}
MORE: dict[str, dict[str, Any]] = {
    "qlora": {**BATCH, "finetune_method": "qlora"},
    "adapter": {**BATCH, "finetune_method": "adapter"},
    "lora-all": {**BATCH, "batch_size": 8, "finetune_method": "lora", "lora_target_modules": ("all-linear",)},
    "prefix": {**BATCH, "finetune_method": "prefix"},
    "p_tuning": {**BATCH, "block_size": 240, "finetune_method": "p_tuning", "prefix_length": 8},
}
TUNED = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"  # as the scripts begin, see training/heap.py
# About 9 million parameters each.
NETWORKS: dict[str, dict[str, Any]] = {
    "tiny": {"n_layer": 5, "n_head": 6, "n_kv_head": 6, "head_dim": 64, "n_embd": 384, "mlp_dim": 1536},
    "llama-tiny": {"n_layer": 6, "n_head": 6, "n_kv_head": 2, "head_dim": 64, "n_embd": 384, "mlp_dim": 1024},
}


def network_of(name: str) -> GPTConfig:
    return preset(name, vocab_size=257, block_size=256, **NETWORKS[name])


def measure(folder: Path, network: GPTConfig, cases: dict[str, dict[str, Any]], **environment: str) -> dict[str, int]:
    """The bytes that a run of each case took at most."""
    record_set(folder / "records", n_records=150)
    payload = {"model": GPT(network).state_dict(), "config": network.to_dict(), "tokenizer": BYTES.spec()}
    save_checkpoint(folder / "base.pt", payload)
    command = [sys.executable, str(ROOT / "tests" / "measured_memory.py"), str(folder), json.dumps(cases)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    taken: dict[str, int] = json.loads(done.stdout)
    assert min(taken.values()) > 100e6, "too small to tell from the libraries' own"
    return taken


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return measure(tmp_path_factory.mktemp("memory"), network_of("tiny"), MEASURED, GLIBC_TUNABLES=TUNED)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", MEASURED)
def test_the_total_is_within_15_percent_of_what_a_run_takes(
    taken: dict[str, int], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", TUNED)  # for the plan here, too
    assert plan_memory(FinetuneSettings(**MEASURED[case]), network_of("tiny")).total == pytest.approx(
        taken[case], rel=0.15
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_total_is_within_15_percent_for_every_method(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", TUNED)
    cases = {**MEASURED, **MORE}
    found = measure(tmp_path, network_of(name), cases)
    plans = {case: plan_memory(FinetuneSettings(**cases[case]), network_of(name)).total for case in cases}
    assert plans == pytest.approx(found, rel=0.15)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_total_is_closer_where_freed_memory_is_given_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the allocator's holes, which depend on the order of sizes, what is left is arithmetic."""
    monkeypatch.setenv("ESPALIER_MALLOC", "default")  # for the plan here, too
    cases = {**MEASURED, **MORE}
    found = measure(tmp_path, network_of(name), cases, MALLOC_MMAP_THRESHOLD_="65536")
    plans = {case: plan_memory(FinetuneSettings(**cases[case]), network_of(name)) for case in cases}
    assert {plan.allocator for plan in plans.values()} == {0}
    assert {case: plan.total for case, plan in plans.items()} == pytest.approx(found, rel=0.12)


# -- what is printed ---------------------------------------------------------------------------------------------------


def test_the_plan_is_printed_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No data set is there, the weights are not looked at, and no folder is made."""
    save_tiny(tmp_path / "base.pt", block_size=128)
    data = bytearray((tmp_path / "base.pt").read_bytes())
    data[-200] ^= 1  # the digest no longer holds, which nobody who loads weights would let pass
    (tmp_path / "base.pt").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    told = tune(Path("nowhere"), tmp_path / "run", tmp_path / "base.pt", plan=True, finetune_method="lora")
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert "Memory plan: 35,584 parameters, 2,048 train," in out and "micro-batches of 1 x 128 tokens" in out
    for row in ("weights:", "gradients:", "optimizer state:", "activations:", "logits and passing arrays:",
                "at the peak:", "--gradient_checkpointing saves", "Largest --batch_size for the"):  # fmt: skip
        assert row in out
    assert told["total"] >= told["weights"] + told["activations"] and "% of the " in out


def test_the_default_model_that_is_missing_is_planned_as_the_preset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = launch.finetune(FinetuneSettings(plan=True, preset="tiny", block_size=256, device="cpu"))
    assert "planned for --preset tiny" in capsys.readouterr().out
    assert told == launch.finetune(FinetuneSettings(plan=True, preset="tiny", block_size=256, device="cpu")) | {
        "free": told["free"], "largest_batch": told["largest_batch"]}  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"gone\.pt: no such checkpoint"):
        launch.finetune(FinetuneSettings(plan=True, pretrained_checkpoint="gone.pt", device="cpu"))


def test_savings_are_differences_of_plans_and_the_largest_comes_first() -> None:
    run = settings("full", batch_size=4)
    found = savings(run, config(), "cpu", 1)
    assert [less for _, less in found] == sorted((less for _, less in found), reverse=True)
    now = plan_memory(run, config()).total
    expected = {
        "--gradient_checkpointing": {"gradient_checkpointing": True},
        "--batch_size 2": {"batch_size": 2},
        "--block_size 64": {"block_size": 64},
        "--finetune_method lora": {"finetune_method": "lora"},
        "--finetune_method qlora": {"finetune_method": "qlora"},
    }
    assert dict(found) == {
        flag: now - plan_memory(dataclasses.replace(run, **change), config()).total for flag, change in expected.items()
    }
    cheap = settings("qlora", batch_size=1, gradient_checkpointing=True)
    assert {flag.split()[0] for flag, _ in savings(cheap, config(), "cpu", 1)} <= {"--block_size"}


def test_processes_share_out_what_their_way_says_and_nothing_else() -> None:
    def plan(way: str, processes: int = 4, device: str = "cuda", **more: Any) -> MemoryPlan:
        run = settings("full", parallel=way, dtype="float32", **more)
        return plan_memory(run, config(), device, processes)

    ddp, zero, fsdp = (plan(way) for way in ("ddp", "zero1", "fsdp"))
    assert zero == dataclasses.replace(ddp, optimizer=ddp.optimizer // 4)
    numbers, block = ddp.parameters, sum(weight.numel() for weight in GPT(config()).h[0].parameters())
    outside = numbers - 4 * block
    assert fsdp.optimizer == ddp.optimizer // 4 and fsdp.activations == ddp.activations
    assert fsdp.weights == numbers + 4 * (2 * block + outside)
    assert fsdp.gradients == numbers + 4 * max(block, outside)
    assert plan("fsdp", grad_accum_steps=2).earlier_gradients == 4 * numbers, "few enough to stay whole"
    offload = plan("fsdp", cpu_offload=True)
    assert offload.optimizer == 0 and offload.weights == 4 * (2 * block + outside)
    assert plan("fsdp", processes=1) == plan("zero1", processes=1) == plan("ddp", processes=1)
    flags = {flag for flag, _ in savings(settings("full", parallel="ddp"), config(), "cuda", 4)}
    assert {"--parallel zero1", "--parallel fsdp"} <= flags
    muon = {flag for flag, _ in savings(settings("full", optimizer="muon"), config(), "cuda", 4)}
    assert "--parallel zero1" in muon and "--parallel fsdp" not in muon
    assert "--cpu_offload" in dict(savings(settings("full", parallel="fsdp"), config(), "cuda", 4))


def test_the_largest_batch_fits_and_twice_it_does_not() -> None:
    run, free = settings("lora"), 200_000_000
    best = largest_batch(run, config(), "cuda", 1, free)
    sizes = {
        size: plan_memory(dataclasses.replace(run, batch_size=size), config(), "cuda").total
        for size in (best, 2 * best)
    }
    assert sizes[best] <= 0.9 * free < sizes[2 * best]
    assert largest_batch(run, config(), "cuda", 1, 1000) == 0


def test_more_rows_more_states_more_memory() -> None:
    def total(**more: Any) -> int:
        return plan_memory(settings("full", **more), config()).total

    assert total() < total(batch_size=6) < total(batch_size=6, dropout=0.1)
    assert total(gradient_checkpointing=True) < total()
    assert total(grad_accum_steps=2) > total()
    assert total(optimizer="muon") < total()
    assert total(objective="dpo") > total(batch_size=6), "pairs, and a frozen copy"


def test_out_of_memory_names_the_plan_and_what_each_remedy_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_set(tmp_path / "records")
    save_tiny(tmp_path / "base.pt", block_size=128)
    cpu = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: tried 7 bytes"
    )
    for error in (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), cpu):
        monkeypatch.setattr("training.loop.Trainer.run", lambda self, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(
            ValueError, match=r"out of memory: .* planned to take .*B .*--plan.*--\w+ \d* ?\(.* less\)"
        ) as told:
            tune(tmp_path / "records", tmp_path / "run", tmp_path / "base.pt", batch_size=2)
        assert "\n" not in str(told.value)
    monkeypatch.setattr("training.loop.Trainer.run", lambda self: (_ for _ in ()).throw(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        tune(tmp_path / "records", tmp_path / "run", tmp_path / "base.pt")


# -- configs without weights -------------------------------------------------------------------------------------------


def test_a_config_is_read_from_every_format(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base.pt", position="rope", norm="rmsnorm", norm_bias=False, mlp="swiglu", qkv_bias=False,
              o_bias=False, mlp_bias=False)  # fmt: skip
    payload = load_payload(tmp_path / "base.pt")
    write_huggingface(payload, tmp_path / "hf")
    write_gguf(payload, tmp_path / "base.gguf", "f32")
    (weights,) = (tmp_path / "hf").glob("*.safetensors")
    weights.unlink()
    expected = GPTConfig.from_dict(payload["config"])
    for name in ("base.pt", "hf", "base.gguf"):
        found = read_config(tmp_path / name)
        assert (found.n_layer, found.n_embd, found.vocab_size) == (
            expected.n_layer,
            expected.n_embd,
            expected.vocab_size,
        )
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_config(tmp_path / "gone.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no config"):
        read_config(tmp_path / "other.pt")
