"""`--record` and `--timeline`: samples, curves, and what a browser draws of them."""

from __future__ import annotations

import functools
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gpu_cache.smi import timeline
from tests.support import smi_recording
from tests.support.smi_machine import Machine, add_trainers
from tests.support.smi_recording import LEAK_MIB, MIB, SOURCES, samples

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRAW_S = 60


def test_a_recording_is_a_line_for_each_look(node: Machine, tmp_path: Path) -> None:
    add_trainers(node.folder)
    file = tmp_path / "run.jsonl"
    for _ in range(2):  # the second is appended
        assert node.run("--record", str(file), "-l", "0.25", "-c", "2").code == 0
    found = list(timeline.samples(file.read_text().splitlines(keepends=True)))
    assert len(found) == 4
    leaking = found[0]["processes"][3]
    assert leaking["title"] == "actor/3"
    assert leaking["survivors"] == [[9, 12, 2172 * MIB]]
    assert leaking["device_bytes"] == 14460 * MIB
    dead = found[0]["processes"][7]
    assert (dead["state"], dead["device_bytes"], dead["sources"], dead["survivors"]) == ("dead", None, {}, [])
    assert "outlived" not in json.dumps(found)


def test_a_real_recording_can_be_drawn(node: Machine, tmp_path: Path) -> None:
    add_trainers(node.folder)
    file = tmp_path / "run.jsonl"
    node.run("--record", str(file), "-l", "0.25", "-c", "2")
    done = node.run("--timeline", str(file))
    assert (done.code, done.out) == (0, f"wrote {file}.html\n")
    assert "actor/7" in (tmp_path / "run.jsonl.html").read_text()


def test_a_line_that_is_cut_off_at_the_end_is_left_out() -> None:
    lines = smi_recording.as_text(samples(3, is_leaking=False)).splitlines(keepends=True)
    assert len(list(timeline.samples([*lines, lines[0][:50]]))) == 3
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        list(timeline.samples(["{\n", *lines]))
    with pytest.raises(ValueError, match="line 1 is not of a recording of version 1"):
        list(timeline.samples(['{"schema_version": 2}\n']))


NAMELESS = '{"schema_version": 1, "processes": [{"name": []}]}\n'


@pytest.mark.parametrize(
    "text", ["", "no json\n", '{"schema_version": 1, "processes": 3}\n', NAMELESS, "[" * 100_000 + "\n"]
)
def test_a_file_that_is_no_recording_is_a_bad_argument(node: Machine, tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    done = node.run("--timeline", str(tmp_path / "x"))
    assert (done.code, done.out) == (2, "")
    assert not (tmp_path / "x.html").exists()


def test_curves() -> None:
    drawing = timeline.drawing(samples(30, is_leaking=True))
    assert drawing["sources"] == [*SOURCES, timeline.OTHERS, timeline.UNINDEXED]
    healthy, leaking = drawing["processes"]
    assert sum(healthy["clears"]) == 4
    assert sum(leaking["clears"]) == 5
    assert healthy["survivors"] == {}
    assert [curve[-1] for curve in leaking["survivors"].values()] == [LEAK_MIB * MIB] * 4
    assert healthy["capacity"] == 4096 * MIB
    for process in drawing["processes"]:
        total = [sum(at) for at in zip(*process["stack"], strict=True)]
        assert total == process["pool"]
        assert set(process["stack"][-1]) == {40 * MIB}
    assert {round(speed / 1e9) for speed in healthy["fetch_speed"] if speed} == {11}
    assert {round(speed / 1e9) for speed in healthy["h2d_speed"] if speed} == {24}
    assert healthy["fetch_speed"][0] is None


def test_more_sources_than_colours_share_one() -> None:
    found = samples(2, is_leaking=False)
    for sample in found:
        sample["processes"][0]["sources"] = {f"node-{n:02}:1": (n + 1) * MIB for n in range(20)}
    drawing = timeline.drawing(found)
    assert len(drawing["sources"]) == timeline.MAX_SOURCES + 2
    stack = drawing["processes"][0]["stack"]
    assert stack[-2][0] is not None
    assert sum(curve[0] for curve in stack[:-1]) == sum(range(1, 21)) * MIB


def test_gaps_and_nonsense_are_drawn_as_nothing() -> None:
    found = samples(8, is_leaking=False)
    found[3]["processes"].pop()
    found[4]["processes"][1] |= {"device_bytes": None, "sources": None, "survivors": [[1, 2], "x", [3, 1, 7], 4]}
    curves = timeline.drawing(found)["processes"][1]
    assert [held is None for held in curves["pool"]] == [i in (3, 4) for i in range(8)]
    assert curves["survivors"] == {3: [0, 0, 0, 0, 7, 0, 0, 0]}
    assert curves["states"][3] == ""


def test_long_recordings_are_thinned_and_lose_no_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_SAMPLES", 10)
    drawing = timeline.drawing(samples(61, is_leaking=False))
    assert len(drawing["times"]) <= 10
    assert sum(drawing["processes"][0]["clears"]) == int(drawing["times"][-1]) // smi_recording.STEP_S


def test_the_page_needs_nothing_else_and_no_name_can_end_its_script() -> None:
    found = samples(3, is_leaking=False)
    found[0]["processes"][0]["sources"]["</script><b>/*uplot/LICENSE*/:1"] = MIB
    found[-1]["processes"][0]["title"] = "<!--<script>"
    page = timeline.page(found)
    origin = "/*! https://github.com/leeoniya/uPlot (v1.6.32) */"
    assert origin in page
    assert not re.search(r"https?://|\bsrc=|@import|url\(", page.replace(origin, ""))
    assert page.count("</script>") == page.count("<script>") == 2
    assert page.count("<!--") == 1
    assert page.count("Permission is hereby granted") == 1, "the licence of the chart library"
    assert "/*RECORDING*/" not in page


def test_the_chart_library_is_what_its_origin_says() -> None:
    folder = Path(timeline.__file__).parent / "uplot"
    sums = dict(re.findall(r"\| `(?:dist/)?(.+)` \| `([0-9a-f]{64})` \|", (folder / "ORIGIN.md").read_text()))
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del found["ORIGIN.md"]
    assert found == sums


@functools.cache
def browser() -> str:
    return next((path for name in BROWSERS if (path := shutil.which(name))), "")


def drawn(page: Path, tmp_path: Path, *more: str) -> str:
    """The document as it stands after its script ran."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        *more,
        "--dump-dom",
    ]
    command = [browser(), *flags, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=DRAW_S).stdout


# Appended to a page, this writes into the document what each chart has: its series, and the colours that one can see.
LOOK = """<script>
const coloursOf = (context) => {
  const found = new Set(), { data } = context.getImageData(0, 0, context.canvas.width, context.canvas.height);
  for (let i = 0; i < data.length; i += 4) found.add(data.slice(i, i + 4).join());
  return found;
};
const rgb = (fill) => {
  const one = document.createElement("canvas").getContext("2d");
  one.fillStyle = fill;
  one.fillRect(0, 0, one.canvas.width, one.canvas.height);
  return [...coloursOf(one)][0];
};
const look = (chart) => {
  const seen = coloursOf(chart.ctx), series = chart.series.slice(1);
  const labels = (wanted) => series.filter((one) => wanted(one) && seen.has(rgb(wanted(one)))).map((one) => one.label);
  return {
    title: chart.root.querySelector(".u-title").textContent, width: chart.width, top: chart.scales.y.max,
    from: chart.scales.x.min, to: chart.scales.x.max,
    series: series.map((one, i) => [one.label, chart.data[i + 1].filter((value) => value !== null).length]),
    filled: labels((one) => one.fill && one.fill()), drawn: labels((one) => one._stroke),
  };
};
setTimeout(() => {
  const place = document.createElement("pre");
  place.id = "found";
  place.textContent = JSON.stringify(charts.map((panels) => panels.map(look)));
  document.body.append(place);
}, 0);
</script></body>"""


def charts(page: str, tmp_path: Path, *more: str) -> tuple[str, list[list[dict[str, Any]]]]:
    """The document, and for each process what its three charts show."""
    (tmp_path / "page.html").write_text(page.replace("</body>", LOOK))
    dom = drawn(tmp_path / "page.html", tmp_path, *more)
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)
    assert found, dom[-2000:]
    return dom, json.loads(html.unescape(found[1]))


@pytest.mark.skipif(not browser(), reason=f"no browser: none of {', '.join(BROWSERS)} is on PATH")
@pytest.mark.parametrize("is_dark", [False, True])
def test_a_browser_draws_it(node: Machine, tmp_path: Path, is_dark: bool) -> None:
    (tmp_path / "run.jsonl").write_text(smi_recording.as_text(samples(60, is_leaking=True)))
    node.run("--timeline", str(tmp_path / "run.jsonl"), "-o", str(tmp_path / "run.html"))
    dark = ["--blink-settings=preferredColorScheme=0"] * is_dark
    dom, found = charts((tmp_path / "run.html").read_text(), tmp_path, *dark)
    healthy, leaking = found
    for (pool, _, speed), clears in ((healthy, 9), (leaking, 10)):
        assert pool["filled"] == [timeline.UNINDEXED, *reversed(SOURCES), "clears"]
        assert dict(pool["series"])["clears"] == clears
        assert "capacity 4 GiB" in pool["title"]
        assert speed["drawn"] == ["fetch", "h2d"]
        assert min(num for _, num in speed["series"]) > 50
    assert (healthy[1]["title"], healthy[1]["series"]) == ("of these, survived clears: none", [])
    assert leaking[1]["filled"] == [str(n) for n in range(9, 0, -1)], "every number of clears has its colour"
    assert re.search(r'<span class="leaking">At the end actor/1 keeps 720 MiB', dom)


@pytest.mark.skipif(not browser(), reason=f"no browser: none of {', '.join(BROWSERS)} is on PATH")
def test_a_browser_shows_figures_where_one_points(tmp_path: Path) -> None:
    """The page points at its own middle: the tooltip has the figures of that moment."""
    page = timeline.page(samples(61, is_leaking=True))
    move = (
        "<script>for (const [{over}] of charts) { const box = over.getBoundingClientRect();"
        " const at = {clientX: box.left + box.width * .5, clientY: box.top + 9, bubbles: true};"
        " over.dispatchEvent(new MouseEvent('mousemove', at)); }"
        "</script></body>"
    )
    (tmp_path / "page.html").write_text(page.replace("</body>", move))
    dom = drawn(tmp_path / "page.html", tmp_path)
    tip = re.sub(r"<[^>]+>", " ", re.findall(r'<div id="tip".*?</div>', dom, re.S)[0])
    figures = " ".join(tip.split())
    assert re.match(r"at 30 s state leak pool [\d.]+ [GM]iB gpu-a-021:35221 \d+ MiB", figures), figures
    assert "survived 2 90 MiB" in figures
    assert re.search(r"fetch [\d.]+ GB/s, [\d.]+ [GM]iB copy [\d.]+ GB/s, [\d.]+ [GM]iB", figures), figures


DRAG = """const { over } = charts[0][0], box = over.getBoundingClientRect();
  const at = (share) => ({ bubbles: true, button: 0, clientX: box.left + box.width * share, clientY: box.top + 9,
                           movementX: 9 });
  over.dispatchEvent(new MouseEvent("mouseenter", at(.5)));
  over.dispatchEvent(new MouseEvent("mousedown", at(.5)));
  document.dispatchEvent(new MouseEvent("mousemove", at(.7)));
  over.dispatchEvent(new MouseEvent("mousemove", at(.75)));
  over.dispatchEvent(new MouseEvent("mouseup", at(.75)));"""
DOUBLE_CLICK = """const { over: clicked } = charts[1][2], place = clicked.getBoundingClientRect();
  clicked.dispatchEvent(new MouseEvent("dblclick", { bubbles: true, button: 0, clientX: place.left + 20,
                                                     clientY: place.top + 9 }));"""


@pytest.mark.skipif(not browser(), reason=f"no browser: none of {', '.join(BROWSERS)} is on PATH")
@pytest.mark.parametrize(("then", "shown"), [("", (30, 45)), (DOUBLE_CLICK, (0, 60))], ids=["drag", "double click"])
def test_a_drag_enlarges_that_time_in_all_charts_and_a_double_click_shows_the_whole_run(
    tmp_path: Path, then: str, shown: tuple[int, int]
) -> None:
    story = f"setTimeout(() => {{ {DRAG} }}, 0); setTimeout(() => {{ {then} }}, 0);"
    page = timeline.page(samples(61, is_leaking=True))
    _, found = charts(page.replace("</body>", f"<script>{story}</script></body>"), tmp_path)
    assert {(round(one["from"]), round(one["to"])) for panels in found for one in panels} == {shown}


@pytest.mark.skipif(not browser(), reason=f"no browser: none of {', '.join(BROWSERS)} is on PATH")
def test_sixteen_colours_and_one_scale_at_500_pixels(tmp_path: Path) -> None:
    found = samples(20, is_leaking=True)
    for number, sample in enumerate(found):
        for one in sample["processes"]:
            one["sources"] = {f"node-{n:02}:1": 64 * MIB for n in range(16)}
            leaked = 4 * MIB if one["title"] == "actor/1" else MIB
            one["survivors"] = [[n, 1, leaked] for n in range(1, 17)] if number > 9 else []
    dom, (small, large) = charts(timeline.page(found), tmp_path, "--window-size=500,800")
    assert len(set(re.findall(r'class="chip" style="background: ([^"]*);"', dom.partition('id="survived"')[0]))) >= 16
    assert len(large[0]["filled"]) >= 16
    assert large[1]["filled"] == [str(n) for n in range(16, 0, -1)]
    assert small[1]["top"] == large[1]["top"] == 64 * MIB * 1.08, "the scale of the larger leak"
    assert all(380 <= chart["width"] < 500 for chart in [*small, *large])
