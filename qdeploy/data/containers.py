"""Where images lie: folders, zips, npz files and arrays. Read one by one, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt8

from qdeploy.data.archives import Zip, is_zip, member_names
from qdeploy.data.arrays import Npz, Part, convention_of
from qdeploy.data.folders import open_folder
from qdeploy.data.names import SUFFIXES, sort_names
from qdeploy.errors import InputError


@runtime_checkable
class Container(Protocol):
    """Images under keys, which have a fixed order."""

    @property
    def path(self) -> Path: ...
    @property
    def keys(self) -> tuple[str, ...]: ...
    @property
    def unread(self) -> tuple[str, ...]:
        """Files that lie among the images and are none."""
        ...

    def text(self, name: str, /) -> bytes | None:
        """What a small file among the images says; None if there is no such file."""
        ...

    def read(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[str, Any]]:
        """Key and uint8 pixels (an array, or a PIL image) of each index, in rising order."""
        ...


def open_container(path: Path, roots: Sequence[Path] = (), *, part: Part = "test") -> Container:
    """The images at `path`.

    Args:
        roots: Folders that links in a folder may lead to, besides itself; resolved.
        part: Which to take of an archive that holds both.

    Raises:
        InputError: it does not exist, is damaged, holds no images, or a link leads elsewhere.
    """
    if not path.exists():
        raise InputError(f"data {path}: no such file or folder")
    source = open_folder(path, roots) if path.is_dir() else _open_file(path, part)
    if not source.keys:
        raise InputError(f"data {path}: holds no images ({', '.join(sorted(SUFFIXES))})")
    return source


def _open_file(path: Path, part: Part) -> Container:
    if not is_zip(path):
        raise InputError(
            f"data {path}: neither a folder nor a zip or npz file",
            hint="pack images into a zip with one sub-folder per class, or save x and y with numpy",
        )
    names = member_names(path)
    if (convention := convention_of(names, part)) is not None:
        read = {f"{array}.npy" for array in convention}
        return Npz(path, convention, tuple(sorted({*names} - read)))
    arrays = [name.removesuffix(".npy") for name in names if name.endswith(".npy")]
    if arrays:
        raise InputError(
            f"data {path}: holds arrays called {', '.join(map(repr, arrays[:5]))}, but x and y"
            " are needed",
            hint="numpy.savez(FILE, x=images, y=labels): uint8 images, integer labels",
        )
    members = {name.replace("\\", "/"): name for name in names}  # as .NET wrote paths
    if len(members) < len(names):
        raise InputError(f"data {path}: damaged: holds two files of one name")
    return Zip(path, *sort_names(members), members)


@dataclass(frozen=True, slots=True, eq=False)
class ArrayContainer:
    """Images in memory: made rather than read, or decoded before."""

    path: Path
    pixels: UInt8[np.ndarray, "images channels height width"]
    keys: tuple[str, ...]
    unread: tuple[str, ...] = ()

    def text(self, _: str, /) -> bytes | None:
        """None: there are no files."""
        return None

    def read(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[str, Any]]:
        for i in indices:
            yield self.keys[i], self.pixels[i]
