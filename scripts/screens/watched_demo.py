"""A run of the demo as `gpu-cache-smi` sees it, and the check that its pictures show what their captions say."""

from __future__ import annotations

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
from rich.text import Text

from gpu_cache.smi import boxes, recording, timeline
from gpu_cache.smi.columns import WIDE
from gpu_cache.smi.frame import Size, frame
from gpu_cache.smi.history import History
from gpu_cache.smi.node import Filters, Node, Observer
from gpu_cache.smi.problems import problems_of
from gpu_cache.smi.process import LEAK, OK
from gpu_cache.smi.view import View

PERIOD_S = 0.25
_HOSTNAME = "trainer-node"
_POOL = "16MiB"  # small, as the demo's batches are
_WATCH_ROWS = 18
_TRAINER = Filters(roles=("trainer",))
# The processes that captions speak of, each with its state.
CAST = {
    "healthy": {"rollout/0": OK, "rollout/1": OK, "trainer/0": OK},
    "leaking": {"rollout/0": OK, "rollout/1": OK, "trainer/0": LEAK},
}
_PARTS = (boxes.DEVICES, boxes.PROCESSES, boxes.SOURCES)


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
        self._history = History()
        self._lines: list[str] = []
        self._latest: Node | None = None
        self._num_seen = 0  # lines up to there

    def watch(self) -> None:
        """Run the demo to its end, a look every quarter of a second."""
        with tempfile.TemporaryDirectory() as folder, self._running(Path(folder)) as process:
            observer = Observer(lambda: [Path(folder)], hostname=_HOSTNAME)
            while process.poll() is None:
                if (node := observer.look()).processes:
                    self._history.add(node)
                    self._lines.append(recording.line(node.filtered(_TRAINER)))
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
        lines = [*boxes.screen(node, _PARTS, is_wide=True), *boxes.problem_lines(problems_of(node), is_wide=True)]
        return _svg("gpu-cache-smi", lines)

    def live(self) -> str:
        """The live view as an SVG."""
        lines = frame(self._seen(), self._history, View(PERIOD_S), Size(WIDE, _WATCH_ROWS))
        return _svg(f"gpu-cache-smi --watch {PERIOD_S}", lines)

    def page(self) -> str:
        """The timeline up to that look as HTML."""
        return timeline.page(recording.samples(self._lines[: self._num_seen]))

    def _seen(self) -> Node:
        if self._latest is None:
            raise ValueError(f"at no moment of the demo were its processes as the captions say: {self._cast}")
        return self._latest


def _svg(title: str, lines: list[Text]) -> str:
    console = Console(record=True, file=io.StringIO(), width=WIDE, force_terminal=True, color_system="standard")
    console.print(Text("\n").join(lines), soft_wrap=True)
    return console.export_svg(title=title)
