"""Reading reports: states, identities, and files that are not what they should be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_cache.smi import folder
from gpu_cache.smi.folder import folders, read_folders
from gpu_cache.smi.node import Observer
from gpu_cache.smi.nvml import Nvml
from tests.support.smi_machine import Machine, add_trainers
from tests.support.smi_nvml import FakeNvml
from tests.support.smi_reports import NOW, report

WRITER = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a report in `tmp_path`, and reports no more."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "actor-0-1-0a1b2c.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (tmp_path / "actor-0-1-0a1b2c.json").write_text(json.dumps(report(0)))
        yield process
        process.kill()


def test_states_of_a_real_process(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    """Killed it is dead at once; stopped it hangs, and is back with its next report."""
    observer = Observer(lambda: [tmp_path], nvml=Nvml(FakeNvml()))
    path = tmp_path / "actor-0-1-0a1b2c.json"

    def state() -> str:
        return observer.look().processes[0].state

    assert observer.look().processes[0].host_pid == writer.pid
    assert state() == "ok"
    writer.send_signal(signal.SIGSTOP)
    os.utime(path, (time.time() - 11,) * 2)
    assert state() == "hung"
    writer.send_signal(signal.SIGCONT)
    os.utime(path)
    assert state() == "ok"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert state() == "dead"


def test_a_report_is_never_seen_half_while_its_writer_renames(node: Machine) -> None:
    path = node.folder.add(report(0), host_pid=41873)
    other = path.with_suffix(".tmp")
    code = (
        "import os, sys; text = open(sys.argv[1]).read()\n"
        "while True:\n"
        "    open(sys.argv[2], 'w').write(text); os.rename(sys.argv[2], sys.argv[1])"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path), str(other)]) as process:
        try:
            for _ in range(300):
                (found,) = read_folders([node.folder.path])
                assert found.content is not None, found
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("age_s", "is_alive", "changes", "state"),
    [
        (0.5, True, {}, "ok"),
        (9.9, True, {}, "ok"),
        (10.0, True, {}, "hung"),
        (9.9, True, {"outlived_entries": 1}, "leak"),
        (10.0, True, {"outlived_entries": 1}, "hung"),
        (0.5, False, {"outlived_entries": 1}, "dead"),
        (3000.0, False, {}, "dead"),
        (0.5, True, {"schema_version": 2}, "newer"),
        (0.5, False, {"schema_version": 2}, "newer"),
        (-5.0, True, {}, "ok"),
    ],
)
def test_states(node: Machine, age_s: float, is_alive: bool, changes: dict[str, int], state: str) -> None:
    node.folder.add(report(0, **changes), age_s=age_s, is_alive=is_alive)
    assert node.look().states == {state: 1}


def test_a_hung_process_keeps_ageing(node: Machine) -> None:
    node.folder.add(report(0, oldest_entry_age_seconds=80.0), age_s=0.0)
    node.folder.now += 47
    assert node.look().processes[0].oldest_age_s == 127.0


def test_reports_that_show_no_figures(node: Machine) -> None:
    node.folder.add(report(0), is_alive=False)
    node.folder.add(report(1, schema_version=2))
    for process in node.look().processes:
        assert (process.figure("device_bytes"), process.rate("fetch_bytes_per_second"), process.sources) == (
            None,
            None,
            {},
        )


def test_a_process_is_matched_by_uuid_never_by_index(node: Machine) -> None:
    node.folder.add(report(5, device="cuda:0"), host_pid=41878)
    process = node.look().processes[0]
    assert (process.seat, process.memory_bytes) == ("5", (98459 - 4) << 20)


def test_pids_of_another_namespace_come_from_the_kernels_list(node: Machine) -> None:
    node.folder.add(report(0, pid=7, pid_namespace=1), host_pid=41873)
    node.folder.add(report(1, pid=7, pid_namespace=1))
    assert [process.pid for process in node.look().processes] == ["41873", "?"]
    assert node.look().processes[0].memory_bytes is not None


@pytest.mark.parametrize("text", ["", '{"schema_version": 1, "pi', "[1, 2]", "[" * 100_000, "null", "1" * 10_000])
def test_damaged_reports_are_named_and_harm_no_other(node: Machine, text: str) -> None:
    node.folder.add(report(0), host_pid=41873)
    node.folder.write("actor-1-41874-ffffff", text)
    found = node.look()
    assert (len(found.processes), len(found.unread)) == (1, 1)
    assert "NOTE  " in node.run().err
    assert json.loads(node.run("--json").out)["problems"][0]["code"] == "damaged_report"


def test_reports_of_nonsense_are_shown_as_unknown(node: Machine) -> None:
    odd = dict.fromkeys(report(0), "x") | {"schema_version": 1, "role": "a\x1b[2Jb", "rank": [], "sources": {"\r": 1}}
    node.folder.add(odd)
    node.folder.add({"schema_version": 1, "num_entries": float("nan"), "device_bytes": True, "rates_10s": 3})
    node.folder.add(report(2) | dict.fromkeys(("num_entries", "device_bytes", "fetch_bytes", "hits"), 10**400))
    for arguments in ([], ["--json"], ["--prom"], ["--dmon"], ["--watch", "-c", "1"], ["--query-proc=pid,pool.used"]):
        done = node.run(*arguments)
        assert done.code == 0
        assert "\x1b" not in done.out
    assert "a?[2Jb" in node.run().out


def test_files_that_are_no_reports_are_left_alone(node: Machine) -> None:
    path = node.folder.add(report(0), host_pid=41873)
    (path.parent / "x-0-1-0a1b2c.leaks.json").write_text("{}")
    (path.parent / ".hidden.json").write_text("{}")
    (path.parent / "link-0-1-0a1b2c.json").symlink_to(path)
    os.mkfifo(path.parent / "pipe-0-1-0a1b2c.json")
    found = node.look()
    assert len(found.processes) == 1
    assert {file.name for file in found.unread} == {"link-0-1-0a1b2c", "pipe-0-1-0a1b2c"}


def test_a_folder_is_read_once_however_it_is_named(node: Machine, tmp_path: Path) -> None:
    node.folder.add(report(0))
    (tmp_path / "again").symlink_to(node.folder.path)
    assert len(read_folders([node.folder.path, tmp_path / "again", tmp_path / "none"])) == 1


def test_where_reports_are_looked_for(tmp_path: Path) -> None:
    for path in ("dev/shm/gpu_cache-5", "tmp/gpu_cache-6", "proc/77/root/dev/shm/gpu_cache-0", "proc/x/root/dev/shm"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "tmp/gpu_cache-7").symlink_to(tmp_path)
    assert folders({"GPU_CACHE_STATS_DIR": "/a"}, 0, tmp_path) == [Path("/a")]
    assert folders({}, 5, tmp_path) == [tmp_path / "dev/shm/gpu_cache-5", tmp_path / "tmp/gpu_cache-5"]
    found = [str(path.relative_to(tmp_path)) for path in folders({}, 0, tmp_path)]
    assert found == ["dev/shm/gpu_cache-5", "tmp/gpu_cache-6", "proc/77/root/dev/shm/gpu_cache-0"]


def test_a_machine_whose_locks_cannot_be_seen(node: Machine, tmp_path: Path) -> None:
    assert folder.holders(tmp_path / "none") == {}
    assert not folder.is_held(tmp_path / "none")
    add_trainers(node.folder)
    (node.folder.procfs / "locks").unlink()
    assert next(process.host_pid for process in node.look().processes if process.is_alive) == 41873


def test_a_folder_or_a_lock_that_may_not_be_opened(node: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a process lives is then told by the kernel's list alone."""
    node.folder.add(report(0), host_pid=41873)
    node.folder.add(report(1), is_alive=False)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("gpu_cache.smi.folder.is_held", refuse)
        assert node.look().states == {"ok": 1, "dead": 1}
    monkeypatch.setattr("gpu_cache.smi.folder.os.listdir", refuse)
    (unread,) = node.look().unread
    assert (unread.path, unread.is_denied, unread.problem) == (node.folder.path, True, "Permission denied")
    assert node.run().code == 4


def test_the_clock_of_the_screen_is_that_of_the_look(node: Machine) -> None:
    assert node.look().unix_time == NOW
