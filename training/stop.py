"""SIGTERM and SIGINT: remember the wish; the loop acts on it at the next micro-batch. No handler saves anything."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

# Slurm and torchrun both forward a signal: the same one again within this many seconds counts once.
FORWARDED_S = 3.0


class StopRequest:
    """Context manager that turns SIGTERM and SIGINT into a flag; a second, later signal ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._first_at = 0.0
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """Of the signal, for messages."""
        return signal.Signals(self.signal).name if self.signal is not None else "another process"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._first_at = number, now
            return
        if number == self.signal and now - self._first_at < FORWARDED_S:
            return
        os._exit(128 + number)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # signal.signal works nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
