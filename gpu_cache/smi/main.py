"""`gpu-cache-smi`: what the caches of a machine hold and do."""

from __future__ import annotations

import io
import os
import sys
import traceback

from gpu_cache.report.schema import dead_s
from gpu_cache.smi import options as command_line
from gpu_cache.smi.commands import Commands
from gpu_cache.smi.folder import folders
from gpu_cache.smi.node import Observer
from gpu_cache.smi.terminal import Terminal


def main(arguments: list[str], observer: Observer | None = None) -> int:
    """Do what the command line says.

    Args:
        arguments: Without the program's name.
        observer: Looks at the machine; tests pass their own.
    Returns:
        The exit code.
    Raises:
        ModuleNotFoundError: The option needs a library that is not installed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a role may have letters that the locale has not
    options = command_line.parse(arguments)
    found = observer or Observer(lambda: options.dir or folders(os.environ, os.getuid()), dead_s=dead_s(os.environ))
    has_color = True if options.color else False if options.no_color else None
    try:
        return Commands(found, Terminal(os.environ, has_color), options).run()
    except KeyboardInterrupt:
        return 0
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        else:
            print(f"gpu-cache-smi: {type(error).__name__}: {error} (--debug tells where)", file=sys.stderr)
        return 1
