from __future__ import annotations

import pytest

from gpu_cache.report.counters import BufferStats, buffer_stats_of, stats_delta


def test_a_cache_that_did_nothing_has_every_key_at_zero() -> None:
    stats = buffer_stats_of()
    assert set(stats) == set(BufferStats.__annotations__)
    assert not any(stats.values())
    assert isinstance(stats["pinned_wait_seconds"], float)
    assert isinstance(stats["hits"], int)


def test_parts_fill_their_keys() -> None:
    stats = buffer_stats_of({"hits": 3}, {"device_bytes": 7})
    assert (stats["hits"], stats["device_bytes"], stats["misses"]) == (3, 7, 0)


def test_a_delta_is_ready_for_a_logger() -> None:
    before = buffer_stats_of()
    after = buffer_stats_of({"requested": 10, "hits": 8, "misses": 2, "fetch_bytes": 3e9, "fetch_busy_seconds": 1.5})
    delta = stats_delta(before, after)  # type: ignore[arg-type]
    assert delta["hit_ratio"] == pytest.approx(0.8)
    assert delta["fetch_gb_per_s"] == pytest.approx(2.0)
    assert "h2d_gb_per_s" not in delta, "keys with no data are left out"
    assert "hit_ratio" not in stats_delta(after, after)  # type: ignore[arg-type]
