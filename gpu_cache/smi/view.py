"""The state of the live view, as the keys have set it."""

from __future__ import annotations

from collections.abc import Callable

from gpu_cache.smi.node import Node
from gpu_cache.smi.process import STATES, Process

PROCESSES, SOURCES, LEAKS, EVENTS = "processes", "sources", "leaks", "events"
MIN_INTERVAL_S, MAX_INTERVAL_S = 0.25, 60.0
ENTER, ESCAPE, BACKSPACE = ("\r", "\n"), "\x1b", ("\x7f", "\x08")

# Keys that are no letters, under characters that no keyboard types.
UP, DOWN, PAGE_UP, PAGE_DOWN = "\ue000", "\ue001", "\ue002", "\ue003"
_STEPS = {UP: -1, DOWN: 1, PAGE_UP: -10, PAGE_DOWN: 10}

HELP = """\
 q      quit
 ?      this help; any key leaves it
 space  pause, and go on
 s      sort by the next column
 /      filter by role, pid or state; Enter keeps it, Esc drops it
 p      processes
 u      sources
 l      leaks
 e      events
 arrows, PgUp, PgDn  scroll a list that does not fit
 0-7    one GPU; the same key again: all
 + -    longer interval, shorter interval
 w      write a JSON snapshot into the current folder"""

SORTS: dict[str, Callable[[Process], object]] = {
    "gpu": lambda p: p.order,
    "pool": lambda p: -(p.figure("device_bytes") or -1),
    "fetch": lambda p: -(p.rate("fetch_bytes_per_second") or -1),
    "oldest": lambda p: -(p.oldest_age_s or -1),
    "state": lambda p: -STATES.index(p.state),
}
_VIEWS = {"p": PROCESSES, "u": SOURCES, "l": LEAKS, "e": EVENTS}


class View:
    """Keys change it; nothing else does."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = max(interval_s, MIN_INTERVAL_S)
        self.sort = "gpu"
        self.filter = ""
        self.view = PROCESSES
        self.gpu = ""
        self.message = ""
        self.offset = 0  # the first row that is shown
        self.is_paused = False
        self.is_helping = False
        self.is_typing = False
        self.is_done = False
        self.wants_snapshot = False

    def press(self, key: str) -> None:
        """One key; those without a meaning do nothing."""
        self.message = ""
        if self.is_typing:
            self._type(key)
        elif self.is_helping:
            self.is_helping = False
            self.is_done = key == "q"
        elif key in _STEPS:
            self.offset = max(self.offset + _STEPS[key], 0)
        elif key in _VIEWS:
            self.view, self.offset = _VIEWS[key], 0
        elif key.isdecimal():
            self.gpu = "" if self.gpu == key else key
        else:
            self._command(key)

    def _command(self, key: str) -> None:
        match key:
            case "q":
                self.is_done = True
            case "?":
                self.is_helping = True
            case " ":
                self.is_paused = not self.is_paused
            case "s":
                names = list(SORTS)
                self.sort = names[(names.index(self.sort) + 1) % len(names)]
            case "/":
                self.is_typing, self.filter = True, ""
            case "+" | "=":
                self.interval_s = min(self.interval_s * 2, MAX_INTERVAL_S)
            case "-":
                self.interval_s = max(self.interval_s / 2, MIN_INTERVAL_S)
            case "w":
                self.wants_snapshot = True

    def _type(self, key: str) -> None:
        if key in ENTER:
            self.is_typing = False
        elif key == ESCAPE:
            self.is_typing, self.filter = False, ""
        elif key in BACKSPACE:
            self.filter = self.filter[:-1]
        elif key.isprintable():
            self.filter += key

    def processes(self, node: Node) -> list[Process]:
        """The processes to show, in order."""
        found = [p for p in node.processes if self.gpu in ("", p.seat.rstrip("*")) and self._admits(p)]
        return sorted(found, key=SORTS[self.sort])  # type: ignore[arg-type]

    def _admits(self, process: Process) -> bool:
        wanted = self.filter.lower()
        return any(wanted in text.lower() for text in (process.title, process.pid, process.state))
