"""The console script, and `python -m gpu_cache.smi`."""

from __future__ import annotations

import importlib
import signal
import sys


def run() -> None:
    """Do what the command line says; what is not installed is named."""
    # As gpustat does, so that `| head` ends it silently; not where a scraper that hangs up would end the server.
    if not any(argument.startswith("--serve") for argument in sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        sys.exit(importlib.import_module("gpu_cache.smi.main").main(sys.argv[1:]))
    except ModuleNotFoundError as error:
        sys.exit(f"gpu-cache-smi: {error}; pip install 'rtensor-data-plane[smi]'")


if __name__ == "__main__":
    run()
