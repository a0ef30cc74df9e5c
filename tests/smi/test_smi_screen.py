"""The default screen, character for character, at 80 and 100 columns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from gpu_cache.smi.screen import screen
from tests.support.smi_machine import Machine, Run, add_strange, add_trainers, machine, matches_golden
from tests.support.smi_nvml import FakeNvml
from tests.support.smi_reports import durations, report, source

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
    assert (done.code, done.err) == (0, "")


@WIDTHS
def test_without_a_process(node: Machine, width: int) -> None:
    done = node.run(width=width)
    head, _, said = done.out.rpartition("|\n|--")
    assert matches_golden(f"no_process_{width}.txt", f"{head}|\n")
    assert f"nocachereportsin{node.folder.path}" in re.sub(r"[\s|]", "", said)  # a long path is broken anywhere
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("arguments", [(), ("--by", "proc"), ("-l", "0.25", "-c", "1")])
def test_nothing_to_show_is_an_answer(bare: Machine, arguments: tuple[str, ...]) -> None:
    assert bare.run(*arguments) == Run(0, f"no cache reports in {bare.folder.path}\n", "")
    bare.folder.add(report(0), host_pid=41873)
    assert bare.run(*arguments, "--role", "critic").out == "no process passes the filters\n"


def test_nothing_to_show_is_an_answer_for_programs(bare: Machine) -> None:
    found = bare.run("--json")
    assert (found.code, found.err, json.loads(found.out)["processes"]) == (0, "", [])
    assert bare.run("--query-proc=pid") == Run(0, "pid\n", "")
    assert bare.run("--check") == Run(0, "", "")
    assert bare.run("--dmon").out.count("\n") == 2, "the head"


def test_without_nvml_one_dim_line_says_so(bare: Machine) -> None:
    bare.folder.add(report(0, device="cpu", gpu_uuid=None), host_pid=41873)
    last = screen(bare.look(), 99)[-1]
    assert isinstance(last, Text)
    assert (last.plain, last.style) == ("NVML not available: NVML Shared Library Not Found", "dim")
    assert bare.run().out.count("NVML not available") == 1


def test_caches_of_one_dead_process_are_one_row_and_the_last(node: Machine) -> None:
    add_trainers(node.folder)
    for number in range(9):
        node.folder.add(report(2, role=f"r{number}", pid=777), age_s=60.0 + number, is_alive=False)
    shown = node.screen()
    rows = [line for line in shown.splitlines() if "DEAD" in line]
    assert [line.split()[2:5] for line in rows] == [["777", "r0/2", "DEAD"], ["41879", "actor/6", "DEAD"]]
    assert "5 ok, 1 leak, 1 hung, 2 dead" in shown
    assert "NOTE  2 processes ended without cleanup, the last 1m0s ago; not counted above.\n" in shown
    assert shown.count("--gc") == 1
    found = json.loads(node.run("--json").out)
    assert [one["code"] for one in found["problems"]].count("ended_without_cleanup") == 2
    assert node.run("--gc").out.count("removed ") == 10
    assert "dead" not in node.screen()


def test_a_dead_process_is_shown_for_an_hour(node: Machine) -> None:
    path = node.folder.add(report(6), age_s=3599.0, is_alive=False)
    assert node.look().states == {"dead": 1}
    node.folder.now += 2
    assert node.look().states == {}
    assert node.run("--check").code == 0
    assert node.run("--gc").out == f"removed {path}\n"


def test_one_screen_tells_what_is_wrong_with_64_processes(node: Machine) -> None:
    for number in range(64):
        is_alive = number % 2 == 0
        changes = {"outlived_entries": 6144, "outlived_bytes": 3 << 20} if number == 10 else {}
        made = report(number % 8, role="rollout", rank=number, pid=5000 + number, **changes)
        node.folder.add(made, age_s=0.4 if is_alive else 30.0, is_alive=is_alive, host_pid=5000 + number)
    shown = node.screen()
    assert "64 processes: 31 ok, 1 leak, 32 dead" in shown
    assert shown.splitlines()[-4:] == [
        "WARN  gpu 2 pid 5010: 6144 entries (3MiB) survived 2+ clears; oldest 38s.",
        "      See them: gpu-cache-smi --leaks 5010",
        "NOTE  32 processes ended without cleanup, the last 30s ago; not counted above.",
        "      Clear: gpu-cache-smi --gc",
    ]


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
    assert lines[-1] == "* index inside that process; NVML does not know that GPU"


def styles(node: Machine) -> dict[str, set[str]]:
    """The coloured words in the boxes, by colour."""
    console = Console(width=99, color_system="standard", force_terminal=True)
    found: dict[str, set[str]] = {}
    for part in screen(node.look(), 99):
        for text, style, _ in console.render(part):
            if style and not style.bold and str(style) != "none" and text.strip():
                found.setdefault(str(style), set()).add(text.strip())
    return found


def test_hung_leak_and_errors_are_red_old_is_yellow_dead_is_dim(node: Machine) -> None:
    add_trainers(node.folder)
    found = styles(node)
    assert found["red"] == {"LEAK", "HUNG", "17"}
    assert found["yellow"] == {"1h12m"}
    assert found["dim"] == {"6", "41879", "actor/6", "DEAD", "-"}
    assert found.keys() <= {"red", "yellow", "dim"}


def test_a_full_pool_is_no_alarm(node: Machine) -> None:
    node.folder.add(report(0, device_bytes=20480 * MIB), host_pid=41873)
    assert styles(node) == {}


@pytest.mark.parametrize(("key", "colour"), [("overflows", "yellow"), ("alloc_failures", "red")])
def test_a_pool_that_turned_tensors_away_is_coloured(node: Machine, key: str, colour: str) -> None:
    node.folder.add(report(0, **{key: 3}), host_pid=41873)
    assert styles(node) == {colour: {"12GiB /   20GiB  60%", "12GiB"}}


def test_notes_name_shards_that_found_no_room_or_did_not_arrive_and_the_way_to_the_cause(node: Machine) -> None:
    made = report(0, overflows=16)
    made["rates_10s"]["fetch_errors"] = 3
    node.folder.add(made, host_pid=41873)
    shown = " ".join(node.run().err.split())
    assert "pid 41873: the pool had no room for 16 shards in the last 10 s, which were handed out uncached" in shown
    assert "Raise pool_bytes, or clear earlier." in shown
    assert "3 shards did not arrive in the last 10 s. Why: gpu-cache-smi --query-source node,fetch.reasons" in shown
    assert node.run("--check").code == 0, "it works, only slower"


def test_colour_on_demand_and_never_otherwise(node: Machine) -> None:
    add_trainers(node.folder)
    assert "\x1b[" in node.run("--color").out
    assert "\x1b[" not in node.run().out
    assert "\x1b[" not in node.run("--no-color").out


@pytest.mark.parametrize("width", [40, 60, 77])
def test_below_78_columns_each_process_has_a_short_line(node: Machine, width: int) -> None:
    add_trainers(node.folder)
    shown = node.screen(width=width)
    assert max(map(len, shown.splitlines())) <= max(width, 60), "the census may be longer"
    assert "   3   41876  actor/3" in shown
    assert "LEAK  14.1GiB  1h12m\n" in shown
    assert "+--" not in shown


def test_a_terminal_of_no_columns_is_taken_for_a_usual_one_and_one_of_a_single_column_is_no_error(
    node: Machine,
) -> None:
    add_strange(node.folder)
    assert node.screen(width=0) == node.screen(width=100)
    assert node.run(width=1).code == 0


@WIDTHS
def test_shared_memory_is_counted_for_its_owners_alone_and_sources_say_how_they_are_read(
    bare: Machine, width: int
) -> None:
    for number, way in enumerate(["shm", "node cache"]):
        made = report(number)
        made["sources"] = {f"gpu-a-02{number}:35221": source(3, 40, 4e9, 2e9, durations(3.1, 8.4)) | {"transport": way}}
        made |= {"shared_bytes": 4 * MIB, "shared_reserved_bytes": 16 * MIB} if number else {}
        bare.folder.add(made, host_pid=41873 + number)
    out = bare.run("--by", "source", width=width).out
    assert "gpu-a-020:35221 (shm) " in out
    assert "gpu-a-021:35221 (node) " in out
    out = bare.run(width=width).out
    assert "shared 4MiB / 16MiB" in out
    first, second = json.loads(bare.run("--json").out)["processes"]
    assert "shared_bytes" not in first
    assert (second["shared_bytes"], second["shared_reserved_bytes"]) == (4 * MIB, 16 * MIB)
