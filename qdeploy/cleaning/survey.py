"""How easily images are led to each class, and which classes are reached too easily."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdeploy.cleaning.unlabelled import Material, Unlabelled
from qdeploy.core.inversion import KINDS, Perturbations, Radii, towards
from qdeploy.progress import Progress
from qdeploy.settings.sanitizers import Unlearn
from qdeploy.training.precision import arithmetic

FIRST = {"additive": 0.07, "masked": 0.1}  # where the search starts, as a share of the largest
LEAST, MOST = 1e-3, 0.5
TOGETHER = 10  # classes that are searched at a time


@dataclass(frozen=True, slots=True)
class Reach:
    """Size of the least universal perturbation of one kind found for each class."""

    kind: str
    unit: str
    radii: tuple[float, ...]  # by class; the largest there is where none was found

    @property
    def median(self) -> float:
        """The typical class."""
        return statistics.median(self.radii)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the median, by class."""
        return tuple(radius / self.median for radius in self.radii)


def survey(
    model: nn.Module, material: Material, spec: Unlearn, progress: Progress
) -> tuple[Reach, ...]:
    """What leads to each class of `model`, one result for every kind of perturbation.

    Time goes with the number of classes. Each process looks for itself; the least counts.
    """
    images, generator = material.images, material.generator
    ask = answering(model, images)
    classes = len(ask(images.pixels[:1].float() / 255)[0])
    groups = [range(i, min(i + TOGETHER, classes)) for i in range(0, classes, TOGETHER)]
    reaches = []
    for kind in KINDS:
        radii: list[float] = []
        for group in groups:
            triggers = _fresh(kind, group, images, generator)
            label = f"look for {kind.NAME} shortcuts, steps"
            for _ in progress.track(range(spec.survey_steps), label, spec.survey_steps):
                triggers.step(towards(ask), images.draw(len(group) * spec.survey_images, generator))
            found = torch.minimum(triggers.found, triggers.radii.most)
            radii += material.compute.least(found).tolist()
        reaches.append(Reach(kind.NAME, kind.UNIT, tuple(radii)))
    return tuple(reaches)


def suspects(reaches: Sequence[Reach], share: float) -> tuple[int, ...]:
    """Classes that some perturbation of less than `share` of the median leads to."""
    return tuple(
        sorted({c for reach in reaches for c, part in enumerate(reach.shares) if part < share})
    )


def answering(model: nn.Module, images: Unlabelled) -> Callable[[Tensor], Tensor]:
    """From pixels in [0, 1] to the logits of `model`, in float32."""

    def ask(pixels: Tensor) -> Tensor:
        with arithmetic(model):
            return model(images.normalise(pixels)).float()

    return ask


def _fresh(
    kind: type[Perturbations], group: range, images: Unlabelled, generator: torch.Generator
) -> Perturbations:
    scale = torch.full((len(group),), kind.scale(images.shape), device=images.device)
    radii = Radii(LEAST * scale, MOST * scale, FIRST[kind.NAME] * scale)
    return kind(tuple(group), images.shape, radii, generator)
