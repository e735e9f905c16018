"""What the machine decides: number type, compilation, memory allocator. Each decision comes with its reason."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from training.heap import keep_freed_memory


@dataclass(frozen=True)
class Runtime:
    """Decisions for one process; `reasons` are lines to print."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    reasons: tuple[str, ...]

    @property
    def mixed(self) -> bool:
        return self.dtype is not torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Matmuls in the reduced type; nothing in float32."""
        return torch.autocast(self.device.type, self.dtype) if self.mixed else contextlib.nullcontext()


def choose_runtime(
    device: torch.device, dtype: str, compile_: str, matmul_precision: str, exact: bool = False
) -> Runtime:
    """Settle dtype and compilation for `device`, and apply the matmul precision and the CPU's allocator settings.

    exact: equal micro-batches must give equal bits, in whatever order a process meets them.
    """
    torch.set_float32_matmul_precision(matmul_precision)
    chosen, why = _choose_dtype(device, dtype)
    reasons = [f"dtype {str(chosen).removeprefix('torch.')}: {why}"]
    compiled = compile_ == "on" or (compile_ == "auto" and device.type == "cuda" and not exact)
    if exact:
        reasons.append("compile off: with --exact, as code compiled for one shape may serve another in other processes")
        reasons.append(
            f"exact: another number of processes changes no bit; another number of threads ({torch.get_num_threads()} "
            "in each process) does"
        )
    elif compile_ != "auto":
        reasons.append(f"compile {compile_}: as asked")
    elif compiled:
        reasons.append("compile on: a GPU gains from fused kernels")
    else:
        reasons.append(f"compile off: no gain was measured on a {device.type.upper()}")
    if device.type == "cpu" and keep_freed_memory():
        reasons.append("allocator: freed buffers are kept (fresh ones of 100 MB cost a page fault every 4 KB)")
    return Runtime(device, chosen, compiled, tuple(reasons))


def _choose_dtype(device: torch.device, dtype: str) -> tuple[torch.dtype, str]:
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto":
        return named[dtype], "as asked"
    if device.type != "cuda":
        return torch.float32, "bfloat16 without hardware for it can be 24 times slower"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU has it, and it needs no loss scaling"
    return torch.float16, "the GPU lacks bfloat16; the loss is scaled"


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far in MB: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:  # Linux's ru_maxrss of a process begins at what its parent held when it was started
        high = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        high = None
    peak = int(high[1]) if high else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, so that a clock read afterwards means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
