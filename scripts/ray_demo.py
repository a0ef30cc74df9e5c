"""The demo's loop with actors of Ray as its workers: `make demo BACKEND=ray`.

Rollout workers, a reference and an actor of the demo's policy are Ray's actors. Their tensors stay in Ray's object
store until the step is cleared; the driver hands handles on. This program starts a Ray of its own, and ends it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from areal_demo import EXIT_FAILED, parser_of, table
from rich.console import Console

STORE_BYTES = 256 << 20


def main() -> int:
    """Run the demo; the exit status is 1 without Ray, or if a process still holds a shard in the end."""
    options = parser_of(__doc__).parse_args()
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # more than Ray gives a node to start
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        return _fail(f"Ray is not installed for {sys.executable}; `make demo BACKEND=ray` uses a Python that has it")
    console = Console(quiet=options.quiet)
    console.print(f"Ray {ray.__version__} starts {options.workers + 2} actors.")
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])  # of the actors
    ray.init(
        address="local", num_cpus=options.workers + 2, include_dashboard=False, object_store_memory=STORE_BYTES,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    try:
        figures = importlib.import_module("demo.ray_roles").run(ray, options, console)
    finally:
        ray.shutdown()
    console.print(table(figures, f"Ray {ray.__version__}"))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    left = {role: held for role, held in figures["held"].items() if any(held.values())}
    return _fail(f"after the last clear there is left: {left}") if left else 0


def _fail(message: str) -> int:
    print(f"ray_demo: {message}", file=sys.stderr)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
