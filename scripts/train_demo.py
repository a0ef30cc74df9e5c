"""Train a small policy by reinforcement learning through the RTensor data plane: `make demo`, or run this file.

Rollout workers, each a process with a shard server, sample from the current policy and keep the trajectories. The
trainer receives handles, reads each batch five times through its cache, clears it, and publishes new weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

# The demo's own modules, and the library where it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo.learner import Learner
from demo.report import LiveProgress, introduction, summary, table
from demo.roles import ACTOR, ROLES, Roles, node_cache, remote_workers
from demo.rollouts import WorkerError, Workers
from demo.session import Outcome, Plan, Session

from gpu_cache.rpc import runtime
from gpu_cache.rpc.server import main as rpc_server

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        The exit status: 0, or 1 if a worker died or the cache was not empty in the end.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    plan = _plan(options)
    if (plan.kill_worker_at or 0) > plan.steps:
        parser.error(f"--kill-worker-at {plan.kill_worker_at}: there are {plan.steps} steps")
    if options.workers > plan.num_prompts:
        parser.error(f"--workers {options.workers}: there are {plan.num_prompts} prompts per step to share out")
    if plan.roles and (plan.roles[0] != ACTOR or not set(plan.roles) <= set(ROLES)):
        parser.error(f"--roles {options.roles}: write {ACTOR} first, then any of {', '.join(ROLES[1:])}")
    if plan.roles and plan.kill_worker_at:
        parser.error("--roles and --kill-worker-at: choose one")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder")
    try:
        device = _device(options.device)
    except ValueError as error:
        parser.error(str(error))
    console = Console(quiet=options.quiet)
    try:
        outcome = run(plan, options.workers, device, console, by_node_cache=options.node_cache)
    except WorkerError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted")
        return EXIT_INTERRUPTED
    figures = summary(outcome, device=str(device), workers=options.workers, seed=options.seed)
    console.print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return _check(figures)


def run(
    plan: Plan, num_workers: int, device: torch.device, console: Console, *, by_node_cache: bool = False
) -> Outcome:
    """Train according to plan; on return, and on any error, the workers are gone.

    Args:
        plan: How much to run.
        num_workers: Rollout workers.
        device: The trainer's.
        console: Where to show progress.
        by_node_cache: Whether the workers are as on another host, and a node cache fetches from them.
    Raises:
        WorkerError: A worker died or failed.
    """
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        if by_node_cache:
            stack.enter_context(node_cache())
            runtime.current().set_backend(None)  # the one that reads by way of it
        workers = stack.enter_context(remote_workers(num_workers) if by_node_cache else Workers(num_workers))
        progress = stack.enter_context(LiveProgress(plan, console))
        roles = stack.enter_context(Roles(plan.roles, plan.seed, plan.learner)) if plan.roles else None
        learner = Learner(device, plan.seed, plan.learner)
        console.print(introduction(learner.num_parameters, num_workers, str(device)), highlight=False)
        runtime.configure(device=str(device), role="actor" if plan.roles else "trainer")
        server = stack.enter_context(rpc_server.start())
        return Session(plan, learner, workers, server.address, progress.show, progress.tell, roles).run()


def _device(name: str) -> torch.device:
    """The trainer's device; `ValueError` if it is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    has_cuda = accelerator is not None and accelerator.type == "cuda"
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    if not (name == "cpu" or (has_cuda and re.fullmatch(r"cuda(:\d+)?", name))):
        raise ValueError(f"--device {name}: not here; choose auto, cpu" + (" or cuda" if has_cuda else ""))
    return torch.device(name)


def _plan(options: argparse.Namespace) -> Plan:
    return Plan(
        options.steps,
        options.uncached_steps,
        options.seed,
        roles=tuple(dict.fromkeys(name for name in options.roles.split(",") if name)),
        kill_worker_at=options.kill_worker_at,
        on_worker_death=options.on_worker_death,
    )


def _check(figures: dict[str, Any]) -> int:
    """The exit status that the figures call for."""
    if figures["device_bytes_after_clear"]:
        return _fail(f"{figures['device_bytes_after_clear']:,} bytes are still in the cache after the last clear")
    if figures["shards_left"]:
        return _fail(f"{figures['shards_left']:,} shards are still at the workers after the last clear")
    return 0


def _fail(message: str) -> int:
    print(f"train_demo: {message}", file=sys.stderr)
    return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    plan = Plan()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=_at_least(1), default=plan.steps, help="steps (default: %(default)s)")
    parser.add_argument(
        "--uncached-steps",
        type=_at_least(0),
        default=plan.uncached_steps,
        help="further steps without the cache, to compare with (default: %(default)s)",
    )
    parser.add_argument("--workers", type=_at_least(1), default=2, help="rollout workers (default: %(default)s)")
    parser.add_argument("--seed", type=_at_least(0), default=plan.seed, help="default: %(default)s")
    parser.add_argument(
        "--device", default="auto", help='"cpu", "cuda", "cuda:N"; "auto" takes the GPU if there is one'
    )
    parser.add_argument(
        "--kill-worker-at",
        type=_at_least(1),
        metavar="STEP",
        help="kill a rollout worker when the trainer has this step's handles and has read nothing",
    )
    parser.add_argument(
        "--on-worker-death",
        choices=["fail", "restart"],
        default=plan.on_worker_death,
        help="end the run, or restart the worker and go on without what was lost (default: %(default)s)",
    )
    parser.add_argument(
        "--roles",
        default="",
        metavar="NAMES",
        help='such as "actor,ref,critic": each a process with a cache of its own, which reads every batch',
    )
    parser.add_argument(
        "--node-cache", action="store_true", help="have the workers as on another host, and a node cache on this one"
    )
    parser.add_argument("--quiet", action="store_true", help="neither progress nor table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there; waits are seconds per step")
    return parser


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return int(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
