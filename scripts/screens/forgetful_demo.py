"""The demo with a bug: each fifth batch is never cleared. It ends as it should, with an error that says so."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_demo
from demo import session

PERIOD = 5
_clear, _steps = session.clear_everywhere, itertools.count(1)


def clear_most(*arguments: Any, **options: Any) -> None:
    """Clear a batch, unless it is the fifth one."""
    if next(_steps) % PERIOD:
        _clear(*arguments, **options)


if __name__ == "__main__":
    session.clear_everywhere = clear_most
    sys.exit(train_demo.main())
