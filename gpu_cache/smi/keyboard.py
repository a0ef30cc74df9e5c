"""Single keys from a terminal."""

from __future__ import annotations

import os
import select
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from gpu_cache.smi.view import DOWN, PAGE_DOWN, PAGE_UP, UP

_KEYS = {
    "\x1b[A": UP, "\x1bOA": UP, "\x1b[B": DOWN, "\x1bOB": DOWN, "\x1b[5~": PAGE_UP, "\x1b[6~": PAGE_DOWN,
}  # fmt: skip


class Keyboard:
    """Keys as they are pressed.

    Args:
        descriptor: A terminal's descriptor.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @contextmanager
    def attached(self) -> Iterator[Keyboard]:
        """Keys come at once and are not shown; afterwards the terminal is as it was. Ctrl-C still interrupts."""
        before = termios.tcgetattr(self._descriptor)
        tty.setcbreak(self._descriptor)
        try:
            yield self
        finally:
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, before)

    def wait(self, timeout_s: float) -> str:
        """The keys pressed since; as soon as there is one, "" if there is none in time."""
        ready, _, _ = select.select([self._descriptor], [], [], max(timeout_s, 0))
        if not ready:
            return ""
        raw = os.read(self._descriptor, 64)
        if not raw:
            raise EOFError("the terminal is gone")
        text = raw.decode(errors="ignore")
        # An arrow or a function key is one escape sequence.
        return _KEYS.get(text, "") if len(text) > 1 and text.startswith("\x1b") else text
