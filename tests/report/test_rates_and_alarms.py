"""Rates of the last seconds, and what a process warns of."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import profile

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.config import described
from gpu_cache.device.cudart import nvml_uuid
from gpu_cache.device.host import HostDevice
from gpu_cache.device.protocol import DeviceIdentity
from gpu_cache.report.compose import RateWindow
from gpu_cache.report.counters import BufferStats, buffer_stats_of
from gpu_cache.report.publish import Alarms
from gpu_cache.report.schema import EntryInfo, SourceStats
from gpu_cache.throttle import Throttle
from tests.support.sources import DictSource


def counters(fetch_bytes: float = 0, busy_s: float = 0, **more: float) -> BufferStats:
    return buffer_stats_of({"fetch_bytes": fetch_bytes, "fetch_busy_seconds": busy_s, **more})


def test_rates_before_anything_moved() -> None:
    rates = RateWindow(100.0).rates(counters(), 100.5)
    assert (rates["fetch_bytes_per_second"], rates["fetch_window_age_seconds"]) == (None, None)
    assert rates["fetch_bytes_per_wall_second"] == 0


def test_the_busy_rate_is_of_the_latest_window_that_had_transfers() -> None:
    window = RateWindow(0.0)
    busy = window.rates(counters(4e9, 0.5, evictions=20), 5.0)
    assert busy["fetch_bytes_per_second"] == 8e9
    assert busy["fetch_bytes_per_wall_second"] == 0.8e9
    assert busy["evictions_per_second"] == 4
    for second in range(6, 60):
        idle = window.rates(counters(4e9, 0.5, evictions=20), second)
    assert idle["fetch_bytes_per_second"] == 8e9
    assert idle["fetch_window_age_seconds"] == 54.0
    assert (idle["fetch_bytes_per_wall_second"], idle["evictions_per_second"]) == (0, 0)
    again = window.rates(counters(5e9, 1.5), 60.0)
    assert again["fetch_bytes_per_second"] == 1e9
    assert again["fetch_window_age_seconds"] == 0.0


def test_overflows_are_of_the_window() -> None:
    window = RateWindow(0.0)
    assert window.rates(counters(overflows=3, alloc_failures=1), 1.0)["overflows"] == 3
    for second in range(2, 14):
        rates = window.rates(counters(overflows=4, alloc_failures=1), second)
    assert (rates["overflows"], rates["alloc_failures"], rates["fetch_errors"]) == (0, 0, 0)
    assert len(window._looks) < 14


def test_a_throttle_opens_once_a_period() -> None:
    now = [0.0]
    throttle = Throttle(60.0, lambda: now[0])
    opened = [throttle.opens() for now[0] in (0.0, 1.0, 59.9, 60.0, 61.0)]
    assert opened == [True, False, False, True, False]


def source(fetch_bytes: float, busy_s: float) -> SourceStats:
    return SourceStats(
        entries=0, resident_bytes=0, oldest_entry_age_seconds=0.0, fetch_bytes=int(fetch_bytes),
        fetch_busy_seconds=busy_s, fetch_errors=0, fetch_errors_by_reason={}, fetch_durations=[],
    )  # fmt: skip


class Watched:
    """Alarms of an index, and a clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.alarms = Alarms(self, lambda: self.now)

    def report(self) -> dict[str, float]:
        return {}

    def oldest(self, most: int, *, is_outlived: bool = False) -> list[EntryInfo]:
        assert is_outlived
        return [EntryInfo("shard-1", 3 << 20, 4000.0, "n:1", 5, torch.float32, (3,))] * most

    def look(self, outlived: int = 0, sources: dict[str, SourceStats] | None = None) -> None:
        self.alarms.look({"outlived_entries": outlived, "outlived_bytes": outlived << 20, "sources": sources or {}})
        self.now += 1.0


def test_a_leak_is_told_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    for _ in range(3):
        watched.look(outlived=1)
        watched.look(outlived=0)
    assert not caplog.records, "between the clears of one step"
    for _ in range(100):
        watched.look(outlived=12)
    assert len(caplog.records) == 2
    assert "12 shards (12MiB) survived 2 or more clears, the oldest: 'shard-1' (3MiB from n:1, 1h6m old" in caplog.text


def test_a_source_far_slower_than_the_others_is_told(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    watched.look(sources={"a": source(0, 0)})
    for second in range(1, 125):
        fast = {name: source(second * 1e9, second / 8) for name in "abc"}
        watched.look(sources={**fast, "slow": source(second * 0.1e9, second / 10), "idle": source(1, 1e-3)})
    assert [record.message for record in caplog.records] == [
        "slow delivers 1GB/s, the median of the 3 other sources is 8GB/s: look at its load and its network"
    ] * 2


def test_two_sources_are_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    for second in range(130):
        watched.look(sources={"a": source(second * 1e9, second / 2), "slow": source(second * 1e6, second / 2)})
    assert not caplog.records


def test_the_configuration_says_where_each_value_came_from() -> None:
    environ = {"GPU_CACHE_RUN_BYTES": "2MiB", "GPU_CACHE_ROLE": "critic", "RANK": "5", "LOCAL_RANK": "1"}
    config = CacheConfig.from_env(environ, staging_slots=3)
    told = described(config, config.resolved(is_cuda=False, device_bytes=0, environ=environ), environ)
    for part in (
        "run_bytes=2,097,152 (variable)", "staging_slots=3 (argument)", "slab_bytes=268,435,456 (default)",
        "pool_bytes=2,147,483,648 (computed)", "role=critic (variable)", "rank=5 (computed)", "stats=True (computed)",
    ):  # fmt: skip
        assert part in told
    assert "role=x (argument)" in described(CacheConfig(role="x"), CacheConfig(role="x"), {"GPU_CACHE_RANK": "bad"})


@pytest.mark.parametrize(
    ("environ", "rank"),
    [({"LOCAL_RANK": "2"}, 2), ({"RANK": "9", "LOCAL_RANK": "2"}, 9), ({"GPU_CACHE_RANK": "4", "RANK": "9"}, 4),
     ({"RANK": "x"}, 0)],
)  # fmt: skip
def test_the_rank_is_the_launchers(environ: dict[str, str], rank: int) -> None:
    resolved = CacheConfig().resolved(is_cuda=False, device_bytes=0, environ=environ)
    assert (resolved.rank, bool(resolved.role)) == (rank, True)
    assert CacheConfig(rank=7).resolved(is_cuda=False, device_bytes=0, environ=environ).rank == 7


def test_the_configuration_is_logged_at_the_first_use(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gpu_cache")
    cache = TensorCache(CacheConfig(pool_bytes="8MiB", slab_bytes="1MiB"), device=HostDevice())
    cache.get("unknown")
    cache.get("unknown")
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("caching on cpu (as given): device=auto (default), slab_bytes=1,048,576 (argument)")


@pytest.mark.parametrize(
    ("name", "uuid", "expected"),
    [
        ("NVIDIA H200", "604ac76c", "GPU-604ac76c"),
        ("NVIDIA H200", "GPU-604ac76c", "GPU-604ac76c"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "11aa", "MIG-11aa"),
    ],
)
def test_a_uuid_is_spelt_as_nvml_spells_it(name: str, uuid: str, expected: str) -> None:
    properties = DeviceIdentity(name, uuid)
    assert nvml_uuid(properties) == expected


def test_ranges_are_in_a_trace_and_absent_without_one() -> None:
    cache = TensorCache(CacheConfig(pool_bytes="8MiB", slab_bytes="1MiB"), device=HostDevice(stages=True))
    cache.get_many(["a"], DictSource({"a": torch.ones(9)}))
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(experimental_config=everywhere, acc_events=True) as trace:
        cache.get_many(["b"], DictSource({"b": torch.ones(9)}))
    names = {event.key for event in trace.key_averages() if event.key.startswith("gpu_cache.")}
    assert names == {
        "gpu_cache.wait",
        "gpu_cache.fetch",
        "gpu_cache.stage",
        "gpu_cache.copy",
        "gpu_cache.handout",
    }
