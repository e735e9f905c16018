"""The C library's heap, made fit for training: freed buffers are kept, and stay whole. No torch here."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"


def begin_with_tuned_heap() -> None:
    """First thing in a script that trains: starts its command anew with glibc's caches of small blocks off.

    torch asks for blocks aligned to 64 bytes. glibc 2.36 cuts each out of one that is up to 96 bytes longer, and puts
    what it cuts off into those caches, from where other objects take it. Once freed, a buffer is then a little too
    short for the next of its size and stays a hole: peaks were 1.1 to 2.0 times what was in use (kinds of runs as
    in plan.py), with the caches off 1.0 to 1.3, at the same speed. They can be set only when a process starts.

    Returns at once where that is done, where it would be of no use, and in a process that is not the script's own.
    """
    own = sys.orig_argv[-len(sys.argv) :] == sys.argv and sys.gettrace() is None  # no test, no debugger
    if not own or heap_is_tuned() or not keeps_freed_memory():
        return
    tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), _TUNABLES)))
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": tunables})


def heap_is_tuned() -> bool:
    """Whether this process was started with GLIBC_TUNABLES as `begin_with_tuned_heap` sets it, or otherwise."""
    return "glibc.malloc.tcache_count" in os.environ.get("GLIBC_TUNABLES", "")


def keep_freed_memory() -> bool:
    """Have glibc keep large freed buffers for the next step in place of returning them to the kernel.

    The step of a 124M GPT frees and asks again for buffers of up to 150 MB; as fresh pages they are zeroed by the
    kernel each time. Returns whether it was done (Linux with glibc, unless ESPALIER_MALLOC=default).
    """
    if not keeps_freed_memory():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # 1 GiB is the largest that both accept on 64 bits; larger blocks still go to mmap.
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def keeps_freed_memory() -> bool:
    """Whether `keep_freed_memory` does anything here."""
    return platform.libc_ver()[0] == "glibc" and os.environ.get("ESPALIER_MALLOC") != "default"
