"""Locks tell which processes live: each holds the lock file beside its report until it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

LockId = tuple[int, int, int]  # major and minor number of the device, inode


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
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError:
        raise
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
