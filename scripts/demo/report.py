"""What the user sees: progress while the policy learns, a table at the end, and the same figures as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from demo.meter import Phase
from demo.session import NUM_READS, Outcome, Plan

# Rewards are averaged over so many steps: one batch is noisy.
REWARD_STEPS = 5
_LINE_EVERY_STEPS = 10


class LiveProgress:
    """A progress bar on a terminal, a line now and then elsewhere, nothing if quiet. A context manager.

    Args:
        plan: What will be run; the steps with the cache are shown.
        console: Where to.
    """

    def __init__(self, plan: Plan, console: Console) -> None:
        self._console = console
        self._plan = plan
        self._text = ""
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting the workers", total=plan.steps)

    def __enter__(self) -> LiveProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._text:
            self._bar.update(self._task, description=self._text)
        self._bar.stop()

    def show(self, reward: float, so_far: Phase) -> None:
        """Show one more step."""
        step, last = so_far.steps, self._plan.steps
        self._text = (
            f"reward {reward:.2f} · hits {so_far.hit_rate:.1%} · "
            f"wire {mib(so_far.wire_bytes)} · saved {mib(so_far.saved_bytes)}"
        )
        self._bar.update(self._task, advance=1, description=self._text)
        if not self._console.is_terminal and (step in (1, last) or step % _LINE_EVERY_STEPS == 0):
            self._console.print(f"step {step}/{last} · {self._text}", highlight=False)
        if step == last and self._plan.uncached_steps:
            self._bar.update(
                self._task, description=f"without the cache, to compare (steps: {self._plan.uncached_steps})"
            )

    def tell(self, text: str) -> None:
        """Show a line of text."""
        self._console.print(text, highlight=False, soft_wrap=True)


def summary(outcome: Outcome, *, device: str, workers: int, seed: int) -> dict[str, Any]:
    """The figures of a run by name; bytes, hits and waits are the trainer's own, and of the steps with the cache.

    `wait_seconds` and `wait_seconds_uncached` are seconds per step, so that the many steps with the cache compare with
    the few without; the latter is None if there were none. Rewards are means over the first and the last five steps.
    """
    cached, uncached = outcome.cached, outcome.uncached
    return {
        "device": device,
        "workers": workers,
        "seed": seed,
        "reward_first": mean(outcome.step_rewards[:REWARD_STEPS]),
        "reward_last": mean(outcome.step_rewards[-REWARD_STEPS:]),
        "rewards": outcome.step_rewards,
        "steps": cached.steps,
        "trajectories": cached.trajectories,
        "shards": cached.shards,
        "read_bytes": cached.read_bytes,
        "wire_bytes": cached.wire_bytes,
        "served_bytes": cached.served_bytes,
        "saved_bytes": cached.saved_bytes,
        "hit_rate": cached.hit_rate,
        "evictions": cached.evictions,
        "overflows": cached.overflows,
        "wait_seconds": cached.wait_s_per_step,
        "wait_seconds_total": cached.wait_s,
        "uncached_steps": uncached.steps,
        "uncached_read_bytes": uncached.read_bytes,
        "uncached_wire_bytes": uncached.wire_bytes,
        "wait_seconds_uncached": uncached.wait_s_per_step,
        "rollout_wait_seconds": outcome.rollout_wait_s,
        "seconds": outcome.seconds,
        "device_bytes_after_clear": outcome.device_bytes,
        "shards_left": outcome.shards_left,
        "num_lost_shards": outcome.num_lost_shards,
        "num_worker_restarts": outcome.num_worker_restarts,
        "num_retried_clears": outcome.num_retried_clears,
        "num_given_up_clears": outcome.num_given_up_clears,
        "roles": outcome.roles,
        "http_bytes": outcome.http_bytes,
    }


def introduction(num_parameters: int, num_workers: int, device: str) -> str:
    """What is about to happen, in three lines."""
    return (
        f"A policy of {num_parameters:,} parameters learns to write digits backwards.\n"
        f"{num_workers} rollout workers sample answers and keep them; the trainer gets handles. It\n"
        f"reads each batch {NUM_READS} times through its cache on {device}, then clears it everywhere."
    )


def table(figures: dict[str, Any]) -> Table:
    """The figures of `summary`, for reading."""
    best = NUM_READS / (NUM_READS + 1)
    grid = Table(
        title="RTensor demo",
        show_header=False,
        caption=f"A shard is looked up {NUM_READS + 1} times: by a prefetch,\n"
        f"which misses, and by {NUM_READS} reads. So the best\nhit rate there can be is {best:.1%}.",
    )
    grid.add_column("what")
    grid.add_column("figure", justify="right")
    for name, figure in rows(figures).items():
        grid.add_row(name, figure)
    return grid


def rows(figures: Mapping[str, Any]) -> dict[str, str]:
    """The lines of the table: what, and the figure as text."""
    return {
        "device": str(figures["device"]),
        "steps": f"{figures['steps']:,}",
        "mean reward, first five steps": f"{figures['reward_first']:.3f}",
        "mean reward, last five steps": f"{figures['reward_last']:.3f}",
        "trajectories": f"{figures['trajectories']:,}",
        "shards (tensors of trajectories)": f"{figures['shards']:,}",
        "bytes over the wire": f"{figures['wire_bytes']:,}",
        "bytes saved by the cache": f"{figures['saved_bytes']:,}",
        "hit rate": f"{figures['hit_rate']:.1%}",
        "evicted for want of room": f"{figures['evictions']:,}",
        "handed out uncached (overflows)": f"{figures['overflows']:,}",
        "time in localize, per step": milliseconds(figures["wait_seconds"]),
        f"the same without the cache (steps: {figures['uncached_steps']})": milliseconds(
            figures["wait_seconds_uncached"]
        ),
        **of_roles(figures),
        **deaths(figures),
        "bytes in the cache after the last clear": f"{figures['device_bytes_after_clear']:,}",
        "run time": f"{figures['seconds']:.1f} s",
    }


def of_roles(figures: Mapping[str, Any]) -> dict[str, str]:
    """What the roles fetched, and how, if they are processes."""
    if not (roles := figures["roles"]):
        return {}
    fetched = sum(one["fetch_bytes"] for one in roles.values())
    ways = sorted({way for one in roles.values() for way in one["sources"].values()})
    return {
        "roles, each a process with a cache": ", ".join(roles),
        "they fetched, together": f"{fetched:,}",
        "of that over the network": f"{figures['http_bytes']:,}",
        "read by way of": ", ".join(ways),
    }


def deaths(figures: Mapping[str, Any]) -> dict[str, str]:
    """What the deaths of workers cost, if there were any."""
    if not figures["num_worker_restarts"]:
        return {}
    return {
        "rollout workers restarted": f"{figures['num_worker_restarts']:,}",
        "shards lost with them": f"{figures['num_lost_shards']:,}",
    }


def mean(numbers: list[float]) -> float:
    """Arithmetic mean."""
    return sum(numbers) / len(numbers)


def mib(nbytes: int) -> str:
    """Bytes in MiB."""
    return f"{nbytes / 2**20:.1f} MiB"


def milliseconds(seconds: float | None) -> str:
    """Seconds in milliseconds; a dash for None."""
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"
