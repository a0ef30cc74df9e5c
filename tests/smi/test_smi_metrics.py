"""The exposition, as Prometheus reads it; dashboards and alerts ask only for what there is."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import queue
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpu_cache.report.counters import BufferStats
from gpu_cache.report.schema import MAX_SOURCES
from gpu_cache.smi import exposition, metrics
from gpu_cache.smi.node import Node
from tests.support.smi_machine import Machine, add_trainers, machine
from tests.support.smi_nvml import FakeNvml
from tests.support.smi_reports import NOW, TIB, report

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def scraped(node: Machine) -> Samples:
    return parsed(node.run("--prom").out)


def value(samples: Samples, name: str, **labels: str) -> float | None:
    """The one sample with these labels, whatever its others are."""
    wanted = labels.items()
    found = [number for (key, has), number in samples.items() if key == name and wanted <= has]
    assert len(found) <= 1, found
    return found[0] if found else None


def names_of() -> set[str]:
    histograms = {f"{one.name}{suffix}" for one in metrics.HISTOGRAMS for suffix in ("_bucket", "_sum", "_count")}
    return {metric.name for metric in metrics.METRICS} | histograms


def test_values_are_those_of_the_reports(node: Machine) -> None:
    add_trainers(node.folder)
    found = scraped(node)
    first = {"gpu": "0", "role": "actor", "rank": "0"}
    expected: list[tuple[str, dict[str, str], float]] = [
        ("gpu_cache_process_info", {"pid": "41873", "version": "0.1.0"}, 1),
        ("gpu_cache_last_report_timestamp_seconds", {}, NOW - 0.41),
        ("gpu_cache_capacity_bytes", {"tier": "device"}, 20480 << 20),
        ("gpu_cache_used_bytes", {"tier": "pinned"}, 128 << 20),
        ("gpu_cache_used_bytes", {"tier": "host"}, 7680 << 20),
        ("gpu_cache_used_peak_bytes", {"tier": "device"}, 14000 << 20),
        ("gpu_cache_largest_free_bytes", {"tier": "device"}, 7000 << 20),
        ("gpu_cache_lookups_total", {"result": "joined"}, 1000),
        ("gpu_cache_lookups_total", {"result": "hit_host"}, 0),
        ("gpu_cache_evictions_total", {"tier": "device", "reason": "capacity"}, 12),
        ("gpu_cache_evicted_bytes_total", {"tier": "device", "reason": "clear"}, 3 * TIB),
        ("gpu_cache_copy_bytes_total", {"direction": "h2d"}, 4.12e12),
        ("gpu_cache_copy_busy_seconds_total", {"direction": "h2d"}, 171.0),
        ("gpu_cache_staging_wait_seconds_total", {}, 3.5),
        ("gpu_cache_alloc_failures_total", {"tier": "device"}, 0),
        ("gpu_cache_overflows_total", {}, 0),
        ("gpu_cache_outlived_clear_entries", {}, 0),
        ("gpu_cache_fetch_duration_seconds_count", {}, 1000),
        ("gpu_cache_fetch_duration_seconds_bucket", {"le": "0.005"}, 600),
        ("gpu_cache_fetch_duration_seconds_sum", {}, 4.5),
        ("gpu_cache_entry_size_bytes_bucket", {"le": "4194304.0"}, 510),
    ]
    for name, labels, number in expected:
        assert value(found, name, **first, **labels) == pytest.approx(number), (name, labels)
    assert value(found, "gpu_cache_outlived_clear_bytes", gpu="3") == 2172 << 20
    oldest = value(found, "gpu_cache_oldest_entry_timestamp_seconds", gpu="3")
    assert oldest == pytest.approx(NOW - 4322.0)


# Figures of `buffer_stats()` that no metric reads: sums of others, and those for the process itself.
NOT_EXPORTED = {
    "num_tensors", "total_bytes", "device_reserved_bytes", "device_quarantined_bytes", "is_pinned",
    "requested", "requested_bytes", "hit_bytes", "joined_bytes", "miss_bytes", "overflow_bytes", "fetches",
    "fetch_bytes", "fetch_busy_seconds", "fetch_errors", "inflight_bytes", "inflight_wait_seconds", "copies", "clears",
    "mutations",
}  # fmt: skip


def test_every_figure_of_a_cache_is_exported_or_named_as_one_that_is_not(node: Machine) -> None:
    asked: set[object] = set()

    class Asked(dict[str, Any]):
        def get(self, key: object, default: Any = None) -> Any:  # type: ignore[override]
            asked.add(key)
            return super().get(key, default)  # type: ignore[call-overload]

    node.folder.add(report(0), host_pid=41873)
    (process,) = node.look().processes
    for metric in metrics.METRICS:
        list(metric.read(dataclasses.replace(process, report=Asked(process.report))))
    assert BufferStats.__annotations__.keys() - asked == NOT_EXPORTED


def test_sources_are_hosts_without_ports(node: Machine) -> None:
    add_trainers(node.folder)
    found = scraped(node)
    third = {"gpu": "3", "source_node": "gpu-a-023"}
    assert value(found, "gpu_cache_fetch_errors_total", **third, reason="timeout") == 12
    assert value(found, "gpu_cache_fetch_errors_total", **third, reason="connection") == 5
    assert value(found, "gpu_cache_fetch_errors_total", **third, reason="other") == 0
    assert value(found, "gpu_cache_source_entries", gpu="0", source_node="local") == 4
    moved, busy = (
        value(found, f"gpu_cache_fetch_{what}_total", gpu="0", source_node="gpu-a-021")
        for what in ("bytes", "busy_seconds")
    )
    assert moved is not None
    assert busy is not None
    assert moved / busy == pytest.approx(11.9e9)


def test_the_ports_of_a_host_are_one_node_and_the_smallest_are_others(node: Machine) -> None:
    sources = {f"host-{n}:{port}": {"fetch_bytes": 1000 - n, "entries": 1} for n in range(40) for port in (1, 2)}
    node.folder.add(report(0, sources=sources | {"[::1]:80": {"fetch_bytes": 5000}}), host_pid=41873)
    found = scraped(node)
    assert value(found, "gpu_cache_source_entries", source_node="host-3") == 2
    assert value(found, "gpu_cache_fetch_bytes_total", source_node="[::1]") == 5000
    nodes = {dict(labels)["source_node"] for name, labels in found if name == "gpu_cache_source_entries"}
    assert len(nodes) <= MAX_SOURCES + 1
    assert sum(number for (name, _), number in found.items() if name == "gpu_cache_source_entries") == 80


def test_states_are_one_hot_and_of_the_dead_there_is_no_more(node: Machine) -> None:
    add_trainers(node.folder)
    found = scraped(node)
    for gpu, state in {"0": "ok", "3": "leak", "5": "hung", "6": "dead"}.items():
        states = {
            dict(labels)["state"]: number
            for (name, labels), number in found.items()
            if name == "gpu_cache_process_state" and ("gpu", gpu) in labels
        }
        assert states == {"ok": 0, "leak": 0, "hung": 0, "dead": 0, state: 1}
    assert {name for name, labels in found if ("gpu", "6") in labels} == {"gpu_cache_process_state"}


def test_unknown_figures_are_absent(node: Machine) -> None:
    node.folder.add(report(0, num_entries=0, schema_version=1), host_pid=41873)
    node.folder.add(report(1, schema_version=2), host_pid=41874)
    found = scraped(node)
    assert value(found, "gpu_cache_oldest_entry_timestamp_seconds") is None
    assert value(found, "gpu_cache_used_peak_bytes", tier="host") is None
    assert value(found, "gpu_cache_entries", tier="host") is None
    assert not [labels for _, labels in found if ("gpu", "1") in labels]


def test_no_two_processes_share_labels(node: Machine) -> None:
    """A dead one gives way to its successor; twins get longer ranks; without NVML the GPU is unknown."""
    node.folder.add(report(0, pid=1), is_alive=False)
    node.folder.add(report(0, pid=2), host_pid=2)
    node.folder.add(report(0, pid=3), host_pid=3)
    node.folder.add(report(0, pid=4, gpu_uuid="GPU-unknown"), host_pid=4)
    found = scraped(node)
    live = {dict(labels)["rank"] for (name, labels) in found if name == "gpu_cache_process_info"}
    assert live == {"0", "0.1"}
    assert value(found, "gpu_cache_process_state", gpu="0", rank="0", state="dead") == 0
    assert value(found, "gpu_cache_process_info", pid="4", gpu="") == 1


def test_the_next_run_of_a_job_goes_on_with_the_same_series(node: Machine) -> None:
    def labels() -> set[object]:
        return {key for key in scraped(node) if key[0] not in ("gpu_cache_process_info", "gpu_cache_process_state")}

    def run(first_pid: int) -> list[Path]:
        made = [report(0, pid=first_pid + n, role="rollout", rank=n % 2, start_time=first_pid + n) for n in range(6)]
        return [node.folder.add(one, host_pid=one["pid"]) for one in made]

    paths = run(100)
    before = labels()
    for path in paths:
        node.folder.release(path)
    run(200)
    assert labels() == before


def test_every_metric_of_the_table_is_exported(node: Machine) -> None:
    add_trainers(node.folder)
    extra = {"device_entries": 5, "host_entries": 1, "shared_bytes": 512, "shared_reserved_bytes": 1024}
    node.folder.add(report(6, role="critic", **extra), host_pid=99)
    assert {name for name, _ in scraped(node)} == names_of()


def test_a_full_node_has_about_as_many_series_as_foretold(node: Machine) -> None:
    sources = {f"node-{n}:1": dict.fromkeys(("entries", "resident_bytes", "fetch_bytes", "fetch_busy_seconds"), 1)
               | {"fetch_errors": 0} for n in range(16)}  # fmt: skip
    for rank in range(8):
        node.folder.add(report(rank, sources=sources), host_pid=41873 + rank)
    assert 1000 < len(scraped(node)) < 1800


@contextlib.contextmanager
def serving(look: Callable[[], Node], busy_s: float = 0.0) -> Iterator[int]:
    """Run the exporter in a thread, which at first does something else for a time; its port."""
    loops: queue.Queue[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = queue.Queue()

    async def run() -> None:
        loops.put((asyncio.get_running_loop(), asyncio.current_task()))
        asyncio.get_running_loop().call_soon(time.sleep, busy_s)
        with contextlib.suppress(asyncio.CancelledError):
            await exposition.Exporter(look, listener).run()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(run()), name="exporter")
        thread.start()
        loop, task = loops.get(timeout=30)
        assert task is not None
        try:
            yield listener.getsockname()[1]
        finally:
            loop.call_soon_threadsafe(task.cancel)
            thread.join(30)


def test_it_serves_a_scrape(node: Machine) -> None:
    add_trainers(node.folder)
    with (
        serving(node.look) as port,
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer,
    ):
        assert answer.headers["Content-Type"].startswith("text/plain")
        found = parsed(answer.read().decode())
    assert found == scraped(node)
    assert not [thread for thread in threading.enumerate() if "exporter" in thread.name or "smi" in thread.name]


def scrape(port: int, text: str) -> tuple[str, str]:
    """The answer to a request written by hand: head and body."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(text.replace("\n", "\r\n").encode())
        head, _, body = b"".join(iter(lambda: client.recv(1 << 20), b"")).decode().partition("\r\n\r\n")
        return head, body


def test_the_exporter_speaks_openmetrics_on_request(node: Machine) -> None:
    with serving(node.look) as port:
        asked = "GET /metrics HTTP/1.1\nHost: localhost\nAccept: application/openmetrics-text; version=1.0.0\n\n"
        head, body = scrape(port, asked)
    assert "Content-Type: application/openmetrics-text; version=1.0.0" in head
    assert body.endswith("# EOF\n")


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ("GET / HTTP/1.1\nHost: page.example\n\n", 403),
        ("GET / HTTP/1.1\nHost: localhost\nOrigin: http://page.example\n\n", 403),
        ("POST / HTTP/1.1\nHost: localhost\n\n", 405),
        ("HEAD / HTTP/1.1\nHost: localhost\n\n", 200),
    ],
)
def test_the_exporter_gives_web_pages_nothing(node: Machine, asked: str, status: int) -> None:
    add_trainers(node.folder)
    with serving(node.look) as port:
        head, body = scrape(port, asked)
    assert head.startswith(f"HTTP/1.1 {status} ")
    assert "gpu_cache" not in body


def test_clients_that_say_nothing_cost_the_exporter_no_thread_and_no_scrape(node: Machine) -> None:
    with serving(node.look) as port, contextlib.ExitStack() as stack:
        scrape(port, "GET / HTTP/1.1\nHost: localhost\n\n")
        before = threading.active_count()
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(100)]
        for client in slow:
            client.sendall(b"GET / HTTP/1.1\r\n")
        assert scrape(port, "GET / HTTP/1.1\nHost: localhost\n\n")[0].startswith("HTTP/1.1 200 ")
        assert threading.active_count() == before
        with contextlib.suppress(ConnectionError):
            assert slow[0].recv(1) == b"", "the clients that came first were dropped for those that came after"


def test_clients_that_come_at_once_get_no_more_places_of_the_exporter(node: Machine) -> None:
    with serving(node.look, busy_s=0.2) as port, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", port)
        clients = [stack.enter_context(socket.create_connection(address, exposition._CLIENT_S / 2)) for _ in range(90)]
        for client in clients[: -exposition._MAX_CLIENTS]:
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b"", "it was dropped for those that came after"


def test_a_slow_client_of_the_exporter_is_dropped(node: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "_CLIENT_S", 0.1)
    with serving(node.look) as port:
        for start in ("", "GET / HTTP/1.1\nHost: localhost\nX: " + 20_000 * "x"):
            with contextlib.suppress(ConnectionError):
                assert scrape(port, start) == ("", "")


def test_a_look_that_fails_is_an_answer_and_the_next_one_works(
    node: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks = iter([RuntimeError("no driver")])

    def look() -> Node:
        for error in looks:
            raise error
        return node.look()

    with serving(look) as port:
        statuses = [scrape(port, "GET / HTTP/1.1\nHost: localhost\n\n")[0].split()[1] for _ in range(2)]
    assert statuses == ["500", "200"]
    assert "no driver" in caplog.text


def test_serving_until_interrupted(node: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupt(_: exposition.Exporter) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exposition.Exporter, "run", interrupt)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = node.run("--serve", str(port))
        assert done.code == 1
        assert done.err.startswith(f"gpu-cache-smi: cannot serve on 127.0.0.1:{port}: ")
    done = node.run("--serve", f"localhost:{port}")
    assert (done.code, done.err) == (0, f"gpu-cache-smi: metrics on http://localhost:{port}/metrics\n")
    done = node.run("--serve", f"0.0.0.0:{port}")
    assert done.err.splitlines()[1].startswith("Warning: on 0.0.0.0 everyone who reaches this machine may read")


def test_a_scrape_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with machine(tmp_path, monkeypatch, capsys, FakeNvml(failure=12)) as node:
        assert parsed(exposition.text(node.look)) == {}


def asked_for(text: str) -> set[str]:
    return set(re.findall(r"\bgpu_cache_\w+", text))


def expressions(dashboard: dict[str, Any]) -> list[str]:
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return targets + [variable["definition"] for variable in dashboard["templating"]["list"][1:]]


def test_the_dashboard_asks_for_exported_metrics() -> None:
    dashboard = json.loads((DASHBOARDS / "grafana.json").read_text())
    asked = asked_for("\n".join(expressions(dashboard)))
    assert asked <= names_of()
    histograms = {one.name for one in metrics.HISTOGRAMS}
    shown = asked | {name for name in histograms if f"{name}_bucket" in asked} | {"gpu_cache_process_info"}
    assert {metric.name for metric in metrics.METRICS} | histograms <= shown


def test_the_dashboard_has_its_rows_and_variables() -> None:
    dashboard = json.loads((DASHBOARDS / "grafana.json").read_text())
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    for word in ("Memory", "Look-ups", "Fetch", "Copies", "Evictions", "Leaks", "Process states"):
        assert [title for title in rows if word in title], word
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert names == ["datasource", "instance", "role", "gpu", "source_node"]
    labels = {label for metric in metrics.METRICS for label in (*metrics.COMMON_LABELS, *metric.labels)}
    for expression in expressions(dashboard):
        for label in re.findall(r"(\w+)=~?\"", expression):
            assert label in labels | {"instance"}, expression


def test_the_page_has_a_row_for_each_metric() -> None:
    page = (DASHBOARDS.parent / "docs" / "monitoring.md").read_text()
    rows = dict(re.findall(r"^\| `(gpu_cache_\w+)` \| (.*) \|$", page, re.M))
    expected = {
        one.name: f"{one.kind} | {', '.join(f'`{label}`' for label in one.labels)} | {one.meaning}"
        for one in metrics.METRICS
    }
    assert rows == expected | {one.name: f"histogram | | {one.meaning}" for one in metrics.HISTOGRAMS}


def test_shared_memory_is_exported_for_its_owner_alone(node: Machine) -> None:
    node.folder.add(report(0), host_pid=41873)
    node.folder.add(report(1) | {"shared_bytes": 4 << 20, "shared_reserved_bytes": 16 << 20}, host_pid=41874)
    found = scraped(node)
    for name, nbytes in (("gpu_cache_shared_bytes", 4 << 20), ("gpu_cache_shared_reserved_bytes", 16 << 20)):
        assert [number for (key, _), number in found.items() if key == name] == [nbytes], "none is exported as 0"
        assert value(found, name, gpu="1", role="actor") == nbytes


def test_alerts_ask_for_exported_metrics() -> None:
    text = (DASHBOARDS / "alerts.yml").read_text()
    assert asked_for(text) <= names_of()
    assert len(re.findall(r"^      - alert: ", text, re.M)) == 7
    assert len(re.findall(r"^        for: ", text, re.M)) == 7


def promtool(*arguments: str, text: str = "") -> str:
    """Run Prometheus' own checker; it must succeed."""
    if shutil.which("promtool") is None:
        pytest.skip("no promtool on the PATH: apt-get install prometheus")
    done = subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with machine(tmp_path, monkeypatch, capsys) as node:
        add_trainers(node.folder)
        text = exposition.text(node.look)
    assert promtool("check", "metrics", text=text) == ""


def test_prometheus_takes_the_alerts() -> None:
    assert "SUCCESS: 7 rules found" in promtool("check", "rules", str(DASHBOARDS / "alerts.yml"))


# Series that make each alert fire, with a value for each half minute.
FAULTS = {
    "GpuCacheLeak": {"outlived_clear_entries{}": "2x60"},
    "GpuCacheHung": {'process_state{state="hung"}': "1x60"},
    "GpuCacheSlowSource": {
        f'fetch_{what}_total{{source_node="{node}"}}': f"0+{step}x60"
        for node, step_bytes in (("a", 1000), ("b", 1000), ("c", 200))
        for what, step in (("bytes", step_bytes), ("busy_seconds", 1))
    },
    "GpuCacheAllocationsFail": {'alloc_failures_total{tier="device"}': "0+1x60"},
    "GpuCacheOverflows": {"overflows_total{}": "0+1x60"},
    "GpuCacheFetchErrors": {'fetch_errors_total{reason="refused"}': "0+1x60"},
    "GpuCacheStagingWait": {"staging_wait_seconds_total{}": "0+15x60"},
}


def test_each_alert_fires_for_its_fault_alone(tmp_path: Path) -> None:
    tests = [
        {
            "interval": "30s",
            "input_series": [{"series": f"gpu_cache_{name}", "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": "29m",
                    "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}],
                }
            ],
        }
        for alert, series in FAULTS.items()
    ]
    path = tmp_path / "faults.yml"
    rules = [str(DASHBOARDS / "alerts.yml")]
    path.write_text(json.dumps({"rule_files": rules, "evaluation_interval": "30s", "tests": tests}))
    assert "SUCCESS" in promtool("test", "rules", str(path))
    assert FAULTS.keys() == set(re.findall(r"^      - alert: (\w+)$", Path(rules[0]).read_text(), re.M))


def test_prometheus_takes_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    dashboard = json.loads((DASHBOARDS / "grafana.json").read_text())
    queries = [
        re.sub(r"\$__\w+", "5m", target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    path = tmp_path / "queries.yml"
    path.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))  # JSON is YAML too
    assert f"SUCCESS: {len(queries)} rules found" in promtool("check", "rules", "--lint=none", str(path))


def test_the_dashboard_has_what_grafana_asks_for() -> None:
    """Fields and ranges of Grafana's own `kinds/dashboard/dashboard_kind.cue`, in the classic form that it imports."""
    dashboard = json.loads((DASHBOARDS / "grafana.json").read_text())
    assert 8 <= len(dashboard["uid"]) <= 40
    assert dashboard["title"]
    assert 36 <= dashboard["schemaVersion"] < 1 << 16
    assert set(dashboard["time"]) == {"from", "to"}
    assert dashboard["editable"] in (True, False)
    for variable in dashboard["templating"]["list"]:
        assert variable["type"] in ("query", "datasource"), variable["name"]
        assert variable.get("hide", 0) in (0, 1, 2)
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["type"], panel["title"]
        at = panel["gridPos"]
        assert at["h"] > 0
        assert at["w"] > 0
        assert at["y"] >= 0
        assert 0 <= at["x"] <= 24 - at["w"], panel["title"]
        if panel["type"] != "row":
            _check_panel(panel)


def _check_panel(panel: dict[str, Any]) -> None:
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references) > 0, panel["title"]
    assert set(panel["datasource"]) <= {"type", "uid"}
    assert set(panel["fieldConfig"]) == {"defaults", "overrides"}, panel["title"]
    thresholds = panel["fieldConfig"]["defaults"].get("thresholds", {"mode": "absolute", "steps": []})
    assert thresholds["mode"] in ("absolute", "percentage")
    assert all(step["color"] for step in thresholds["steps"])
    for mapping in panel["fieldConfig"]["defaults"].get("mappings", ()):
        assert mapping["type"] in ("value", "range", "regex", "special")
