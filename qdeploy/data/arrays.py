"""Arrays from npz and npy files: what a header claims is believed only if the bytes are there."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, UInt8

from qdeploy.data.archives import check_member, opened
from qdeploy.data.decode import LARGEST_IMAGE_BYTES, decoding
from qdeploy.disk.files import read_bounded
from qdeploy.errors import InputError

LONGEST_HEADER = 1 << 16
MOST_ROWS = 2_000_000
Header = tuple[tuple[int, ...], np.dtype[Any], int]


Part = Literal["train", "test"]
Arrays = tuple[str, str]  # the images' name and the labels'

# As archives of others call them.
WHOLE: tuple[Arrays, ...] = (
    ("x", "y"), ("images", "labels"), ("X", "Y"), ("X", "y"), ("data", "labels"),
)  # fmt: skip
PARTS: Mapping[Part, tuple[Arrays, ...]] = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),  # Keras, MedMNIST
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}


def convention_of(names: Container[str], part: Part) -> Arrays | None:
    """The arrays of an archive that are images and labels; the labels' need not be there."""
    held = [pair for pair in (*WHOLE, *PARTS[part]) if f"{pair[0]}.npy" in names]
    whole = [pair for pair in held if f"{pair[1]}.npy" in names]
    return next(iter([*whole, *held]), None)


class Npz:
    """Images in uint8, NCHW or NHWC, read row by row out of the archive; labels in integers."""

    def __init__(self, path: Path, arrays: Arrays, others: tuple[str, ...] = ()) -> None:
        self.path = path
        self.arrays = arrays
        self.unread = others
        x = arrays[0]
        with opened(path) as archive, decoding(f"{path}: {x}"):
            info = archive.getinfo(f"{x}.npy")
            check_member(path, info)
            with archive.open(info) as file:
                shape, dtype, offset = npy_header(file)
        if len(shape) not in {3, 4} or dtype != np.uint8:
            raise InputError(
                f"data {path}: {x} is {dtype} {shape}, not uint8 (N, C, H, W) or (N, H, W, C)",
                hint="save pixels of 0 to 255: (255 * x).round().astype('uint8') if x is in [0, 1]",
            )
        held = info.file_size - offset
        if min(shape) < 1 or int(np.prod(shape, dtype=object)) != held:
            raise InputError(f"data {path}: {x} claims shape {shape} but holds {held} bytes")
        if shape[0] > MOST_ROWS or held // shape[0] > LARGEST_IMAGE_BYTES:
            raise InputError(
                f"data {path}: {x} is {shape}; at most {MOST_ROWS:,} images of"
                f" {LARGEST_IMAGE_BYTES:,} bytes each are read"
            )
        self._shape, self._offset = shape, offset
        self.keys = tuple(f"row {i}" for i in range(shape[0]))

    def labels(self) -> Int64[np.ndarray, " images"]:
        """The label of each image.

        Raises:
            InputError: there are none, or not one integer for each image.
        """
        x, y = self.arrays
        with opened(self.path) as archive, decoding(f"{self.path}: {y}"):
            if f"{y}.npy" not in archive.namelist():
                raise InputError(
                    f"data {self.path}: holds {x} but no {y}, so there are no labels",
                    hint="--policy unlabelled judges by what the float model answers",
                )
            info = archive.getinfo(f"{y}.npy")
            check_member(self.path, info)
            with archive.open(info) as file:
                return self._labels(file, info)

    def _labels(self, file: Any, info: zipfile.ZipInfo) -> Int64[np.ndarray, " images"]:
        shape, dtype, offset = npy_header(file)
        count = len(self.keys)
        held = info.file_size - offset
        fits = shape in {(count,), (count, 1)} and dtype.kind in "iu"
        if not fits or held != count * dtype.itemsize:
            raise InputError(
                f"data {self.path}: {self.arrays[1]} is {dtype} of shape {shape}, "
                f"not one integer for each of the {count} images"
            )
        return np.frombuffer(file.read(held), dtype).astype(np.int64)

    def text(self, _: str, /) -> bytes | None:
        """None: labels lie in an array."""
        return None

    def read(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[str, Any]]:
        row_shape = self._shape[1:]
        row_bytes = int(np.prod(row_shape))
        with opened(self.path) as archive, archive.open(f"{self.arrays[0]}.npy") as file:
            for i in indices:
                with decoding(f"{self.path}: row {i}"):
                    file.seek(self._offset + int(i) * row_bytes)
                    data = file.read(row_bytes)
                    row = np.frombuffer(data, np.uint8).reshape(row_shape)
                yield f"row {i}", _channels_first(row)


def read_npy(path: Path, limit_bytes: int, *, what: str) -> np.ndarray:
    """The array in a .npy file.

    Raises:
        InputError: it cannot be read, is larger, or is damaged.
    """
    data = read_bounded(path, limit_bytes, what=what)
    with decoding(str(path)):
        file = io.BytesIO(data)
        shape, dtype, offset = npy_header(file)
        if dtype.hasobject or min(shape, default=1) < 1:
            raise ValueError(f"holds {dtype} of shape {shape}")
        count = int(np.prod(shape, dtype=object))
        if count * dtype.itemsize != len(data) - offset:
            raise ValueError(f"claims shape {shape} but holds {len(data) - offset} bytes")
        return np.frombuffer(data, dtype, offset=offset).reshape(shape)


def npy_header(file: Any) -> Header:
    """Shape, type, and where the values begin.

    Raises:
        ValueError: it is damaged, longer than any, or of an array in Fortran order.
    """
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): (2, np.lib.format.read_array_header_1_0),
        (2, 0): (4, np.lib.format.read_array_header_2_0),
    }
    if version not in readers:
        raise ValueError(f"npy format {version} is not 1.0 or 2.0")
    size, read = readers[version]
    length = file.read(size)
    text = int.from_bytes(length, "little")
    if text > LONGEST_HEADER:
        raise ValueError(f"npy header of {text} bytes")
    shape, fortran, dtype = read(io.BytesIO(length + file.read(text)))
    if fortran:
        raise ValueError("stored in Fortran order; save np.ascontiguousarray(x)")
    return shape, dtype, len(np.lib.format.magic(*version)) + size + text


def _channels_first(row: UInt8[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "channels height width"]:
    if row.ndim == 2:
        return row[None]
    return row if row.shape[0] in {1, 3} else row.transpose(2, 0, 1)
