"""The command line, and scripts by which shells complete it."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gpu_cache import __version__
from gpu_cache.config import near, seconds
from gpu_cache.smi.query import FIELDS
from gpu_cache.smi.screen import BOXES
from gpu_cache.smi.watch import MIN_INTERVAL_S

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 9478
_LOOP_S, _WATCH_S = 5.0, 1.0
_PROGRAM = "gpu-cache-smi"
SHELLS = ("bash", "zsh", "fish")

_EXIT = """\
Exit: 0 shown, 1 unexpected error, 2 bad argument, 3 --check found LEAK, HUNG or DEAD, 4 reports
may not be read, 9 driver not loaded, 12 NVML library missing (both with --strict).
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{_PROGRAM}: {message}\nHint: {_PROGRAM} --help\n")

    def parse_args(self, arguments: Any = None, namespace: Any = None) -> Any:
        """The options; asks whether a misspelt one means one that there is."""
        found, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            self.error(f"no option {unknown[0]}{near(unknown[0].partition('=')[0], self._option_string_actions)}")
        return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; ends the process with 2 for a bad one, and with 0 for --help and --version."""
    return parser().parse_args(arguments)


def parser() -> argparse.ArgumentParser:
    """Knows each option and its effect."""
    made = _Parser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} [options]",
        description="Shows what the gpu_cache caches of this machine hold and do. Without options: a table, once.",
        epilog=_EXIT,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100),
        add_help=False,
        allow_abbrev=False,
    )
    _add_modes(made.add_argument_group("What to do").add_mutually_exclusive_group().add_argument)
    _add_choices(made.add_argument_group("How often, of what, and how").add_argument)
    return made


def _add_modes(add: Callable[..., object]) -> None:
    add("--watch", nargs="?", type=_seconds, const=_WATCH_S, metavar="SEC", help="full screen, every SEC seconds (1)")
    add("--json", action="store_true", help="one document; with -l, one line each")
    for kind in FIELDS:
        values = f"comma-separated values of each {kind}"
        add(f"--query-{kind}", dest="query", type=_fields(kind), metavar="F,...", help=values)
        names = "the names of these values"
        add(f"--help-query-{kind}", dest="help_query", action="store_const", const=kind, help=names)
    add("--dmon", action="store_true", help="one line for each process and tick")
    add("--prom", action="store_true", help="metrics in Prometheus' text format, once")
    served = f"metrics for a scraper ({DEFAULT_HOST}:{DEFAULT_PORT})"
    default = (DEFAULT_HOST, DEFAULT_PORT)
    add("--serve", nargs="?", type=_address, const=default, metavar="ADDR:PORT", help=served)
    checked = "nothing unless something is wrong, also with a switch for AReaL; exit 3 then"
    add("--check", action="store_true", help=checked)
    add("--leaks", metavar="PID|ROLE", help="entries that outlived two clears; --all for more than 10")
    add("--gc", action="store_true", help="delete the reports of dead processes")
    add("--record", type=Path, metavar="FILE", help="append a sample every second (-l) to FILE")
    add("--timeline", type=Path, metavar="FILE", help="a recording as a page for the browser (-o, or FILE.html)")
    add("-L", "--list", action="store_true", help="GPUs, and the processes on each with user and command line")
    add("--completion", choices=SHELLS, help="a script for this shell that completes all this")
    add("--version", action="version", version=f"{_PROGRAM} {__version__}", help="the version of this tool")
    add("-h", "--help", action="help", help="this list")


def _add_choices(add: Callable[..., object]) -> None:
    add("-l", "--loop", nargs="?", type=_seconds, const=_LOOP_S, metavar="SEC", help="again every SEC seconds (5)")
    add("--loop-ms", dest="loop", type=_milliseconds, metavar="MS", help="again every MS milliseconds")
    add("-c", "--count", type=_whole, default=0, metavar="N", help="stop after N times")
    add("-i", "--id", type=_several, default=(), metavar="GPU,...", help='GPUs by index or UUID, or "cpu"')
    for name in ("pid", "role", "source"):
        add(f"--{name}", type=_several, default=(), metavar=f"{name.upper()},...", help="only these")
    add("--by", choices=BOXES, help="one of the boxes")
    add("--dir", type=Path, action="append", help="where the reports are, if not in the usual places")
    add("--format", type=_csv, default="csv", help="csv[,noheader][,nounits] of a query")
    add("-o", "--output", type=Path, metavar="OUT", help="where a timeline goes")
    add("--all", action="store_true", help="every entry of --leaks")
    add("--color", action="store_true", help="also where output is no terminal")
    add("--no-color", action="store_true", help="also NO_COLOR")
    add("--ascii", action="store_true", help="no block characters in --watch")
    add("--strict", action="store_true", help="exit 9 or 12 where NVML cannot be used")
    add("--debug", action="store_true", help="a traceback for an unexpected error")


def _several(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _fields(kind: str) -> Callable[[str], tuple[str, tuple[str, ...]]]:
    """The kind, and fields that it has."""

    def fields(text: str) -> tuple[str, tuple[str, ...]]:
        names = _several(text)
        if unknown := [name for name in names or ("",) if name not in FIELDS[kind]]:
            hint = near(unknown[0], FIELDS[kind])
            raise argparse.ArgumentTypeError(f"no field {unknown[0]!r}{hint} (--help-query-{kind} lists them)")
        return kind, names

    return fields


def _interval(unit: str, in_a_second: int = 1) -> Callable[[str], float]:
    """Seconds, given in a unit."""

    def interval(text: str) -> float:
        try:
            return seconds(float(text) / in_a_second, least=MIN_INTERVAL_S)
        except ValueError:
            message = f"{text!r} is no number of {unit}, {in_a_second * MIN_INTERVAL_S:g} or more"
            raise argparse.ArgumentTypeError(message) from None

    return interval


_seconds, _milliseconds = _interval("seconds"), _interval("milliseconds", 1000)


def _csv(text: str) -> set[str]:
    """The words after csv."""
    first, *words = text.split(",")
    if first != "csv" or not set(words) <= {"noheader", "nounits"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not csv, csv,noheader, csv,nounits or all three")
    return set(words)


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


class _Option(NamedTuple):
    """One option, as a shell needs it.

    Attributes:
        names: As written, such as `-o` and `--output`.
        words: Values to choose from.
        takes: What follows: "nothing", "file", "folder", or "value".
    """

    names: tuple[str, ...]
    words: tuple[str, ...]
    takes: str


def completion(shell: str) -> str:
    """The script that completes these options in one of `SHELLS`."""
    writers = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return writers[shell]([_option(action) for action in parser()._actions])


def _option(action: argparse.Action) -> _Option:
    names = tuple(action.option_strings)
    fields = FIELDS[names[0].removeprefix("--query-")] if action.dest == "query" else None
    is_path = action.type is Path
    takes = "nothing" if action.nargs == 0 else "value" if not is_path else "folder" if "--dir" in names else "file"
    return _Option(names, tuple(fields or action.choices or ()), takes)


def _bash(options: list[_Option]) -> str:
    cases = "".join(f"    {'|'.join(one.names)}) {_bash_answer(one)};;\n" for one in options if one.takes != "nothing")
    names = " ".join(name for one in options for name in one.names)
    return (
        "_gpu_cache_smi() {\n"
        '  local word="${COMP_WORDS[COMP_CWORD]}" option="${COMP_WORDS[COMP_CWORD-1]}" start=\n'
        '  if [[ $word == "=" ]]; then word=\n'
        '  elif [[ $option == "=" ]]; then option="${COMP_WORDS[COMP_CWORD-2]}"; fi\n'
        '  if [[ $word == *,* ]]; then start="${word%,*},"; word="${word##*,}"; fi\n'
        "  [[ $word == -* ]] && option=\n"
        "  COMPREPLY=()\n"
        "  case $option in\n"
        f"{cases}"
        f'    *) COMPREPLY=($(compgen -W "{names}" -- "$word"));;\n'
        "  esac\n"
        "}\n"
        f"complete -F _gpu_cache_smi {_PROGRAM}\n"
    )


def _bash_answer(option: _Option) -> str:
    if option.words:
        return f'COMPREPLY=($(compgen -P "$start" -W "{" ".join(option.words)}" -- "$word"))'
    kinds = {"file": "-f", "folder": "-d"}
    return f'COMPREPLY=($(compgen {kinds[option.takes]} -- "$word"))' if option.takes in kinds else ":"


def _zsh(options: list[_Option]) -> str:
    lines = [f"  '{name}{_zsh_value(one, name)}'" for one in options for name in one.names]
    return f"#compdef {_PROGRAM}\n_arguments \\\n" + " \\\n".join(lines) + "\n"


def _zsh_value(option: _Option, name: str) -> str:
    if option.takes == "nothing":
        return ""
    kinds = {"file": "_files", "folder": "_files -/", "value": " "}
    answer = f"({' '.join(option.words)})" if option.words else kinds[option.takes]
    return f"{'=' if name.startswith('--') else '+'}:value:{answer}"


def _fish(options: list[_Option]) -> str:
    return f"complete -c {_PROGRAM} -f\n" + "".join(map(_fish_line, options))


def _fish_line(option: _Option) -> str:
    names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
    kinds = {"nothing": "", "file": " -r -F", "folder": " -x -a '(__fish_complete_directories)'", "value": " -x"}
    answer = f" -x -a '{' '.join(option.words)}'" if option.words else kinds[option.takes]
    return f"complete -c {_PROGRAM} {names}{answer}\n"
