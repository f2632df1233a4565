"""A lock on a job, which its owner's death frees at once, `kill -9` included."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 0.2  # seconds: a glance at whether a lock is free (`owner`) holds it for a moment


@contextlib.contextmanager
def locked(path: Path, wait: bool = False, patience: float = PATIENCE) -> Iterator[bool]:
    """Whether this process holds the lock of the file `path` inside; False: another process does.

    A POSIX record lock: the kernel drops it with the process, a forked worker that lives on does not keep it, and NFS
    servers with a lock manager (all of version 4) hold it across machines. Not across threads of one process.

    Args:
        wait: until the lock is free, however long that takes.
        patience: seconds to try for, without `wait`.

    Raises:
        OSError: the file system has no locks (NFS mounted with nolock, some object stores); says where.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        held = _acquire(file.fileno(), path, wait, patience)
        if held:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield held


def owner(path: Path) -> str | None:
    """Who holds the lock, `process 7 on node3`; None where nobody does."""
    if not path.exists():
        return None
    with path.open("a+") as file:
        if _acquire(file.fileno(), path, wait=False, patience=0):
            return None
        file.seek(0)
        return file.read() or "another process"


def _acquire(descriptor: int, path: Path, wait: bool, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: POSIX leaves the choice
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        except OSError as error:
            error.add_note(f"{path} is on a file system without locks: choose another folder for the sweep")
            raise
