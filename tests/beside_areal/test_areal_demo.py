"""The demo over AReaL's own scheduler, controllers and servers, run short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROLES = ("rollout", "ref", "actor", "controller")


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GPU_CACHE_", "PYTHON"))}
    command = [sys.executable, "-P", str(ROOT / "scripts" / "areal_demo.py"), *arguments]
    environment |= {"GPU_CACHE_STATS": "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=400, check=False)


@pytest.mark.areal
def test_a_run_over_areals_controllers_leaves_nothing_in_any_process(tmp_path: Path) -> None:
    done = demo("--steps", "2", "--workers", "1", "--prompts", "2", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert "shards left after the last clear" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["held"] == {role: {"num_tensors": 0, "total_bytes": 0, "num_entries": 0} for role in ROLES}
    assert figures["actor"]["hits"] > figures["actor"]["requested"] / 2, "five calls read each batch"
    assert len(figures["rewards"]) == 2


@pytest.mark.skipif(
    any((Path(one) / "areal-1.0.4.dist-info").exists() for one in sys.path), reason="AReaL is installed here"
)
def test_without_areal_one_line_says_so() -> None:
    done = demo()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"areal_demo: AReaL is not installed for {sys.executable}; `make demo")
    assert done.stderr.count("\n") == 1
