"""The demo with actors of Ray, run short."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.support.demo_runs import NOTHING, check_one_line_says, figures_of_short_run

DEMO = "ray_demo.py"


@pytest.mark.ray
def test_a_run_over_actors_leaves_nothing_in_any_process(tmp_path: Path) -> None:
    assert figures_of_short_run(DEMO, tmp_path)["held"] == {
        **dict.fromkeys(("rollout", "ref", "actor", "driver"), NOTHING),
        "object store": {"total_bytes": 0},
    }


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed here")
def test_without_ray_one_line_says_so() -> None:
    check_one_line_says(DEMO, "Ray")
