"""The benchmark's targets, tables and chart, and its workload scale."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path as FilePath

import pytest
from rich.console import Console

sys.path.insert(0, str(FilePath(__file__).resolve().parents[2] / "scripts"))

import plot_benchmark
from bench import report, scale, targets
from bench.paths import Path
from bench.rounds import Plan, skipped_row
from bench.targets import Target, Verdict
from bench.workloads import make_workload

from tests.support.bench_rows import KEYS, full_rows

FLOOR = Target("more", lambda rows: rows["vision", "cold"]["ratio_raw"], 0.8, 0.9, is_floor=True)
CEILING = dataclasses.replace(FLOOR, what="less", is_floor=False, wanted=8, stretch=4)
NOTHING = Target("nothing", lambda rows: 3, 0)


@pytest.mark.parametrize(
    ("target", "measured", "words"),
    [
        (FLOOR, 0.95, "stretch met"),
        (FLOOR, 0.8, "met"),
        (FLOOR, 0.4, "missed by 50%"),
        (CEILING, 4, "stretch met"),
        (CEILING, 10, "missed by 25%"),
        (CEILING, 20, "missed by a factor of 2.5"),
        (NOTHING, 0, "met"),
        (NOTHING, 3, "missed by 3"),
        (FLOOR, None, "not measured"),
    ],
)
def test_a_verdict_says_by_how_much(target: Target, measured: float | None, words: str) -> None:
    assert Verdict(target, measured).words == words


def test_every_target_has_its_figure_in_a_full_run() -> None:
    found = targets.verdicts(full_rows(), is_host=False)
    assert [verdict.target.what for verdict in found if verdict.measured is None] == []
    assert {verdict.target for verdict in found} > set(targets.HOST_TARGETS)


def test_the_host_is_not_measured_by_targets_of_a_gpu() -> None:
    found = targets.verdicts(full_rows(), is_host=True)
    assert [verdict.target for verdict in found] == targets.HOST_TARGETS


def test_a_row_that_was_not_run_has_no_figures() -> None:
    assert {verdict.words for verdict in targets.verdicts([], is_host=False)} == {"not measured"}


def test_tables_show_targets_beside_figures_and_rows_that_need_a_gpu() -> None:
    found, workload = full_rows(), make_workload("rollout", 1 / 512)
    own = [row for row in found if row["workload"] == "rollout"]
    own += [skipped_row("rollout", Path.unavailable("own", "not here"))]
    console = Console(width=120, file=io.StringIO())
    report.print_workload(console, workload, own, is_host=False)
    console.print(report.scale_table([row for row in found if row["workload"] == "scale"]))
    console.print(report.target_table(targets.verdicts(found, is_host=False)))
    text = console.file.getvalue()
    words = ("defaults/cold+torch", "x quiet", "pinned_peak", "1,000,000", "wanted", "missed", "own was not run: not")
    assert [one for one in words if one not in text] == []
    assert "…" not in text, "a column is too narrow"


def test_a_run_of_single_rows_shows_the_targets_that_they_measure() -> None:
    found = [row for row in full_rows() if (row["workload"], row["path"]) == ("rollout", "defaults/warm")]
    table = report.target_table(targets.verdicts(found, is_host=True), only_measured=True)
    assert list(table.columns[0].cells) == ["rollout warm, us per shard"]


# The workload scale.


def test_the_index_and_the_free_list_are_measured_beside_a_dict() -> None:
    told: list[str] = []
    found = scale.run([100, 1_500], Plan(1, 1, 0), told.append)
    assert told[:3] == ["index 100", "dict 100", "freelist 100"]
    expected = {f"{structure}_{operation}" for structure in ("index", "dict") for operation in scale.OPERATIONS}
    assert {row["path"] for row in found} == expected | {"freelist_insert", "freelist_clear"}
    assert all(row.keys() >= KEYS for row in found)
    assert all(row["growth"] == 1 for row in found if row["num_entries"] == 100)
    assert all(row["growth_over_dict"] == 1 for row in found if row["path"].startswith("dict"))


# The chart.


def test_the_chart_is_drawn_as_png_and_svg_the_same_each_time(tmp_path: FilePath) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(full_rows()))
    pictures = []
    for name in ("one", "two"):
        assert plot_benchmark.main([str(tmp_path / "rows.json"), "-o", str(tmp_path / "new" / name)]) == 0
        pictures.append([(tmp_path / "new" / f"{name}.{kind}").read_bytes() for kind in ("png", "svg")])
    assert pictures[0] == pictures[1]
    assert pictures[0][0].startswith(b"\x89PNG")
    assert b"</svg>" in pictures[0][1]


@pytest.mark.parametrize("left_out", ["rollout", "vision", "scale"])
def test_a_chart_is_drawn_of_the_measurements(left_out: str, tmp_path: FilePath) -> None:
    rows = [row for row in full_rows() if row["workload"] != left_out]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert plot_benchmark.main([str(tmp_path / "rows.json"), "-o", str(tmp_path / "chart")]) == 0


@pytest.mark.parametrize("text", [None, "no json", '{"a": 1}', '[{"path": "cold"}]'])
def test_a_file_that_is_no_benchmarks_is_reported(
    text: str | None, tmp_path: FilePath, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.json"
    if text is not None:
        rows.write_text(text)
    assert plot_benchmark.main([str(rows), "-o", str(tmp_path / "chart")]) == 1
    assert f"plot_benchmark: {rows}" in capsys.readouterr().err
    assert not (tmp_path / "chart.png").exists()
