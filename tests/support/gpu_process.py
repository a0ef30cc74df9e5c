"""Fresh interpreters for what one process can show only once: first use, fork, exit, tools that stay attached."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_COMPLAINTS = ("Traceback", "CUDA error", "CUDA warning", "terminate called")
_DEADLINE_S = 120


def run_python(*arguments: str, complains: bool = False, **environ: str) -> str:
    """The output of a fresh interpreter; it must end well and, unless it `complains`, write no error.

    Args:
        arguments: The interpreter's: `-c`, code; or `-m`, module and its arguments.
        complains: It may write of errors that it caught.
        environ: Variables besides this process's.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", *arguments],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
        check=False,
    )
    is_quiet = complains or not any(word in done.stderr for word in _COMPLAINTS)
    assert (done.returncode, is_quiet) == (0, True), f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
