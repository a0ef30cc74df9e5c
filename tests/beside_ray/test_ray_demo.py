"""The demo with actors of Ray, run short."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.beside_ray.conftest import ROOT


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("GPU_CACHE_", "PYTHON"))}
    command = [sys.executable, "-P", str(ROOT / "scripts" / "ray_demo.py"), *arguments]
    environ |= {"GPU_CACHE_STATS": "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environ, cwd=ROOT, timeout=300, check=False)


@pytest.mark.ray
def test_a_run_over_actors_leaves_nothing_in_any_process(tmp_path: Path) -> None:
    done = demo("--steps", "2", "--workers", "1", "--prompts", "2", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert "shards left after the last clear" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    nothing = {"num_tensors": 0, "total_bytes": 0, "num_entries": 0}
    assert figures["held"] == {
        **dict.fromkeys(("rollout", "ref", "actor", "driver"), nothing),
        "object store": {"total_bytes": 0},
    }
    assert figures["actor"]["hits"] > figures["actor"]["requested"] / 2, "five calls read each batch"
    assert len(figures["rewards"]) == 2


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed here")
def test_without_ray_one_line_says_so() -> None:
    done = demo()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"ray_demo: Ray is not installed for {sys.executable}; `make demo")
    assert done.stderr.count("\n") == 1
