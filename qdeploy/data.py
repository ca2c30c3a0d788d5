"""Images from a folder, a zip or an npz: streamed, seeded, digested.

Nothing here holds a data set in memory: an `Images` is a list of places, read when asked.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image, UnidentifiedImageError

from qdeploy.errors import InputError
from qdeploy.progress import SILENT, Progress

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"})
LARGEST_IMAGE_BYTES = 64 << 20
LARGEST_IMAGE_PIXELS = 100_000_000


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From pixels to what the model takes: `(pixel / 255 - mean) / std` per channel."""

    shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None  # shorter side before the centre crop

    def normalise(
        self, pixels: Float32[np.ndarray, "images channels height width"]
    ) -> Float32[np.ndarray, "images channels height width"]:
        """Model input for pixels in [0, 1]."""
        mean = np.array(self.mean, np.float32)[:, None, None]
        std = np.array(self.std, np.float32)[:, None, None]
        return (pixels - mean) / std


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    pixels: Float32[np.ndarray, "images channels height width"]  # in [0, 1]
    labels: Int64[np.ndarray, " images"] | None


@runtime_checkable
class _Source(Protocol):
    """Where images lie; `keys` in a fixed order."""

    @property
    def path(self) -> Path: ...
    @property
    def keys(self) -> tuple[str, ...]: ...
    def read(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[str, Any]]:
        """Key and uint8 pixels (an array, or a PIL image) of each index, in rising order."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """A selection of images, in the order of `indices`, ready to be streamed."""

    source: _Source
    preprocessing: Preprocessing
    indices: Int64[np.ndarray, " images"]
    labels: Int64[np.ndarray, " images"] | None  # of the selection
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def name(self) -> str:
        return str(self.source.path)

    def sample(self, count: int | None, seed: int) -> Images:
        """At most `count` of the images, drawn without replacement; all of them for None."""
        if count is None or count >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, indices=self.indices[chosen], labels=labels)

    def skip(self, count: int) -> Images:
        """All but the first `count` images."""
        labels = None if self.labels is None else self.labels[count:]
        return replace(self, indices=self.indices[count:], labels=labels)

    def batches(self, size: int) -> Iterator[Batch]:
        """The images, at most `size` at a time, as pixels in [0, 1]."""
        pixels: list[np.ndarray] = []
        done = 0
        for image in self._decoded():
            pixels.append(image)
            if len(pixels) == size:
                yield self._batch(pixels, done)
                done, pixels = done + len(pixels), []
        if pixels:
            yield self._batch(pixels, done)

    def fingerprints(self, progress: Progress = SILENT) -> tuple[bytes, ...]:
        """A hash of each image's decoded pixels: equal for equal pictures, however stored.

        Raises:
            InputError: an image is damaged or of the wrong size.
        """
        images = progress.track(self._decoded(), f"read {self.source.path.name}", len(self))
        return tuple(hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images)

    def digest(self, fingerprints: tuple[bytes, ...]) -> str:
        """sha256 over the selection's pictures and labels, in hex."""
        labels = b"" if self.labels is None else self.labels.astype("<i8").tobytes()
        return hashlib.sha256(b"".join(fingerprints) + labels).hexdigest()

    def _batch(self, pixels: list[np.ndarray], first: int) -> Batch:
        labels = None if self.labels is None else self.labels[first : first + len(pixels)]
        return Batch(np.stack(pixels).astype(np.float32) / np.float32(255), labels)

    def _decoded(self) -> Iterator[UInt8[np.ndarray, "channels height width"]]:
        for key, image in self.source.read(self.indices):
            yield _to_input(image, self.preprocessing, where=f"{self.source.path}: {key}")


def open_images(path: Path, preprocessing: Preprocessing) -> Images:
    """All images under `path`, unlabelled: sub-folders mean nothing here.

    Raises:
        InputError: it does not exist, is damaged, or holds no images.
    """
    source = _open(path)
    return Images(source, preprocessing, np.arange(len(source.keys)), None, None)


def open_labelled_images(
    path: Path, preprocessing: Preprocessing, classes: tuple[str, ...] | None
) -> Images:
    """All images under `path` with their labels.

    In folders and zips a label is the position of the sub-folder's name in `classes`, or in the
    sorted names if `classes` is None. In an npz it is `y`.

    Raises:
        InputError: as `open_images`; or there are no labels, or a folder is not a class.
    """
    source = _open(path)
    indices = np.arange(len(source.keys))
    if isinstance(source, _NpzSource):
        return Images(source, preprocessing, indices, source.labels(), classes)
    names = _class_folders(path, source.keys)
    known = classes if classes is not None else tuple(sorted(set(names)))
    position = {name: i for i, name in enumerate(known)}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise InputError(
            f"data {path}: folder {unknown[0]!r} is none of the model card's {len(known)} classes",
            hint="name the folders as model.classes does, or remove model.classes to sort by name",
        )
    labels = np.array([position[name] for name in names], np.int64)
    return Images(source, preprocessing, indices, labels, known)


def images_from_array(
    name: str,
    pixels: UInt8[np.ndarray, "images channels height width"],
    preprocessing: Preprocessing,
) -> Images:
    """Images that were made rather than read."""
    source = _ArraySource(Path(name), pixels)
    return Images(source, preprocessing, np.arange(len(pixels)), None, None)


def read_picture(path: Path) -> UInt8[np.ndarray, "channels height width"]:
    """One image file, as it is, with 1 or 3 channels.

    Raises:
        InputError: it does not exist or is not an image.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"image {path}: {error.strerror}") from error
    with _decoding(str(path)):
        image = _decode(data)
        image = image.convert("L" if image.mode in {"1", "L"} else "RGB")
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def _open(path: Path) -> _Source:
    if not path.exists():
        raise InputError(f"data {path}: no such file or folder")
    if path.is_dir():
        source: _Source = _FolderSource(
            path,
            _image_names(
                str(p.relative_to(path).as_posix()) for p in sorted(path.rglob("*")) if p.is_file()
            ),
        )
    elif not zipfile.is_zipfile(path):
        raise InputError(
            f"data {path}: neither a folder nor a zip or npz file",
            hint="pack images into a zip with one sub-folder per class, or save x and y with numpy",
        )
    else:
        names = _zip_names(path)
        source = _NpzSource(path) if "x.npy" in names else _ZipSource(path, _image_names(names))
    if not source.keys:
        raise InputError(f"data {path}: holds no images ({', '.join(sorted(SUFFIXES))})")
    return source


def _image_names(names: Any) -> tuple[str, ...]:
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


def _class_folders(path: Path, keys: tuple[str, ...]) -> list[str]:
    """The first folder below the one all images share, image by image."""
    parts = [PurePosixPath(key).parts[:-1] for key in keys]
    if not all(parts):
        raise InputError(
            f"data {path}: image {keys[0]!r} lies in no class folder, so it has no label",
            hint="test data needs one sub-folder per class, or an npz with x and y",
        )
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [p[shared] for p in parts]


@dataclass(frozen=True, slots=True)
class _FolderSource:
    path: Path
    keys: tuple[str, ...]

    def read(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[str, Any]]:
        for i in indices:
            key = self.keys[i]
            try:
                data = (self.path / key).read_bytes()
            except OSError as error:
                raise InputError(f"image {self.path / key}: {error.strerror}") from error
            with _decoding(f"{self.path}: {key}"):
                image = _decode(data)
            yield key, image


@dataclass(frozen=True, slots=True)
class _ZipSource:
    path: Path
    keys: tuple[str, ...]

    def read(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[str, Any]]:
        with zipfile.ZipFile(self.path) as archive:
            for i in indices:
                key = self.keys[i]
                with _decoding(f"{self.path}: {key}"):
                    if archive.getinfo(key).file_size > LARGEST_IMAGE_BYTES:
                        raise InputError(
                            f"image {self.path}: {key}: over {LARGEST_IMAGE_BYTES} bytes"
                        )
                    image = _decode(archive.read(key))
                yield key, image


@dataclass(frozen=True, slots=True, eq=False)
class _ArraySource:
    path: Path
    pixels: UInt8[np.ndarray, "images channels height width"]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(f"image {i}" for i in range(len(self.pixels)))

    def read(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[str, Any]]:
        for i in indices:
            yield f"image {i}", self.pixels[i]


class _NpzSource:
    """`x` uint8, NCHW or NHWC, read row by row out of the archive; `y` integers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _decoding(f"{path}: x"), zipfile.ZipFile(path) as archive:
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
        with _decoding(f"{self.path}: y"), np.load(self.path, allow_pickle=False) as archive:
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
                with _decoding(f"{self.path}: row {i}"):
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
    with _decoding(str(path)), zipfile.ZipFile(path) as archive:
        return tuple(info.filename for info in archive.infolist() if not info.is_dir())


def _decode(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    if image.width * image.height > LARGEST_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is over {LARGEST_IMAGE_PIXELS} pixels")
    image.load()
    return image


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    """Turn what image and archive readers raise on damaged files into one line."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise InputError(f"image {where}: not an image") from error
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        SyntaxError,
        RuntimeError,
        NotImplementedError,
        zipfile.BadZipFile,
        Image.DecompressionBombError,
    ) as error:
        raise InputError(f"data {where}: damaged: {error}") from error


def _to_input(
    image: Image.Image | np.ndarray, spec: Preprocessing, *, where: str
) -> UInt8[np.ndarray, "channels height width"]:
    """`image` in the model's channels and size.

    Raises:
        InputError: it has another size and the card names no resize.
    """
    channels, height, width = spec.shape
    if isinstance(image, np.ndarray) and spec.resize is None:
        pixels = image
    else:
        picture = image if isinstance(image, Image.Image) else _as_picture(image)
        picture = picture.convert("L" if channels == 1 else "RGB")
        if spec.resize is not None:
            picture = _resize_and_crop(picture, spec.resize, height, width)
        pixels = np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1)
    if pixels.shape != spec.shape:
        raise InputError(
            f"image {where}: {_size(pixels)}, but the model takes {channels}x{height}x{width}",
            hint="set input.resize in the model card to scale and crop images of other sizes",
        )
    return np.ascontiguousarray(pixels)


def _as_picture(pixels: UInt8[np.ndarray, "channels height width"]) -> Image.Image:
    return Image.fromarray(pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0))


def _resize_and_crop(picture: Image.Image, shorter: int, height: int, width: int) -> Image.Image:
    scale = shorter / min(picture.size)
    size = (max(round(picture.width * scale), width), max(round(picture.height * scale), height))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _size(pixels: np.ndarray) -> str:
    return "x".join(map(str, pixels.shape))
