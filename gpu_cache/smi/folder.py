"""The report files of a machine: where they are, what is in them, and the locks that tell whose process lives."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu_cache.report import schema as report
from gpu_cache.smi import figures

_MAX_BYTES = 4 << 20  # the longest file to read: any process may have written it
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # no wait for the other end of a pipe

LockId = tuple[int, int, int]  # major and minor number of the device, inode


@dataclasses.dataclass(frozen=True)
class ReportFile:
    """One report. `content` is None where it could not be read; `problem` then says why."""

    path: Path
    content: Mapping[str, Any] | None
    modified: float = 0.0
    problem: str = ""
    is_denied: bool = False
    uid: int | None = None

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(report.REPORT)

    @property
    def title(self) -> str:
        """Its path, as messages have it."""
        return figures.printable(str(self.path))

    def beside(self, suffix: str) -> Path:
        """Another file of the same process."""
        return self.path.with_name(self.name + suffix)


def folders(environ: Mapping[str, str], uid: int, root: Path = Path("/")) -> list[Path]:
    """Where reports may be: one's own folder, and for root those of all users and of containers."""
    if named := environ.get(report.DIRECTORY_VARIABLE):
        return [Path(named)]
    if uid != 0:
        return [root / path.relative_to("/") for path in report.directories({}, uid)]
    patterns = ("dev/shm/gpu_cache-*", "tmp/gpu_cache-*", "proc/[0-9]*/root/dev/shm/gpu_cache-*")
    found = [Path(path) for pattern in patterns for path in sorted(glob.glob(str(root / pattern)))]
    return [path for path in found if not path.is_symlink()]  # any user may put one there


def read_folders(paths: Iterable[Path]) -> list[ReportFile]:
    """Every report in these folders, each folder once: that of a container may be the machine's own."""
    found: list[ReportFile] = []
    seen: set[tuple[int, int]] = set()
    for path in paths:
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                found += _read_folder(path)
        except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
            continue
        except OSError as error:
            found.append(ReportFile(path, None, problem=error.strerror or "", is_denied=True))
    return found


def _read_folder(path: Path) -> Iterator[ReportFile]:
    for name in sorted(filter(report.is_report, os.listdir(path))):
        try:
            yield _read(path / name)
        except FileNotFoundError:
            continue  # its process ended just now
        except OSError as error:
            is_denied = isinstance(error, PermissionError)
            yield ReportFile(path / name, None, problem=error.strerror or "", is_denied=is_denied)


def _read(path: Path) -> ReportFile:
    """Opened once, so that content and time are of one report while its writer renames the next into place."""
    descriptor = os.open(path, READ)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        modified = status.st_mtime
        raw = file.read(_MAX_BYTES) or b""  # None of a pipe without content
    try:
        content = json.loads(raw, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return ReportFile(path, None, modified, "truncated or damaged")
    if not isinstance(content, dict):
        return ReportFile(path, None, modified, "no report")
    return ReportFile(path, content, modified, uid=status.st_uid)


def holders(procfs: Path) -> dict[LockId, int]:
    """Pid, in the reader's namespace, of each holder of an exclusive `flock` that the kernel shows here."""
    found: dict[LockId, int] = {}
    with contextlib.suppress(OSError):
        for line in (procfs / "locks").read_text().splitlines():
            words = line.split()
            if len(words) >= 6 and words[1] == "FLOCK" and words[3] == "WRITE":
                major, minor, inode = words[5].split(":")
                found[int(major, 16), int(minor, 16), int(inode)] = int(words[4])
    return {lock: pid for lock, pid in found.items() if pid > 0}


def lock_id(path: Path) -> LockId | None:
    """How `/proc/locks` names this file."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return os.major(found.st_dev), os.minor(found.st_dev), found.st_ino


def is_held(path: Path) -> bool:
    """Whether a process holds the lock; no process holds a file that is gone.

    Raises:
        PermissionError: It cannot be asked.
    """
    try:
        descriptor = os.open(path, READ)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except PermissionError:
        raise
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def remove(file: ReportFile) -> bool:
    """Delete one report, unless a process holds the lock after all; whether it went."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(file.beside(report.LOCK), READ)
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        for suffix in report.SUFFIXES:
            file.beside(suffix).unlink(missing_ok=True)
    return True
