"""The scripts in scripts/examples run, and say what they should. The one beside AReaL is in tests/beside_areal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"
LAST_LINES = {
    "own_source.py": ["epoch 2: (4, 128) 4.0 4 hits", "missing: None", "cleared: 2"],
    "two_processes.py": ["step 2: 6 shards fetched, 24 hits, 0 left"],
}


@pytest.mark.scripts
@pytest.mark.parametrize("name", LAST_LINES)
def test_an_example_runs(name: str) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-len(LAST_LINES[name]) :] == LAST_LINES[name]


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*LAST_LINES, "beside_areal.py"}
