"""Files on disk: written whole or not at all, read only as far as they may reach."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdeploy.errors import InputError, OutputError

TEMPORARY = ".qdeploy-tmp-"  # how the names of half-written files begin


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Put `data` at `path`: a reader sees the old file or the whole new one, whatever happens.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # also when interrupted: nothing half-written stays
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def require_writable(path: Path) -> None:
    """Find out before the work, rather than after it, that a result has no place to go.

    Raises:
        OutputError: `path` is a folder, or its folder is missing or not writable.
    """
    folder = path.parent
    try:
        if path.is_dir():
            raise OutputError(f"cannot write {path}: is a folder")
        if not folder.is_dir():
            raise OutputError(f"cannot write {path}: folder {folder} does not exist")
        path.exists()  # its name may be too long
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".qdeploy-"):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def make_folder(path: Path) -> None:
    """Make a folder, and those it lies in, unless they are there.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def remove(path: Path) -> None:
    """Take away a file, a link (and not what it leads to), or a folder with all that is in it.

    Raises:
        OutputError: it cannot be.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot remove {path}: {error.strerror}") from error


def set_aside(path: Path) -> Path | None:
    """Move a file out of the way, so that nobody takes it for the result of this run."""
    if not path.exists():
        return None
    aside = path.with_name(f"{path.stem}.previous{path.suffix}")
    try:
        path.replace(aside)
    except OSError as error:
        raise OutputError(f"cannot rename {path}: {error.strerror}") from error
    return aside


def read_bounded(path: Path, limit_bytes: int, *, what: str) -> bytes:
    """The bytes of the regular file at `path`, if they are no more than `limit_bytes`.

    Raises:
        InputError: it cannot be read, is a device, a pipe or a folder, is larger, grows while it
            is read, or does not fit into memory.
    """
    with open_regular(path, what=what) as file, _reading(path, what):
        held = os.fstat(file.fileno()).st_size
        data = b"" if held > limit_bytes else file.read(held + 1)  # room for the limit is not made
    if held > limit_bytes:
        raise InputError(f"{what} {path}: larger than {limit_bytes} bytes")
    if len(data) > held:
        raise InputError(f"{what} {path}: grew while it was read")
    return data


def file_sha256(path: Path, *, what: str) -> str:
    """The digest of the regular file at `path`, whatever its size.

    Raises:
        InputError: it cannot be read, or is a device, a pipe or a folder.
    """
    with open_regular(path, what=what) as file, _reading(path, what):
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: Path, *, what: str, follow: bool = True) -> io.BufferedReader:
    """The file at `path`, opened for reading, if it is one: a pipe would wait, a device never end.

    Raises:
        InputError: it cannot be opened, or is a device, a pipe or a folder.
    """
    with _reading(path, what):
        links = 0 if follow else os.O_NOFOLLOW
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | links)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise InputError(f"{what} {path}: not a regular file")
        return os.fdopen(handle, "rb")


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{what} {path}: {error.strerror}") from error
    except ValueError as error:  # a name that no file can have
        raise InputError(f"{what} {path}: {error}") from error
    except MemoryError as error:
        raise InputError(f"{what} {path}: does not fit into memory") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
