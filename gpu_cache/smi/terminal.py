"""Where output goes: figures to stdout, warnings beside them on a terminal and to stderr elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from rich.console import Console, RenderableType

from gpu_cache.smi.tables import WIDE


class Terminal:
    """Stdout and stderr of one run.

    Args:
        has_color: None: as the terminal and NO_COLOR say.
    """

    def __init__(self, environ: Mapping[str, str], has_color: bool | None = None) -> None:
        self.is_terminal = sys.stdout.isatty()
        has_width = self.is_terminal or environ.get("COLUMNS", "").isdigit()
        self.console = Console(
            width=None if has_width else WIDE,
            force_terminal=has_color or None,
            color_system="standard" if has_color else "auto",
            no_color=None if has_color is None else not has_color,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self.width = self.console.width

    @property
    def is_unicode(self) -> bool:
        """Whether it can show block characters."""
        return "utf" in (sys.stdout.encoding or "").lower()

    def show(self, parts: Iterable[RenderableType], letters: Mapping[int, int] = MappingProxyType({})) -> None:
        """On stdout, with some letters in place of others."""
        for part in parts:
            with self.console.capture() as shown:
                self.console.print(part, soft_wrap=True)
            for line in shown.get().translate(letters).removesuffix("\n").split("\n"):
                print(line.rstrip())
        sys.stdout.flush()

    def warn(self, lines: Iterable[str]) -> None:
        """Below what was shown, or on stderr where stdout is read by a program."""
        if self.is_terminal:
            self.show(lines)
        else:
            self.tell(lines)

    def tell(self, lines: Iterable[str]) -> None:
        """On stderr."""
        for line in lines:
            print(line, file=sys.stderr)
