"""The made-up machine on which tests run the tool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_cache.smi import leaks
from tests.support.smi_machine import Machine, machine


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Machine]:
    with machine(tmp_path, monkeypatch, capsys) as made:
        yield made


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tool wait 30 s for a list: a machine may be busy."""
    monkeypatch.setattr(leaks, "ANSWER_TIMEOUT_S", 30.0)
