"""`--watch`: frames on a terminal with keys, or one after another into a file or pipe."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from gpu_cache.smi import document
from gpu_cache.smi.columns import WIDE
from gpu_cache.smi.frame import Size, frame
from gpu_cache.smi.history import History
from gpu_cache.smi.keyboard import Keyboard
from gpu_cache.smi.node import Node
from gpu_cache.smi.view import View

_PIPE_SIZE = Size(WIDE, 1000)


class Watch:
    """The live view.

    Args:
        look: At the machine.
        count: Looks before it ends by itself; 0: never.
        folder: Where snapshots go.
    """

    def __init__(
        self,
        look: Callable[[], Node],
        console: Console,
        *,
        interval_s: float,
        count: int = 0,
        is_ascii: bool = False,
        folder: Path = Path(),
    ) -> None:
        self._look = look
        self._console = console
        self._view = View(interval_s)
        self._left = count or -1
        self._is_ascii = is_ascii
        self._folder = folder
        self._history = History()

    def run(self) -> None:
        """Until `q`, Ctrl-C or the last look."""
        if self._console.is_terminal and os.isatty(sys.stdin.fileno()):
            with Keyboard(sys.stdin.fileno()).attached() as keyboard, contextlib.suppress(EOFError):
                self._on_terminal(keyboard)
        else:
            self._into_pipe()

    def _on_terminal(self, keyboard: Keyboard) -> None:
        with Live(console=self._console, screen=True, auto_refresh=False) as live:
            node = self._next()
            due = time.monotonic() + self._view.interval_s
            while not self._view.is_done:
                live.update(self._picture(node), refresh=True)
                self._press(keyboard.wait(due - time.monotonic()), node)
                if time.monotonic() >= due:
                    due = time.monotonic() + self._view.interval_s
                    if not self._view.is_paused:
                        if not self._left:
                            return
                        node = self._next()

    def _press(self, keys: str, node: Node) -> None:
        for key in keys:
            self._view.press(key)
        if self._view.wants_snapshot:
            self._view.wants_snapshot = False
            self._view.message = self._snapshot(node)

    def _into_pipe(self) -> None:
        while self._left:
            node = self._next()
            lines = frame(node, self._history, self._view, _PIPE_SIZE, is_ascii=self._is_ascii)
            self._console.print(Text("\n").join(lines), Text(""), sep="\n", soft_wrap=True)
            if self._left:
                time.sleep(self._view.interval_s)

    def _next(self) -> Node:
        node = self._look()
        self._history.add(node)
        self._left -= 1
        return node

    def _picture(self, node: Node) -> Text:
        size = Size(*self._console.size)
        lines = frame(node, self._history, self._view, size, is_ascii=self._is_ascii)
        return Text("\n", no_wrap=True).join(lines)

    def _snapshot(self, node: Node) -> str:
        """Write it; what to tell."""
        path = self._folder / time.strftime("gpu-cache-smi-%Y%m%d-%H%M%S.json", time.localtime(node.unix_time))
        try:
            path.write_text(document.as_text(node, is_one_line=False) + "\n")
        except OSError as error:
            return f"no snapshot: {error.strerror}"
        return f"wrote {path.name}"
