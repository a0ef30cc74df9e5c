"""Time the same tensors over several paths, side by side: `make bench`, or run this file.

An owner process serves each workload through the real shard server; this process fetches it over every path in turn,
round after round. On a noisy machine look at the ratios: their terms were timed within the same second.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

# The benchmark's own modules, and the library where it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench.exactness import BenchError
from bench.owner import Owner, OwnerError
from bench.paths import open_paths
from bench.report import NOTES, machine, result_table, workload_table
from bench.rounds import rows, run_rounds
from bench.workloads import NAMES, Workload, make_workload

from gpu_cache import GpuCacheError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

_ROUNDS, _QUICK_ROUNDS = 15, 3
_QUICK_FRACTION = 0.25
_NUM_PATHS = 8
# Wide enough for the tables where there is no terminal to ask.
_WIDTH = 120


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        The exit status: 0, or 1 if a path brought wrong bits or the owner died.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder")
    try:
        device = _device(options.device)
    except ValueError as error:
        parser.error(str(error))
    num_rounds = options.rounds or (_QUICK_ROUNDS if options.quick else _ROUNDS)
    try:
        found = run(options.workload, _QUICK_FRACTION if options.quick else 1.0, num_rounds, device)
    except (BenchError, OwnerError, GpuCacheError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted")
        return EXIT_INTERRUPTED
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def run(names: Sequence[str], fraction: float, num_rounds: int, device: str) -> list[dict[str, Any]]:
    """Time all paths of some workloads and print a table of each; returns their rows.

    Raises:
        BenchError: A path brought other bits than were sent.
        OwnerError: The owner died.
    """
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    workloads = [make_workload(name, fraction) for name in names]
    console.print(machine(device))
    console.print(workload_table(workloads))
    console.print(NOTES)
    found: list[dict[str, Any]] = []
    for workload in workloads:
        figures = _time(workload, fraction, num_rounds, device, console)
        console.print(result_table(workload, figures, num_rounds))
        found += figures
    return found


def _time(workload: Workload, fraction: float, num_rounds: int, device: str, console: Console) -> list[dict[str, Any]]:
    """The rows of one workload."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"{workload.name}: starting the owner", total=(num_rounds + 1) * _NUM_PATHS)

        def advance(path: str) -> None:
            progress.update(bar, advance=1, description=f"{workload.name} {path:9}")

        with Owner(workload, fraction) as owner, open_paths(workload, owner, device) as paths:
            return rows(workload.name, workload.nbytes, run_rounds(paths, num_rounds, owner.cpu_seconds, advance))


def _device(name: str) -> str:
    """Where to cache; `ValueError` if it is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    has_cuda = accelerator is not None and accelerator.type == "cuda"
    if name == "auto":
        return "cuda" if has_cuda else "cpu"
    if not (name == "cpu" or (has_cuda and re.fullmatch(r"cuda(:\d+)?", name))):
        raise ValueError(f"--device {name}: not here; choose auto, cpu" + (" or cuda" if has_cuda else ""))
    return name


def _fail(message: str) -> int:
    print(f"benchmark: {message}", file=sys.stderr)
    return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workload", type=_names, default=list(NAMES), help='such as "W1,W3" (default: all)')
    parser.add_argument("--rounds", type=_positive, help=f"timed rounds (default: {_ROUNDS}, quick: {_QUICK_ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="a quarter of each workload, in under a minute")
    parser.add_argument(
        "--device", default="auto", help='"cpu", "cuda", "cuda:N"; "auto" takes the GPU if there is one'
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, in seconds and bytes")
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(NAMES)}")
    return list(dict.fromkeys(names))


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
