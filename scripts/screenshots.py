"""Take the pictures of `gpu-cache-smi` that the README shows, from real runs of the demo: `make screenshots`.

One run as it should be and one that forgets to clear; screens as SVG, timelines as PNG by a headless Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# The script's own modules, and the library where it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from screens.watched_demo import WatchedDemo

SCRIPTS = Path(__file__).resolve().parent
EXIT_FAILED = 1
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
RUNS = {"healthy": SCRIPTS / "train_demo.py", "leaking": SCRIPTS / "screens" / "forgetful_demo.py"}
_SIZE = "1120,600"
_DRAW_S = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and draw.

    Returns:
        The exit status: 0, or 1 if there was no browser or nothing to see.
    """
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/screens"), help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="of each run (default: %(default)s)")
    options = parser.parse_args(arguments)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"screenshots: none of {', '.join(BROWSERS)} is on PATH", file=sys.stderr)
        return EXIT_FAILED
    options.output.mkdir(parents=True, exist_ok=True)
    for name, script in RUNS.items():
        demo = WatchedDemo(name, script, options.steps)
        demo.watch()
        (options.output / f"table-{name}.svg").write_text(demo.table())
        (options.output / f"watch-{name}.svg").write_text(demo.live())
        photograph(browser, demo.page(), options.output / f"timeline-{name}.png")
    return 0


def photograph(browser: str, page: str, picture: Path) -> None:
    """Have a page drawn into a PNG.

    Raises:
        subprocess.SubprocessError: The browser failed, or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "page.html"
        html.write_text(page)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={_SIZE}"]
        command = [
            browser,
            *options,
            f"--user-data-dir={folder}/profile",
            f"--screenshot={picture.resolve()}",
            str(html),
        ]
        subprocess.run(command, check=True, timeout=_DRAW_S, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
