"""A store at any URL that fsspec knows: s3, gs, abfs, sftp, memory..."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from qdeploy.errors import InputError, UsageError, foreign_reader
from qdeploy.fleet.store import Blobs

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_WRITING = Lock()  # a file system has one transaction at a time


@dataclass(frozen=True, slots=True)
class Url:
    """Objects below one address. Each is put by the file system's own transaction."""

    files: AbstractFileSystem
    root: str
    shown: str

    def read(self, name: str, limit: int) -> bytes | None:
        path = f"{self.root}/{name}"
        with self._asking():
            if not self.files.exists(path):
                return None
            if self.files.size(path) > limit:
                raise InputError(f"store {self.shown}: {name} is larger than {limit} bytes")
            return bytes(self.files.cat_file(path))

    def write(self, name: str, data: bytes) -> None:
        path = f"{self.root}/{name}"
        with _WRITING, self._asking():
            self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self.files.transaction, self.files.open(path, "wb") as file:
                file.write(data)

    def claim(self, name: str) -> AbstractContextManager[bool]:  # noqa: ARG002 - nobody is kept out
        return nullcontext(True)  # two that do the same write the same

    def _asking(self) -> AbstractContextManager[None]:
        return foreign_reader(f"store {self.shown}")


def open_url(url: str) -> Blobs:
    """The store at `url`.

    Raises:
        UsageError: nothing that is installed knows such a URL.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise UsageError(
            f"store {url}: needs fsspec, which is not installed",
            hint="pip install 'qdeploy[fsspec]'",
        ) from error
    protocol, _, place = url.partition("://")
    if not protocol or not place.strip("/"):
        raise UsageError(f"store {url}: names no place")
    with foreign_reader(f"store {url}"):
        files, root = url_to_fs(url)
    return Url(files, root.rstrip("/"), url)
