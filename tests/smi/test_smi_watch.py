"""The live view: its frames at 80 and 100 columns, its keys, its memory, and a session on a pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpu_cache.smi import graphs, history
from gpu_cache.smi.frame import Size, frame
from gpu_cache.smi.history import History
from gpu_cache.smi.view import DOWN, MIN_INTERVAL_S, PAGE_DOWN, PAGE_UP, UP, View
from tests.support.smi_machine import Machine, add_trainers, matches_golden
from tests.support.smi_reports import DEAD_S, NOW, dead_trainer, report, trainers

ROOT = Path(__file__).parents[2]
WIDE = Size(100, 40)
SIZES = pytest.mark.parametrize("size", [Size(80, 30), WIDE], ids=["80", "100"])
# GB fetched in each second of a step, over and over.
STEP_GB = [0, 0, 2, 10, 11, 9, 0, 0, 0, 0, 0, 0]


def a_minute(node: Machine, seconds: int = 60) -> History:
    """A minute of the specification's trainers; the leaking one clears 40 seconds before the end."""
    past = History()
    paths = {}
    found = trainers()
    for made, age_s in found:
        paths[made["rank"]] = node.folder.add(made, age_s=age_s, host_pid=made["pid"])
    node.folder.add(dead_trainer(), age_s=DEAD_S, is_alive=False)
    for second in range(seconds + 1):
        node.folder.now = NOW - seconds + second
        for made, age_s in found:
            reported = min(second, int(seconds - age_s))  # the hanging one stops
            made |= _as_of(reported, seconds, made["rank"])
            text = json.dumps(made | {"pid_namespace": node.folder.namespace})
            node.folder.write(paths[made["rank"]].stem, text, age_s=0.41 + second - reported)
        past.add(node.look())
    return past


def _as_of(second: int, seconds: int, rank: int) -> dict[str, Any]:
    moved = int(4e12 + 1e9 * sum(STEP_GB[at % len(STEP_GB)] for at in range(second + 1)))
    is_after_clear = second >= seconds - 40
    clears = {"clears": 260 + is_after_clear, "cleared": 400_000 + 1530 * is_after_clear} if rank == 3 else {}
    return {"fetch_bytes": moved, "h2d_bytes": moved} | clears


def text(node: Machine, past: History, view: View | None = None, size: Size = WIDE, **options: bool) -> str:
    lines = frame(node.look(), past, view or View(1.0), size, **options)
    assert len(lines) <= size.height
    assert all(len(line.plain) <= size.width for line in lines), max(len(line.plain) for line in lines)
    return "".join(f"{line.plain.rstrip()}\n" for line in lines)


@SIZES
def test_a_frame(node: Machine, size: Size) -> None:
    past = a_minute(node)
    assert matches_golden(f"watch_{size.width}.txt", text(node, past, size=size))


@SIZES
def test_a_frame_in_ascii(node: Machine, size: Size) -> None:
    found = text(node, a_minute(node), size=size, is_ascii=True)
    assert matches_golden(f"watch_ascii_{size.width}.txt", found)
    assert found.isascii()


@SIZES
@pytest.mark.parametrize("key", ["u", "l", "e", "?"])
def test_other_views(node: Machine, size: Size, key: str) -> None:
    view = View(1.0)
    view.press(key)
    name = {"u": "sources", "l": "leaks", "e": "events", "?": "help"}[key]
    assert matches_golden(f"watch_{name}_{size.width}.txt", text(node, a_minute(node, 20), view, size))


def test_graphs_go_first_where_it_is_narrow_and_events_where_it_is_low(node: Machine) -> None:
    past = a_minute(node, 20)
    narrow = text(node, past, size=Size(79, 40))
    assert not set(narrow) & set(graphs.BLOCKS) - {"█"}
    assert "LEAK\n" in narrow
    low = text(node, past, size=Size(100, 23))
    assert "clear_batches()" not in low
    assert "█▁" in low


def test_without_a_process(node: Machine) -> None:
    assert text(node, History()).count("no process") == 8


def pressed(*keys: str) -> View:
    view = View(1.0)
    for key in keys:
        view.press(key)
    return view


def test_keys() -> None:
    assert pressed("q").is_done
    assert pressed(" ").is_paused
    assert not pressed(" ", " ").is_paused
    assert [pressed(*"s" * n).sort for n in (1, 2, 5)] == ["pool", "fetch", "gpu"]
    assert (pressed("3").gpu, pressed("3", "3").gpu, pressed("3", "4").gpu) == ("3", "", "4")
    assert (pressed("+").interval_s, pressed("-").interval_s) == (2.0, 0.5)
    assert pressed(*"-" * 9).interval_s == MIN_INTERVAL_S
    assert pressed("w").wants_snapshot
    assert [pressed("?").is_helping, pressed("?", "x").is_helping] == [True, False]
    assert not pressed("?", "q").is_helping
    assert pressed("?", "q").is_done
    assert pressed("z").view == "processes"


def test_a_filter_is_typed() -> None:
    view = pressed(*"/ctorq", "\x7f", "\x08")
    assert (view.filter, view.is_typing, view.is_done) == ("cto", True, False)
    view.press("\r")
    assert (view.filter, view.is_typing) == ("cto", False)
    assert pressed(*"/abc", "\x1b").filter == ""
    assert pressed(*"/a\x01b").filter == "ab"


def test_rows_follow_sort_and_filter(node: Machine) -> None:
    add_trainers(node.folder)

    def shown(*keys: str) -> list[int | None]:
        return [process.rank for process in pressed(*keys).processes(node.look())]

    assert shown() == [0, 1, 2, 3, 4, 5, 7, 6]
    assert shown("s") == [3, 1, 0, 7, 4, 2, 5, 6]
    assert shown(*"sss")[:2] == [3, 5]
    assert shown(*"ssss")[:3] == [6, 5, 3]
    assert shown("5") == [5]
    assert shown(*"/hung\r") == [5]
    assert shown(*"/41873\r") == [0]
    assert shown(*"/TOR/7\r") == [7]


def test_transfers_are_remembered_for_a_minute(node: Machine) -> None:
    past = a_minute(node, 80)
    row = node.look().rows[0]
    trace = list(past.trace(row, "fetch"))
    assert len(trace) == 61
    assert max(value or 0 for _, value in trace) == pytest.approx(11e9)
    values = history.buckets(trace, NOW, 60)
    assert values[-1] == pytest.approx(STEP_GB[80 % 12] * 1e9)
    assert history.buckets([], NOW, 3) == [None] * 3


def test_looking_twice_at_one_report_repeats_its_speed(node: Machine) -> None:
    past = History()
    path = node.folder.add(report(0, fetch_bytes=0), age_s=0.0, host_pid=41873)
    past.add(node.look())
    node.folder.now += 1
    node.folder.write(path.stem, json.dumps(report(0, fetch_bytes=5_000_000_000)), age_s=0.0)
    past.add(node.look())
    past.add(node.look())
    assert [value for _, value in past.trace(node.look().rows[0], "fetch")] == [None, 5e9, 5e9]


def test_gpus_that_call_themselves_the_same_are_told_apart(node: Machine) -> None:
    """Without NVML each process is on its own GPU 0."""
    node.nvml._failure = 12
    past = a_minute(node)
    busy, _, hung = (list(past.trace(node.look().rows[n], "fetch")) for n in (0, 1, 5))
    assert (len(busy), len(hung)) == (61, 61)
    assert busy[-1][1] is not None
    assert hung[-1][1] is None


def test_events(node: Machine) -> None:
    past = History()
    past.add(node.look())
    path = node.folder.add(report(0, pid=1, clears=1), host_pid=41873)
    past.add(node.look())
    for clears, outlived, age_s in ((2, 0, 0), (3, 2, 0), (4, 2, 0), (4, 2, 30), (5, 0, 0)):
        made = report(
            0, pid=1, clears=clears, cleared=400_000 + clears, outlived_entries=outlived, outlived_max_clears=3
        )
        node.folder.write(path.stem, json.dumps(made), age_s=age_s)
        past.add(node.look())
    node.folder.release(path)
    past.add(node.look())
    for file in node.folder.path.iterdir():
        file.unlink()
    past.add(node.look())
    assert [(event.what, event.state) for event in past.events] == [
        ("actor/0 started", "ok"),
        ("clear_batches(): 1 freed, 2 survive their 3rd", "leak"),
        ("clear_batches(): 1 freed, 2 survive their 3rd", "leak"),
        ("last report", "hung"),
        ("reports again", "ok"),
        ("ended without cleanup", "dead"),
    ]


def test_into_a_pipe_frames_follow_each_other(node: Machine) -> None:
    add_trainers(node.folder)
    out = node.run("--watch", "0.25", "-c", "2", "--ascii").out
    assert out.count("gpu-cache-smi 0.1.0   gpu-a-017   every 0.25 s") == 2
    assert "\x1b" not in out


class Session:
    """The tool on a pseudo-terminal of 100 by 40 characters."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self.master = master

    def see(self, wanted: str) -> str:
        """Read until this text has been drawn."""
        seen, deadline = "", time.monotonic() + 30
        while wanted not in seen:
            assert time.monotonic() < deadline, (wanted, seen)
            if select.select([self.master], [], [], 0.1)[0]:
                raw = os.read(self.master, 65536).decode(errors="replace")
                seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)
        return seen

    def press(self, keys: str, wanted: str) -> str:
        """Type, and wait for what it does."""
        os.write(self.master, keys.encode())
        return self.see(wanted)


@contextmanager
def session(folder: Path, cwd: Path) -> Iterator[Session]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environ = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environ |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "gpu_cache.smi", "--watch", "0.5", "--dir", str(folder)]
    try:
        with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environ, cwd=cwd) as process:
            try:
                yield Session(process, master)
            finally:
                process.kill()
    finally:
        os.close(master)
        os.close(slave)


def test_a_session_on_a_terminal(node: Machine, tmp_path: Path) -> None:
    node.folder.now = time.time()
    add_trainers(node.folder)
    with session(node.folder.path, tmp_path) as on:
        before = termios.tcgetattr(on.master)
        on.see("actor/7")
        on.press("?", "write a JSON snapshot")
        on.press("?", "filter: none")
        on.press("u", "local (same node)")
        on.press("l", "--leaks")
        on.press("e", "ended without cleanup")
        on.press("\x1b[B", "filter: none")
        on.press("p", "Evict/s")
        on.press("s", "sort: pool")
        on.press("/actor/4", "filter: actor/4_ (/)")
        on.press("\r", "filter: actor/4 (/)")
        on.press("+", "every 1.0 s")
        on.press("-", "every 0.5 s")
        on.press(" ", "PAUSED")
        on.press("w", "wrote gpu-cache-smi-")
        on.press("\x1b[A", "PAUSED")  # an arrow is no Esc and no letter
        os.write(on.master, b"q")
        assert on.process.wait(30) == 0
        assert termios.tcgetattr(on.master) == before
    (snapshot,) = tmp_path.glob("gpu-cache-smi-*.json")
    assert len(json.loads(snapshot.read_text())["processes"]) == 8


def test_interrupting_a_session_leaves_the_terminal_as_it_was(node: Machine, tmp_path: Path) -> None:
    with session(node.folder.path, tmp_path) as on:
        before = termios.tcgetattr(on.master)
        on.see("q quit")
        on.process.send_signal(signal.SIGINT)
        assert on.process.wait(30) == 0
        assert termios.tcgetattr(on.master) == before


def test_without_a_report_the_live_view_waits_and_says_so(node: Machine) -> None:
    shown = node.run("--watch", "0.25", "-c", "2").out
    assert shown.count(" waiting: no cache reports in /") == 2


def test_more_rows_than_lines_are_scrolled(node: Machine) -> None:
    for number in range(64):
        node.folder.add(report(number % 8, role="rollout", rank=number, pid=100 + number), host_pid=100 + number)
    size, past = Size(100, 30), History()

    def ranks(view: View) -> list[str]:
        return re.findall(r"rollout/(\d+)", text(node, past, view, size))

    all_ranks = re.findall(r"rollout/(\d+)", text(node, past, View(1.0), Size(100, 200)))
    assert len(all_ranks) == 64
    view = View(1.0)
    shown = ranks(view)
    assert shown == all_ranks[: len(shown)]
    assert f" ... 0 above, {64 - len(shown)} more: arrows, PgUp, PgDn" in text(node, past, view, size)
    view.press(DOWN)
    assert ranks(view) == all_ranks[1 : 1 + len(shown)]
    view.press(UP)
    view.press(UP)
    assert ranks(view) == shown
    for _ in range(20):
        view.press(PAGE_DOWN)
    assert ranks(view) == all_ranks[-len(shown) :]
    view.press(PAGE_UP)
    assert view.offset == 64 - len(shown) - 10
    view.press("e")
    assert view.offset == 0
