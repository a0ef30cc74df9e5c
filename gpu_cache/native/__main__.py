"""Build the C++ functions of this package for the torch and the Python that run this: `python -m gpu_cache.native`."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from torch.utils import cpp_extension

from gpu_cache.native import SOURCE, library, load

NO_COMPILER = 2


def command(target: Path) -> list[str]:
    """The call of the compiler, `$CXX` or `c++`."""
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    libraries = cpp_extension.library_paths()
    return [
        *shlex.split(os.environ.get("CXX", "").strip() or "c++"),
        "-O2", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden",
        *(word for folder in folders for word in ("-isystem", folder)),
        "-o", str(target), str(SOURCE),
        *(f"-L{folder}" for folder in libraries),
        "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10",
    ]  # fmt: skip


def main() -> int:
    """Build it, unless that was done; return the exit status: 2 where no compiler is, 1 where it fails."""
    argparse.ArgumentParser(prog="python -m gpu_cache.native", description=__doc__).parse_args()
    path = library()
    try:
        found = 0 if path.exists() else _build(path)
    except (OSError, ValueError) as error:  # there is no such folder, or CXX is no command
        print(f"cannot build {path}: {error}", file=sys.stderr)
        return 1
    if not found:
        print(path)
    return found


def _build(path: Path) -> int:
    """Build it; return the exit status."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        call = command(made)
        try:
            done = subprocess.run(call, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            print(f"no compiler: {error}; set CXX to one that knows C++20", file=sys.stderr)
            return NO_COMPILER
        if done.returncode:
            print(done.stderr or f"{call[0]} ended with {done.returncode}, and without a word", file=sys.stderr)
            return 1
        load(made)
        made.rename(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
