"""The command line."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from gpu_cache import __version__
from gpu_cache.config import near, seconds
from gpu_cache.smi import completion
from gpu_cache.smi.node import Filters
from gpu_cache.smi.query import FIELDS
from gpu_cache.smi.screen import BOXES
from gpu_cache.smi.watch import MIN_INTERVAL_S

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 9478
_LOOP_S, _WATCH_S = 5.0, 1.0

_EXIT = """\
Exit: 0 shown, 1 unexpected error, 2 bad argument, 3 --check found LEAK, HUNG or DEAD, 4 reports
may not be read, 9 driver not loaded, 12 NVML library missing (both with --strict).
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gpu-cache-smi: {message}\nHint: gpu-cache-smi --help\n")

    def parse_args(self, arguments: Any = None, namespace: Any = None) -> Any:
        """The options; asks whether a misspelt one means one that there is."""
        found, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            self.error(f"no option {unknown[0]}{near(unknown[0].partition('=')[0], self._option_string_actions)}")
        return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; ends the process with 2 for a bad one.

    Returns:
        With `kind` and `fields` for a query, `filters`, `interval_s` (None: once), `csv`, what follows `--format=csv`.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    options.kind, options.fields = _query(options)
    options.filters = Filters(options.id, options.pid, options.role, options.source)
    options.interval_s = options.loop_ms / 1000 if options.loop_ms else options.loop
    words = options.format.split(",")
    options.csv = set(words[1:])
    if words[0] != "csv" or not options.csv <= {"noheader", "nounits"}:
        parser.error(f"--format={options.format}: csv, csv,noheader, csv,nounits or all three")
    return options


def completion_for(shell: str) -> str:
    """The script that completes these options in a shell."""
    return completion.script(shell, _parser(), {f"--query-{kind}": names for kind, names in FIELDS.items()})


def help_text() -> str:
    """The text of `--help`: each option and its effect."""
    return _parser().format_help()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gpu-cache-smi",
        usage="gpu-cache-smi [options]",
        description="Shows what the gpu_cache caches of this machine hold and do. Without options: a table, once.",
        epilog=_EXIT,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100),
        add_help=False,
        allow_abbrev=False,
    )
    _add_modes(parser.add_argument_group("What to do").add_mutually_exclusive_group().add_argument)
    _add_choices(parser.add_argument_group("How often, of what, and how").add_argument)
    return parser


def _add_modes(add: Callable[..., object]) -> None:
    add("--watch", nargs="?", type=_seconds, const=_WATCH_S, metavar="SEC", help="full screen, every SEC seconds (1)")
    add("--json", action="store_true", help="one document; with -l, one line each")
    for kind in FIELDS:
        add(f"--query-{kind}", type=_fields(kind), metavar="F,...", help=f"comma-separated values of each {kind}")
        add(
            f"--help-query-{kind}",
            dest="help_query",
            action="store_const",
            const=kind,
            help="the names of these values",
        )
    add("--dmon", action="store_true", help="one line for each process and tick")
    add("--prom", action="store_true", help="metrics in Prometheus' text format, once")
    address = f"{DEFAULT_HOST}:{DEFAULT_PORT}"
    served = (DEFAULT_HOST, DEFAULT_PORT)
    add(
        "--serve",
        nargs="?",
        type=_address,
        const=served,
        metavar="ADDR:PORT",
        help=f"metrics for a scraper ({address})",
    )
    add(
        "--check",
        action="store_true",
        help="nothing unless something is wrong, also with a switch for AReaL; exit 3 then",
    )
    add("--leaks", metavar="PID|ROLE", help="entries that outlived a clear; --all for more than 10")
    add("--gc", action="store_true", help="delete the reports of dead processes")
    add("--record", type=Path, metavar="FILE", help="append a sample every second (-l) to FILE")
    add("--timeline", type=Path, metavar="FILE", help="a recording as a page for the browser (-o, or FILE.html)")
    add("-L", "--list", action="store_true", help="GPUs, and the processes on each with user and command line")
    add("--completion", choices=completion.SHELLS, help="a script for this shell that completes all this")
    add("--version", action="version", version=f"gpu-cache-smi {__version__}", help="the version of this tool")
    add("-h", "--help", action="store_true", help="this list")


def _add_choices(add: Callable[..., object]) -> None:
    add("-l", "--loop", nargs="?", type=_seconds, const=_LOOP_S, metavar="SEC", help="again every SEC seconds (5)")
    add("--loop-ms", type=_milliseconds, metavar="MS", help="again every MS milliseconds")
    add("-c", "--count", type=_whole, default=0, metavar="N", help="stop after N times")
    add("-i", "--id", type=_several, default=(), metavar="GPU,...", help='GPUs by index or UUID, or "cpu"')
    for name in ("pid", "role", "source"):
        add(f"--{name}", type=_several, default=(), metavar=f"{name.upper()},...", help="only these")
    add("--by", choices=BOXES, help="one of the boxes")
    add("--dir", type=Path, action="append", help="where the reports are, if not in the usual places")
    add("--format", default="csv", help="csv[,noheader][,nounits] of a query")
    add("-o", "--output", type=Path, metavar="OUT", help="where a timeline goes")
    add("--all", action="store_true", help="every entry of --leaks")
    add("--color", action="store_true", help="also where output is no terminal")
    add("--no-color", action="store_true", help="also NO_COLOR")
    add("--ascii", action="store_true", help="no block characters in --watch")
    add("--strict", action="store_true", help="exit 9 or 12 where NVML cannot be used")
    add("--debug", action="store_true", help="a traceback for an unexpected error")


def _query(options: argparse.Namespace) -> tuple[str, tuple[str, ...]]:
    found = {kind: getattr(options, f"query_{kind}") for kind in FIELDS}
    return next(((kind, names) for kind, names in found.items() if names), ("", ()))


def _several(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _fields(kind: str) -> Callable[[str], tuple[str, ...]]:
    def fields(text: str) -> tuple[str, ...]:
        names = _several(text)
        unknown = [name for name in names if name not in FIELDS[kind]]
        if unknown or not names:
            unknown_one = unknown[0] if unknown else ""
            hint = near(unknown_one, FIELDS[kind])
            raise argparse.ArgumentTypeError(f"no field {unknown_one!r}{hint} (--help-query-{kind} lists them)")
        return names

    return fields


def _seconds(text: str) -> float:
    try:
        return seconds(text, least=MIN_INTERVAL_S)
    except ValueError:
        message = f"{text!r} is no number of seconds, {MIN_INTERVAL_S} or more"
        raise argparse.ArgumentTypeError(message) from None


def _milliseconds(text: str) -> int:
    try:
        return round(1000 * seconds(float(text) / 1000, least=MIN_INTERVAL_S))
    except ValueError:
        message = f"{text!r} is no number of milliseconds, {1000 * MIN_INTERVAL_S:g} or more"
        raise argparse.ArgumentTypeError(message) from None


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, 1 or more")
    return int(text)


def _address(text: str) -> tuple[str, int]:
    """ADDR:PORT, [IPv6]:PORT or PORT."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if host and host != "localhost":
        try:
            ipaddress.ip_address(host)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{host} is no address of this machine") from error
    if not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{port!r} is no port: a number up to 65535")
    return host or DEFAULT_HOST, int(port)
