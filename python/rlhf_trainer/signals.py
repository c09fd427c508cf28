"""SIGINT (Ctrl-C) and SIGTERM ask a run to save a checkpoint and leave; a second one leaves at once.

A rollout is left where it is, since nothing was updated yet; updates and evaluations are finished first. A launcher and
a terminal may both pass the same wish on, so that a second signal counts only some time after the first.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from .processes import ALONE, Processes, speaks

ECHO_S = 0.5  # a signal this soon after the first is the same wish, sent twice


class Interrupted(KeyboardInterrupt):
    """SIGINT, after a checkpoint was saved."""


class Terminated(SystemExit):
    """SIGTERM, after a checkpoint was saved. Where nobody catches it, the process ends with its code."""

    def __init__(self, message: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Stop:
    """Handles both signals inside its `with` block; `asked` is the first that came, None before.

    Raises Interrupted or Terminated where `leave_if_asked` is called, and in a rollout from what `watching` made. Does
    nothing outside the main thread, where Python allows no handlers, and for a signal that is ignored (as a shell's
    background jobs ignore SIGINT).
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._at: float | None = None
        self._in_rollout = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def rollout(self, processes: Processes = ALONE) -> Iterator[None]:
        """Inside it a rollout's progress may leave: nothing was updated that a checkpoint would have to hold.

        Several processes finish the step, since they would wait for one that left.
        """
        self._in_rollout = processes.count == 1
        try:
            yield
        finally:
            self._in_rollout = False

    def watching(self, progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """`progress`, which is called again and again during a rollout and now may leave it."""

        def watched(done: int, total: int) -> None:
            if self._in_rollout:
                self.leave_if_asked()
            progress(done, total)

        return watched

    def agree(self, processes: Processes) -> None:
        """Of several processes all are asked when one is. To be called by all."""
        self.asked = next((asked for asked in processes.each(lambda: self.asked) if asked is not None), None)

    def leave_if_asked(self, saved: str = "") -> None:
        """Raises Interrupted or Terminated, with what was saved, once a signal came."""
        if self.asked is not None:
            kind = Interrupted if self.asked == signal.SIGINT else Terminated
            raise kind(f"{self.asked.name}: {saved}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._at is None:
            self.asked, self._at = signal.Signals(number), time.monotonic()
            if speaks():
                _say(f"{self.asked.name}: a checkpoint is saved before leaving; once more leaves at once")
        elif time.monotonic() - self._at > ECHO_S:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h")  # the progress bar hid the cursor
            os._exit(128 + number)


def _say(line: str) -> None:
    """Straight to stderr: a handler may come in the middle of a buffered write, which it must not enter again."""
    with suppress(OSError):  # of a terminal that is gone
        os.write(2, f"\nrlhf-train: {line}\n".encode())
