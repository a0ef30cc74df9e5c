"""Processes that share one import of AReaL, which takes seconds: each is a fork that runs a program from its start.

Reads commands, one JSON list a line: the program (a module's name, or a script's path), the file for what it prints,
and its arguments. Answers each with the process's id. Ends its processes when its input ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
import types

import areal

# AReaL's actor, without its trainers, which need packages that are not installed.
trainer = types.ModuleType("areal.trainer")
trainer.__path__ = [f"{areal.__path__[0]}/trainer"]
sys.modules |= {"areal.trainer": trainer, "datasets": types.SimpleNamespace(Dataset=object)}  # type: ignore[dict-item]

# All that the programs import; a fork then runs them as `python -m` would.
SHARED = ("rpc.guard.app", "rpc.guard.data_blueprint", "rpc.guard.engine_blueprint", "controller")
for name in (*(f"areal.infra.{name}" for name in SHARED), "areal.trainer.ppo.actor"):
    importlib.import_module(name)


def run(program: str, log: str, *arguments: str) -> None:
    """Never returns."""
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT, 0o600), 1)
        os.dup2(1, 2)
        sys.argv = [program, *arguments]
        (runpy.run_path if program.endswith(".py") else runpy.run_module)(program, run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    children = []
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            run(*json.loads(line))
        children.append(pid)
        print(f"child {pid}", flush=True)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
