"""The demo in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_demo.py"
# Far beyond what anything here takes; a test that meets it has hung.
DEADLINE_S = 120


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The demo in a process of its own; whatever is left of it in the end is killed."""
    command = [sys.executable, str(SCRIPT), "--device", "cpu", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env={**os.environ, "COLUMNS": "100"}) as process:
        family = [psutil.Process(process.pid)]
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                family += family[0].children(recursive=True)
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


def is_worker(child: psutil.Process) -> bool:
    """Whether a child is a rollout worker; the other one keeps track of multiprocessing's resources."""
    return "spawn_main" in " ".join(child.cmdline())


def figures_of(process: subprocess.Popen[str], path: Path) -> dict[str, Any]:
    output = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    return dict(json.loads(path.read_text()))
