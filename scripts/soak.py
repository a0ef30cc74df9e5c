"""Soak the data plane: eight threads, two servers, faults; see whether anything is wrong, stuck, or grows.

Consumers localize, prefetch, hold and clear shards on a pool that is too small for them, through proxies that cut,
stall and reset connections, from servers of which one is killed now and then. Every byte that is handed out is
compared. Prints a line a minute, and a verdict at the end, for which Ctrl-C is as good as the end of the time.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

# The soak's own modules, and the library where it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from soaking.columns import verdict_lines
from soaking.figures import keep_malloc_from_hoarding
from soaking.owner import OwnerError
from soaking.session import Plan, soak
from soaking.verdict import judge

from gpu_cache.config import seconds

EXIT_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak.

    Returns:
        The exit status: 0 if everything holds, else 1.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        device = _device(options.device)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    keep_malloc_from_hoarding()
    _tell(f"soak: {options.minutes:g} min, {options.threads} threads, seed {options.seed}, device {device}")
    plan = Plan(options.minutes * 60, options.line_seconds, options.seed, options.threads, device)
    try:
        findings = soak(plan, _tell)
    except KeyboardInterrupt:  # before there was anything to judge, or for the second time
        return _fail("interrupted")
    except OwnerError as error:
        return _fail(str(error))
    for line in verdict_lines(findings):
        _tell(line)
    return EXIT_FAILED if any(problem for _, problem in judge(findings)) else 0


def _fail(message: str) -> int:
    print(f"soak: {message}", file=sys.stderr)
    return EXIT_FAILED


def _tell(line: str) -> None:
    print(line, flush=True)


def _device(name: str) -> str:
    """Where to cache; `ValueError` if it is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    has_cuda = accelerator is not None and accelerator.type == "cuda"
    if name == "auto":
        return "cuda" if has_cuda else "cpu"
    if not (name == "cpu" or (has_cuda and re.fullmatch(r"cuda(:\d+)?", name))):
        raise ValueError(f"--device {name}: not here; choose auto, cpu" + (" or cuda" if has_cuda else ""))
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=_positive, default=10.0, help="default: %(default)g")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--threads", type=int, choices=range(1, 65), default=8, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--device", default="auto", help='"cpu", "cuda"; "auto" takes the GPU if there is one')
    parser.add_argument("--line-seconds", type=_positive, default=60.0, help="between two lines (default: %(default)g)")
    return parser


def _positive(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError("must be positive")
    return seconds(text)


if __name__ == "__main__":
    sys.exit(main())
