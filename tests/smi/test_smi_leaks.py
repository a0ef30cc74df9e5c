"""`--leaks` and `--gc`: what the tool asks of processes and what it deletes."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpu_cache.smi import leaks
from tests.support.smi_machine import Machine, add_trainers, matches_golden
from tests.support.smi_reports import report

pytestmark = pytest.mark.usefixtures("patient")

WIDTHS = pytest.mark.parametrize("width", [80, 100])
MIB = 1 << 20


def leak(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "key": f"8f2c1e0a-1111-4222-8333-44445555{0x9B11 + number:x}",
        "nbytes": 181 * MIB,
        "age_seconds": 4322.0 - number,
        "clears_survived": 9,
        "source": "gpu-a-023:35221",
        "dtype": "torch.bfloat16",
        "shape": [64, 8192, 181],
    } | changes


def answer(*found: dict[str, Any], num: int = 12) -> dict[str, Any]:
    outlived = {"outlived_entries": num, "outlived_bytes": 2172 * MIB}
    return {"schema_version": 1, "unix_time": 0.0, "pid": 41876, **outlived, "leaks": list(found)}


@contextmanager
def answering(folder: Path, text: str) -> Iterator[None]:
    """A writer that answers, as soon as it is asked."""
    is_over = threading.Event()

    def publish() -> None:
        while not is_over.wait(0.01):
            for wanted in folder.glob("*.want"):
                made = wanted.with_suffix(".tmp")
                made.write_text(text)
                wanted.unlink()
                made.rename(wanted.with_suffix(".leaks.json"))

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@WIDTHS
def test_the_entries_that_outlived_a_clear(node: Machine, width: int) -> None:
    add_trainers(node.folder)
    with answering(node.folder.path, json.dumps(answer(*map(leak, range(12))))):
        done = node.run("--leaks", "41876", width=width)
        assert matches_golden(f"leaks_{width}.txt", done.out)
        assert (done.err, done.code) == ("", 0)
        assert (
            len(node.run("--leaks", "actor/3", "--all", width=width).out.splitlines()) == len(done.out.splitlines()) + 1
        )


def test_more_than_the_process_tells_and_of_several_nodes(node: Machine) -> None:
    add_trainers(node.folder)
    found = [leak(0, dtype="torch.float8_e4m3fn"), leak(1, source="local", key="short", dtype="torch.int64", shape=[])]
    with answering(node.folder.path, json.dumps(answer(*found, leak(2), num=90))):
        out = node.run("--leaks", "41876").out
    assert "      ... 87 more\n" in out
    assert "Hint: 2 of the 3 oldest came from gpu-a-023; fetches from it failed 17 times." in out
    assert "f8_e4m3fn [64, 8192, 181]" in out
    assert "short                    i64       []" in out


def test_without_a_leak(node: Machine) -> None:
    add_trainers(node.folder)
    with answering(node.folder.path, json.dumps(answer(num=0) | {"outlived_bytes": 0})):
        done = node.run("--leaks", "41873")
    assert done.out == "GPU 0  pid 41873  actor/0      0 entries, 0B survived 2 or more clears\n"


def test_nonsense_for_an_answer_is_waited_out(node: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "ANSWER_TIMEOUT_S", 0.2)
    add_trainers(node.folder)
    with answering(node.folder.path, '{"leaks": '):
        assert node.run("--leaks", "41876").code == 1
    monkeypatch.setattr(leaks, "ANSWER_TIMEOUT_S", 30.0)
    with answering(node.folder.path, '{"leaks": [3, {"key": 4, "shape": "x"}], "outlived_entries": "x"}'):
        assert node.run("--leaks", "41876").code == 0


@pytest.mark.parametrize(("pid", "why"), [("41878", "no report for 47 s"), ("41879", "it ended without cleanup")])
def test_a_process_that_does_not_answer(node: Machine, monkeypatch: pytest.MonkeyPatch, pid: str, why: str) -> None:
    monkeypatch.setattr(leaks, "ANSWER_TIMEOUT_S", 0.1)
    add_trainers(node.folder)
    done = node.run("--leaks", pid)
    assert (done.code, done.out) == (1, "")
    assert why in done.err
    assert not list(node.folder.path.glob("*.want"))


def test_an_old_answer_does_not_count(node: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "ANSWER_TIMEOUT_S", 3.0)
    add_trainers(node.folder)
    process = next(process for process in node.look().processes if process.pid == "41876")
    path = process.file.beside(".leaks.json")
    path.write_text(json.dumps(answer(leak(0))))
    os.utime(path, (time.time() - 5,) * 2)
    sleeps: list[float] = []
    assert leaks.ask(process, sleeps.append) is None
    assert sum(sleeps) == pytest.approx(3.0)

    def publish(_: float) -> None:
        os.utime(path)

    assert leaks.ask(process, publish) is not None


def test_a_process_that_may_not_be_asked(node: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    add_trainers(node.folder)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(leaks, "ask", refuse)
    done = node.run("--leaks", "41876")
    assert (done.code, done.err) == (4, "gpu-cache-smi: pid 41876 may not be asked: Permission denied\n")


def names(node: Machine) -> set[str]:
    return {path.name.rpartition("-")[0] for path in node.folder.path.iterdir()}


def test_gc_removes_reports_of_dead_processes(node: Machine) -> None:
    add_trainers(node.folder)
    node.folder.write("actor-9-1-ffffff", "{")
    (node.folder.path / "actor-6-41879-0a1b2c.leaks.json").touch()
    done = node.run("--gc")
    assert done.code == 0
    assert [line.rpartition("/")[2] for line in done.out.splitlines()] == [
        "actor-6-41879-0a1b2c.json",
        "actor-9-1-ffffff.json",
    ]
    assert names(node) == {f"actor-{rank}-{41873 + rank}" for rank in (0, 1, 2, 3, 4, 5, 7)}


def test_gc_spares_a_process_that_took_its_lock_meanwhile(node: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    path = node.folder.add(report(6), is_alive=False)
    look = node.observer.look

    def look_then_lock() -> object:
        found = look()
        descriptor = os.open(path.with_suffix(".lock"), os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        node.folder._locks[path.stem] = descriptor
        return found

    monkeypatch.setattr(node.observer, "look", look_then_lock)
    assert node.run("--gc").out == ""
    assert path.exists()


def test_gc_that_may_not_is_4(node: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    node.folder.add(report(6), is_alive=False)
    unlink: Callable[..., None] = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".json":
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    done = node.run("--gc")
    assert (done.code, done.out) == (4, "")
    assert "may not remove" in done.err


def test_gc_goes_on_behind_what_cannot_be_removed_and_waits_for_no_pipe(node: Machine) -> None:
    for number, make in enumerate((os.mkfifo, os.mkdir, Path.touch)):
        node.folder.write(f"actor-{number}-1-ffffff", "{")
        make(node.folder.path / f"actor-{number}-1-ffffff.lock")
    os.mkdir(node.folder.path / "actor-3-1-\x1b[2J.json")
    done = node.run("--gc")
    assert [line.rpartition("/")[2] for line in done.out.splitlines()] == [
        "actor-0-1-ffffff.json",
        "actor-2-1-ffffff.json",
    ]
    told = [line.rpartition("/")[2] for line in done.err.splitlines()]
    assert told == ["actor-1-1-ffffff.json: Is a directory", "actor-3-1-?[2J.json: Is a directory"]
    assert done.code == 4


def test_pipes_in_the_place_of_files_are_not_waited_for(node: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    add_trainers(node.folder)
    monkeypatch.setattr(leaks, "ANSWER_TIMEOUT_S", 0.1)
    for suffix in (".want", ".leaks.json"):
        os.mkfifo(node.folder.path / f"actor-3-41876-0a1b2c{suffix}")
    report_pipe = node.folder.path / "actor-9-1-ffffff.json"
    os.mkfifo(report_pipe)
    descriptors = [os.open(path, os.O_RDWR) for path in (report_pipe, *node.folder.path.glob("*.leaks.json"))]
    try:
        assert node.run("--leaks", "41876").code == 1
        assert "actor-9-1-ffffff.json cannot be shown: truncated or damaged" in " ".join(node.screen().split())
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@pytest.mark.parametrize("named", ["41876", "actor/3", "actor"])
def test_a_process_is_named_by_pid_or_role(node: Machine, named: str) -> None:
    add_trainers(node.folder)
    with answering(node.folder.path, json.dumps(answer(leak(0)))):
        assert node.run("--leaks", named).out.startswith("GPU 3  pid 41876  actor/3")
    assert node.run("--leaks", "critic").err == "gpu-cache-smi: no process with a cache has the pid or role critic\n"
