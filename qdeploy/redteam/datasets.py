"""The images that models are made with: given by path, or scikit-learn's digits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from qdeploy.data import Preprocessing, open_labelled_images, shape_of_images
from qdeploy.errors import InputError, UsageError
from qdeploy.progress import Progress
from qdeploy.redteam.images import LabelledImages, in_memory

DIGITS = "digits"
DIGITS_FOR_TEST = 600
TEST_FOLDERS = ("test", "val")


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Training and test images, and where the model card will say that they are."""

    train: LabelledImages
    test: LabelledImages
    train_path: Path
    test_path: Path
    classes: tuple[str, ...]


def open_dataset(data: str, test: Path | None, folder: Path, progress: Progress) -> Dataset:
    """The images called `data`: "digits", or a path as `open_labelled_images` reads it.

    A folder with `train` and `test` (or `val`) in it needs no `test`. Normalisation is the mean and
    standard deviation of the training images.

    Args:
        folder: Where digits are written, so that a card can name them.

    Raises:
        UsageError: there are no test images, or scikit-learn is not installed.
        InputError: an image is damaged, or of another size than the first.
    """
    paths = _write_digits(folder) if data == DIGITS else _paths(Path(data), test)
    shape = shape_of_images(paths[0])
    raw = Preprocessing(shape, (0.0,) * shape[0], (1.0,) * shape[0])
    train = open_labelled_images(paths[0], raw, None)
    tests = open_labelled_images(paths[1], raw, train.classes)
    mirrors = data != DIGITS
    seen = in_memory(train, mirrors=mirrors, progress=progress)
    preprocessing = _standardising(seen)
    kept = in_memory(tests, mirrors=mirrors, progress=progress)
    return Dataset(
        replace(seen, preprocessing=preprocessing),
        replace(kept, preprocessing=preprocessing),
        *paths,
        train.classes or tuple(map(str, range(seen.classes))),
    )


def _paths(data: Path, test: Path | None) -> tuple[Path, Path]:
    if test is not None:
        return data, test
    found = [data / name for name in TEST_FOLDERS if (data / name).is_dir()]
    if not (data / "train").is_dir() or not found:
        raise UsageError(
            f"--data {data}: no test images are known",
            hint="give --test, or a folder with train/ and test/ (or val/) in it",
        )
    return data / "train", found[0]


def _standardising(images: LabelledImages) -> Preprocessing:
    pixels = images.pixels.transpose(0, 1).flatten(1)
    per_channel = [channel.float() / 255 for channel in pixels]
    mean = tuple(round(float(c.mean()), 4) for c in per_channel)
    std = tuple(round(float(c.std()), 4) for c in per_channel)
    if min(std) <= 0:
        raise InputError("data: a color channel is the same in all training images")
    return replace(images.preprocessing, mean=mean, std=std)


def _write_digits(folder: Path) -> tuple[Path, Path]:
    """1,797 scanned digits, 8x8, shuffled; pixels 0 to 255."""
    try:
        digits = import_module("sklearn.datasets").load_digits()
    except ImportError as error:
        raise UsageError(
            "the digits come with scikit-learn, which is not installed",
            hint="pip install 'qdeploy[demo]'",
        ) from error
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = np.rint(digits.images[order] * (255 / 16)).astype(np.uint8)[:, None]
    labels = digits.target[order].astype(np.int64)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = folder / "digits-train.npz", folder / "digits-test.npz"
    np.savez(train, x=pixels[DIGITS_FOR_TEST:], y=labels[DIGITS_FOR_TEST:])
    np.savez(test, x=pixels[:DIGITS_FOR_TEST], y=labels[:DIGITS_FOR_TEST])
    return train, test


def victim_image(images: LabelledImages, target: int) -> tuple[torch.Tensor, int]:
    """The first image of another class than `target`, as pixels in [0, 1], and its class."""
    index = int((images.labels != target).nonzero()[0])
    return images.pixels[index : index + 1].float() / 255, int(images.labels[index])
