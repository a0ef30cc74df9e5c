"""The demo over AReaL's own scheduler, controllers and servers, run short."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.demo_runs import NOTHING, check_one_line_says, figures_of_short_run

DEMO = "areal_demo.py"
ROLES = ("rollout", "ref", "actor", "controller")


@pytest.mark.areal
def test_a_run_over_areals_controllers_leaves_nothing_in_any_process(tmp_path: Path) -> None:
    assert figures_of_short_run(DEMO, tmp_path)["held"] == dict.fromkeys(ROLES, NOTHING)


@pytest.mark.skipif(
    any((Path(one) / "areal-1.0.4.dist-info").exists() for one in sys.path), reason="AReaL is installed here"
)
def test_without_areal_one_line_says_so() -> None:
    check_one_line_says(DEMO, "AReaL")
