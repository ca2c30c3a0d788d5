"""Pictures as arrays, and damage as one line."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from qdeploy.errors import InputError, foreign_reader

LARGEST_IMAGE_PIXELS = 100_000_000


def read_picture(path: Path) -> UInt8[np.ndarray, "channels height width"]:
    """One image file, as it is, with 1 or 3 channels.

    Raises:
        InputError: it does not exist or is not an image.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"image {path}: {error.strerror}") from error
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
    image = Image.open(io.BytesIO(data))
    if image.width * image.height > LARGEST_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is over {LARGEST_IMAGE_PIXELS} pixels")
    image.load()
    return image


@contextmanager
def decoding(where: str) -> Iterator[None]:
    """Turn what image and archive readers raise on damaged files into one line."""
    with foreign_reader(f"data {where}: damaged"):
        try:
            yield
        except UnidentifiedImageError as error:
            raise InputError(f"image {where}: not an image") from error
