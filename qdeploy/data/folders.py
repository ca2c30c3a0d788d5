"""Images in a folder: a bounded walk that leaves it through no link."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from qdeploy.data.decode import LARGEST_IMAGE_BYTES, decode, decoding
from qdeploy.data.names import LARGEST_TEXT_BYTES, sort_names
from qdeploy.data.reach import require_within, resolved
from qdeploy.disk.files import read_bounded
from qdeploy.errors import InputError

MOST_ENTRIES = 3_000_000
MOST_LINKED = 30_000  # folders, so that circles of links end soon
DEEPEST = 16


@dataclass(frozen=True, slots=True)
class Folder:
    """The images under `path`, read one by one."""

    path: Path
    keys: tuple[str, ...]
    unread: tuple[str, ...]
    roots: tuple[Path, ...]

    def text(self, name: str, /) -> bytes | None:
        """What the file of that name directly in the folder says."""
        if not (self.path / name).is_file():
            return None
        file = _inside(self.path / name, self.path, self.roots)
        return read_bounded(file, LARGEST_TEXT_BYTES, what="data")

    def read(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[str, Any]]:
        for i in indices:
            key = self.keys[i]
            file = _inside(self.path / key, self.path, self.roots)
            data = read_bounded(file, LARGEST_IMAGE_BYTES, what="image")
            with decoding(f"{self.path}: {key}"):
                image = decode(data)
            yield key, image


def open_folder(path: Path, roots: Sequence[Path]) -> Folder:
    """The images under `path`.

    Args:
        roots: Folders that its links may lead to, besides itself.

    Raises:
        InputError: a link leads elsewhere, or it holds too much to be a set of images.
    """
    allowed = (resolved(path, what="data"), *roots)
    keys, unread = sort_names(_Walk(path, allowed).files())
    return Folder(path, keys, unread, allowed)


class _Walk:
    """Every file below a folder, in no order."""

    def __init__(self, top: Path, roots: tuple[Path, ...]) -> None:
        self._top, self._roots = top, roots
        self._seen = self._linked = 0

    def files(self) -> Iterator[str]:
        return self._below(self._top, ())

    def _below(self, folder: Path, parts: tuple[str, ...]) -> Iterator[str]:
        if len(parts) > DEEPEST:
            raise InputError(f"data {self._top}: folders in it lie deeper than {DEEPEST}")
        for entry in self._entries(folder):
            place = (*parts, entry.name)
            mode = self._mode(entry)
            if stat.S_ISDIR(mode):
                self._linked += entry.is_symlink()
                if self._linked > MOST_LINKED:
                    raise InputError(f"data {self._top}: over {MOST_LINKED:,} links to folders")
                yield from self._below(Path(entry.path), place)
            elif stat.S_ISREG(mode):
                yield "/".join(place)
            else:
                raise InputError(f"data {entry.path}: neither a file nor a folder")

    def _entries(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as found:
                for entry in found:
                    self._seen += 1
                    if self._seen > MOST_ENTRIES:
                        raise InputError(f"data {self._top}: holds over {MOST_ENTRIES:,} files")
                    if not entry.name.startswith("."):
                        yield entry
        except OSError as error:
            raise InputError(f"data {folder}: {error.strerror}") from error

    def _mode(self, entry: os.DirEntry[str]) -> int:
        path = Path(entry.path)
        if entry.is_symlink():
            _inside(path, self._top, self._roots)
        try:
            found = path.stat()
            if stat.S_ISDIR(found.st_mode) and found.st_dev != self._top.stat().st_dev:
                _inside(path, self._top, self._roots[1:])
        except OSError as error:
            raise InputError(f"data {path}: {error.strerror}") from error
        return found.st_mode


def _inside(path: Path, top: Path, roots: tuple[Path, ...]) -> Path:
    whose = f"the folder {top}, by a link or another file system"
    return require_within(path, roots, what="data", whose=whose)
