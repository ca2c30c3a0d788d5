"""Where what is done is kept: one sealed record a cell, and files under the digest of their bytes.

A record is written after the files that it names, and a file's name says what is in it: whoever
reads finds a whole record or none, however many fleets write at once. What the fleet's key has not
sealed, or whose files are not there as it says, is not done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from qdeploy.disk.files import make_folder, open_regular, read_bounded, write_atomically
from qdeploy.disk.locks import held
from qdeploy.disk.state import MAC_BYTES, opened, own_key, read_key, sealed
from qdeploy.errors import InputError, OutputError
from qdeploy.fleet.document import Record, WrittenFile

CELLS, FILES = "cells", "files"
CONTEXT = "fleet cell"
LARGEST_RECORD_BYTES = 4 << 20
LARGEST_FILE_BYTES = 16 << 30


class Blobs(Protocol):
    """Bytes under names. Every method raises InputError or OutputError if it fails."""

    def read(self, name: str, limit: int) -> bytes | None:
        """What is called `name`; None if nothing is, or nothing that can be read."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Put it there, as a whole or not at all."""
        ...

    def claim(self, name: str) -> AbstractContextManager[bool]:
        """Whether `name` is for this process alone while the context is open."""
        ...


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder on a disk that all machines see."""

    root: Path

    def read(self, name: str, limit: int) -> bytes | None:
        try:
            return read_bounded(self.root / name, limit, what="store")
        except InputError:  # is not there, or is nothing that we have put there
            return None

    def write(self, name: str, data: bytes) -> None:
        path = self.root / name
        make_folder(path.parent)
        write_atomically(path, data)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        path = self.root / "claims" / name
        make_folder(path.parent)
        with held(path) as ours:
            yield ours


@dataclass(frozen=True, slots=True)
class Store:
    """Records and files, sealed with one key."""

    blobs: Blobs
    key: bytes

    def record(self, cell: str) -> Record | None:
        """What is known of a cell; None if it is not done, or not as the key says.

        Its files are looked at when they are fetched.
        """
        whole = self.blobs.read(f"{CELLS}/{cell}", LARGEST_RECORD_BYTES + MAC_BYTES)
        data = opened(whole, CONTEXT, cell, key=self.key) if whole is not None else None
        if data is None:
            return None
        try:
            record = Record.model_validate_json(data)
        except ValidationError:  # of another version
            return None
        return record if record.id == cell else None

    def keep(self, record: Record, folder: Path) -> None:
        """Keep a cell: its files, which lie in `folder`, and then what came of it.

        Raises:
            OutputError: they cannot be written.
        """
        for file in record.files:
            if self._file(file) is None:
                data = read_bounded(folder / file.name, LARGEST_FILE_BYTES, what="result")
                self.blobs.write(f"{FILES}/{file.sha256}", data)
        data = record.model_dump_json().encode()
        self.blobs.write(f"{CELLS}/{record.id}", sealed(data, CONTEXT, record.id, key=self.key))

    def whole(self, record: Record) -> bool:
        """Every file of a cell is here, and is what the record says."""
        return all(self._file(file) is not None for file in record.files)

    def fetch(self, record: Record, folder: Path) -> bool:
        """Put the files of a cell into `folder`; False if one is not what the record says.

        Raises:
            OutputError: they cannot be written, or a link lies in the way.
        """
        for file in record.files:
            place = folder / file.name
            if place.exists() and _digest(place) == file.sha256:
                continue
            data = self._file(file)
            if data is None:
                return False
            _refuse_links(folder, place)
            make_folder(place.parent)
            write_atomically(place, data)
        return True

    def _file(self, file: WrittenFile) -> bytes | None:
        """What is kept under a digest, if it is that."""
        data = self.blobs.read(f"{FILES}/{file.sha256}", LARGEST_FILE_BYTES)
        same = data is not None and hashlib.sha256(data).hexdigest() == file.sha256
        return data if same else None


def _refuse_links(folder: Path, place: Path) -> None:
    """A folder of results can come with a repository: nothing in it may lead elsewhere."""
    for path in (folder.parent, folder, *(p for p in place.parents if folder in p.parents)):
        if path.is_symlink():
            raise OutputError(f"cannot write {place}: {path} is a link", hint="remove it")


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
