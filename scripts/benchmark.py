"""Time the same tensors over several paths, side by side: `make bench`, or run this file.

An owner process serves each workload through the real shard server; this process fetches it over every path in turn,
round after round. On a noisy machine look at the ratios: their terms were timed within the same second.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

# The benchmark's own modules, and the library where it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench import publishing, report, scale
from bench.allocations import AllocationWatch, MemoryTraffic
from bench.exactness import BenchError, Original
from bench.gpu_paths import gpu_paths
from bench.hits import hit_paths
from bench.meter import Meter
from bench.owner import Owner, OwnerError
from bench.paths import Trainers, open_paths, selected, storing_path, variants
from bench.profiling import CAVEAT, profiles
from bench.rounds import Plan, rows, run_rounds, skipped_row
from bench.targets import verdicts
from bench.trainer import Trainer
from bench.workloads import NAMES, Workload, make_workload

from gpu_cache import GpuCacheError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

_ALL_NAMES = (*NAMES, scale.NAME)
# Wide enough for the tables where there is no terminal to ask.
_WIDTH = 120


@dataclass(frozen=True)
class Extent:
    """How much is run.

    Attributes:
        fraction: Of each workload's trajectories.
        plan: Rounds of a workload.
        only: Patterns of the rows that are run.
        json_bytes: The JSON form is slow: so many bytes of a workload are fetched in it, and the seconds scaled.
        sizes: Numbers of entries of the workload scale.
    """

    fraction: float
    plan: Plan
    json_bytes: float
    sizes: Sequence[int]
    only: Sequence[str] = ("*",)


# The seconds keep all of it at about five minutes, and at about one.
FULL = Extent(1.0, Plan(most=15, least=4, seconds=40), 28e6, scale.SIZES)
QUICK = Extent(0.25, Plan(most=3, least=1, seconds=4), 7e6, scale.SIZES[:-1])
# Where shards are few and large, what costs microseconds a shard is not worth a row beside each thread; the last one
# is there for what a busy thread loses at a step.
_LARGE = (
    *("raw", "memcpy", "json", "defaults/cold*", "defaults/step*", "defaults/warm", "defaults/clear", "tuned/cold"),
    "samehost/cold",
    *("pinned_peak", "*/pipeline", "*/larger*", "upstream_*"),
)
_ROWS_OF = {
    "distillation": _LARGE,
    "vision": _LARGE,
    "images": ("raw*", "memcpy", "defaults/cold*", "defaults/step*", "samehost/cold*"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        The exit status: 0, also where targets are missed, or 1 if a path brought wrong bits or the owner died.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        device = _device(options.device)
        if options.json:  # now, not after minutes of work
            options.json.parent.mkdir(exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        if options.publishing:
            share = publishing.percent_of_a_core(options.publishing, device)
            print(f"publishing reports of {publishing.NUM_ENTRIES:,} entries takes {share:.3f} % of a core")
            return 0
        with _quiet_process():
            found = (run_profile if options.profile else run)(options.workload, _extent(options), device)
    except (BenchError, OwnerError, GpuCacheError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted")
        return EXIT_INTERRUPTED
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def run(names: Sequence[str], extent: Extent, device: str) -> list[dict[str, Any]]:
    """Time all paths of some workloads and print a table of each, then the targets; returns the rows.

    Raises:
        BenchError: A path brought other bits than were sent, or no row is named as `extent.only` says.
        OwnerError: The owner died.
    """
    console, is_host = _console(), torch.device(device).type == "cpu"
    workloads = [make_workload(name, extent.fraction) for name in names if name in NAMES]
    console.print(report.machine(device))
    console.print(report.workload_table(workloads, extent.sizes if scale.NAME in names else ()))
    console.print(report.NOTES if is_host else f"{report.NOTES}\n{report.DEVICE_NOTES}")
    found: list[dict[str, Any]] = []
    for workload in workloads:
        figures = _time(workload, extent, device, console)
        report.print_workload(console, workload, figures, is_host)
        found += figures
    if scale.NAME in names and extent.only == Extent.only:
        found += _time_scale(extent, console)
    if not found:
        raise BenchError(f"no row is named {' or '.join(extent.only)}; a run without --only prints all")
    console.print(report.target_table(verdicts(found, is_host), only_measured=extent.only != Extent.only))
    return found


def run_profile(names: Sequence[str], extent: Extent, device: str) -> list[dict[str, Any]]:
    """Print where cold fetches of some workloads spend their time; times nothing, so returns no rows."""
    console = _console()
    console.print(f"{report.machine(device)}\n{CAVEAT}")
    for workload in [make_workload(name, extent.fraction) for name in names if name in NAMES]:
        with Owner(workload, extent.fraction) as owner, _trainers(workload, owner, device) as trainers:
            for title, text in profiles(trainers.tuned):
                console.rule(f"{workload.name}: {title}", align="left")
                console.out(text, highlight=False)
    return []


def _time(workload: Workload, extent: Extent, device: str, console: Console) -> list[dict[str, Any]]:
    """The rows of one workload."""
    with (
        _progress(workload.name, console) as advance,
        MemoryTraffic() as traffic,
        Owner(workload, extent.fraction) as owner,
    ):
        advance("is made")
        original = Original(workload)  # while the owner comes up
        with (
            _trainers(workload, owner, device) as trainers,
            open_paths(workload, owner, trainers, original, extent.json_bytes) as (paths, part),
        ):
            if workload.name == "rollout":
                stored = storing_path(workload, trainers.defaults, original)
                paths += variants([*hit_paths(workload, trainers.defaults), stored], trainers.tuned.device)
            if trainers.tuned.device != "cpu":
                paths += gpu_paths(workload, trainers, original, part)
            wanted = selected(selected(paths, _ROWS_OF.get(workload.name, ("*",))), extent.only)
            meter = Meter(owner.cpu_seconds, AllocationWatch(traffic, trainers.tuned.device))
            courses = run_rounds(wanted, extent.plan, meter, advance)
            trainers.defaults.check_pool()
            trainers.tuned.check_pool()
            skipped = [skipped_row(workload.name, path) for path in wanted if path.reason]
            return rows(workload.name, workload.nbytes, courses) + skipped


def _time_scale(extent: Extent, console: Console) -> list[dict[str, Any]]:
    """The rows of the workload scale."""
    with _progress(scale.NAME, console) as advance:
        figures = scale.run(extent.sizes, dataclasses.replace(extent.plan, least=1), advance)  # each takes a minute
    console.print(report.scale_table(figures))
    console.print(report.SCALE_NOTES)
    return figures


@contextlib.contextmanager
def _trainers(workload: Workload, owner: Owner, device: str) -> Iterator[Trainers]:
    """The tuned one first: it initialises CUDA where it is on a GPU, so that the other one goes there by itself."""
    handles = owner.offer.handles
    with (
        contextlib.closing(Trainer.tuned(workload, handles, device)) as tuned,
        contextlib.closing(Trainer.at_defaults(workload, handles)) as defaults,
        contextlib.closing(Trainer.at_defaults(workload, handles, same_host=True)) as same_host,
    ):
        yield Trainers(defaults, tuned, same_host)


@contextlib.contextmanager
def _progress(name: str, console: Console) -> Iterator[Callable[[str], None]]:
    """A line on terminals that says what is run just now."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        line = progress.add_task(name, total=None)
        yield lambda path: progress.update(line, description=f"{name} {path:18}")


@contextlib.contextmanager
def _quiet_process() -> Iterator[None]:
    """One thread of torch's own, and no garbage collection that looks at what the imports left."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    said = logging.getLogger("gpu_cache.process")
    level = said.level
    said.setLevel(logging.ERROR)  # two caches on one GPU are meant here
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        said.setLevel(level)
        gc.unfreeze()
        torch.set_num_threads(num_threads)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


def _device(name: str) -> str:
    """Where to cache; `ValueError` if it is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    has_cuda = accelerator is not None and accelerator.type == "cuda"
    if name == "auto":
        return "cuda" if has_cuda else "cpu"
    if not (name == "cpu" or (has_cuda and re.fullmatch(r"cuda(:\d+)?", name))):
        raise ValueError(f"--device {name}: not here; choose auto, cpu" + (" or cuda" if has_cuda else ""))
    return name


def _extent(options: argparse.Namespace) -> Extent:
    """That of --quick or the full one, with what other options say."""
    extent: Extent = QUICK if options.quick else FULL
    plan = Plan(options.rounds, options.rounds, 0) if options.rounds else extent.plan
    fraction = options.fraction or extent.fraction
    # A fraction of scale keeps the smallest size, over which the growth is taken.
    sizes = [number for number in extent.sizes if number <= max(scale.SIZES[0], fraction * scale.SIZES[-1])]
    return Extent(fraction, plan, extent.json_bytes, sizes, options.only)


def _fail(message: str) -> int:
    print(f"benchmark: {message}", file=sys.stderr)
    return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--workload", type=_names, default=list(_ALL_NAMES), help=f"of {','.join(_ALL_NAMES)} (default: all)"
    )
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=Extent.only,
        metavar="ROWS",
        help='rows by name or pattern, such as "raw,defaults/cold*"; a ratio needs the row that it compares with',
    )
    parser.add_argument("--rounds", type=_positive, help=f"timed rounds (default: {FULL.plan.most} if there is time)")
    parser.add_argument("--quick", action="store_true", help="a quarter of each workload, in about a minute")
    parser.add_argument("--fraction", type=_share, help="so much of each workload (default: 1, quick: 0.25)")
    parser.add_argument(
        "--device", default="auto", help='"cpu", "cuda", "cuda:N"; "auto" takes the GPU if there is one'
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, in seconds and bytes")
    parser.add_argument("--profile", action="store_true", help="print where cold fetches spend their time, and end")
    parser.add_argument("--publishing", type=float, metavar="SECONDS", help="time the reports for so long, and end")
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in _ALL_NAMES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(_ALL_NAMES)}")
    return list(dict.fromkeys(names))


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError("must be above 0, and at most 1")
    return float(text)


if __name__ == "__main__":
    sys.exit(main())
