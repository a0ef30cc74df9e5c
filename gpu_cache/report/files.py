"""The files of one cache in the directory of reports: lock, report, list of leaks."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gpu_cache.report.schema import DEAD_S, GROUP_VARIABLE, LEAKS, LOCK, REPORT, SUFFIXES, WANT, dead_s, directories

logger = logging.getLogger(__name__)

_NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_GROUP = (1 << 32) - 1
# Names that these files have, also on the way to them: the directory may be one that holds other things.
_OURS = re.compile(r"\.?\w+-\d+-\d+-[0-9a-f]{6}\.[a-z.]+(\.[0-9a-f]{8})?")


class HostileDirectoryError(Exception):
    """Other users could change what a process writes there."""


class ReportFiles:
    """Writes into the first usable directory. The next write brings back whatever was deleted.

    Args:
        name: The part that the names of all these files begin with.
        environ: Names the directory, and the group whose members may read.
    Raises:
        HostileDirectoryError: There is no such group.
    Thread-safety: one call at a time; the owner takes turns.
    """

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self.name = name
        self._folders, named = directories(environ, os.geteuid()), environ.get(GROUP_VARIABLE)
        self._group = _group_of(named) if named else None
        try:
            self._dead_s = dead_s(environ)
        except ValueError as error:
            self._dead_s = DEAD_S
            logger.warning("%s; taken as %g", str(error), DEAD_S)
        self._lock: int | None = None  # descriptor; the kernel frees the lock when the last process closes it

    def __repr__(self) -> str:
        return f"ReportFiles({self.name}, {'not written' if self._lock is None else 'written'})"

    def write(self, content: bytes, leaks: Callable[[], bytes]) -> None:
        """Replace the report, and answer a reader that asks for leaks.

        Raises:
            HostileDirectoryError: Other users could change the files.
            OSError: The report cannot be written now.
        """
        with self._opened() as folder:
            if not self._holds_lock(folder):
                self.disown()  # the lock before, whose file is gone
                self._lock = self._place(folder, LOCK)
                _remove_old(folder, self._dead_s)
            os.close(self._place(folder, REPORT, content))
            if _unlink(self.name + WANT, folder):  # first: a reader that asks meanwhile gets another answer
                os.close(self._place(folder, LEAKS, leaks()))

    def remove(self) -> None:
        """Leave nothing behind, and let go of the lock. Idempotent."""
        if self._lock is not None:
            with contextlib.suppress(OSError, HostileDirectoryError), self._opened() as folder:
                for suffix in SUFFIXES:
                    _unlink(self.name + suffix, folder)
            self.disown()

    def disown(self) -> None:
        """Close the lock, as in a forked child. An unlock would free the parent's lock."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        descriptor = self._open()
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        errors: list[OSError] = []
        for path in self._folders:
            try:
                self._make(path)
                return self._checked(path)
            except OSError as error:
                errors.append(error)
        raise errors[0]

    def _make(self, path: Path) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
            if self._group is not None:
                os.chown(path, -1, self._group)
                os.chmod(path, 0o2770)

    def _checked(self, path: Path) -> int:
        """Open the very directory that the check saw, so that no other can take its place between."""
        found = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if (problem := problem_of(os.fstat(found), self._group)) is not None:
                raise HostileDirectoryError(f"{path} {problem}")
            return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=found)
        finally:
            os.close(found)

    def _holds_lock(self, folder: int) -> bool:
        """Whether the file that readers probe is the one that this process locked."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self.name + LOCK, dir_fd=folder, follow_symlinks=False)
            return self._lock is not None and os.path.samestat(found, os.fstat(self._lock))
        return False

    def _place(self, folder: int, suffix: str, content: bytes = b"") -> int:
        """Replace a file as a whole and return its descriptor.

        A lock file is locked before it gets its name, so that no reader meets a living process without a lock.
        """
        temporary = f".{self.name}{suffix}.{secrets.token_hex(4)}"
        descriptor = os.open(temporary, _NEW, 0o600, dir_fd=folder)
        try:
            if self._group is not None:
                os.fchown(descriptor, -1, self._group)
                os.fchmod(descriptor, 0o640)
            if suffix == LOCK:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(content)
            os.rename(temporary, self.name + suffix, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.close(descriptor)
            _unlink(temporary, folder)
            raise
        return descriptor


def problem_of(found: os.stat_result, group: int | None) -> str | None:
    """Why a directory is hostile; None if it is not. A directory of `group` (mode 2770) need not be this user's."""
    uid, is_shared = os.geteuid(), group is not None and found.st_gid == group
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if not stat.S_ISDIR(found.st_mode):
        return "is no directory"
    if found.st_mode & stat.S_IWOTH:
        return "is writable by others"
    if found.st_uid != uid and not is_shared:
        return f"belongs to user {found.st_uid}, not {uid}"
    if found.st_mode & stat.S_IWGRP and not is_shared:
        return "is writable by its group"
    return None


def _group_of(named: str) -> int:
    with contextlib.suppress(KeyError, ValueError):
        number = int(named) if named.isdecimal() else grp.getgrnam(named).gr_gid
        if number < _NO_GROUP:  # without a name, perhaps, as in a container
            return number
    raise HostileDirectoryError(f"there is no group {named!r} ({GROUP_VARIABLE})")


def _unlink(name: str, folder: int) -> bool:
    """Whether it was there."""
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder)
        return True
    return False


def _remove_old(folder: int, dead_s: float) -> None:
    """Remove old files of this user's processes that ended without cleanup."""
    for name in filter(_OURS.fullmatch, os.listdir(folder)):
        with contextlib.suppress(OSError):
            if name.startswith(".") and _is_old(name, folder, dead_s):
                _unlink(name, folder)
            elif name.endswith(LOCK) and _is_old(name, folder, dead_s):
                _remove_if_dead(name.removesuffix(LOCK), folder, dead_s)


def _is_old(name: str, folder: int, dead_s: float) -> bool:
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    return found.st_uid == os.geteuid() and time.time() - found.st_mtime > dead_s


def _remove_if_dead(name: str, folder: int, dead_s: float) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not _is_old(name + REPORT, folder, dead_s):
            return
    lock = os.open(name + LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for suffix in SUFFIXES:
            _unlink(name + suffix, folder)
    finally:
        os.close(lock)
