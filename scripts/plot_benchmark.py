"""Draw the chart of a benchmark: `plot_benchmark.py FILE.json -o docs/benchmark` writes a .png and an .svg."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

# The benchmark's own modules, and the library where it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench.chart import DPI, draw

EXIT_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw.

    Returns:
        The exit status: 0, or 1 if the file is not one that `benchmark.py --json` wrote.
    """
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("rows", type=Path, metavar="FILE.json", help="as written by benchmark.py --json")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/benchmark"), help="without .png and .svg")
    options = parser.parse_args(arguments)
    try:
        figure = draw(json.loads(options.rows.read_text()))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        # Equal rows make equal files: no date, no random names.
        with matplotlib.rc_context({"svg.hashsalt": "benchmark"}):
            figure.savefig(options.output.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(options.output.with_suffix(".png"), dpi=DPI, metadata={"Software": None})
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"plot_benchmark: {options.rows}: {error!r}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
