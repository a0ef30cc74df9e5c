"""A run of the demo as `gpu-cache-smi` sees it, and the check that its pictures show what their captions say."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from gpu_cache.smi import screen, timeline
from gpu_cache.smi.app import Watch
from gpu_cache.smi.node import Filters, Node, Observer
from gpu_cache.smi.problems import problems_of
from gpu_cache.smi.process import LEAK, OK
from gpu_cache.smi.tables import WIDE
from gpu_cache.smi.watch import History

PERIOD_S = 0.25
_DRAWN_S = 0.5
_HOSTNAME = "trainer-node"
_POOL = "16MiB"  # small, as the demo's batches are
_WATCH_ROWS = 20
_TRAINER = Filters(roles=("trainer",))
# The processes that captions speak of, each with its state.
CAST = {
    "healthy": {"rollout/0": OK, "rollout/1": OK, "trainer/0": OK},
    "leaking": {"rollout/0": OK, "rollout/1": OK, "trainer/0": LEAK},
}


class WatchedDemo:
    """Looks at a run until it ends.

    Args:
        name: A key of `CAST`.
        script: The demo, or a variant of it.
        steps: How many it trains.
    """

    def __init__(self, name: str, script: Path, steps: int) -> None:
        self._cast = CAST[name]
        self._command = [sys.executable, str(script), "--steps", str(steps), "--uncached-steps", "0", "--quiet"]
        self._nodes: list[Node] = []
        self._lines: list[str] = []
        self._latest: Node | None = None
        self._num_seen = 0  # looks up to there

    def watch(self) -> None:
        """Run the demo to its end, a look every quarter of a second."""
        with tempfile.TemporaryDirectory() as folder, self._running(Path(folder)) as process:
            observer = Observer(lambda: [Path(folder)], hostname=_HOSTNAME)
            while process.poll() is None:
                if (node := observer.look()).processes:
                    self._nodes.append(node)
                    self._lines.append(timeline.line(node.filtered(_TRAINER)))
                    self._keep(node)
                time.sleep(PERIOD_S)

    @contextlib.contextmanager
    def _running(self, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
        environ = {
            **os.environ,
            "GPU_CACHE_STATS": "1",
            "GPU_CACHE_STATS_DIR": str(folder),
            "GPU_CACHE_POOL_BYTES": _POOL,
        }
        with subprocess.Popen(self._command, env=environ, stderr=subprocess.DEVNULL) as process:
            try:
                yield process
            finally:
                process.terminate()

    def _keep(self, node: Node) -> None:
        """Keep the latest look that the captions describe, at which the trainer had a batch."""
        if {one.title: one.state for one in node.processes} == self._cast and node.filtered(_TRAINER).summed(
            "num_entries"
        ):
            self._latest, self._num_seen = node, len(self._lines)

    def table(self) -> str:
        """The default screen as an SVG."""
        node = self._seen()
        parts = [*screen.screen(node, WIDE), *screen.problem_lines(problems_of(node), WIDE)]
        console = Console(record=True, file=io.StringIO(), width=WIDE, force_terminal=True, color_system="standard")
        for part in parts:
            console.print(part, soft_wrap=True, highlight=False)
        return console.export_svg(title="gpu-cache-smi")

    def live(self) -> str:
        """The live view as an SVG."""
        return asyncio.run(self._live())

    async def _live(self) -> str:
        past = History()
        for node in self._nodes[: self._num_seen]:
            past.add(node)
        app = Watch(self._seen, PERIOD_S, past=past)
        async with app.run_test(size=(WIDE + 1, _WATCH_ROWS)) as pilot:
            drawn = ""
            while "snapshot" not in drawn:  # the last of the keys
                await pilot.pause(_DRAWN_S)
                drawn = app.export_screenshot(title=f"gpu-cache-smi --watch {PERIOD_S}")
            return drawn

    def page(self) -> str:
        """The timeline up to that look as HTML."""
        return timeline.page(timeline.samples(self._lines[: self._num_seen]))

    def _seen(self) -> Node:
        if self._latest is None:
            raise ValueError(f"at no moment of the demo were its processes as the captions say: {self._cast}")
        return self._latest
