"""What signals do. In a training loop SIGTERM and SIGINT are remembered and acted on at the next micro-batch, SIGUSR1
saves after this step and goes on; no handler saves anything. Elsewhere SIGINT ends a script in one line.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

# Slurm and torchrun both forward a signal: the same one again within this many seconds counts once.
FORWARDED_S = 3.0

_LOST_S = 0.01  # until an interrupt that was lost is raised again


class Interrupted(KeyboardInterrupt):
    """A signal other than SIGINT that ends a script as SIGINT does."""

    def __init__(self, number: int) -> None:
        self.number = number


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handler for signals: as if Ctrl-C had been pressed."""
    raise Interrupted(number)


def interrupted_by(error: BaseException | None) -> int | None:
    """The signal that `error` comes from, None where it comes from none.

    Python turns a KeyboardInterrupt in a class body, as in the imports that most of a start consists of, into a
    RuntimeError with the former as its cause.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__
    return getattr(error, "number", signal.SIGINT) if error is not None else None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within, Ctrl-C ends the script with one line and exit code 130, and without a traceback (ESPALIER_DEBUG=1: with).

    In a destructor or a weak reference's callback, of which imports have many, Python prints a KeyboardInterrupt and
    goes on; here it is raised again a moment later. For the main thread.
    """
    before = sys.unraisablehook

    def hook(lost: UnraisableHookArgs, /) -> None:
        number = interrupted_by(lost.exc_value)
        if number is None or not hasattr(signal, "setitimer"):  # not on Windows
            before(lost)
            return
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
        signal.setitimer(signal.ITIMER_REAL, _LOST_S)

    sys.unraisablehook = hook
    try:
        yield
    except BaseException as error:
        number = interrupted_by(error)
        if number is None or os.environ.get("ESPALIER_DEBUG"):
            raise
        print(f"interrupted by {signal.Signals(number).name}", file=sys.stderr)
        raise SystemExit(128 + number) from None
    finally:
        sys.unraisablehook = before


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
