"""The demo's loop over AReaL's own scheduler, controllers and rpc servers: `make demo BACKEND=areal`.

AReaL's scheduler starts a process for each worker: rollout workers, a reference, an actor. Its controllers call them,
and its `clear_batches` ends each step. One call before AReaL's import gives all of them this project's handles.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo.report import REWARD_STEPS, mean
from rich.console import Console
from rich.table import Table

import gpu_cache

EXIT_FAILED = 1
LOG_TAIL = 4000  # characters of AReaL's log that are shown when something fails


def main() -> int:
    """Run the demo; the exit status is 1 without AReaL, or if a process still holds a shard in the end."""
    options = parser_of(__doc__).parse_args()
    try:
        areal = importlib.metadata.version("areal")
    except importlib.metadata.PackageNotFoundError:
        return _fail(
            f"AReaL is not installed for {sys.executable}; `make demo BACKEND=areal` uses a Python that has it"
        )
    with tempfile.TemporaryDirectory() as folder, own_output(Path(folder, "areal.log")) as (out, err):
        console = Console(file=out, quiet=options.quiet)
        console.print(f"AReaL {areal} starts {options.workers + 2} workers, each of which imports AReaL.")
        gpu_cache.adopt()
        try:
            figures = importlib.import_module("demo.areal_loop").run(options, folder, console)
        except Exception:
            print(Path(folder, "areal.log").read_text()[-LOG_TAIL:], file=err)
            raise
        console.print(table(figures, f"AReaL {areal}"))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    left = {role: held for role, held in figures["held"].items() if any(held.values())}
    return _fail(f"after the last clear there is left: {left}") if left else 0


@contextlib.contextmanager
def own_output(log: Path) -> Iterator[tuple[TextIO, TextIO]]:
    """The output of this program alone: AReaL, which repeats its workers' logs, writes to a file meanwhile."""
    with log.open("w") as theirs, contextlib.ExitStack() as stack:
        own = []
        for descriptor in (1, 2):
            own.append(stack.enter_context(os.fdopen(os.dup(descriptor), "w", buffering=1)))
            stack.callback(os.dup2, own[-1].fileno(), descriptor)
            os.dup2(theirs.fileno(), descriptor)
        yield own[0], own[1]


def table(figures: dict[str, Any], beside: str) -> Table:
    """The figures, for reading; `beside` is what the demo ran over."""
    actor, num_left = figures["actor"], sum(sum(held.values()) for held in figures["held"].values())
    grid = Table(title=f"RTensor demo beside {beside}", show_header=False)
    rows = {
        "steps": f"{figures['steps']:,}",
        f"mean reward, first {REWARD_STEPS} steps": f"{mean(figures['rewards'][:REWARD_STEPS]):.3f}",
        f"mean reward, last {REWARD_STEPS} steps": f"{mean(figures['rewards'][-REWARD_STEPS:]):.3f}",
        "hit rate of the actor's cache": f"{actor['hits'] / max(1, actor['requested']):.1%}",
        "bytes that the actor fetched": f"{int(actor['fetch_bytes']):,}",
        "shards left after the last clear, in all processes": f"{num_left:,}",
        "run time without the start": f"{figures['seconds']:.1f} s",
    }
    for name, figure in rows.items():
        grid.add_row(name, figure)
    return grid


def _fail(message: str) -> int:
    print(f"areal_demo: {message}", file=sys.stderr)
    return EXIT_FAILED


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options of a demo over several processes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="steps (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="rollout workers (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--quiet", action="store_true", help="neither progress nor table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
