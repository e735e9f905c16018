"""SIGTERM and SIGINT: remember the wish; the loop acts on it at the next micro-batch. SIGUSR1: save after this step and
go on. No handler saves anything.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

# Slurm and torchrun both forward a signal: the same one again within this many seconds counts once.
FORWARDED_S = 3.0


class StopRequest:
    """Context manager that turns signals into flags; a second, later one to stop ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._save = False
        self._first_at = 0.0
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """Of the signal, for messages."""
        return signal.Signals(self.signal).name if self.signal is not None else "another process"

    def take_wish_to_save(self) -> bool:
        """Whether SIGUSR1 came since this was last asked."""
        wished, self._save = self._save, False
        return wished

    def _handle_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._first_at = number, time.monotonic()
        elif not self._is_forwarded(number):
            os._exit(128 + number)

    def _is_forwarded(self, number: int) -> bool:
        return number == self.signal and time.monotonic() - self._first_at < FORWARDED_S

    def _handle_after(self, number: int, frame: FrameType | None) -> None:
        """A run that was stopped has ended. The forwarded signal must not kill what is leaving in order; any other has
        the effect that it had before the run.
        """
        if not self._is_forwarded(number):
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # signal.signal works nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
            if hasattr(signal, "SIGUSR1"):  # not on Windows
                self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._handle_save)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self.signal is not None and self._previous:
            signal.signal(self.signal, self._handle_after)
