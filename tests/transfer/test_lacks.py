"""The log of calls that go on without some shards."""

from __future__ import annotations

import logging

import pytest

from gpu_cache import FetchError, TensorCache
from gpu_cache.transfer.lacks import Lacks
from tests.support.clocks import Clock
from tests.support.sources import DictSource


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_each_node_and_reason_has_a_warning_a_minute_which_counts_what_came_between(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    lacks = Lacks(clock)
    error = FetchError("x is gone", {"x": KeyError(), "y": KeyError()})
    with caplog.at_level(logging.DEBUG):
        for causes in ([("a", "missing")] * 2, [("a", "missing")], [("a", "timeout")], [("b", "missing")]):
            lacks.tell(error, causes)
        lacks.tell(error, [("b", "missing"), ("a", "timeout")])
        clock.now += 61
        lacks.tell(error, [("a", "missing"), ("b", "missing")])
        lacks.tell(error, [("b", "missing")])
    told, between = "going on without shards: x is gone", " (2 more since the last of these lines)"
    assert lines(caplog) == [told, told + between, told, told + between]
    assert lines(caplog, logging.DEBUG) == [told] * 3


def test_calls_that_go_on_without_shards_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    cache, source = TensorCache(), DictSource({})
    with caplog.at_level(logging.DEBUG, "gpu_cache.transfer.lacks"):
        for _ in range(3):
            assert cache.get_many(["a"], source, on_error="none") == [None]
    assert lines(caplog) == ["going on without shards: shard a is not at node-a:1"]
    assert len(lines(caplog, logging.DEBUG)) == 2
