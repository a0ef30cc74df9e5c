"""Torch's CUDA sanitizer finds nothing in what the cache does, and finds it where a wait is taken out."""

from __future__ import annotations

import pytest

from tests.support.gpu_process import run_python

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("failures_stay_alone")]


def test_the_sanitizer_reports_a_race_exactly_where_a_wait_is_missing() -> None:
    printed = run_python("-m", "tests.support.gpu_sanitized", complains=True).splitlines()
    verdicts = dict(line.rsplit(": ", 1) for line in printed)
    assert verdicts == {
        "ready=stream": "clean",
        "ready=stream, no wait": "race",
        "ready=host": "clean",
        "ready=host, no wait": "race",
        "reuse": "clean",
        "reuse, no wait": "race",
    }
