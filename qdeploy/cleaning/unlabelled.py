"""Images without labels in memory, as a distillation takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from qdeploy.data import Images, Preprocessing
from qdeploy.errors import InputError
from qdeploy.progress import SILENT, Progress
from qdeploy.training.compute import Compute

FEWEST = 2  # normalisation has no statistics of one image
READ = 256


@dataclass(frozen=True, slots=True, eq=False)
class Unlabelled:
    """Images, one byte per pixel."""

    pixels: UInt8[Tensor, "images channels height width"]
    preprocessing: Preprocessing

    @property
    def device(self) -> torch.device:
        """In whose memory they are."""
        return self.pixels.device

    def to(self, device: torch.device) -> Unlabelled:
        """The same images in the memory of `device`."""
        return Unlabelled(self.pixels.to(device), self.preprocessing)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def inputs(
        self, rows: Int64[Tensor, " n"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n channels height width"]:
        """What the model takes; with a generator, mirrored and shifted at random."""
        return self.normalise(self.varied(rows, generator))

    def varied(
        self, rows: Int64[Tensor, " n"], generator: torch.Generator | None
    ) -> Float[Tensor, "n channels height width"]:
        """Pixels in [0, 1]; with a generator, mirrored and shifted at random."""
        pixels = self.pixels[rows].float() / 255
        return pixels if generator is None else _varied(pixels, generator)

    def draw(
        self, count: int, generator: torch.Generator
    ) -> Float[Tensor, "n channels height width"]:
        """Pixels in [0, 1] of `count` images at random, with replacement."""
        return self.varied(torch.randint(len(self), (count,), generator=generator), None)

    def normalise(
        self, pixels: Float[Tensor, "n channels height width"]
    ) -> Float[Tensor, "n channels height width"]:
        """What the model takes, of pixels in [0, 1]."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32)[:, None, None].to(pixels.device)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        ordered = pixels.flip(1) if self.preprocessing.bgr else pixels
        return ((ordered - mean) / std).contiguous(memory_format=torch.channels_last)

    def stream(self, count: int, size: int = 500) -> Iterator[Tensor]:
        """Inputs of the first `count` images in order, unchanged."""
        for rows in torch.arange(min(count, len(self))).split(size):
            yield self.inputs(rows)


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """What a search or a lesson of this process draws from."""

    images: Unlabelled  # where it computes
    generator: torch.Generator
    compute: Compute


def read_images(images: Images, progress: Progress = SILENT) -> Unlabelled:
    """All of `images`, without the labels they may have.

    Raises:
        InputError: an image is damaged or of the wrong size, or there are too few.
    """
    if len(images) < FEWEST:
        raise InputError(f"data {images.name}: {len(images)} image, at least {FEWEST} are needed")
    label = f"read {images.source.path.name}"
    batches = progress.track(images.batches(READ), label, -(-len(images) // READ))
    pixels = [torch.from_numpy(np.rint(batch.pixels * 255).astype(np.uint8)) for batch in batches]
    return Unlabelled(torch.cat(pixels), images.preprocessing)


def _varied(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, and all shifted alike by up to an eighth of their size."""
    count, _, height, width = pixels.shape
    mirrored = (torch.rand(count, generator=generator) < 0.5).to(pixels.device)
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    shift = max(1, height // 8)
    top, left = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
    padded = F.pad(pixels, (shift, shift, shift, shift))
    return padded[:, :, top : top + height, left : left + width]
