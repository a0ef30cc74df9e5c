"""README's pictures: a run of the demo is drawn as `make screenshots` does it, and each shows what its caption says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import screenshots
from screens.watched_demo import CAST, WatchedDemo

from tests.support.smi_machine import words_of

ROOT = Path(__file__).parents[2]
SCREENS = ROOT / "docs" / "screens"
PICTURE = re.compile(r"!\[([^]]*)\]\((?:docs/)?screens/([^)]*)\)")
PAGES = "".join((ROOT / name).read_text() for name in ("README.md", "docs/monitoring.md"))
CAPTIONS = {path: caption for caption, path in PICTURE.findall(PAGES)}


def states_in(text: str) -> dict[str, str]:
    """The state of each process in a table or a live view."""
    rows = re.findall(r"(rollout/\d|trainer/\d) +(ok|LEAK|HUNG|DEAD)", text)
    return {title: state.lower() for title, state in rows}


def check(name: str, kind: str, svg: str) -> None:
    text = words_of(svg)
    assert states_in(text) == CAST[name], text
    if (name, kind) == ("leaking", "table"):
        assert "See them: gpu-cache-smi --leaks" in text


@pytest.mark.parametrize("name", CAST)
@pytest.mark.parametrize("kind", ["table", "watch"])
def test_the_pictures_that_are_here_show_what_captions_say(name: str, kind: str) -> None:
    check(name, kind, (SCREENS / f"{kind}-{name}.svg").read_text())


def test_captions_speak_of_the_cast() -> None:
    assert CAPTIONS["table-leaking.svg"].startswith("The table: two rollout workers are ok, the trainer leaks")
    assert set(CAPTIONS) <= {path.name for path in SCREENS.iterdir()}


@pytest.mark.scripts
@pytest.mark.parametrize("name", [pytest.param("healthy", marks=pytest.mark.slow), "leaking"])
def test_a_run_of_the_demo_is_drawn_as_its_caption_says(name: str) -> None:
    demo = WatchedDemo(name, screenshots.RUNS[name], steps=14)
    demo.watch()
    check(name, "table", demo.table())
    check(name, "watch", demo.live())
