"""Two machines with a cable between them, as far as the network goes: two network namespaces. Needs root and `ip`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def why_not() -> str | None:
    """What this machine lacks for it, if anything."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    return None if shutil.which("ip") else "network namespaces need the command `ip` (iproute2)"


class Cable:
    """Context manager: machines 0 and 1, with what `start` runs in them. All that is left ends with it."""

    def __init__(self) -> None:
        self.names = [f"espalier-{os.getpid()}-{number}" for number in (0, 1)]
        self.interfaces = [f"cable{number}" for number in (0, 1)]  # each in a namespace of its own
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cable:
        try:
            for name in self.names:
                _ip("netns", "add", name)
            one, other = self.interfaces
            _ip("-n", self.names[0], "link", "add", one, "type", "veth", "peer", "name", other, "netns", self.names[1])
            for name, interface, address in zip(self.names, self.interfaces, ADDRESSES):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", interface, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in (0, 1):
            self.kill(number)
        for process in self._started:
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(self, number: int, *words: str, folder: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Run a command on a machine, in `folder`; what it says goes to output.txt there."""
        with open(folder / "output.txt", "ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[number], *words],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "IFNAME": self.interfaces[number], **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process

    def cut_power(self, number: int) -> None:
        """The machine is gone, and says nothing: no connection of its is closed."""
        _ip("-n", self.names[number], "link", "set", self.interfaces[number], "down")
        self.kill(number)

    def kill(self, number: int) -> None:
        """SIGKILL for all that runs on a machine."""
        while pids := self._pids(number):  # one may have been starting another
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def _pids(self, number: int) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.names[number]], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]


def _ip(*words: Any) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
