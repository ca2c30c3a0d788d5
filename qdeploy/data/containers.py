"""Where images lie: folders, zips, npz files and arrays. Read one by one, in a fixed order."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt8

from qdeploy.data.decode import decode, decoding
from qdeploy.errors import InputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"})
LARGEST_IMAGE_BYTES = 64 << 20


@runtime_checkable
class Container(Protocol):
    """Images under keys, which have a fixed order."""

    @property
    def path(self) -> Path: ...
    @property
    def keys(self) -> tuple[str, ...]: ...
    def read(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[str, Any]]:
        """Key and uint8 pixels (an array, or a PIL image) of each index, in rising order."""
        ...


def open_container(path: Path) -> Container:
    if not path.exists():
        raise InputError(f"data {path}: no such file or folder")
    if path.is_dir():
        source: Container = _Folder(
            path,
            _image_names(
                str(p.relative_to(path).as_posix()) for p in sorted(path.rglob("*")) if p.is_file()
            ),
        )
    elif not _is_zip(path):
        raise InputError(
            f"data {path}: neither a folder nor a zip or npz file",
            hint="pack images into a zip with one sub-folder per class, or save x and y with numpy",
        )
    else:
        names = _zip_names(path)
        source = NpzContainer(path) if "x.npy" in names else _Zip(path, _image_names(names))
    if not source.keys:
        raise InputError(f"data {path}: holds no images ({', '.join(sorted(SUFFIXES))})")
    return source


def _is_zip(path: Path) -> bool:
    with decoding(str(path)):  # of some damaged ones it is an error to ask
        return zipfile.is_zipfile(path)


def _image_names(names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that are images, sorted, without what operating systems leave behind."""
    paths = map(PurePosixPath, names)
    return tuple(
        sorted(
            str(p)
            for p in paths
            if p.suffix.lower() in SUFFIXES
            and not any(part.startswith((".", "__MACOSX")) for part in p.parts)
        )
    )


@dataclass(frozen=True, slots=True)
class _Folder:
    path: Path
    keys: tuple[str, ...]

    def read(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[str, Any]]:
        for i in indices:
            key = self.keys[i]
            try:
                data = (self.path / key).read_bytes()
            except OSError as error:
                raise InputError(f"image {self.path / key}: {error.strerror}") from error
            with decoding(f"{self.path}: {key}"):
                image = decode(data)
            yield key, image


@dataclass(frozen=True, slots=True)
class _Zip:
    path: Path
    keys: tuple[str, ...]

    def read(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[str, Any]]:
        with zipfile.ZipFile(self.path) as archive:
            for i in indices:
                key = self.keys[i]
                with decoding(f"{self.path}: {key}"):
                    if archive.getinfo(key).file_size > LARGEST_IMAGE_BYTES:
                        raise InputError(
                            f"image {self.path}: {key}: over {LARGEST_IMAGE_BYTES} bytes"
                        )
                    image = decode(archive.read(key))
                yield key, image


@dataclass(frozen=True, slots=True, eq=False)
class ArrayContainer:
    path: Path
    pixels: UInt8[np.ndarray, "images channels height width"]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(f"image {i}" for i in range(len(self.pixels)))

    def read(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[str, Any]]:
        for i in indices:
            yield f"image {i}", self.pixels[i]


class NpzContainer:
    """`x` uint8, NCHW or NHWC, read row by row out of the archive; `y` integers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with decoding(f"{path}: x"), zipfile.ZipFile(path) as archive:
            size = archive.getinfo("x.npy").file_size
            with archive.open("x.npy") as file:
                shape, dtype, offset = _npy_header(file)
        if len(shape) not in {3, 4} or dtype != np.uint8:
            raise InputError(
                f"data {path}: x is {dtype} {shape}, not uint8 (N, C, H, W) or (N, H, W, C)"
            )
        if offset + int(np.prod(shape, dtype=object)) != size:
            raise InputError(f"data {path}: x claims shape {shape} but holds {size - offset} bytes")
        self._shape, self._offset = shape, offset
        self.keys = tuple(f"row {i}" for i in range(shape[0]))

    def labels(self) -> Int64[np.ndarray, " images"]:
        with decoding(f"{self.path}: y"), np.load(self.path, allow_pickle=False) as archive:
            labels = archive["y"] if "y" in archive.files else None
        if labels is None:
            raise InputError(f"data {self.path}: holds x but no y, so there are no labels")
        if labels.shape != (len(self.keys),) or labels.dtype.kind not in "iu":
            raise InputError(
                f"data {self.path}: y is {labels.dtype} of shape {labels.shape}, "
                f"not one integer for each of the {len(self.keys)} images"
            )
        return labels.astype(np.int64)

    def read(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[str, Any]]:
        row_shape = self._shape[1:]
        row_bytes = int(np.prod(row_shape))
        with zipfile.ZipFile(self.path) as archive, archive.open("x.npy") as file:
            for i in indices:
                with decoding(f"{self.path}: row {i}"):
                    file.seek(self._offset + int(i) * row_bytes)
                    data = file.read(row_bytes)
                row = np.frombuffer(data, np.uint8).reshape(row_shape)
                yield f"row {i}", _channels_first(row)


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"npy format {version} is not 1.0 or 2.0")
    shape, fortran, dtype = read(file)
    if fortran:
        raise ValueError("stored in Fortran order; save np.ascontiguousarray(x)")
    return shape, dtype, file.tell()


def _channels_first(row: UInt8[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "channels height width"]:
    if row.ndim == 2:
        return row[None]
    return row if row.shape[0] in {1, 3} else row.transpose(2, 0, 1)


def _zip_names(path: Path) -> tuple[str, ...]:
    with decoding(str(path)), zipfile.ZipFile(path) as archive:
        return tuple(info.filename for info in archive.infolist() if not info.is_dir())
