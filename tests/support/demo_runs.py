"""The demos beside AReaL and Ray: a short run, and one where the other project is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOTHING = {"num_tensors": 0, "total_bytes": 0, "num_entries": 0}


def run_demo(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the demo as a user would, in an environment without our variables."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("GPU_CACHE_", "PYTHON"))}
    command = [sys.executable, "-P", str(ROOT / "scripts" / script), *arguments]
    environ |= {"GPU_CACHE_STATS": "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environ, cwd=ROOT, timeout=400, check=False)


def figures_of_short_run(script: str, folder: Path) -> Any:
    """Figures of two steps; checks all of them that no process of the demo differs in."""
    file = folder / "figures.json"
    done = run_demo(script, "--steps", "2", "--workers", "1", "--prompts", "2", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert "shards left after the last clear" in done.stdout
    figures = json.loads(file.read_text())
    assert figures["actor"]["hits"] > figures["actor"]["requested"] / 2, "five calls read each batch"
    assert len(figures["rewards"]) == 2
    return figures


def check_one_line_says(script: str, product: str) -> None:
    """Without the other project the script says so, and ends."""
    done = run_demo(script)
    assert (done.returncode, done.stdout) == (1, "")
    name = script.removesuffix(".py")
    assert done.stderr.startswith(f"{name}: {product} is not installed for {sys.executable}; `make demo")
    assert done.stderr.count("\n") == 1
