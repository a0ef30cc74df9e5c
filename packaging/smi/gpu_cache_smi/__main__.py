"""The console script, and `python -m gpu_cache_smi`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def run() -> None:
    """Run the tool from the copy that this distribution brings."""
    sys.path.insert(0, str(Path(__file__).parent / "bundled"))
    importlib.import_module("gpu_cache.smi.__main__").run()


if __name__ == "__main__":
    run()
