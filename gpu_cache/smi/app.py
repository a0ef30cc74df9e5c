"""`--watch` on a terminal, by Textual: GPUs, one of four lists, what is wrong, and the keys."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich.console import RenderableType
from rich.segment import Segment
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.color import Color
from textual.containers import VerticalScroll
from textual.coordinate import Coordinate
from textual.css.query import NoMatches
from textual.filter import LineFilter
from textual.widgets import DataTable, Footer, Input, Static, Tab, Tabs

from gpu_cache.smi import document, watch
from gpu_cache.smi.node import Node
from gpu_cache.smi.problems import problems_of
from gpu_cache.smi.screen import census, nothing, problem_lines
from gpu_cache.smi.tables import WIDE, Column, row_style
from gpu_cache.smi.watch import EVENTS, LEAKS, MAX_INTERVAL_S, MIN_INTERVAL_S, PROCESSES, SORTS, SOURCES, History

_NUM_EVENTS = 3
_VIEW_KEYS = {"p": PROCESSES, "u": SOURCES, "l": LEAKS, "e": EVENTS}

_KEYS = [
    Binding("q", "quit", "quit"),
    Binding("ctrl+c", "quit", show=False, priority=True),
    Binding("question_mark", "help", "help", key_display="?", tooltip="this list of keys; again: away with it"),
    Binding("space", "pause", "pause", tooltip="stop looking; again: go on"),
    Binding("s", "sort", "sort", tooltip="by the next column, or click on its head"),
    Binding("slash", "filter", "filter", key_display="/", tooltip="role, pid, state; Enter keeps, Esc drops"),
    Binding("escape", "drop_filter", show=False),
    *(Binding(key, f"view('{view}')", view, show=False) for key, view in _VIEW_KEYS.items()),
    Binding("0", "gpu('0')", "GPU", key_display="0-7", show=False, tooltip="one GPU; the same key again: all"),
    *(Binding(number, f"gpu('{number}')", show=False) for number in "1234567"),
    Binding("plus,equals_sign", "interval(2.0)", "slower", key_display="+", tooltip="a longer interval"),
    Binding("minus", "interval(0.5)", "faster", key_display="-", tooltip="a shorter interval"),
    Binding("w", "snapshot", "snapshot", tooltip="write JSON into the current folder"),
]
_HELP = [f" {key.key_display or key.key:<7}{key.description:<11}{key.tooltip}" for key in _KEYS if key.description]
_HELP.append(" arrows, PgUp, PgDn, Home, End and the mouse scroll")


class Watch(App[None]):
    """The live view.

    Args:
        look: At the machine; runs in another thread.
        count: Looks before it ends by itself; 0: never.
        folder: Where snapshots go.
    """

    TITLE = "gpu-cache-smi --watch"
    ENABLE_COMMAND_PALETTE = False
    VERTICAL_BREAKPOINTS = [(0, "-low"), (20, "-middle"), (32, "-high")]  # noqa: RUF012
    CSS = """
    Screen { overflow: hidden; }
    VerticalScroll, DataTable { scrollbar-size: 1 1; }
    #gpus { height: auto; max-height: 10; }
    #title, #menu { height: 1; text-wrap: nowrap; }
    #filter, #help { display: none; }
    #filter { height: 1; border: none; }
    #list, #help { height: 1fr; }
    #list > .datatable--header { background: ansi_default; }
    #problems, #latest { height: auto; max-height: 5; border-top: ascii $panel; }
    .-empty { display: none; }
    .-help #help { display: block; }
    .-help #gpus, .-help #list, .-help #problems, .-help #latest, .-help #views { display: none; }
    .-middle #gpus { max-height: 6; }
    .-middle #latest, .-low #latest, .-low #problems, .-low #gpus { display: none; }
    """
    BINDINGS: ClassVar = [*_KEYS]

    def __init__(
        self,
        look: Callable[[], Node],
        interval_s: float,
        count: int = 0,
        *,
        past: History | None = None,
        folder: Path = Path(),
        is_ascii: bool = False,
    ) -> None:
        super().__init__(ansi_color=True)  # before the theme: what NO_COLOR does depends on it
        self.theme = "ansi-dark"
        self._look, self._left, self._folder, self._is_ascii = look, count or -1, folder, is_ascii
        self.interval_s = interval_s
        self.sort, self.gpu, self.wanted, self.view = "gpu", "", "", PROCESSES
        self.is_paused = False
        self._past = past or History()
        self._node: Node | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="title", markup=False)
        with VerticalScroll(id="gpus"):
            yield Static(markup=False)
        yield Tabs(*(Tab(f"{view} ({key})", id=view) for key, view in _VIEW_KEYS.items()), id="views")
        yield Static(id="menu", markup=False)
        yield Input(id="filter", placeholder="role, pid or state", compact=True)
        yield List(id="list", cursor_type="none", cell_padding=0)
        yield Static("\n".join(_HELP), id="help", markup=False)
        yield Static(id="latest", markup=False)
        with VerticalScroll(id="problems"):
            yield Static(markup=False)
        yield Footer(compact=True)

    async def on_mount(self) -> None:
        if not self.is_headless:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                asyncio.get_running_loop().add_signal_handler(number, self.exit)
        self.query_one(List).focus()
        self.watch(self.query_one(List), "scroll_y", self._draw_menu, init=False)
        self._timer = self.set_interval(self.interval_s, self.tick)
        await self.tick()

    async def tick(self) -> None:
        """Look, unless paused."""
        if self.is_paused:
            return
        if not self._left:
            self.exit()
            return
        self._left -= 1
        self._node = await asyncio.to_thread(self._look)
        self._past.add(self._node)
        with contextlib.suppress(NoMatches):  # it was left meanwhile
            self.draw()

    def on_resize(self) -> None:
        self.draw()

    def draw(self) -> None:
        """Show the latest look as the keys want it."""
        if (node := self._node) is None:
            return
        width = max(self.size.width - 1, 1)  # beside a scroll bar
        self._write("#title", watch.title(node, self.interval_s) + "   PAUSED" * self.is_paused)
        self._write("#gpus Static", watch.gpus(node, self._past, width, self.gpu))
        columns = watch.lists(self._past, width)[self.view]
        self.query_one(List).show(columns, self._rows(node))
        self._write("#latest", watch.events(self._past.events[:_NUM_EVENTS], min(width, WIDE)))
        problems = problem_lines(problems_of(node), width)
        self._write("#problems Static", "\n".join(problems))
        self.query_one("#problems").set_class(not problems, "-empty")
        self.call_after_refresh(self._draw_menu)

    def _draw_menu(self) -> None:
        """Say how the list is chosen, how many rows are below it, and what the node has."""
        if (node := self._node) is None or not (self.screen_stack and self.query(List)):  # it was left meanwhile
            return
        below = self.query_one(List).num_below
        of_node = census(node) if node.processes else f"waiting: {nothing(node)}"
        chosen = {"sort": self.sort, "filter": self.wanted, "gpu": self.gpu}
        words = [*(f"{name}: {value}" for name, value in chosen.items() if value), *[f"{below} more"] * (below > 0)]
        self._write("#menu", "  ".join([*words, of_node]))

    def _rows(self, node: Node) -> Sequence[Any]:
        if self.view in (SOURCES, EVENTS):
            return node.sources if self.view == SOURCES else self._past.events
        found = watch.processes(node, self.sort, self.wanted, self.gpu)
        return [process for process in found if self.view == PROCESSES or process.figure("outlived_entries")]

    def _write(self, where: str, content: RenderableType) -> None:
        self.query_one(where, Static).update(content)

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Textual's, and one for terminals that show ASCII alone."""
        return [*super().get_line_filters(), *([Ascii()] if self._is_ascii else [])]

    def action_help(self) -> None:
        self.screen.toggle_class("-help")
        self.set_focus(self.query_one(List))

    def action_pause(self) -> None:
        self.is_paused = not self.is_paused
        self.draw()

    def action_sort(self) -> None:
        names = list(SORTS)
        self._sort_by(names[(names.index(self.sort) + 1) % len(names)])

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        self._sort_by(event.label.plain.strip().lower())

    def _sort_by(self, name: str) -> None:
        self.sort = name if name in SORTS else self.sort
        self.draw()

    def action_view(self, view: str) -> None:
        self.query_one(Tabs).active = view

    def on_tabs_tab_activated(self, event: Tabs.TabActivated) -> None:
        self.view = event.tab.id or PROCESSES
        self.draw()

    def action_gpu(self, gpu: str) -> None:
        self.gpu = "" if self.gpu == gpu else gpu
        self.draw()

    def action_interval(self, factor: float) -> None:
        self.interval_s = min(max(self.interval_s * factor, MIN_INTERVAL_S), MAX_INTERVAL_S)
        self._timer.stop()
        self._timer = self.set_interval(self.interval_s, self.tick)
        self.draw()

    def action_snapshot(self) -> None:
        if self._node is None:
            return
        path = self._folder / time.strftime("gpu-cache-smi-%Y%m%d-%H%M%S.json", time.localtime(self._node.unix_time))
        try:
            path.write_text(document.as_text(self._node, is_one_line=False) + "\n")
        except OSError as error:
            self.notify(f"no snapshot: {error.strerror}", severity="error", markup=False)
        else:
            self.notify(f"wrote {path.name}", markup=False)

    def action_filter(self) -> None:
        field = self.query_one(Input)
        field.display = True
        self.set_focus(field)  # at once: the next key is a letter of it

    def action_drop_filter(self) -> None:
        self.query_one(Input).clear()
        self.on_input_submitted()

    def on_input_changed(self, event: Input.Changed) -> None:
        self.wanted = event.value
        self.draw()

    def on_input_submitted(self) -> None:
        self.query_one(Input).display = False
        self.set_focus(self.query_one(List))


class List(DataTable[Text]):
    """Rows that change in their places, so that the reader's scroll position stays."""

    BINDINGS: ClassVar = [("home", "scroll_top"), ("end", "scroll_bottom")]

    @property
    def num_below(self) -> int:
        """Rows that a reader has to scroll to."""
        return round(self.max_scroll_y - self.scroll_y)

    def show(self, columns: Sequence[Column], rows: Sequence[Any]) -> None:
        """Put these rows in place of those shown. Columns grow with their texts and do not shrink."""
        heads = [Text(f" {column.head}", justify=column.justify) for column in columns]
        cells = [[self._cell(column, row) for column in columns] for row in rows]
        widths = [max(text.cell_len for text in texts) for texts in zip(heads, *cells, strict=True)]
        is_same = heads == [column.label for column in self.ordered_columns]
        if not is_same or any(width > column.width for width, column in zip(widths, self.ordered_columns, strict=True)):
            place = self.scroll_offset if is_same else (0, 0)
            self.clear(columns=True)
            for head, width in zip(heads, widths, strict=True):
                self.add_column(head, width=width)
            self.call_after_refresh(self.scroll_to, *place, animate=False)
        for number, line in enumerate(cells[: self.row_count]):
            for at, (before, cell) in enumerate(zip(self.get_row_at(number), line, strict=True)):
                if before != cell:
                    self.update_cell_at(Coordinate(number, at), cell)
        self.add_rows(cells[self.row_count :])
        while self.row_count > len(rows):
            self.remove_row(self.ordered_rows[-1].key)

    def _cell(self, column: Column, row: Any) -> Text:
        return Text.assemble(" ", (column.show(row), column.style(row)), justify=column.justify, style=row_style(row))


class Ascii(LineFilter):
    """Draws with ASCII what Textual draws with blocks and lines."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Letters that ASCII has not become question marks, as they do in the table."""
        drawn = ((text.translate(watch.TO_ASCII), style, control) for text, style, control in segments)
        return [Segment(text.encode("ascii", "replace").decode(), style, control) for text, style, control in drawn]
