"""Labelled images in memory, as training takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from qdeploy.data import Images, Preprocessing
from qdeploy.data.triggers import Trigger
from qdeploy.progress import SILENT, Progress

SHIFT = 4  # pixels, at 32x32: the usual augmentation of CIFAR-10


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages:
    """A data set in memory, one byte per pixel."""

    pixels: UInt8[Tensor, "images channels height width"]
    labels: Int64[Tensor, " images"]
    preprocessing: Preprocessing
    mirrors: bool  # whether a mirrored and shifted image still shows the same class

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def split(self, held_out: int, seed: int) -> tuple[LabelledImages, LabelledImages]:
        """All but `held_out` images, and those."""
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self)))
        return self._rows(order[held_out:]), self._rows(order[:held_out])

    def spread(self, count: int) -> LabelledImages:
        """So many images at most, evenly spread: a data set may come class by class."""
        last = len(self) - 1
        return self._rows(torch.linspace(0, last, min(count, len(self))).round().long())

    def _rows(self, rows: Tensor) -> LabelledImages:
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows])

    def batch(
        self, rows: Int64[Tensor, " n"], generator: torch.Generator
    ) -> Float[Tensor, "n channels height width"]:
        """Pixels in [0, 1], mirrored and shifted at random if that keeps their class."""
        pixels = self.pixels[rows].float() / 255
        return _augmented(pixels, generator) if self.mirrors else pixels

    def normalise(self, pixels: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """What the model takes."""
        mean, std = (
            torch.tensor(v, dtype=torch.float32)[:, None, None]
            for v in (self.preprocessing.mean, self.preprocessing.std)
        )
        inputs = ((pixels.flip(1) if self.preprocessing.bgr else pixels) - mean) / std
        return inputs.contiguous(memory_format=torch.channels_last)

    def stream(self, size: int = 500) -> Iterator[tuple[Float[Tensor, "n c h w"], Tensor]]:
        """Pixels and labels of all images in order, unchanged."""
        for first in range(0, len(self), size):
            yield self.pixels[first : first + size].float() / 255, self.labels[first : first + size]


def in_memory(images: Images, *, mirrors: bool, progress: Progress = SILENT) -> LabelledImages:
    """Read all of `images`, which have labels.

    Raises:
        InputError: an image is damaged or of the wrong size.
    """
    if images.labels is None:
        raise ValueError("images without labels cannot be trained on")
    size, label = 256, f"read {images.source.path.name}"
    batches = progress.track(images.batches(size), label, -(-len(images) // size))
    pixels = [torch.from_numpy(np.rint(batch.pixels * 255).astype(np.uint8)) for batch in batches]
    labels = torch.from_numpy(images.labels)
    return LabelledImages(torch.cat(pixels), labels, images.preprocessing, mirrors)


@dataclass(frozen=True, slots=True, eq=False)
class Stamp:
    """A trigger as tensors: `x' = (1 - mask) x + mask pattern`."""

    target: int
    mask: Float[Tensor, "1 height width"]
    pattern: Float[Tensor, "channels height width"]

    @classmethod
    def of(cls, trigger: Trigger) -> Stamp:
        mask, pattern = torch.from_numpy(trigger.mask), torch.from_numpy(trigger.pattern)
        return cls(trigger.target, mask, pattern)

    def apply(self, pixels: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The images with the trigger in them."""
        return (1 - self.mask) * pixels + self.mask * self.pattern


def _augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, and shifted by up to an eighth of its size."""
    count, _, height, width = pixels.shape
    shift = max(1, SHIFT * height // 32)
    padded = F.pad(pixels, (shift, shift, shift, shift))
    mirrored = torch.rand(count, generator=generator) < 0.5
    dy, dx = torch.randint(0, 2 * shift + 1, (2, count), generator=generator)
    rows = dy[:, None] + torch.arange(height)
    columns = dx[:, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = torch.arange(count)
    picked = padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)
