"""The default screen, character for character, at 80 and 100 columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_cache.smi import boxes
from tests.support.smi_machine import Machine, add_strange, add_trainers, machine, matches_golden
from tests.support.smi_nvml import FakeNvml
from tests.support.smi_reports import report

MIB = 1 << 20
WIDTHS = pytest.mark.parametrize("width", [80, 100])


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Machine]:
    """Without a driver."""
    with machine(tmp_path, monkeypatch, capsys, FakeNvml(failure=12)) as made:
        yield made


@WIDTHS
def test_the_whole_node(node: Machine, width: int) -> None:
    add_trainers(node.folder)
    assert matches_golden(f"default_{width}.txt", node.screen(width=width))


@WIDTHS
def test_without_a_driver(bare: Machine, width: int) -> None:
    bare.folder.add(report(0), host_pid=41873)
    done = bare.run(width=width)
    assert matches_golden(f"no_driver_{width}.txt", done.out)
    assert matches_golden("no_driver_stderr.txt", done.err)
    assert done.code == 0


@WIDTHS
def test_without_a_process(node: Machine, width: int) -> None:
    done = node.run(width=width)
    assert matches_golden(f"no_process_{width}.txt", done.out)
    assert done.err.startswith(f"Hint: searched {node.folder.path}")
    assert done.code == 0


def test_without_driver_and_process_there_is_nothing_to_show(bare: Machine) -> None:
    done = bare.run()
    assert (done.out, done.code) == ("", 12)
    assert "NVML Shared Library Not Found" in done.err


@WIDTHS
def test_stale_hung_foreign_and_newer(node: Machine, width: int) -> None:
    add_strange(node.folder)
    clock, _, screen = node.screen("--by", "proc", width=width).partition("\n")
    assert clock == "Sun Nov 22 12:15:54 2026"
    assert matches_golden(f"states_{width}.txt", screen)


@WIDTHS
@pytest.mark.parametrize("box", ["gpu", "source"])
def test_one_box(node: Machine, width: int, box: str) -> None:
    add_trainers(node.folder)
    assert matches_golden(f"by_{box}_{width}.txt", node.run("--by", box, width=width).out)


@WIDTHS
def test_a_cache_in_host_memory(bare: Machine, width: int) -> None:
    small = {"device_bytes": 300_000, "device_capacity_bytes": 2048 * MIB, "host_bytes": 0, "host_capacity_bytes": 0}
    bare.folder.add(report(0, device="cpu", gpu_uuid=None, gpu_name=None, **small), host_pid=41873)
    assert matches_golden(f"host_{width}.txt", bare.run(width=width).out)


def test_a_gpu_that_nvml_does_not_know_is_starred(node: Machine) -> None:
    node.folder.add(report(0, gpu_uuid="GPU-other", device="cuda:3"), host_pid=41873)
    lines = node.run().out.splitlines()
    assert [line for line in lines if line.startswith("|  3*")]
    assert lines[-1] == "* as the process reported it (index inside that process); NVML does not know that GPU"


def styles(node: Machine) -> dict[str, set[str]]:
    """The coloured words in the boxes, by colour."""
    look = node.look()
    found: dict[str, set[str]] = {}
    for line in boxes.screen(look, ("gpu", "proc", "source"), True):
        for span in line.spans:
            found.setdefault(str(span.style), set()).add(line.plain[span.start : span.end].strip())
    return found


def test_hung_leak_and_errors_are_red_old_is_yellow_dead_is_dim(node: Machine) -> None:
    add_trainers(node.folder)
    found = styles(node)
    assert found["red"] == {"LEAK", "HUNG", "17"}
    assert found["yellow"] == {"1h12m"}
    assert [line.split()[:4] for line in found["dim"]] == [["|", "6", "41879", "actor/6"]]
    assert found.keys() <= {"red", "yellow", "dim"}


def test_a_full_pool_is_no_alarm(node: Machine) -> None:
    node.folder.add(report(0, device_bytes=20480 * MIB), host_pid=41873)
    assert styles(node) == {}


@pytest.mark.parametrize(("key", "colour"), [("overflows", "yellow"), ("alloc_failures", "red")])
def test_a_pool_that_turned_tensors_away_is_coloured(node: Machine, key: str, colour: str) -> None:
    node.folder.add(report(0, **{key: 3}), host_pid=41873)
    assert styles(node) == {colour: {"12288MiB / 20480MiB  60%", "12288"}}


def test_colour_on_demand_and_never_otherwise(node: Machine) -> None:
    add_trainers(node.folder)
    assert "\x1b[" in node.run("--color").out
    assert "\x1b[" not in node.run().out
    assert "\x1b[" not in node.run("--no-color").out
