"""Where what is done is kept: one sealed record a cell, and files under the digest of their bytes.

A record is written after the files that it names, and a file's name says what is in it: whoever
reads finds a whole record or none, however many fleets write at once. What the fleet's key has not
sealed, or whose files are not there as it says, is not done.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import portalocker
from portalocker import LockFlags
from pydantic import ValidationError

from qdeploy.disk.files import make_folder, open_regular, read_bounded, write_atomically
from qdeploy.disk.state import MAC_BYTES, opened, own_key, read_key, sealed
from qdeploy.errors import InputError, OutputError
from qdeploy.fleet.document import Record

CELLS, FILES = "cells", "files"
CONTEXT = "fleet cell"
LARGEST_RECORD_BYTES = 4 << 20
LARGEST_FILE_BYTES = 16 << 30


class Blobs(Protocol):
    """Bytes under names. Every method raises InputError or OutputError if it fails."""

    def read(self, name: str, limit: int) -> bytes | None:
        """What is called `name`; None if nothing is."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Put it there, as a whole or not at all."""
        ...

    def size(self, name: str) -> int | None:
        """In bytes; None if nothing is called so."""
        ...

    def claim(self, name: str) -> AbstractContextManager[bool]:
        """Whether `name` is for this process alone while the context is open."""
        ...


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder on a disk that all machines see."""

    root: Path

    def read(self, name: str, limit: int) -> bytes | None:
        path = self.root / name
        return read_bounded(path, limit, what="store") if path.exists() else None

    def write(self, name: str, data: bytes) -> None:
        path = self.root / name
        make_folder(path.parent)
        write_atomically(path, data)

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except OSError:
            return None

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        path = self.root / "claims" / name
        make_folder(path.parent)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        with os.fdopen(handle, "r+") as lock:  # the system opens it when its process dies
            try:
                portalocker.lock(lock, LockFlags.EXCLUSIVE | LockFlags.NON_BLOCKING)
            except (portalocker.AlreadyLocked, BlockingIOError):
                yield False
                return
            yield True


@dataclass(frozen=True, slots=True)
class Store:
    """Records and files, sealed with one key."""

    blobs: Blobs
    key: bytes

    def record(self, cell: str) -> Record | None:
        """What is known of a cell; None if it is not done, or not as the key says."""
        whole = self.blobs.read(f"{CELLS}/{cell}", LARGEST_RECORD_BYTES + MAC_BYTES)
        data = opened(whole, CONTEXT, cell, key=self.key) if whole is not None else None
        if data is None:
            return None
        try:
            record = Record.model_validate_json(data)
        except ValidationError:  # of another version
            return None
        held = all(self.blobs.size(f"{FILES}/{f.sha256}") == f.size_bytes for f in record.files)
        return record if held and record.id == cell else None

    def keep(self, record: Record, folder: Path) -> None:
        """Keep a cell: its files, which lie in `folder`, and then what came of it.

        Raises:
            OutputError: they cannot be written.
        """
        for file in record.files:
            if self.blobs.size(f"{FILES}/{file.sha256}") != file.size_bytes:
                data = read_bounded(folder / file.name, LARGEST_FILE_BYTES, what="result")
                self.blobs.write(f"{FILES}/{file.sha256}", data)
        data = record.model_dump_json().encode()
        self.blobs.write(f"{CELLS}/{record.id}", sealed(data, CONTEXT, record.id, key=self.key))

    def fetch(self, record: Record, folder: Path) -> bool:
        """Put the files of a cell into `folder`; False if one is not what the record says.

        Raises:
            OutputError: they cannot be written.
        """
        for file in record.files:
            place = folder / file.name
            if place.exists() and _digest(place) == file.sha256:
                continue
            data = self.blobs.read(f"{FILES}/{file.sha256}", LARGEST_FILE_BYTES)
            if data is None or hashlib.sha256(data).hexdigest() != file.sha256:
                return False
            make_folder(place.parent)
            write_atomically(place, data)
        return True


def _digest(path: Path) -> str:
    try:
        with open_regular(path, what="result", follow=False) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except InputError:
        return ""


def open_store(place: str, key: Path | None) -> Store:
    """The store at `place`, a folder or a URL.

    Raises:
        UsageError: nothing that is installed knows such a URL.
        InputError, OutputError: the key is none.
    """
    return Store(_blobs(place), own_key() if key is None else read_key(key))


def is_url(place: str) -> bool:
    return "://" in place


def _blobs(place: str) -> Blobs:
    if not is_url(place):
        return Folder(Path(place))
    from qdeploy.fleet.url_store import open_url

    return open_url(place)


def unclaimed() -> AbstractContextManager[bool]:
    """Where nobody can be kept out: two that do the same write the same."""
    return nullcontext(True)
