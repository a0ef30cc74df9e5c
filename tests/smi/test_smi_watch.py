"""The live view: its screen at four widths, its keys and mouse, its memory, and a session on a pseudo-terminal."""

from __future__ import annotations

import asyncio
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
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.events import MouseScrollDown
from textual.pilot import Pilot
from textual.widgets import Static

from gpu_cache.smi import __main__, watch
from gpu_cache.smi.app import List, Watch
from gpu_cache.smi.watch import MIN_INTERVAL_S, History
from tests.support.smi_machine import Machine, add_strange, add_trainers, matches_golden, words_of
from tests.support.smi_reports import DEAD_S, NOW, dead_trainer, report, trainers

ROOT = Path(__file__).parents[2]
SIZES = pytest.mark.parametrize("size", [(60, 24), (80, 30), (100, 40), (200, 45)], ids=["60", "80", "100", "200"])
WIDE = (100, 40)
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


def watching(
    node: Machine,
    story: Callable[[Watch, Pilot[None]], Awaitable[None]],
    size: tuple[int, int] = WIDE,
    wanted: str = "sort:",
    **options: Any,
) -> str:
    """Run the live view without a terminal, do to it what the story does; its picture, once that shows the wanted."""

    async def run() -> str:
        app = Watch(node.look, 60.0, **options)
        async with app.run_test(size=size, notifications=True) as pilot:
            await settled(pilot)
            await story(app, pilot)
            before, found, deadline = "", "", time.monotonic() + 20
            while app.is_running and (wanted not in found or found != before):
                assert time.monotonic() < deadline, found
                await settled(pilot)
                before, found = found, words_of(app.export_screenshot())
            return found

    return asyncio.run(run())


async def settled(pilot: Pilot[None]) -> None:
    """Until what was under way has been drawn."""
    await pilot.wait_for_animation()
    await pilot.pause(0.02)


def pressing(*keys: str) -> Callable[[Watch, Pilot[None]], Awaitable[None]]:
    async def story(_: Watch, pilot: Pilot[None]) -> None:
        await pilot.press(*keys)

    return story


def column_of(app: Watch, name: str) -> list[str]:
    """Of the list, in the order of its rows."""
    shown = app.query_one(List)
    place = [column.label.plain.strip() for column in shown.ordered_columns].index(name)
    return [shown.get_row_at(row)[place].plain.strip() for row in range(shown.row_count)]


@SIZES
def test_a_screen(node: Machine, size: tuple[int, int]) -> None:
    past = a_minute(node)
    assert matches_golden(f"watch_{size[0]}.txt", watching(node, pressing(), size, past=past))


def test_a_screen_in_ascii(node: Machine) -> None:
    node.folder.add(report(0, role="r\N{LATIN SMALL LETTER U WITH DIAERESIS}"), host_pid=41873)
    found = watching(node, pressing(), past=a_minute(node), is_ascii=True)
    assert found.isascii()
    assert "######...." in found
    assert "r?/0" in found


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("u", "local (same node)"),
        ("l", "gpu-cache-smi --leaks 41876"),
        ("e", "clear: 1530 freed, 12 survive their 9th"),
        ("?", "write JSON into the current folder"),
    ],
)
def test_other_views(node: Machine, key: str, wanted: str) -> None:
    past = a_minute(node, 45)
    watching(node, pressing(key), WIDE, wanted, past=past)
    watching(node, pressing("p", key), (80, 30), wanted, past=past)


@pytest.mark.parametrize("size", [(1, 1), (1, 20), (3, 2)], ids=str)
def test_no_terminal_is_too_small(node: Machine, size: tuple[int, int]) -> None:
    add_strange(node.folder)
    watching(node, pressing("l", "e", "question_mark", "q"), size)


def test_warnings_stand_below_unless_it_is_low(node: Machine) -> None:
    add_trainers(node.folder)
    assert "See them: gpu-cache-smi --leaks 41876" in watching(node, pressing())
    low = watching(node, pressing(), (100, 14))
    assert "WARN" not in low
    assert "actor/7" in low


def test_without_a_process_it_waits(node: Machine) -> None:
    found = watching(node, pressing())
    assert found.count("no process") == 8
    assert "waiting: no cache reports in /" in found


def test_keys(node: Machine) -> None:
    add_trainers(node.folder)

    async def story(app: Watch, pilot: Pilot[None]) -> None:
        for key, found, wanted in (
            ("s", lambda: app.sort, "pool"),
            ("3", lambda: app.gpu, "3"),
            ("4", lambda: app.gpu, "4"),
            ("4", lambda: app.gpu, ""),
            ("-", lambda: app.interval_s, 30.0),
            ("=", lambda: app.interval_s, 60.0),
            ("+", lambda: app.interval_s, 60.0),
            ("space", lambda: app.is_paused, True),
            ("z", lambda: app.view, "processes"),
        ):
            await pilot.press(key)
            assert found() == wanted, key
        await pilot.press(*"-" * 12)
        assert app.interval_s == MIN_INTERVAL_S
        await pilot.press("q")
        assert not app.is_running

    watching(node, story)


def test_a_filter_is_typed(node: Machine) -> None:
    add_trainers(node.folder)

    async def story(app: Watch, pilot: Pilot[None]) -> None:
        await pilot.press("/", *"TOR/7q", "backspace")
        assert (app.wanted, column_of(app, "Role")) == ("TOR/7", ["actor/7"])
        await pilot.press("enter", "s")
        assert (app.wanted, app.sort) == ("TOR/7", "pool")
        await pilot.press("/", "escape")
        assert app.wanted == ""
        assert len(column_of(app, "Role")) == 8

    watching(node, story)


def test_rows_follow_sort_and_filter(node: Machine) -> None:
    add_trainers(node.folder)

    async def story(app: Watch, pilot: Pilot[None]) -> None:
        async def ranks(*keys: str) -> str:
            await pilot.press(*keys)
            return "".join(role.removeprefix("actor/") for role in column_of(app, "Role"))

        assert await ranks() == "01234576"
        assert await ranks("s") == "31074256"
        assert (await ranks("s", "s"))[0] == "5", "the lowest hit ratio"
        assert (await ranks("s"))[:2] == "35"
        assert (await ranks("s"))[:3] == "653"
        assert await ranks("5") == "5"
        assert await ranks("5", "/", *"hung", "enter") == "5"
        assert await ranks("/", *["backspace"] * 4, *"41873", "enter") == "0"

    watching(node, story)


def add_many(node: Machine) -> None:
    """64 processes, half of them dead, one leaking."""
    for number in range(64):
        leak = {"outlived_entries": 6144, "outlived_bytes": 3 << 20} if number == 10 else {}
        made = report(number % 8, role="rollout", rank=number, pid=5000 + number, **leak)
        node.folder.add(made, age_s=0.4 if number % 2 == 0 else 30.0, is_alive=number % 2 == 0, host_pid=5000 + number)


def test_more_rows_than_lines_are_scrolled(node: Machine) -> None:
    add_many(node)

    async def story(app: Watch, pilot: Pilot[None]) -> None:
        rows = app.query_one(List)
        assert rows.row_count == 64
        seen = words_of(app.export_screenshot())
        assert f"sort: gpu  {64 - seen.count(' rollout/')} more  64 processes: " in seen
        for key, wanted in (("down", 1), ("up", 0), ("end", rows.max_scroll_y), ("home", 0)):
            await pilot.press(key)
            await settled(pilot)
            assert rows.scroll_offset.y == wanted, key
        await pilot.press("pagedown")
        await settled(pilot)
        place = rows.scroll_offset.y
        assert place > 5
        await app.tick()
        await settled(pilot)
        assert rows.scroll_offset.y == place, "a new look leaves the reader where he is"
        rows.post_message(MouseScrollDown(rows, 5, 5, 0, 1, 0, False, False, False))
        await settled(pilot)
        assert rows.scroll_offset.y > place
        await pilot.press("end")

    found = watching(node, story)
    assert "sort: gpu  64 processes: " in found, "none is below the last"
    assert "rollout/63" in found
    assert "See them: gpu-cache-smi --leaks 5010" in found
    assert "32 processes ended without cleanup" in found


def test_a_click_on_a_head_sorts_and_one_on_a_tab_changes_the_list(node: Machine) -> None:
    add_trainers(node.folder)

    async def story(app: Watch, pilot: Pilot[None]) -> None:
        await pilot.click(List, offset=(22, 0))
        assert app.sort == "state"
        await pilot.click("#sources")
        await settled(pilot)
        assert app.view == "sources"
        assert column_of(app, "Source node")[-1] == "local (same node)"

    watching(node, story)


def test_a_snapshot_is_written_or_it_says_why_not(node: Machine, tmp_path: Path) -> None:
    add_trainers(node.folder)
    watching(node, pressing("w"), wanted="wrote gpu-cache-smi-20261122-121554.json", folder=tmp_path)
    (snapshot,) = tmp_path.glob("gpu-cache-smi-*.json")
    assert len(json.loads(snapshot.read_text())["processes"]) == 8
    watching(node, pressing("w"), wanted="no snapshot: No such file or directory", folder=tmp_path / "none")


def test_a_pause_keeps_the_picture_and_a_count_ends_it(node: Machine) -> None:
    add_trainers(node.folder)

    async def story(app: Watch, pilot: Pilot[None]) -> None:
        await pilot.press("space")
        node.folder.now += 5
        await app.tick()
        assert "12:15:54   PAUSED" in str(app.query_one("#title", Static).content)
        await pilot.press("space")
        await app.tick()
        assert "12:15:59" in str(app.query_one("#title", Static).content)
        await app.tick()
        await pilot.pause()
        assert not app.is_running

    watching(node, story, count=2)


def test_a_process_that_stays_keeps_its_minute(node: Machine) -> None:
    past = a_minute(node)
    busy, hung = (next(p for p in node.look().processes if p.rank == rank) for rank in (0, 5))
    assert set(past.sparkline(busy, "fetch", 60)) > {"▁", "█"}
    assert past.sparkline(hung, "fetch", 60).endswith(" " * 30)


def test_without_textual_it_says_what_to_install(node: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setitem(sys.modules, "textual.app", None)
    monkeypatch.delitem(sys.modules, "gpu_cache.smi.app")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu-cache-smi", "--watch"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"textual.*pip install 'rtensor-data-plane\[smi\]'"):
        __main__.run()


def test_transfers_are_remembered_for_a_minute(node: Machine) -> None:
    past = a_minute(node, 80)
    row = node.look().rows[0]
    trace = list(past.trace(row, "fetch"))
    assert len(trace) == 61
    assert max(value or 0 for _, value in trace) == pytest.approx(11e9)
    values = watch.buckets(trace, NOW, 60)
    assert values[-1] == pytest.approx(STEP_GB[80 % 12] * 1e9)
    assert watch.buckets([], NOW, 3) == [None] * 3


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
    assert [(event.what, event.state) for event in past._events] == [
        ("actor/0 started", "ok"),
        ("clear: 1 freed, 2 survive their 3rd", "leak"),
        ("clear: 1 freed, 2 survive their 3rd", "leak"),
        ("last report", "hung"),
        ("reports again", "ok"),
        ("ended without cleanup", "dead"),
    ]


def test_into_a_pipe_without_a_report_it_waits_and_says_so(node: Machine) -> None:
    shown = node.run("--watch", "0.25", "-c", "2").out
    assert shown.count(" waiting: no cache reports in /") == 2


@pytest.mark.parametrize("is_ascii", [False, True])
def test_into_a_pipe_frames_follow_each_other(node: Machine, is_ascii: bool) -> None:
    add_trainers(node.folder)
    out = node.run("--watch", "0.25", "-c", "2", *["--ascii"] * is_ascii).out
    assert out.isascii() == is_ascii
    assert "\x1b" not in out
    first, _ = out.split("gpu-cache-smi 0.1.0   gpu-a-017   every 0.25 s   12:15:54\n")[1:]
    assert matches_golden(f"watch_pipe{'_ascii' * is_ascii}.txt", first)


class Session:
    """The tool on a pseudo-terminal of 100 by 40 characters."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self.master = master
        self.raw = b""

    def see(self, wanted: str) -> str:
        """Read until this text has been drawn."""
        seen, deadline = "", time.monotonic() + 30
        while wanted not in seen:
            assert time.monotonic() < deadline, (wanted, seen)
            if select.select([self.master], [], [], 0.1)[0]:
                raw = os.read(self.master, 65536)
                self.raw += raw
                seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.decode(errors="replace"))
        return seen

    def press(self, keys: str, wanted: str) -> str:
        """Type, and wait for what only these keys bring: a timed redraw may show everything else."""
        os.write(self.master, keys.encode())
        return self.see(wanted)


@contextmanager
def session(folder: Path, cwd: Path, **variables: str) -> Iterator[Session]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environ = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environ |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"} | variables
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
        on.press("?", "write JSON into")
        on.press("?", "Evict/s")
        on.press("u", "local (same node)")
        on.press("l", "Clears")
        on.press("e", "Event")
        on.press("p", "Evict/s")
        on.press("s", "sort: pool")
        on.press("/", "role, pid or state")
        on.press("actor/4", "filter: actor/4")
        on.press("\r", "snapshot")  # keys that are no letters of the filter
        on.press("+", "every 1.0 s")
        on.press("-", "every 0.5 s")
        on.press(" ", "PAUSED")
        on.press("w", "wrote gpu-cache-smi-")
        on.press("\x1b[Bs", "sort: fetch")  # an arrow is no Esc and no letter
        os.write(on.master, b"q")
        assert on.process.wait(30) == 0
        assert termios.tcgetattr(on.master) == before
    (snapshot,) = tmp_path.glob("gpu-cache-smi-*.json")
    assert len(json.loads(snapshot.read_text())["processes"]) == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_terminal_as_it_was(node: Machine, tmp_path: Path, number: int) -> None:
    """Here of one that shows neither colours nor letters beyond ASCII."""
    add_trainers(node.folder)
    with session(node.folder.path, tmp_path, NO_COLOR="1", PYTHONIOENCODING="ascii") as on:
        before = termios.tcgetattr(on.master)
        on.see("snapshot")
        on.process.send_signal(number)
        assert on.process.wait(30) == 0
        assert termios.tcgetattr(on.master) == before
    assert on.raw.isascii()
    assert not re.search(rb"\x1b\[(?:[0-9;]*;)?[349][1-6](?:;[0-9;]*)?m", on.raw)
