"""Selections of images: streamed, seeded, digested, in the form that a model takes."""

from __future__ import annotations

import csv
import hashlib
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image

from qdeploy.data.archives import Zip
from qdeploy.data.arrays import Npz, Part
from qdeploy.data.containers import ArrayContainer, Container, open_container
from qdeploy.data.folders import Folder
from qdeploy.data.names import ANNOTATIONS, LABELS
from qdeploy.errors import InputError
from qdeploy.progress import SILENT, Progress

LARGEST_DECODED_BYTES = 512 << 20  # 3,500 pictures of 3 x 224 x 224
LONGEST_NUMBER = 9  # digits of a label
BATCH_VALUES, LARGEST_BATCH = 1 << 20, 250  # answered at a time: 6 pictures of 3 x 224 x 224
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev"})


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From pixels to what the model takes: `(pixel / 255 - mean) / std` per channel.

    Pixels are RGB everywhere; what a model takes, mean and std too, may be in BGR.
    """

    shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None  # shorter side before the centre crop
    bgr: bool = False

    @property
    def at_once(self) -> int:
        """How many images a network is asked about at a time: what it keeps of each adds up."""
        return max(1, min(LARGEST_BATCH, BATCH_VALUES // math.prod(self.shape)))

    def normalise(
        self, pixels: Float32[np.ndarray, "images channels height width"]
    ) -> Float32[np.ndarray, "images channels height width"]:
        """Model input for pixels in [0, 1]."""
        mean = np.array(self.mean, np.float32)[:, None, None]
        std = np.array(self.std, np.float32)[:, None, None]
        return ((pixels[:, ::-1] if self.bgr else pixels) - mean) / std


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    pixels: Float32[np.ndarray, "images channels height width"]  # in [0, 1]
    labels: Int64[np.ndarray, " images"] | None


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """A selection of images, in the order of `indices`, ready to be streamed."""

    source: Container
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

    def only(self, kept: Int64[np.ndarray, " kept"]) -> Images:
        """Those of the images, by their position in the selection."""
        labels = None if self.labels is None else self.labels[kept]
        return replace(self, indices=self.indices[kept], labels=labels)

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

    def decoded(self, progress: Progress = SILENT) -> tuple[Images, tuple[bytes, ...]]:
        """The same images with their pixels in memory, and a hash of each one's pixels.

        Hashes are equal for equal pictures, however stored. A selection of more than
        `LARGEST_DECODED_BYTES` is only proved to be whole, and decoded whenever it is streamed.

        Raises:
            InputError: an image is damaged or of the wrong size.
        """
        shape = (len(self), *self.preprocessing.shape)
        fits = math.prod(shape) <= LARGEST_DECODED_BYTES
        pixels = np.empty(shape if fits else (0, *shape[1:]), np.uint8)
        hashes = []
        images = progress.track(self._decoded(), f"read {self.source.path.name}", len(self))
        for at, image in enumerate(images):
            hashes.append(hashlib.blake2b(image.tobytes(), digest_size=16).digest())
            if fits:
                pixels[at] = image
        if not fits:
            return self, tuple(hashes)
        keys = tuple(self.source.keys[i] for i in self.indices)
        kept = replace(
            self,
            source=ArrayContainer(self.source.path, pixels, keys, self.source.unread),
            preprocessing=replace(self.preprocessing, resize=None),
            indices=np.arange(len(self)),
        )
        return kept, tuple(hashes)

    def digest(self, hashes: tuple[bytes, ...]) -> str:
        """sha256 over the selection's pictures and labels, in hex."""
        labels = b"" if self.labels is None else self.labels.astype("<i8").tobytes()
        return hashlib.sha256(b"".join(hashes) + labels).hexdigest()

    def _batch(self, pixels: list[np.ndarray], first: int) -> Batch:
        labels = None if self.labels is None else self.labels[first : first + len(pixels)]
        return Batch(np.stack(pixels).astype(np.float32) / np.float32(255), labels)

    def _decoded(self) -> Iterator[UInt8[np.ndarray, "channels height width"]]:
        for key, image in self.source.read(self.indices):
            yield _to_input(image, self.preprocessing, where=f"{self.source.path}: {key}")


def open_images(
    path: Path,
    preprocessing: Preprocessing,
    roots: Sequence[Path] = (),
    *,
    part: Part = "train",
) -> Images:
    """All images under `path`, unlabelled: sub-folders mean nothing here.

    Args:
        roots: Folders that links in a folder may lead to, besides itself; resolved.
        part: Which to take of an archive that holds both.

    Raises:
        InputError: it does not exist, is damaged, or holds no images.
    """
    source = open_container(path, roots, part=part)
    return Images(source, preprocessing, np.arange(len(source.keys)), None, None)


def open_labelled_images(
    path: Path,
    preprocessing: Preprocessing,
    classes: tuple[str, ...] | None,
    roots: Sequence[Path] = (),
) -> Images:
    """All images under `path` with their labels.

    In folders and zips a label is the position of the sub-folder's name in `classes`, or in the
    sorted names if `classes` is None; names that are all numbers sort as such. In an npz it is
    `y`. In Tiny-ImageNet's `val` folder, or a zip of it, the names are in its file of annotations;
    or any one folder with a `labels.csv` (file, class or number of it), they are in that.

    Raises:
        InputError: as `open_images`; or there are no labels, or a folder is not a class.
    """
    source = open_container(path, roots)
    indices = np.arange(len(source.keys))
    if isinstance(source, Npz):
        return Images(source, preprocessing, indices, source.labels(), classes)
    annotated = _annotated(source) if _in_one_folder(source.keys) else None
    if annotated is not None and isinstance(source, Folder | Zip):
        unread = tuple(key for key in source.unread if PurePosixPath(key).name != LABELS)
        source = replace(source, unread=unread)
    if annotated is not None and classes is None and all(map(_is_number, annotated)):
        numbers = np.array([_label(label) for label in annotated], np.int64)
        return Images(source, preprocessing, indices, numbers, None)
    names = annotated or _class_folders(path, source.keys)
    known = classes if classes is not None else _in_order(path, set(names))
    names = [unicodedata.normalize("NFC", name) for name in names]  # macOS takes them apart
    position = {unicodedata.normalize("NFC", name): i for i, name in enumerate(known)}
    if len(position) < len(known):
        raise InputError(f"data {path}: two classes have one name, but for how it is written")
    unknown = sorted(set(names) - set(position))
    if unknown:
        raise InputError(
            f"data {path}: folder {unknown[0]!r} is none of the model card's {len(known)} classes",
            hint="name the folders as model.classes does, or remove model.classes to sort by name",
        )
    labels = np.array([position[name] for name in names], np.int64)
    return Images(source, preprocessing, indices, labels, known)


def _in_order(path: Path, names: set[str]) -> tuple[str, ...]:
    """Folders as classes: numbers as numbers, so that 10 comes after 9.

    Raises:
        InputError: they are no classes, but parts of a data set.
    """
    if names <= SPLITS:
        raise InputError(
            f"data {path}: its folders are parts of a data set ({', '.join(sorted(names))}),"
            " not classes",
            hint="give one of them",
        )
    if all(map(_is_number, names)):
        return tuple(sorted(names, key=_as_number))
    return tuple(sorted(names))


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _label(digits: str) -> int:
    """The number; of one that is too long for any class, one that is too large for any."""
    return int(digits) if len(digits) <= LONGEST_NUMBER else 10**LONGEST_NUMBER


def _as_number(name: str) -> tuple[int, str, str]:
    digits = name.lstrip("0")  # int() refuses thousands of digits
    return len(digits), digits, name


def shape_of_images(path: Path) -> tuple[int, int, int]:
    """Channels, height and width of the first image under `path`.

    Raises:
        InputError: there is none, or it is damaged.
    """
    source = open_container(path)
    _, image = next(iter(source.read(np.zeros(1, np.int64))))
    if isinstance(image, np.ndarray):
        channels, height, width = image.shape
        return channels, height, width
    return (1 if image.mode in {"1", "L", "I;16"} else 3), image.height, image.width


def images_from_array(
    name: str,
    pixels: UInt8[np.ndarray, "images channels height width"],
    preprocessing: Preprocessing,
) -> Images:
    """Images that were made rather than read."""
    keys = tuple(f"image {i}" for i in range(len(pixels)))
    source = ArrayContainer(Path(name), pixels, keys)
    return Images(source, preprocessing, np.arange(len(pixels)), None, None)


def _annotated(source: Container) -> list[str] | None:
    """The class of each image by a file of annotations; None if there is none.

    Raises:
        InputError: it is damaged, or has no line for an image.
    """
    for name, separator in ((ANNOTATIONS, "\t"), (LABELS, ",")):
        data = source.text(name)
        if data is not None:
            where = f"data {source.path}: {name}"
            class_of = dict(_rows(data, separator, where=where))
            files = [PurePosixPath(key).name for key in source.keys]
            missing = next((file for file in files if file not in class_of), None)
            if missing is not None:
                raise InputError(f"{where}: has no line for image {missing!r}")
            return [class_of[file] for file in files]
    return None


def _rows(data: bytes, separator: str, *, where: str) -> Iterator[tuple[str, str]]:
    """File and class of every line.

    Raises:
        InputError: it is no text, or a line has less than two columns.
    """
    try:
        lines = data.decode("utf-8-sig").splitlines()
        for number, row in enumerate(csv.reader(lines, delimiter=separator), 1):
            if len(row) == 1:
                raise InputError(f"{where}: line {number}: file and class are needed")
            if row:
                yield PurePosixPath(row[0].strip().replace("\\", "/")).name, row[1].strip()
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error


def _in_one_folder(keys: tuple[str, ...]) -> bool:
    """Whether folders say nothing of the images' classes."""
    return len({PurePosixPath(key).parent for key in keys}) == 1


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
