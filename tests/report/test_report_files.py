"""Lock, report and answers in the directory of reports."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_cache.report import files as files_module
from gpu_cache.report.files import HostileDirectoryError, ReportFiles, problem_of
from gpu_cache.report.schema import report_name
from gpu_cache.smi.folder import is_held

ROOT = Path(__file__).parents[2]
NAME = "actor-0-7-0a1b2c"
HOUR_AGO = 3700.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "stats"


def files_in(folder: Path, name: str = NAME) -> ReportFiles:
    return ReportFiles(name, {"GPU_CACHE_STATS_DIR": str(folder)})


@pytest.fixture
def files(folder: Path) -> Iterator[ReportFiles]:
    made = files_in(folder)
    yield made
    made.remove()


def write(files: ReportFiles, content: bytes = b"{}") -> None:
    files.write(content, lambda: b"[]")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def age(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_nothing_is_there_before_the_first_write(files: ReportFiles, folder: Path) -> None:
    assert not folder.exists()
    write(files)
    assert names(folder) == [f"{NAME}.json", f"{NAME}.lock"]
    assert {oct((folder / name).stat().st_mode) for name in names(folder)} == {"0o100600"}
    assert oct(folder.stat().st_mode) == "0o40700"
    files.remove()
    files.remove()
    assert names(folder) == []


def test_the_lock_is_held_until_the_files_go(files: ReportFiles, folder: Path) -> None:
    write(files)
    lock = folder / f"{NAME}.lock"
    assert is_held(lock)
    write(files, b"second")
    assert is_held(lock)
    assert (folder / f"{NAME}.json").read_bytes() == b"second"
    files.disown()
    assert not is_held(lock)
    assert f"{NAME}.json" in names(folder), "what a process leaves is its last known state"


def test_a_lock_gets_its_name_when_it_is_locked(
    files: ReportFiles, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, held = os.rename, []

    def watched(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        if target.endswith(".lock"):
            held.append(is_held(folder / source))
        rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "rename", watched)
    write(files)
    assert held == [True]


@pytest.mark.parametrize("what", ["directory", "lock", "replaced lock"])
def test_the_next_write_brings_back_deleted_files(files: ReportFiles, folder: Path, what: str) -> None:
    write(files)
    lock = folder / f"{NAME}.lock"
    if what == "directory":
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    else:
        lock.unlink()
        if what == "replaced lock":
            lock.touch()
    write(files)
    assert is_held(lock)
    assert names(folder) == [f"{NAME}.json", f"{NAME}.lock"]


def test_a_reader_that_asks_for_leaks_is_answered_once(files: ReportFiles, folder: Path) -> None:
    write(files)
    (folder / f"{NAME}.want").touch()
    asked: list[bool] = []

    def leaks() -> bytes:
        asked.append((folder / f"{NAME}.want").exists())
        return b'{"leaks": []}'

    files.write(b"{}", leaks)
    files.write(b"{}", leaks)
    assert asked == [False], "the question goes before the answer is there"
    assert json.loads((folder / f"{NAME}.leaks.json").read_text()) == {"leaks": []}


@pytest.mark.parametrize(
    ("mode", "group", "expected"),
    [
        (0o700, None, None),
        (0o755, None, None),
        (0o770, None, "is writable by its group"),
        (0o2770, "ours", None),
        (0o777, None, "is writable by others"),
        (0o777, "ours", "is writable by others"),
    ],
)
def test_a_directory_that_others_may_write_is_refused(
    tmp_path: Path, mode: int, group: str | None, expected: str | None
) -> None:
    tmp_path.chmod(mode)
    found = os.lstat(tmp_path)
    assert problem_of(found, found.st_gid if group else None) == expected


def test_a_link_a_file_and_another_users_directory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(tmp_path)
    file.touch()
    uid = os.geteuid()
    assert problem_of(os.lstat(link), None) == "is a link"
    assert problem_of(os.lstat(file), None) == "is no directory"
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert problem_of(os.lstat(tmp_path), None) == f"belongs to user {uid}, not {uid + 1}"


def test_a_directory_that_is_exchanged_after_the_check_gets_nothing(
    files: ReportFiles, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(mode=0o700)

    def exchanged(found: os.stat_result, group: int | None) -> str | None:
        folder.rename(tmp_path / "checked")
        folder.mkdir(mode=0o777)
        return problem_of(found, group)

    monkeypatch.setattr(files_module, "problem_of", exchanged)
    write(files)
    monkeypatch.undo()
    assert names(folder) == []
    assert names(tmp_path / "checked") == [f"{NAME}.json", f"{NAME}.lock"]


def test_a_hostile_directory_is_refused(files: ReportFiles, folder: Path, tmp_path: Path) -> None:
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with pytest.raises(HostileDirectoryError, match="is writable by others"):
        write(files)
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostileDirectoryError, match="is a link"):
        write(files)
    assert names(tmp_path / "elsewhere") == []


def test_a_directory_of_another_user_is_refused(
    files: ReportFiles, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(HostileDirectoryError, match="belongs to user"):
        write(files)
    assert names(folder) == []


def test_a_directory_that_turns_hostile_is_not_written_any_more(files: ReportFiles, folder: Path) -> None:
    write(files)
    folder.chmod(0o777)
    with pytest.raises(HostileDirectoryError):
        write(files, b"more")
    assert (folder / f"{NAME}.json").read_bytes() == b"{}"
    lock = folder / f"{NAME}.lock"
    assert is_held(lock)
    files.remove()
    assert not is_held(lock), "closed, though the files may not be touched"
    folder.chmod(0o700)


def test_the_next_directory_is_taken_where_the_first_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / "missing/stats", tmp_path / "stats"]
    monkeypatch.setattr(files_module, "directories", lambda environ, uid: places)
    files = ReportFiles(NAME, {})
    write(files)
    assert names(tmp_path / "stats") == [f"{NAME}.json", f"{NAME}.lock"]
    files.remove()
    places.pop()
    with pytest.raises(FileNotFoundError):
        write(files)


def test_members_of_a_group_may_read(tmp_path: Path) -> None:
    gid = os.getgid()
    files = ReportFiles(NAME, {"GPU_CACHE_STATS_DIR": str(tmp_path / "shared"), "GPU_CACHE_STATS_GROUP": str(gid)})
    write(files)
    assert oct((tmp_path / "shared").stat().st_mode) == "0o42770"
    assert {oct(path.stat().st_mode) for path in (tmp_path / "shared").iterdir()} == {"0o100640"}
    files.remove()
    for named in ("nobody-has-this", "4294967295", "99999999999", "9" * 5000):
        with pytest.raises(HostileDirectoryError, match=f"no group '{named}'"):
            ReportFiles(NAME, {"GPU_CACHE_STATS_GROUP": named})


def test_a_time_that_is_none_is_warned_of_by_the_variables_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = ReportFiles(NAME, {"GPU_CACHE_STATS_DIR": str(tmp_path / "stats"), "GPU_CACHE_STATS_DEAD_S": "1h"})
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "GPU_CACHE_STATS_DEAD_S='1h': must be a number of seconds, at least 0; math.inf means no limit; taken as 3600"
    )
    write(files)
    assert f"{NAME}.json" in names(tmp_path / "stats")
    files.remove()


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one page."""
    path = tmp_path / "tiny"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k,mode=700", "tmpfs", str(path)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_leaves_the_report_before(tiny: Path) -> None:
    files = files_in(tiny)
    write(files, b"x" * 4096)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as caught:
            write(files, b"y" * 4096)
        assert caught.value.errno == errno.ENOSPC
        assert names(tiny) == [f"{NAME}.json", f"{NAME}.lock"], "nothing half-written stays"
    assert (tiny / f"{NAME}.json").read_bytes() == b"x" * 4096
    files.remove()


SHORT_FILES = """
import errno, resource, sys
from gpu_cache.report.files import ReportFiles
files = ReportFiles(sys.argv[1], {"GPU_CACHE_STATS_DIR": sys.argv[2]})
files.write(b"{}", lambda: b"")
resource.setrlimit(resource.RLIMIT_FSIZE, (3, 3))  # the kernel writes so many bytes of a longer file
for content in (b"a" * 4, b"a" * 100_000):  # with and without a buffer
    try:
        files.write(content, lambda: b"")
    except OSError as error:
        assert error.errno == errno.EFBIG, error
    else:
        sys.exit("it was written")
"""


def test_a_write_that_fails_half_way_leaves_nothing(folder: Path) -> None:
    command = [sys.executable, "-c", SHORT_FILES, NAME, str(folder)]
    subprocess.run(command, check=True, timeout=60, cwd=ROOT)
    assert names(folder) == [f"{NAME}.json", f"{NAME}.lock"]
    assert (folder / f"{NAME}.json").read_bytes() == b"{}"


def test_two_processes_of_one_pid_do_not_meet(folder: Path) -> None:
    both = [files_in(folder, report_name("actor", 0, 1)) for _ in range(2)]
    for files in both:
        write(files)
    assert len(names(folder)) == 4
    both[0].remove()
    assert is_held(folder / f"{both[1].name}.lock")
    both[1].remove()


def test_a_new_process_removes_reports_of_long_dead_processes(folder: Path) -> None:
    folder.mkdir()
    dead, recent, alive, stopped = (f"actor-{rank}-9-00000{rank}" for rank in range(4))
    living = files_in(folder, alive)
    write(living)
    for name in (dead, recent, stopped):
        (folder / f"{name}.lock").touch()
        (folder / f"{name}.json").touch()
    (folder / f".{dead}.json.01234567").touch()
    foreign = [".profile", "poetry.lock", "notes.json"]
    for name in foreign:
        (folder / name).touch()
    for path in folder.iterdir():
        if recent not in path.name:
            age(path, HOUR_AGO)
    age(folder / f"{stopped}.json", -HOUR_AGO)
    newcomer = files_in(folder)
    write(newcomer)
    left = {re.sub(r"\.(lock|json)$", "", name) for name in names(folder)} - {NAME}
    assert left == {recent, alive, stopped, ".profile", "poetry", "notes"}
    living.remove()
    newcomer.remove()


def test_a_reader_never_meets_half_a_report(files: ReportFiles, folder: Path) -> None:
    write(files, json.dumps("a" * 9000).encode())
    done = threading.Event()
    seen: set[int] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(len(json.loads((folder / f"{NAME}.json").read_bytes())))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(2000):
        write(files, json.dumps("a" * (9000 - number % 2)).encode())
    done.set()
    reader.join(30)
    assert seen <= {9000, 8999}
    assert seen


FORK = """
import os, sys, time
from gpu_cache.report.files import ReportFiles
files = ReportFiles("actor-0-7-0a1b2c", {"GPU_CACHE_STATS_DIR": sys.argv[1]})
files.write(b"{}", lambda: b"")
os.register_at_fork(after_in_child=files.disown)
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


def test_a_child_that_outlives_its_parent_does_not_keep_it_alive(folder: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", FORK, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    lock = folder / f"{NAME}.lock"
    try:
        assert is_held(lock), "the child closed it, and did not unlock it"
        parent.kill()
        parent.wait(30)
        os.kill(child, 0)
        assert not is_held(lock)
    finally:
        parent.stdout.close()
        os.kill(child, signal.SIGKILL)
