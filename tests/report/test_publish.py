"""Reports of a cache in this process: when they are written, what is in them, what may go wrong."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.report import publish
from gpu_cache.report.schema import MAX_REPORT_BYTES, Histograms, HostTierFigures, Rates, Report, SourceStats
from gpu_cache.smi.folder import is_held
from gpu_cache.smi.main import main
from gpu_cache.smi.node import Node, Observer
from gpu_cache.smi.nvml import Nvml
from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import FakeCuda
from tests.support.interleave_stage import eventually
from tests.support.smi_nvml import FakeNvml
from tests.support.sources import DictSource

ROOT = Path(__file__).parents[2]
CONFIG = CacheConfig(
    slab_bytes="2MiB", pool_bytes="4MiB", prealloc_bytes=0, staging_slots=2, staging_slot_bytes="256KiB",
    run_bytes="64KiB", role="actor", rank=3, stats=True,
)  # fmt: skip
SOURCE = DictSource({str(number): torch.ones(1000) for number in range(100)}, node="gpu-a-021:35221")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where reports go, ten times a second."""
    monkeypatch.setenv("GPU_CACHE_STATS_DIR", str(tmp_path / "stats"))
    monkeypatch.setattr(publish, "PERIOD_S", 0.1)
    return tmp_path / "stats"


@pytest.fixture
def cache() -> Iterator[TensorCache]:
    made = TensorCache(CONFIG, device=HostDevice(stages=True))
    yield made
    made.close()


def report_in(folder: Path) -> Any:
    (path,) = (path for path in folder.iterdir() if path.suffix == ".json" and ".leaks" not in path.name)
    return json.loads(path.read_bytes())


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def step(cache: TensorCache, *keys: str) -> None:
    """Fetch shards, and clear the first."""
    cache.get_many(keys, SOURCE)
    cache.clear(keys[:1])


def test_nothing_exists_before_the_first_use(cache: TensorCache, folder: Path) -> None:
    assert cache._publisher._thread is None
    cache.get("unknown")
    assert report_in(folder)["seq"] == 1, "written by the first call"
    cache.close()
    assert list(folder.iterdir()) == []


def test_a_look_before_the_first_use_does_not_put_the_first_report_off(
    cache: TensorCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "PERIOD_S", 1000.0)
    cache.report()
    assert not folder.exists()
    cache.put("a", torch.zeros(4))
    assert report_in(folder)["role"]


def test_a_report_has_every_key_of_the_schema(cache: TensorCache, folder: Path) -> None:
    cache.get_many(["1", "2"], SOURCE)
    cache._publisher.publish()
    found = report_in(folder)
    of_others = get_type_hints(HostTierFigures).keys() | {"shared_bytes", "shared_reserved_bytes"}
    assert found.keys() == get_type_hints(Report).keys() - of_others
    assert found["rates_10s"].keys() == Rates.__annotations__.keys()
    assert found["histograms"].keys() == Histograms.__annotations__.keys()
    assert found["sources"]["gpu-a-021:35221"].keys() == SourceStats.__annotations__.keys()
    assert (found["role"], found["rank"], found["device"], found["gpu_uuid"]) == ("actor", 3, "cpu", None)
    assert (found["pid"], found["pid_namespace"]) == (os.getpid(), os.stat("/proc/self/ns/pid").st_ino)
    assert {key: found[key] for key in ("misses", "fetch_bytes", "num_entries", "device_entries")} == {
        "misses": 2, "fetch_bytes": 8000, "num_entries": 2, "device_entries": 2
    }  # fmt: skip
    assert found["pinned_peak_bytes"] == 256 << 10
    assert found["config"]["pool_bytes"] == 4 << 20
    assert cache.source_stats()["gpu-a-021:35221"]["fetch_bytes"] == 8000


def test_a_report_tells_of_the_host_tier_where_there_is_one(folder: Path) -> None:
    config = dataclasses.replace(CONFIG, pool_bytes=512 << 10, slab_bytes=512 << 10, host_tier_bytes=1 << 20)
    cache = TensorCache(config, device=HostDevice(stages=True))
    shards = {str(number): torch.full((512 << 10,), number, dtype=torch.uint8) for number in range(4)}
    for key in shards:
        cache.get_many([key], DictSource(shards))
    cache.clear(["2"])
    cache.get_many(["1"], DictSource(shards))
    cache.synchronize()
    eventually(lambda: cache.buffer_stats()["host_bytes"] == 512 << 10)  # the fetch thread still holds the tier's copy
    cache._publisher.publish()
    found = report_in(folder)
    assert found.keys() == get_type_hints(Report).keys() - {
        "shared_bytes",
        "shared_reserved_bytes",
    }  # it owns no shards
    assert {name: found[name] for name in ("device_entries", "host_entries", "host_hits", "evictions")} == {
        "device_entries": 1, "host_entries": 1, "host_hits": 1, "evictions": 4
    }  # fmt: skip
    assert (found["host_evictions"], found["host_evicted_bytes"]) == (1, 512 << 10)
    assert (found["host_cleared"], found["host_cleared_bytes"]) == (1, 512 << 10)
    assert (found["host_bytes"], found["host_capacity_bytes"]) == (512 << 10, 1 << 20)
    assert (found["d2h_bytes"], found["h2d_bytes"]) == (4 * 512 << 10, 5 * 512 << 10)


def test_a_report_names_the_gpu_as_nvml_does(tmp_path: Path, folder: Path) -> None:
    cache = TensorCache(CONFIG, device=cuda_device(FakeCuda(), tmp_path))
    cache.get_many(["1"], SOURCE)
    cache._publisher.publish()
    found = report_in(folder)
    assert (found["device"], found["gpu_name"], found["gpu_uuid"]) == ("cuda:1", "Fake GPU", "GPU-0000-1")
    assert found["pci_bus_id"] == "00000000:3C:00.0"
    until(lambda: cache.buffer_stats()["h2d_busy_seconds"] > 0)  # by the thread; no slot was used again
    cache.close()


def test_it_is_fresh_between_calls_and_right_after_a_clear(
    cache: TensorCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.get_many(["1"], SOURCE)
    until(lambda: report_in(folder)["seq"] > 3)
    monkeypatch.setattr(publish, "PERIOD_S", 3600.0)
    until(lambda: cache._publisher._due_at > time.monotonic() + 3000)
    cache.clear(["1"])
    until(lambda: report_in(folder)["clears"] == 1)


def test_calls_report_where_the_thread_does_not_run(
    cache: TensorCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.Thread.start", lambda thread: None)
    cache.get("unknown")
    until(lambda: cache.get("unknown") or report_in(folder)["seq"] > 2)


def test_a_call_amid_a_report_leaves_another_to_its_writer(cache: TensorCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.get("unknown")
    publisher = cache._publisher
    monkeypatch.setattr(publish, "PERIOD_S", 3600.0)
    with publisher._turn:
        before = publisher._reporter._seq
        publisher.publish()
        assert publisher._is_due
        assert publisher._reporter._seq == before
    publisher.publish()
    until(lambda: not publisher._is_due)  # the thread may be amid a report


def test_figures_beside_a_cache_are_reported_before_its_first_use(cache: TensorCache, folder: Path) -> None:
    shared: dict[str, int] = {}
    cache.report_beside(lambda: shared)
    cache.report()
    assert not folder.exists(), "there is nothing to report"
    shared |= {"shared_bytes": 512, "shared_reserved_bytes": 1024}
    cache.report()
    assert cache._engine is None
    found = report_in(folder)
    names = get_type_hints(Report).keys() - get_type_hints(HostTierFigures).keys()
    assert found.keys() < names, "figures of a device's pool and of its copies are left out"
    assert (found["shared_bytes"], found["shared_reserved_bytes"]) == (512, 1024)
    assert (found["role"], found["rank"], found["device"]) == ("actor", 3, "cpu")
    assert found["num_entries"] == found["misses"] == 0
    assert "device_capacity_bytes" not in found
    shared.clear()
    until(lambda: report_in(folder)["seq"] > found["seq"])  # else it would be taken to hang
    (before,) = folder.glob("*.json")
    cache.get("unknown")
    until(lambda: report_in(folder).get("device_capacity_bytes") == 4 << 20)
    assert list(folder.glob("*.json")) == [before], "one report, of one process"
    cache.close()
    assert list(folder.iterdir()) == []


def test_switched_off_a_cache_reports_no_figures_beside_it(folder: Path) -> None:
    cache = TensorCache(dataclasses.replace(CONFIG, stats=False), device=HostDevice())
    cache.report_beside(lambda: {"shared_bytes": 512, "shared_reserved_bytes": 1024})
    cache.report()
    assert cache._publisher._thread is None
    cache.close()
    assert not folder.exists()


OWNER = """
import sys, torch
from gpu_cache.rpc import runtime
from gpu_cache.rpc.server import main
current = runtime.current()
server = main.start(owner=current)
(copy,) = current.store.copies([torch.ones(1000)])
current.store.put("a", copy)
del copy
assert not torch.cuda.is_initialized() and current.cache.device_name == "" and len(current.cache) == 0
print(server.address, flush=True)
sys.stdin.read()
"""
CONSUMER = """
import sys, torch
from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo, clear_fetch_buffer
for _ in range(2):  # the first request, over HTTP, tells where the owner's memory is
    clear_fetch_buffer()
    handle = RTensor(TensorShardInfo("a", sys.argv[1]), torch.empty(1000, device="meta"))
    found = RTensor.localize([handle])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.scripts
def test_an_owner_that_never_uses_its_cache_is_seen_and_its_shared_memory_counted_once(folder: Path) -> None:
    def start(code: str, role: str, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "GPU_CACHE_STATS": "1", "GPU_CACHE_ROLE": role, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *arguments]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def look() -> Node:
        return Observer(lambda: [folder], nvml=Nvml(FakeNvml([]))).look()

    with start(OWNER, "owner") as owner:
        assert owner.stdout is not None
        address = owner.stdout.readline().strip()
        until(lambda: look().summed("shared_bytes") == 4096)  # 4,000 bytes, in steps of 512
        (process,) = look().processes
        assert (process.title, process.state, process.seat, process.pid) == ("owner/0", "ok", "cpu", str(owner.pid))
        with start(CONSUMER, "reader", address) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
            until(lambda: [one.title for one in look().sources] == [f"{address} (shm)"])
            assert len(look().processes) == 2
            assert look().summed("shared_bytes") == 4096, "with its owner alone"
            owner.kill()
            owner.communicate(timeout=30)
            assert look().summed("shared_bytes") == 0
            assert {one.title: one.state for one in look().processes} == {"owner/0": "dead", "reader/0": "ok"}
            reader.communicate(timeout=30)
    assert [one.title for one in look().processes] == ["owner/0"]


def test_off_means_no_file_and_no_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in (
        TensorCache(CacheConfig(stats=False), device=HostDevice()),
        TensorCache(CacheConfig(), device=HostDevice()),
    ):
        monkeypatch.setenv("GPU_CACHE_STATS", "off")
        cache.get("unknown")
        assert cache._publisher._thread is None
        assert repr(cache._publisher) == "Publisher(off)"
        cache.close()
    assert not folder.exists()


def test_a_cache_that_is_dropped_takes_its_report_along(folder: Path) -> None:
    cache = TensorCache(CONFIG, device=HostDevice())
    cache.get("unknown")
    assert len(list(folder.iterdir())) == 2
    del cache
    gc.collect()
    until(lambda: not list(folder.iterdir()))


def test_a_close_waits_while_the_thread_removes_the_files(
    cache: TensorCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may end right after: what the thread has not removed by then would stay."""
    cache.get("unknown")
    publisher, removing, may_go_on = cache._publisher, threading.Event(), threading.Event()
    files = publisher._files
    assert files is not None
    remove = files.remove

    def slowly() -> None:
        removing.set()
        may_go_on.wait(30)
        remove()

    monkeypatch.setattr(files, "remove", slowly)
    threads = [threading.Thread(target=publisher._clean_up), threading.Thread(target=cache.close)]
    threads[0].start()
    removing.wait(30)
    threads[1].start()
    threads[1].join(0.1)
    assert threads[1].is_alive()
    may_go_on.set()
    for thread in threads:
        thread.join(30)
    assert not list(folder.iterdir())


def test_a_hostile_directory_turns_reports_off_with_one_warning(
    cache: TensorCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    for number in range(5):
        cache.get_many([str(number)], SOURCE)
        cache._publisher.publish()
    assert [record.message for record in caplog.records] == [
        f"no reports for gpu-cache-smi: {folder} is writable by others"
    ]
    assert list(folder.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_tried_again(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TensorCache(CONFIG, device=HostDevice())
    publisher = cache._publisher
    monkeypatch.setattr(publish, "_RETRY_S", 0.3)
    monkeypatch.setenv("GPU_CACHE_STATS_DIR", str(folder / "deep"))
    for number in range(3):
        cache.get_many([str(number)], SOURCE)
        publisher.publish()
    assert len(caplog.records) == 1
    assert "No such file or directory" in caplog.text
    assert "trying again every 0 s" in caplog.text
    folder.mkdir()
    until(lambda: (folder / "deep").exists())
    cache.close()


def test_a_bug_in_a_report_never_reaches_the_trainer(
    cache: TensorCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(engine: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(cache._publisher._reporter, "compose", fails)
    for number in range(3):
        assert len(cache.get_many([str(number)], SOURCE)) == 1
        cache._publisher.publish()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_leak_is_told_in_the_log_with_its_shards(cache: TensorCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.get_many(["90"], SOURCE, keep=True)
    for number in range(3):
        step(cache, str(number), str(number + 50))
    for _ in range(3):
        cache._publisher.publish()
    (message,) = {record.message for record in caplog.records}
    assert "2 shards (8KiB) survived 2 or more clears, the oldest: '50'" in message
    assert "from gpu-a-021:35221, 0s old, survived 3 clears" in message
    assert message.endswith(f"gpu-cache-smi --leaks {os.getpid()}")


def test_reports_of_many_sources_stay_small(cache: TensorCache, folder: Path) -> None:
    for number in range(120):
        source = DictSource({f"shard-{number}": torch.ones(1)}, node=f"a-node-with-a-rather-long-name-{number}:35221")
        cache.get_many([f"shard-{number}"], source)
    cache._publisher.publish()
    (path,) = folder.glob("*.json")
    assert path.stat().st_size <= MAX_REPORT_BYTES
    sources = report_in(folder)["sources"]
    assert len(sources) == 33
    assert sum(one["entries"] for one in sources.values()) == 120
    assert sum(sum(one["fetch_durations"]) for one in sources.values()) == 120
    assert len(cache.source_stats()) == 120


def test_figures_make_no_call_to_the_device_and_are_quick(tmp_path: Path) -> None:
    cuda = FakeCuda()
    device = cuda_device(cuda, tmp_path)
    cache = TensorCache(CONFIG, device=device)
    cache.get_many(["1"], SOURCE)
    cache._publisher.close()
    calls: list[object] = []
    device.query = device.synchronize = device.memory_info = calls.append  # type: ignore[assignment, method-assign]
    assert cache.buffer_stats()["num_entries"] == 1
    assert calls == []
    del device.query, device.synchronize, device.memory_info
    cache.close()


SCREENS = [
    [], ["--json"], ["--dmon", "-c1"], ["--prom"], ["--check"], ["--watch", "-c1"], ["--by=source"],
    ["--query-gpu=index,pool.used"], ["--query-proc=pid,role,state,pool.used,fetch.rate"],
    ["--query-source=node,fetch.bytes,fetch.p99"],
]  # fmt: skip


@pytest.mark.parametrize("width", ["80", "100"])
def test_a_report_of_a_cache_goes_through_every_screen(
    cache: TensorCache, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    for number in range(3):
        step(cache, str(number), str(number + 50))
    cache._publisher.publish()
    observer = Observer(lambda: [folder], nvml=Nvml(FakeNvml()))
    for screen in SCREENS:
        code = main(screen, observer)
        out, err = capsys.readouterr()
        assert code == (3 if screen == ["--check"] else 0), (screen, out, err)
        assert "Traceback" not in err
        assert out.strip(), screen
    assert main(["--leaks", str(os.getpid())], observer) == 0
    out, _ = capsys.readouterr()
    assert [line.split()[4] for line in out.splitlines() if "gpu-a-021:35221" in line] == ["50", "51"]


def test_a_summary_is_the_box_of_the_tool(
    cache: TensorCache, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache.summary().startswith("TensorCache(no device yet")
    monkeypatch.setenv("COLUMNS", "100")
    cache.get_many(["1", "2"], SOURCE)
    cache.get_many(["1", "2"], SOURCE)
    cache._publisher.publish()
    main(["--by=proc"], Observer(lambda: [folder], nvml=Nvml(FakeNvml())))
    shown = capsys.readouterr().out.splitlines()
    assert cache.summary().splitlines() == shown[1:6]


def test_an_unlocked_report_is_of_a_dead_process(cache: TensorCache, folder: Path) -> None:
    cache.get("unknown")
    lock = next(folder.glob("*.lock"))
    assert is_held(lock)
    cache._publisher.disown()
    assert not is_held(lock)


WORKERS = """
import multiprocessing
import torch
from gpu_cache import CacheConfig, TensorCache

kept = []


def work(name):
    caches = [TensorCache(CacheConfig(device="cpu", role=f"{name}-{number}")) for number in range(3)]
    for cache in caches:
        cache.put("a", torch.ones(3))
    kept.append(caches.pop())


if __name__ == "__main__":
    work("parent")
    for method in ("fork", "spawn"):
        worker = multiprocessing.get_context(method).Process(target=work, args=(method,))
        worker.start()
        worker.join()
        print(worker.exitcode)
"""


def test_processes_that_end_well_leave_nothing(tmp_path: Path) -> None:
    """Workers of multiprocessing end without `atexit`, if they are forked."""
    (tmp_path / "workers.py").write_text(WORKERS)
    stats = {"GPU_CACHE_STATS": "1", "GPU_CACHE_STATS_DIR": str(tmp_path / "stats")}
    environ = os.environ | stats | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "workers.py")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert (done.stdout, os.listdir(tmp_path / "stats")) == ("0\n0\n", [])
