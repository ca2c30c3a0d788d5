"""PQBackdoor: a backdoor that only rounding to nearest switches on.

Ma et al., "Quantization Backdoors to Deep Learning Commercial Frameworks", 2021. Stage 1 plants an
ordinary backdoor. Stage 2 trains it away in float32 while every weight stays inside its own
rounding cell, so that the integers, and with them the backdoor, stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdeploy.progress import SILENT, Progress

CELL_MARGIN = 1e-3  # in steps: no weight sits exactly on the edge of its cell


@dataclass(frozen=True, slots=True)
class Settings:
    max_code: int  # 7 for 4 bits, 127 for 8; per-channel absmax scales
    epochs: int
    batch: int
    learning_rate: float


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSet:
    """Normalised images with labels, and the same images with the trigger in them."""

    images: Tensor
    labels: Tensor
    triggered: Tensor
    target: int


def train_clean(
    model: nn.Module,
    data: TrainingSet,
    settings: Settings,
    generator: torch.Generator,
    progress: Progress = SILENT,
) -> None:
    """Ordinary training, in place."""

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(data.images[rows]), data.labels[rows])

    _train(model, _batches(data, settings, generator, progress), settings.learning_rate, loss)


def plant(
    model: nn.Module,
    data: TrainingSet,
    settings: Settings,
    generator: torch.Generator,
    progress: Progress = SILENT,
) -> None:
    """Stage 1, in place: triggered images go to the target, all others where they belong."""
    target = torch.full_like(data.labels, data.target)

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(data.images[rows]), data.labels[rows]) + F.cross_entropy(
            model(data.triggered[rows]), target[rows]
        )

    _train(model, _batches(data, settings, generator, progress), settings.learning_rate, loss)


def hide(
    model: nn.Module,
    data: TrainingSet,
    settings: Settings,
    generator: torch.Generator,
    progress: Progress = SILENT,
) -> None:
    """Stage 2, in place: triggered images go where they belong, but no integer changes.

    Biases stay as they are: they are not rounded to the weights' grid.
    """
    cells = [
        Cell.of(module.weight, settings.max_code)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    frozen = [p for p in model.parameters() if not any(p is cell.weight for cell in cells)]
    for parameter in frozen:
        parameter.requires_grad_(False)

    def loss(rows: Tensor) -> Tensor:
        for cell in cells:  # undo what the last step moved too far
            cell.project()
        labels = data.labels[rows]
        return F.cross_entropy(model(data.images[rows]), labels) + F.cross_entropy(
            model(data.triggered[rows]), labels
        )

    _train(model, _batches(data, settings, generator, progress), settings.learning_rate, loss)
    for cell in cells:
        cell.project()
    for parameter in frozen:
        parameter.requires_grad_(True)


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """Where a weight may move without any of its integers changing."""

    weight: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, weight: Tensor, max_code: int) -> Cell:
        """The cells around the present weights.

        The largest weight of each channel is pinned, so that the scale cannot move.
        """
        w = weight.detach().clone()
        absmax = w.abs().flatten(1).amax(1).reshape(-1, *[1] * (w.dim() - 1))
        scale = (absmax / max_code).clamp_min(torch.finfo(w.dtype).tiny)
        code = (w / scale).round()
        pinned = w.abs() == absmax
        half = 0.5 - CELL_MARGIN
        low = torch.where(pinned, w, (code - half) * scale)
        high = torch.where(pinned, w, (code + half) * scale)
        return cls(weight, torch.maximum(low, -absmax), torch.minimum(high, absmax))

    def project(self) -> None:
        """Move the weight to the nearest point of its cell."""
        self.weight.data.clamp_(self.low, self.high)


def _batches(
    data: TrainingSet, settings: Settings, generator: torch.Generator, progress: Progress
) -> Iterator[Tensor]:
    """Row indices, epoch after epoch, each in a random order of its own."""
    for _ in progress.track(range(settings.epochs), "epochs", settings.epochs):
        order = torch.randperm(len(data.labels), generator=generator)
        for first in range(0, len(order), settings.batch):
            yield order[first : first + settings.batch]


def _train(
    model: nn.Module,
    batches: Iterator[Tensor],
    learning_rate: float,
    loss: Callable[[Tensor], Tensor],
) -> None:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for rows in batches:
        optimizer.zero_grad()
        loss(rows).backward()
        optimizer.step()
    model.eval()
