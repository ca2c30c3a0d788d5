"""Zip files of images, and the archives that npz files are: bounded before anything is unpacked."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
from jaxtyping import Int64

from qdeploy.data.decode import LARGEST_IMAGE_BYTES, decode, decoding
from qdeploy.data.names import LARGEST_TEXT_BYTES
from qdeploy.disk.files import open_regular
from qdeploy.errors import InputError

LARGEST_PART_BYTES = LARGEST_IMAGE_BYTES + (1 << 20)
LARGEST_DIRECTORY_BYTES = 32 << 20  # of names: Python takes twenty times as much to hold them
MOST_MEMBERS = 500_000
LARGEST_RATIO = 1100  # deflate reaches 1032
METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})  # others take memory as they say


@dataclass(frozen=True, slots=True)
class Zip:
    """The images in a zip, read one by one."""

    path: Path
    keys: tuple[str, ...]
    unread: tuple[str, ...]
    members: Mapping[str, str]  # the name that an image has in the archive, by key

    def text(self, name: str, /) -> bytes | None:
        """What the one member of that name says, in whatever folder."""
        found = [key for key in self.members if PurePosixPath(key).name == name]
        if len(found) != 1:
            return None
        with opened(self.path) as archive, decoding(f"{self.path}: {found[0]}"):
            info = archive.getinfo(self.members[found[0]])
            if info.file_size > LARGEST_TEXT_BYTES:
                raise InputError(f"data {self.path}: {found[0]}: over {LARGEST_TEXT_BYTES} bytes")
            check_member(self.path, info)
            return archive.read(info)

    def read(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[str, Any]]:
        with opened(self.path) as archive:
            for i in indices:
                key = self.keys[i]
                with decoding(f"{self.path}: {key}"):
                    info = archive.getinfo(self.members[key])
                    if info.file_size > LARGEST_IMAGE_BYTES:
                        raise InputError(
                            f"image {self.path}: {key}: over {LARGEST_IMAGE_BYTES} bytes"
                        )
                    check_member(self.path, info)
                    image = decode(archive.read(info))
                yield key, image


class _Sips:
    """A file that is not read in larger pieces than any honest archive needs."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self.most = file, most
        self.seek, self.tell = file.seek, file.tell

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(count if 0 <= count <= self.most else self.most + 1)
        if len(data) > self.most:
            raise ValueError(f"holds a part of over {self.most:,} bytes")
        return data


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive in the regular file at `path`.

    Raises:
        InputError: it cannot be read, or is damaged.
    """
    with open_regular(path, what="data") as file:
        sips = _Sips(file, LARGEST_DIRECTORY_BYTES)
        with decoding(str(path)):
            archive = zipfile.ZipFile(cast("IO[bytes]", sips))
        sips.most = LARGEST_PART_BYTES
        with archive:
            yield archive


def is_zip(path: Path) -> bool:
    """The regular file at `path` ends as a zip does.

    Raises:
        InputError: it cannot be read, is a device, a pipe or a folder.
    """
    with open_regular(path, what="data") as file, decoding(str(path)):
        return zipfile.is_zipfile(cast("IO[bytes]", _Sips(file, LARGEST_DIRECTORY_BYTES)))


def member_names(path: Path) -> tuple[str, ...]:
    """The files in the archive.

    Raises:
        InputError: it is damaged, holds two of one name, or far more than a set of images has.
    """
    with opened(path) as archive, decoding(str(path)):
        names = tuple(info.filename for info in archive.infolist() if not info.is_dir())
    if len(names) > MOST_MEMBERS:
        raise InputError(f"data {path}: holds over {MOST_MEMBERS:,} files")
    if len(set(names)) < len(names):
        raise InputError(f"data {path}: damaged: holds two files of one name")
    return names


def check_member(path: Path, info: zipfile.ZipInfo) -> None:
    """Refuse what unpacks to more than its bytes can hold, and packings that take any memory.

    Raises:
        InputError: it does.
    """
    if info.compress_type not in METHODS:
        raise InputError(f"data {path}: {info.filename!r} is packed by another method than deflate")
    if info.file_size > LARGEST_RATIO * max(info.compress_size, 1):
        raise InputError(
            f"data {path}: {info.filename!r} claims {info.file_size:,} bytes, packed into"
            f" {info.compress_size:,}"
        )
