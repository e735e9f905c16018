"""The scripts for several machines, with stand-ins for torchrun and Slurm: the commands that they come to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NODES, SLURM = ROOT / "scripts" / "torchrun_nodes.sh", ROOT / "scripts" / "slurm.sbatch"


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def run(tmp_path: Path):
    """Runs a script with nothing but these variables; what it would have run, and its exit code."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    shown = 'echo "$(basename "$0") $* | $TORCH_DISABLE_SHARE_RDZV_TCP_STORE $GLOO_SOCKET_IFNAME"'
    python = script(bin_folder / "python", shown)
    script(bin_folder / "srun", f'shift; PYTHON={python} SLURM_NODEID=1 "$@"; exit "$SRUN_CODE"')
    script(bin_folder / "scontrol", 'case $1 in show) printf "n7\\nn8\\n";; *) echo "scontrol $*";; esac')

    def work(path: Path, *flags: str, **variables: str) -> tuple[str, int]:
        variables = {"PATH": f"{bin_folder}:{os.environ['PATH']}", **variables}
        done = subprocess.run(["bash", str(path), *flags], env=variables, capture_output=True, text=True)
        return done.stdout + done.stderr, done.returncode

    return work


def test_static(run) -> None:
    said, code = run(NODES, "train_gpt2.py", "--seed", "1", NNODES="2", NODE_RANK="1", MASTER_ADDR="a", NPROC="8")
    assert code == 0
    meet = "--nnodes 2 --nproc_per_node 8 --node_rank 1 --master_addr a --master_port 29500"
    assert f"python -m torch.distributed.run {meet} {ROOT}/train_gpt2.py --seed 1 | " in said


def test_c10d(run) -> None:
    variables = {"NNODES": "1:4", "MASTER_ADDR": "a", "RDZV": "c10d", "LOCAL_ADDR": "b", "IFNAME": "ib0"}
    said, code = run(NODES, "finetune_dolly.py", **variables, NODE_RANK="3")
    assert code == 0 and said.endswith("finetune_dolly.py | 1 ib0\n")
    for part in ("--nnodes 1:4", "--rdzv_endpoint a:29500", "is_host=false", "--local_addr b", "--max-restarts 100"):
        assert part in said
    assert "is_host=true" in run(NODES, "finetune_dolly.py", **variables, NODE_RANK="0")[0]
    assert "is_host" not in run(NODES, "finetune_dolly.py", **variables)[0], "torchrun finds out by itself"


@pytest.mark.parametrize("missing", ["NNODES", "MASTER_ADDR", "NODE_RANK", "RDZV"])
def test_what_is_missing_is_named(run, missing: str) -> None:
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "RDZV": "static"}
    variables = {**variables, "RDZV": "etcd"} if missing == "RDZV" else {**variables, missing: ""}
    said, code = run(NODES, "train_gpt2.py", **variables)
    assert code != 0 and f"{missing}" in said and said.count("\n") == 1


@pytest.mark.parametrize(("state", "requeued"), [("stopped", True), ("finished", False), ("failed", False)])
def test_slurm_queues_a_run_again_that_was_only_stopped(run, tmp_path: Path, state: str, requeued: bool) -> None:
    (tmp_path / "status.json").write_text(f'{{"state": "{state}", "step": 7}}\n')
    slurm = {"SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "12345"}
    slurm |= {"SLURM_SUBMIT_DIR": str(ROOT), "SRUN_CODE": "0" if state == "finished" else "1"}
    said, code = run(SLURM, "train_gpt2.py", "--seed", "1", **slurm, LOG_DIR=str(tmp_path))
    assert "--nnodes 2 --nproc_per_node gpu --rdzv_backend c10d --rdzv_endpoint n7:32345 --rdzv_id 12345" in said
    assert "is_host=false" in said and f"--seed 1 --log_dir {tmp_path} --auto_resume" in said
    assert ("scontrol requeue 12345" in said) == requeued
    assert code == {"stopped": 0, "finished": 0, "failed": 1}[state]
