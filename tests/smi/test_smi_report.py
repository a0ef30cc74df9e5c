"""The schema's shared rules: names, directories, edges."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from gpu_cache.report import schema as report


def test_no_torch_behind_the_schema() -> None:
    code = "import sys, gpu_cache.report.schema; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])


def test_names_are_safe_for_a_file_and_never_repeat() -> None:
    names = {report.report_name("../a b", 3, 7) for _ in range(50)}
    assert len(names) == 50
    assert all(re.fullmatch(r"___a_b-3-7-[0-9a-f]{6}", name) for name in names)
    assert report.report_name("", 0, 1).startswith("process-0-1-")


def test_only_reports_are_reports() -> None:
    name = report.report_name("actor", 0, 1)
    endings = (report.REPORT, report.LOCK, report.WANT, report.LEAKS)
    assert [report.is_report(name + ending) for ending in endings] == [True, False, False, False]
    assert not report.is_report(f".{name}.json")


def test_directories_are_the_named_one_or_shared_memory_then_tmp() -> None:
    assert report.directories({"GPU_CACHE_STATS_DIR": "/x"}, 5) == [Path("/x")]
    assert report.directories({}, 5) == [Path("/dev/shm/gpu_cache-5"), Path("/tmp/gpu_cache-5")]


def test_edges_are_those_of_the_metrics() -> None:
    assert len(report.FETCH_DURATION_EDGES_S) == 14
    assert list(report.FETCH_DURATION_EDGES_S) == sorted(report.FETCH_DURATION_EDGES_S)
    assert report.ENTRY_SIZE_EDGES_BYTES[-1] == 4 << 30
