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

HELP = f"""\
usage: gpu-cache-smi [options]

Shows what the gpu_cache caches of this machine hold and do. Without options: a table, once.

Repeat:
  -l [SEC]                 again every SEC seconds (5)
  --loop-ms MS             again every MS milliseconds
  --watch [SEC]            full screen, every SEC seconds (1); ? shows the keys
  -c N, --count N          stop after N times
For machines:
  --json                   one document; with -l, one line each
  --query-gpu=F,...        comma-separated values of GPUs; so --query-proc, --query-source
  --format=csv[,noheader][,nounits]
  --help-query-gpu         what can be asked for; so --help-query-proc, --help-query-source
  --dmon                   one line for each process and tick
  --prom                   metrics in Prometheus' text format, once
  --serve [[ADDR:]PORT]    the same for a scraper ({DEFAULT_HOST}:{DEFAULT_PORT})
  --check                  nothing unless something is wrong, such as a switch for AReaL without
                           effect; exit 3 then
Look closer:
  --leaks PID|ROLE         entries that outlived a clear; --all for more than 10
  --gc                     delete the reports of dead processes
  --record FILE            append a sample every second (-l) to FILE
  --timeline FILE [-o OUT] a recording as a page for the browser (FILE.html)
  -L, --list               GPUs, and the processes on each with user and command line
Choose:
  -i GPU, --id GPU         GPUs by index or UUID, or "cpu"; commas between several
  --pid PID, --role ROLE, --source NODE
  --by gpu|proc|source     one of the boxes
  --dir DIR                where the reports are, if not in the usual places
Show:
  --color, --no-color      also NO_COLOR
  --ascii                  no block characters in --watch
  --strict                 exit 9 or 12 where NVML cannot be used
  --debug                  a traceback for an unexpected error
  --completion SHELL       a script for bash, zsh or fish that completes all this
  --version, -h, --help

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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gpu-cache-smi", add_help=False, allow_abbrev=False)
    _add_modes(parser.add_mutually_exclusive_group())
    parser.add_argument("-l", "--loop", nargs="?", type=_seconds, const=_LOOP_S, metavar="SEC")
    parser.add_argument("--loop-ms", type=_milliseconds, metavar="MS")
    parser.add_argument("-c", "--count", type=_whole, default=0, metavar="N")
    parser.add_argument("--format", default="csv")
    parser.add_argument("-o", "--output", type=Path)
    for name in ("-i/--id", "--pid", "--role", "--source"):
        parser.add_argument(*name.split("/"), type=_several, default=())
    parser.add_argument("--by", choices=BOXES)
    parser.add_argument("--dir", type=Path, action="append")
    for name in ("all", "color", "no-color", "ascii", "strict", "debug"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser


def _add_modes(modes: argparse._MutuallyExclusiveGroup) -> None:
    modes.add_argument("--version", action="version", version=f"gpu-cache-smi {__version__}")
    modes.add_argument("-h", "--help", action="store_true")
    modes.add_argument("--completion", choices=completion.SHELLS)
    modes.add_argument("--watch", nargs="?", type=_seconds, const=_WATCH_S, metavar="SEC")
    modes.add_argument("-L", "--list", action="store_true")
    for kind in FIELDS:
        modes.add_argument(f"--query-{kind}", type=_fields(kind), metavar="F,...")
        modes.add_argument(f"--help-query-{kind}", dest="help_query", action="store_const", const=kind)
    modes.add_argument("--serve", nargs="?", type=_address, const=(DEFAULT_HOST, DEFAULT_PORT), metavar="[ADDR:]PORT")
    modes.add_argument("--leaks", metavar="PID")
    modes.add_argument("--record", type=Path, metavar="FILE")
    modes.add_argument("--timeline", type=Path, metavar="FILE")
    for name in ("json", "dmon", "prom", "check", "gc"):
        modes.add_argument(f"--{name}", action="store_true")


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
