"""The example beside AReaL runs where AReaL is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "scripts" / "examples" / "beside_areal.py"


@pytest.mark.areal
def test_the_example_beside_areal_runs(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "class: areal.infra.rpc.rtensor - batch: (64, 512) - cached: {'num_entries': 2}" in done.stdout
    assert "after the clear: {'num_entries': 0}" in done.stdout
