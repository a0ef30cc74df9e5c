"""Where output goes: figures to stdout, warnings beside them on a terminal and to stderr elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.text import Text

from gpu_cache.smi.columns import WIDE


class Terminal:
    """Stdout and stderr of one run.

    Args:
        has_color: None: as the terminal and NO_COLOR say.
    """

    def __init__(self, environ: Mapping[str, str], has_color: bool | None = None) -> None:
        self.is_terminal = sys.stdout.isatty()
        self.width = self._width(environ)
        self.console = Console(
            force_terminal=has_color or None,
            color_system="standard" if has_color else "auto",
            no_color=None if has_color is None else not has_color,
            highlight=False,
            markup=False,
            emoji=False,
        )

    def _width(self, environ: Mapping[str, str]) -> int:
        named = environ.get("COLUMNS", "")
        if named.isdecimal():
            return int(named)
        return os.get_terminal_size(sys.stdout.fileno()).columns if self.is_terminal else WIDE

    @property
    def is_unicode(self) -> bool:
        """Whether it can show block characters."""
        return "utf" in (sys.stdout.encoding or "").lower()

    @property
    def is_wide(self) -> bool:
        return self.width >= WIDE

    def show(self, lines: Iterable[Text | str]) -> None:
        """On stdout."""
        for line in lines:
            self.console.print(line, soft_wrap=True)
        sys.stdout.flush()

    def warn(self, lines: Iterable[Text | str]) -> None:
        """Below what was shown, or on stderr where stdout is read by a program."""
        if self.is_terminal:
            self.show(lines)
        else:
            self.tell(lines)

    def tell(self, lines: Iterable[Text | str]) -> None:
        """On stderr."""
        for line in lines:
            print(line, file=sys.stderr)
