"""The command `gpu-cache-smi` shows the caches of a machine. Each mode is a method that returns the exit code."""

from __future__ import annotations

import importlib
import io
import itertools
import os
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from rich.console import Console, RenderableType

from gpu_cache.hosts import is_loopback
from gpu_cache.report.schema import dead_s
from gpu_cache.smi import document, leaks, options, query, screen, tables, timeline, watch
from gpu_cache.smi.folder import folders, remove
from gpu_cache.smi.node import Filters, Node, Observer
from gpu_cache.smi.problems import problems_of
from gpu_cache.smi.process import DEAD, HUNG, LEAK, Process
from gpu_cache.smi.tables import WIDE
from gpu_cache.smi.watch import History

FAILED, BAD_ARGUMENT, PROBLEM, DENIED = 1, 2, 3, 4
_RECORD_S = 1.0
_HEADS_EVERY = 20
# Options that have a method each: commands, and forms of what is seen.
_COMMANDS = ("completion", "help_query", "leaks", "gc", "serve", "record", "timeline", "watch", "check")
_FORMS = ("json", "query", "dmon", "prom", "list")


def main(arguments: list[str], observer: Observer | None = None) -> int:
    """Do what the command line says.

    Args:
        arguments: Without the program's name.
        observer: Looks at the machine; tests pass their own.
    Returns:
        The exit code.
    Raises:
        ModuleNotFoundError: The option needs a library that is not installed.
    """
    # A closed one is None, and what is printed to stderr then would go to stdout.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # open to the end
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a role may have letters that the locale has not
    given = options.parse(arguments)
    try:
        found = observer or Observer(lambda: given.dir or folders(os.environ, os.getuid()), dead_s=dead_s(os.environ))
    except ValueError as error:
        print(f"gpu-cache-smi: {error}", file=sys.stderr)
        return 2
    has_color = True if given.color else False if given.no_color else None
    try:
        return Commands(found, Terminal(os.environ, has_color), given).run()
    except KeyboardInterrupt:
        return 0
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if given.debug:
            traceback.print_exc()
        else:
            print(f"gpu-cache-smi: {type(error).__name__}: {error} (--debug tells where)", file=sys.stderr)
        return 1


class Terminal:
    """Stdout and stderr of one run.

    Args:
        has_color: None: as the terminal and NO_COLOR say.
    """

    def __init__(self, environ: Mapping[str, str], has_color: bool | None = None) -> None:
        self.is_terminal = sys.stdout.isatty()
        columns = environ.get("COLUMNS", "")
        has_width = int(columns) > 0 if columns.isdecimal() else self.is_terminal
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


class Commands:
    """One run of the tool."""

    def __init__(self, observer: Observer, terminal: Terminal, given: Namespace) -> None:
        self._observer = observer
        self._terminal = terminal
        self._options = given
        self._told: set[Path] = set()  # reports of dead processes that --dmon has told of

    def look(self) -> Node:
        """At what passes the filters."""
        given = self._options
        return self._observer.look().filtered(Filters(given.id, given.pid, given.role, given.source))

    def run(self) -> int:
        """Run the mode that the options choose: a job of its own, else a table or text, once or repeatedly."""
        command = next((name for name in _COMMANDS if getattr(self._options, name)), "")
        if command:
            return int(getattr(self, f"_{command}")() or 0)
        show = getattr(self, f"_{next((name for name in _FORMS if getattr(self._options, name)), 'table')}")
        if self._options.loop is None:
            node = self.look()
            if not node.is_denied:
                show(node, 0)
            return self._status(node)
        for number, node in enumerate(self._looks(self._options.loop)):
            self._terminal.show([""] * bool(number and show == self._table))
            show(node, number)
        return 0

    def _status(self, node: Node) -> int:
        """The exit code of a look: whether no report may be read, or, with --strict, NVML's code."""
        if node.is_denied:
            first = next(file for file in node.unread if file.is_denied)
            hint = "Hint: run it as the user of the trainers, or as root."
            self._tell(f"there are reports, and none may be read ({first.title}: {first.problem}).", hint)
            return DENIED
        if self._options.strict and node.devices.problem:
            self._tell(f"NVML not available: {node.devices.problem}")
            return node.devices.code
        return 0

    def _tell(self, message: str, *more: str) -> None:
        self._terminal.tell([f"gpu-cache-smi: {message}", *more])

    def _looks(self, interval_s: float) -> Iterator[Node]:
        due = time.monotonic()
        for number in itertools.count(1):
            yield self.look()
            if number == self._options.count:
                return
            due = max(due + interval_s, time.monotonic())
            time.sleep(max(due - time.monotonic(), 0))

    def _table(self, node: Node, number: int) -> None:
        boxes = (self._options.by,) if self._options.by else screen.BOXES
        self._terminal.show(screen.screen(node, self._terminal.width, boxes))
        self._terminal.warn(screen.problem_lines(problems_of(node), self._terminal.width))

    def _list(self, node: Node, number: int) -> None:
        self._write(*screen.listing(node))

    def _json(self, node: Node, number: int) -> None:
        self._write(document.as_text(node, is_one_line=self._options.loop is not None))

    def _query(self, node: Node, number: int) -> None:
        (kind, names), style = self._options.query, self._options.format
        has_head, has_units = "noheader" not in style and not number, "nounits" not in style
        self._write(*query.lines(node, kind, names, has_head=has_head, has_units=has_units))

    def _dmon(self, node: Node, number: int) -> None:
        width = self._terminal.width
        fresh = [process for process in node.processes if process.file.path not in self._told]
        self._told |= {process.file.path for process in fresh if process.state == DEAD}
        heads = tables.log_heads(width) if number % _HEADS_EVERY == 0 else []
        self._write(*heads, *tables.log_lines(fresh, node.unix_time, width))

    def _prom(self, node: Node, number: int) -> None:
        self._write(importlib.import_module("gpu_cache.smi.exposition").text(lambda: node).rstrip("\n"))

    def _write(self, *lines: str) -> None:
        for line in lines:
            print(line)
        sys.stdout.flush()

    def _completion(self) -> None:
        sys.stdout.write(options.completion(self._options.completion))

    def _help_query(self) -> None:
        self._write(query.help_text(self._options.help_query))

    def _check(self) -> int:
        """Nothing, unless something is wrong."""
        node = self.look()
        wrong = [one for one in problems_of(node) if one.process and one.process.state in (LEAK, HUNG, DEAD)]
        self._terminal.show(screen.problem_lines(wrong, self._terminal.width))
        faults = _faults_of_switch()
        self._terminal.show([f"WARN  {what}: {text}" for what, text in faults])
        return PROBLEM if wrong or faults else self._status(node)

    def _watch(self) -> None:
        """Full screen until `q`; frames one after another into a file or pipe."""
        is_ascii = self._options.ascii or not self._terminal.is_unicode
        if all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
            app = importlib.import_module("gpu_cache.smi.app")  # Textual is slow to load
            if self._terminal.console.no_color:
                os.environ["NO_COLOR"] = "1"
            app.Watch(self.look, self._options.watch, self._options.count, is_ascii=is_ascii).run()
            return
        past = History()
        for node in self._looks(self._options.watch):
            past.add(node)
            self._terminal.show(watch.frame(node, past, self._options.watch), watch.TO_ASCII if is_ascii else {})

    def _leaks(self) -> int:
        """The entries that outlived two clears or more."""
        process = self._named(self._options.leaks)
        if process is None:
            self._tell(f"no process with a cache has the pid or role {self._options.leaks}")
            return BAD_ARGUMENT
        try:
            answer = leaks.ask(process) if process.is_alive else None
        except OSError as error:
            self._tell(f"pid {process.pid} may not be asked: {error.strerror}")
            return DENIED
        if answer is None:
            self._tell(_silence(process))
            return FAILED
        self._terminal.show(leaks.screen(process, answer, self._terminal.width, shows_all=self._options.all))
        return 0

    def _named(self, wanted: str) -> Process | None:
        """By pid as seen from here, else by role and rank, else by role alone, a leaking one first."""
        processes = sorted(self._observer.look().processes, key=lambda process: process.state != LEAK)
        found = (one for name in ("pid", "title", "role") for one in processes if getattr(one, name) == wanted)
        return next(found, None)

    def _gc(self) -> int:
        """Delete reports of dead processes, and damaged ones without a lock."""
        node, is_refused = self.look(), False
        dead = [file for one in node.processes if one.state == DEAD for file in (one.file, *one.others)]
        for file in [*dead, *node.expired, *(file for file in node.unread if not file.is_denied)]:
            try:
                self._write(*[f"removed {file.title}"] * remove(file))
            except OSError as error:  # the others go all the same
                self._tell(f"may not remove {file.title}: {error.strerror}")
                is_refused = True
        return DENIED if is_refused else 0

    def _serve(self) -> int:
        """Answer scrapes until Ctrl-C."""
        host, port = self._options.serve
        words = f"Warning: on {host} everyone who reaches this machine may read its processes' ids, roles and figures."

        def told(bound: int) -> None:
            self._tell(f"metrics on http://{host}:{bound}/metrics", *[words] * (not is_loopback(host)))

        try:
            importlib.import_module("gpu_cache.smi.exposition").serve(self.look, host, port, told)
        except OSError as error:
            self._tell(f"cannot serve on {host}:{port}: {error.strerror}")
        return FAILED

    def _record(self) -> int:
        """Append samples until Ctrl-C."""
        try:
            with open(self._options.record, "a", buffering=1) as file:
                for node in self._looks(self._options.loop or _RECORD_S):
                    file.write(timeline.line(node) + "\n")
        except OSError as error:
            self._tell(f"{self._options.record}: {error.strerror}")
            return BAD_ARGUMENT
        return 0

    def _timeline(self) -> int:
        """Draw a recording."""
        source = self._options.timeline
        target = self._options.output or source.with_suffix(source.suffix + ".html")
        try:
            with open(source) as file:
                target.write_text(timeline.page(timeline.samples(file)))
        except OSError as error:
            self._tell(f"{error.filename or target}: {error.strerror}")
            return BAD_ARGUMENT
        except ValueError as error:
            self._tell(f"{source}: {error}")
            return BAD_ARGUMENT
        self._write(f"wrote {target}")
        return 0


def _faults_of_switch() -> list[tuple[str, str]]:
    """Faults of the switch for AReaL, where a variable asks for it.

    By name, and on `--check` alone: the cache and its tool know nothing else of handles.
    """
    switch = importlib.import_module("gpu_cache.rpc.adopt")
    return [(one.what, one.text) for one in switch.findings() if not one.is_good] if switch.is_asked_for() else []


def _silence(process: Process) -> str:
    """Why there is no list."""
    age_s = process.report_age_s
    why = {HUNG: f"no report for {age_s:.0f} s", DEAD: "it ended without cleanup"}.get(process.state, "it may be busy")
    return f"pid {process.pid} did not answer within {leaks.ANSWER_TIMEOUT_S:.0f} s ({why})"
