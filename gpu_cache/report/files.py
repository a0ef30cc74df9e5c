"""The files of one cache in the directory of reports: lock, report, answer to who asks for leaks."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from gpu_cache.report.schema import GROUP_VARIABLE, LEAKS, LOCK, REPORT, WANT, directories, refusal

_OLD_S = 3600.0  # after which what a process left that ended without cleanup goes
_NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
# Names that these files have, also on the way to them: the directory may be one that holds other things.
_OURS = re.compile(r"\.?\w+-\d+-\d+-[0-9a-f]{6}\.[a-z.]+(\.[0-9a-f]{8})?")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class HostileDirectoryError(Exception):
    """Others could change what is written there."""


class ReportFiles:
    """Writes into the first usable directory of several. Whatever was deleted is made anew at the next write.

    Args:
        name: Of the files, without what follows it.
        folders: Where to write, in order of preference.
        group: Whose members may read; None: only this user may.
    Thread-safety: one call at a time; the owner takes turns.
    """

    def __init__(self, name: str, folders: Sequence[Path], group: int | None = None) -> None:
        self.name = name
        self.folder: Path | None = None  # where it wrote last
        self._folders, self._group = folders, group
        self._lock: int | None = None  # descriptor; the kernel frees the lock when the last process closes it

    def __repr__(self) -> str:
        return f"ReportFiles({self.folder or 'nowhere yet'}, {self.name})"

    def write(self, content: bytes, leaks: Callable[[], bytes]) -> None:
        """Replace the report, and answer if somebody asked for leaks.

        Raises:
            HostileDirectoryError: Nothing may be written there.
            OSError: It cannot be written now.
        """
        with self._opened() as folder:
            if not self._holds_lock(folder):
                self._take_lock(folder)
                _remove_old(folder)
            self._replace(folder, REPORT, content)
            if _unlink(self.name + WANT, folder):  # first: who asks again while the answer is written gets another
                self._replace(folder, LEAKS, leaks())

    def remove(self) -> None:
        """Leave nothing behind, and let go of the lock. Idempotent."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with contextlib.suppress(OSError, HostileDirectoryError), self._opened() as folder:
                _unlink_all(self.name, folder)
            os.close(lock)

    def disown(self) -> None:
        """In a forked child: the files are the parent's. Closes; an unlock would free the parent's lock."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """A descriptor of the directory, made if need be, which nobody can exchange for another on the way."""
        self.folder, descriptor = self._open()
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self) -> tuple[Path, int]:
        errors: list[OSError] = []
        for path in self._folders:
            try:
                with contextlib.suppress(FileExistsError):
                    self._make(path)
                return path, self._checked(path)
            except OSError as error:
                errors.append(error)
        raise errors[0]

    def _make(self, path: Path) -> None:
        os.mkdir(path, 0o700)
        if self._group is not None:
            os.chown(path, -1, self._group)
            os.chmod(path, 0o2770)

    def _checked(self, path: Path) -> int:
        found = os.lstat(path)
        problem = refusal(found, os.geteuid(), self._group)
        if problem is None:
            descriptor = os.open(path, _FOLDER)
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
            os.close(descriptor)
            problem = "was exchanged for another just now"
        raise HostileDirectoryError(f"{path} {problem}")

    def _holds_lock(self, folder: int) -> bool:
        """Whether the file that readers probe is the one that is locked."""
        if self._lock is None:
            return False
        try:
            found = os.stat(self.name + LOCK, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._lock))

    def _take_lock(self, folder: int) -> None:
        """Lock a new file before it gets its name, so that no reader meets a living process without a lock."""
        self.disown()  # of the one before, whose file is gone
        with self._new_file(folder, LOCK) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 0)

    def _replace(self, folder: int, suffix: str, content: bytes) -> None:
        with self._new_file(folder, suffix) as descriptor:
            left = memoryview(content)
            while left:
                left = left[os.write(descriptor, left) :]

    @contextlib.contextmanager
    def _new_file(self, folder: int, suffix: str) -> Iterator[int]:
        """A file that gets its name, and replaces the one before, when the block is done."""
        temporary = f".{self.name}{suffix}.{secrets.token_hex(4)}"
        descriptor = os.open(temporary, _NEW, 0o600, dir_fd=folder)
        try:
            if self._group is not None:
                os.fchown(descriptor, -1, self._group)
                os.fchmod(descriptor, 0o640)
            yield descriptor
            os.rename(temporary, self.name + suffix, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            _unlink(temporary, folder)
            raise
        finally:
            os.close(descriptor)


def report_files(name: str, environ: Mapping[str, str]) -> ReportFiles:
    """Files where the environment says.

    Raises:
        HostileDirectoryError: The group that is to read them does not exist.
    """
    return ReportFiles(name, directories(environ, os.geteuid()), _group_of(environ.get(GROUP_VARIABLE, "")))


def _group_of(named: str) -> int | None:
    if not named or named.isdecimal():
        return int(named) if named else None
    try:
        return grp.getgrnam(named).gr_gid
    except KeyError:
        raise HostileDirectoryError(f"there is no group {named!r} ({GROUP_VARIABLE})") from None


def _unlink(name: str, folder: int) -> bool:
    """Whether it was there."""
    try:
        os.unlink(name, dir_fd=folder)
    except OSError:
        return False
    return True


def _unlink_all(name: str, folder: int) -> None:
    """The lock last: while it is there, readers know what the others are."""
    for suffix in (REPORT, WANT, LEAKS, LOCK):
        _unlink(name + suffix, folder)


def _remove_old(folder: int) -> None:
    """Remove what this user's processes left that ended without cleanup more than an hour ago."""
    for name in os.listdir(folder):
        match = _OURS.fullmatch(name)
        with contextlib.suppress(OSError):
            if match is None or not _is_old(name, folder):
                continue
            if name.startswith("."):
                _unlink(name, folder)
            elif name.endswith(LOCK):
                _remove_if_dead(name.removesuffix(LOCK), folder)


def _is_old(name: str, folder: int) -> bool:
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    return found.st_uid == os.geteuid() and time.time() - found.st_mtime > _OLD_S


def _remove_if_dead(name: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not _is_old(name + REPORT, folder):
            return
    lock = os.open(name + LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _unlink_all(name, folder)
    finally:
        os.close(lock)
