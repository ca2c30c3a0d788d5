"""Files that one process holds at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import portalocker
from portalocker import LockFlags

from qdeploy.errors import OutputError

OWN_FILE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Whether the lock at `path` is this process's while the context is open.

    The system opens it when its process dies. The file is never emptied and stays where it is: one
    that came with a folder may be a name of another file.

    Raises:
        OutputError: there can be no such file.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | OWN_FILE, 0o600)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    with os.fdopen(handle, "r+") as lock:
        try:
            portalocker.lock(lock, LockFlags.EXCLUSIVE | LockFlags.NON_BLOCKING)
        except (portalocker.AlreadyLocked, BlockingIOError):
            yield False
            return
        yield True
