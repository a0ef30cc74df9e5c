"""Check this machine's GPU: what the design assumes of it, then the gpu tests; prints one table for a bug report.

Run this file, with a CUDA build of torch. Takes a few minutes, and at most 2 GiB of the device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

# The checks' own modules, and the library and its tests where they are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu import captures, costs, lifetimes, memory, streams
from gpu.findings import Assumption, examine_all
from gpu.machine import versions
from gpu.report import as_json, is_all_well, table
from gpu.suite import run_suite

EXIT_NOT_WELL = 1
EXIT_NO_GPU = 2
EXIT_INTERRUPTED = 130

TESTS = "tests"
# Wide enough for the table where there is no terminal to ask.
_WIDTH = 160

ASSUMPTIONS: list[Assumption] = [
    *lifetimes.ASSUMPTIONS,
    *streams.ASSUMPTIONS,
    *captures.ASSUMPTIONS,
    *memory.ASSUMPTIONS,
    *costs.ASSUMPTIONS,
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks.

    Returns:
        The exit status: 0 if all is well; 1 if an assumption does not hold or a test failed; 2 if there is no CUDA
        device, which one line says, or the options are wrong.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder")
    if not torch.cuda.is_available():
        print(f"gpu_check: torch {torch.__version__} sees no CUDA device here: nothing to check", file=sys.stderr)
        return EXIT_NO_GPU
    try:
        return run(options.only, has_tests=options.tests, json_path=options.json)
    except KeyboardInterrupt:
        print("gpu_check: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def run(only: Sequence[str], *, has_tests: bool, json_path: Path | None) -> int:
    """Look, test, print and save; returns the exit status.

    Args:
        only: Names of assumptions, or "tests"; nothing: everything.
        has_tests: Whether tests may run.
        json_path: Where the figures go, if anywhere.
    """
    chosen = [assumption for assumption in ASSUMPTIONS if not only or assumption.name in only]
    torch.cuda.init()
    machine, findings = versions(), examine_all(chosen, _tell)
    suite = None
    if has_tests and (not only or TESTS in only):
        torch.cuda.empty_cache()
        _tell("the gpu tests")
        suite = run_suite()
    if json_path is not None:
        json_path.write_text(json.dumps(as_json(machine, findings, suite), indent=2) + "\n")
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    console.print(table(machine, findings, suite))
    return 0 if is_all_well(findings, suite) else EXIT_NOT_WELL


def _tell(what: str) -> None:
    """Progress, beside the table."""
    print(f"gpu_check: {what}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"exit status: 0 all well, {EXIT_NOT_WELL} not, {EXIT_NO_GPU} no CUDA device"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found to FILE, too")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="only look at the assumptions")
    names = [*(assumption.name for assumption in ASSUMPTIONS), TESTS]
    parser.add_argument(
        "--only", action="append", default=[], choices=names, metavar="NAME",
        help=f"only this; may be repeated: {', '.join(repr(name) for name in names)}",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
