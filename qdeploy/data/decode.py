"""Pictures as arrays, and damage as one line."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from qdeploy.disk.files import read_bounded
from qdeploy.errors import InputError, foreign_reader

LARGEST_IMAGE_PIXELS = 50_000_000
LARGEST_IMAGE_BYTES = 64 << 20
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")  # none starts another program
DEEP = 257  # steps of 16 bits to one of 8


def read_picture(path: Path) -> UInt8[np.ndarray, "channels height width"]:
    """One image file, as it is, with 1 or 3 channels.

    Raises:
        InputError: it does not exist or is not an image.
    """
    data = read_bounded(path, LARGEST_IMAGE_BYTES, what="image")
    with decoding(str(path)):
        image = decode(data)
        image = image.convert("L" if image.mode in {"1", "L"} else "RGB")
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def as_png(pixels: UInt8[np.ndarray, "channels height width"]) -> bytes:
    """A picture of 1 or 3 channels as a PNG file; of any others, the first."""
    shown = pixels if len(pixels) in {1, 3} else pixels[:1]
    array = np.ascontiguousarray(shown.transpose(1, 2, 0))
    buffer = io.BytesIO()
    Image.fromarray(array[:, :, 0] if len(shown) == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """The (first) picture in `data`, 8 bits deep, whatever its file is called.

    Raises:
        ValueError: it is too large, or of numbers that are no brightness.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they speak of metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > LARGEST_IMAGE_PIXELS:
            raise ValueError(f"{image.width}x{image.height} is over {LARGEST_IMAGE_PIXELS} pixels")
        image.load()
    return _in_eight_bits(image)


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """16 bits scaled down: PIL's own conversion clips them, so that nearly all are white."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF")
    if sixteen:
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > DEEP * 255:
            raise ValueError("its values are not those of 8 or 16 bits")
        return Image.fromarray(np.rint(values / DEEP).astype(np.uint8))
    if image.mode in {"I", "F"}:
        raise ValueError("a picture of 32-bit or float values; convert it to 8 bits")
    return image


@contextmanager
def decoding(where: str) -> Iterator[None]:
    """Turn what image and archive readers raise on damaged files into one line."""
    with foreign_reader(f"data {where}: damaged"):
        try:
            yield
        except UnidentifiedImageError as error:
            raise InputError(f"image {where}: not an image") from error
