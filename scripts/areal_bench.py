"""Time AReaL's own servers with this project's switch off and on, in turns: run it with a Python that has AReaL.

Two sets of processes, each of two of AReaL's rpc servers and a caller, which differ in GPU_CACHE_AREAL alone. A read is
one `/call` with a batch of handles, from the first byte of the message to the answer: handles are encoded, sent,
decoded and read, as with each call of a controller's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
START_S = 300.0
# Whole, and parts of which AReaL's JSON takes about a second.
FRACTIONS = {"rollout": 1.0, "distillation": 0.25, "vision": 0.25}
MESSAGE_FRACTION = 0.02


class Side:
    """AReaL's processes with the switch off or on. A context manager: leaving it ends them.

    Args:
        folder: For logs, and for the addresses of the servers.
        is_on: The switch.
    """

    def __init__(self, folder: Path, is_on: bool) -> None:
        self._folder, self._name = folder / ("on" if is_on else "off"), "on" if is_on else "off"
        self._folder.mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GPU_CACHE_")}
        paths = {"PYTHONPATH": str(SCRIPTS), "PYTHONSAFEPATH": "1"}
        self._environment = kept | paths | {"GPU_CACHE_AREAL": str(int(is_on)), "GPU_CACHE_STATS": "0"}
        self._stack = contextlib.ExitStack()
        self._addresses = [self._serve(role) for role in ("owner", "consumer")]

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def wait(self) -> None:
        """Wait for the servers, and start the caller."""
        for address in self._addresses:
            _wait_for(address)
        caller = [sys.executable, str(SCRIPTS / "bench" / "areal_caller.py"), *self._addresses]
        self._caller = self._start(caller, "caller", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._answer("ready")

    def ask(self, what: str, name: str, fraction: float) -> dict[str, Any]:
        """One round of a workload."""
        assert self._caller.stdin is not None
        self._caller.stdin.write(json.dumps([what, name, fraction]) + "\n")
        self._caller.stdin.flush()
        return dict(json.loads(self._answer("{")))

    def _answer(self, start: str) -> str:
        assert self._caller.stdout is not None
        while not (line := self._caller.stdout.readline()).startswith(start):  # AReaL's log is there too
            if not line:
                raise SystemExit((self._folder / "caller.log").read_text()[-4000:])
        return line

    def _serve(self, role: str) -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "areal.infra.rpc.rpc_server", "--host", "127.0.0.1", "--port", str(port)]
        names = ["--experiment-name", "bench", "--trial-name", self._name, "--role", role, "--worker-index", "0"]
        folders = ["--nfs-record-root", str(self._folder / "names"), "--fileroot", str(self._folder)]
        self._start([*command, *names, *folders], role)
        return f"127.0.0.1:{port}"

    def _start(self, command: list[str], name: str, **pipes: Any) -> subprocess.Popen[str]:
        log = self._stack.enter_context((self._folder / f"{name}.log").open("w"))
        pipes = {"stdout": log, **pipes}
        process = subprocess.Popen(command, env=self._environment, cwd=self._folder, stderr=log, text=True, **pipes)
        self._stack.callback(_end, process)
        return process


def measure(sides: dict[str, Side], num_rounds: int) -> dict[str, Any]:
    """Medians of rounds in turns, after one that does not count; ratios are of terms of the same round."""
    found: dict[str, Any] = {}
    for name, fraction in FRACTIONS.items():
        rounds = [
            {side: one.ask("measure", name, fraction) for side, one in sides.items()} for _ in range(num_rounds + 1)
        ]
        found[name] = _summed_up(rounds[1:])
        found[name] |= {f"message_{side}": one.ask("message", name, MESSAGE_FRACTION) for side, one in sides.items()}
    return found


def _summed_up(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for figure in ("first_s", "second_s", "clear_s"):
        for side in ("off", "on"):
            figures[f"{figure}_{side}"] = statistics.median(one[side][figure] for one in rounds)
        ratios = [one["off"][figure] / one["on"][figure] for one in rounds]
        figures[f"{figure.removesuffix('_s')}_ratio"] = statistics.median(ratios)
        figures[f"{figure.removesuffix('_s')}_ratios"] = [min(ratios), max(ratios)]
    return figures


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + START_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            opener.open(f"http://{address}/health", timeout=10).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


@contextlib.contextmanager
def both() -> Iterator[dict[str, Side]]:
    """The processes of both sides, ready."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(Side(Path(folder), name == "on")) for name in ("off", "on")}
        for side in sides.values():
            side.wait()
        yield sides


def table(found: dict[str, Any]) -> str:
    """The figures as a table in Markdown, with the switch off and on."""
    lines = [
        "| batch | first read, ms: off; on | times as fast | second read, ms: off; on | times as fast "
        "| message with read handles, bytes: off; on |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        cells = [f"{name}, {FRACTIONS[name]:g} of it"]
        for what in ("first", "second"):
            off, on = (one[f"{what}_s_{side}"] * 1e3 for side in ("off", "on"))
            cells += [f"{off:,.0f}; {on:,.0f}", f"{one[f'{what}_ratio']:.1f}"]
        off, on = (one[f"message_{side}"]["localized_message_bytes"] for side in ("off", "on"))
        lines.append(f"| {' | '.join([*cells, f'{off:,}; {on:,}'])} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    with both() as sides:
        found = measure(sides, options.rounds)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
